"""Latency of competitors, measured so that their ratio stands up even where the machine drifts.

All candidates run in one process, one call each in every round, in an order shuffled per round: what
the machine does to one it does to the others, and ratios are paired by round. Timing starts once the
running medians have settled. Garbage collection is off while the clock runs. Every sample is kept;
outliers are flagged by the median absolute deviation, never removed. What this cannot see: work that a
candidate leaves to another thread or device after it returned. A candidate must return when it is done.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from s2d_deploy.errors import message

Clock = Callable[[], int]

_NS_PER_MS = 1e6
# The standard deviation of a normal distribution is 1.4826 times its MAD.
_MAD_TO_SIGMA = 1.4826
# Iglewicz and Hoaglin 1993, "How to detect and handle outliers": |modified z-score| > 3.5.
_OUTLIER_SIGMAS = 3.5
_MAX_SPREAD = 0.10
_MAX_DRIFT = 0.05
_SETTLED = 0.05
_WARMUP_SHARE = 0.25
_WARMUP_ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Ratio:
    """The ratio of two latencies, with a 95 % confidence interval.

    Attributes:
        median: median of the ratios of the rounds.
        lo: lower end.
        hi: upper end.
    """

    median: float
    lo: float
    hi: float

    def to_dict(self) -> dict[str, float]:
        """A JSON document."""
        return {"median": self.median, "lo": self.lo, "hi": self.hi}


@dataclass(frozen=True, slots=True)
class LatencyStats:
    """All samples of one candidate.

    Attributes:
        name: the candidate.
        samples_ns: one for each round, in order; integers as the clock gave them.
        warmup_ns: the samples before, in order.
        settled: whether the warm-up's running median settled within its bounds.
        min_samples: how many samples a verdict needs.
        run: which call of `measure` this comes from; rounds can be paired within one call only.
    """

    name: str
    samples_ns: tuple[int, ...]
    warmup_ns: tuple[int, ...] = ()
    settled: bool = True
    min_samples: int = 30
    run: object = None

    def quantile_ms(self, q: float) -> float:
        """The `q` quantile (0 to 1) in milliseconds, interpolated linearly between order statistics."""
        return float(np.quantile(np.asarray(self.samples_ns, dtype=np.float64), q)) / _NS_PER_MS

    @property
    def samples_ms(self) -> list[float]:
        """All samples in milliseconds, in order."""
        return [ns / _NS_PER_MS for ns in self.samples_ns]

    @property
    def p50_ms(self) -> float:
        """Median."""
        return self.quantile_ms(0.5)

    @property
    def p90_ms(self) -> float:
        """90th percentile."""
        return self.quantile_ms(0.9)

    @property
    def p99_ms(self) -> float:
        """99th percentile. With fewer than 100 samples it leans on the largest one."""
        return self.quantile_ms(0.99)

    @property
    def min_ms(self) -> float:
        """The fastest sample."""
        return min(self.samples_ns) / _NS_PER_MS

    @property
    def max_ms(self) -> float:
        """The slowest sample."""
        return max(self.samples_ns) / _NS_PER_MS

    @property
    def spread(self) -> float:
        """Relative spread: 1.4826 MAD / median. 0 where the median is 0."""
        x = np.asarray(self.samples_ns, dtype=np.float64)
        median = float(np.median(x))
        return _MAD_TO_SIGMA * float(np.median(np.abs(x - median))) / median if median else 0.0

    @property
    def drift(self) -> float:
        """Relative change of the median from the first half of the samples to the second."""
        x = np.asarray(self.samples_ns, dtype=np.float64)
        half = len(x) // 2
        if not half:
            return 0.0
        first, second = float(np.median(x[:half])), float(np.median(x[half:]))
        return second / first - 1 if first else 0.0

    @property
    def outliers(self) -> tuple[int, ...]:
        """Indices of the samples further than 3.5 robust standard deviations from the median."""
        x = np.asarray(self.samples_ns, dtype=np.float64)
        distance = np.abs(x - np.median(x))
        sigma = _MAD_TO_SIGMA * float(np.median(distance))
        # Where more than half of the samples are equal sigma is 0, and any other sample would be flagged: the
        # spread must then reach a thousandth of the median, which is finer than any clock that we read.
        bound = max(_OUTLIER_SIGMAS * sigma, 1e-3 * float(np.median(x)))
        return tuple(int(i) for i in np.flatnonzero(distance > bound))

    def _reasons(self) -> list[str]:
        reasons = []
        if len(self.samples_ns) < self.min_samples:
            reasons.append(f"{len(self.samples_ns)} samples, fewer than {self.min_samples}")
        if self.spread > _MAX_SPREAD:
            reasons.append(f"spread (1.4826 MAD / median) {self.spread:.1%} exceeds {_MAX_SPREAD:.0%}")
        if abs(self.drift) > _MAX_DRIFT:
            reasons.append(f"the median drifted by {self.drift:+.1%} between the halves (limit {_MAX_DRIFT:.0%})")
        return reasons

    @property
    def stable(self) -> bool:
        """Whether there are enough samples, their spread is at most 10 %, and their median drifts by at most 5 %."""
        return not self._reasons()

    @property
    def note(self) -> str:
        """Why not stable, and what else a reader should know; "" where there is nothing to say."""
        notes = self._reasons()
        if not self.settled:
            notes.append(f"the warm-up of {len(self.warmup_ns)} rounds did not settle")
        if self.outliers:
            notes.append(f"{len(self.outliers)} of {len(self.samples_ns)} samples are outliers (kept)")
        return "; ".join(notes)

    def to_dict(self, **facts: Any) -> dict[str, Any]:
        """The report's ``latency_ms``: milliseconds; `facts` (``threads=2, batch=1``) are added as they are."""
        return {
            "p50": self.p50_ms,
            "p90": self.p90_ms,
            "p99": self.p99_ms,
            "min": self.min_ms,
            "max": self.max_ms,
            "samples": self.samples_ms,
            "warmup": len(self.warmup_ns),
            **facts,
            "stable": self.stable,
            "note": self.note,
            "outliers": list(self.outliers),
        }


