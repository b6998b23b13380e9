"""The plot of `ptq_recipes.py`: every recipe at each precision, on the original and on the conditioned model. SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from s2d_deploy import svg
from s2d_deploy.markup import Markup, tag

_STYLE = """
svg { background: #fff; } text { font: 12px system-ui, sans-serif; fill: #1a2029; }
.tick, .caption, .value { fill: #566070; font-size: 11px; } .title { font-weight: 600; font-size: 13px; }
.grid { stroke: #dde1e7; } .link { stroke: #9aa3b0; stroke-width: 1.5; }
.original { fill: #fff; stroke: #0072b2; stroke-width: 1.8; } .s2d { fill: #c8500a; stroke: #c8500a; }
"""
_WIDTH = 520.0


def draw(found: Mapping[str, Mapping[str, Any]], precisions: Sequence[str], task: str) -> str:
    """One panel for each precision, recipes as rows; a ring is the original model, a dot the conditioned one.

    Args:
        found: recipe -> model ("original", "s2d") -> result with ``precisions[precision]["value"]``.
        precisions: panels, from left to right.
        task: names the unit.
    """
    unit = "cosine x 100 to the float original" if task == "embedding" else "top-1 %"
    panels = [panel for p in precisions if (panel := _panel(found, p, unit)) is not None]
    height = max((h for _, h in panels), default=0.0)
    body = [tag("g", drawing, transform=f"translate({i * _WIDTH:.0f},28)") for i, (drawing, _) in enumerate(panels)]
    key = [
        svg.mark(12, 14, "ring", "original", r=4.5),
        svg.text(22, 14, "original"),
        svg.mark(100, 14, "dot", "s2d", r=4.5),
        svg.text(110, 14, "conditioned with S2D"),
    ]
    whole = svg.canvas(_WIDTH * max(len(panels), 1), height + 34, f"Recipes by precision, {unit}", *key, *body)
    head, _, rest = str(whole).partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_STYLE}</style>{rest}\n'


def _panel(found: Mapping[str, Mapping[str, Any]], precision: str, unit: str) -> tuple[Markup, float] | None:
    values = {
        name: {
            m: r["precisions"][precision]["value"] for m, r in models.items() if "value" in r["precisions"][precision]
        }
        for name, models in found.items()
    }
    shown = [(name, row) for name, row in values.items() if row]
    if not shown:
        return None
    plot = svg.Rows(
        [name for name, _ in shown],
        [v for _, row in shown for v in row.values()],
        f"{precision}: {unit}",
        notes=[" / ".join(f"{v:.1f}" for v in row.values()) for _, row in shown],
        width=_WIDTH - 10,
        row=18,
    )
    for i, (name, row) in enumerate(shown):
        if len(row) > 1:
            plot.add(svg.line(plot.scale(row["original"]), plot.y(i), plot.scale(row["s2d"]), plot.y(i), "link"))
        for model, value in row.items():
            shape = "ring" if model == "original" else "dot"
            plot.add(svg.mark(plot.scale(value), plot.y(i), shape, model, f"{name}, {model}: {value:.2f}", r=4.2))
    return plot.render(f"Recipes at {precision}"), 6 + len(shown) * 18 + 42
