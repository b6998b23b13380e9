"""What a paired verdict decides, how often it errs, and how many samples it needs.

The decision rule, for a `limit` of the drop from the first model to the second:

    pass        the whole 95 % interval of the drop respects the limit (non-inferiority)
    fail        the whole interval breaks it, and for right/wrong samples a stricter test agrees: at limit 0 exact
                McNemar (p <= 0.025), above it the interval's own test with a continuity correction of half a sample
    undecided   the interval contains the limit: more samples are needed, or another limit

Either error is one tail of a 95 % interval: a model whose true drop is at the limit fails in about 2.5 % of runs, and
passes in about 2.5 %; farther from the limit both become rarer. What is promised is 5 % for false alarms, and 20 % for
misses at the stated drops: `smallest_detectable_drop` fails in 80 % of runs, and with `samples_needed` a model without
any drop passes in 80 %. For right/wrong samples both are exact sums over the outcomes, not normal approximations; for
graded samples they hold as far as the mean is normal. `benchmarks/gate_power.py` measures them on simulated truths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from s2d_deploy.paired import Z95, PairedDrop

Verdict = Literal["pass", "fail", "undecided"]
PLANNED = 0.85  # what is promised is 80 %: a reserve for the estimated shape of graded samples
MCNEMAR = 0.025  # one-sided: the tail that the interval leaves, too
_Z_POWER = 1.0364333894937898
_SIGMAS = 6.0  # of a count: what lies beyond has less than 1e-8 of the probability
_EXACT_CELLS = 60_000
_ENOUGH = 10**9

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chances:
    """How often each verdict falls; they add up to 1."""

    passes: float
    undecided: float
    fails: float


def decide(drop: PairedDrop, limit: float) -> Verdict:
    """The verdict by the rule above; `limit` in the unit of `drop`.

    One graded sample has no spread, so it decides nothing.
    """
    if drop.lost is not None and drop.gained is not None:
        passes, fails = verdicts(np.asarray(drop.lost), np.asarray(drop.gained), drop.n, limit / drop.unit)
        return "pass" if passes else "fail" if fails else "undecided"
    if drop.n < 2:
        return "undecided"
    slack = 1e-9 * max(abs(limit), 1e-3)  # 0.9 - 0.895 is 0.005000000000000004
    return "pass" if drop.hi <= limit + slack else "fail" if drop.lo > limit + slack else "undecided"


def smallest_detectable(drop: PairedDrop, limit: float = 0.0) -> float | None:
    """The smallest true drop that fails `limit` in 80 % of runs with as many samples, in the unit of `drop`.

    Right/wrong samples are taken to differ as often as seen, and once more: none seen does not mean none.

    Returns:
        None where no drop would: too few samples.
    """
    if drop.lost is not None and drop.gained is not None:
        share = min(1.0, (drop.lost + drop.gained + 1) / drop.n)
        found = smallest_detectable_drop(drop.n, share, limit / drop.unit)
        return None if found is None else found * drop.unit
    if drop.n < 2:
        return None
    return limit + _errors_apart(drop.n, -drop.skew, drop.kurtosis) * drop.sd / math.sqrt(drop.n)


def needed(drop: PairedDrop, limit: float) -> int | None:
    """Samples with which a model without any true drop passes `limit` in 80 % of runs.

    Returns:
        None where no number does: a limit of 0 or below, or more than a billion.
    """
    if limit <= 0:
        return None
    if drop.lost is not None and drop.gained is not None:
        return samples_needed(limit / drop.unit, min(1.0, (drop.lost + drop.gained + 1) / drop.n))
    if drop.n < 2:
        return None

    def too_few(n: int) -> bool:
        return _errors_apart(n, drop.skew, drop.kurtosis) * drop.sd > limit * math.sqrt(n)

    low, high = 1, 2
    while too_few(high):
        if high > _ENOUGH:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_few(middle) else (low, middle)
    return high


def smallest_detectable_drop(n: int, discordant: float, limit: float = 0.0) -> float | None:
    """The smallest true drop in accuracy that fails `limit` in 80 % of runs with `n` right/wrong samples.

    Args:
        n: samples.
        discordant: share of samples on which the two models differ; at least the drop itself.
        limit: of the drop, as a share.
    """
    if chances(n, discordant, 1.0, limit).fails < PLANNED:
        return None
    low, high = max(limit, 0.0), 1.0
    for _ in range(26):
        middle = (low + high) / 2
        low, high = (low, middle) if chances(n, discordant, middle, limit).fails >= PLANNED else (middle, high)
    return high


def samples_needed(limit: float, discordant: float) -> int | None:
    """Samples with which two equally good models pass `limit` in 80 % of runs.

    Starts from Connor 1987, "Sample size for testing differences in proportions for the paired-sample design",
    Biometrics 43, and goes on by exact sums, where those are affordable.

    Args:
        limit: of the drop, as a share.
        discordant: share of samples on which the two models differ.

    Returns:
        None for a limit that is not positive, or more than a billion samples.
    """
    if limit <= 0:
        return None
    root = Z95 * math.sqrt(max(discordant, limit)) + _Z_POWER * math.sqrt(discordant)
    start = (root / limit) ** 2
    if start > _ENOUGH:
        return None
    # With no sample that differs, the interval's upper end is z^2 / (n + z^2).
    n = max(1, math.ceil(start / 2))
    step = max(1, n // 25)
    for _ in range(400):
        if _cells(n, discordant, 0.0) > _EXACT_CELLS:
            return max(n, math.ceil(start))
        if chances(n, discordant, 0.0, limit).passes >= PLANNED:
            return n
        n += step
    return math.ceil(start)


def chances(n: int, discordant: float, drop: float, limit: float) -> Chances:
    """How often each verdict falls for right/wrong samples, summed over all outcomes that matter.

    Args:
        n: samples.
        discordant: share of samples on which the two models differ; raised to ``|drop|`` where it is less.
        drop: true drop, as a share.
        limit: as a share.

    Too many outcomes (above 60,000) are replaced by the normal distribution of the score.
    """
    psi = min(1.0, max(discordant, abs(drop)))
    if _cells(n, psi, drop) > _EXACT_CELLS:
        return _normal_chances(n, psi, drop, limit)
    from scipy.special import gammaln, xlogy

    lost, gained = (_counts(n, (psi + sign * drop) / 2) for sign in (1, -1))
    i, j = lost[:, None], gained[None, :]
    rest = n - i - j
    with np.errstate(invalid="ignore"):
        log = (
            gammaln(n + 1.0)
            - gammaln(i + 1.0)
            - gammaln(j + 1.0)
            - gammaln(np.maximum(rest, 0) + 1.0)
            + xlogy(i, max((psi + drop) / 2, 0.0))
            + xlogy(j, max((psi - drop) / 2, 0.0))
            + xlogy(np.maximum(rest, 0), max(1 - psi, 0.0))
        )
    weight = np.where(rest >= 0, np.exp(log), 0.0)
    passes, fails = verdicts(i, j, n, limit)
    total = float(weight.sum())
    good, bad = float(weight[passes].sum()) / total, float(weight[fails].sum()) / total
    return Chances(good, max(0.0, 1 - good - bad), bad)


def verdicts(
    lost: npt.NDArray[np.int64], gained: npt.NDArray[np.int64], n: int, limit: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Which outcomes pass and which fail: `decide` for whole arrays, without looking for the interval's ends.

    The score falls in the drop, so an end of Tango's interval lies beyond the limit exactly where the score at the
    limit lies beyond 1.96.
    """
    from scipy.stats import binom

    fails = score(lost, gained, n, limit, correction=0.0 if limit <= 0 else 0.5) > Z95
    if limit >= 0:
        # Few lost samples: uncorrected, up to 5.1 % of runs at a limit of 2 % fail with 200 samples.
        fails = fails & (binom.sf(lost - 1, lost + gained, 0.5) <= MCNEMAR)
    return score(lost, gained, n, limit) <= -Z95, fails


