"""What conditioning did and bought, for people: two tables, the verdict, and plots as SVG files that stand alone.

Reads documents (`outcome.json`, `diagnosis.json`), not objects, so that a stored outcome can be shown again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from s2d_deploy import report_format as fmt
from s2d_deploy import svg
from s2d_deploy.diagnosis_view import _alone, spectra, write_plots
from s2d_deploy.markup import Markup
from s2d_deploy.tables import DASH, _text, number

_ROWS = 40


def statement(document: Mapping[str, Any]) -> str:
    """The whole outcome as text: layers before and after, what each precision was worth, forecast and verdict."""
    samples = document["samples"]
    trained = f"{document['steps']} steps of {document['method']} on {samples['training']:,d} samples"
    if not document["steps"]:
        trained = "No training step was taken"
    dead = document["dead"]
    return "\n".join(
        [
            layers_table(document).rstrip(),
            f"flagged at tau {document['tau']:g}: {document['flagged']['before']} layer(s) before, "
            f"{document['flagged']['after']} after.",
            *([f"Dead in the original, their output is nothing but the bias: {', '.join(dead)}."] if dead else []),
            "",
            changes_table(document["changes"]).rstrip(),
            f"{trained}; ranges from {samples['calibration']:,d} samples; judged on {samples['held_out']:,d} others, "
            "held out.",
            "Quantized figures are simulated. Both models are quantized alike, each with the ranges of its own "
            "activations. Intervals cover the choice of held-out samples, not that of seed and training data.",
            "",
            f"Forecast before: {document['forecast']['sentence']}",
            f"Verdict: {document['verdict']}",
            "",
        ]
    )


def points(value: float) -> str:
    """A change in points, with its sign; what rounds to nothing has none."""
    shown = f"{value:+.2f}"
    return "0.00" if shown in ("+0.00", "-0.00") else shown


def where(document: Mapping[str, Any]) -> str:
    """Where the checkpoint and the results lie."""
    how = "transformers: from_pretrained"
    if document.get("inserted"):
        how += "; that is the same float function without the inserted layers, which s2d-deploy puts back"
    return (
        f"Checkpoint: {document['checkpoint']} ({how})\n"
        f"Diagnoses:  {', '.join(document['diagnoses'])}\n"
        f"Plots:      {document['results']}/plots\n"
        f"Statement:  {document['results']}/statement.txt, outcome.json"
    )


def layers_table(document: Mapping[str, Any]) -> str:
    """The flagged layers before and after; where none is flagged, those that came nearest."""
    layers = document["layers"]
    flagged = any(layer["flagged_before"] or layer["flagged_after"] for layer in layers)
    title = "flagged layers, before -> after" if flagged else "no layer is flagged; nearest to it, before -> after"
    table = Table(title=title, title_justify="left")
    table.add_column("layer", overflow="fold")
    for name in ("flagged", "PCDR_k", "sigma max", "max |output|", "kurtosis"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in layers:
        k = max(layer["k_target"], 1)
        pcdr = [layer[side]["pcdr"][min(k, len(layer[side]["pcdr"])) - 1] for side in ("before", "after")]
        table.add_row(
            layer["name"],
            _flags(layer),
            _pair(*pcdr),
            *(_pair(layer["before"][fact], layer["after"][fact]) for fact in ("sigma_max", "max_abs_activation")),
            _pair(layer["before"]["kurtosis"], layer["after"]["kurtosis"], ".1f"),
        )
    return _text(table)


def changes_table(changes: Sequence[Mapping[str, Any]]) -> str:
    """Each measure of each precision before and after, with the paired interval of the change."""
    table = Table(title="held-out samples, before -> after", title_justify="left")
    for name in ("precision", "measure"):
        table.add_column(name, no_wrap=True)
    for name in ("before", "after", "change", "95 % interval"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("interval by", no_wrap=True)
    for c in changes:
        table.add_row(
            "float" if c["precision"] == "fp32" else c["precision"],
            c["measure"],
            number(c["before"], ".2f"),
            number(c["after"], ".2f"),
            points(c["change"]),
            DASH if c["method"] == "equal outputs" else f"{points(c['lo'])} to {points(c['hi'])}",
            c["method"],
        )
    return _text(table)


def write_outcome_plots(
    document: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], folder: Path
) -> None:
    """Write ``outcome.svg``, ``layers.svg``, ``spectra.svg``, and both diagnoses' plots into ``before``, ``after``.

    Raises:
        StageError: the folder cannot be written.
    """
    for side, diagnosis in (("before", before), ("after", after)):
        write_plots(diagnosis, folder / side, tau=document["tau"])
    flagged = [layer for layer in before["layers"] if layer["flagged"]] or before["layers"]
    later = {layer["name"]: layer for layer in after["layers"]}
    drawings = {
        "outcome.svg": _outcome(document["changes"]),
        "layers.svg": _layers(document["layers"]),
        "spectra.svg": spectra([d for d in flagged if d["name"] in later], later),
    }
    for name, drawing in drawings.items():
        if drawing is not None:
            (folder / name).write_text(_alone(drawing), encoding="utf-8")


def _flags(layer: Mapping[str, Any]) -> str:
    words = {(True, True): "still", (True, False): "no more", (False, True): "only after", (False, False): DASH}
    word = words[bool(layer["flagged_before"]), bool(layer["flagged_after"])]
    return f"k = {layer['k_target']}, {word}" if layer["flagged_before"] else word


def _pair(before: float, after: float, form: str = ".2f") -> str:
    return f"{number(before, form)} -> {number(after, form)}"


def _outcome(changes: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The change at each precision as a dot on its interval, beside a line at 0; before and after at the right."""
    kept = [c for c in changes if c["measure"] == changes[0]["measure"]]
    names = ["float" if c["precision"] == "fp32" else c["precision"] for c in kept]
    notes = [f"{c['before']:.2f} -> {c['after']:.2f}" for c in kept]
    values = [0.0, *(v for c in kept for v in (c["lo"], c["change"], c["hi"]))]
    unit = f"change in points of {kept[0]['measure'].removesuffix(' %')}, with its 95 % interval"
    plot = svg.Rows(names, values, unit, notes=notes, row=30)
    x = plot.scale
    plot.add(svg.line(x(0), 2, x(0), 6 + len(kept) * plot.row, "threshold", "no change"))
    for i, c in enumerate(kept):
        state = "gain" if c["lo"] > 0 else "loss" if c["hi"] < 0 else "none"
        words = f"{names[i]}: {points(c['change'])} ({points(c['lo'])} to {points(c['hi'])})"
        plot.add(svg.line(x(c["lo"]), plot.y(i), x(c["hi"]), plot.y(i), f"interval {state}", words))
        plot.add(svg.mark(x(c["change"]), plot.y(i), "dot", state, words, r=5))
    return plot.render("What conditioning changed at each precision")


