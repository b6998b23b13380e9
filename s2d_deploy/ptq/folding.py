"""Which layers read one tensor, and which weights could hold a scale of its channels: read from the model's graph.

A diagonal between two layers can be moved into both where what lies between them commutes with it: nothing, a
LayerNorm's own gain in front, attention's average over tokens, or a function with f(s x) = s f(x) for s > 0 (ReLU). The
graph is traced (`producers`), not guessed from names, and every change is checked on one sample: the model's outputs
must stay. What is lost: nothing in real arithmetic; in float32 the last bits of the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2d_deploy.discovery import discover
from s2d_deploy.errors import DataError, ModelError, message
from s2d_deploy.plan import Op
from s2d_deploy.producers import Producer, trace_producers
from s2d_deploy.ptq import input_transform
from s2d_deploy.ptq.activations import watched_rows
from s2d_deploy.ptq.passes import Batch

# f(s x) = s f(x) for s > 0, channel by channel.
HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity)
# Outputs may move by this share of their largest magnitude: two hundred times what was seen on real models in FP32, and
# far less than a scale that was folded into the wrong place makes of them.
TOLERANCE = 2e-3


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that read one tensor.

    Attributes:
        names: of the layers, Linear or Conv2d, in execution order.
        kind: what makes the tensor; see `producers.Producer`.
        maker: the LayerNorm, Linear or Conv2d whose parameters can hold a scale of its channels; "" where none can.
        between: the activation module between maker and layers; "" where there is none.
        reason: why there is no maker.
        fixed: why nothing may be put in front of the layers either; "" where something may.
    """

    names: tuple[str, ...]
    kind: str
    maker: str
    between: str
    reason: str
    fixed: str


def first_sample(batches: Iterable[Batch]) -> dict[str, Tensor]:
    """The first sample of the first batch, as a batch of one.

    Raises:
        DataError: no batch.
    """
    for batch in batches:
        return {name: tensor[:1] for name, tensor in batch.items()}
    raise DataError(message("no calibration data", expected="at least one batch"))


def reader_groups(model: nn.Module, sample: Batch) -> list[Group]:
    """Every called Linear and Conv2d of `model`, grouped by the tensor that it reads, in execution order."""
    ops = discover(model, sample)
    producers = trace_producers(model, ops, sample)
    tensors = _inputs(model, ops, sample)
    members: dict[Any, list[str]] = {}
    for name, op in ops.items():
        if op.kind in ("linear", "conv"):
            maker = _maker(model, producers[f"{name}.input"])[0]
            members.setdefault(maker or tensors[name], []).append(name)
    tied = shared_modules(model)
    return [_group(model, tuple(names), producers[f"{names[0]}.input"], tied) for names in members.values()]


def _inputs(model: nn.Module, ops: Mapping[str, Op], sample: Batch) -> dict[str, Any]:
    """For each layer which tensor it is given, and what is done to it first."""
    held: list[Tensor] = []  # kept alive, so that no address is used twice
    found: dict[str, Any] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            held.append(x)
            transform = getattr(module, input_transform.NAME, None)
            parts = transform.parts if isinstance(transform, input_transform.Chain) else [transform]
            found[name] = (x.data_ptr(), x.shape, x.stride(), *map(id, parts))

        return hook

    layers = [name for name, op in ops.items() if op.kind in ("linear", "conv")]
    # In front of input transforms, which were put in front of everything else before.
    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name), prepend=True) for name in layers]
    try:
        with torch.no_grad():
            model(**sample)
    finally:
        for handle in handles:
            handle.remove()
    return found


