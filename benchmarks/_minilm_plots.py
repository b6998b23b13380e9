"""Plots of `minilm_s2d.py`: accuracy by precision and arm, and the flagged layers before and after. SVG files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from s2d_deploy import svg
from s2d_deploy.markup import Markup, tag

# Shape and colour of an arm: told apart without colour too, and safe for the common colour-vision deficiencies.
_LOOKS = {
    "original": ("square", "#6b7482"),
    "control": ("ring", "#0072b2"),
    "s2d": ("dot", "#c8500a"),
    "s2d-coupled": ("diamond", "#a85a8c"),
    "s2d-sites": ("triangle", "#00876a"),
    "centre": ("square", "#c98500"),
    "insert": ("ring", "#c98500"),
    "bypass": ("square", "#2a9fd6"),
}
_OTHER = ("diamond", "#7a6f2b")
_METRICS = {
    "cosine": "Mean cosine to the original in FP32",
    "neighbour": "Sentences with the same nearest neighbour, %",
}
_SEEDS = "mean of the seeds; the line goes from the least to the largest"
_STYLE = """
svg { background: #fff; } text { font: 12px system-ui, sans-serif; fill: #1a2029; }
.tick, .caption, .value { fill: #566070; font-size: 11px; } .title { font-weight: 600; font-size: 13px; }
.grid { stroke: #dde1e7; } .half { stroke: #a8231f; stroke-dasharray: 4 3; }
.curve, .whisker { fill: none; stroke-width: 1.6; } .ring { fill: #fff; stroke-width: 1.8; }
"""


def write(arms: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]], stem: Path) -> list[Path]:
    """Draw ``<stem>-cosine.svg``, ``-neighbour.svg``, ``-layers.svg`` and ``-spectra.svg``.

    Args:
        arms: `minilm_s2d.summary` of each arm.
        runs: the arms' runs; the first seed's spectra are drawn.
        stem: path without its ending.

    Returns:
        The files; a plot without anything to show is left out.
    """
    trained = {name: found[0] for name, found in runs.items() if name != "original" and found[0]["layers"]}
    looks = {name: _LOOKS.get(name, _OTHER) for name in arms}
    drawn = {
        **{metric: _by_precision(arms, looks, metric) for metric in _METRICS},
        "layers": _layers({name: arms[name] for name in trained}, looks, runs),
        "spectra": _spectra(trained, looks),
    }
    written = []
    for name, drawing in drawn.items():
        if drawing is not None:
            path = stem.with_name(f"{stem.name}-{name}.svg")
            path.write_text(_alone(drawing, looks), encoding="utf-8")
            written.append(path)
    return written


def _alone(drawing: Markup, looks: dict[str, tuple[str, str]]) -> str:
    colours = "".join(f".a{i} {{ fill: {c}; stroke: {c}; }}\n" for i, (_, c) in enumerate(looks.values()))
    head, _, rest = str(drawing).partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{colours}{_STYLE}</style>{rest}\n'


def _key(names: Iterable[str], looks: dict[str, tuple[str, str]], x: float, y: float) -> list[Markup]:
    """A legend in one line."""
    marks = []
    order = list(looks)
    for name in names:
        marks += [svg.mark(x, y, looks[name][0], f"a{order.index(name)}", r=4.5), svg.text(x + 10, y, name)]
        x += 34 + 7.0 * len(name)
    return marks


def _by_precision(arms: dict[str, dict[str, Any]], looks: dict[str, tuple[str, str]], metric: str) -> Markup:
    """One panel for each range method; precisions across, arms side by side, whiskers from least to largest seed."""
    keys = list(next(iter(arms.values()))["quantized"])
    methods = list(dict.fromkeys(key.split("/")[1] for key in keys))
    precisions = list(dict.fromkeys(key.split("/")[0] for key in keys))
    values = [v for s in arms.values() for key in keys for v in s["quantized"][key][metric].values()]
    columns = ["float", *precisions]
    top = 1.0 if metric == "cosine" else 100.0
    step, left, height = max(26.0 + 11.0 * len(arms), 72.0), 44.0, 330.0
    panel = left + step * len(columns) + 10
    y = svg.Scale(min(0.0 if min(values) < 0.45 * top else min(values) - 0.05 * top, *values), top, height - 46, 62)
    marks: list[Markup] = [svg.text(8, 14, _METRICS[metric], "title"), *_key(arms, looks, 14, 36)]
    order = list(looks)
    for number, method in enumerate(methods):
        x0 = number * panel
        marks += [
            svg.text(
                x0 + left + step * len(columns) / 2, height - 8, f"{method} ranges; {_SEEDS}", "caption", "middle"
            ),
            *(svg.line(x0 + left, y(t), x0 + left + step * len(columns), y(t), "grid") for t in y.ticks()),
            *(svg.text(x0 + left - 6, y(t), f"{t:g}", "tick", "end") for t in y.ticks()),
        ]
        for column, precision in enumerate(columns):
            middle = x0 + left + step * (column + 0.5)
            marks.append(svg.text(middle, height - 28, precision, "label", "middle"))
            for i, (name, s) in enumerate(arms.items()):
                v = s["float"][metric] if precision == "float" else s["quantized"][f"{precision}/{method}"][metric]
                x = middle + 11.0 * (i - (len(arms) - 1) / 2)
                class_ = f"a{order.index(name)}"
                title = f"{name}, {precision}, {method}: {v['mean']:.4g} [{v['min']:.4g}, {v['max']:.4g}]"
                marks += [
                    svg.line(x, y(v["min"]), x, y(v["max"]), f"whisker {class_}"),
                    svg.mark(x, y(v["mean"]), looks[name][0], class_, title, r=3.4),
                ]
    width = max(panel * len(methods), 30 + sum(34 + 7.0 * len(n) for n in arms))
    return svg.canvas(width, height, f"{_METRICS[metric]} by precision and arm", *marks)


def _layers(
    arms: dict[str, dict[str, Any]], looks: dict[str, tuple[str, str]], runs: dict[str, list[dict[str, Any]]]
) -> Markup | None:
    """Largest output and s_max of the flagged layers, after over before, with the value before at the right."""
    layers = list(dict.fromkeys(layer for s in arms.values() for layer in s["sigma_max_ratio"]))
    if not layers:
        return None
    kinds = (("max_abs_ratio", "max_abs_activation", "largest |output|"), ("sigma_max_ratio", "sigma_max", "s_max"))
    order, row, top = list(looks), 14.0 + 11.0 * len(arms), 56.0
    gutter = 7.0 * max(len(layer) for layer in layers) + 20
    bottom = top + row * len(layers)
    high = max([1.0, *(v["max"] for s in arms.values() for k, *_ in kinds for v in s[k].values())])
    marks: list[Markup] = [*_key(arms, looks, 14, 14)]
    for number, (ratio, key, words) in enumerate(kinds):
        start = gutter + number * 330
        x = svg.Scale(0.0, high, start, start + 240)
        marks += [
            svg.text((start + start + 240) / 2, 40, f"{words}, after over before", "title", "middle"),
            *(svg.line(x(t), top, x(t), bottom, "grid") for t in x.ticks()),
            *(svg.text(x(t), bottom + 12, f"{t:g}", "tick", "middle") for t in x.ticks()),
            svg.line(x(0.5), top, x(0.5), bottom, "half", "halved"),
        ]
        for j, layer in enumerate(layers):
            if not number:
                marks.append(svg.text(gutter - 10, top + row * (j + 0.5), layer, "label", "end"))
            before = next(r["layers"][layer]["before"][key] for f in runs.values() for r in f if layer in r["layers"])
            marks.append(svg.text(start + 248, top + row * (j + 0.5), f"was {before:.3g}", "value"))
            for i, (name, s) in enumerate(arms.items()):
                if layer not in s[ratio]:
                    continue
                v, y = s[ratio][layer], top + row * (j + 0.5) + 11.0 * (i - (len(arms) - 1) / 2)
                class_ = f"a{order.index(name)}"
                title = f"{name}, {layer}: {v['mean']:.3f} [{v['min']:.3f}, {v['max']:.3f}]"
                marks += [
                    svg.line(x(v["min"]), y, x(v["max"]), y, f"whisker {class_}"),
                    svg.mark(x(v["mean"]), y, looks[name][0], class_, title, r=3.4),
                ]
    return svg.canvas(gutter + 2 * 330, bottom + 24, "Flagged layers, after over before", *marks)


def _spectra(trained: dict[str, dict[str, Any]], looks: dict[str, tuple[str, str]]) -> Markup | None:
    """Singular values of each flagged layer: the original's and each arm's after, first seed."""
    layers = list(dict.fromkeys(layer for run in trained.values() for layer in run["layers"]))
    if not layers:
        return None
    across, width, height, head = 3, 330.0, 220.0, 30.0
    names = ["original", *trained] if "original" in looks else list(trained)
    panels = []
    for number, layer in enumerate(layers):
        row, column = divmod(number, across)
        series = {name: run["layers"][layer]["after"] for name, run in trained.items() if layer in run["layers"]}
        if "original" in looks:
            series = {"original": next(iter(trained.values()))["layers"][layer]["before"], **series}
        where = f"translate({column * width:g},{head + row * height:g})"
        panels.append(tag("g", *_panel(layer, series, looks, width, height), transform=where))
    rows = -(-len(layers) // across)
    drawn = [*_key(names, looks, 14, 14), *panels]
    return svg.canvas(width * min(across, len(layers)), head + rows * height, "Spectra before and after", *drawn)


def _panel(
    layer: str, series: dict[str, dict[str, Any]], looks: dict[str, tuple[str, str]], width: float, height: float
) -> list[Markup]:
    left, bottom, order = 44.0, height - 40, list(looks)
    shown = {name: _curve(state["singular_values"]) for name, state in series.items()}
    points = [p for curve in shown.values() for p in curve]
    x = svg.Scale(1, max(i for i, _ in points), left + 8, width - 14, log=True)
    y = svg.spanning([v for _, v in points], bottom - 6, 26, zero=True)
    marks = [
        svg.text(left, 12, svg.shorten(layer, 40), "title"),
        *(svg.line(left, y(t), width - 8, y(t), "grid") for t in y.ticks(5)),
        *(svg.text(left - 6, y(t), f"{t:g}", "tick", "end") for t in y.ticks(5)),
        *(svg.text(x(t), bottom + 10, f"{t:g}", "tick", "middle") for t in x.ticks(4)),
        svg.text((left + width) / 2, bottom + 26, "index of the singular value", "caption", "middle"),
    ]
    for name, curve in shown.items():
        class_ = f"a{order.index(name)}"
        marks.append(svg.path([(x(i), y(v)) for i, v in curve], f"curve {class_}"))
        marks += [
            svg.mark(x(i), y(v), looks[name][0], class_, f"{name}, s_{i} = {v:.3g}", r=3.2) for i, v in curve if i <= 4
        ]
    return marks


def _curve(values: Sequence[float]) -> list[tuple[int, float]]:
    """(index from 1, value): the first eight, then every few percent of the index."""
    chosen, last = [], 0.0
    for i, value in enumerate(values, start=1):
        if i <= 8 or i >= 1.06 * last or i == len(values):
            chosen.append((i, value))
            last = i
    return chosen
