"""Target `ort`: the common ONNX file -> the same model on ONNX Runtime's integer kernels (`_ort_rewrite` says how).

The artifact is that one ONNX file. Plain onnxruntime loads it, without this package:

    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"pixel_values": images})

Weights stay INT4 or INT8 in the file and are unpacked when the session loads, so the file that ships is small and the
kernels see bytes. Run as a script: ``python -m s2d_deploy.export.to_ort CHECKPOINT|COMMON.onnx OUT_FOLDER``, which also
writes a manifest and an example that needs nothing of this project.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from s2d_deploy.errors import ArtifactError, PlanError, RuntimeUnavailable, message
from s2d_deploy.graph_check import sound
from s2d_deploy.large_models import LARGE, save_model
from s2d_deploy.qgraph import initializers, load_model, metadata, require_integer_codes
from s2d_deploy.registry import load_runtime
from s2d_deploy.session import Artifact, Progress

from ._ort_options import checked_options
from ._ort_placement import scratch_session, search
from ._ort_rewrite import to_integer_kernels, to_plain_quantizers

FILE = "model.onnx"
PLACEMENT_KEY = "s2d.placed"  # metadata of the model
_EXTERNAL_BEYOND = LARGE
# Inputs of a kernel that are the stored weight: codes, scales, zero points.
_WEIGHT_INPUTS = {
    "MatMulIntegerToFloat": (1, 3, 5),
    "MatMulNBits": (1, 2, 3),
    "ConvInteger": (1, 3),
    "MatMul": (1,),
    "Conv": (1,),
}


class OrtTarget:
    """See `s2d_deploy.session.Target`."""

    name = "ort"

    def dialect(self, model: Path, folder: Path, *, precision: str) -> Path:
        """Rewrite the common file onto integer kernels, as ``model.onnx`` in `folder`.

        Raises:
            ArtifactError: no readable ONNX, not exported for `precision`, or it lies where the dialect would go.
            PlanError: a scale is zero, negative, denormal, infinite or NaN; every one is named.
        """
        return self.dialect_for(model, folder, precision=precision, options={}, placement=None)

    def dialect_for(
        self,
        model: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        placement: Mapping[str, Any] | None,
    ) -> Path:
        """As `dialect`: in Q/DQ where the options say so, and with each op in the form that a search has chosen.

        Raises:
            RecipeError: an unknown option or value. Else as `dialect`.
        """
        settings = checked_options(options)
        target = folder / FILE
        if model.resolve() == target.resolve():
            raise ArtifactError(
                message(f"{model}: the dialect would overwrite the common file", fix="choose another output folder")
            )
        common = _checked(model, precision)
        require_integer_codes(common, "onnxruntime")
        with sound(str(model)):
            _check_scales(model, common)
            if settings["dialect"] == "qdq":
                rewritten = to_plain_quantizers(common)
            else:
                rewritten = to_integer_kernels(common, (placement or {}).get("forms"))
        if placement is not None:
            rewritten.metadata_props.add(key=PLACEMENT_KEY, value=json.dumps(_summary_of(placement)))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(rewritten, target, beyond=_EXTERNAL_BEYOND)
        return target

    def search(
        self,
        model: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        batches: Sequence[int],
        sizes: Mapping[str, int],
        threads: int,
        progress: Progress,
    ) -> dict[str, Any] | None:
        """Measure the forms of every contraction of the common file and of the whole; see `_ort_placement.search`.

        Args:
            model: the common file.
            precision: as exported.
            options: those of `build`; None is returned unless they hold ``placement: search``.
            batches: batch sizes that will be run; the smallest is measured.
            sizes: length of every other dynamic dimension.
            threads: of the sessions.
            progress: told what is measured.

        Raises:
            RecipeError: unknown options.
            RuntimeUnavailable, DeviceUnavailable: it cannot be measured here.
        """
        settings = checked_options(options)
        if settings["placement"] != "search":
            return None
        runtime: Any = load_runtime(self.name)
        if (reason := runtime.available()) is not None:
            raise RuntimeUnavailable(reason)
        common = _checked(model, precision)
        _check_scales(model, common)
        given = {"batch": (min(batches),), **{name: (size,) for name, size in sizes.items()}}
        known = {d.dim_param for value in common.graph.input for d in value.type.tensor_type.shape.dim}
        shapes, feeds = runtime.operand_shapes(model, {k: v for k, v in given.items() if k in known}, threads)

        def opened(folder: Path) -> Any:
            return runtime.open(Artifact(folder, self.name, precision, {"model": FILE}, settings), threads=threads)

        found = search(
            common,
            shapes,
            feeds,
            scratch_session(opened),
            margin=settings["margin"],
            int8_activations=settings["int8_activations"],
            progress=progress,
        )
        return found | {
            "precision": precision,
            "threads": threads,
            "shapes": {name: list(array.shape) for name, array in feeds.items()},
            "onnxruntime": runtime.version(),
            "device": runtime.device_for(settings),
            "graph_optimization_level": settings["graph_optimization_level"],
        }

    def shape_options(self, batches: Sequence[int], sizes: Mapping[str, int]) -> dict[str, Any]:  # noqa: ARG002
        """Nothing: any shape is served."""
        return {}

    def build(
        self,
        dialect: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        progress: Progress,
    ) -> Artifact:
        """Put the dialect file into `folder` and load it once, so that what cannot be loaded is known now.

        Args:
            dialect: what `dialect` wrote.
            folder: where the artifact goes; may be the dialect's own folder.
            precision: as exported.
            options: ``providers``: names, or pairs of name and options, in order of preference (default: the CPU);
                ``graph_optimization_level``: ``all`` (default), ``extended``, ``basic`` or ``disable``;
                ``dialect``: ``kernels`` (default where the CPU is first) or ``qdq`` (default elsewhere);
                ``placement``: ``default`` or ``search``, with ``margin`` (0.05) and ``int8_activations`` (false); the
                last three are read by `search`, and here only checked.
            progress: told what happens.

        Raises:
            RecipeError: an unknown option or value.
            RuntimeUnavailable: onnxruntime is not installed.
            ArtifactError: no readable ONNX, or onnxruntime refuses it.
        """
        settings = checked_options(options)
        runtime = load_runtime(self.name)
        if (reason := runtime.available()) is not None:
            raise RuntimeUnavailable(reason)
        model = _checked(dialect, precision)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"model": FILE}
        data = dialect.with_name(f"{dialect.name}.data")
        if data.exists():
            files["data"] = data.name
        for source, name in ((dialect, FILE), *([(data, data.name)] if "data" in files else [])):
            if source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        info = {**settings, "onnxruntime": runtime.version(), "weights": weight_bytes(model)}
        info["weight_size_bytes"] = info["weights"]["stored_bytes"]
        if (placed := metadata(model).get(PLACEMENT_KEY)) is not None:
            info["placed"] = json.loads(placed)
        artifact = Artifact(folder, self.name, precision, files, info)
        progress(f"ort: loading {FILE} in onnxruntime {runtime.version()}")
        with runtime.open(artifact, threads=1):
            pass
        return artifact


TARGET = OrtTarget()


def weight_bytes(model: onnx.ModelProto) -> dict[str, Any]:
    """Bytes of the quantized weights in a dialect file, scales and zero points included, against FP32.

    Returns:
        ``{"stored_bytes", "float32_bytes", "ratio"}``; the ratio is None where nothing is quantized.
    """
    stored = initializers(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    counted: set[str] = set()
    total, elements = 0, 0
    for node in model.graph.node:
        props = metadata(node)
        if "s2d.op" not in props or props.get("s2d.declared", "float") == "float":
            continue
        leaves: list[str] = []
        for i in _WEIGHT_INPUTS.get(node.op_type, ()):
            if i < len(node.input) and (found := _stored_behind(node.input[i], producers, stored)) is not None:
                leaves += found
        tensors = [stored[name] for name in dict.fromkeys(leaves) if name not in counted]
        counted.update(leaves)
        codes = [math.prod(t.dims) * (2 if node.op_type == "MatMulNBits" else 1) for t in tensors]
        total += sum(_bytes(t) for t in tensors)
        # An activation as the right operand (attention) brings only its scale: one element, no weight.
        elements += max((n for n in codes if n > 1), default=0)
    return {"stored_bytes": total, "float32_bytes": 4 * elements, "ratio": total / (4 * elements) if elements else None}


def _stored_behind(
    name: str, producers: Mapping[str, onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]
) -> list[str] | None:
    """Initializers that `name` is computed from, or None where an activation is among its sources."""
    if name in stored:
        return [name]
    node = producers.get(name)
    if node is None:
        return None if name else []
    result: list[str] = []
    for source in node.input:
        found = _stored_behind(source, producers, stored)
        if found is None:
            return None
        result += found
    return result


def _bytes(tensor: onnx.TensorProto) -> int:
    narrow = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    bits = 4 if narrow else 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    elements: int = math.prod(tensor.dims)
    return (elements * bits + 7) // 8


def _checked(path: Path, precision: str) -> onnx.ModelProto:
    model = load_model(path)
    found = metadata(model).get("s2d.precision")
    if found != precision:
        raise ArtifactError(
            message(
                f"{path}: not the ONNX file for this precision",
                expected=f"s2d.precision {precision!r} in its metadata",
                found=repr(found) if found else "none: the file is truncated or foreign",
                fix="export it again",
            )
        )
    return model


def _check_scales(path: Path, model: onnx.ModelProto) -> None:
    stored = initializers(model)
    wrong = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in stored:
            scale = numpy_helper.to_array(stored[node.input[1]]).astype(np.float64)
            # Below the smallest normal float32, kernels that flush denormals to zero divide by zero.
            if not (np.isfinite(scale).all() and (scale >= np.finfo(np.float32).tiny).all()):
                wrong.append(metadata(node).get("s2d.site", node.name))
    if wrong:
        raise PlanError(
            message(
                f"{path}: scales that no runtime can divide by: {', '.join(dict.fromkeys(wrong))}",
                expected="finite, positive, and no denormals (1.2e-38 or more)",
                fix="calibrate again; a weight or an activation is NaN or infinite",
            )
        )


def _summary_of(placement: Mapping[str, Any]) -> dict[str, Any]:
    """What the artifact says of its placement; the whole document lies with the search."""
    return {key: placement[key] for key in ("margin", "int8_activations", "forms", "kept_float", "whole")}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: a quantized checkpoint or a common ONNX file becomes an artifact that stands alone."""
    from ._ort_script import run_script

    return run_script(TARGET, argv)


if __name__ == "__main__":
    raise SystemExit(main())
