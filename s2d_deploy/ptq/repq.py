"""RepQ-ViT: quantize simply what was calibrated finely, by scale reparameterization (Li et al., arXiv 2212.08254).

**Post-LayerNorm activations** want a scale for each channel, and hardware wants one for all. With channel scales s and
zero points z, their means s~ and z~, ``r1 = s / s~`` and ``r2 = z - z~`` (equations 10 to 13):

    x'    = (x + s r2) / r1          gain' = gain / r1      bias' = (bias + s r2) / r1        of the LayerNorm
    W'    = W r1 (columns)           b'    = b - W (s r2)                                    of the layers behind it

Then s~, z~ give x' the codes that s, z gave x, and the function stays. With symmetric activations z is 0, and so is r2.
The pass `ranges` behind this one measures x' anew, since a range method of the user's choice serves it too.

Pre-LN only: where the residual stream reads the norm too (post-LN, BERT) the norm cannot be changed, and it is left out
by name. Weights take the variation that activations lose, so a low-bit weight may suffer: that is the method's trade.

**Softmax output** on powers of 1/sqrt(2): ``logsqrt2``, which the paper rewrites as powers of 1/2 with a scale that
depends on the code's parity (section 3.3); the numbers are the same, so the simulation computes them directly. ``log2``
is the plain variant. Integer kernels cannot run either; the default `uniform` is what every target runs.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, message
from s2d_deploy.grid import Grid
from s2d_deploy.observers import Method, activation_parameters
from s2d_deploy.plan import Plan, Site
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.activations import sampled_rows
from s2d_deploy.ptq.folding import Group, Unchanged, absorb, first_sample, multiply, reader_groups
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.quantize import build_plan

logger = logging.getLogger(__name__)

_RATIOS = torch.linspace(1.0, 0.3, 36, dtype=torch.float64)


class Options(passes.Options):
    """What is reparameterized."""

    softmax: Literal["uniform", "log2", "logsqrt2"] = Field(
        "uniform",
        description="Grid of attention probabilities. log2 and logsqrt2 are simulated only: no target runs them.",
    )
    rows: int = Field(2048, ge=16, description="Calibration tokens that channel ranges are read from.")


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Fold channel ranges into LayerNorms; put logarithmic sites for probabilities into the plan where asked for.

    Raises:
        ModelError: the precision leaves activations float or quantizes them to FP4, or no LayerNorm can be changed and
            `softmax` is uniform.
    """
    model, plan = quantized.model, quantized.plan
    # Grids only: ranges are set by the pass that comes behind.
    draft = build_plan(
        model,
        plan.ops,
        context.calibration(model, plan.ops),
        plan.precision,
        replace(context.config, weights="absmax", activations="absmax"),
    )
    if not any(s.role != "weight" and s.grid.integer for s in draft.sites.values()):
        raise ModelError(
            message(
                f"repq: {plan.precision} quantizes no activation to integers",
                expected="a precision such as w4a4 or w8a8",
                fix="leave the pass out",
            )
        )
    folded, left_out = _fold_all(model, draft, context, options)
    probs = {} if options.softmax == "uniform" else _logarithmic(model, draft, context, options.softmax)
    if not folded and not probs:
        raise ModelError(
            message(
                "repq can change none of the model's LayerNorms",
                expected="a LayerNorm that only quantized Linears read (pre-LN)",
                found="; ".join(f"{title}: {reason}" for title, reason in left_out.items()) or "no LayerNorm",
                fix="leave the pass out, or use smoothquant with insert: true",
            )
        )
    for title, reason in left_out.items():
        logger.info("repq leaves out %s: %s", title, reason)
    plan.sites.update(probs)
    plan.info["repq"] = {"folded": folded, "left_out": left_out, "softmax": options.softmax, "probs": sorted(probs)}
    return Quantized(model, plan)


