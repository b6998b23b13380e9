"""Cross-layer equalization: neighbouring weights get equal ranges, channel by channel (Nagel et al., arXiv 1906.04721).

Where nothing but views, attention's average over tokens or a function with f(s x) = s f(x) (ReLU) lies between two
layers, row i of the first may be divided by s_i and column i of the second multiplied with it. Equation 11 chooses s
so that both have the range ``sqrt(r1_i r2_i)``. A GELU does not let a scale through: those layers are left out and
listed by the activation's name. A norm's gain is not a weight of a layer; `smoothquant` serves it.

Queries and keys allow the same: ``q k^T`` stays when channel c of one is divided and of the other multiplied by s_c.
Both are quantized activations, so the ranges are those of the activations, measured on calibration data.

What is lost: nothing in real arithmetic. Not guaranteed: a lower error. With one scale for each output channel the
first layer gains nothing from its own rows' ranges, only the second from its columns'.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, message
from s2d_deploy.producers import trace_producers
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.activations import real_tokens
from s2d_deploy.ptq.folding import Group, Unchanged, absorb, first_sample, multiply, reader_groups
from s2d_deploy.ptq.passes import Batch, Context, Quantized

logger = logging.getLogger(__name__)

# Ranges that agree within this share count as equal.
_CONVERGED = 1e-3


class Options(passes.Options):
    """What is equalized."""

    iterations: int = Field(20, ge=1, description="Rounds over all pairs of layers; chains of layers need several.")
    queries: bool = Field(True, description="Equalize the channel ranges of attention's queries and keys as well.")


def equalizing_scale(first: Tensor, second: Tensor) -> Tensor:
    """``s_i = sqrt(r1_i r2_i) / r2_i``, Nagel et al., arXiv 1906.04721, equation 11.

    Args:
        first, second: ranges of the channels as the first layer makes and the second reads them, (K,).

    Returns:
        float64 (K,): what the first is divided by and the second multiplied with; 1 where a range is zero.
    """
    r1, r2 = first.double(), second.double()
    usable = (r1 > 0) & (r2 > 0)
    return torch.where(usable, (r1 / r2.clamp_min(1e-300)).sqrt(), torch.ones_like(r1))


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Equalize every pair that can be; what was left out stands in ``plan.info["equalization"]``.

    Raises:
        ModelError: nothing could be equalized; every layer is listed with its reason.
    """
    model, plan = quantized.model, quantized.plan
    sample = first_sample(context.batches())
    left_out: dict[str, str] = {}
    pairs = [g for g in reader_groups(model, sample) if _is_pair(g, left_out)]
    unchanged = Unchanged(model, sample)
    rounds = 0
    for rounds in range(1, options.iterations + 1):
        context.progress(f"equalization, round {rounds}")
        worst = 0.0
        for group in list(pairs):
            change = _equalize(model, group, unchanged)
            if change is None:
                pairs.remove(group)
                left_out[", ".join(group.names)] = f"the model reads the output of {group.maker} elsewhere"
            else:
                worst = max(worst, change)
        if worst < _CONVERGED:
            break
    queries = _equalize_queries(model, context, sample, unchanged, left_out) if options.queries else []
    if not pairs and not queries:
        raise ModelError(
            message(
                "equalization can change none of the model's layers",
                found="; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "no layers",
                fix="leave the pass out; smoothquant serves layers behind a norm, or a GELU with insert: true",
            )
        )
    for name, reason in left_out.items():
        logger.info("equalization leaves out %s: %s", name, reason)
    plan.info["equalization"] = {
        "pairs": {", ".join(g.names): g.maker for g in pairs},
        "queries": queries,
        "rounds": rounds if pairs else 0,
        "left_out": left_out,
    }
    return Quantized(model, plan)


def _is_pair(group: Group, left_out: dict[str, str]) -> bool:
    title = ", ".join(group.names)
    if group.maker and group.kind != "norm":
        return True
    left_out[title] = group.reason or f"the norm {group.maker} stands in front"
    return False


