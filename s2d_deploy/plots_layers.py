"""Plots of layers, before and after conditioning: singular spectra, PCDR, activation ranges. Inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from s2d_deploy import report_format as fmt
from s2d_deploy import svg
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.plots import figure
from s2d_deploy.report_schema import ActivationRange, ConditionedLayer, Spread
from s2d_deploy.report_summary import pcdr

_ROWS = 40
_POINTS = 80
_SPECTRA = 6


def key() -> Markup:
    """What before and after look like."""
    return svg.legend(("ring", "before", "before"), ("dot", "after", "after"))


def spectra(layers: Sequence[ConditionedLayer]) -> Markup | None:
    """Singular values of the layers whose spectrum changed most, before and after."""
    changed = [(change, layer) for layer in layers if (change := spectrum_change(layer)) is not None]
    changed.sort(key=lambda pair: -pair[0])
    if not changed:
        return None
    panels = [
        tag("div", tag("h4", tag("span", layer.name, title=layer.name)), _panel(layer), class_="panel")
        for _, layer in changed[:_SPECTRA]
    ]
    note = (
        f"Both axes are logarithmic. {len(panels)} of {len(changed)} layers, those whose singular values changed most."
    )
    return figure(
        "Singular values before and after",
        tag("div", join(panels), class_="panels"),
        note=note,
        key=key(),
        class_="wide",
    )


def spectrum_change(layer: ConditionedLayer) -> float | None:
    """The largest change of a singular value, as |ln(after / before)|; None without both spectra."""
    if layer.before is None or layer.after is None:
        return None
    pairs = zip(layer.before.singular_values, layer.after.singular_values, strict=False)
    # The small end of a spectrum is noise, and dominates a ratio; from 1 % of the top on it is the matrix.
    floor = 0.01 * max((v for v in layer.before.singular_values if v is not None), default=0.0)
    logs = [abs(math.log(b / a)) for a, b in pairs if a is not None and b is not None and a > floor and b > 0]
    return max(logs, default=None)


def spectrum(layer: ConditionedLayer) -> Markup | None:
    """The singular values of one layer; None without any."""
    states = (layer.before, layer.after)
    return _panel(layer) if any(v for s in states if s for v in s.singular_values) else None


def _panel(layer: ConditionedLayer) -> Markup:
    width, height, left, bottom = 340.0, 190.0, 46.0, 158.0
    series = [
        ("before", _curve(layer.before.singular_values if layer.before else [])),
        ("after", _curve(layer.after.singular_values if layer.after else [])),
    ]
    points = [p for _, curve in series for p in curve]
    x = svg.Scale(1, max(max((i for i, _ in points), default=2), 2), left + 6, width - 14, log=True)
    y = svg.spanning([v for _, v in points], bottom - 6, 10, log=True)
    marks = [
        *(svg.line(left, y(v), width, y(v), "grid") for v in y.ticks(4)),
        *(svg.text(left - 5, y(v), fmt.trimmed(v, 2), "tick", "end") for v in y.ticks(4)),
        *(svg.text(x(i), bottom + 10, fmt.trimmed(i, 3), "tick", "middle") for i in x.ticks(4)),
        svg.text((left + width) / 2, bottom + 25, "index of the singular value", "caption", "middle"),
    ]
    for name, curve in series:
        marks.append(svg.path([(x(i), y(v)) for i, v in curve], f"curve {name}"))
    for name, curve in series:
        shape = "ring" if name == "before" else "dot"
        marks += [
            svg.mark(x(i), y(v), shape, name, f"\N{GREEK SMALL LETTER SIGMA}{i} {name}: {fmt.number(v)}", r=3)
            for i, v in curve[:6]
        ]
    return svg.canvas(width, height, f"Singular values of {layer.name} before and after conditioning", *marks)


def _curve(values: Sequence[float | None]) -> list[tuple[int, float]]:
    """(index from 1, value) at no more than `_POINTS` indices, evenly spread on a logarithmic axis."""
    n = len(values)
    if n > _POINTS:
        chosen = sorted({round(math.exp(math.log(n) * k / (_POINTS - 1))) for k in range(_POINTS)})
    else:
        chosen = list(range(1, n + 1))
    return [(i, v) for i in chosen if (v := values[i - 1]) is not None and v > 0]


def sparkline(layer: ConditionedLayer) -> Markup | None:
    """The layer's spectrum as a small drawing for a table cell; None without one."""
    before = _curve(layer.before.singular_values if layer.before else [])[::3]
    after = _curve(layer.after.singular_values if layer.after else [])[::3]
    if len(before) + len(after) < 2:
        return None
    both = before + after
    x = svg.Scale(1, max(max(i for i, _ in both), 2), 2, 88, log=True)
    y = svg.spanning([v for _, v in both], 23, 3, log=True)
    curves = [
        svg.path([(x(i), y(v)) for i, v in curve], f"curve {name}")
        for name, curve in (("before", before), ("after", after))
        if curve
    ]
    return svg.canvas(90, 26, f"Spectrum of {layer.name}", *curves, class_="spark")


