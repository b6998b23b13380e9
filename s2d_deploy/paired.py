"""Statistics of two models judged on the same samples.

For right-or-wrong samples everything follows from the discordant ones: `lost` samples that only the
first model got right and `gained` samples that only the second did. The drop in accuracy is
``(lost - gained) / n``. Treating the two accuracies as independent would throw the pairing away and
could not see drops that are plainly there.

Graded samples (a cosine, a loss) get a studentized paired bootstrap: their differences are skewed, because a few
samples lose much and most lose little. With 100 log-normal losses the 97.5 % upper bound missed the truth in 7.4 % of
runs for percentiles, 5.5 % for BCa and 4.9 % studentized; with 400 samples of which every tenth loses something in
5.6, 3.3 and 2.5 % (`benchmarks/gate_power.py` measures what is used). No interval sees losses that no sample shows.

How many samples a verdict needs, and what it then finds: `power.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z95 = 1.959963984540054  # two-sided 95 %
_RESAMPLES = 2000
_BOOTSTRAP_UP_TO = 5000  # above so many samples the mean is normal to within what 2,000 resamples could show
_AT_ONCE = 1 << 22  # draws held at a time: 32 MiB


@dataclass(frozen=True, slots=True)
class PairedDrop:
    """How much is lost from the first to the second model, on the same `n` samples.

    Attributes:
        n: samples.
        drop: mean of first minus second.
        lo: lower end of the 95 % confidence interval of the drop.
        hi: upper end.
        p_value: one-sided, of "no drop"; None where no exact test applies.
        lost: samples that only the first got right; None for graded samples.
        gained: samples that only the second got right; None for graded samples.
        method: what test and interval are.
        sd: standard deviation of the differences (``ddof=1``; 0 for one sample).
        unit: what a right answer counts, 1 or 100; 1 for graded samples.
        skew: of the differences, third moment over the cube of the standard deviation; 0 where they are equal.
        kurtosis: fourth moment over the variance's square; 3 for a normal distribution.
    """

    n: int
    drop: float
    lo: float
    hi: float
    p_value: float | None
    lost: int | None
    gained: int | None
    method: str
    sd: float = 0.0
    unit: float = 1.0
    skew: float = 0.0
    kurtosis: float = 3.0


def paired_drop(first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> PairedDrop:
    """The drop with its interval: exact McNemar and Tango for right/wrong samples, paired bootstrap for graded ones.

    Right/wrong samples hold 0 and one other positive value, the unit of a right answer: 1, or 100 for points.

    Raises:
        ValueError: the two differ in length, are empty, or hold something that is not a finite number.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or not len(a):
        raise ValueError(f"paired samples of shapes {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("paired samples that are not finite")
    if max(np.abs(a).max(), np.abs(b).max()) > 1e100:
        raise ValueError("paired samples whose squares overflow")
    n = len(a)
    difference = a - b
    mean = float(difference.mean())
    sd = float(difference.std(ddof=1)) if n > 1 else 0.0
    unit = float(max(a.max(), b.max())) or 1.0
    if unit in (1.0, 100.0) and np.isin(a, (0, unit)).all() and np.isin(b, (0, unit)).all():
        lost, gained = int((a > b).sum()), int((b > a).sum())
        lo, hi = (unit * end for end in tango_interval(lost, gained, n))
        p, how = mcnemar(lost, gained), "exact McNemar, Tango interval"
        return PairedDrop(n, unit * (lost - gained) / n, lo, hi, p, lost, gained, how, sd, unit)
    shape = _shape(difference - mean)
    if n <= _BOOTSTRAP_UP_TO:
        lo, hi = (float(end[0]) for end in studentized_interval(difference[:, None], seed=seed))
        return PairedDrop(n, mean, lo, hi, None, None, None, "studentized paired bootstrap", sd, 1.0, *shape)
    half = Z95 * sd / math.sqrt(n)
    return PairedDrop(n, mean, mean - half, mean + half, None, None, None, "paired normal interval", sd, 1.0, *shape)


def _shape(centred: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Skewness and kurtosis."""
    top = float(np.abs(centred).max())
    if top == 0.0:
        return 0.0, 3.0
    x = centred / top  # so that no power under- or overflows
    variance = float((x**2).mean())
    return float((x**3).mean()) / variance**1.5, float((x**4).mean()) / variance**2


def studentized_interval(
    difference: npt.NDArray[np.float64], *, seed: int = 0
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """95 % bootstrap-t intervals of the mean of each column.

    Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5. Where resamples without any spread
    make an end infinite, it is the most extreme difference seen: a mean beyond that was never observed.

    Args:
        difference: ``(n, columns)``; the columns are resampled by the same draws.
        seed: of the draws, so that the same samples give the same interval.

    Returns:
        Lower and upper ends, each ``(columns,)``. One sample gives an interval without width.
    """
    n = len(difference)
    mean = difference.mean(axis=0)
    if n < 2:
        return mean, mean
    # About the mean, so that variances below do not cancel.
    centred = difference - mean
    error = difference.std(axis=0, ddof=1) / math.sqrt(n)
    rng = np.random.default_rng(seed)
    ratios = np.empty((_RESAMPLES, difference.shape[1]))
    rows = max(1, _AT_ONCE // n)
    for start in range(0, _RESAMPLES, rows):
        count = min(rows, _RESAMPLES - start)
        draws = rng.integers(0, n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(draws.ravel(), minlength=count * n).reshape(count, n) / n
        means = weights @ centred
        variance = np.maximum(weights @ centred**2 - means**2, 0.0) / (n - 1)
        # A resample of equal values has no spread of its own; rounding leaves about 1e-16 of the squares.
        spread = np.where(variance > 1e-12 * error**2, np.sqrt(variance), 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios[start : start + count] = np.where(means == 0.0, 0.0, means / spread)
    low, high = np.sort(ratios, axis=0)[[round(q * (_RESAMPLES - 1)) for q in (0.025, 0.975)]]
    with np.errstate(invalid="ignore"):
        lo, hi = mean - high * error, mean - low * error
    least, most = difference.min(axis=0), difference.max(axis=0)
    return np.where(error > 0, np.maximum(lo, least), mean), np.where(error > 0, np.minimum(hi, most), mean)


def mcnemar(lost: int, gained: int) -> float:
    """Exact one-sided p-value of "no drop": at least `lost` heads in ``lost + gained`` fair tosses.

    McNemar 1947, "Note on the sampling error of the difference between correlated proportions"; the
    exact form conditions on the number of discordant samples.
    """
    from scipy.stats import binom

    return float(binom.sf(lost - 1, lost + gained, 0.5)) if lost + gained else 1.0


def tango_interval(lost: int, gained: int, n: int) -> tuple[float, float]:
    """95 % score interval for ``(lost - gained) / n``.

    Tango 1998, "Equivalence test and confidence interval for the difference in proportions for the
    paired-sample design", Statistics in Medicine 17, equations 25-27. Unlike Wald's it has a width where
    nothing is discordant, and keeps its coverage for small n.
    """
    from scipy.optimize import brentq

    def score(delta: float) -> float:
        # q: maximum likelihood estimate of P(only the second is right), given the difference delta.
        b = -lost - gained + (2 * n - lost + gained) * delta
        c = -gained * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * (2 * q + delta * (1 - delta))
        distance = lost - gained - n * delta
        if variance <= 0:
            return math.copysign(math.inf, distance) if distance else 0.0
        return distance / math.sqrt(variance)

    # The score falls strictly in delta; infinities at the ends are cut so that the root finder can bisect.
    def root(z: float) -> float:
        def shifted(delta: float) -> float:
            return min(max(score(delta) - z, -1e9), 1e9)

        low, high = -1 + 1e-12, 1 - 1e-12
        if shifted(low) <= 0:
            return -1.0
        if shifted(high) >= 0:
            return 1.0
        return float(brentq(shifted, low, high, xtol=1e-10))

    return root(Z95), root(-Z95)