def _fold_all(
    model: nn.Module, draft: Plan, context: Context, options: Options
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Norms that were changed with the layers behind them, and layers that were left out with the reason."""
    sample = first_sample(context.batches())
    left_out: dict[str, str] = {}
    chosen: list[tuple[Group, Grid]] = []
    for group in reader_groups(model, sample):
        if group.kind != "norm":
            continue
        reason, grid = _may_fold(model, group, draft)
        if grid is None:
            left_out[", ".join(group.names)] = reason
        else:
            chosen.append((group, grid))
    rows = sampled_rows(model, context.batches(), [g.names[0] for g, _ in chosen], options.rows, context.seed)
    unchanged = Unchanged(model, sample)
    folded: dict[str, list[str]] = {}
    for index, (group, grid) in enumerate(chosen):
        context.progress(f"repq {index + 1} of {len(chosen)}: {group.maker}")
        scale, zero_point = channel_parameters(rows[group.names[0]], grid, context.config.activations)
        modules = [model.get_submodule(name) for name in (group.maker, *group.names)]
        if unchanged.after(modules, lambda m=modules, s=scale, z=zero_point: reparameterize(m[0], m[1:], s, z)):  # type: ignore[misc]
            folded[group.maker] = list(group.names)
        else:
            left_out[", ".join(group.names)] = f"the model reads the output of {group.maker} elsewhere"
    return folded, left_out


def _may_fold(model: nn.Module, group: Group, draft: Plan) -> tuple[str, Grid | None]:
    """The grid of the norm's output, or why it is left alone."""
    grids = {draft.sites[s].grid for n in group.names if (s := f"{n}.input") in draft.sites}
    layers = [model.get_submodule(name) for name in group.names]
    if not group.maker:
        return group.reason, None
    if not grids:
        return "its input stays float", None
    grid = min(grids, key=lambda g: g.bits)
    if not all(isinstance(layer, nn.Linear) for layer in layers):
        return "a convolution reads it", None
    if not grid.symmetric:
        bare = [n for n, layer in zip(group.names, layers, strict=True) if cast(nn.Linear, layer).bias is None]
        if cast(nn.LayerNorm, model.get_submodule(group.maker)).bias is None:
            bare.append(group.maker)
        if bare:
            return f"{bare[0]} has no bias that could take the zero points", None
    return "", grid


def channel_parameters(rows: Tensor, grid: Grid, method: Method) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each channel, as if the grid had one of each for every channel.

    Args:
        rows: tokens, float32 ``(R, K)``.
        grid: the layer's own: bits, signs and symmetry are read.
        method: "absmax" covers everything, "percentile" 99.9 % of the tokens of each channel; else the least squared
            error over 36 clipping ratios.

    Returns:
        float64 ``(K,)`` each, whole zero points. A channel of zeros gets the mean of the others.
    """
    x = rows.double()
    low, high = x.amin(0).clamp(max=0), x.amax(0).clamp(min=0)
    if method == "percentile":
        low, high = x.quantile(0.001, dim=0).clamp(max=0), x.quantile(0.999, dim=0).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high <= low
    best_error = torch.full_like(low, torch.inf)
    best = _parameters(low, high, grid)
    for ratio in _RATIOS.tolist() if method in ("mse", "entropy") else []:
        scale, zero_point = _parameters(low * ratio, high * ratio, grid)
        code = (torch.round(x / scale) + zero_point).clamp(grid.qmin, grid.qmax)
        error = ((code - zero_point) * scale - x).square().sum(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1])
    scale, zero_point = best
    if bool(empty.any()) and not bool(empty.all()):
        scale = torch.where(empty, scale[~empty].mean(), scale)
        zero_point = torch.where(empty, zero_point[~empty].mean().round(), zero_point)
    return scale, zero_point


def _parameters(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if grid.symmetric:
        scale = high / grid.qmax
        return torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)
    scale = (high - low) / (grid.qmax - grid.qmin)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return scale, (grid.qmin - low / scale).round().clamp(grid.qmin, grid.qmax)


def reparameterize(norm: nn.Module, layers: list[nn.Module], scale: Tensor, zero_point: Tensor) -> None:
    """Equations 10 to 13, in place.

    Args:
        norm: a LayerNorm with a gain.
        layers: the Linears that read it, and nothing else does.
        scale, zero_point: of each channel, ``(K,)``.
    """
    shift = scale * (zero_point - zero_point.mean().round())  # s r2
    with torch.no_grad():
        if bool(shift.any()):
            bias = cast(Tensor, norm.bias)
            bias.copy_(bias.double() + shift)
            for layer in layers:
                weight, own = cast(Tensor, layer.weight), cast(Tensor, layer.bias)
                own.copy_(own.double() - weight.double() @ shift)
    variation = scale / scale.mean()  # r1
    multiply(norm, 1 / variation)
    for layer in layers:
        absorb(layer, 1 / variation)


def _logarithmic(model: nn.Module, draft: Plan, context: Context, name: Literal["log2", "logsqrt2"]) -> dict[str, Site]:
    """Sites of attention's probabilities on a logarithmic grid of the same width."""
    statistics = context.calibration(model, draft.ops)
    found = {}
    for site in draft.sites.values():
        if site.role == "probs":
            grid = Grid(site.grid.bits, signed=False, format=name)
            histogram = statistics.histograms[site.name]
            config = context.config
            scale, zero_point = activation_parameters(histogram, grid, config.activations, config.percentile)
            found[site.name] = replace(site, grid=grid, scale=scale, zero_point=zero_point, source=f"repq-{name}")
    return found


__all__ = ["Options", "apply", "channel_parameters", "reparameterize"]
