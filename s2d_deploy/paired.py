"""Statistics of two models judged on the same samples.

For right-or-wrong samples everything follows from the discordant ones: `lost` samples that only the
first model got right and `gained` samples that only the second did. The drop in accuracy is
``(lost - gained) / n``. Treating the two accuracies as independent would throw the pairing away and
could not see drops that are plainly there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z95 = 1.959963984540054  # two-sided 95 %
_Z_ALPHA = 1.6448536269514722  # one-sided 5 %
_Z_POWER = 0.8416212335729143  # power 80 %


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
    """

    n: int
    drop: float
    lo: float
    hi: float
    p_value: float | None
    lost: int | None
    gained: int | None
    method: str


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
    n = len(a)
    unit = float(max(a.max(), b.max())) or 1.0
    if unit in (1.0, 100.0) and np.isin(a, (0, unit)).all() and np.isin(b, (0, unit)).all():
        lost, gained = int((a > b).sum()), int((b > a).sum())
        lo, hi = (unit * end for end in tango_interval(lost, gained, n))
        p = mcnemar(lost, gained)
        return PairedDrop(n, unit * (lost - gained) / n, lo, hi, p, lost, gained, "exact McNemar, Tango interval")
    difference = a - b
    draws = np.random.default_rng(seed).integers(0, n, size=(2000, n)) if n <= 5000 else None
    if draws is not None:
        lo, hi = np.quantile(difference[draws].mean(axis=1), [0.025, 0.975])
        return PairedDrop(n, float(difference.mean()), float(lo), float(hi), None, None, None, "paired bootstrap")
    # Above 5,000 samples the mean is normal to within what a bootstrap of 2,000 could show.
    half = _Z95 * float(difference.std(ddof=1)) / math.sqrt(n)
    mean = float(difference.mean())
    return PairedDrop(n, mean, mean - half, mean + half, None, None, None, "paired normal interval")


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

    return root(_Z95), root(-_Z95)


def smallest_detectable_drop(n: int, discordant: float) -> float:
    """The smallest true drop that McNemar's one-sided 5 % test finds in 80 % of runs with `n` samples.

    Inverts `samples_needed`; never below 5 / n, because four lost samples and no gained one still have
    p = 1/16.

    Args:
        n: samples.
        discordant: share of samples on which the two models differ.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if samples_needed(middle, discordant) <= n else (middle, high)
    return min(max(high, 5 / n), 1.0)


def samples_needed(drop: float, discordant: float) -> int:
    """Samples that McNemar's one-sided 5 % test needs to find a true `drop` in 80 % of runs.

    Connor 1987, "Sample size for testing differences in proportions for the paired-sample design",
    Biometrics 43: ``n = (z_a sqrt(psi) + z_b sqrt(psi - drop^2))^2 / drop^2``.
    """
    if drop <= 0:
        return 10**18
    psi = max(discordant, drop)  # a drop of d needs at least a share d of lost samples
    root = _Z_ALPHA * math.sqrt(psi) + _Z_POWER * math.sqrt(max(psi - drop * drop, 0.0))
    return max(math.ceil((root / drop) ** 2), math.ceil(5 / drop))
