"""Quantize, dequantize, and fake-quantize in torch: the simulation's arithmetic, in one place.

Everything is computed in FP32. `fake_quantize` is a torch custom operator, so that `torch.export`
keeps it whole and the exporter can turn each call into one QuantizeLinear/DequantizeLinear pair.
Rounding is half to even, the division is a true division (not a multiplication by a reciprocal):
both as ONNX QuantizeLinear defines them, because a code at a rounding boundary must not depend on who computes it.

Gradients are straight-through: 1 inside the representable range, 0 where the code was clamped
(Bengio et al., arXiv 1308.3432; Jacob et al., arXiv 1712.05877, section 3).

Formats that are not uniform integers (`formats`) go through the same `quantize`, `dequantize` and `FakeQuantizer`. They
exist in the simulation only: no custom operator, because no exporter writes them.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from s2d_deploy import formats
from s2d_deploy.errors import PlanError, message
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor, PerToken
from s2d_deploy.plan import Site


def expand_parameter(parameter: Tensor, x: Tensor, grid: Grid) -> Tensor:
    """A scale or zero point of `grid.scale_shape(x.shape)`, broadcastable against `x`."""
    g = grid.granularity
    if isinstance(g, PerTensor | PerToken):
        return parameter
    if isinstance(g, PerAxis):
        shape = [1] * x.dim()
        shape[g.axis % x.dim()] = -1
        return parameter.reshape(shape)
    return parameter.repeat_interleave(g.size, dim=g.axis % x.dim() if isinstance(g, PerBlock) else -1)


def token_scale(x: Tensor, grid: Grid, tensor_scale: Tensor | None = None) -> Tensor:
    """Run-time scale of a dynamic grid.

    Per token: ``absmax / qmax``, shape ``(..., 1)``; 1 for an all-zero token. Per block of a token (FP4):
    `formats.block_scale`, shape ``(..., K / size)``.

    Raises:
        PlanError: the block size does not divide the width.
    """
    if not isinstance(grid.granularity, PerToken):
        shape = grid.scale_shape(tuple(x.shape))
        return formats.block_scale(x.abs().reshape(*shape, -1).amax(dim=-1), grid, tensor_scale)
    absmax = x.abs().amax(dim=-1, keepdim=True)
    return torch.where(absmax > 0, absmax / grid.qmax, torch.ones_like(absmax))


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Codes of `x`.

    Args:
        x: float32, any shape.
        scale: float32 of ``grid.scale_shape(x.shape)``, positive.
        zero_point: int32 of the same shape as `scale`.
        grid: the codes that exist.

    Returns:
        int32 codes of the shape of `x`, in ``[grid.qmin, grid.qmax]`` (other formats: see `formats`).
    """
    if not grid.integer:
        return formats.encode(x / expand_parameter(scale, x, grid), grid)
    code = torch.round(x / expand_parameter(scale, x, grid)) + expand_parameter(zero_point, x, grid)
    return code.clamp(grid.qmin, grid.qmax).to(torch.int32)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, grid: Grid) -> Tensor:
    """Float32 values of int32 `codes`; shapes as in `quantize`."""
    if not grid.integer:
        return formats.decode(codes, grid) * expand_parameter(scale, codes, grid)
    shifted = codes - expand_parameter(zero_point, codes, grid)
    return shifted.to(torch.float32) * expand_parameter(scale, codes, grid)


def _grid(bits: int, signed: bool, narrow: bool, axis: int | None, block: int | None) -> Grid:
    granularity: PerTensor | PerAxis | PerBlock = PerTensor()
    if axis is not None:
        granularity = PerAxis(axis) if block is None else PerBlock(axis, block)
    return Grid(bits=bits, signed=signed, symmetric=False, narrow=narrow, granularity=granularity)


@torch.library.custom_op("s2d_deploy::fake_quantize", mutates_args=())
def fake_quantize_op(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    signed: bool,
    narrow: bool,
    axis: int | None,
    block: int | None,
) -> Tensor:
    """Quantize and dequantize with stored parameters (see `quantize`, `dequantize`)."""
    grid = _grid(bits, signed, narrow, axis, block)
    # In float throughout: codes up to 255 are exact in FP32, so this equals dequantize(quantize(x)).
    s, z = expand_parameter(scale, x, grid), expand_parameter(zero_point, x, grid).to(x.dtype)
    code = (torch.round(x / s) + z).clamp_(grid.qmin, grid.qmax)
    return code.sub_(z).mul_(s)


@fake_quantize_op.register_fake
def _(
    x: Tensor,
    scale: Tensor,  # noqa: ARG001 - the signature is the operator's
    zero_point: Tensor,  # noqa: ARG001
    bits: int,  # noqa: ARG001
    signed: bool,  # noqa: ARG001
    narrow: bool,  # noqa: ARG001
    axis: int | None,  # noqa: ARG001
    block: int | None,  # noqa: ARG001
) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:  # noqa: ARG001
    x, scale, zero_point, bits, signed, narrow, axis, block = inputs
    ctx.save_for_backward(x, scale, zero_point)  # type: ignore[arg-type]
    ctx.grid = _grid(bits, signed, narrow, axis, block)  # type: ignore[attr-defined, arg-type]


