"""Plots of results: accuracy, latency, accuracy against latency, executed precision. Inline SVG.

A plot shows what was measured and nothing else: a result without the figure has no row. Marks differ
in shape as well as in colour (the palette is safe for the common colour-vision deficiencies).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from s2d_deploy import report_format as fmt
from s2d_deploy import svg
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.report_schema import PRECISIONS, Latency, Metric, Result
from s2d_deploy.report_summary import higher_is_better

Labelled = Sequence[tuple[str, Result]]

_SAMPLES_DRAWN = 200
_SHAPES = ("dot", "square", "diamond", "triangle")
_EXECUTED = ("int4", "nvfp4", "int8", "fp8", "float16", "bfloat16", "float32")


def figure(
    title: str, plot: str | None, *, note: str = "", key: Markup | None = None, class_: str = ""
) -> Markup | None:
    """A plot with its title, legend and a sentence on how to read it; None without a plot."""
    if plot is None:
        return None
    caption = tag("figcaption", tag("h3", title), tag("p", note) if note else None)
    return tag("figure", caption, key, tag("div", plot, class_="scroll"), class_=f"card {class_}".strip())


def colour(precision: str) -> str:
    """The CSS class of a precision; never a text from the document."""
    return f"p-{precision}" if precision in PRECISIONS else "p-other"


def accuracy(results: Labelled) -> list[Markup]:
    """The metric by target and precision: measured, with float and simulated as references. One plot per metric."""
    names = dict.fromkeys(r.metric.name or "metric" for _, r in results if r.metric and _metric_values(r.metric))
    return [plot for name in names if (plot := _accuracy(name, results)) is not None]


def _metric_values(m: Metric) -> list[float]:
    return [v for v in (m.float_model, m.simulated, m.measured) if v is not None]


def _accuracy(name: str, results: Labelled) -> Markup | None:
    rows = [(label, r, r.metric) for label, r in results if r.metric and (r.metric.name or "metric") == name]
    rows = [(label, r, m) for label, r, m in rows if _metric_values(m)]
    values = [v for _, _, m in rows for v in _metric_values(m)]
    samples = sorted({m.n for _, _, m in rows if m.n})
    notes = [fmt.number(m.measured) for _, _, m in rows]
    on = f", {' / '.join(fmt.count(n) for n in samples)} samples" if samples else ""
    plot = svg.Rows([label for label, _, _ in rows], values, f"{name}{on}", notes=notes)
    for i, (label, result, m) in enumerate(rows):
        y, x = plot.y(i), plot.scale
        if m.float_model is not None and m.measured is not None:
            plot.add(svg.line(x(m.float_model), y, x(m.measured), y, "link"))
        if m.float_model is not None:
            plot.add(svg.mark(x(m.float_model), y, "bar", "ref", f"{label}: float {fmt.number(m.float_model)}"))
        if m.simulated is not None:
            title = f"{label}: simulated {fmt.number(m.simulated)}"
            plot.add(svg.mark(x(m.simulated), y, "ring", colour(result.precision), title, r=7))
        if m.measured is not None:
            change = f" ({fmt.signed(m.measured - m.float_model)} to float)" if m.float_model is not None else ""
            title = f"{label}: measured {fmt.number(m.measured)}{change}"
            plot.add(svg.mark(x(m.measured), y, "dot", colour(result.precision), title, r=4))
    key = svg.legend(("bar", "ref", "float"), ("ring", "p-neutral", "simulated"), ("dot", "p-neutral", "measured"))
    note = "A dot inside its ring: the runtime does what the simulation promised. The axis does not start at zero."
    return figure(
        f"{name[:1].upper()}{name[1:]} by target and precision",
        plot.render(f"{name} by target and precision"),
        note=note,
        key=key,
    )


def latency(results: Labelled) -> Markup | None:
    """Latency: median, 90th and 99th percentile, and the samples."""
    rows = [(label, r, r.latency_ms) for label, r in results if r.latency_ms and r.latency_ms.p50 is not None]
    if not rows:
        return None
    values = [v for _, _, t in rows for v in (t.p50, t.p99, *t.samples) if v is not None]
    positive = [v for v in values if v > 0]
    log = bool(positive) and max(positive) > 12 * min(positive)
    notes = [fmt.milliseconds(t.p50) + (" !" if t.stable is False else "") for _, _, t in rows]
    unit = "milliseconds for one batch" + (", logarithmic" if log else "")
    plot = svg.Rows([n for n, _, _ in rows], values, unit, log=log, zero=True, notes=notes, row=30)
    for i, (label, result, t) in enumerate(rows):
        _latency_row(plot, plot.y(i), label, colour(result.precision), t)
    key = svg.legend(("bar", "p-neutral", "p50"), ("square", "p-neutral", "p90"), ("diamond", "p-neutral", "p99"))
    note = "Faint dots are the samples. ! marks a run whose timing was not stable."
    return figure("Latency", plot.render("Latency by target and precision"), note=note, key=key)


def _latency_row(plot: svg.Rows, y: float, label: str, class_: str, t: Latency) -> None:
    x = plot.scale
    samples = _thin([v for v in t.samples if v is not None])
    if samples:
        # Spread the dots over the row by their order, so that drift over time would show as a slope.
        step = 14 / max(len(samples) - 1, 1)
        plot.add(svg.specks(((x(v), y - 7 + k * step) for k, v in enumerate(samples)), f"specks {class_}"))
    low = t.min if t.min is not None else t.p50
    high = next((v for v in (t.p99, t.p90, t.p50) if v is not None), None)
    if low is not None and high is not None:
        plot.add(svg.line(x(low), y, x(high), y, f"whisker {class_}"))
    facts = [
        f"batch {t.batch}" if t.batch is not None else None,
        f"{t.threads} threads" if t.threads is not None else None,
        f"{len(t.samples)} samples" if t.samples else None,
        "not stable" if t.stable is False else None,
    ]
    about = ", ".join(f for f in facts if f)
    for shape, name, value, r in (
        ("diamond", "p99", t.p99, 3.2),
        ("square", "p90", t.p90, 3.2),
        ("bar", "p50", t.p50, 5),
    ):
        if value is not None:
            title = f"{label}: {name} {fmt.milliseconds(value)}" + (f" ({about})" if about else "")
            plot.add(svg.mark(x(value), y, shape, class_, title, r=r))


def _thin(values: list[float]) -> list[float]:
    """At most `_SAMPLES_DRAWN` values, evenly picked in their order."""
    step = max(1, -(-len(values) // _SAMPLES_DRAWN))
    return values[::step]


def tradeoff(results: Labelled) -> list[Markup]:
    """Measured metric against p50, with the Pareto front: a plot for each metric and batch size, which do not mix."""
    kinds: dict[tuple[str, int | None], list[_Point]] = {}
    for label, r in results:
        t, m = r.latency_ms, r.metric
        if t and m and t.p50 is not None and m.measured is not None:
            kinds.setdefault((m.name or "metric", t.batch), []).append((t.p50, m.measured, label, r))
    drawn = [_tradeoff(name, batch, points, len(kinds) > 1) for (name, batch), points in kinds.items()]
    return [plot for plot in drawn if plot is not None]


_Point = tuple[float, float, str, Result]


def _tradeoff(name: str, batch: int | None, points: list[_Point], several: bool) -> Markup | None:
    if len(points) < 2:
        return None
    upward = higher_is_better(points[0][3].metric or Metric())
    width, left, bottom = 580.0, 62.0, 286.0
    times = [p[0] for p in points]
    x = svg.spanning(times, left + 6, width - 20, log=min(times) > 0 and max(times) > 12 * min(times), zero=True)
    y = svg.spanning([p[1] for p in points], bottom - 8, 20)
    front = pareto([(t, v) for t, v, _, _ in points], upward)
    unit = "p50, milliseconds for one batch" + (", logarithmic" if x.log else "")
    marks = [
        *(svg.line(x(t), 8, x(t), bottom, "grid") for t in x.ticks(7)),
        *(svg.text(x(t), bottom + 13, fmt.trimmed(t), "tick", "middle") for t in x.ticks(7)),
        *(svg.line(left, y(v), width - 14, y(v), "grid") for v in y.ticks()),
        *(svg.text(left - 6, y(v), fmt.trimmed(v), "tick", "end") for v in y.ticks()),
        svg.text((left + width) / 2, bottom + 32, unit, "caption", "middle"),
        svg.path(_stairs([(x(t), y(v)) for t, v in front]), "front"),
    ]
    targets = list(dict.fromkeys(r.target for *_, r in points))
    shapes = {target: _SHAPES[i % len(_SHAPES)] for i, target in enumerate(targets)}
    for time, value, label, r in points:
        best = " · on the Pareto front" if (time, value) in front else ""
        loose = " · timing not stable" if r.latency_ms and r.latency_ms.stable is False else ""
        title = f"{label}: {fmt.milliseconds(time)}, {name} {fmt.number(value)}{best}{loose}"
        marks.append(svg.mark(x(time), y(value), shapes[r.target], colour(r.precision), title, r=6))
    on_front = [(x(t), y(v), label) for t, v, label, _ in points if (t, v) in front]
    marks += _names(on_front, [(x(t), y(v)) for t, v, _, _ in points], (left, width))
    precisions = list(dict.fromkeys(r.precision for *_, r in points))
    key = svg.legend(
        *((shapes[target], "p-neutral hollow", target) for target in targets),
        *(("dot", colour(p), p) for p in precisions),
    )
    way = "Up" if upward else "Down"
    note = f"{way} and left is better. The line joins the results that no other result beats in both (Pareto front)."
    title = f"{name[:1].upper()}{name[1:]} against latency"
    if several and batch is not None:
        title += f", batch {batch}"
    return figure(title, svg.canvas(width, bottom + 44, title, *marks), note=note, key=key)


def _names(
    named: Sequence[tuple[float, float, str]], marks: Sequence[tuple[float, float]], across: tuple[float, float]
) -> list[Markup]:
    """Labels beside the marks that have room for one: none lies over another or over a mark."""
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y in marks]
    written = []
    for x, y, label in named:
        length = 6.6 * len(label)
        for anchor, start, middle in (
            ("start", x + 10, y),
            ("end", x - 10 - length, y),
            ("middle", x - length / 2, y - 15),
            ("middle", x - length / 2, y + 15),
        ):
            box = (start, middle - 7, start + length, middle + 7)
            inside = across[0] < box[0] and box[2] < across[1] and box[1] > 2
            if inside and not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken):
                taken.append(box)
                at = {"start": start, "end": start + length, "middle": x}[anchor]
                written.append(svg.text(at, middle, label, "name", anchor))
                break
    return written


def pareto(points: Sequence[tuple[float, float]], higher: bool = True) -> list[tuple[float, float]]:
    """The (cost, value) points that no other point beats in both, by cost. Equal points count once."""
    front: list[tuple[float, float]] = []
    for cost, value in sorted(set(points), key=lambda p: (p[0], -p[1] if higher else p[1])):
        if not front or (value > front[-1][1] if higher else value < front[-1][1]):
            front.append((cost, value))
    return front


def _stairs(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Through points by horizontal and vertical steps: between two points nothing is claimed."""
    stairs = points[:1]
    for (_, y0), (x1, y1) in pairwise(points):
        stairs += [(x1, y0), (x1, y1)]
    return stairs


