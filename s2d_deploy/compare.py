"""Two reports side by side: the same target and precision, figure by figure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIGURES = {
    "metric": ("metric", "measured"),
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
        A side that has no such result or never measured it holds None.
    """
    tables = [{(r["target"], r["precision"]): r for r in report["results"]} for report in (first, second)]
    rows = []
    for key in dict.fromkeys([*tables[0], *tables[1]]):
        for figure, (section, field) in _FIGURES.items():
            a, b = (_value(table.get(key), section, field) for table in tables)
            if a is None and b is None:
                continue
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in (a, b))
            rows.append(
                {
                    "target": key[0],
                    "precision": key[1],
                    "figure": figure,
                    "first": a,
                    "second": b,
                    "change": b - a if numbers else None,
                }
            )
    return rows


def _value(result: Mapping[str, Any] | None, section: str, field: str | None) -> Any:
    if result is None:
        return None
    value = result.get(section)
    return value if field is None else (value or {}).get(field)
