"""Choose a shift, a scale, copies and direct channels for one input tensor, by search.

The candidates are SmoothQuant-like families of scales (Xiao et al., arXiv 2211.10438, equation 4), clipping ones (Wei
et al., Outlier Suppression+, arXiv 2304.09145, section 4.2), copied channels (Zhao et al., arXiv 1901.09504, section
3) and channels led past the quantizer (Dettmers et al., arXiv 2208.07339, section 3.2). The one is taken whose Linear,
quantized to W4A4 as it will be, errs least on calibration tokens. What is lost: other precisions are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Grid, PerAxis
from s2d_deploy.observers import Histogram, activation_parameters, weight_parameters

# Channels that copying may add: multiples of 32, so that block sizes and vector widths still divide K.
EXTRA_CHANNELS = (32, 64)
# How many channels may be led past a quantizer in float, and the share of the error that each must earn.
DIRECT_CHANNELS = (1, 2, 4)
DIRECT_PRICE = 0.02
# Scales beyond this would move the problem from the activations into the weights.
MAX_SCALE = 64.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A shift (K,), a scale (K,), copies (K,) and direct channels for one input tensor; errors without and with."""

    shift: Tensor
    scale: Tensor
    copies: Tensor | None
    words: str
    direct: tuple[int, ...] = ()
    before: float = 0.0
    after: float = 0.0


def choose(x: Tensor, weight: Tensor, *, can_shift: bool, can_copy: bool, can_bypass: bool) -> Choice:
    """The candidate with the least error of the quantized Linear (see `_quantized_error`).

    Args:
        x: float32 (rows, K).
        weight: float32 (N, K).
        can_shift: whether channels may be shifted.
        can_copy: whether channels may be copied.
        can_bypass: whether channels may be led past the quantizer; each must earn `DIRECT_PRICE`.
    """
    neutral = Choice(torch.zeros(x.shape[1]), torch.ones(x.shape[1]), None, "as it was")
    before = _quantized_error(x, weight, neutral)
    best, least, after = neutral, before, before
    for candidate in _candidates(x, weight, can_shift, can_copy, can_bypass):
        error = _quantized_error(x, weight, candidate)
        priced = error * (1 + DIRECT_PRICE * len(candidate.direct))
        if priced < least:
            best, least, after = candidate, priced, error
    return replace(best, before=before, after=after)


def _candidates(x: Tensor, weight: Tensor, can_shift: bool, can_copy: bool, can_bypass: bool) -> Iterable[Choice]:
    column = weight.square().mean(0).sqrt().clamp_min(1e-12)
    zero, one = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    for title, shift in [("no shift", zero), ("shifted by the mean", x.mean(0))][: 2 if can_shift else 1]:
        moved = x - shift
        least = 1e-6 * float(moved.abs().max()) + 1e-30
        peak = moved.abs().amax(0).clamp_min(least)
        spread = moved.square().mean(0).sqrt().clamp_min(least)
        scales = {"no scale": one}
        for p in (0.5, 0.65, 0.8, 1.0):
            scales[f"peak^{p:g}"] = peak**p / column ** (1 - p)
        for p in (0.5, 0.8, 1.0):
            scales[f"rms^{p:g}"] = spread**p / column ** (1 - p)
        for times in (1.0, 2.0, 4.0):
            scales[f"peaks above {times:g} medians"] = (peak / (times * peak.median())).clamp_min(1)
        for name, raw in scales.items():
            yield Choice(shift, _centred(raw, one > 0), None, f"{title}, {name}")
        for extra in EXTRA_CHANNELS if can_copy else ():
            yield Choice(shift, one, _copies(peak, one > 0, extra), f"{title}, {extra} copied channels")
        for count in DIRECT_CHANNELS if can_bypass else ():
            direct = peak.topk(min(count, len(peak))).indices
            kept = one > 0
            kept[direct] = False
            # The places of the direct channels go to copies of others, so that K stays what it was.
            copies, chosen = _copies(peak, kept, count), tuple(sorted(direct.tolist()))
            for name in ("no scale", "peak^0.5", "peak^0.8", "rms^1"):
                scale = _centred(scales[name], kept)
                reduced = _copies(peak / scale, kept, count) if name != "no scale" else copies
                yield Choice(shift, scale, reduced, f"{title}, {name}, {count} direct", chosen)


def _centred(raw: Tensor, kept: Tensor) -> Tensor:
    """Scales with geometric mean 1 over the kept channels, limited, and 1 at the others."""
    scale = (raw / raw[kept].log().mean().exp()).clamp(1 / MAX_SCALE, MAX_SCALE)
    return torch.where(kept, scale, torch.ones_like(scale))


def _copies(peak: Tensor, kept: Tensor, extra: int) -> Tensor:
    """How often each kept channel is there, so that with `extra` more channels the largest peak is least."""
    copies = kept.long()
    for _ in range(extra):
        copies[torch.where(kept, peak / copies.clamp_min(1), -torch.ones_like(peak)).argmax()] += 1
    return copies


def _quantized_error(x: Tensor, weight: Tensor, choice: Choice) -> float:
    """Error of the Linear with both operands at 4 bits and MSE ranges: relative to each token, plus to all.

    A mean over tokens of each token's relative error forgets the few tokens whose outputs are a hundred times
    larger; the total error over the total power sees nothing else. A model needs both kinds of tokens.
    """
    copies = torch.ones(x.shape[1], dtype=torch.int64) if choice.copies is None else choice.copies
    index = torch.repeat_interleave(torch.arange(x.shape[1]), copies)
    centred = x - choice.shift
    moved = (centred / (choice.scale * copies.clamp_min(1)))[:, index]
    scaled = (weight * choice.scale)[:, index]
    histogram, grid, rows = Histogram(), Grid(4), Grid(4, granularity=PerAxis(0))
    histogram.update(moved)
    a = activation_parameters(histogram, grid, "mse")
    w = weight_parameters(scaled, rows, "mse")
    left = dequantize(quantize(moved, *a, grid), *a, grid)
    right = dequantize(quantize(scaled, *w, rows), *w, rows)
    y = x @ weight.T
    direct = list(choice.direct)
    found = left @ right.T + weight @ choice.shift + centred[:, direct] @ weight[:, direct].T
    error = (found - y).square().sum(1)
    power = (y - y.mean(0)).square().sum(1)
    each = power.clamp_min(0.1 * float(power.median()) + 1e-30)
    return float((error / each).mean() + error.sum() / (power.sum() + 1e-30))


__all__ = ["Choice", "choose"]