def score(
    lost: npt.NDArray[np.int64], gained: npt.NDArray[np.int64], n: int, delta: float, correction: float = 0.0
) -> Floats:
    """Tango's score of "the drop is `delta`" (`paired.tango_interval`), for arrays of outcomes that broadcast.

    `correction` is taken off the number of net losses.
    """
    b = -lost - gained + (2 * n - lost + gained) * delta
    c = -gained * delta * (1 - delta)
    q = (np.sqrt(np.maximum(b * b - 8.0 * n * c, 0.0)) - b) / (4 * n)
    variance = n * (2 * q + delta * (1 - delta))
    distance = lost - gained - n * delta - correction
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(
            variance > 0, distance / np.sqrt(variance), np.where(distance == 0, 0.0, np.copysign(np.inf, distance))
        )


def _errors_apart(n: int, skew: float, kurtosis: float) -> float:
    """How many standard errors a truth must lie from the limit to be found in 80 % of runs of `n` graded samples.

    Student's quantiles, because the spread is estimated. Differences with a long tail on the side of the limit (`skew`
    above 0) cost more: the studentized end moves out by ``skew (2 z^2 + 1) / (6 sqrt n)`` (Hall 1988, "Theoretical
    comparison of bootstrap confidence intervals", Annals of Statistics 16), and mean and spread rise together.
    """
    from scipy.stats import t

    tail = max(0.0, skew)
    end = float(t.ppf(0.975, n - 1)) + tail * (2 * Z95**2 + 1) / (6 * math.sqrt(n))
    variance = 1 + tail * end / math.sqrt(n) + max(0.0, kurtosis - 3.0) * end**2 / (4 * n)
    return end + float(t.ppf(PLANNED, n - 1)) * math.sqrt(variance)


def _counts(n: int, p: float) -> npt.NDArray[np.int64]:
    """Counts that a binomial variable takes with any probability worth summing."""
    p = min(max(p, 0.0), 1.0)
    half = _SIGMAS * math.sqrt(n * p * (1 - p)) + 12  # 12: a Poisson tail is longer than a normal one
    return np.arange(max(0, math.floor(n * p - half)), min(n, math.ceil(n * p + half)) + 1)


def _cells(n: int, psi: float, drop: float) -> float:
    sides = [_SIGMAS * math.sqrt(n * max((psi + sign * drop) / 2, 0.0)) + 12 for sign in (1, -1)]
    return 4 * sides[0] * sides[1]


def _normal_chances(n: int, psi: float, drop: float, limit: float) -> Chances:
    from scipy.stats import norm

    sd = math.sqrt(max(psi - drop * drop, 0.0) / n)
    null = math.sqrt(max(max(psi, abs(limit)) - limit * limit, 0.0) / n)
    high, low = limit + Z95 * null, limit - Z95 * null
    if sd == 0:
        return Chances(float(drop <= low), float(low < drop <= high), float(drop > high))
    good, bad = float(norm.cdf((low - drop) / sd)), float(norm.sf((high - drop) / sd))
    return Chances(good, max(0.0, 1 - good - bad), bad)
