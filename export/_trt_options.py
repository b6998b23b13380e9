"""What a recipe may say about the TensorRT target: its options, checked before anything is built."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, cast

import onnx

from s2d_deploy.errors import RecipeError, message

KEY = "targets[tensorrt].options"
Range = tuple[int, int, int]  # min, opt, max


@dataclass(frozen=True, slots=True)
class Options:
    """Options of the target.

    Attributes:
        compute: type of the float part (`_trt_compute`); ``auto`` is fp16 for weight-only precisions, else fp32.
        attention: ``exact`` keeps the plan's codes of the probabilities; ``fused`` lets TensorRT make one kernel of
            attention, with other codes there (`_trt_attention`).
        compute_capabilities: GPUs that the engine is for, as ``"8.6"``, or ``"current"`` for the one that is here.
            The default is what TensorRT-RTX itself takes: Ampere, Ada and Blackwell.
        batch: smallest, most frequent and largest batch.
        batch_sizes: the batches that a run will use; they make `batch` where that is not given.
        dimensions: the same for every other dynamic dimension, by its name in the ONNX file.
        weight_storage: per-channel 4-bit weights in the engine: ``int4`` packs two in a byte and unpacks them at run
            time; ``int8`` is twice as large and ready to be multiplied. The numbers are the same.
        workspace_mb: limit of scratch memory; None is TensorRT's own.
        tf32: let float products run in TF32 (10 bits of mantissa).
        optimization_level: 0 to 5; None is TensorRT's own.
        plugins: shared libraries with TensorRT plugins that the graph needs; loaded here and where the engine runs.
        timing_cache: a file that keeps what TensorRT measured while it chose kernels, for the next build; TensorRT-RTX
            chooses on the device, and has none.
        compress: store the engine as ``.xz`` where that saves a quarter.
        timeout_s: give up after this many seconds.
    """

    compute_capabilities: tuple[str, ...] = ("8.0", "8.6", "8.9", "12.0")
    batch: Range = (1, 8, 32)
    batch_sizes: tuple[int, ...] = ()
    dimensions: Mapping[str, Range] = field(default_factory=dict)
    compute: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    attention: Literal["exact", "fused"] = "exact"
    weight_storage: Literal["int4", "int8"] = "int4"
    workspace_mb: int | None = None
    tf32: bool = False
    optimization_level: int | None = None
    plugins: tuple[str, ...] = ()
    timing_cache: str | None = None
    compress: bool = True
    timeout_s: float = 1800.0

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Options:
        """Checked options.

        Raises:
            RecipeError: an unknown key (with a suggestion) or a bad value; every offender is named.
        """
        known = [f.name for f in fields(cls)]
        problems, values = [], dict[str, Any]()
        for key, value in options.items():
            if key not in known:
                close = get_close_matches(str(key), known, n=1, cutoff=0.5)
                hint = f"did you mean {close[0]!r}?" if close else "remove it"
                problems.append(message(f"{KEY}: unknown key {key!r}", expected=f"one of {', '.join(known)}", fix=hint))
                continue
            try:
                values[key] = _CHECKS[key](value)
            except (TypeError, ValueError) as error:
                problems.append(message(f"{KEY}.{key}: bad value", expected=str(error), found=repr(value)[:80]))
        if problems:
            raise RecipeError("\n".join(problems))
        if (sizes := values.get("batch_sizes")) and "batch" not in values:
            values["batch"] = (1, min(sizes), max(sizes))
        return cls(**values)

    def shapes(self, model: onnx.ModelProto) -> dict[str, list[list[int]]]:
        """The optimization profile: ``{input: [min shape, opt shape, max shape]}`` for inputs with dynamic dimensions.

        Raises:
            RecipeError: a dynamic dimension beside the batch has no range.
        """
        result, missing = {}, []
        for value in model.graph.input:
            dimensions = value.type.tensor_type.shape.dim
            columns: list[Range] = []
            for index, d in enumerate(dimensions):
                if d.HasField("dim_value"):
                    columns.append((d.dim_value,) * 3)
                elif d.dim_param in self.dimensions:
                    columns.append(self.dimensions[d.dim_param])
                elif index == 0 or d.dim_param == "batch":
                    columns.append(self.batch)
                else:
                    missing.append(f"{d.dim_param or f'dimension {index}'} of input {value.name!r}")
            if any(c[0] != c[2] or dimensions[i].dim_param for i, c in enumerate(columns)):
                result[value.name] = [[c[i] for c in columns] for i in range(3)]
        if missing:
            raise RecipeError(
                message(
                    f"{KEY}.dimensions: no range for {', '.join(dict.fromkeys(missing))}",
                    expected="min, opt and max for every dynamic dimension beside the batch",
                    fix="e.g. dimensions: {sequence: {min: 1, opt: 64, max: 128}}",
                )
            )
        return result


def sm_name(capability: str) -> str:
    """``"8.6"`` -> ``"SM86"``; ``"current"`` -> ``"CURRENT"``."""
    return "CURRENT" if capability == "current" else "SM" + capability.replace(".", "")


def _capabilities(value: Any) -> tuple[str, ...]:
    items = [value] if isinstance(value, str | float) else value
    if not isinstance(items, list | tuple) or not items:
        raise ValueError('a list such as ["8.6", "8.9", "12.0"], or "current"')
    result = []
    for item in items:
        text = str(item).strip().lower().removeprefix("sm").removeprefix("_")
        if re.fullmatch(r"\d{2,3}", text):
            text = f"{text[:-1]}.{text[-1]}"
        if text != "current" and not re.fullmatch(r"\d{1,2}\.\d", text):
            raise ValueError(f'compute capabilities such as "8.6", or "current"; {item!r} is none')
        result.append(text)
    if "current" in result and len(set(result)) > 1:
        raise ValueError('either "current" or a list of capabilities, not both')
    return tuple(sorted(set(result), key=lambda t: (0.0,) if t == "current" else (float(t),)))


def _range(value: Any) -> Range:
    expected = "a number, or {min: 1, opt: 8, max: 32} in ascending order"
    if isinstance(value, bool):
        raise TypeError(expected)
    if isinstance(value, int):
        value = (1, value, value)
    if isinstance(value, Mapping):
        if set(value) != {"min", "opt", "max"}:
            raise ValueError(expected)
        value = (value["min"], value["opt"], value["max"])
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if len(numbers) != 3 or any(type(n) is not int for n in numbers) or not 1 <= numbers[0] <= numbers[1] <= numbers[2]:
        raise ValueError(expected)
    return cast(Range, numbers)


def _sizes(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or any(type(n) is not int or n < 1 for n in value):
        raise ValueError("a list of positive numbers")
    return tuple(value)


def _ranges(value: Any) -> dict[str, Range]:
    if not isinstance(value, Mapping):
        raise TypeError("{name: {min, opt, max}}")
    return {str(name): _range(part) for name, part in value.items()}


def _one_of(*choices: str) -> Any:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(" or ".join(choices))
        return str(value)

    return check


def _whole(least: int, most: int) -> Any:
    def check(value: Any) -> int | None:
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"a whole number from {least} to {most}")
        return int(value)

    return check


def _path(value: Any) -> str | None:
    if value is not None and (not isinstance(value, str) or not value):
        raise TypeError("a path")
    return value


def _paths(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) and v for v in value):
        raise TypeError("a list of paths")
    return tuple(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("true or false")
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError("a positive number of seconds")
    return float(value)


_CHECKS: dict[str, Any] = {
    "compute_capabilities": _capabilities,
    "compute": _one_of("auto", "fp32", "fp16", "bf16"),
    "attention": _one_of("exact", "fused"),
    "batch": _range,
    "batch_sizes": _sizes,
    "dimensions": _ranges,
    "weight_storage": _one_of("int4", "int8"),
    "workspace_mb": _whole(1, 1 << 20),
    "tf32": _flag,
    "optimization_level": _whole(0, 5),
    "plugins": _paths,
    "timing_cache": _path,
    "compress": _flag,
    "timeout_s": _seconds,
}
