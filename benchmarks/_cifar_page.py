"""The plots of `cifar_vit.py` as one HTML file, drawn with the report's own parts and style."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from s2d_deploy import plots_layers, svg
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.plots import figure
from s2d_deploy.report_schema import ConditionedLayer

_STYLES = (
    ("ring", "p-fp32"),
    ("dot", "p-w4a4"),
    ("diamond", "p-w8a8"),
    ("square", "p-w4a8"),
    ("triangle", "p-w4a16"),
    ("bar", "p-fp32"),
    ("bar", "p-w4a4"),
)
_MORE = Markup("main { padding-top: 20px; }")


def page(document: dict[str, Any]) -> str:
    """The plots as one HTML file, drawn with the report's own parts and style."""
    data = document["data"]
    drawn = [_accuracy_plot(data), _trace_plot(data["pretraining"]["trace"])]
    for arm in ("control", "s2d", "low-tau"):
        run = next((r for r in data["runs"] if r["arm"] == arm), None)
        if run is not None:
            layers = [ConditionedLayer.model_validate(layer) for layer in run["layers"]]
            made = (plots_layers.pcdr_by_layer(layers, data["settings"]["tau"]), plots_layers.spectra(layers))
            drawn.append(
                tag("section", tag("h2", f"Fine-tuning: {arm}, seed {run['seed']}"), join(p for p in made if p))
            )
    style = Markup((files("s2d_deploy") / "report.css").read_text(encoding="utf-8"))
    head = tag("head", tag("meta", charset="utf-8"), tag("title", "S2D on CIFAR-10"), tag("style", style, _MORE))
    title = tag("h1", f"S2D on a pre-LN vision transformer, CIFAR-10 ({document['created'][:10]})")
    words = join(
        tag("p", f"tau {data['settings'][tau]:g}: {data['start'][key]['sentence']}")
        for tau, key in (("tau", "forecast"), ("low_tau", "forecast_low_tau"))
    )
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', title, words, join(drawn))), lang='en')}\n"


def _accuracy_plot(data: dict[str, Any]) -> Markup:
    means = {arm: {name: found["top1"] for name, found in by.items()} for arm, by in data["means"].items()}
    styles = {arm: _STYLES[i % len(_STYLES)] for i, arm in enumerate(means)}
    rows = list(next(iter(means.values())))
    plot = svg.Rows(rows, [v for found in means.values() for v in found.values()], "top-1, %", row=28)
    for arm, found in means.items():
        for name, value in found.items():
            title = f"{arm}, {name}: {value:.2f} %"
            shape, class_ = styles[arm]
            plot.add(svg.mark(plot.scale(value), plot.y(rows.index(name)), shape, class_, title))
    key = svg.legend(*((*styles[arm], arm) for arm in means))
    note = f"Mean over the fine-tuning's seeds, {data['settings']['test']} test images. The axis starts above zero."
    drawing = figure("Accuracy of each arm", plot.render("top-1 by arm and precision"), note=note, key=key)
    return drawing if drawing is not None else Markup("")


def _trace_plot(trace: Sequence[dict[str, Any]]) -> Markup | None:
    names = [("kurtosis", "largest kurtosis of a layer's input"), ("max_abs", "largest output of a layer")]
    if len(trace) < 2:
        return None
    width, bottom, left = 580.0, 240.0, 56.0
    x = svg.spanning([e["step"] for e in trace], left + 6, width - 20, zero=True)
    y = svg.spanning([e[name] for e in trace for name, _ in names], bottom - 8, 14, log=True)
    marks = [
        *(svg.line(x(t), 8, x(t), bottom, "grid") for t in x.ticks()),
        *(svg.text(x(t), bottom + 13, f"{t:g}", "tick", "middle") for t in x.ticks()),
        *(svg.line(left, y(t), width - 14, y(t), "grid") for t in y.ticks()),
        *(svg.text(left - 6, y(t), f"{t:g}", "tick", "end") for t in y.ticks()),
        svg.text((left + width) / 2, bottom + 30, "step of AdamW", "caption", "middle"),
    ]
    for (name, words), shape, class_ in zip(names, ("ring", "dot"), ("before", "after"), strict=True):
        marks.append(svg.path([(x(e["step"]), y(e[name])) for e in trace], f"curve {class_}"))
        marks += [
            svg.mark(x(e["step"]), y(e[name]), shape, class_, f"step {e['step']}: {words} {e[name]:.0f}") for e in trace
        ]
    key = svg.legend(*((s, c, w) for (_, w), s, c in zip(names, ("ring", "dot"), ("before", "after"), strict=True)))
    drawing = svg.canvas(width, bottom + 44, "Kurtosis and largest output over the steps of AdamW", *marks)
    return figure("Outliers over the steps of pre-training", drawing, note="Logarithmic axis.", key=key)