class DeviceClock:
    """For candidates that a device times itself: goes on by what the device says, and stands while data travel."""

    def __init__(self) -> None:
        self._now_ns = 0

    def __call__(self) -> int:
        """Nanoseconds that the device has run so far."""
        return self._now_ns

    def candidate(self, timer: Callable[[], int]) -> Callable[[], None]:
        """A candidate for `measure`, which must be given this clock; `timer` runs once and returns nanoseconds."""

        def call() -> None:
            self._now_ns += timer()

        return call


def measure(
    candidates: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    min_samples: int = 30,
    min_seconds: float,
    max_seconds: float,
    clock: Clock = time.perf_counter_ns,
    pause: Callable[[], object] | None = None,
    progress: Callable[[str], None] | None = None,
    seed: int = 0,
) -> dict[str, LatencyStats]:
    """Time each candidate, interleaved round by round, until there are enough samples.

    Warm-up: at least `warmup` rounds, and on until each candidate's median over the last `warmup` rounds
    is within 5 % of that over the `warmup` rounds before; at most 20 times `warmup` rounds or a quarter
    of `max_seconds`. With ``warmup=0`` there is none.

    Timing: rounds go on until there are `min_samples` of them and they took `min_seconds`; at
    `max_seconds` (warm-up included, all candidates together) they end in any case, after one round at least.

    Args:
        candidates: name -> call. A call must return only when its result is there.
        clock: nanoseconds, monotonic.
        pause: called before each call, outside its sample, e.g. to wait until the worker threads of the candidate
            before have stopped spinning for more work.
        progress: told after every round in a few words.
        seed: of the order of candidates within the rounds.

    Raises:
        ValueError: no candidate, or bounds that contradict each other.
        Whatever a candidate raises.
    """
    if not candidates:
        raise ValueError(message("nothing to measure", expected="at least one candidate"))
    if warmup < 0 or min_samples < 1 or not 0 <= min_seconds <= max_seconds:
        raise ValueError(
            message(
                "the bounds of the measurement contradict each other",
                expected="warmup >= 0, min_samples >= 1, 0 <= min_seconds <= max_seconds",
                found=f"{warmup}, {min_samples}, {min_seconds}, {max_seconds}",
            )
        )
    order = list(candidates)
    shuffle = random.Random(seed).shuffle  # noqa: S311  an order of calls, no secret
    warm: dict[str, list[int]] = {name: [] for name in order}
    timed: dict[str, list[int]] = {name: [] for name in order}
    start = now = clock()

    def one_round(into: dict[str, list[int]]) -> int:
        shuffle(order)
        end = 0
        for name in order:
            call = candidates[name]
            if pause is not None:
                pause()
            begin = clock()
            call()
            end = clock()
            into[name].append(end - begin)
        return end

    settled = dict.fromkeys(order, False)
    with _no_garbage_collection():
        while warmup:
            now = one_round(warm)
            done = len(warm[order[0]])
            if progress:
                progress(f"warm-up: round {done}")
            settled = {name: _is_settled(samples, warmup) for name, samples in warm.items()}
            enough = done >= warmup and all(settled.values())
            if enough or done >= _WARMUP_ROUNDS * warmup or now - start >= _WARMUP_SHARE * max_seconds * 1e9:
                break
        begin_timed = now
        while True:
            now = one_round(timed)
            done = len(timed[order[0]])
            if progress:
                progress(f"timing: round {done} of at least {min_samples}")
            if done >= min_samples and now - begin_timed >= min_seconds * 1e9:
                break
            if now - start >= max_seconds * 1e9:
                break
    run = object()
    return {
        name: LatencyStats(name, tuple(timed[name]), tuple(warm[name]), not warmup or settled[name], min_samples, run)
        for name in candidates
    }