def pcdr_by_layer(layers: Sequence[ConditionedLayer], tau: float | None) -> Markup | None:
    """PCDR of each layer before and after, with the threshold where the recipe names it."""
    rows = []
    for layer in layers:
        before = pcdr(layer, layer.before) if layer.before else None
        after = pcdr(layer, layer.after) if layer.after else None
        if before is not None or after is not None:
            rows.append(
                (layer.name, before, after, f"PCDR{layer.k_target or 1}" + (", flagged" if layer.flagged else ""))
            )
    kept = _largest(rows)
    # PCDR passes 1 where later triplets cancel a part of the leading ones.
    top = max([1.0, *(v for row in kept for v in row[1:3] if v is not None)])
    plot = _dumbbells(kept, "PCDR at the layer's target rank (rank 1 where none was set)", log=False, fixed=(0.0, top))
    if plot is None:
        return None
    if tau is not None and 0 <= tau <= 1:
        limit = plot.scale(tau)
        plot.add(svg.line(limit, 2, limit, 6 + len(kept) * plot.row, "threshold", f"tau = {fmt.trimmed(tau)}"))
    note = _shown(kept, rows, "layers") + (f" The dashed line is tau = {fmt.trimmed(tau)}." if tau is not None else "")
    return figure("PCDR by layer", plot.render("PCDR by layer before and after conditioning"), note=note, key=key())


def ranges(sites: Sequence[ActivationRange]) -> Markup | None:
    """Largest absolute activation of each quantized site before and after."""
    rows = []
    for site in sites:
        before = site.before.absmax if site.before else None
        after = site.after.absmax if site.after else None
        if (before or 0) > 0 or (after or 0) > 0:
            old, new = site.before or Spread(), site.after or Spread()
            facts = [
                f"p99.9 {fmt.number(old.p999, 3)} → {fmt.number(new.p999, 3)}",
                f"std {fmt.number(old.std, 3)} → {fmt.number(new.std, 3)}",
            ]
            rows.append((site.site, before or None, after or None, ", ".join(facts)))
    kept = _largest(rows)
    plot = _dumbbells(kept, "largest absolute activation, logarithmic", log=True)
    if plot is None:
        return None
    return figure(
        "Activation ranges",
        plot.render("Activation ranges before and after conditioning"),
        note=_shown(kept, rows, "sites"),
        key=key(),
    )


_Row = tuple[str, float | None, float | None, str]


def _largest(rows: list[_Row]) -> list[_Row]:
    """The rows with the largest values where there are too many to draw, in the order of the document."""
    ranked = sorted(range(len(rows)), key=lambda i: -max(v for v in rows[i][1:3] if v is not None))
    return [rows[i] for i in sorted(ranked[:_ROWS])]


def _shown(kept: Sequence[_Row], rows: Sequence[_Row], noun: str) -> str:
    if len(kept) == len(rows):
        return f"All {len(rows)} {noun}, in the model's order."
    return f"The {len(kept)} of {len(rows)} {noun} with the largest values, in the model's order."


def _dumbbells(rows: list[_Row], unit: str, *, log: bool, fixed: tuple[float, float] | None = None) -> svg.Rows | None:
    if not rows:
        return None
    values = [v for _, a, b, _ in rows for v in (a, b) if v is not None]
    plot = svg.Rows([r[0] for r in rows], values, unit, log=log, fixed=fixed, row=17)
    for i, (name, before, after, facts) in enumerate(rows):
        y = plot.y(i)
        title = f"{name}: {fmt.number(before, 3)} → {fmt.number(after, 3)} ({facts})"
        if before is not None and after is not None:
            plot.add(svg.line(plot.scale(before), y, plot.scale(after), y, "link"))
        if before is not None:
            plot.add(svg.mark(plot.scale(before), y, "ring", "before", title, r=4.2))
        if after is not None:
            plot.add(svg.mark(plot.scale(after), y, "dot", "after", title, r=3.8))
    return plot
