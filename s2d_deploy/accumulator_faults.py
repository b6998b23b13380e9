"""What is wrong with int32 accumulators that differ from the exact integer product: a name for the difference.

Each hypothesis predicts the wrong accumulators from the operands' codes, exactly; one that predicts every element is
the cause. Nothing is fitted but integers (a zero point, a limit).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from s2d_deploy.session import Array

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class AccumulatorFault:
    """A cause.

    Attributes:
        cause: ``"wrong-zero-point"``, ``"saturation"``, ``"swapped-axis"``, or ``"wrong-weights"`` where nothing fits.
        detail: in words.
        exact: whether it predicts every accumulator.
    """

    cause: str
    detail: str
    exact: bool


def classify_accumulators(expected: Array, actual: Array, lhs: Array, rhs: Array) -> AccumulatorFault:
    """Name the difference of two accumulator arrays.

    Args:
        expected: the exact product, ``(..., M, N)``.
        actual: the runtime's, of the same shape.
        lhs: left codes minus their zero point, ``(..., M, K)``.
        rhs: right codes minus theirs, ``(..., K, N)``; ``(K, N)`` for a stored weight.
    """
    want, got = expected.astype(np.int64), actual.astype(np.int64)
    left, right = lhs.astype(np.float64), rhs.astype(np.float64)  # exact: see s2d_deploy.integer
    for fault, predicted in _hypotheses(want, got, left, right):
        if np.array_equal(predicted, got):
            return fault
    off = got != want
    columns = int(off.reshape(-1, off.shape[-1]).any(axis=0).sum())
    return AccumulatorFault(
        "wrong-weights",
        f"the products of {columns} of {off.shape[-1]} output channels are those of other weights",
        exact=False,
    )


def _hypotheses(
    want: Int64, got: Int64, left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]
) -> Iterator[tuple[AccumulatorFault, Int64]]:
    difference = got - want
    sums = np.broadcast_to(right.sum(axis=-2, keepdims=True), want.shape).astype(np.int64)
    shift = _multiple(difference, sums)
    if shift is not None:
        yield (
            AccumulatorFault(
                "wrong-zero-point", f"the kernel takes the left operand's zero point {-shift:+d} away", exact=True
            ),
            want + shift * sums,
        )
    sums = np.broadcast_to(left.sum(axis=-1, keepdims=True), want.shape).astype(np.int64)
    shift = _multiple(difference, sums)
    if shift is not None:
        yield (
            AccumulatorFault(
                "wrong-zero-point", f"the kernel takes the right operand's zero point {-shift:+d} away", exact=True
            ),
            want + shift * sums,
        )
    low, high = int(got.min()), int(got.max())
    fault = AccumulatorFault("saturation", f"accumulators saturate at {low:,} and {high:,}", exact=True)
    if low > want.min() or high < want.max():
        yield fault, np.clip(want, max(low, want.min()), min(high, want.max()))
    yield (
        AccumulatorFault("saturation", "sums of two byte products saturate at 16 bits", exact=True),
        _pairs_saturate(left, right, want),
    )
    k, n = right.shape[-2:]
    if k == n:
        yield (
            AccumulatorFault("swapped-axis", "the right operand is transposed", exact=True),
            (left @ np.swapaxes(right, -1, -2)).astype(np.int64),
        )
    elif right.ndim == 2:
        yield (
            AccumulatorFault("swapped-axis", "the weight is read in the other memory order", exact=True),
            (left @ right.T.reshape(k, n)).astype(np.int64),
        )
    yield (
        AccumulatorFault("swapped-axis", "the inner dimension runs backwards", exact=True),
        (left @ right[..., ::-1, :]).astype(np.int64),
    )
    order = _column_order(want, got)
    if order is not None:
        yield (
            AccumulatorFault("swapped-axis", "the output channels stand in another order", exact=True),
            want[..., order],
        )


def _multiple(difference: Int64, sums: Int64) -> int | None:
    at = np.abs(sums).argmax()
    base = int(sums.flat[at])
    if base == 0 or int(difference.flat[at]) % base:
        return None
    shift = int(difference.flat[at]) // base
    return shift or None


def _pairs_saturate(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64], want: Int64) -> Int64:
    """What ``vpmaddubsw`` adds: neighbours along K in 16 bits, saturated, for unsigned left codes."""
    if right.ndim != 2 or left.shape[-1] % 2 or want.size * left.shape[-1] > 1 << 24:
        return want  # equal to what was expected, so it explains nothing
    rows = left.reshape(-1, left.shape[-1])
    pairs = rows[:, 0::2, None] * right[None, 0::2] + rows[:, 1::2, None] * right[None, 1::2]
    sums: Int64 = np.clip(pairs, -(1 << 15), (1 << 15) - 1).sum(axis=1).astype(np.int64).reshape(want.shape)
    return sums


def _column_order(want: Int64, got: Int64) -> npt.NDArray[np.intp] | None:
    a, b = want.reshape(-1, want.shape[-1]).T, got.reshape(-1, got.shape[-1]).T
    places = {column.tobytes(): i for i, column in enumerate(np.ascontiguousarray(a))}
    order = [places.get(column.tobytes(), -1) for column in np.ascontiguousarray(b)]
    return None if -1 in order else np.array(order, np.intp)
