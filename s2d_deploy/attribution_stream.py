"""One tensor over all batches: channel means in a first pass, histograms in a second.

What is lost: which values came together; the histograms are of single elements.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Grid
from s2d_deploy.observers import Histogram, activation_parameters

# The largest deviations that are no part of the signal's bulk, and the variance of a normal without them.
TRIMMED = 0.05
NORMAL_BULK = 0.7588


@dataclass(slots=True)
class Stream:
    """One tensor over all batches: channel means in the first pass, histograms in the second."""

    name: str
    count: int = 0
    total: Tensor | None = None
    peak: Tensor | None = None
    histogram: Histogram = field(default_factory=Histogram)
    centred: Histogram = field(default_factory=Histogram)

    def look(self, x: Tensor) -> None:
        """First pass over `x`, channels last."""
        rows = x.detach().reshape(-1, x.shape[-1])
        total, peak = rows.double().sum(0), rows.abs().amax(0).double()
        self.total = total if self.total is None else self.total + total
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.count += rows.shape[0]

    def add(self, x: Tensor) -> None:
        """Second pass."""
        self.histogram.update(x, self.name)
        self.centred.update(x - self.mean.to(x), self.name)

    @property
    def mean(self) -> Tensor:
        """Of each channel, float64."""
        return torch.zeros(1, dtype=torch.float64) if self.total is None else self.total / self.count

    @property
    def bulk(self) -> float:
        """Variance within channels of all but the `TRIMMED` largest deviations, corrected to that of a normal."""
        counts, centers = self.centred.counts.double(), self.centred.centers()
        kept = centers.abs() <= self.centred.percentile(100.0 * (1 - TRIMMED))
        return float((counts * centers.square())[kept].sum() / counts[kept].sum().clamp_min(1)) / NORMAL_BULK

    def noise(self, bits: int = 4) -> float:
        """Mean squared error on a symmetric grid of `bits` with the best clipping range."""
        grid = Grid(bits)
        scale, zero_point = activation_parameters(self.histogram, grid, "mse")
        filled = self.histogram.counts > 0
        centers = self.histogram.centers()[filled].float()
        error = dequantize(quantize(centers, scale, zero_point, grid), scale, zero_point, grid) - centers
        weight = self.histogram.counts[filled].double()
        return float((weight * error.double().square()).sum() / weight.sum())


__all__ = ["NORMAL_BULK", "Stream"]
