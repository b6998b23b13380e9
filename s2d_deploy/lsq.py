"""Learned step sizes: a quantizer's scale as a parameter of QAT (LSQ, Esser et al., arXiv 1902.08153).

The forward pass is the plan's own, bit for bit. Backward (equation 3), with code c = round(v / s) before clamping:

    dv^/ds =  round(v / s) - v / s    inside the range,   qmin or qmax    where v / s lies beyond them

and the gradient of s is divided by ``sqrt(N qmax)`` (section 2.2), so that steps move about as fast as weights do: N
is the number of weights that share a step, or the number of an activation's elements in one sample. The gradient of v
is straight through inside the range, 0 beyond (equation 5).

Steps start from the calibrated plan, not from the paper's ``2 mean|v| / sqrt(qmax)``: that plan is at hand and fits the
data. A zero point stays what calibration made it. Integer grids with stored scales have steps to learn; the scales of
run-time grids and of FP4 blocks are no parameters. A step is kept above a thousandth of its start, since the paper's
update may carry it through 0.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2d_deploy.fake_quant import expand_parameter
from s2d_deploy.grid import Grid
from s2d_deploy.plan import Site

SOURCE = "lsq"
_LEAST_SHARE = 1e-3


class _Step(torch.autograd.Function):
    """Quantize and dequantize; gradients of the values and of the steps, elementwise before they are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
        ratio = x / scale
        code = torch.round(ratio) + zero_point
        ctx.save_for_backward(ratio, code, zero_point)
        ctx.grid, ctx.shape = grid, scale.shape
        return (code.clamp(grid.qmin, grid.qmax) - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ratio, code, zero_point = ctx.saved_tensors
        inside = (ratio + zero_point > ctx.grid.qmin) & (ratio + zero_point < ctx.grid.qmax)
        slope = code.clamp(ctx.grid.qmin, ctx.grid.qmax) - zero_point - torch.where(inside, ratio, 0.0)
        return grad * inside, (grad * slope).sum_to_size(ctx.shape), None, None


class _ScaledGradient(torch.autograd.Function):
    """The identity, with a gradient times `factor`: the step's value must not be rounded on its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def learnable(site: Site) -> bool:
    """Whether the site has steps to learn."""
    return site.grid.integer and not site.grid.dynamic


class LearnedQuantizer(nn.Module):
    """A site whose scale is a parameter.

    Args:
        site: an integer site with stored scales.
    """

    zero_point: Tensor
    least: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.site = site
        self.scale = nn.Parameter(site.scale.detach().clone().float())
        self.register_buffer("zero_point", site.zero_point.float())
        self.register_buffer("least", site.scale.detach().float() * _LEAST_SHARE)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized `x`, as `fake_quant.FakeQuantizer` computes it."""
        shared = x.numel() / self.scale.numel() if self.site.role == "weight" else x[0].numel()
        scale = cast(Tensor, _ScaledGradient.apply(self.scale, 1 / math.sqrt(shared * self.site.grid.qmax)))  # type: ignore[no-untyped-call]
        s, z = expand_parameter(scale, x, self.site.grid), expand_parameter(self.zero_point, x, self.site.grid)
        return cast(Tensor, _Step.apply(x, s, z, self.site.grid))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def keep_positive(self) -> None:
        """Bring a step that an update carried too low back to its least value."""
        self.scale.copy_(torch.maximum(self.scale, self.least))

    def learned_site(self) -> Site:
        """The site with its steps as they are now."""
        return replace(self.site, scale=self.scale.detach().cpu().clone(), source=SOURCE)


__all__ = ["SOURCE", "LearnedQuantizer", "learnable"]
