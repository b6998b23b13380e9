"""Timing logic under a scripted clock: nothing here measures time."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.latency import DeviceClock, LatencyStats, Ratio, measure, ratio

MS = 1_000_000


class Machine:
    """A clock that only candidates move: each call of candidate `name` takes the next scripted time."""

    def __init__(self, **scripts: Callable[[int], int]) -> None:
        self.now = 0
        self.scripts = scripts
        self.count = dict.fromkeys(scripts, 0)
        self.trace: list[str] = []
        self.gc_seen: set[bool] = set()

    def clock(self) -> int:
        return self.now

    def candidates(self) -> dict[str, Callable[[], object]]:
        def make(name: str) -> Callable[[], object]:
            def call() -> None:
                self.now += self.scripts[name](self.count[name])
                self.count[name] += 1
                self.trace.append(name)
                self.gc_seen.add(gc.isenabled())

            return call

        return {name: make(name) for name in self.scripts}

    def measure(self, **options) -> dict[str, LatencyStats]:
        options = {"warmup": 3, "min_samples": 30, "min_seconds": 0.0, "max_seconds": 60.0, **options}
        return measure(self.candidates(), clock=self.clock, **options)


def constant(ms: float) -> Callable[[int], int]:
    return lambda _: int(ms * MS)


def test_percentiles_are_linear_interpolations():
    stats = LatencyStats("x", tuple(i * MS for i in (5, 1, 4, 2, 3)), min_samples=1)
    assert (stats.p50_ms, stats.min_ms, stats.max_ms) == (3.0, 1.0, 5.0)
    assert stats.p90_ms == pytest.approx(4.6)  # position 0.9 * 4 = 3.6, between the 4th and 5th
    assert stats.p99_ms == pytest.approx(4.96)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 10**10), min_size=1, max_size=50))
def test_percentiles_against_a_slow_reference(samples):
    stats = LatencyStats("x", tuple(samples))

    def slow(q: float) -> float:
        ordered = sorted(samples)
        position = q * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return (ordered[below] + (position - below) * (ordered[above] - ordered[below])) / MS

    assert stats.p50_ms == pytest.approx(slow(0.5))
    assert stats.p90_ms == pytest.approx(slow(0.9))
    assert stats.p99_ms == pytest.approx(slow(0.99))
    assert stats.min_ms <= stats.p50_ms <= stats.p90_ms <= stats.p99_ms <= stats.max_ms
    assert stats.samples_ms == [ns / MS for ns in samples]  # all, in order


def test_candidates_are_interleaved_and_shuffled_by_seed():
    traces = []
    for seed in (0, 0, 1):
        machine = Machine(a=constant(1), b=constant(2), c=constant(3))
        machine.measure(seed=seed)
        rounds = [machine.trace[i : i + 3] for i in range(0, len(machine.trace), 3)]
        assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
        assert len({tuple(r) for r in rounds}) > 2
        traces.append(machine.trace)
    assert traces[0] == traces[1] != traces[2]


def test_steady_times_are_stable_and_reported_with_the_reports_keys():
    machine = Machine(a=constant(2), b=constant(4))
    stats = machine.measure()
    assert list(stats) == ["a", "b"]
    document = stats["a"].to_dict(threads=2, batch=1)
    assert document == {
        "p50": 2.0,
        "p90": 2.0,
        "p99": 2.0,
        "min": 2.0,
        "max": 2.0,
        "samples": [2.0] * 30,
        "warmup": 6,
        "threads": 2,
        "batch": 1,
        "stable": True,
        "note": "",
        "outliers": [],
    }
    assert json.loads(json.dumps(document)) == document


def test_warm_up_goes_on_until_the_median_settles():
    # 100 ms falling by 10 ms a round to 20 ms: windows of 3 agree first when both lie on the floor.
    machine = Machine(a=lambda i: max(100 - 10 * i, 20) * MS)
    stats = machine.measure()["a"]
    assert stats.settled
    assert set(stats.samples_ns) == {20 * MS}
    assert stats.stable
    assert len(stats.warmup_ns) == 13  # rounds 8, 9, 10 and 10, 11, 12: the earlier window's median is at the floor
    assert stats.warmup_ns[0] == 100 * MS


def test_warm_up_waits_for_the_slowest_to_settle():
    machine = Machine(a=constant(1), b=lambda i: (100 - i % 19 * 5 if i < 20 else 10) * MS)
    stats = machine.measure()
    assert set(stats["b"].samples_ns) == {10 * MS}
    assert len(stats["a"].warmup_ns) == len(stats["b"].warmup_ns) == 24


def test_warm_up_is_bounded_and_says_so():
    long = Machine(a=lambda i: int(MS * 1.2**i)).measure(warmup=2, max_seconds=1e6)["a"]
    assert len(long.warmup_ns) == 40
    assert "the warm-up of 40 rounds did not settle" in long.note
    rising = Machine(a=lambda i: int(MS * 1.2**i)).measure(warmup=2, max_seconds=10.0)["a"]
    assert not rising.settled
    assert "did not settle" in rising.note
    assert not rising.stable
    assert sum(rising.warmup_ns) < 0.25 * 10e9 + max(rising.warmup_ns)


def test_no_warm_up_when_none_is_asked():
    stats = Machine(a=constant(1)).measure(warmup=0)["a"]
    assert stats.warmup_ns == ()
    assert stats.to_dict()["warmup"] == 0
    assert stats.note == ""


def test_timing_lasts_min_seconds():
    stats = Machine(a=constant(1), b=constant(3)).measure(min_seconds=1.0)
    assert len(stats["a"].samples_ns) == len(stats["b"].samples_ns) == 250  # rounds of 4 ms


def test_timing_ends_at_max_seconds_and_is_then_unstable():
    stats = Machine(a=constant(1000)).measure(max_seconds=20.0)["a"]
    assert len(stats.warmup_ns) == 5
    assert len(stats.samples_ns) == 15
    assert not stats.stable
    assert stats.note == "15 samples, fewer than 30; the warm-up of 5 rounds did not settle"


def test_a_call_longer_than_the_limit_still_gives_one_sample():
    stats = Machine(a=constant(100_000)).measure(max_seconds=1.0)["a"]
    assert len(stats.samples_ns) == 1
    assert stats.p50_ms == stats.p99_ms == 100_000
    assert not stats.stable


def test_spread_and_drift_are_named():
    wide = LatencyStats("x", tuple((10 + i % 5 * 2) * MS for i in range(50)))
    assert not wide.stable
    assert wide.spread == pytest.approx(1.4826 * 2 / 14)
    assert "spread (1.4826 MAD / median) 21.2% exceeds 10%" in wide.note
    assert "drifted" not in wide.note
    step = LatencyStats("x", tuple([100 * MS] * 25 + [110 * MS] * 25))
    assert not step.stable
    assert step.drift == pytest.approx(0.1)
    assert "the median drifted by +10.0% between the halves (limit 5%)" in step.note


def test_outliers_are_flagged_and_kept():
    times = [100 + i % 3 for i in range(40)]
    times[7] = 500
    stats = LatencyStats("x", tuple(t * MS for t in times))
    assert stats.outliers == (7,)
    assert len(stats.samples_ns) == 40
    assert stats.max_ms == 500
    assert stats.stable
    assert stats.note == "1 of 40 samples are outliers (kept)"
    flat = LatencyStats("x", tuple([100 * MS] * 39 + [100 * MS + 50]))  # 50 ns off: no outlier although MAD is 0
    assert flat.outliers == ()


def test_garbage_collection_is_off_while_timing_and_back_after():
    assert gc.isenabled()
    machine = Machine(a=constant(1))
    machine.measure()
    assert machine.gc_seen == {False}
    assert gc.isenabled()

    def broken() -> None:
        raise RuntimeError("kernel failed")

    with pytest.raises(RuntimeError, match="kernel failed"):
        measure({"a": broken}, warmup=1, min_seconds=0, max_seconds=1)
    assert gc.isenabled()
    gc.disable()
    try:
        Machine(a=constant(1)).measure()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_progress_hears_every_round():
    said: list[str] = []
    Machine(a=constant(1)).measure(progress=said.append)
    assert said[0] == "warm-up: round 1"
    assert said[-1] == "timing: round 30 of at least 30"
    assert len(said) == 36


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"warmup": -1}, "contradict each other"),
        ({"min_samples": 0}, "contradict each other"),
        ({"min_seconds": 5.0, "max_seconds": 1.0}, "Found: 3, 30, 5.0, 1.0"),
    ],
)
def test_impossible_bounds(options, words):
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        Machine(a=constant(1)).measure(**options)
    with pytest.raises(ValueError, match="nothing to measure"):
        measure({}, warmup=0, min_seconds=0, max_seconds=1)


def test_ratio_of_constants_is_exact():
    stats = Machine(a=constant(3), b=constant(2)).measure()
    assert ratio(stats["a"], stats["b"]) == Ratio(1.5, 1.5, 1.5)
    assert ratio(stats["a"], stats["b"]).to_dict() == {"median": 1.5, "lo": 1.5, "hi": 1.5}


def test_ratio_is_paired_by_round():
    # The machine slows down by 10 % a round, and both feel it: each alone is unstable, the ratio is exact.
    stats = Machine(a=lambda i: 3 * 1000 * 11**i // 10**i, b=lambda i: 2 * 1000 * 11**i // 10**i).measure(warmup=0)
    assert not stats["a"].stable
    assert not stats["b"].stable
    result = ratio(stats["a"], stats["b"])
    assert result.median == pytest.approx(1.5, rel=1e-3)
    assert result.hi - result.lo < 1e-2


def test_ratio_is_deterministic_and_ordered():
    random = np.random.default_rng(0)
    times: dict[str, Iterator[int]] = {n: iter(random.integers(900, 1100, 10_000).tolist()) for n in "ab"}
    stats = Machine(a=lambda _: next(times["a"]), b=lambda _: next(times["b"])).measure()
    first = ratio(stats["a"], stats["b"])
    assert first == ratio(stats["a"], stats["b"])
    assert first.lo < first.median < first.hi


def test_the_interval_covers_the_truth():
    # 300 runs of 40 noisy rounds whose true median ratio is 1.25; autocorrelated noise is shared, the rest is not.
    random = np.random.default_rng(1)
    covered = 0
    for trial in range(300):
        shared = np.exp(np.cumsum(random.normal(0, 0.02, 40)))
        a = 1.25e6 * shared * np.exp(random.normal(0, 0.05, 40))
        b = 1.00e6 * shared * np.exp(random.normal(0, 0.05, 40))
        run = object()
        result = ratio(
            LatencyStats("a", tuple(a.astype(int).tolist()), run=run),
            LatencyStats("b", tuple(b.astype(int).tolist()), run=run),
            resamples=500,
            seed=trial,
        )
        covered += result.lo <= 1.25 <= result.hi
    # Nominal 0.95; the percentile interval of a median of 40 falls a little short, and 300 trials add +-0.025.
    assert 0.88 <= covered / 300 <= 0.995


def test_ratio_needs_one_run():
    one, two = (Machine(a=constant(1), b=constant(2)).measure() for _ in range(2))
    with pytest.raises(ValueError, match="were not measured in the same rounds"):
        ratio(one["a"], two["b"])
    zero = Machine(a=constant(1), b=constant(0)).measure()
    with pytest.raises(ValueError, match="'b' has a sample of 0 ns"):
        ratio(zero["a"], zero["b"])


def test_a_devices_own_time_is_what_counts():
    clock, spent = DeviceClock(), iter(range(1, 100))
    stats = measure(
        {"a": clock.candidate(lambda: next(spent))}, warmup=0, min_samples=5, min_seconds=0, max_seconds=1, clock=clock
    )
    assert stats["a"].samples_ns == (1, 2, 3, 4, 5)
    assert clock() == 15
