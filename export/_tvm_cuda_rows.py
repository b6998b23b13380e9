"""TensorIR kernels for CUDA that work row by row, a warp for each row: LayerNorm, softmax, sums; and panels of codes.

The same arithmetic as the CPU's (`_tvm_rows`, `_tvm_attention`), summed in another order: two passes for the variance,
the largest value subtracted before the exponential, probabilities multiplied by the reciprocal of their sum where
codes are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ._tvm_builder import ir, prim_func, when
from ._tvm_cuda_intrinsics import fold
from ._tvm_cuda_products import WARP, scalars
from ._tvm_epilogue import Epilogue, Place, Step, byte_code, place_of, store
from ._tvm_kernels import Geometry
from ._tvm_math import exp_of_negative
from ._tvm_panels import Panels

_ROWS = 4  # of a block
_THREADS = 256
_LOWEST = -3.4028234663852886e38


@lru_cache(maxsize=512)
def layer_norm_kernel(rows: int, width: int, epsilon: float, epilogue: Epilogue) -> Any:
    """As `_tvm_rows.layer_norm_kernel`."""
    from tvm import tirx

    arguments = [
        ("x", (rows, width), "float32"),
        *((f"x{i}", place.shape, place.dtype) for i, place in enumerate(epilogue.operands)),
        *((f"o{i}", place.shape, place.dtype) for i, (_, place) in enumerate(epilogue.outputs)),
    ]

    def body(x: Any, *others: Any) -> None:
        operands, outputs = others[: len(epilogue.operands)], others[len(epilogue.operands) :]
        with _row(rows) as (row, lane):
            b = ir()
            number = tirx.const(float(width), "float32")
            mean = _folded("sum", width, lane, lambda at: x[row * width + at]) / number
            mean = _held(mean)
            squares = _folded(
                "sum", width, lane, lambda at: (x[row * width + at] - mean) * (x[row * width + at] - mean)
            )
            factor = _held(tirx.const(1.0, "float32") / tirx.sqrt(squares / number + tirx.const(epsilon, "float32")))
            scratch = scalars(epilogue)

            def element(at: Any) -> None:
                value = (x[row * width + at] - mean) * factor
                store(epilogue, operands, outputs, value, (0, 0, row, at), scratch, 0)

            _each(b, width, lane, element)

    return prim_func(arguments, body)


@lru_cache(maxsize=512)
def softmax_kernel(rows: int, width: int) -> Any:
    """``(rows, width) -> (rows, width)``, float32."""

    def body(x: Any, o: Any) -> None:
        with _row(rows) as (row, lane):
            power, total = _softmax(x, row, width, lane)
            _each(ir(), width, lane, lambda at: ir().buffer_store(o, power(at) / total, [row * width + at]))

    return prim_func([("x", (rows, width), "float32"), ("o", (rows, width), "float32")], body)


@lru_cache(maxsize=512)
def softmax_codes_kernel(shape: tuple[int, int, int], code: Step, depth: int) -> Any:
    """Scores ``(products, rows, width)``, the quantizer's scale -> bytes ``(products, rows, depth)``.

    Bytes beyond `width` are 0.
    """
    from tvm import tirx

    rows, width = shape[0] * shape[1], shape[2]

    def body(x: Any, scale: Any, o: Any) -> None:
        with _row(rows) as (row, lane):
            power, total = _softmax(x, row, width, lane)
            factor = _held(tirx.const(1.0, "float32") / total)

            def element(at: Any) -> None:
                byte = byte_code(power(at) * factor, scale[0], code)
                ir().buffer_store(o, byte, [row * depth + at])

            _each(ir(), width, lane, element)
            if depth > width:

                def clear(at: Any) -> None:
                    ir().buffer_store(o, tirx.const(0, "uint8"), [row * depth + width + at])

                _each(ir(), depth - width, lane, clear)

    arguments = [("x", shape, "float32"), ("scale", (), "float32"), ("o", (*shape[:2], depth), "uint8")]
    return prim_func(arguments, body)


def _softmax(x: Any, row: Any, width: int, lane: Any) -> tuple[Callable[[Any], Any], Any]:
    """e^(x - largest) of an element, and the sum of all of them."""
    largest = _held(_folded("max", width, lane, lambda at: x[row * width + at]))

    def power(at: Any) -> Any:
        return exp_of_negative(_held(x[row * width + at] - largest))  # held, since the polynomial names it many times

    return power, _held(_folded("sum", width, lane, power))


@lru_cache(maxsize=512)
def row_sums_kernel(geometry: Geometry) -> Any:
    """As `_tvm_kernels.row_sums_kernel`: int32, exact."""
    from tvm import tirx

    k, blocks, rows = geometry.panels.k, geometry.blocks, geometry.rows
    total_rows = geometry.products * blocks * rows

    def body(a: Any, o: Any) -> None:
        b = ir()
        blocks_of_threads = -(-total_rows // _THREADS)
        with b.launch_thread("blockIdx.x", blocks_of_threads) as block, b.launch_thread("threadIdx.x", _THREADS) as at:
            place = block * _THREADS + at
            with when(place < total_rows if total_rows % _THREADS else True):
                product, part, row = place // (blocks * rows), place // rows % blocks, place % rows
                outer, inner = product // geometry.batch[1], product % geometry.batch[1]
                begin = place_of(geometry.left, outer, inner, row, 0) + part * k
                total = b.alloc_buffer((1,), "int32", scope="local")
                b.buffer_store(total, tirx.const(-geometry.zero * k, "int32"), [0])
                with b.serial(0, k) as i:
                    b.buffer_store(total, total[0] + a[begin + i].astype("int32"), [0])
                b.buffer_store(o, total[0], [place])

    shape = (geometry.products, blocks, rows)
    return prim_func([("a", geometry.left.shape, "uint8"), ("o", shape, "int32")], body)


@lru_cache(maxsize=512)
def panels_kernel(batch: tuple[int, int], panels: Panels, source: Place, offset: int) -> Any:
    """As `_tvm_attention.panels_kernel`: a thread for each word of the result."""
    from tvm import tirx

    count, runs, _ = panels.shape
    products = batch[0] * batch[1]
    words = products * count * runs * panels.width

    def body(x: Any, o: Any) -> None:
        b = ir()
        grid = -(-words // _THREADS)
        with b.launch_thread("blockIdx.x", grid) as block, b.launch_thread("threadIdx.x", _THREADS) as thread:
            at = block * _THREADS + thread
            with when(at < words if words % _THREADS else True):
                product, p = at // (count * runs * panels.width), at // (runs * panels.width) % count
                run, column = at // panels.width % runs, p * panels.width + at % panels.width
                base = place_of(source, product // batch[1], product % batch[1], 0, column)
                for g in range(4):
                    k = run * 4 + g
                    code = x[base + k * source.strides[2]].astype("int32") - offset
                    inside = tirx.all(k < panels.k, column < panels.n)
                    value = tirx.if_then_else(inside, code, tirx.const(0, "int32")).astype("int8")
                    b.buffer_store(o, value, [at * 4 + g])

    return prim_func([("x", source.shape, source.dtype), ("o", (products, *panels.shape), "int8")], body)


@contextmanager
def _row(rows: int) -> Iterator[tuple[Any, Any]]:
    """A row, and this thread's lane of the warp that has it."""
    b = ir()
    grid, threads = -(-rows // _ROWS), _ROWS * WARP
    with b.launch_thread("blockIdx.x", grid) as block, b.launch_thread("threadIdx.x", threads) as thread:
        row = block * _ROWS + thread // WARP
        with when(row < rows if rows % _ROWS else True):  # whole warps, so that folds see every lane
            yield row, thread % WARP


def _held(value: Any) -> Any:
    """`value` in a register of its own."""
    buffer = ir().alloc_buffer((1,), "float32", scope="local")
    ir().buffer_store(buffer, value, [0])
    return buffer[0]


def _each(b: Any, width: int, lane: Any, write: Callable[[Any], None]) -> None:
    """``write(at)`` for every element of a row that is this lane's."""
    with b.serial(0, -(-width // WARP)) as i:
        at = i * WARP + lane
        with when(at < width if width % WARP else True):
            write(at)


def _folded(kind: str, width: int, lane: Any, value: Callable[[Any], Any]) -> Any:
    """The sum or the largest of a row, in every lane."""
    from tvm import tirx

    b = ir()
    own = b.alloc_buffer((1,), "float32", scope="local")
    b.buffer_store(own, tirx.const(0.0 if kind == "sum" else _LOWEST, "float32"), [0])

    def add(at: Any) -> None:
        b.buffer_store(own, own[0] + value(at) if kind == "sum" else tirx.max(own[0], value(at)), [0])

    _each(b, width, lane, add)
    return fold(kind, own[0])