def _equalize(model: nn.Module, group: Group, unchanged: Unchanged) -> float | None:
    """One step of equation 11; by how much the largest scale was off (in logarithm), None where it cannot be."""
    maker, layers = model.get_submodule(group.maker), [model.get_submodule(name) for name in group.names]
    scale = equalizing_scale(row_ranges(maker), torch.stack([column_ranges(layer) for layer in layers]).amax(0))
    factor = 1 / scale

    def change() -> None:
        multiply(maker, factor)
        for layer in layers:
            absorb(layer, factor)

    return float(scale.log().abs().max()) if unchanged.after([maker, *layers], change) else None


def row_ranges(layer: nn.Module) -> Tensor:
    """Largest magnitude of each output channel's weights: (N,)."""
    return cast(Tensor, layer.weight).detach().abs().flatten(1).amax(1)


def column_ranges(layer: nn.Module) -> Tensor:
    """Largest magnitude of the weights that read each input channel: (K,)."""
    weight = cast(Tensor, layer.weight).detach().abs()
    if isinstance(layer, nn.Conv2d):
        # (groups, O / groups, I / groups, kh kw): an input channel is read by the outputs of its group.
        return weight.reshape(layer.groups, -1, weight.shape[1], weight[0, 0].numel()).amax((1, 3)).flatten()
    return weight.amax(0)


def _equalize_queries(
    model: nn.Module, context: Context, sample: Batch, unchanged: Unchanged, left_out: dict[str, str]
) -> list[str]:
    """Equal channel ranges of queries and keys in every attention whose projections make them directly."""
    ops = discover(model, sample)
    producers = trace_producers(model, ops, sample)
    projections: dict[str, tuple[str, str]] = {}
    for op in ops.values():
        if op.kind != "scores":
            continue
        made = [producers[site] for site, _ in op.sites]
        odd = [p for p in made if p.kind != "linear" or not isinstance(model.get_submodule(p.module), nn.Linear)]
        if odd:
            left_out[op.name] = f"{odd[0].site} is not the output of a Linear ({odd[0].note or odd[0].kind})"
            continue
        query, key = (cast(nn.Linear, model.get_submodule(p.module)) for p in made)
        if query.out_features != key.out_features:
            left_out[op.name] = f"query has {query.out_features} channels and key {key.out_features}"
            continue
        projections[op.name] = made[0].module, made[1].module
    peaks = output_peaks(model, context.batches(), [name for both in projections.values() for name in both])
    done = []
    for title, (query_name, key_name) in projections.items():
        query, key = (cast(nn.Linear, model.get_submodule(name)) for name in (query_name, key_name))
        scale = equalizing_scale(peaks[query_name], peaks[key_name])

        def change(query: nn.Linear = query, key: nn.Linear = key, scale: Tensor = scale) -> None:
            multiply(query, 1 / scale)
            multiply(key, scale)

        if query is not key and math.isfinite(float(scale.max())) and unchanged.after([query, key], change):
            done.append(title)
        else:
            left_out[title] = "the model reads queries or keys elsewhere"
    return done


def output_peaks(model: nn.Module, batches: Iterable[Batch], names: list[str]) -> dict[str, Tensor]:
    """Largest magnitude of each output channel of the named Linears over real tokens: float32 (N,)."""
    peaks: dict[str, Tensor] = {}
    current: list[Batch] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            rows = output.detach()[real_tokens(current[-1], output)].float()
            peak = rows.abs().amax(0) if rows.shape[0] else torch.zeros(output.shape[-1])
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in dict.fromkeys(names)]
    try:
        with torch.no_grad():
            for batch in batches if handles else ():
                current[:] = [batch]
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return peaks


__all__ = ["Options", "apply", "column_ranges", "equalizing_scale", "output_peaks", "row_ranges"]
