"""Figures of the demo: a fresh ``s2d-deploy run digits-vit`` within 240 s, and what its report must then say.

    python benchmarks/demo_time.py

Starts the command in an empty folder, as `make demo` does once its environment is there, and reads seconds by stage
from the manifests and the figures from report.json: W8A8 within half a point of float on every measured runtime, the
simulation within 0.2 points of the runtime, and no accumulator different on ORT and TVM at W8A8 and W4A4.
``--report`` checks the figures of a run that is there already, and times nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
from _common import Figure, Record, at_most, table
from startup import program

from s2d_deploy.errors import RuntimeUnavailable
from s2d_deploy.files import read_json
from s2d_deploy.manifest import MANIFEST

RECIPE = "digits-vit"
LIMIT_SECONDS = 240.0
W8A8_POINTS, GAP_POINTS = 0.5, 0.2
EXACT_TARGETS, EXACT_PRECISIONS = ("ort", "tvm"), ("w8a8", "w4a4")


def stage_seconds(run: Path) -> dict[str, float]:
    """Seconds of every stage of a run, longest first."""
    found = [read_json(path) for path in run.glob(f"*/**/{MANIFEST}")]
    stages = {str(m["stage"]): float(m["seconds"]) for m in found}
    return dict(sorted(stages.items(), key=lambda item: -item[1]))


def by_verb(stages: Mapping[str, float]) -> dict[str, float]:
    """The same summed over targets and precisions: ``export/tvm/w4a4`` counts for ``export/tvm``."""
    sums: dict[str, float] = {}
    for name, seconds in stages.items():
        parts = name.split("/")
        verb = parts[0] if len(parts) < 3 else "/".join(parts[:2])
        sums[verb] = sums.get(verb, 0.0) + seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def figures(report: Mapping[str, Any]) -> list[Figure]:
    """The digits figures, one for each measured runtime; a runtime that should be there and is not is undecided."""
    rows = [r for r in report["results"] if r["status"] == "measured"]
    made: list[Figure] = []
    for row in rows:
        name, metric = f"{row['target']} {row['precision']}", row.get("metric") or {}
        measured, floating, simulated = (metric.get(k) for k in ("measured", "float", "simulated"))
        if row["precision"] == "w8a8":
            drop = None if measured is None or floating is None else abs(floating - measured)
            made.append(at_most(f"{name}: points from float", drop, W8A8_POINTS, f"n = {metric.get('n')}"))
        gap = None if measured is None or simulated is None else abs(simulated - measured)
        made.append(at_most(f"{name}: points from the simulation", gap, GAP_POINTS))
    for target in EXACT_TARGETS:
        for precision in EXACT_PRECISIONS:
            name = f"{target} {precision}: accumulators different, teacher-forced"
            parity = next(
                (r.get("parity") or {} for r in rows if (r["target"], r["precision"]) == (target, precision)), {}
            )
            checked = parity.get("accumulators_checked") or 0
            value = float(parity["accumulators_different"]) if checked else None
            made.append(at_most(name, value, 0.0, f"{checked:,} checked" if checked else "not measured"))
    return made


def run(chosen: argparse.Namespace) -> int:
    """Run, read, print, write."""
    record = Record("demo-time")
    if chosen.report:
        return _finish(record, chosen, chosen.report, [], {})
    with tempfile.TemporaryDirectory(prefix="s2d-deploy-demo-") as temporary:
        folder = Path(temporary) / RECIPE
        command = [program(), "run", RECIPE, "--output", str(folder)]
        begin = time.perf_counter()
        code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        seconds = time.perf_counter() - begin
        if code not in (0, 1):
            raise RuntimeUnavailable(f"`s2d-deploy run {RECIPE}` ended with exit code {code}; see its message above.")
        total = at_most(f"s2d-deploy run {RECIPE}, seconds", seconds, LIMIT_SECONDS, f"exit code {code}")
        passed = at_most("exit code of the run", float(code), 0.0)
        return _finish(record, chosen, folder, [total, passed], {"seconds": seconds, "exit_code": code})


def _finish(
    record: Record, chosen: argparse.Namespace, folder: Path, first: Sequence[Figure], data: dict[str, Any]
) -> int:
    report, stages = read_json(folder / "report.json"), stage_seconds(folder)
    rows = [(name, f"{seconds:.1f}") for name, seconds in by_verb(stages).items()]
    rest = data["seconds"] - sum(stages.values()) if "seconds" in data else None
    if rest is not None:
        rows.append(("(start, imports, loading, report)", f"{rest:.1f}"))
    print(table(("stage", "seconds"), rows) + "\n")
    keep = ("target", "precision", "status", "reason", "metric", "parity", "rung", "executed")
    results = [{k: r[k] for k in keep if k in r} for r in report["results"]]
    for result in results:  # counts are the figures; 597 zeros and ones a row are not
        result["metric"] = {k: v for k, v in (result.get("metric") or {}).items() if not k.startswith("per_sample")}
        result["parity"] = {k: v for k, v in (result.get("parity") or {}).items() if k != "sites"}
    data |= {"stage_seconds": stages, "other_seconds": rest, "results": results, "gates": report["verdict"]}
    return _common.finish(record, chosen.results, [*first, *figures(report)], data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    made = _common.parser("demo_time.py", str(__doc__))
    made.add_argument("--report", type=Path, metavar="DIR", help="check this finished run instead of a new one")
    return _common.guarded(run, made.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
