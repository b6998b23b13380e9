"""Parity explained, for report.html: findings in words, the gap in parts, the error budget beside what is seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2d_deploy import report_format as fmt
from s2d_deploy import svg
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.parity_words import words
from s2d_deploy.plots import Labelled, colour, figure, grid
from s2d_deploy.report_schema import Parity
from s2d_deploy.report_tables import Column, cell, num, table

_LAYERS_DRAWN = 60


def section(results: Labelled) -> Markup | None:
    """Everything beyond the counts; None where nothing was examined."""
    examined = [
        (label, r, r.parity) for label, r in results if r.parity is not None and r.parity.explanation is not None
    ]
    if not examined:
        return None
    sentences = [_sentences(label, p) for label, _, p in examined]
    plots: list[Markup | None] = []
    drawn: set[str] = set()
    for _label, r, p in examined:
        if r.precision not in drawn and p.budget:  # the budget is the model's: the same for every runtime
            drawn.add(r.precision)
            plots.append(_depth(r.precision, p.budget))
    pairs = [(label, p) for label, _, p in examined]
    budget = _budget_table({r.precision: p for _, r, p in reversed(examined) if p.budget})
    details = [
        tag("details", tag("summary", title), body)
        for title, body in (("The gap in parts", _gap_table(pairs)), ("Error budget of every layer", budget))
        if body is not None
    ]
    return join([tag("h3", "What was found"), *sentences, grid(plots), *details])


def _sentences(label: str, parity: Parity) -> Markup:
    lines = words(parity.model_dump())
    rest = tag("ul", join(tag("li", line.strip()) for line in lines[1:])) if len(lines) > 1 else None
    return tag("div", tag("p", tag("strong", label), ": ", lines[0].removeprefix("parity: ")), rest, class_="note")


def _depth(precision: str, budget: Mapping[str, Any]) -> Markup | None:
    layers = [
        row
        for row in budget.get("layers", [])
        if row["predicted_snr_db"] is not None and row["seen_snr_db"] is not None
    ]
    if not layers:
        return None
    shown = layers if len(layers) <= _LAYERS_DRAWN else [*layers[:: -(-len(layers) // _LAYERS_DRAWN)], layers[-1]]
    values = [
        row[k] for row in shown for k in ("isolated_snr_db", "predicted_snr_db", "seen_snr_db") if row[k] is not None
    ]
    # Adding 0.0 makes -0.0 a 0.0.
    notes = [f"{round(row['seen_snr_db'] - row['predicted_snr_db'], 1) + 0.0:+.1f}" for row in shown]
    plot = svg.Rows([row["op"] for row in shown], values, "SNR in dB", notes=notes, row=17)
    for i, row in enumerate(shown):
        y, x, op = plot.y(i), plot.scale, row["op"]
        plot.add(svg.line(x(row["predicted_snr_db"]), y, x(row["seen_snr_db"]), y, "link"))
        if row["isolated_snr_db"] is not None:
            plot.add(
                svg.mark(
                    x(row["isolated_snr_db"]), y, "bar", "ref", f"{op}: alone {row['isolated_snr_db']:.1f} dB", r=3
                )
            )
        plot.add(
            svg.mark(
                x(row["predicted_snr_db"]),
                y,
                "ring",
                colour(precision),
                f"{op}: predicted {row['predicted_snr_db']:.1f} dB",
                r=5,
            )
        )
        plot.add(
            svg.mark(
                x(row["seen_snr_db"]), y, "dot", colour(precision), f"{op}: seen {row['seen_snr_db']:.1f} dB", r=3.5
            )
        )
    key = svg.legend(
        ("bar", "ref", "the layer alone"), ("ring", "p-neutral", "predicted"), ("dot", "p-neutral", "seen")
    )
    note = (
        "Predicted from each layer's own error, first order and independent; seen in the simulation. At the right seen "
        "minus predicted. Dots far left of their rings: errors feed each other."
    )
    return figure(
        f"Error by depth, {precision}",
        plot.render(f"Predicted and seen SNR by layer at {precision}"),
        note=note,
        key=key,
    )


def _gap_table(examined: Sequence[tuple[str, Parity]]) -> Markup | None:
    rows = [(label, p.gap, part) for label, p in examined if p.gap for part in p.gap["parts"]]
    if not rows:
        return None
    columns = [
        Column("Result"),
        Column("Part"),
        Column("Share of the gap", True, "projection on the whole gap from float to hardware; shares add up to 100 %"),
        Column("Power alone", True, "relative to the float output"),
        Column("Metric", True, "points; steps add up to the whole gap"),
        Column("What"),
    ]
    body = (
        tag(
            "tr",
            cell(label, head=True),
            cell(part["name"]),
            num(fmt.MISSING if part["share"] is None else fmt.percent(part["share"], 2), part["share"]),
            num(f"{part['relative_power']:.2g}", part["relative_power"]),
            num(fmt.MISSING if part["metric"] is None else f"{part['metric']:+.2f}", part["metric"]),
            cell(part["what"] or None, class_="prose"),
        )
        for label, _, part in rows
    )
    return table("gap", "The gap from float to hardware in parts", columns, body)


def _budget_table(budgets: Mapping[str, Parity]) -> Markup | None:
    rows = [(precision, row) for precision, p in budgets.items() if p.budget for row in p.budget.get("layers", [])]
    if not rows:
        return None
    columns = [
        Column("Precision"),
        Column("Layer"),
        Column("Alone", True, "SNR of the layer's own error on float operands"),
        Column("Predicted", True, "SNR with the errors of all layers before it, first order"),
        Column("Seen", True, "SNR in the simulation"),
    ]
    body = (
        tag(
            "tr",
            cell(precision, head=True),
            cell(row["op"]),
            *(num(_decibel(row[k]), row[k]) for k in ("isolated_snr_db", "predicted_snr_db", "seen_snr_db")),
        )
        for precision, row in rows
    )
    return table("budget", "Error budget of every layer", columns, body)


def _decibel(value: float | None) -> str:
    return fmt.MISSING if value is None else f"{value:.1f} dB"