def executed(results: Labelled) -> Markup | None:
    """The share of multiply-accumulates at each executed precision."""
    rows = [
        (label, r, {k: v for k, v in (r.executed or {}).items() if v is not None and v > 0}) for label, r in results
    ]
    rows = [row for row in rows if row[2]]
    if not rows:
        return None
    plot = svg.Rows(
        [n for n, _, _ in rows],
        [0, 1],
        "share of multiply-accumulates, %",
        notes=[r.rung or "" for _, r, _ in rows],
        fixed=(0, 100),
    )
    kinds = sorted({k for *_, shares in rows for k in shares}, key=_executed_order)
    for i, (label, _, shares) in enumerate(rows):
        done = 0.0
        for kind in sorted(shares, key=_executed_order):
            begin, end = plot.scale(done * 100), plot.scale((done + shares[kind]) * 100)
            done += shares[kind]
            title = tag("title", f"{label}: {fmt.percent(shares[kind])} in {kind}")
            size = {"width": max(end - begin, 0.5), "height": plot.row - 8}
            plot.add(
                tag(
                    "rect",
                    title,
                    x=begin,
                    y=plot.y(i) - plot.row / 2 + 4,
                    class_=f"seg {_executed_class(kind)}",
                    **size,
                )
            )
            if end - begin > 7 * len(kind) + 46:
                inside = f"{kind} {fmt.percent(shares[kind], 0)}"
                plot.add(svg.text((begin + end) / 2, plot.y(i), inside, f"inside {_executed_class(kind)}", "middle"))
    key = svg.legend(*(("square", f"seg {_executed_class(kind)}", kind) for kind in kinds))
    note = "What the built artifact computes in, by the audit; the rung stands at the right."
    return figure("Executed precision", plot.render("Executed precision by target and precision"), note=note, key=key)


def _executed_order(kind: str) -> tuple[int, str]:
    return (_EXECUTED.index(kind) if kind in _EXECUTED else len(_EXECUTED), kind)


def _executed_class(kind: str) -> str:
    return f"x-{kind}" if kind in _EXECUTED else "x-other"


def grid(plots: Sequence[Markup | None]) -> Markup | None:
    """Plots side by side where the page is wide enough."""
    drawn = [plot for plot in plots if plot is not None]
    return tag("div", join(drawn), class_="plots") if drawn else None
