"""Tables for the terminal, as text. Numbers that nobody measured are a dash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from s2d_deploy.parity_words import words

MANY_GATES = 20
DASH = "–"


def results_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Target by precision: status, rung, metric (float, simulated, measured), parity, latency, size."""
    table = Table(title="results", title_justify="left")
    for name in ("target", "precision", "status", "rung"):
        table.add_column(name, no_wrap=True)
    for name in ("float", "simulated", "measured", "acc. diff.", "codes diff.", "p50 ms", "speedup", "KiB", "w-ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    reasons = []
    for r in rows:
        metric, parity, latency = r.get("metric") or {}, r.get("parity") or {}, r.get("latency_ms") or {}
        size = r.get("size_bytes")
        table.add_row(
            r["target"],
            r["precision"],
            r["status"],
            r.get("rung") or DASH,
            number(metric.get("float"), ".2f"),
            number(metric.get("simulated"), ".2f"),
            number(metric.get("measured"), ".2f"),
            number(parity.get("accumulators_different"), ",d"),
            _share(parity.get("codes_different"), parity.get("codes_checked")),
            number(latency.get("p50"), ".3f") + ("" if latency.get("stable", True) else " ~"),
            number(r.get("speedup_over_float"), ".2f"),
            number(None if size is None else size / 1024, ",.0f"),
            number(r.get("weight_ratio"), ".3f"),
        )
        if r["status"] != "measured" and r.get("reason"):
            reasons.append(f"  {r['target']} {r['precision']}: {r['status']}: {r['reason']}")
    return _text(table) + "\n".join(_merged(reasons))


def op_costs_table(document: Mapping[str, Any]) -> str:
    """Milliseconds of each distinct op at each precision, and their sums over all ops."""
    table = Table(title=f"op costs on {document['target']}, batch {document['batch']}, ms", title_justify="left")
    for name in ("op", "ops", "k", "n"):
        table.add_column(name)
    precisions = list(dict.fromkeys(row["precision"] for row in document["measured"]))
    for precision in precisions:
        table.add_column(precision, justify="right", no_wrap=True)
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for row in document["measured"]:
        rows.setdefault(row["ops"][0], []).append(row)
    for name, found in rows.items():
        figures = [number(r["median_ms"], ".4f") + ("" if r["stable"] else " ~") for r in found]
        table.add_row(name, str(len(found[0]["ops"])), str(found[0]["k"]), str(found[0]["n"]), *figures)
    sums = [number(sum(costs[p] for costs in document["costs"].values()), ".4f") for p in precisions]
    table.add_row("sum over all ops", str(len(document["costs"])), "", "", *sums)
    return _text(table)


def gates_table(gates: Sequence[Mapping[str, Any]]) -> str:
    """The gates with value, limit and verdict; evidence for those that did not pass.

    Above `MANY_GATES`, those that passed are only counted: the reports list them all.
    """
    if not gates:
        return "no gates"
    total, passed = len(gates), sum(g["verdict"] == "pass" for g in gates)
    if total > MANY_GATES:
        gates = [g for g in gates if g["verdict"] != "pass"]
    if not gates:
        return f"gates: all {total} passed"
    table = Table(title="gates", title_justify="left")
    for name in ("gate", "target", "precision", "verdict"):
        table.add_column(name, no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("limit", justify="right")
    for g in gates:
        table.add_row(
            g["name"],
            g["target"] or DASH,
            g["precision"] or DASH,
            g["verdict"],
            number(g["value"], ".4g"),
            number(g["limit"], ".4g"),
        )
    evidence = [
        "  " + " ".join(str(part) for part in (g["name"], g["target"], g["precision"]) if part) + f": {g['evidence']}"
        for g in gates
        if g["verdict"] != "pass"
    ]
    counted = [] if total <= MANY_GATES or not passed else [f"  {passed} of {total} gates passed"]
    return _text(table) + "\n".join([*evidence, *counted])


def diagnosis_table(layers: Iterable[Mapping[str, Any]]) -> str:
    """Layers (documents of `diagnose.LayerDiagnosis`), worst first."""
    table = Table(title="diagnosis", title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("flagged", "PCDR", "sigma max", "max |output|", "kurtosis"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in sorted(layers, key=lambda d: -d["max_abs_activation"]):
        table.add_row(
            layer["name"],
            f"k = {layer['k_target']}" if layer["flagged"] else DASH,
            " ".join(f"{p:.2f}" for p in layer["pcdr"]),
            number(layer["sigma_max"], ".2f"),
            number(layer["max_abs_activation"], ".2f"),
            number(layer["kurtosis"], ".1f"),
        )
    return _text(table)


def errors_table(analyses: Iterable[Mapping[str, Any]], worst: int = 5) -> str:
    """The worst layers of each precision (`error_analysis.ErrorAnalysis.to_dict`, with its precision)."""
    table = Table(title=f"the {worst} layers that make most of each simulation's error", title_justify="left")
    for name in ("precision", "layer", "declared"):
        table.add_column(name, overflow="fold")
    for name in ("share", "isolated dB", "accumulated dB", "output dB"):
        table.add_column(name, justify="right")
    for analysis in analyses:
        for i, layer in enumerate(analysis["layers"][:worst]):
            table.add_row(
                analysis["precision"] if i == 0 else "",
                layer["op"],
                layer["declared"],
                f"{layer['share']:.0%}",
                number(layer["isolated_snr_db"], ".1f"),
                number(layer["accumulated_snr_db"], ".1f"),
                number(analysis["output_snr_db"], ".1f") if i == 0 else "",
            )
    return _text(table)


def claims_table(claims: Sequence[Mapping[str, Any]]) -> str:
    """What became of a bundle's claims (`bundle_check.Claim`): counts, and each that does not hold or is open."""
    words = {True: "holds", False: "DOES NOT HOLD", None: "not checked"}
    count = {answer: sum(claim["holds"] is answer for claim in claims) for answer in words}
    lines = [f"{count[True]} of {len(claims)} claims hold, {count[False]} do not, {count[None]} cannot be checked"]
    for answer in (False, None):
        shown = [claim for claim in claims if claim["holds"] is answer]
        lines += [f"  {words[answer]}: {c['what']}" + (f" ({c['note']})" if c["note"] else "") for c in shown]
    return "\n".join(lines)


def comparison_table(rows: Sequence[Mapping[str, Any]], first: str, second: str) -> str:
    """Two runs side by side."""
    table = Table(title=Text(f"{first}  |  {second}"), title_justify="left")
    for name in ("target", "precision", "figure"):
        table.add_column(name, no_wrap=True)
    for name in ("first", "second", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["target"],
            row["precision"],
            row["figure"],
            number(row["first"], _form(row["first"])),
            number(row["second"], _form(row["second"])),
            number(row["change"], "+" + _form(row["change"])),
        )
    return _text(table)


def number(value: Any, form: str) -> str:
    """`value` formatted, a text as it is, a dash for None and NaN."""
    if value is None or value != value:  # NaN differs from itself
        return DASH
    return format(value, form) if isinstance(value, int | float) else str(value)


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """A table of texts; the last `right` columns are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        number_column = i >= len(header) - right
        table.add_column(name, justify="right" if number_column else "left", no_wrap=number_column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return _text(table)


def _form(value: Any) -> str:
    """Counts and bytes whole, everything else to four digits."""
    return ",d" if isinstance(value, int) else ".4g"


def _share(part: int | None, whole: int | None) -> str:
    return DASH if part is None or not whole else f"{part:,d} ({100 * part / whole:.2g} %)"


def _merged(reasons: list[str]) -> list[str]:
    """One line where several precisions of a target have the same reason."""
    groups: dict[str, list[str]] = {}
    for line in reasons:
        head, _, reason = line.strip().partition(": ")
        target, precision = head.split(" ", 1)
        groups.setdefault(f"{target}\0{reason}", []).append(precision)
    return [f"  {key.split(chr(0))[0]} {', '.join(p)}: {key.split(chr(0))[1]}" for key, p in groups.items()]


def _text(table: Table) -> str:
    buffer = StringIO()
    # Plain text whatever the environment says; names are printed as they are, brackets and colons included.
    Console(
        file=buffer, width=150, highlight=False, markup=False, emoji=False, force_terminal=False, color_system=None
    ).print(table)
    return buffer.getvalue()


def parity_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the verification of each result found, in sentences; "" where nothing was examined."""
    lines: list[str] = []
    for row in rows:
        found = words(row.get("parity") or {})
        if found:
            lines += ["", f"{row['target']} {row['precision']}", *found]
    return "\n".join([*lines, ""]) if lines else ""
