"""TensorIR kernels that work row by row: LayerNorm (with what follows it) and softmax over the last axis, FP32.

Two passes for the variance (the mean first), the largest value subtracted before the exponential; rows run in parallel,
the elements of a row in vectors, what is left over one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ._tvm_builder import ir, loop, prim_func
from ._tvm_epilogue import Epilogue, scratch_of, store
from ._tvm_math import exp_of_negative

LANES = 16
_SERIAL_BELOW = 1 << 15  # elements; waking another thread takes longer than so many


@lru_cache(maxsize=512)
def layer_norm_kernel(rows: int, width: int, epsilon: float, epilogue: Epilogue) -> Any:
    """``(rows, width)``, operands -> outputs, as a PrimFunc; value 0 of the epilogue is ``(x - mean) / deviation``."""
    from tvm import tirx

    arguments = [
        ("x", (rows, width), "float32"),
        *((f"x{i}", place.shape, place.dtype) for i, place in enumerate(epilogue.operands)),
        *((f"o{i}", place.shape, place.dtype) for i, (_, place) in enumerate(epilogue.outputs)),
    ]

    def body(x: Any, *others: Any) -> None:
        operands, outputs = others[: len(epilogue.operands)], others[len(epilogue.operands) :]
        with loop(rows * width, _SERIAL_BELOW)(0, rows) as row:
            b = ir()
            lanes, total = _row_buffers()
            scratch = scratch_of(epilogue, LANES)
            start = row * width
            _sum(lanes, total, 0, width, lambda at: x[start + at])
            b.buffer_store(total, total[0] / tirx.const(float(width), "float32"), [0])

            def square(at: Any) -> Any:
                return (x[start + at] - total[0]) * (x[start + at] - total[0])

            _sum(lanes, total, 1, width, square)
            variance = total[1] / tirx.const(float(width), "float32") + tirx.const(epsilon, "float32")
            b.buffer_store(total, tirx.const(1.0, "float32") / tirx.sqrt(variance), [1])

            def element(at: Any, lane: Any) -> None:
                value = (x[start + at] - total[0]) * total[1]
                store(epilogue, operands, outputs, value, (0, 0, row, at), scratch, lane)

            _each(width, element)

    return prim_func(arguments, body)


@lru_cache(maxsize=512)
def softmax_kernel(rows: int, width: int) -> Any:
    """``(rows, width) -> (rows, width)`` as a PrimFunc."""
    from tvm import tirx

    def body(x: Any, o: Any) -> None:
        with loop(rows * width, _SERIAL_BELOW)(0, rows) as row:
            b = ir()
            lanes, total = _row_buffers()
            start = row * width
            lowest = tirx.const(-3.4028234663852886e38, "float32")
            _fold(lanes, total, 0, width, lambda at: x[start + at], tirx.max, lowest)

            def power(at: Any, _lane: Any) -> None:
                b.buffer_store(o, exp_of_negative(x[start + at] - total[0]), [start + at])

            _each(width, power)
            _sum(lanes, total, 1, width, lambda at: o[start + at])
            _each(width, lambda at, _lane: b.buffer_store(o, o[start + at] / total[1], [start + at]))

    return prim_func([("x", (rows, width), "float32"), ("o", (rows, width), "float32")], body)


def _row_buffers() -> tuple[Any, Any]:
    b = ir()
    lanes, total = (b.alloc_buffer((size,), "float32") for size in (LANES, 2))
    return lanes, total


def _each(width: int, write: Callable[[Any, Any], None]) -> None:
    """``write(at, lane)`` for every element of a row: whole vectors, then one by one."""
    b = ir()
    whole = width // LANES
    if whole:
        with b.serial(0, whole) as i, b.vectorized(0, LANES) as lane:
            write(i * LANES + lane, lane)
    if width % LANES:
        with b.serial(0, width % LANES) as i:
            write(whole * LANES + i, i)


def _sum(lanes: Any, total: Any, place: int, width: int, value: Callable[[Any], Any]) -> None:
    from tvm import tirx

    _fold(lanes, total, place, width, value, lambda a, b: a + b, tirx.const(0.0, "float32"))


def _fold(
    lanes: Any,
    total: Any,
    place: int,
    width: int,
    value: Callable[[Any], Any],
    combine: Callable[[Any, Any], Any],
    first: Any,
) -> None:
    """``total[place]``: `combine` over a row, lane by lane and then over the lanes."""
    b = ir()
    with b.vectorized(0, LANES) as lane:
        b.buffer_store(lanes, first, [lane])
    _each(width, lambda at, lane: b.buffer_store(lanes, combine(lanes[lane], value(at)), [lane]))
    b.buffer_store(total, folded(lanes, LANES, combine), [place])


def folded(lanes: Any, count: int, combine: Callable[[Any, Any], Any]) -> Any:
    """`combine` over the elements of a buffer, pair by pair: a tree, since a chain would wait for every step."""
    values = [lanes[lane] for lane in range(count)]
    while len(values) > 1:
        values = [combine(*values[i : i + 2]) if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]