def shared_modules(model: nn.Module) -> set[str]:
    """Modules that share a parameter with another module."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return {name for names in owners.values() if len(names) > 1 for name in names}


def _group(model: nn.Module, names: tuple[str, ...], producer: Producer, tied: set[str]) -> Group:
    shared = [name for name in names if name in tied]
    fixed = f"the weight of {shared[0]} is shared with another module" if shared else ""
    maker, between, reason = _maker(model, producer)
    width = _width(model.get_submodule(names[0]))
    if fixed:
        maker, reason = "", fixed
    elif any(getattr(model.get_submodule(name), input_transform.NAME, None) is not None for name in names):
        maker, reason = "", "an input transform stands in front"
    elif maker and maker in tied:
        maker, reason = "", f"the weight of {maker} is shared with another module"
    elif maker and _channels(model.get_submodule(maker)) != width:
        found = _channels(model.get_submodule(maker))
        maker, reason = "", f"{maker} has {found} channels, {names[0]} reads {width}"
    return Group(names, producer.kind, maker, between, reason, fixed)


def _maker(model: nn.Module, p: Producer) -> tuple[str, str, str]:
    """Maker, activation between, and why there is no maker."""
    if p.kind == "norm":
        if p.shared:
            return "", "", f"the residual stream reads the output of {p.module} as well"
        return p.module, "", ""
    if p.kind == "linear":
        return p.module, "", ""
    if p.kind == "attention" and len(p.linears) == 1:
        return p.linears[0], "", ""
    if p.kind == "activation":
        function = model.get_submodule(p.module)
        if not isinstance(function, HOMOGENEOUS):
            return "", p.module, f"{type(function).__name__} does not commute with a scale"
        if len(p.linears) == 1:
            return p.linears[0], p.module, ""
    return "", "", p.note or f"made by {p.kind}"


def _width(layer: nn.Module) -> int:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels
    return cast(nn.Linear, layer).in_features


def _channels(maker: nn.Module) -> int:
    if isinstance(maker, nn.LayerNorm):
        return maker.normalized_shape[-1] if len(maker.normalized_shape) == 1 else 0
    if isinstance(maker, nn.Conv2d):
        return maker.out_channels
    return cast(nn.Linear, maker).out_features


def absorb(layer: nn.Module, factor: Tensor) -> None:
    """Make a Linear or Conv2d compute from ``x * factor`` what it computed from x: columns divided by `factor` (K,)."""
    if isinstance(layer, nn.Conv2d):
        # Output o reads input channels of its own group only.
        rows = factor.reshape(layer.groups, 1, -1).expand(-1, layer.out_channels // layer.groups, -1)
        divisor = rows.reshape(layer.out_channels, -1, 1, 1)
    else:
        divisor = factor.unsqueeze(0)
    _store(cast(Tensor, layer.weight), lambda w: w / divisor.double())


def multiply(maker: nn.Module, factor: Tensor) -> None:
    """Make a LayerNorm, Linear or Conv2d give ``y * factor`` instead of y, channel by channel."""
    weight, bias = cast(Tensor, maker.weight), cast("Tensor | None", maker.bias)
    shape = (-1, *[1] * (weight.dim() - 1))
    _store(weight, lambda w: w * factor.double().reshape(shape))
    if bias is not None:
        _store(bias, lambda b: b * factor.double())


def _store(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """In place, computed in float64: two passes one after the other then lose no more than one rounding each."""
    with torch.no_grad():
        parameter.copy_(change(parameter.double()))


def input_peaks(model: nn.Module, batches: Iterable[Batch], names: list[str]) -> dict[str, Tensor]:
    """Largest magnitude of each input channel of the named Linears over real tokens: float32 (K,)."""
    peaks: dict[str, Tensor] = {}

    def see(name: str, rows: Tensor) -> None:
        if rows.shape[0]:
            peak = rows.abs().amax(0)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

    with watched_rows(model, names, see) as remember, torch.no_grad():
        for batch in batches:
            remember(batch)
            model(**batch)
    return peaks


class Unchanged:
    """Checks that a model still computes what it did: every float output, on one sample.

    Args:
        model: as it is now.
        sample: a batch of one.
    """

    def __init__(self, model: nn.Module, sample: Batch) -> None:
        self.model, self.sample = model, sample
        self.before = self._outputs()

    def _outputs(self) -> list[Tensor]:
        with torch.no_grad():
            result = self.model(**self.sample)
        values = (
            [result] if isinstance(result, Tensor) else list(result.values() if hasattr(result, "values") else result)
        )
        return [v.double() for v in values if isinstance(v, Tensor) and v.is_floating_point()]

    def difference(self) -> float:
        """The largest difference now, relative to that output's largest magnitude; infinite for NaN."""
        worst = 0.0
        for now, before in zip(self._outputs(), self.before, strict=True):
            difference = float((now - before).abs().max() / before.abs().max().clamp_min(1e-30))
            worst = max(worst, difference if math.isfinite(difference) else math.inf)
        return worst

    def after(self, modules: Sequence[nn.Module], change: Callable[[], None]) -> bool:
        """Make a `change` of the parameters of `modules`; False, and undone, where the model computes other things."""
        parameters = [p for module in modules for p in module.parameters(recurse=False)]
        kept = [p.detach().clone() for p in parameters]
        change()
        if self.difference() <= TOLERANCE:
            return True
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        return False

    def check(self, what: str) -> float:
        """The difference.

        Raises:
            ModelError: beyond `TOLERANCE`; the message says that `what` did it.
        """
        worst = self.difference()
        if worst > TOLERANCE:
            raise ModelError(
                message(
                    f"{what} changes what the model computes",
                    expected=f"outputs within {TOLERANCE:g} of their largest magnitude",
                    found=f"{worst:.3g}",
                    fix="leave this pass out; the model uses a tensor in a way that its graph does not show",
                )
            )
        return worst


__all__ = [
    "HOMOGENEOUS",
    "Group",
    "Unchanged",
    "absorb",
    "first_sample",
    "input_peaks",
    "multiply",
    "reader_groups",
    "shared_modules",
]
