"""A diagnosis for people: the table of quantized sites, and plots as SVG files that stand alone.

Reads documents (`diagnosis.json`), not objects, so that a stored diagnosis can be shown again. The files carry their
style with them; a browser and an office program show them without anything beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from s2d_deploy import report_format as fmt
from s2d_deploy import svg
from s2d_deploy.attribution import HARMLESS
from s2d_deploy.errors import StageError, message
from s2d_deploy.markup import Markup, tag
from s2d_deploy.tables import DASH, _text, number

_SPECTRA = 9
_ROWS = 80
_POINTS = 60
_STYLE = """
svg { background: #fff; } text { font: 11.5px system-ui, sans-serif; fill: #1a2029; }
.tick, .caption { fill: #566070; font-size: 11px; } .value { font-weight: 600; }
.grid { stroke: #dde1e7; } .threshold { stroke: #a8231f; stroke-dasharray: 4 3; }
.curve { fill: none; stroke: #0072b2; stroke-width: 1.8; } .dot { fill: #0072b2; }
.flagged { fill: #c8500a; } .triplet { fill: #c8500a; } .gain { fill: #00876a; } .neuron { fill: #a85a8c; }
.before { fill: #9aa2ae; } .loss { fill: #a8231f; } .interval { stroke: #6b7482; stroke-width: 2; }
.interval.gain { stroke: #00876a; } .interval.loss { stroke: #a8231f; } .curve.before { fill: none; stroke: #9aa2ae; }
.none { fill: #6b7482; } .unknown { fill: #c98500; } .curve.flagged { fill: none; stroke: #c8500a; }
"""


def sites_table(sites: Sequence[Mapping[str, Any]]) -> str:
    """Quantized activation sites (documents of `attribution.SiteAttribution`), worst first; harmless ones counted.

    Error is that of 4 bits over the variance within channels; the shares say how much of its excess goes with a cause.
    Harm is what the site alone, quantized, does to the model's output, as a share of the sum over all sites.
    """
    harm = sum(s.get("harm") or 0.0 for s in sites)
    table = Table(title="quantized sites that need repair at 4 bits, and what makes them", title_justify="left")
    table.add_column("site", overflow="fold")
    table.add_column("behind", no_wrap=True)
    for name in ("max", "error", "harm", "S2D reaches", "triplets", "gain", "channels"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("cause", no_wrap=True)
    bad = sorted((s for s in sites if s["error"] > HARMLESS), key=lambda s: -s["error"])
    for s in bad:
        table.add_row(
            s["site"],
            s["kind"],
            number(s["max_abs"], ".2f"),
            number(s["error"], ".3f"),
            DASH if s.get("harm") is None or not harm else f"{s['harm'] / harm:.1%}",
            _percent(s["flagged"]),
            _percent(s["triplets"]),
            _percent(s["gain"]),
            _percent(s["single"]),
            s["verdict"],
        )
    rest = len(sites) - len(bad)
    theirs = sum(s.get("harm") or 0.0 for s in sites if s["error"] <= HARMLESS)
    what = f"; they do {theirs / harm:.0%} of the harm to the output" if harm and rest else ""
    return (_text(table) if bad else "") + f"{rest} of {len(sites)} quantized sites need no repair at 4 bits{what}.\n"


def write_plots(document: Mapping[str, Any], folder: Path, *, tau: float | None = None) -> list[Path]:
    """Write ``spectra.svg``, ``pcdr.svg`` and, where sites were attributed, ``sites.svg`` into `folder`.

    Args:
        document: of ``diagnosis.json``: layers, and sites where there are some.
        folder: made when missing.
        tau: drawn into the PCDR plot.

    Returns:
        The files.

    Raises:
        StageError: the folder cannot be written.
    """
    plots: dict[str, Callable[[], Markup | None]] = {
        "spectra.svg": lambda: spectra(document["layers"]),
        "pcdr.svg": lambda: _pcdr(document["layers"], tau),
        "sites.svg": lambda: _sites(document.get("sites", [])),
    }
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, draw in plots.items():
            drawing = draw()
            if drawing is not None:
                path = folder / name
                path.write_text(_alone(drawing), encoding="utf-8")
                written.append(path)
    except OSError as error:
        raise StageError(
            message(f"the plots cannot be written into {folder}: {error}", fix="choose another --plots folder")
        ) from error
    return written


def _percent(without: Mapping[str, Any] | None) -> str:
    return DASH if without is None else f"{without['share']:.0%}"


def _alone(drawing: Markup) -> str:
    """The drawing as a file of its own: with a namespace and its style."""
    head, _, rest = str(drawing).partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_STYLE}</style>{rest}\n'


def spectra(layers: Sequence[Mapping[str, Any]], later: Mapping[str, Mapping[str, Any]] | None = None) -> Markup | None:
    """Singular values over their index, both logarithmic: the layers with the largest s_1 over the median.

    With `later`, documents of the same layers by name, these are drawn over the first, which turn grey.
    """

    def dominance(layer: Mapping[str, Any]) -> float:
        values = layer["singular_values"]
        median = values[len(values) // 2]
        return float(values[0] / median) if median > 0 else 0.0

    chosen = sorted((d for d in layers if d["singular_values"][0] > 0), key=dominance, reverse=True)[:_SPECTRA]
    if not chosen:
        return None
    width, height, columns = 340.0, 200.0, 3
    panels = []
    for number_, layer in enumerate(chosen):
        row, column = divmod(number_, columns)
        drawn = _panel(layer, width, height, None if later is None else later[layer["name"]])
        inner = tag("g", *drawn, transform=f"translate({column * width:g},{row * height:g})")
        panels.append(inner)
    rows = (len(chosen) + columns - 1) // columns
    across = min(len(chosen), columns)
    return svg.canvas(width * across, height * rows, "Singular values by layer", *panels)


def _panel(
    layer: Mapping[str, Any], width: float, height: float, later: Mapping[str, Any] | None = None
) -> list[Markup]:
    curve = _curve(layer)
    over = [] if later is None else _curve(later)
    left, bottom = 44.0, height - 40
    x = svg.Scale(1, max(curve[-1][0], 2), left + 6, width - 12, log=True)
    y = svg.spanning([v for _, v in curve + over], bottom - 6, 26, log=True)
    state = "before" if over else "flagged" if layer["flagged"] else ""
    return [
        svg.text(left, 12, svg.shorten(layer["name"], 40), "value"),
        *(svg.line(left, y(v), width - 8, y(v), "grid") for v in y.ticks(4)),
        *(svg.text(left - 5, y(v), fmt.trimmed(v, 2), "tick", "end") for v in y.ticks(4)),
        *(svg.text(x(i), bottom + 10, fmt.trimmed(i, 3), "tick", "middle") for i in x.ticks(4)),
        svg.text((left + width) / 2, bottom + 26, "index of the singular value", "caption", "middle"),
        *_drawn(curve, x, y, state, "before: " if over else ""),
        *_drawn(over, x, y, "flagged", "after: "),
    ]


def _curve(layer: Mapping[str, Any]) -> list[tuple[int, float]]:
    """(index, singular value): all of the first, then about `_POINTS` of the rest, the last included."""
    values = [v for v in layer["singular_values"] if v > 0]
    step = max(1, len(values) // _POINTS)
    return [(i + 1, v) for i, v in enumerate(values) if i < 8 or i % step == 0 or i == len(values) - 1]


def _drawn(curve: Sequence[tuple[int, float]], x: svg.Scale, y: svg.Scale, state: str, word: str) -> list[Markup]:
    if not curve:
        return []
    line = svg.path([(x(i), y(v)) for i, v in curve], f"curve {state}".strip())
    return [line, *(svg.mark(x(i), y(v), "dot", state, f"{word}s{i}: {fmt.number(v)}", r=3) for i, v in curve[:3])]


def _pcdr(layers: Sequence[Mapping[str, Any]], tau: float | None) -> Markup | None:
    ranked = sorted(layers, key=lambda d: -max(d["pcdr"]))[:_ROWS]
    kept = [d for d in layers if any(d is r for r in ranked)]
    if not kept:
        return None
    plot = svg.Rows(
        [d["name"] for d in kept], [1.0], "PCDR 1 to k_max at the largest outputs", fixed=(0.0, 1.0), row=17
    )
    for i, d in enumerate(kept):
        y = plot.y(i)
        plot.add(svg.line(plot.scale(d["pcdr"][0]), y, plot.scale(d["pcdr"][-1]), y, "grid"))
        for k, value in enumerate(d["pcdr"], start=1):
            state = "flagged" if d["flagged"] and k == d["k_target"] else "none"
            plot.add(svg.mark(plot.scale(value), y, "dot", state, f"{d['name']}: PCDR_{k} = {value:.3f}", r=3.6))
    if tau is not None:
        plot.add(svg.line(plot.scale(tau), 2, plot.scale(tau), 6 + len(kept) * plot.row, "threshold", f"tau = {tau:g}"))
    return plot.render("PCDR by layer; flagged layers in orange at k_target")


def _sites(sites: Sequence[Mapping[str, Any]]) -> Markup | None:
    kept = [s for s in sites if s["error"] > 0]
    kept = [s for s in kept if any(s is t for t in sorted(kept, key=lambda s: -s["error"])[:_ROWS])]
    if not kept:
        return None
    plot = svg.Rows(
        [s["site"] for s in kept],
        [s["error"] for s in kept] + [HARMLESS],
        "error at 4 bits over the variance, logarithmic",
        log=True,
        row=17,
        notes=[s["verdict"] for s in kept],
        width=760.0,
    )
    for i, s in enumerate(kept):
        facts = ", ".join(f"{c} {_percent(s[c])}" for c in ("flagged", "triplets", "gain", "single"))
        harm = "" if s.get("harm") is None else f", harm {s['harm']:.2g} of the output's power"
        title = f"{s['site']}: error {s['error']:.3f}, max {s['max_abs']:.2f}{harm} ({facts})"
        plot.add(svg.mark(plot.scale(s["error"]), plot.y(i), "dot", s["verdict"], title, r=4))
    harmless = plot.scale(HARMLESS)
    plot.add(svg.line(harmless, 2, harmless, 6 + len(kept) * plot.row, "threshold", f"harmless below {HARMLESS:g}"))
    return plot.render("Quantized sites: 4-bit error and what makes it")
