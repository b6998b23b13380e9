"""AWQ, the scaling part: input channels that are large on average get a larger share of the weight grid.

Lin et al., arXiv 2306.00978, section 3.2: ``W x = (W s) (x / s)`` with ``s = mean|x|^alpha``, one alpha for all layers
that read a tensor, searched on the error of their quantized outputs (equations 4 and 5). Weights are quantized as the
plan will (per block for weight-only precisions), and so are activations where the precision has them (W4A8).

This is a transform: the float function stays, and the ranges, also those of the rescaled activations, are set behind
it. What AWQ does to ranges themselves, the clipping search, is `awq_clip`, behind `ranges`; a preset lists both. The
inverse scale goes into the LayerNorm or Linear in front where the graph allows it, else (``insert: true``) into one
product at run time, else the tensor is left out and listed in ``plan.info["awq"]``.

What is lost: nothing in real arithmetic. On the rows that were looked at a group's error never grows, since alpha = 0
is a candidate; on other data, and for the model's output, that is not promised.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace

import torch
from pydantic import Field
from torch import Tensor, nn

from s2d_deploy.calibrate import Calibration
from s2d_deploy.plan import Plan, Site
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.activations import sampled_rows
from s2d_deploy.ptq.folding import Unchanged, first_sample, reader_groups
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.ptq.smoothquant import (
    Scaled,
    may_scale,
    nothing_scaled,
    place,
    quantized_rows,
    quantized_weight,
)
from s2d_deploy.quantize import QuantizeConfig, build_plan, quantizes_activations

logger = logging.getLogger(__name__)


class Options(passes.Options):
    """How finely scales are searched, and where they may go."""

    grid: int = Field(20, ge=1, le=200, description="steps of alpha between 0 and 1")
    insert: bool = Field(
        False, description="put a product in front of layers whose scales no weight can hold (post-LN, GELU)"
    )
    rows: int = Field(512, ge=16, description="calibration tokens that outputs are compared on")


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Scale every group of Linears whose quantized outputs gain by it.

    Raises:
        ModelError: nothing could be scaled.
        DataError: no calibration data.
    """
    model, plan = quantized.model, quantized.plan
    sample = first_sample(context.batches())
    sites = _weight_and_input_sites(model, plan, context)
    done = Scaled()
    wanted = {op for op in plan.ops if f"{op}.weight" in sites}
    groups = [g for g in reader_groups(model, sample) if may_scale(model, g, options.insert, done, wanted)]
    if not groups:
        raise nothing_scaled("awq", done)
    rows = sampled_rows(model, context.batches(), [g.names[0] for g in groups], options.rows, context.seed)
    unchanged = Unchanged(model, sample)
    for index, group in enumerate(groups):
        title = ", ".join(group.names)
        context.progress(f"awq {index + 1} of {len(groups)}: {title}")
        weights = {name: _weight(model, name) for name in group.names if name in wanted}
        alpha = best_alpha(rows[group.names[0]], weights, sites, context.config, options.grid)
        if alpha == 0.0:
            done.unchanged.append(title)
            continue
        factor = (1 / awq_scales(rows[group.names[0]], alpha)).float()
        place(model, group, factor, alpha, options.insert, unchanged, done, wanted)
    for title, reason in done.left_out.items():
        logger.info("awq leaves out %s: %s", title, reason)
    plan.info["awq"] = asdict(done)
    return Quantized(model, plan)


def awq_scales(rows: Tensor, alpha: float) -> Tensor:
    """``s = mean|x|^alpha`` (equation 5), divided by the geometric mean of its extremes; float64 ``(K,)``, positive.

    The common factor only keeps scales near 1. A channel that is always zero has scale 1.

    Args:
        rows: ``(rows, K)``.
        alpha: 0 to 1.
    """
    mean = rows.double().abs().mean(0)
    scales = torch.where(mean > 0, mean, torch.ones_like(mean)).pow(alpha)
    alive = scales[mean > 0]
    if alive.numel():
        scales = torch.where(mean > 0, scales / (alive.max() * alive.min()).sqrt(), scales)
    return scales.clamp(1e-4, 1e4)


def best_alpha(
    rows: Tensor, weights: dict[str, Tensor], sites: dict[str, Site], config: QuantizeConfig, steps: int
) -> float:
    """The alpha of ``0, 1/steps, ..., 1`` with the smallest output error, the smallest of equals.

    Args:
        rows: float32 ``(rows, K)`` that all the layers read.
        weights: float32 ``(N, K)`` by layer.
        sites: grids, by site name.
        config: how ranges are found.
        steps: number of steps.
    """
    best, least = 0.0, float("inf")
    for step in range(steps + 1):
        scales = awq_scales(rows, step / steps)
        moved = (rows.double() / scales).float()
        error = 0.0
        for name, weight in weights.items():
            left = quantized_rows(moved, sites.get(f"{name}.input"), config)
            right = quantized_weight((weight.double() * scales).float(), sites.get(f"{name}.weight"), config)
            wanted = rows @ weight.T
            error += float((left @ right.T - wanted).square().sum() / wanted.square().sum().clamp_min(1e-30))
        if error < least:
            best, least = step / steps, error
    return best


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    return weight.detach().float() if isinstance(weight, Tensor) else torch.empty(0)


def _weight_and_input_sites(model: nn.Module, plan: Plan, context: Context) -> dict[str, Site]:
    """Grids only: ranges are found anew for each candidate."""
    quickly = replace(context.config, weights="absmax", activations="absmax")
    needed = quantizes_activations(model, plan.ops, plan.precision, quickly)
    calibration = context.calibration(model, plan.ops) if needed else Calibration()
    return build_plan(model, plan.ops, calibration, plan.precision, quickly).sites
