"""Where a simulation's error comes from, for report.html: a plot of the worst layers and a table of all."""

from __future__ import annotations

from collections.abc import Sequence

from s2d_deploy import report_format as fmt
from s2d_deploy import svg
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.plots import colour, figure, grid
from s2d_deploy.report_schema import LayerErrorFacts, PrecisionErrors
from s2d_deploy.report_tables import Column, cell, num, precision_tag, table

_SHOWN = 12


def section(errors: Sequence[PrecisionErrors]) -> Markup | None:
    """The section's body; None where no error was analysed."""
    analysed = [entry for entry in errors if entry.layers]
    if not analysed:
        return None
    note = (
        "Isolated: the layer alone, on float inputs. Accumulated: inside the whole simulation. Share: the error of the "
        "model's output when only this layer is quantized, over the sum of all layers'. Shares are first-order; where "
        "the sum is far from the whole simulation's error, layers act on each other and shares say less."
    )
    details = tag("details", tag("summary", "Every layer in numbers"), _controls(analysed), _table(analysed))
    return join([tag("p", note, class_="note"), grid([_worst(entry) for entry in analysed]), details])


def _controls(errors: Sequence[PrecisionErrors]) -> Markup:
    precisions = list(dict.fromkeys(entry.precision for entry in errors))
    options = [tag("option", "all", value=""), *(tag("option", p, value=p) for p in precisions)]
    return tag(
        "form",
        tag("label", "Precision", tag("select", join(options), data_key="precision")),
        tag("label", "Search", tag("input", type="search", placeholder="layer", data_key="*")),
        tag("output", aria_live="polite"),
        data_for="errors-table",
        class_="controls",
        hidden=True,
        aria_label="Filter the layers' errors",
    )


def _worst(entry: PrecisionErrors) -> Markup | None:
    rows = [layer for layer in entry.layers if layer.share][:_SHOWN]
    if not rows:
        return None
    shares = [100.0 * (layer.share or 0.0) for layer in rows]
    plot = svg.Rows(
        [layer.op for layer in rows],
        shares,
        "share of the final error, %",
        zero=True,
        notes=[_decibel(layer.accumulated_snr_db) for layer in rows],
        row=19,
    )
    for i, (layer, share) in enumerate(zip(rows, shares, strict=True)):
        title = (
            f"{layer.op}: {share:.1f} % of the error; isolated {_decibel(layer.isolated_snr_db)}, "
            f"accumulated {_decibel(layer.accumulated_snr_db)}"
        )
        start = plot.scale(0.0)
        plot.add(
            tag(
                "rect",
                tag("title", title),
                x=start,
                y=plot.y(i) - 5,
                width=max(plot.scale(share) - start, 0.5),
                height=10,
                class_=f"dot {colour(entry.precision)}",
            )
        )
    facts = [
        f"output {_decibel(entry.output_snr_db)}",
        f"sum of single errors {entry.additivity:.2f} of the whole" if entry.additivity is not None else None,
        f"{entry.samples} samples" if entry.samples else None,
        f"the {len(rows)} worst of {len(entry.layers)} layers; at the right the accumulated SNR",
    ]
    return figure(
        f"Error by layer, {entry.precision}",
        plot.render(f"Share of the final error by layer at {entry.precision}"),
        note=", ".join(fact for fact in facts if fact) + ".",
    )


def _table(errors: Sequence[PrecisionErrors]) -> Markup:
    columns = [
        Column("Precision"),
        Column("Layer"),
        Column("Declared"),
        Column("Share", True, "of the final error, each layer quantized alone"),
        Column("Isolated SNR", True, "on float inputs"),
        Column("Isolated cosine", True),
        Column("Accumulated SNR", True, "inside the whole simulation"),
        Column("Accumulated cosine", True),
    ]
    rows = (_row(entry.precision, layer) for entry in errors for layer in entry.layers)
    return table("errors", "Error of every layer", columns, rows)


def _row(precision: str, layer: LayerErrorFacts) -> Markup:
    return tag(
        "tr",
        cell(precision_tag(precision), value=precision),
        cell(layer.op, head=True),
        cell(layer.declared),
        num(fmt.percent(layer.share) if layer.share is not None else fmt.MISSING, layer.share),
        num(_decibel(layer.isolated_snr_db), layer.isolated_snr_db),
        num(fmt.number(layer.isolated_cosine, 4), layer.isolated_cosine),
        num(_decibel(layer.accumulated_snr_db), layer.accumulated_snr_db),
        num(fmt.number(layer.accumulated_cosine, 4), layer.accumulated_cosine),
        data_precision=precision,
    )


def _decibel(value: float | None) -> str:
    return "exact" if value is None else f"{value:.1f} dB"
