"""The decision rule, its chances and its sample sizes, against slow sums and simulated truths."""

from __future__ import annotations

from dataclasses import replace
from math import comb

import numpy as np
import pytest
from scipy.stats import t

from s2d_deploy.paired import mcnemar, paired_drop, studentized_interval, tango_interval
from s2d_deploy.power import (
    PLANNED,
    chances,
    decide,
    needed,
    samples_needed,
    smallest_detectable,
    smallest_detectable_drop,
    verdicts,
)


def outcomes(lost: int, gained: int, n: int, unit: float = 1.0) -> tuple[list[float], list[float]]:
    both = n - lost - gained
    return [unit] * lost + [0.0] * gained + [unit] * both, [0.0] * lost + [unit] * gained + [unit] * both


def slow_verdict(lost: int, gained: int, n: int, limit: float) -> str:
    lo, hi = tango_interval(lost, gained, n)
    if hi <= limit:
        return "pass"
    if lo <= limit or (limit >= 0 and mcnemar(lost, gained) > 0.025):
        return "undecided"
    if limit <= 0:
        return "fail"
    # The correction: half a sample less must still break the limit.
    b = -lost - gained + (2 * n - lost + gained) * limit
    q = (np.sqrt(b * b + 8 * n * gained * limit * (1 - limit)) - b) / (4 * n)
    z = (lost - gained - n * limit - 0.5) / np.sqrt(n * (2 * q + limit * (1 - limit)))
    return "fail" if z > 1.959963984540054 else "undecided"


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.05, -0.02])
def test_the_rule_in_arrays_is_the_rule_by_intervals(limit):
    n = 120
    pairs = [(b, c) for b in range(0, 26, 2) for c in range(0, 14, 2)]
    lost, gained = np.array(pairs).T
    passes, fails = verdicts(lost, gained, n, limit)
    assert not (passes & fails).any()
    seen = set()
    for (b, c), good, bad in zip(pairs, passes, fails, strict=True):
        verdict = "pass" if good else "fail" if bad else "undecided"
        assert verdict == slow_verdict(b, c, n, limit), (b, c)
        assert verdict == decide(paired_drop(*outcomes(b, c, n)), limit)
        assert verdict == decide(paired_drop(*outcomes(b, c, n, 100.0)), 100 * limit)
        seen.add(verdict)
    assert "fail" in seen
    assert "undecided" in seen


def test_few_lost_samples_are_no_proof():
    # Tango's interval of 4 lost and none gained excludes 0; four tosses of a coin do that once in 16.
    drop = paired_drop(*outcomes(4, 0, 100))
    assert drop.lo > 0
    assert decide(drop, 0.0) == "undecided"
    assert decide(paired_drop(*outcomes(6, 0, 100)), 0.0) == "fail"


def test_chances_against_the_sum_over_every_outcome():
    n, psi, drop, limit = 40, 0.2, 0.05, 0.02
    p, q = (psi + drop) / 2, (psi - drop) / 2
    total = {"pass": 0.0, "fail": 0.0, "undecided": 0.0}
    for b in range(n + 1):
        for c in range(n + 1 - b):
            weight = comb(n, b) * comb(n - b, c) * p**b * q**c * (1 - p - q) ** (n - b - c)
            if weight > 1e-9:
                total[slow_verdict(b, c, n, limit)] += weight
    found = chances(n, psi, drop, limit)
    assert (found.passes, found.undecided, found.fails) == pytest.approx(
        (total["pass"], total["undecided"], total["fail"]), abs=1e-6
    )


def test_no_setting_has_more_than_five_percent_false_alarms():
    worst = 0.0
    for n in (20, 60, 200, 250, 500, 1000, 2000):
        for limit in (0.0, 0.005, 0.01, 0.02, 0.05):
            for psi in (0.003, 0.01, 0.02, 0.05, 0.15):
                found = chances(n, psi, limit, limit)
                worst = max(worst, found.fails, found.passes)
    assert 0.02 < worst < 0.04


def test_the_stated_drop_fails_and_the_stated_number_passes():
    for n, psi, limit in ((100, 0.02, 0.0), (597, 0.002, 0.01), (1000, 0.05, 0.02)):
        least = smallest_detectable_drop(n, psi, limit)
        assert least is not None
        assert least > limit
        assert chances(n, psi, least, limit).fails >= PLANNED > chances(n, psi, 0.97 * least, limit).fails
        enough = samples_needed(limit or 0.01, psi)
        assert enough is not None
        assert chances(enough, psi, 0.0, limit or 0.01).passes >= PLANNED
        assert chances(int(enough * 0.9), psi, 0.0, limit or 0.01).passes < 0.9


