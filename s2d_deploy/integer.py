"""Exact integer contractions in NumPy: what a quantized product means, slow enough to be obvious.

    accumulator = sum_k (lhs - lhs_zero_point) * (rhs - rhs_zero_point)         int32
    output      = float32(accumulator) * (lhs_scale * rhs_scale)                float32

Nothing is lost in the accumulators: a product of 8-bit codes is an integer below 2**17 in magnitude, so a sum of fewer
than 2**36 of them stays below 2**53, and float64 holds it and every partial sum without rounding. That is why
`_exact_matmul` may hand the sum to BLAS: in whatever order it adds, the integer is the same. A final sum outside int32
is an error, not a wrapped number. (Partial sums may leave int32 on the way: two's complement hardware wraps, and comes
back to the same final value.)

Rescaling rounds three times: int32 -> float32 (exact below 2**24), the product of the scales, and the product with it.
The scales are multiplied first, as ONNX Runtime's MatMulIntegerToFloat does; ``(accumulator * lhs_scale) * rhs_scale``
may differ in the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from s2d_deploy.errors import PlanError, message
from s2d_deploy.session import Array

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

_EXACT_IN_FLOAT64 = 1 << 53
_INT32 = np.iinfo(np.int32)


def integer_matmul(
    lhs_codes: Array, rhs_codes: Array, lhs_zero_point: Array | int = 0, rhs_zero_point: Array | int = 0
) -> Int32:
    """Accumulators of a matrix product of codes, batched as `numpy.matmul` batches.

    Args:
        lhs_codes: integer codes ``(..., M, K)``.
        rhs_codes: integer codes ``(..., K, N)``.
        lhs_zero_point: a scalar, or broadcastable against `lhs_codes`.
        rhs_zero_point: a scalar, ``(N,)`` per output channel, or broadcastable against `rhs_codes`.

    Returns:
        int32 ``(..., M, N)``.

    Raises:
        PlanError: a sum does not fit into int32.
    """
    product = _exact_matmul(_centred(lhs_codes, lhs_zero_point), _centred(rhs_codes, rhs_zero_point))
    return _as_int32(product, lhs_codes.shape[-1])


def integer_matmul_blocks(
    lhs_codes: Array, rhs_codes: Array, block: int, lhs_zero_point: Array | int = 0, rhs_zero_point: Array | int = 0
) -> Int32:
    """Accumulators of a matrix product whose right operand has one scale for each run of `block` along K.

    A scale that changes along K cannot leave the sum, so there is one accumulator for each block.

    Args:
        lhs_codes: ``(..., M, K)``.
        rhs_codes: ``(K, N)``.
        block: length of a run; divides K.
        lhs_zero_point: a scalar.
        rhs_zero_point: a scalar, or ``(K / block, N)``.

    Returns:
        int32 ``(K / block, ..., M, N)``.

    Raises:
        PlanError: `block` does not divide K, or a sum does not fit into int32.
    """
    k = rhs_codes.shape[0]
    if k % block:
        raise PlanError(
            message(
                "the inner dimension is not divisible by the block size",
                expected=f"a multiple of {block}",
                found=str(k),
            )
        )
    zero_points = np.broadcast_to(rhs_zero_point, (k // block, rhs_codes.shape[1]))
    return np.stack(
        [
            integer_matmul(
                lhs_codes[..., i * block : (i + 1) * block],
                rhs_codes[i * block : (i + 1) * block],
                lhs_zero_point,
                zero_points[i],
            )
            for i in range(k // block)
        ]
    )


def integer_conv2d(
    codes: Array,
    weight_codes: Array,
    zero_point: Array | int = 0,
    weight_zero_point: Array | int = 0,
    *,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
) -> Int32:
    """Accumulators of a convolution of codes. Padding has the *value* zero, that is the code `zero_point`.

    Args:
        codes: ``(B, C, H, W)``.
        weight_codes: ``(O, C / groups, kh, kw)``.
        zero_point: a scalar.
        weight_zero_point: a scalar, or ``(O,)`` per output channel.
        stride, dilation: vertical, horizontal.
        padding: top, left, bottom, right (ONNX's order).
        groups: channel groups.

    Returns:
        int32 ``(B, O, H', W')``.

    Raises:
        PlanError: a sum does not fit into int32.
    """
    weight_zero_point = np.asarray(weight_zero_point)
    if weight_zero_point.ndim == 1:
        weight_zero_point = weight_zero_point.reshape(-1, 1, 1, 1)
    weight = _centred(weight_codes, weight_zero_point)
    # Centred before it is padded: then a padded zero is the value zero.
    columns = patches(_centred(codes, zero_point), weight.shape[2:], stride, padding, dilation, groups)
    batch, _, k, height, width = columns.shape
    lhs = weight.reshape(groups, -1, k)
    product = _exact_matmul(lhs, columns.reshape(batch, groups, k, height * width))
    return _as_int32(product.reshape(batch, weight.shape[0], height, width), k)


def patches(
    x: Array,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """What each output position of a convolution sees: ``(B, C, H, W) -> (B, groups, C / groups * kh * kw, H', W')``.

    Padded with zeros; arguments as in `integer_conv2d`.
    """
    top, left, bottom, right = padding
    x = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    batch, channels, height, width = x.shape
    out_h = (height - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    out_w = (width - dilation[1] * (kernel[1] - 1) - 1) // stride[1] + 1
    taps = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            y0, x0 = i * dilation[0], j * dilation[1]
            y1, x1 = y0 + (out_h - 1) * stride[0] + 1, x0 + (out_w - 1) * stride[1] + 1
            taps.append(x[:, :, y0 : y1 : stride[0], x0 : x1 : stride[1]])
    seen = np.stack(taps, axis=2)  # (B, C, kh * kw, H', W')
    return seen.reshape(batch, groups, channels // groups * len(taps), out_h, out_w)


def rescale(accumulators: Int32, lhs_scale: Array, rhs_scale: Array, axis: int = -1) -> Float32:
    """Float values of accumulators: ``float32(accumulator) * (lhs_scale * rhs_scale)``, all in FP32.

    Args:
        accumulators: int32, any shape.
        lhs_scale: float32 scalar, or broadcastable against `accumulators` (one for each token: ``(..., M, 1)``).
        rhs_scale: float32 scalar, or one for each index of `axis`.
        axis: the output channels' dimension of `accumulators`: -1 for a matrix product, 1 for a convolution.
    """
    right = np.asarray(rhs_scale, dtype=np.float32)
    if right.ndim == 1:
        shape = [1] * accumulators.ndim
        shape[axis] = -1
        right = right.reshape(shape)
    result: Float32 = accumulators.astype(np.float32) * (np.asarray(lhs_scale, dtype=np.float32) * right)
    return result


def rescale_blocks(accumulators: Int32, lhs_scale: Array, rhs_scale: Array) -> Float32:
    """Float values of block accumulators: each block rescaled as in `rescale`, then added in FP32, first block first.

    Args:
        accumulators: int32 ``(K / block, ..., M, N)``.
        lhs_scale: float32 scalar, or broadcastable against ``(..., M, N)``.
        rhs_scale: float32 ``(K / block, N)``.

    Returns:
        float32 ``(..., M, N)``.
    """
    total = rescale(accumulators[0], lhs_scale, rhs_scale[0])
    for block, scale in zip(accumulators[1:], rhs_scale[1:], strict=True):
        total += rescale(block, lhs_scale, scale)
    return total


def _centred(codes: Array, zero_point: Array | int) -> Float64:
    # int64 first: codes may be unsigned or 4-bit types, where a subtraction would wrap.
    centred: Float64 = (codes.astype(np.int64) - np.asarray(zero_point).astype(np.int64)).astype(np.float64)
    return centred


def _exact_matmul(lhs: Float64, rhs: Float64) -> Array:
    """An integer product of integers held in float64: by BLAS where that cannot round, else in int64."""
    largest = lhs.shape[-1] * (np.abs(lhs).max(initial=0) * np.abs(rhs).max(initial=0))
    dtype = np.float64 if largest < _EXACT_IN_FLOAT64 else np.int64
    product: Array = np.matmul(lhs.astype(dtype, copy=False), rhs.astype(dtype, copy=False))
    return product


def _as_int32(sums: Array, k: int) -> Int32:
    low, high = (float(sums.min()), float(sums.max())) if sums.size else (0.0, 0.0)
    if low < _INT32.min or high > _INT32.max:
        raise PlanError(
            message(
                f"an accumulator over {k} products overflows int32",
                expected=f"sums within {_INT32.min} .. {_INT32.max}",
                found=f"{low:.0f} .. {high:.0f}",
                fix="use fewer bits for one operand of this layer, or per-block weights, which have shorter sums",
            )
        )
    return sums.astype(np.int32)
