"""AWQ, the clipping part: weight ranges that are narrower than the largest weight where outputs gain by it.

Lin et al., arXiv 2306.00978 (the search of its reference implementation): for each group of weights that share a scale,
the range is shrunk step by step, and the step with the smallest error of the group's own share of the output is kept,
``d G d^T`` with d the group's rounding error and G the second moments of the inputs that it multiplies. Where `ranges`
minimizes the error of the weights themselves (``weights: mse``), this one weighs it with the inputs.

Only scales are chosen; weights stay float and are rounded to nearest, or by a pass that follows (gptq). The range that
was set before is among the candidates, so a group's own error on the calibration data never grows; groups of one row
(blocks) are searched apart, so the sum over a row may. Inputs are those of the float model, with nothing quantized.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import PerAxis, PerBlock
from s2d_deploy.observers import weight_parameters
from s2d_deploy.plan import Site
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.ptq.reconstruction import Reconstruction, float_grams

logger = logging.getLogger(__name__)


class Options(passes.Options):
    """How far ranges are shrunk, and how finely."""

    shrink: float = Field(0.5, gt=0, lt=1, description="the narrowest range is (1 - shrink) times the largest weight")
    steps: int = Field(20, ge=1, le=200, description="ranges that are tried between the widest and the narrowest")


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Choose the scales of every quantized weight anew.

    Raises:
        ModelError: no quantized weight, or weights that another pass has rounded.
        DataError: no calibration data.
    """
    work = Reconstruction(quantized, context, "awq_clip")
    ratios = [1 - options.shrink * step / options.steps for step in range(options.steps + 1)]
    for group, gram in float_grams(work.reference, context, work.groups):
        for name in group:
            context.progress(f"awq_clip: {name}")
            site = work.site(name)
            scale = clipped_scale(work.float_layer(name).weight.detach(), site, gram, ratios)
            logger.debug("awq_clip: %s: %d of %d ranges changed", name, int((scale != site.scale).sum()), scale.numel())
            # "rtn": the weight is still float, so nothing has been put on a grid.
            quantized.plan.sites[site.name] = replace(site, scale=scale, source="rtn-awq_clip")
    return quantized


def clipped_scale(weight: Tensor, site: Site, gram: Tensor, ratios: list[float]) -> Tensor:
    """Scales (float32, as the site's) with the smallest output error of each group.

    Args:
        weight: of the layer, ``(N, K)`` or ``(O, I, kh, kw)``.
        site: its grid, and the scales that are candidates as they are.
        gram: float64 ``(K, K)``, mean of ``x x^T``.
        ratios: of the range to the largest magnitude.
    """
    widest, _ = weight_parameters(weight, site.grid, "absmax")
    best, least = site.scale, _group_errors(weight, site, site.scale, gram)
    for ratio in ratios:
        candidate = widest * ratio
        error = _group_errors(weight, site, candidate, gram)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def _group_errors(weight: Tensor, site: Site, scale: Tensor, gram: Tensor) -> Tensor:
    """Output error of each group that shares a scale, float64 of the scale's shape."""
    rounded = dequantize(quantize(weight, scale, site.zero_point, site.grid), scale, site.zero_point, site.grid)
    error = (rounded - weight).flatten(1).double()
    g = site.grid.granularity
    if isinstance(g, PerBlock):
        n, k = error.shape
        blocks = error.reshape(n, k // g.size, g.size)
        own = gram.reshape(k // g.size, g.size, k // g.size, g.size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        return torch.einsum("nbi,bij,nbj->nb", blocks, own, blocks)
    rows = ((error @ gram) * error).sum(1)
    return rows if isinstance(g, PerAxis) else rows.sum()