def test_many_samples_are_a_normal_matter():
    exact, normal = chances(15_000, 0.02, 0.003, 0.0), chances(150_000, 0.2, 0.003, 0.0)
    assert exact.fails == pytest.approx(0.73, abs=0.05)
    assert normal.fails == pytest.approx(0.74, abs=0.05)
    assert samples_needed(1e-9, 0.5) is None
    assert samples_needed(0.0, 0.5) is None
    assert smallest_detectable_drop(5, 0.5) is None


def test_graded_samples():
    random = np.random.default_rng(2)
    first = random.uniform(0.5, 1.0, 200)
    second = first - 0.02 - random.normal(0, 0.05, 200)
    drop = paired_drop(first.tolist(), second.tolist())
    assert [decide(drop, limit) for limit in (0.0, drop.drop, 0.05)] == ["fail", "undecided", "pass"]
    drop = replace(drop, skew=0.0, kurtosis=3.0)
    found = (smallest_detectable(drop, 0.01) - 0.01) * np.sqrt(200) / drop.sd  # in standard errors
    assert found == pytest.approx(t.ppf(0.975, 199) + t.ppf(PLANNED, 199))
    enough = needed(drop, 0.01)
    assert enough == int(np.ceil(((t.ppf(0.975, enough - 1) + t.ppf(PLANNED, enough - 1)) * drop.sd / 0.01) ** 2))
    # With two samples the interval is six times as wide.
    assert 3 <= needed(drop, 3 * drop.sd) <= 6
    # A long tail of losses asks for more samples to pass, a long tail of gains for a larger drop to fail.
    lossy, lucky = (replace(drop, skew=skew, kurtosis=20.0) for skew in (3.0, -3.0))
    assert needed(lossy, 0.01) > needed(lucky, 0.01) > enough
    assert smallest_detectable(lucky, 0.01) > smallest_detectable(lossy, 0.01) > smallest_detectable(drop, 0.01)
    assert needed(drop, 0.0) is None
    assert decide(paired_drop([0.5], [0.5]), 1.0) == "undecided"
    assert smallest_detectable(paired_drop([0.5], [0.5])) is None


def test_units_are_kept():
    share, points = (paired_drop(*outcomes(12, 4, 1000, unit)) for unit in (1.0, 100.0))
    assert smallest_detectable(points, 0.5) == pytest.approx(100 * smallest_detectable(share, 0.005))
    assert needed(points, 0.5) == needed(share, 0.005)


# --- simulated truths (benchmarks/gate_power.py has more settings and trials) ---------------------------------


@pytest.mark.parametrize(("n", "psi", "limit"), [(300, 0.03, 0.0), (1000, 0.02, 0.005)])
def test_error_rates_of_right_and_wrong_samples(n, psi, limit):
    least = smallest_detectable_drop(n, psi, limit)
    assert least is not None
    random = np.random.default_rng(11)
    rates = {}
    for name, drop in (("harmless", limit), ("harmful", least)):
        share = max(psi, drop)
        counts = random.multinomial(n, [(share + drop) / 2, (share - drop) / 2, 1 - share], size=2000)
        passes, fails = verdicts(counts[:, 0], counts[:, 1], n, limit)
        rates[name] = (float(passes.mean()), float(fails.mean()))
    assert rates["harmless"][1] <= 0.05
    assert rates["harmless"][0] <= 0.05
    assert rates["harmful"][1] >= 0.8


@pytest.mark.parametrize("n", [100, 400])
def test_error_rates_of_graded_samples(n):
    trials, random = 2000, np.random.default_rng(12)
    losses = random.normal(0.01, 0.02, (n, trials)) + (random.random((n, trials)) < 0.2) * random.exponential(
        0.05, (n, trials)
    )
    truth = 0.01 + 0.2 * 0.05
    lo, hi = studentized_interval(losses)
    margin = 3 * np.sqrt(0.025 * 0.975 / trials)
    assert np.mean(lo > truth) <= 0.025 + margin
    assert np.mean(hi < truth) <= 0.05
    sd = np.sqrt(0.02**2 + 0.2 * 2 * 0.05**2 - (0.2 * 0.05) ** 2)
    # So that the truth is the smallest detectable drop.
    limit = truth - (t.ppf(0.975, n - 1) + t.ppf(PLANNED, n - 1)) * sd / np.sqrt(n)
    assert np.mean(lo > limit) >= 0.8
