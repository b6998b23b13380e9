"""What is wrong with what enters the model: hypotheses about preprocessing, tried on the first sites.

A quantizer whose values depend on no product of the model shows the model's input. If it is sound by itself, and its
codes are wrong, the runtime was given (or made itself) another input.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from s2d_deploy.op_faults import Segment


@dataclass(frozen=True, slots=True)
class InputFault:
    """A cause.

    Attributes:
        detail: in words.
        batch: the inputs as the runtime seems to see them.
    """

    detail: str
    batch: dict[str, Tensor]


def classify_input(segment: Segment) -> InputFault | None:
    """The change of the inputs that explains the codes at the segment's site; None where none does."""
    with torch.no_grad():
        before = int(segment.target().wrong(0.12).sum())
        if before < 4:
            return None
        for fault in _hypotheses(segment):
            try:
                after = int(segment.target(batch=fault.batch).wrong(0.12).sum())
            except (ValueError, IndexError, RuntimeError, TypeError):  # a shape or a token that the model refuses
                continue
            except Exception as error:  # our own ModelError wraps those
                if type(error).__name__ != "ModelError":
                    raise
                continue
            if after <= 0.02 * before:
                return fault
    return None


def _hypotheses(segment: Segment) -> Iterator[InputFault]:
    batch = dict(segment.batch)
    for name, x in batch.items():
        if segment.site.endswith(".probs") and "mask" not in name:
            continue  # what enters there beside products is the mask
        if not x.is_floating_point():
            yield from _tokens(batch, name, x)
            continue
        if x.dim() == 4:
            yield InputFault(f"{name}: the channels stand in reverse order (RGB, BGR)", batch | {name: x.flip(1)})
            yield InputFault(f"{name}: mirrored left to right", batch | {name: x.flip(3)})
            yield InputFault(f"{name}: upside down", batch | {name: x.flip(2)})
            if x.shape[2] == x.shape[3]:
                yield InputFault(f"{name}: height and width are swapped", batch | {name: x.transpose(2, 3)})
        yield from _affine(segment, batch, name, x)


def _affine(segment: Segment, batch: dict[str, Tensor], name: str, x: Tensor) -> Iterator[InputFault]:
    """Another mean and standard deviation, channel by channel, where the site quantizes the input itself."""
    target = segment.target()
    if target.u.shape != x.shape or x.dim() < 2:
        return
    values = x.to(target.u.dtype)
    unit = float((values.abs().max() / target.u.abs().max().clamp_min(1e-30)).item())
    changed, parts = values.clone(), []
    for c in range(x.shape[1]):
        inside = target.inside[:, c]
        a, y = values[:, c][inside], target.v[:, c][inside] * unit
        if a.numel() < 8:
            return
        centred = a - a.mean()
        gain = float((centred * (y - y.mean())).sum() / centred.square().sum().clamp_min(1e-30))
        offset = float(y.mean()) - gain * float(a.mean())
        changed[:, c] = values[:, c] * gain + offset
        parts.append((gain, offset))
    if max(max(abs(g - 1.0), abs(o) / unit) for g, o in parts) < 1e-3:
        return
    shown = ", ".join(f"{g:.3g} x {o:+.3g}" for g, o in parts[:4]) + (" ..." if len(parts) > 4 else "")
    yield InputFault(
        f"{name}: normalized otherwise; by channel the runtime sees {shown}", batch | {name: changed.to(x.dtype)}
    )


def _tokens(batch: dict[str, Tensor], name: str, x: Tensor) -> Iterator[InputFault]:
    if "mask" in name:
        yield InputFault(f"{name}: ignored, padding is seen", batch | {name: torch.ones_like(x)})
        yield InputFault(f"{name}: inverted", batch | {name: 1 - x})
        return
    largest = int(x.max())
    for step in (1, -1):
        yield InputFault(f"{name}: token numbers are {step:+d} off", batch | {name: (x + step).clamp(0, largest + 1)})
        yield InputFault(f"{name}: token numbers are {step:+d} off", batch | {name: (x + step).clamp(0, largest)})
    if x.dim() == 2:
        yield InputFault(f"{name}: the sequence runs backwards", batch | {name: x.flip(1)})
        for step in (1, -1):
            yield InputFault(f"{name}: shifted by one token", batch | {name: x.roll(step, 1)})


__all__ = ["InputFault", "classify_input"]
