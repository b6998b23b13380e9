"""What is wrong with a quantizer, told from the values in front of it and the codes behind it.

Every hypothesis predicts all codes; it is accepted where what it leaves unexplained lies at rounding boundaries. A
scale is not fitted but enclosed: each code that was not clamped says between which two scales the quantizer's scale
lies, and an interval that thousands of codes leave open is the evidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2d_deploy.forced import View

_UNEXPLAINED = 0.002  # of the codes that were wrong before: float dust of the enclosing interval


@dataclass(frozen=True, slots=True)
class QuantizerFault:
    """A cause.

    Attributes:
        cause: ``"wrong-zero-point"``, ``"saturation"``, ``"rounding-mode"``, ``"wrong-scale"``, ``"swapped-axis"``.
        detail: in words.
        codes: the codes that a quantizer with this fault makes.
        factor: of the scale, for "wrong-scale".
    """

    cause: str
    detail: str
    codes: Callable[[View], Tensor]
    factor: float | None = None


def wrong_codes(view: View, tolerance: float, predicted: Tensor | None = None, u: Tensor | None = None) -> Tensor:
    """Where the runtime's code is not the predicted one and no rounding boundary excuses it.

    Args:
        view: of the site.
        tolerance: how far float noise may push a value over a boundary, in codes.
        predicted: codes; the plan's by default.
        u: values in codes that `predicted` comes from, for the distance to the boundary.
    """
    if view.theirs is None:
        raise ValueError(f"{view.site}: the runtime shows no codes")
    want = view.codes(u) if predicted is None else predicted
    off = want != view.theirs
    if not bool(off.any()):
        return off
    value = view.u if u is None else u
    at_boundary = (value - torch.floor(value) - 0.5).abs() <= tolerance
    return off & ~(at_boundary & ((want - view.theirs).abs() <= 1))


def classify_quantizer(view: View, tolerance: float) -> QuantizerFault | None:
    """The one fault of the quantizer itself that explains its codes; None where none does."""
    before = int(wrong_codes(view, tolerance).sum())
    for fault in _hypotheses(view, tolerance):
        predicted = fault.codes(view)
        u = view.u / fault.factor if fault.factor is not None else view.u
        if fault.cause == "rounding-mode":
            left = int(torch.ne(predicted, view.theirs).sum()) if view.theirs is not None else before
        else:
            left = int(wrong_codes(view, tolerance + 1e-6, predicted, u).sum())
        if left <= _UNEXPLAINED * before:
            return fault
    return None


def _hypotheses(view: View, tolerance: float) -> Iterator[QuantizerFault]:
    grid, theirs, inside = view.quantizer.grid, view.theirs, view.inside
    if theirs is None:
        return
    own = view.codes()
    if bool(inside.any()):
        shift = float((theirs - own)[inside & (own > grid.qmin) & (own < grid.qmax)].median().nan_to_num())
        if shift:
            yield QuantizerFault(
                "wrong-zero-point",
                f"the quantizer's zero point is {shift:+.0f} off",
                lambda v, s=shift: (torch.round(v.u) + v.zero + s).clamp(v.quantizer.grid.qmin, v.quantizer.grid.qmax),  # type: ignore[misc]
            )
    low, high = float(theirs.min()), float(theirs.max())
    if low > float(own.min()) or high < float(own.max()):
        yield QuantizerFault(
            "saturation",
            f"codes saturate at {low:.0f} and {high:.0f}, the plan's at "
            f"{float(own.min()):.0f} and {float(own.max()):.0f}",
            lambda v, a=low, b=high: v.codes().clamp(a, b),  # type: ignore[misc]
        )
    for name, rounded in _ROUNDINGS.items():
        yield QuantizerFault(
            "rounding-mode",
            f"rounds {name}, not half to even",
            lambda v, r=rounded: (r(v.u) + v.zero).clamp(v.quantizer.grid.qmin, v.quantizer.grid.qmax),  # type: ignore[misc]
        )
    factor = enclosed_factor(view.u, theirs - view.zero, inside, tolerance)
    if factor is not None:
        yield QuantizerFault(
            "wrong-scale",
            f"the scale is {factor:.6g} times the plan's",
            lambda v, f=factor: v.codes(v.u / f),  # type: ignore[misc]
            factor,
        )
    if theirs.dim() >= 2 and bool((theirs.flatten().sort().values == own.flatten().sort().values).all()):
        yield QuantizerFault("swapped-axis", "the same codes stand in another order", lambda v: v.codes())


def half_away(u: Tensor) -> Tensor:
    """Round half away from zero, as C's ``round``."""
    return torch.sign(u) * torch.floor(u.abs() + 0.5)


_ROUNDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "half away from zero": half_away,
    "half up": lambda u: torch.floor(u + 0.5),
    "down (floor)": torch.floor,
    "up (ceil)": torch.ceil,
    "towards zero": torch.trunc,
}


def enclosed_factor(u: Tensor, codes: Tensor, inside: Tensor, tolerance: float) -> float | None:
    """The factor of the scale that all codes agree on: ``codes = round(u / factor)``; None where they do not agree."""
    known = inside & (u.abs() > 0.5)
    if int(known.sum()) < 8:
        return None
    a, c = u[known], codes[known]
    ends = torch.stack([(c - 0.5 - tolerance) / a, (c + 0.5 + tolerance) / a])
    low, high = float(ends.amin(0).max()), float(ends.amax(0).min())
    return None if not 0 < low <= high else 2.0 / (low + high)
