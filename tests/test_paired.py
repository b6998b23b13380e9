"""Paired statistics against slow references and simulated truths."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis, skew

from s2d_deploy.paired import mcnemar, paired_drop, studentized_interval, tango_interval


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30))
def test_mcnemar_against_the_definition(lost, gained):
    n = lost + gained
    tail = sum(comb(n, k) for k in range(lost, n + 1)) / 2**n
    assert mcnemar(lost, gained) == pytest.approx(tail)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 200))
def test_the_interval_contains_the_estimate_and_mirrors(lost, gained, rest):
    n = lost + gained + rest
    lo, hi = tango_interval(lost, gained, n)
    assert -1 <= lo <= (lost - gained) / n <= hi <= 1
    assert lo < hi
    mirrored = tango_interval(gained, lost, n)
    assert (-mirrored[1], -mirrored[0]) == pytest.approx((lo, hi), abs=1e-8)


def test_known_values():
    # No discordant pair: the score equation has the closed form z^2 / (n + z^2).
    z2 = 1.959963984540054**2
    assert tango_interval(0, 0, 100) == pytest.approx((-z2 / (100 + z2), z2 / (100 + z2)), abs=1e-8)
    # Many samples: Wald's interval.
    lost, gained, n = 5000, 4000, 100_000
    drop = (lost - gained) / n
    half = 1.96 * np.sqrt(lost + gained - (lost - gained) ** 2 / n) / n
    assert tango_interval(lost, gained, n) == pytest.approx((drop - half, drop + half), abs=2e-5)


@pytest.mark.parametrize(("lost", "gained", "n"), [(0.02, 0.01, 360), (0.10, 0.02, 60), (0.005, 0.0, 360)])
def test_coverage_and_false_alarms_on_simulated_truths(lost, gained, n):
    random = np.random.default_rng(3)
    counts = random.multinomial(n, [lost, gained, 1 - lost - gained], size=400)
    cache = {(b, c): tango_interval(b, c, n) for b, c, _ in {tuple(row) for row in counts.tolist()}}
    covered = [cache[b, c][0] <= lost - gained <= cache[b, c][1] for b, c, _ in counts.tolist()]
    # Nominal 0.95; 400 trials have a standard error of 0.011, discreteness adds its own.
    assert np.mean(covered) >= 0.92
    null = random.multinomial(n, [0.03, 0.03, 0.94], size=2000)
    alarms = {pair: mcnemar(*pair) <= 0.05 for pair in {(b, c) for b, c, _ in null.tolist()}}
    assert np.mean([alarms[b, c] for b, c, _ in null.tolist()]) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 2000)


def test_paired_drop_of_right_and_wrong():
    first = [1, 1, 1, 0, 1, 0, 1, 1]
    second = [1, 0, 0, 1, 1, 0, 1, 0]
    result = paired_drop(first, second)
    assert (result.n, result.lost, result.gained, result.drop) == (8, 3, 1, 0.25)
    assert result.p_value == pytest.approx(5 / 16)
    assert paired_drop([True, False], [True, True]).gained == 1


def test_paired_drop_of_graded_samples():
    random = np.random.default_rng(0)
    first = random.uniform(0.8, 1.0, 300)
    second = first - 0.02 + random.normal(0, 0.01, 300)
    result = paired_drop(first.tolist(), second.tolist())
    assert result == paired_drop(first.tolist(), second.tolist())
    assert result.lo < result.drop < result.hi
    assert result.lo < 0.02 < result.hi
    assert result.hi - result.lo < 0.004  # unpaired it would be 0.013
    assert result.p_value is None
    assert (result.sd, result.unit) == (pytest.approx(float((first - second).std(ddof=1))), 1.0)
    many = np.tile(first, 20)
    wide = paired_drop(many.tolist(), (many - 0.02).tolist())
    assert (wide.lo, wide.hi) == pytest.approx((0.02, 0.02))
    assert wide.method == "paired normal interval"


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [([1], [1, 0], "shapes"), ([], [], "shapes"), ([1.0], [float("nan")], "not finite"), ([1e300], [0.0], "overflow")],
)
def test_what_cannot_be_paired(first, second, words):
    with pytest.raises(ValueError, match=words):
        paired_drop(first, second)


def test_the_studentized_interval_against_its_definition():
    difference = np.random.default_rng(4).gamma(0.5, 1.0, 25)
    n, mean = len(difference), difference.mean()
    draws = np.random.default_rng(0).integers(0, n, size=(2000, n))
    ratios = []
    for row in difference[draws]:
        spread = np.sqrt(row.var() / (n - 1))
        ratios.append((row.mean() - mean) / spread)
    low, high = np.sort(ratios)[[round(0.025 * 1999), round(0.975 * 1999)]]
    error = difference.std(ddof=1) / np.sqrt(n)
    lo, hi = studentized_interval(difference[:, None])
    assert (float(lo[0]), float(hi[0])) == pytest.approx((mean - high * error, mean - low * error), rel=1e-9)
    # Skewed to the right: the upper end is farther away.
    assert hi[0] - mean > 1.3 * (mean - lo[0])


def test_intervals_of_odd_samples_stay_finite():
    same = paired_drop([0.5] * 7, [0.25] * 7)
    assert (same.lo, same.drop, same.hi, same.sd) == (0.25, 0.25, 0.25, 0.0)
    one = paired_drop([0.5], [0.4])
    assert one.lo == one.hi == pytest.approx(0.1)
    # One sample in twenty lost: many resamples hold none, so nothing is known beyond what was seen.
    rare = paired_drop([0.9] * 20, [0.9] * 19 + [0.4])
    assert -1e-9 <= rare.lo < rare.drop < rare.hi == pytest.approx(0.5)


def test_the_shape_of_the_differences():
    x = np.random.default_rng(6).gamma(0.5, 1.0, 300)
    found, zero = paired_drop(x.tolist(), np.zeros(300).tolist()), paired_drop([0.5, 0.25], [0.5, 0.25])
    assert (found.skew, found.kurtosis) == pytest.approx((skew(x), kurtosis(x, fisher=False)))
    assert (zero.skew, zero.kurtosis) == (0.0, 3.0)
    assert paired_drop((x * 1e90).tolist(), np.zeros(300).tolist()).skew == pytest.approx(found.skew)


def test_columns_share_their_draws():
    columns = np.random.default_rng(1).normal(size=(60, 3))
    together = studentized_interval(columns)
    alone = [studentized_interval(columns[:, [i]]) for i in range(3)]
    assert np.allclose(together, np.concatenate(alone, axis=1), rtol=0, atol=1e-12)
