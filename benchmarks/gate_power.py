"""Figures: how often the accuracy gate errs where the truth is known: false alarms, false passes, misses.

    python benchmarks/gate_power.py

Models are simulated: right/wrong samples by their true shares of lost and gained samples, graded samples by differences
from three distributions (normal; skewed, a gamma; sparse, where one sample in five loses an exponential amount). Each
setting is judged by the gate's own rule (`s2d_deploy/power.py`), in as many runs as `--trials` says, at three truths:

    at the limit       fail is a false alarm, pass a false pass: at most 5 % of runs each
    at the stated drop  `smallest_detectable_drop`: whatever is not fail is a miss: at most 20 %
    no drop at all      with `samples_needed`: whatever is not pass is a miss: at most 20 %

A gate knows neither the share of samples that differ nor their spread; it states the drop from what it saw. How far
that statement lies from the one made with the truth is reported, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import _common
from _common import Figure, Record, at_most, positive, table

SIZES = (100, 300, 1000, 3000)
SHARES = (0.01, 0.05, 0.15)
LIMITS = (0.0, 0.01, 0.03)
GRADED_SIZES = (50, 200, 1000)
# Skewness and kurtosis of each; the sparse one's raw moments are 0.2, 0.4, 1.2 and 4.8.
MOMENTS = {
    "normal": (0.0, 3.0),
    "skewed": (2 / 0.5**0.5, 3 + 6 / 0.5),
    "sparse": (
        (1.2 - 3 * 0.2 * 0.4 + 2 * 0.2**3) / 0.36**1.5,
        (4.8 - 4 * 0.2 * 1.2 + 6 * 0.04 * 0.4 - 3 * 0.2**4) / 0.36**2,
    ),
}
LEVEL, MISSED = 0.05, 0.20


def right_wrong(trials: int, seed: int) -> list[dict[str, Any]]:
    """One row for each setting of right/wrong samples."""
    import numpy as np

    from s2d_deploy.power import chances, samples_needed, smallest_detectable_drop, verdicts

    random = np.random.default_rng(seed)

    def rates(n: int, share: float, drop: float, limit: float) -> tuple[float, float]:
        share = max(share, drop)
        counts = random.multinomial(n, [(share + drop) / 2, (share - drop) / 2, 1 - share], size=trials)
        passes, fails = verdicts(counts[:, 0], counts[:, 1], n, limit)
        return float(passes.mean()), float(fails.mean())

    rows = []
    for n in SIZES:
        for share in SHARES:
            for limit in LIMITS:
                least, enough = smallest_detectable_drop(n, share, limit), samples_needed(limit, share)
                passed, failed = rates(n, share, limit, limit)
                seen = random.binomial(n, share, size=min(trials, 200))
                stated = [smallest_detectable_drop(n, min(1.0, (k + 1) / n), limit) for k in set(seen.tolist())]
                rows.append(
                    {
                        "n": n,
                        "differing": share,
                        "limit": limit,
                        "false_alarms": failed,
                        "false_passes": passed,
                        "false_alarms_exact": chances(n, share, limit, limit).fails,
                        "stated_drop": least,
                        "missed": None if least is None else 1 - rates(n, share, least, limit)[1],
                        "stated_from_what_is_seen": [min(s for s in stated if s), max(s for s in stated if s)],
                        "needed": enough,
                        "not_passed": None if enough is None else 1 - rates(enough, share, 0.0, limit)[0],
                    }
                )
    return rows


def graded(trials: int, seed: int) -> list[dict[str, Any]]:
    """One row for each setting of graded samples; their spread is 1, so drops are in standard deviations."""
    import numpy as np

    from s2d_deploy.paired import PairedDrop, studentized_interval
    from s2d_deploy.power import needed, smallest_detectable

    random = np.random.default_rng(seed)

    def differences(shape: str, n: int) -> Any:
        """``(n, trials)``, mean 0, standard deviation 1."""
        size = (n, trials)
        if shape == "normal":
            return random.normal(size=size)
        if shape == "skewed":
            return (random.gamma(0.5, size=size) - 0.5) / 0.5**0.5
        loses = random.random(size) < 0.2
        return (loses * random.exponential(size=size) - 0.2) / (0.2 * 2 - 0.04) ** 0.5

    rows = []
    for shape in MOMENTS:
        for n in GRADED_SIZES:
            limit = 0.2
            truth = PairedDrop(n, 0.0, 0.0, 0.0, None, None, None, "", 1.0, 1.0, *MOMENTS[shape])
            least, enough = smallest_detectable(truth, limit), needed(truth, limit)
            if least is None or enough is None:
                raise ValueError(f"nothing is stated for {n} samples")
            sample = differences(shape, n)
            lo, hi = studentized_interval(sample)
            spread = sample.std(axis=0, ddof=1)
            _, more = studentized_interval(differences(shape, enough))
            rows.append(
                {
                    "shape": shape,
                    "n": n,
                    "limit": limit,
                    # The interval moves with the mean: the drop is the limit, the stated one, or none.
                    "false_alarms": float((lo + limit > limit).mean()),
                    "false_passes": float((hi + limit <= limit).mean()),
                    "stated_drop": least,
                    "missed": float((lo + least <= limit).mean()),
                    "stated_from_what_is_seen": [
                        limit + (least - limit) * float(np.quantile(spread, q)) for q in (0.05, 0.95)
                    ],
                    "needed": enough,
                    "not_passed": float((more > limit).mean()),
                }
            )
    return rows


def figures(kind: str, rows: Sequence[dict[str, Any]], trials: int) -> list[Figure]:
    """The worst setting of each error."""
    made = []
    for name, key, limit in (
        ("false alarms", "false_alarms", LEVEL),
        ("false passes", "false_passes", LEVEL),
        ("misses at the stated drop", "missed", MISSED),
        ("not passed with the samples needed", "not_passed", MISSED),
    ):
        known = [row for row in rows if row[key] is not None]
        worst = max(known, key=lambda row: row[key])
        where = ", ".join(f"{k} {worst[k]}" for k in ("shape", "n", "differing", "limit") if k in worst)
        note = f"worst of {len(known)} settings, {trials} runs each: {where}"
        made.append(at_most(f"{kind}: {name}, share of runs", worst[key], limit, note))
    return made


def measure(arguments: argparse.Namespace) -> int:
    """Both kinds, their tables, their figures."""
    record = Record("gate-power")
    rows = {"right/wrong": right_wrong(arguments.trials, arguments.seed)}
    rows["graded"] = graded(arguments.trials, arguments.seed + 1)
    for found in rows.values():
        header = [key for key in found[0] if key != "stated_from_what_is_seen"]
        print(table(header, [[_cell(row[key]) for key in header] for row in found]), end="\n\n")
    judged = [figure for kind, found in rows.items() for figure in figures(kind, found, arguments.trials)]
    data = {"trials": arguments.trials, "seed": arguments.seed, "settings": rows}
    return _common.finish(record, arguments.results, judged, data)


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def arguments_parser() -> argparse.ArgumentParser:
    """The script's options."""
    made = _common.parser("gate_power.py", "How often the accuracy gate errs where the truth is known.")
    made.add_argument("--trials", type=positive, default=4000, help="runs of each setting (default: 4000)")
    made.add_argument("--seed", type=int, default=0, help="of the simulated truths (default: 0)")
    return made


if __name__ == "__main__":
    raise SystemExit(_common.guarded(measure, arguments_parser().parse_args()))
