"""From observed values to a scale and a zero point: absmax, percentile, MSE, entropy.

Activations stream by; what is kept of a site is a `Histogram` of fixed size, so memory does not grow with the
data, and every precision reads the same pass. Its bins are aligned to powers of two, therefore the histogram of a
stream does not depend on how it was cut into batches. What is lost: a value is known to one bin, 1/16384 to
1/8192 of the largest magnitude; the extremes are exact.

Weights are at hand whole, so their scales are searched on the values themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from s2d_deploy import formats
from s2d_deploy.errors import DataError, PlanError, message
from s2d_deploy.fake_quant import expand_parameter
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor

WeightMethod = Literal["absmax", "percentile", "mse"]
Method = Literal["absmax", "percentile", "mse", "entropy"]
HALF_BINS = 16384
_ENTROPY_BINS = 2048
# Values looked at together: their float64 squares still lie in a processor's cache.
_PART = 1 << 17
# Below this magnitude bins would be narrower than FP32 can divide by; such values lie in the bins beside zero.
_LEAST_LIMIT = 2.0**-100
_RATIOS = torch.linspace(1.0, 0.02, 197, dtype=torch.float64)
# Above 1 too: E2M1's steps grow, so that a block's largest value may lie better on 4 than on 6 (1.5).
_FP4_RATIOS = torch.linspace(1.5, 0.5, 51, dtype=torch.float64)
_WEIGHT_RATIOS = torch.linspace(1.0, 0.3, 71, dtype=torch.float64)


class Histogram:
    """Counts of a stream of values on ``[-limit, limit)``, `limit` a power of two.

    Attributes:
        counts: int64 ``(2 * HALF_BINS,)``.
        limit: upper bound of the magnitudes; 0.0 before anything but zeros was seen.
        low, high: exact extremes.
        total: number of values.
        power: float64 ``(4,)``, sums of x, x^2, x^3, x^4 (for spread and kurtosis).
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(2 * HALF_BINS, dtype=torch.int64)
        self.limit = 0.0
        self.low, self.high = math.inf, -math.inf
        self.total = 0
        self.power = torch.zeros(4, dtype=torch.float64)

    def update(self, x: Tensor, name: str = "tensor") -> None:
        """Add the values of `x` (any shape, floating point).

        Raises:
            DataError: NaN or infinite values; the message names `name`.
        """
        values = x.detach().reshape(-1).to(torch.float32)
        if not values.numel():
            return
        low, high = (float(v) for v in torch.aminmax(values))
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = int((~torch.isfinite(values)).sum())
            raise DataError(
                message(
                    f"{name}: {bad} of {values.numel()} observed values are NaN or infinite",
                    expected="finite activations",
                    fix="check the calibration samples and the weights of the layers before it",
                )
            )
        self.low, self.high = min(self.low, low), max(self.high, high)
        largest = max(-low, high)
        if largest > 0:
            # The upper edge is exclusive, so a magnitude that is itself a power of two needs the next one.
            self._grow(max(2.0 ** math.frexp(largest)[1], _LEAST_LIMIT))
        bins_per_unit = HALF_BINS / (self.limit or 1.0)  # a power of two: the product is as exact as the quotient
        self.total += values.numel()
        for start in range(0, values.numel(), _PART):
            part = values[start : start + _PART]
            index = (part * bins_per_unit).floor_().add_(HALF_BINS).clamp_(0, 2 * HALF_BINS - 1).to(torch.int32)
            self.counts += torch.bincount(index, minlength=2 * HALF_BINS)
            exact = part.to(torch.float64)
            square = exact.square()
            self.power += torch.stack([exact.sum(), square.sum(), square @ exact, square @ square])

    def _grow(self, limit: float) -> None:
        if self.limit == 0.0:
            zeros = int(self.counts.sum())  # only zeros so far; they lie in the bin that starts at 0
            self.counts.zero_()
            self.counts[HALF_BINS] = zeros
            self.limit = limit
        while self.limit < limit:
            quarter = HALF_BINS // 2
            merged = self.counts.view(-1, 2).sum(dim=1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[quarter : quarter + HALF_BINS] = merged
            self.limit *= 2

    @property
    def absmax(self) -> float:
        """Largest magnitude; 0.0 for an empty stream."""
        return max(-self.low, self.high) if self.total else 0.0

    @property
    def std(self) -> float:
        """Standard deviation."""
        mean = float(self.power[0]) / max(self.total, 1)
        return math.sqrt(max(float(self.power[1]) / max(self.total, 1) - mean * mean, 0.0))

    @property
    def kurtosis(self) -> float:
        """Pearson's kurtosis (3 for a normal distribution); 0.0 for a constant."""
        n = max(self.total, 1)
        m, m2, m3, m4 = (float(p) / n for p in self.power)
        variance = m2 - m * m
        if variance <= 1e-12 * m2:  # within the rounding of the difference: a constant
            return 0.0
        return (m4 - 4 * m * m3 + 6 * m * m * m2 - 3 * m**4) / variance**2

    def centers(self) -> Tensor:
        """Bin centres, float64 ``(2 * HALF_BINS,)``."""
        width = (self.limit or 1.0) / HALF_BINS
        return (torch.arange(2 * HALF_BINS, dtype=torch.float64) - HALF_BINS + 0.5) * width

    def percentile(self, percent: float) -> float:
        """Smallest magnitude that at least `percent` of the magnitudes do not exceed, to one bin; at most absmax."""
        width = (self.limit or 1.0) / HALF_BINS
        magnitudes = self.counts[HALF_BINS:] + self.counts[:HALF_BINS].flip(0)
        reached = torch.cumsum(magnitudes, 0) >= math.ceil(self.total * percent / 100.0 - 1e-9)
        return min((int(reached.to(torch.int8).argmax()) + 1) * width, self.absmax)


def activation_parameters(
    histogram: Histogram, grid: Grid, method: Method, percent: float = 99.99
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of a per-tensor activation site.

    Args:
        histogram: what was observed.
        grid: a per-tensor grid.
        method: "absmax" covers everything; "percentile" covers `percent` of the magnitudes; "mse" minimizes the
            expected squared error over 197 clipping ratios (Banner et al., arXiv 1810.05723, section 2, by search).
            Clipping is of magnitudes: the short side of a skewed range stays whole. "entropy" is `entropy_limit`.

    Returns:
        float32 scalar scale, positive; int32 scalar zero point.

    Raises:
        DataError: nothing was observed.
        PlanError: the grid is not per tensor; "entropy" on a grid with a zero point or of another format.
    """
    if method == "entropy" and not (grid.symmetric and grid.integer):
        raise PlanError(
            message(
                "the entropy method sets one limit for magnitudes",
                expected="a symmetric integer grid",
                found=grid.name if grid.symmetric else f"{grid.name} with a zero point",
                fix="set quantize.activations=mse, or quantize.activation_symmetric=true",
            )
        )
    if not isinstance(grid.granularity, PerTensor):
        raise PlanError(message("a stored activation scale is per tensor", found=grid.granularity.kind))
    if not histogram.total:
        raise DataError(message("no activations were observed", fix="give at least one calibration sample"))
    if not grid.integer:
        return _formatted_parameters(histogram, grid, method, percent)
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    if grid.symmetric and grid.signed:
        low, high = -histogram.absmax, histogram.absmax
    elif grid.symmetric and low < 0:
        raise PlanError(message("an unsigned symmetric grid needs non-negative values", found=f"minimum {low:.4g}"))
    if high == low:
        return torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    limit = histogram.absmax
    if method == "percentile":
        limit = histogram.percentile(percent)
    elif method == "mse":
        limit *= _best_ratio(histogram, grid, low, high)
    elif method == "entropy":
        limit = entropy_limit(histogram, grid)
    ends = torch.tensor([max(low, -limit), min(high, limit)], dtype=torch.float64)
    return _parameters(grid, ends[0], ends[1])


def entropy_limit(histogram: Histogram, grid: Grid) -> float:
    """The clipping magnitude that loses the least information, by Kullback-Leibler divergence.

    S. Migacz, "8-bit Inference with TensorRT" (GTC 2017): of the first i of at most 2048 bins of magnitudes, P is their
    counts with everything beyond put into the last; Q is their counts merged into as many runs as there are codes and
    spread evenly over the bins of a run that are not empty. The i with the least KL(P || Q) wins; its limit is the
    middle of the next bin, at most the largest magnitude. 512 candidates, rather than every i, from one bin a code on.
    Where the last bin is empty and something lies beyond, Q is 0 and the candidate cannot win.

    It looks at how often values occur, not at how large they are: rare outliers are worth little to it, and at 4 bits
    it clips far more than the squared error would. That is the method, measured on 8 bits; `mse` is the default.
    """
    width = (histogram.limit or 1.0) / HALF_BINS
    magnitudes = (histogram.counts[HALF_BINS:] + histogram.counts[:HALF_BINS].flip(0)).double()
    used = min(int(histogram.absmax / width) + 1, HALF_BINS)
    merge = math.ceil(used / _ENTROPY_BINS)
    h = torch.nn.functional.pad(magnitudes[:used], (0, -used % merge)).reshape(-1, merge).sum(dim=1)
    codes = grid.qmax + 1
    bins = h.numel()
    if bins <= codes:
        return histogram.absmax
    ends = torch.unique(torch.linspace(codes, bins, min(512, bins - codes + 1), dtype=torch.float64).round().long())

    def running(x: Tensor) -> Tensor:
        """Sums of the first 0, 1, 2, ... elements."""
        return torch.nn.functional.pad(torch.cumsum(x, 0), (1, 0))

    counts, filled, information = running(h), running((h > 0).double()), running(torch.special.xlogy(h, h))
    # Run g of i bins begins at bin ceil(g i / codes): (candidates, codes + 1).
    edges = (ends[:, None] * torch.arange(codes + 1) + codes - 1) // codes
    inside = counts[edges].diff(dim=1)
    mean = inside / filled[edges].diff(dim=1).clamp(min=1)
    kept, last = counts[ends], h[ends - 1]
    beyond = counts[-1] - kept
    # sum of P log P, and of P log Q, both times the total.
    own = information[ends] - torch.special.xlogy(last, last) + torch.special.xlogy(last + beyond, last + beyond)
    cross = torch.special.xlogy(inside, mean).sum(dim=1) + torch.special.xlogy(beyond, mean[:, -1])
    divergence = (own - cross) / counts[-1] + torch.log(kept.clamp(min=1)) - torch.log(counts[-1])
    divergence = torch.where((last == 0) & (beyond > 0), math.inf, divergence)
    best = int(ends[int(divergence.argmin())])
    return min((best + 0.5) * width * merge, histogram.absmax)


def _formatted_parameters(histogram: Histogram, grid: Grid, method: Method, percent: float) -> tuple[Tensor, Tensor]:
    """The scale whose largest value is the limit, on a grid that is not "int"; "entropy" is not defined there."""
    if method == "entropy":
        raise PlanError(
            message("the entropy method needs a uniform grid", found=grid.name, fix="use mse or percentile")
        )
    if not grid.signed and histogram.low < 0:
        raise PlanError(message("an unsigned grid needs non-negative values", found=f"minimum {histogram.low:.4g}"))
    limit = histogram.percentile(percent) if method == "percentile" else histogram.absmax
    zero_point = torch.tensor(0, dtype=torch.int32)
    unit = torch.tensor(limit / formats.largest(grid), dtype=torch.float32)
    if not unit > torch.finfo(torch.float32).tiny:
        return torch.tensor(1.0), zero_point
    if method != "mse":
        return unit, zero_point
    filled = histogram.counts > 0
    centers = histogram.centers()[filled].clamp(histogram.low, histogram.high)
    weight = histogram.counts[filled].to(torch.float64)
    best, best_error = unit, math.inf
    for ratio in _RATIOS.to(torch.float32).tolist():
        error = (formats.decode(formats.encode(centers / (unit * ratio), grid), grid) * (unit * ratio) - centers) ** 2
        total = float((weight * error).sum())
        if total < best_error:
            best, best_error = unit * ratio, total
    return best, zero_point


def _parameters(grid: Grid, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 scales and int32 zero points of the float64 ranges from `low` to `high`, elementwise."""
    if grid.symmetric:
        divisor = -grid.qmin if grid.signed and grid.scale_rule == "qmin" else grid.qmax
        scale = (torch.maximum(-low, high) / divisor).float()
        zero_point = torch.zeros_like(low)
    else:
        scale = ((high - low) / (grid.qmax - grid.qmin)).float()
        zero_point = torch.round(grid.qmin - low / scale.double()).clamp(grid.qmin, grid.qmax)
    usable = scale > torch.finfo(torch.float32).tiny  # a denormal scale would divide to infinity
    return scale.where(usable, torch.ones(())), zero_point.where(usable, torch.zeros_like(low)).int()


def _best_ratio(histogram: Histogram, grid: Grid, low: float, high: float) -> float:
    filled = histogram.counts > 0
    centers = histogram.centers()[filled].clamp(histogram.low, histogram.high)
    weight = histogram.counts[filled].to(torch.float64)
    limit = histogram.absmax * _RATIOS
    scale, zero_point = _parameters(grid, (-limit).clamp(min=low), limit.clamp(max=high))
    scale = scale.double()[:, None]
    # Values of the codes, (ratios, codes). Centres ascend, so those that one code takes are a run of them, and the
    # run's error follows from running sums: sum w (v - x)^2 = v^2 sum w - 2 v sum w x + sum w x^2.
    steps = torch.arange(grid.qmin, grid.qmax + 1) - zero_point[:, None]
    value = steps * scale
    ends = torch.searchsorted(centers, (steps[:, :-1] + 0.5) * scale)
    ends = torch.nn.functional.pad(torch.nn.functional.pad(ends, (1, 0)), (0, 1), value=len(centers))

    def of_runs(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(torch.cumsum(x, 0), (1, 0))[ends].diff(dim=1)

    error = (value * (value * of_runs(weight) - 2 * of_runs(weight * centers))).sum(dim=1)
    return float(_RATIOS[int(error.argmin())])


def weight_parameters(
    weight: Tensor, grid: Grid, method: WeightMethod, percent: float = 99.99
) -> tuple[Tensor, Tensor]:
    """Scales and zero points of a weight.

    Args:
        weight: float, ``(N, K)`` or ``(O, I, kh, kw)``.
        grid: symmetric and signed; per tensor, per axis or per block; integers, or e2m1 with its block scales.
        method: as in `activation_parameters`, but on the values themselves (MSE: 71 ratios from 1 to 0.3;
            FP4: 51 from 1.5 to 0.5, each rounded to the scale format).

    Returns:
        float32 scales of ``grid.scale_shape(weight.shape)``, 1 for an all-zero group (e4m3: the tensor's scale); int32
        zeros of that shape.

    Raises:
        PlanError: an affine, unsigned or per-token grid, a block size that does not divide the width, or "entropy",
            which is a method for activations.
        DataError: NaN or infinite weights.
    """
    if not (grid.symmetric and grid.signed) or grid.dynamic:
        raise PlanError(
            message(
                "weights are quantized with stored, symmetric, signed scales",
                found=f"symmetric={grid.symmetric}, signed={grid.signed}, per {grid.granularity.kind}",
            )
        )
    if method not in get_args(WeightMethod):
        known = ", ".join(get_args(WeightMethod))
        raise PlanError(message("unknown weight range method", expected=known, found=str(method)))
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise DataError(message(f"{bad} weights are NaN or infinite", fix="use a sound checkpoint"))
    shape = grid.scale_shape(tuple(weight.shape))
    w = weight.detach().to(torch.float32)
    if method == "percentile":
        limit = _reduce(w.abs(), grid, lambda groups: _covering(groups, percent))
    else:
        limit = _reduce(w.abs(), grid, lambda groups: groups.amax(dim=1))
    limit = limit.reshape(shape)
    of_tensor = weight_tensor_scale(w, grid)
    if grid.integer:
        unit = limit / (-grid.qmin if grid.scale_rule == "qmin" else grid.qmax)
        scale = _least_squares(w, unit, grid) if method == "mse" else _usable(unit)
    else:
        scale = _fp4_scale(w, limit, grid, of_tensor, _FP4_RATIOS if method == "mse" else torch.ones(1))
    return scale, torch.zeros(shape, dtype=torch.int32)


def _least_squares(w: Tensor, unit: Tensor, grid: Grid) -> Tensor:
    """Of 71 ratios times `unit`, each group's scale with the smallest squared error; a part of the groups at a time."""
    groups = _grouped(w, grid)
    units, found = unit.reshape(-1, 1), []
    rows = max(_PART // groups.shape[1], 1)
    for start in range(0, len(groups), rows):
        part, of_part = groups[start : start + rows], units[start : start + rows]
        best, least = _usable(of_part), torch.full_like(of_part, math.inf)
        error = torch.empty_like(part)
        for ratio in _WEIGHT_RATIOS.to(torch.float32).tolist():
            candidate = _usable(of_part * ratio)
            torch.div(part, candidate, out=error).round_().clamp_(grid.qmin, grid.qmax).mul_(candidate).sub_(part)
            total = error.square_().sum(dim=1, keepdim=True)
            better = total < least
            best, least = torch.where(better, candidate, best), torch.where(better, total, least)
        found.append(best)
    return torch.cat(found).reshape(unit.shape)


def _fp4_scale(w: Tensor, limit: Tensor, grid: Grid, of_tensor: Tensor | None, ratios: Tensor) -> Tensor:
    """Of `ratios` times the blocks' magnitudes, rounded to the scale format, those with the smallest squared error."""
    best, least = torch.ones_like(limit), torch.full_like(limit, math.inf)
    for ratio in ratios.to(torch.float32).tolist():
        candidate = formats.block_scale(limit * ratio, grid, of_tensor)
        full = expand_parameter(candidate, w, grid)
        squared = (formats.decode(formats.encode(w / full, grid), grid).mul_(full) - w).square_()
        error = _reduce(squared, grid, lambda groups: groups.sum(dim=1)).reshape(limit.shape)
        better = error < least
        best, least = torch.where(better, candidate, best), torch.where(better, error, least)
    return best


def weight_tensor_scale(weight: Tensor, grid: Grid) -> Tensor | None:
    """The FP32 scale beside a weight's E4M3 block scales (`formats.tensor_scale`); None for every other grid."""
    return formats.tensor_scale(weight.detach().abs().max().float()) if grid.scale_format == "e4m3" else None


def activation_tensor_scale(histogram: Histogram) -> Tensor:
    """The FP32 scale beside run-time E4M3 block scales, from the largest magnitude that was observed."""
    return formats.tensor_scale(torch.tensor(histogram.absmax))


def _covering(groups: Tensor, percent: float) -> Tensor:
    """For each row the smallest of its values that `percent` of them do not exceed; its largest if that is 0."""
    rank = max(math.ceil(groups.shape[1] * percent / 100.0 - 1e-9), 1)
    limit = torch.kthvalue(groups, rank, dim=1).values
    return torch.where(limit > 0, limit, groups.amax(dim=1))


def _usable(scale: Tensor) -> Tensor:
    """1 where a scale is zero or denormal: such a group quantizes to zeros, and dividing by it would overflow."""
    return torch.where(scale > torch.finfo(torch.float32).tiny, scale, torch.ones_like(scale))


def _reduce(x: Tensor, grid: Grid, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `reduce` to ``(groups, members)``; groups in the order of the flattened scale tensor."""
    return reduce(_grouped(x, grid))


def _grouped(x: Tensor, grid: Grid) -> Tensor:
    """``(groups, members)``: the elements that share a scale."""
    g = grid.granularity
    if isinstance(g, PerAxis):
        return x.movedim(g.axis, 0).flatten(1)
    if isinstance(g, PerBlock):
        axis = g.axis % x.dim()
        blocks = x.reshape(*x.shape[:axis], x.shape[axis] // g.size, g.size, *x.shape[axis + 1 :])
        return blocks.movedim(axis + 1, -1).reshape(-1, g.size)
    return x.reshape(1, -1)
