"""Codes that are not uniform integers: FP4 (E2M1) with its block scales, logarithmic, and twin uniform.

    x' = value(code) * scale

Here are the values of the codes, which code a quotient ``x / scale`` gets, and how block scales of FP4 are made. Codes:

- **e2m1**: the 4-bit pattern itself, sign in bit 3 (OCP Microscaling Formats v1.0, section 5.3.3). Round half to even,
  saturating at 6; the sign of a zero is kept, as a hardware conversion keeps it.
- **log2**, **logsqrt2**: code ``q`` means ``base ** -q``, the last code means 0. RepQ-ViT (arXiv 2212.08254, section
  3.3) clamps instead, and its published code spends one code more than b bits hold on 0. A masked token must stay
  exactly 0, so one of the b bits' codes is spent on it here.
- **twin** (PTQ4ViT, arXiv 2111.12293, section 3.2), ``h = 2 ** (bits - 1)``: unsigned, codes ``0 .. h - 1`` are the
  fine range and ``h .. 2h - 1`` the coarse one; signed, negative codes are fine and the others coarse. The coarse step
  is the fine one times ``2 ** shift``.

Nothing here is differentiable; `fake_quant` adds the straight-through gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from s2d_deploy.errors import PlanError, message
from s2d_deploy.grid import Grid

E2M1_MAX = 6.0
E4M3_MAX = 448.0
_E4M3_LEAST = 2.0**-9
_E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_LEAST_TENSOR_SCALE = 2.0**-100


def codes_of(grid: Grid) -> range:
    """Every code of a grid, whatever its format, in ascending order of code."""
    if grid.integer:
        return range(grid.qmin, grid.qmax + 1)
    half = 1 << (grid.bits - 1)
    return range(-half, half) if grid.format == "twin" and grid.signed else range(2 * half)


def encode(ratio: Tensor, grid: Grid) -> Tensor:
    """Codes of ``x / scale``, int32 of its shape; the grid is not "int"."""
    if grid.format == "e2m1":
        magnitude = ratio.abs().clamp(max=E2M1_MAX)
        step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
        rounded = torch.round(magnitude / step) * step  # at a binade's upper end this is the next binade's first value
        code = torch.where(rounded <= 2, rounded * 2, torch.where(rounded <= 4, rounded + 2, rounded / 2 + 4))
        return code.to(torch.int32) + 8 * torch.signbit(ratio).to(torch.int32)
    half = 1 << (grid.bits - 1)
    if grid.format == "twin":
        coarse = ratio / (1 << grid.shift)
        if grid.signed:
            code = torch.where(ratio < 0, torch.round(ratio).clamp(min=-half), torch.round(coarse).clamp(max=half - 1))
            return code.to(torch.int32)
        upper = torch.round(coarse).clamp(max=half - 1)
        # A coarse 0 is the fine 0: one code for one value.
        upper = torch.where(upper == 0, upper, upper + half)
        return torch.where(ratio < half, torch.round(ratio).clamp(0, half - 1), upper).to(torch.int32)
    steps = torch.round(-torch.log2(ratio.clamp(min=0)) * (2 if grid.format == "logsqrt2" else 1))
    return steps.clamp(0, 2 * half - 1).to(torch.int32)


def decode(codes: Tensor, grid: Grid) -> Tensor:
    """Float32 values of int32 `codes` at scale 1; the grid is not "int"."""
    table = torch.tensor([_value(c, grid) for c in codes_of(grid)], dtype=torch.float32, device=codes.device)
    values: Tensor = table[(codes - codes_of(grid).start).long()]
    return values


def _value(code: int, grid: Grid) -> float:
    half = 1 << (grid.bits - 1)
    if grid.format == "e2m1":
        return math.copysign(_E2M1_VALUES[code % 8], -1.0 if code >= 8 else 1.0)
    if grid.format == "twin":
        if grid.signed:
            return float(code) if code < 0 else float(code << grid.shift)
        return float(code) if code < half else float((code - half) << grid.shift)
    if code == 2 * half - 1:
        return 0.0
    return float(2.0 ** (-code / 2 if grid.format == "logsqrt2" else -code))


def largest(grid: Grid) -> float:
    """The largest value at scale 1."""
    if grid.integer:
        return float(grid.qmax)
    return max(_value(c, grid) for c in codes_of(grid))


def smallest(grid: Grid) -> float:
    """The smallest value at scale 1."""
    if grid.integer:
        return float(grid.qmin)
    return min(_value(c, grid) for c in codes_of(grid))


def tensor_scale(absmax: Tensor) -> Tensor:
    """NVFP4's FP32 scale of a whole tensor: ``absmax / (6 * 448)``, so that the largest block's E4M3 scale is 448.

    Rounded up to 20 significant bits. Then its product with an E4M3 number (4 bits) is exact in FP32, and it does not
    matter in which order a runtime multiplies code, block scale and tensor scale. 1 for a tensor of zeros.

    Args:
        absmax: largest magnitude, a scalar.

    Returns:
        float32 scalar.
    """
    if not float(absmax) > 0:
        return torch.tensor(1.0)
    mantissa, exponent = math.frexp(max(float(absmax) / (E2M1_MAX * E4M3_MAX), _LEAST_TENSOR_SCALE))
    return torch.tensor(math.ldexp(math.ceil(mantissa * 2**20) / 2**20, exponent), dtype=torch.float32)


def block_scale(absmax: Tensor, grid: Grid, of_tensor: Tensor | None = None) -> Tensor:
    """What the codes of a block are multiplied by, from its largest magnitude.

    - "e4m3" (NVFP4): ``e4m3(absmax / (6 * of_tensor)) * of_tensor``, rounded half to even, saturating at 448, at least
      the smallest E4M3 number, so that a scale stays positive; ``of_tensor`` itself for a block of zeros.
    - "e8m0" (OCP MX v1.0, section 6.3): ``2 ** (floor(log2(absmax)) - 2)``, within 2 ** -127 .. 2 ** 127. Magnitudes
      above 6 such scales saturate: that is the rule's, not an error here. 1 for a block of zeros.
    - "fp32": ``absmax / 6``; 1 for a block of zeros.

    Args:
        absmax: float32, non-negative, any shape.
        grid: an e2m1 grid.
        of_tensor: float32 scalar of `tensor_scale`; needed for "e4m3".

    Returns:
        float32 of the shape of `absmax`.

    Raises:
        PlanError: "e4m3" without `of_tensor`.
    """
    zero = absmax == 0
    if grid.scale_format == "e4m3":
        if of_tensor is None:
            raise PlanError(message("an e4m3 block scale needs its tensor's scale", fix="use FakeQuantizer.of(site)"))
        stored = to_e4m3(absmax / (E2M1_MAX * of_tensor))
        return torch.where(zero, torch.ones_like(stored), stored) * of_tensor
    if grid.scale_format == "e8m0":
        exponent = (
            torch.frexp(absmax.double()).exponent - 1 - 2
        )  # frexp's mantissa is in [0.5, 1); 2 is E2M1's largest exponent
        # ldexp in float64: torch's float32 one would underflow on its way to 2 ** -127.
        scale = torch.ldexp(torch.ones_like(absmax, dtype=torch.float64), exponent.clamp(-127, 127))
        return torch.where(zero, torch.ones_like(scale), scale).to(torch.float32)
    return torch.where(absmax > torch.finfo(torch.float32).tiny, absmax / E2M1_MAX, torch.ones_like(absmax))


def to_e4m3(scale: Tensor) -> Tensor:
    """Positive E4M3 numbers nearest to `scale` (half to even), as float32: 2 ** -9 .. 448, never 0 and never NaN."""
    return scale.clamp(_E4M3_LEAST, E4M3_MAX).to(torch.float8_e4m3fn).to(torch.float32)


def stored_scale(scale: Tensor, grid: Grid, of_tensor: Tensor | None) -> Tensor:
    """The 8-bit numbers behind effective scales, as float32: E4M3 or E8M0 values; `scale` itself for "fp32"."""
    return scale / of_tensor if grid.scale_format == "e4m3" and of_tensor is not None else scale


def representable(scale: Tensor, grid: Grid, of_tensor: Tensor | None) -> bool:
    """Whether every scale is one that the grid's scale format can store."""
    if grid.scale_format == "e4m3":
        if of_tensor is None:
            return False
        return bool((to_e4m3(scale / of_tensor) * of_tensor == scale).all())
    if grid.scale_format == "e8m0":
        return bool((torch.frexp(scale.double()).mantissa == 0.5).all())
    return True


__all__ = [
    "E2M1_MAX",
    "E4M3_MAX",
    "block_scale",
    "codes_of",
    "decode",
    "encode",
    "largest",
    "representable",
    "smallest",
    "stored_scale",
    "tensor_scale",
    "to_e4m3",
]
