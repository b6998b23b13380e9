"""Two reports side by side: the same target and precision, figure by figure.

Where both hold the outcomes of the same samples, the metric is compared sample by sample (`paired.py`), so that a
change is told from chance. Reports on other samples, or that do not say on which, get their figures only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2d_deploy.outcomes import of_row
from s2d_deploy.paired import PairedDrop, paired_drop
from s2d_deploy.power import decide, smallest_detectable
from s2d_deploy.report_schema import Metric
from s2d_deploy.report_summary import higher_is_better

METRIC = "metric"
SAME = "every sample as before"
_FIGURES = {
    METRIC: ("metric", "measured"),
    "simulated": ("metric", "simulated"),
    "accumulators different": ("parity", "accumulators_different"),
    "codes different": ("parity", "codes_different"),
    "p50 ms": ("latency_ms", "p50"),
    "speedup": ("speedup_over_float", None),
    "size bytes": ("size_bytes", None),
    "rung": ("rung", None),
    "status": ("status", None),
}


def compare_reports(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each target, precision and figure that either report has.

    Returns:
        ``[{target, precision, figure, first, second, change}]``; `change` is second minus first for numbers, else None.
        A side that has no such result or never measured it holds None. Rows of the metric hold ``paired``: ``{n, drop,
        interval, p_value, lost, gained, method, detectable, finding}`` with the drop from first to second (above 0 is
        worse, whatever the metric's direction), or ``{"why_not"}``. Rows of the speedup hold ``intervals``.
    """
    tables = [{(r["target"], r["precision"]): r for r in report["results"]} for report in (first, second)]
    refusal = _other_samples(first, second)
    rows = []
    for key in dict.fromkeys([*tables[0], *tables[1]]):
        sides = [table.get(key) for table in tables]
        for figure, (section, field) in _FIGURES.items():
            a, b = (_value(side, section, field) for side in sides)
            if a is None and b is None:
                continue
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b))
            row = {
                "target": key[0],
                "precision": key[1],
                "figure": figure,
                "first": a,
                "second": b,
                "change": b - a if numbers else None,
            }
            if figure == METRIC and numbers:
                row["paired"] = _paired(sides[0], sides[1], refusal)
            if figure == "speedup":
                row["intervals"] = [(side or {}).get("speedup_ci") for side in sides]
            rows.append(row)
    return rows


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the paired statistics of `compare_reports` say, one sentence for each result."""
    said = []
    for row in rows:
        paired = row.get("paired")
        if paired is None:
            continue
        where = f"{row['target']} {row['precision']}"
        if "why_not" in paired:
            said.append(f"{where}: not compared sample by sample: {paired['why_not']}")
            continue
        if paired["finding"] == SAME:
            said.append(f"{where}: {SAME} (n = {paired['n']})")
            continue
        lo, hi = paired["interval"]
        text = f"{where}: {paired['finding']}; drop {paired['drop']:.4g}, 95 % interval [{lo:.4g}, {hi:.4g}]"
        if paired["lost"] is not None:
            text += f", lost {paired['lost']}, gained {paired['gained']}, p = {paired['p_value']:.3g}"
        if paired["finding"] == "no difference shown" and paired["detectable"] is not None:
            text += f"; a true drop of {paired['detectable']:.4g} would be seen in 80 % of runs"
        said.append(f"{text} (n = {paired['n']}, {paired['method']})")
    return said


def _paired(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None, refusal: str | None) -> dict[str, Any]:
    if refusal is not None:
        return {"why_not": refusal}
    values = [of_row(side or {}) for side in (a, b)]
    metrics = [Metric.model_validate((side or {}).get("metric") or {}) for side in (a, b)]
    if metrics[0].name != metrics[1].name:
        return {"why_not": f"the metrics are {metrics[0].name!r} and {metrics[1].name!r}"}
    if values[0] is None or values[1] is None or len(values[0]) != len(values[1]):
        return {"why_not": "not both reports hold the outcomes of the samples"}
    if not higher_is_better(metrics[0]):
        values.reverse()
    try:
        drop = paired_drop(values[0], values[1])
    except ValueError as error:
        return {"why_not": str(error)}
    return {
        "n": drop.n,
        "drop": drop.drop,
        "interval": [drop.lo, drop.hi],
        "p_value": drop.p_value,
        "lost": drop.lost,
        "gained": drop.gained,
        "method": drop.method,
        "detectable": smallest_detectable(drop),
        "finding": _finding(drop, values[0], values[1]),
    }


def _finding(drop: PairedDrop, first: list[float], second: list[float]) -> str:
    if first == second:
        return SAME
    if decide(drop, 0.0) == "fail":
        return "worse"
    return "better" if decide(paired_drop(second, first), 0.0) == "fail" else "no difference shown"


def _other_samples(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    digests = [(report.get("data") or {}).get("sha256") for report in (first, second)]
    if None in digests:
        return "a report does not say on which samples it was made"
    return None if digests[0] == digests[1] else "they were made on other samples"


def _value(result: Mapping[str, Any] | None, section: str, field: str | None) -> Any:
    if result is None:
        return None
    value = result.get(section)
    return value if field is None else (value or {}).get(field)