def ratio(a: LatencyStats, b: LatencyStats, *, resamples: int = 2000, seed: int = 0) -> Ratio:
    """How many times as long `a` takes as `b`: the median over rounds, with a 95 % interval.

    The interval is the percentile interval of a circular block bootstrap over rounds (Politis and Romano
    1992, "A circular block-resampling procedure for stationary data"), block length ``ceil(n ** (1/3))``:
    neighbouring rounds share the machine's state, so they are drawn together. It says how sure the median
    of *this run* is; it does not cover another machine or another day.

    Raises:
        ValueError: `a` and `b` are not from one call of `measure`, or a sample of `b` is 0 ns.
    """
    if a.run is None or a.run is not b.run:
        raise ValueError(
            message(
                f"{a.name!r} and {b.name!r} were not measured in the same rounds",
                fix="pass both to one call of measure(...)",
            )
        )
    if min(b.samples_ns) <= 0:
        raise ValueError(message(f"{b.name!r} has a sample of 0 ns", fix="time a longer call, or use a finer clock"))
    ratios = np.asarray(a.samples_ns, dtype=np.float64) / np.asarray(b.samples_ns, dtype=np.float64)
    lo, hi = np.quantile(_bootstrap_medians(ratios, resamples, seed), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(lo), float(hi))


def _bootstrap_medians(x: npt.NDArray[np.float64], resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """Medians of `resamples` samples made of runs of consecutive elements of `x`, wrapped around its end."""
    n = len(x)
    length = int(np.ceil(n ** (1 / 3)))
    starts = np.random.default_rng(seed).integers(0, n, size=(resamples, -(-n // length), 1))
    medians = np.empty(resamples)
    step = max(1, 2_000_000 // n)  # so many resamples at once that memory stays below 100 MB
    for i in range(0, resamples, step):
        indices = (starts[i : i + step] + np.arange(length)) % n
        medians[i : i + step] = np.median(x[indices.reshape(len(indices), -1)[:, :n]], axis=1)
    return medians


def _is_settled(samples: Sequence[int], window: int) -> bool:
    if len(samples) < 2 * window:
        return False
    last, before = float(np.median(samples[-window:])), float(np.median(samples[-2 * window : -window]))
    return abs(last - before) <= _SETTLED * before


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Collect now, then not until the end: a collection inside a sample would be counted as latency."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