def _straight_through(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, scale, zero_point = ctx.saved_tensors  # type: ignore[attr-defined]
    grid: Grid = ctx.grid  # type: ignore[attr-defined]
    code = torch.round(x / expand_parameter(scale, x, grid)) + expand_parameter(zero_point, x, grid)
    inside = (code >= grid.qmin) & (code <= grid.qmax)
    return grad * inside, None, None, None, None, None, None, None


fake_quantize_op.register_autograd(_straight_through, setup_context=_remember)


@torch.library.custom_op("s2d_deploy::fake_quantize_token", mutates_args=())
def fake_quantize_token_op(x: Tensor, bits: int) -> Tensor:
    """Quantize and dequantize with one run-time scale for each token (see `token_scale`)."""
    grid = Grid(bits=bits, granularity=PerToken())
    scale = token_scale(x, grid)
    return torch.round(x / scale).clamp_(grid.qmin, grid.qmax).mul_(scale)


@fake_quantize_token_op.register_fake
def _(x: Tensor, bits: int) -> Tensor:  # noqa: ARG001
    return torch.empty_like(x)


def _pass_through(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG001
    # A per-token absmax scale clamps nothing, so the straight-through gradient is the identity.
    return grad, None


fake_quantize_token_op.register_autograd(_pass_through)


class _Formatted(torch.autograd.Function):
    """Quantize and dequantize in a format that is not "int"; straight-through between its extreme values."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, scale: Tensor, grid: Grid) -> Tensor:
        s = expand_parameter(scale, x, grid)
        ratio = x / s
        ctx.save_for_backward((ratio >= formats.smallest(grid)) & (ratio <= formats.largest(grid)))
        return formats.decode(formats.encode(ratio, grid), grid) * s

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * inside, None, None


class FakeQuantizer(nn.Module):
    """One quantized site: its Grid, and its scale and zero point as buffers.

    Args:
        grid: the site's Grid.
        scale: float32 of ``grid.scale_shape(...)``; ignored (empty) for a dynamic grid.
        zero_point: int32 of the same shape; zeros when None.
        tensor_scale: float32 scalar beside run-time E4M3 block scales (NVFP4 activations); otherwise not read.
    """

    scale: Tensor
    zero_point: Tensor
    tensor_scale: Tensor | None

    def __init__(
        self,
        grid: Grid,
        scale: Tensor | None = None,
        zero_point: Tensor | None = None,
        tensor_scale: Tensor | None = None,
    ) -> None:
        super().__init__()
        if grid.dynamic and grid.scale_format == "e4m3" and tensor_scale is None:
            raise PlanError(
                message(f"a run-time {grid.name} quantizer needs a tensor scale", fix="use FakeQuantizer.of")
            )
        if scale is None:
            if not grid.dynamic:
                raise PlanError(message("a static quantizer needs a scale", fix="calibrate the plan first"))
            scale = torch.empty(0)
        if not bool(torch.all(torch.isfinite(scale) & (scale > 0))):
            raise PlanError(message("a scale must be finite and positive", found=f"min {float(scale.min())}"))
        self.grid = grid
        if zero_point is None:
            zero_point = torch.zeros_like(scale)
        self.register_buffer("scale", scale.to(torch.float32))
        self.register_buffer("zero_point", zero_point.to(torch.int32))
        self.register_buffer("tensor_scale", tensor_scale)

    @classmethod
    def of(cls, site: Site) -> FakeQuantizer:
        """The quantizer of a plan's site."""
        return cls(site.grid, site.scale, site.zero_point, site.tensor_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized `x`: same shape and dtype."""
        g = self.grid.granularity
        if not self.grid.integer:
            scale = token_scale(x, self.grid, self.tensor_scale) if self.grid.dynamic else self.scale
            return cast(Tensor, _Formatted.apply(x, scale, self.grid))  # type: ignore[no-untyped-call]
        if isinstance(g, PerToken):
            return fake_quantize_token_op(x, self.grid.bits)  # type: ignore[no-any-return]
        axis = g.axis if isinstance(g, PerAxis | PerBlock) else None
        block = g.size if isinstance(g, PerBlock) else None
        return fake_quantize_op(  # type: ignore[no-any-return]
            x, self.scale, self.zero_point, self.grid.bits, self.grid.signed, self.grid.narrow, axis, block
        )

    def codes(self, x: Tensor) -> Tensor:
        """int32 codes of `x`."""
        scale = token_scale(x, self.grid, self.tensor_scale) if self.grid.dynamic else self.scale
        zero_point = torch.zeros_like(scale, dtype=torch.int32) if self.grid.dynamic else self.zero_point
        return quantize(x, scale, zero_point, self.grid)

    def extra_repr(self) -> str:
        """The grid, for ``print(model)``."""
        return f"{self.grid.name}, {self.grid.granularity.kind}"
