"""Equalize the channels of quantized Linear inputs, exactly: fold a shift and a scale, or insert them.

Where a norm feeds nothing but Linears (pre-LN) and for attention's context, the weights alone hold shift and scale
("fold"); where a residual sum reads the norm as well (post-LN, BERT) or a GELU stands in front, an `EqualizedLinear`
takes the Linear's place ("insert"). What is lost: nothing in float but rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from s2d_deploy.equalize_choice import choose
from s2d_deploy.equalized_linear import EqualizedLinear, linear_at, put
from s2d_deploy.errors import ModelError, message
from s2d_deploy.layer_inputs import calibrated_ops, input_tokens
from s2d_deploy.pcdr import Batch
from s2d_deploy.plan import Op
from s2d_deploy.producers import Producer, trace_producers
from s2d_deploy.weight_change import Change

# Calibration tokens that each choice is made on.
ROWS = 1024


def equalize(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    insert: bool = False,
    bypass: bool = False,
    output: str | None = None,
    rows: int = ROWS,
) -> list[Change]:
    """Shift and scale the channels of quantized Linear inputs, exactly, in place.

    Args:
        model: changed in place.
        batches: calibration data.
        insert: also put an elementwise layer in front of Linears whose channels cannot be folded into weights.
        bypass: such a layer may lead up to four channels past the quantizer, in float.
        output: as in `discovery.discover`.
        rows: calibration tokens that each choice is made on.

    Returns:
        The changed groups (Linears that read one tensor share one choice), with the relative error at W4A4.
    """
    ops = calibrated_ops(model, batches, output)
    producers = trace_producers(model, ops, {n: t[:1] for n, t in batches[0].items()})
    modules = dict(model.named_modules())
    groups = _groups(ops, producers, modules, insert)
    tokens = input_tokens(model, batches, [g[0] for g in groups.values()], rows)
    changes = []
    # What folds comes first: a value's Linear can take a scale only as long as it is a plain one.
    for (kind, source), names in sorted(groups.items(), key=lambda group: group[0][0].startswith("insert")):
        linears = [linear_at(model, name) for name in names]
        fold = not kind.startswith("insert")
        weight = torch.cat([layer.weight.detach().float() for layer in linears])
        can_shift = not fold or all(layer.bias is not None for layer in linears)
        if fold:
            maker = linear_at(model, source) if kind == "attention" else model.get_submodule(source)
            can_shift = can_shift and getattr(maker, "bias", None) is not None
        choice = choose(
            tokens[names[0]], weight, can_shift=can_shift, can_copy=not fold, can_bypass=bypass and not fold
        )
        if choice.after >= choice.before:
            continue
        if fold:
            for layer in linears:
                _absorb(layer, choice.shift, choice.scale)
            _divide(maker, choice.shift, choice.scale)
        else:
            for name, layer in zip(names, linears, strict=True):
                put(model, name, EqualizedLinear(layer, choice.shift, choice.scale, choice.copies, choice.direct))
        what = "folded" if fold else "inserted"
        changes.append(Change(tuple(names), what, choice.before, choice.after, choice.words))
    return changes


def _groups(
    ops: Mapping[str, Op], producers: Mapping[str, Producer], modules: Mapping[str, nn.Module], insert: bool
) -> dict[tuple[str, str], list[str]]:
    """Linears by the tensor that they read: (how, source) -> names. Shared weights are left alone."""
    owners: dict[int, int] = {}
    for module in modules.values():
        if isinstance(module, nn.Linear | nn.Embedding):
            owners[id(module.weight)] = owners.get(id(module.weight), 0) + 1
    groups: dict[tuple[str, str], list[str]] = {}
    broken: set[tuple[str, str]] = set()
    for name, op in ops.items():
        if op.kind != "linear" or f"{name}.input" not in producers:
            continue
        p, layer = producers[f"{name}.input"], modules[name]
        if name.endswith(".linear") and isinstance(modules.get(name.removesuffix(".linear")), EqualizedLinear):
            continue
        if p.kind == "norm" and not p.shared:
            key = ("norm", p.module)
        elif p.kind == "attention" and len(p.linears) == 1:
            key = ("attention", p.linears[0])
        elif insert and p.kind in ("norm", "activation"):
            key = (f"insert {p.kind}", p.module)
        else:
            continue
        tied = not isinstance(layer, nn.Linear) or owners[id(layer.weight)] > 1
        if tied or (key[0] == "attention" and owners.get(id(getattr(modules[key[1]], "weight", None)), 2) > 1):
            broken.add(key)
        groups.setdefault(key, []).append(name)
    return {key: names for key, names in groups.items() if key not in broken}


def _absorb(layer: nn.Linear, shift: Tensor, scale: Tensor) -> None:
    """Make `layer` take ``(x - shift) / scale`` instead of x."""
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.add_(layer.weight @ shift.to(layer.weight))
        layer.weight *= scale.to(layer.weight)


def _divide(maker: nn.Module, shift: Tensor, scale: Tensor) -> None:
    """Make a norm, or the Linear of attention's value, give ``(y - shift) / scale`` instead of y.

    Attention's context is a mean of values with weights that sum to 1, so what holds for a value holds for it.
    """
    if not isinstance(maker, nn.LayerNorm | nn.Linear):
        raise ModelError(message("not a LayerNorm or Linear", found=type(maker).__name__))
    with torch.no_grad():
        s = scale.to(maker.weight)
        maker.weight /= s.unsqueeze(1) if maker.weight.dim() == 2 else s
        if maker.bias is not None:
            maker.bias.sub_(shift.to(maker.bias)).div_(s)


__all__ = ["equalize"]