def _layers(layers: Sequence[Mapping[str, Any]]) -> Markup | None:
    """The largest output of each listed layer, before and after."""
    kept = [d for d in layers if d["before"]["max_abs_activation"] > 0 and d["after"]["max_abs_activation"] > 0][:_ROWS]
    if not kept:
        return None
    pairs = [(d["before"]["max_abs_activation"], d["after"]["max_abs_activation"]) for d in kept]
    plot = svg.Rows(
        [d["name"] for d in kept],
        [v for pair in pairs for v in pair],
        "largest |output|, logarithmic: bar before, dot after (orange where still flagged)",
        log=True,
        row=20,
        notes=[f"{fmt.trimmed(a, 3)} -> {fmt.trimmed(b, 3)}" for a, b in pairs],
        width=760.0,
    )
    for i, (d, (first, last)) in enumerate(zip(kept, pairs, strict=True)):
        x, y = plot.scale, plot.y(i)
        plot.add(svg.line(x(first), y, x(last), y, "grid"))
        plot.add(svg.mark(x(first), y, "bar", "before", f"{d['name']}: before {first:.3g}", r=5))
        plot.add(svg.mark(x(last), y, "dot", "flagged" if d["flagged_after"] else "gain", f"after {last:.3g}", r=5))
    return plot.render("Largest outputs of the flagged layers before and after conditioning")
