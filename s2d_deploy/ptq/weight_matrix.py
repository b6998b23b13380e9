"""A layer's weight as the matrix that multiplies rows: float64 ``(N, K)``, with the scale of every element.

What reconstruction passes compute on, whatever the granularity: per tensor, per channel and per block scales all become
one scale for each element, so an order of columns other than the stored one (GPTQ's `act_order`) leaves the stored
groups as they are. A convolution is unfolded (one group of channels only).

Values are those that will be deployed: an integer code times an FP32 scale, rounded to FP32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from s2d_deploy.fake_quant import expand_parameter, quantize
from s2d_deploy.plan import Site


@dataclass(frozen=True, slots=True)
class WeightMatrix:
    """A weight and its grid.

    Attributes:
        weight: float64 ``(N, K)``, not rounded.
        scale: float64 ``(N, K)``, the FP32 scale of each element.
        qmin, qmax: bounds of the codes.
        shape: of the layer's own weight.
        nearest_codes: float64 ``(N, K)``, round to nearest as the simulation computes it.
    """

    weight: Tensor
    scale: Tensor
    qmin: int
    qmax: int
    shape: torch.Size
    nearest_codes: Tensor

    def nearest(self, weight: Tensor, columns: slice | Tensor | int = slice(None)) -> Tensor:
        """Codes (float64, integers) next to `weight`, which holds `columns` of the matrix."""
        return torch.round(weight / self.scale[:, columns]).clamp_(self.qmin, self.qmax)

    def values(self, codes: Tensor, columns: slice | Tensor | int = slice(None)) -> Tensor:
        """What `codes` (float64) of `columns` stand for, float64 holding FP32 values."""
        return (codes.float() * self.scale[:, columns].float()).double()

    def stored(self, codes: Tensor) -> Tensor:
        """Codes (float64) as int32 in the shape of the layer's own weight."""
        return codes.to(torch.int32).reshape(self.shape)


def weight_matrix(layer: nn.Module, site: Site, weight: Tensor | None = None) -> WeightMatrix:
    """The matrix of `layer` on the grid of `site`; `weight` (any float, ``(N, K)``) in place of the layer's own."""
    own = cast(Tensor, layer.weight).detach()
    if weight is not None:
        own = weight.to(torch.float32).reshape(own.shape)
    scale = expand_parameter(site.scale, own, site.grid).expand(own.shape)
    return WeightMatrix(
        own.flatten(1).double(),
        scale.flatten(1).double(),
        site.grid.qmin,
        site.grid.qmax,
        own.shape,
        quantize(own, site.scale, site.zero_point, site.grid).flatten(1).double(),
    )


def output_error(difference: Tensor, gram: Tensor) -> Tensor:
    """Mean squared output error of each row: ``diag(D G D^T)``, float64 ``(N,)``.

    Args:
        difference: of the weights, float64 ``(N, K)``.
        gram: mean of ``x x^T``, float64 ``(K, K)``.
    """
    return ((difference @ gram) * difference).sum(1)


def better_rows(matrix: WeightMatrix, codes: Tensor, gram: Tensor) -> tuple[Tensor, float, float]:
    """`codes`, with rows where round to nearest has the smaller output error replaced by it.

    Rows do not act on each other, so the choice is free; it makes a pass never worse than rounding on what it saw.

    Returns:
        Codes, the output error of round to nearest, and theirs (both means over the rows).
    """
    nearest = output_error(matrix.values(matrix.nearest_codes) - matrix.weight, gram)
    chosen = output_error(matrix.values(codes) - matrix.weight, gram)
    keep = nearest < chosen
    return (
        torch.where(keep[:, None], matrix.nearest_codes, codes),
        float(nearest.mean()),
        float(torch.minimum(nearest, chosen).mean()),
    )
