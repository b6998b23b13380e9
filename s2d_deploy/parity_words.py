"""What a verification found, in sentences: verdict first, then where, what, how much, and how to see it again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def words(parity: Mapping[str, Any]) -> list[str]:
    """The finding in sentences: verdict, then where, what, how much, and how to see it again."""
    explanation = parity.get("explanation")
    if explanation is None:
        return [f"not examined: {step}: {why}" for step, why in (parity.get("unexamined") or {}).items()]
    lines = []
    findings = explanation["findings"]
    if not explanation["codes_shown"] and not findings:
        lines.append(f"parity: no codes to compare; the output of {explanation['samples']} samples is the simulation's")
    elif explanation["verdict"] == "identical":
        lines.append(f"parity: identical; every code of {explanation['samples']} samples is the simulation's")
    elif explanation["verdict"] == "rounding":
        flipped = sum(row["flipped"] for row in explanation["sites"])
        lines.append(f"parity: rounding only; {flipped} codes of {explanation['samples']} samples lie on a boundary")
    else:
        known = explanation["verdict"] == "fault"
        lines.append(f"parity: {'FAULT' if known else 'DIFFERENT, cause unknown'}; first in {findings[0]['layer']}")
    for f in findings:
        place = f["layer"] + (f" (seen at {f['site']})" if f["site"] else "")
        sure = "explains every code" if f["confirmed"] else "does not explain everything"
        lines.append(f"  {f['cause']} in {place}: {f['detail']}; {f['evidence']}; {sure}")
    if explanation.get("reproducer"):
        lines.append(f"  reproduce: cd {explanation['reproducer']} && python run.py")
    lines += _gap_words(parity) + _budget_words(parity) + _consistency_words(parity)
    if explanation["taps_changed"]:
        lines.append(f"  showing the codes changes {len(explanation['taps_changed'])} nodes of the optimized graph")
    lines += [f"  not examined: {step}: {why}" for step, why in (parity.get("unexamined") or {}).items()]
    return lines


def _gap_words(parity: Mapping[str, Any]) -> list[str]:
    gap = parity.get("gap")
    if gap is None or not gap["relative_power"]:
        return []
    shares = [(p["name"], p["share"]) for p in gap["parts"] if p["share"] is not None]
    parts = [f"{name} {share:.1%}" for name, share in shares if abs(share) >= 5e-4]
    metric = "" if gap["metric"] is None else f"; metric {gap['metric']:+.2f} points"
    return [f"  gap from float to hardware ({gap['samples']} samples{metric}): {', '.join(parts)}"]


def _budget_words(parity: Mapping[str, Any]) -> list[str]:
    budget = parity.get("budget")
    if budget is None or budget["seen_codes"] is None:
        return []
    within = "within" if budget["within"] else "BEYOND"
    return [
        f"  codes moved: {budget['seen_codes']:,}, {within} what rounding may move here "
        f"({budget['allowed_codes']:,} in {budget['compared_samples']} samples)"
    ]


def _consistency_words(parity: Mapping[str, Any]) -> list[str]:
    consistency = parity.get("consistency")
    if consistency is None:
        return []
    off = [r["what"] for r in consistency["runs"] if not r["identical"] or r["codes_different"]]
    if not off:
        return [f"  agrees with itself bit for bit: {', '.join(r['what'] for r in consistency['runs'])}"]
    sign = "agrees with itself to float rounding" if consistency["agrees"] else "DISAGREES WITH ITSELF"
    return [f"  {sign}; differs: {', '.join(off)}"]
