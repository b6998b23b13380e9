"""The gates, for report.html: what was demanded, what was found, how sure that is, and what more samples would show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from s2d_deploy import report_format as fmt
from s2d_deploy import report_summary as words
from s2d_deploy import svg
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.plots import figure, grid
from s2d_deploy.report_schema import Gate
from s2d_deploy.report_tables import Column, cell, chip, num, table

_ROWS_DRAWN = 40
_CLASSES = {"pass": "v-pass", "fail": "v-fail", "undecided": "v-undecided"}


def section(gates: Sequence[Gate]) -> Markup:
    """The section's body: filters, the table, and a plot of each gate that is an estimate."""
    if not gates:
        return tag("p", "No gates were asked for.", class_="empty")
    return join([_controls(gates), _table(gates), grid(_plots(gates))])


def _controls(gates: Sequence[Gate]) -> Markup:
    verdicts = [v for v in ("fail", "undecided", "pass") if any(g.verdict == v for g in gates)]
    fields = [_choice("Verdict", "verdict", verdicts)]
    fields.append(_choice("Where", "where", list(dict.fromkeys(words.gate_place(g) for g in gates))))
    fields.append(tag("label", "Search", tag("input", type="search", placeholder="gate, evidence", data_key="*")))
    return tag(
        "form",
        *fields,
        tag("output", aria_live="polite"),
        data_for="gates-table",
        class_="controls",
        hidden=True,
        aria_label="Filter the gates",
    )


def _choice(label: str, key: str, values: Sequence[str]) -> Markup:
    options = [tag("option", "all", value=""), *(tag("option", value, value=value) for value in values)]
    return tag("label", label, tag("select", join(options), data_key=key))


def _table(gates: Sequence[Gate]) -> Markup:
    estimated = any(_interval(g) for g in gates)
    columns = [
        Column("Verdict"),
        Column("Gate"),
        Column("Where"),
        Column("Value", True),
        *([Column("95 % interval", True)] if estimated else []),
        Column("Limit", True),
        *(
            [
                Column("Can show", True, "the smallest true drop that this gate fails in 80 % of runs of this size"),
                Column("Samples needed", True, "with so many a model without any drop passes in 80 % of runs"),
            ]
            if estimated
            else []
        ),
        Column("Evidence"),
    ]
    return table("gates", "Gates", columns, (_row(g, estimated) for g in words.worst_first(gates)))


def _row(gate: Gate, estimated: bool) -> Markup:
    interval, extra = _interval(gate), gate.model_extra or {}
    detectable, needed = _number(extra.get("detectable")), _number(extra.get("samples_needed"))
    cells = [
        cell(chip(gate.verdict), value=gate.verdict),
        cell(gate.name, head=True),
        cell(words.gate_place(gate)),
        num(fmt.anything(gate.value), _number(gate.value)),
    ]
    if estimated:
        shown = f"{fmt.trimmed(interval[0], 3)} to {fmt.trimmed(interval[1], 3)}" if interval else fmt.MISSING
        cells.append(num(shown, interval[1] if interval else None))
    cells.append(num(fmt.anything(gate.limit), _number(gate.limit)))
    if estimated:
        cells.append(num(fmt.trimmed(detectable, 3), detectable))
        cells.append(num(fmt.MISSING if needed is None else f"{needed:,.0f}", needed))
    cells.append(cell(fmt.anything(gate.evidence), class_="prose"))
    return tag("tr", *cells, data_verdict=gate.verdict, data_where=words.gate_place(gate))


def _plots(gates: Sequence[Gate]) -> list[Markup | None]:
    """One plot for each kind of gate with intervals: the value, its interval, and the limit."""
    return [
        _plot(name, [g for g in gates if g.name == name])
        for name in dict.fromkeys(g.name for g in gates if _interval(g))
    ]


def _plot(name: str, gates: Sequence[Gate]) -> Markup | None:
    rows = [
        (g, value, interval, _number(g.limit))
        for g in gates
        if (interval := _interval(g)) and (value := _number(g.value)) is not None
    ][:_ROWS_DRAWN]
    if not rows:
        return None
    values = [v for _, value, interval, limit in rows for v in (value, *interval, limit) if v is not None]
    plot = svg.Rows([words.gate_place(g) for g, *_ in rows], values, name, notes=[g.verdict for g, *_ in rows], row=22)
    for i, (g, value, (low, high), limit) in enumerate(rows):
        y, x, place = plot.y(i), plot.scale, words.gate_place(g)
        about = f"{place}: {fmt.trimmed(value)}, 95 % interval {fmt.trimmed(low, 3)} to {fmt.trimmed(high, 3)}"
        kind = _CLASSES[g.verdict]
        plot.add(svg.line(x(low), y, x(high), y, f"whisker {kind}"))
        plot.add(*(svg.line(x(v), y - 4, x(v), y + 4, f"whisker {kind}") for v in (low, high)))
        if limit is not None:
            plot.add(svg.line(x(limit), y - 10, x(limit), y + 10, "threshold", f"{place}: limit {fmt.trimmed(limit)}"))
        plot.add(svg.mark(x(value), y, "dot", kind, f"{about} ({g.verdict})", r=4.5))
    note = "The bar is the 95 % interval, the dashed line the limit. An interval on both sides of it decides nothing."
    if len(rows) < len(gates):
        note += f" {len(rows)} of {len(gates)} gates have an interval to draw."
    return figure(f"{name} against its limit", plot.render(f"{name}: value, interval and limit"), note=note)


def _interval(gate: Gate) -> tuple[float, float] | None:
    found = (gate.model_extra or {}).get("interval")
    if not isinstance(found, list | tuple) or len(found) != 2:
        return None
    low, high = map(_number, found)
    return (low, high) if low is not None and high is not None else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
