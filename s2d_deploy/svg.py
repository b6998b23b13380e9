"""Small SVG parts for the report's plots: scales with round ticks, and a frame of labelled rows.

Every mark may carry a <title>: browsers show it on hover without any script; the page's script turns
it into a tooltip that the keyboard reaches too. Colours are CSS classes, so that they follow the theme.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from s2d_deploy import report_format as fmt
from s2d_deploy.markup import Markup, join, tag

_CHARACTER = 7.0  # mean advance in SVG units of one character at the label size of 11.5


@dataclass(frozen=True, slots=True)
class Scale:
    """Values `low..high` onto coordinates `start..end`, linear or logarithmic (then ``0 < low``)."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate of `value`, held inside the frame."""
        f = math.log10 if self.log else float
        clipped = min(max(value, self.low), self.high)
        share = (f(clipped) - f(self.low)) / (f(self.high) - f(self.low))
        return self.start + share * (self.end - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the scale."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            span = math.log10(self.high / self.low)
            steps: Sequence[int] = (1,) if span > 2.2 else (1, 2, 5)
            every = max(1, math.ceil(span / about)) if span > 2.2 else 1
            found = [m * 10.0**d for d in decades if d % every == 0 for m in steps]
        else:
            step = _round_step((self.high - self.low) / about)
            first = math.ceil(self.low / step - 1e-9)
            # k * step carries float dust such as 0.30000000000000004; 12 digits are more than any label shows.
            found = [round(k * step, 12) for k in range(first, math.floor(self.high / step + 1e-9) + 1)]
        return [t for t in found if self.low * (1 - 1e-9) - 1e-12 <= t <= self.high * (1 + 1e-9) + 1e-12]


def spanning(values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False) -> Scale:
    """A scale that holds `values` with some air; `zero` makes a linear one begin at 0."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    low, high = (min(known), max(known)) if known else (1.0, 10.0) if log else (0.0, 1.0)
    if log:
        air = max((high / low) ** 0.05, 1.1)
        return Scale(low / air, high * air, start, end, log=True)
    air = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return Scale(0.0 if zero and low >= 0 else low - air, high + air, start, end)


def shorten(text: str, length: int) -> str:
    """`text` without its beginning where it is too long: the end of a module path tells layers apart."""
    return text if len(text) <= length else "…" + text[-(length - 1) :]


def line(x1: float, y1: float, x2: float, y2: float, class_: str, title: str | None = None) -> Markup:
    """A straight line."""
    return tag("line", _title(title), x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def text(x: float, y: float, content: str, class_: str = "label", anchor: str = "start") -> Markup:
    """A piece of text; `y` is its middle."""
    return tag("text", content, x=x, y=y, class_=class_, text_anchor=anchor, dominant_baseline="central")


def mark(x: float, y: float, shape: str, class_: str, title: str | None = None, r: float = 5.0) -> Markup:
    """A mark: ``dot``, ``ring``, ``diamond``, ``square``, ``triangle`` or ``bar`` (a short vertical line)."""
    if shape in ("dot", "ring"):
        return tag("circle", _title(title), cx=x, cy=y, r=r, class_=f"{shape} {class_}")
    corners = {
        "diamond": [(0, -1.25), (1.25, 0), (0, 1.25), (-1.25, 0)],
        "square": [(-0.95, -0.95), (0.95, -0.95), (0.95, 0.95), (-0.95, 0.95)],
        "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
        "bar": [(-0.25, -1.8), (0.25, -1.8), (0.25, 1.8), (-0.25, 1.8)],
    }[shape]
    points = " ".join(f"{x + dx * r:.1f},{y + dy * r:.1f}" for dx, dy in corners)
    return tag("polygon", _title(title), points=points, class_=f"dot {class_}")


def path(points: Iterable[tuple[float, float]], class_: str, title: str | None = None) -> Markup:
    """A line through points."""
    d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return tag("path", _title(title), d=d, class_=class_)


def specks(points: Iterable[tuple[float, float]], class_: str) -> Markup:
    """Many small dots as one element: strokes of no length with round ends."""
    return tag("path", d="".join(f"M{x:.1f} {y:.1f}h0" for x, y in points), class_=class_, aria_hidden="true")


def canvas(width: float, height: float, summary: str, *children: str | None, class_: str = "plot") -> Markup:
    """The outermost element; `summary` is what a screen reader says."""
    box = f"0 0 {width:.0f} {height:.0f}"
    # `viewBox` is case-sensitive, also in HTML.
    return tag("svg", *children, viewBox=box, width=width, class_=class_, role="img", aria_label=summary)


@dataclass(slots=True)
class Rows:
    """A frame with one labelled row for each item and a common horizontal scale.

    Attributes:
        names: row labels; what is too long loses its beginning and is whole in the tooltip.
        values: the numbers that go into the plot; they set the scale.
        unit: the axis caption.
        notes: text at the right end of each row.
    """

    names: Sequence[str]
    values: Sequence[float]
    unit: str
    log: bool = False
    zero: bool = False
    notes: Sequence[str] | None = None
    width: float = 580.0
    row: float = 24.0
    fixed: tuple[float, float] | None = None
    scale: Scale = field(init=False)
    _body: list[Markup] = field(default_factory=list, init=False)
    _limit: int = field(default=34, init=False)

    def __post_init__(self) -> None:
        gutter = min(max((len(n) for n in self.names), default=0), self._limit) * _CHARACTER + 14
        margin = max((len(n) for n in self.notes), default=0) * _CHARACTER + 14 if self.notes else 14.0
        start, end = gutter, self.width - margin
        if self.fixed:
            self.scale = Scale(*self.fixed, start, end)
        else:
            self.scale = spanning(self.values, start, end, log=self.log, zero=self.zero)

    def y(self, index: int) -> float:
        """The middle of row `index`."""
        return 6 + (index + 0.5) * self.row

    def add(self, *marks: Markup) -> None:
        """Draw marks; later ones lie on top."""
        self._body.extend(marks)

    def render(self, summary: str) -> Markup:
        """The finished plot."""
        bottom = 6 + len(self.names) * self.row
        ticks = self.scale.ticks()
        frame = [
            *(line(self.scale(t), 2, self.scale(t), bottom + 4, "grid") for t in ticks),
            *(text(self.scale(t), bottom + 14, fmt.trimmed(t), "tick", "middle") for t in ticks),
            text((self.scale.start + self.scale.end) / 2, bottom + 31, self.unit, "caption", "middle"),
        ]
        for i, name in enumerate(self.names):
            label = text(self.scale.start - 10, self.y(i), shorten(name, self._limit), "label", "end")
            frame.append(tag("g", _title(name if len(name) > self._limit else None), label))
            if self.notes:
                frame.append(text(self.width - 2, self.y(i), self.notes[i], "value", "end"))
        return canvas(self.width, bottom + 42, summary, *frame, *self._body)


def legend(*entries: tuple[str, str, str]) -> Markup:
    """A legend: (shape, class, words) for each entry."""
    keys = (
        tag(
            "span",
            tag("svg", mark(8, 8, shape, class_, r=4.5), viewBox="0 0 16 16", width=16, height=16, aria_hidden="true"),
            words,
            class_="key",
        )
        for shape, class_, words in entries
    )
    return tag("div", join(keys), class_="legend")


def _title(words: str | None) -> Markup | None:
    return None if words is None else tag("title", words)


def _round_step(rough: float) -> float:
    base = 10.0 ** math.floor(math.log10(rough))
    return next(m * base for m in (1, 2, 2.5, 5, 10) if m * base >= rough * 0.999)
