# mypy: disable-error-code="untyped-decorator, no-untyped-def, valid-type, misc"
# (TVMScript: annotations are buffers, and the text is parsed by TVM, not run by Python)
"""TensorIR kernels for matrix products: exact integers, and FP32.

One family, generated for an instruction set (`Isa`) and one shape: the right operand lies in panels (`Panels`), a task
is one panel times some rows, and a register tile of `Isa.rows` rows times one panel's width walks over K. Tasks run in
parallel; nothing is allocated but the unpacked panel of 4-bit weights.

Integer kernels compute ``sum_k (a - zero) * b`` in int32, exactly: `a` are bytes without sign (signed codes plus 128,
with `zero` 128 more), because the byte dot product wants them so, and ``-zero * sum_k b`` is what the accumulators
start from. FP32 kernels sum in another order than other libraries do: they agree within a few ULPs, not bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ._tvm_isa import Isa
from ._tvm_panels import Panels

_TASKS = 16  # enough for a few threads to share evenly, few enough that starting one costs nothing
_SERIAL_BELOW = 1 << 20  # multiply-accumulates; waking another thread takes longer than such a product


def _cuts(tasks: int, tiles: int) -> int:
    """Into how many runs of row tiles each panel's work is cut."""
    return max(1, min(tiles, -(-_TASKS // tasks)))


def _outer_loop(work: int) -> Any:
    from tvm.script import tirx as T

    return T.parallel if work >= _SERIAL_BELOW else T.serial


@lru_cache(maxsize=512)  # TVM parses a kernel's text in 50 ms: equal layers share it
def integer_kernel(isa: Isa, panels: Panels, batch: int, rows: int, zero: int) -> Any:
    """``(batch, rows, depth) uint8 x (batch, *stored_shape) -> (batch, rows, columns) int32`` as a PrimFunc.

    Args:
        isa: the instruction set; its `group` is the panels'.
        panels: geometry of the right operand; 4-bit codes are unpacked once for each panel and run of rows.
        batch: number of independent products.
        rows: M.
        zero: what to subtract from the bytes of the left operand, 0 to 255.
    """
    from tvm.script import tirx as T

    lanes, height, group, dot = isa.lanes, isa.rows, panels.group, isa.dot
    count, runs, line = panels.shape
    stored_runs = panels.stored_shape[1]
    vectors, step = panels.width // lanes, lanes * panels.group
    tiles, full, rest = -(-rows // height), rows // height, rows % height
    cuts = _cuts(batch * count, tiles)
    per_cut = -(-tiles // cuts)
    i32, splat, codes = f"int32x{lanes}", f"uint8x{lanes * 4}", f"int8x{step}"
    tasks = _outer_loop(batch * rows * panels.depth * panels.columns)
    stored = "uint8" if panels.bits == 4 else "int8"

    def add(acc: Any, a: Any, n: Any, row: Any, k: Any, b: Any) -> Any:
        """`acc` plus `group` bytes of row `row` times the codes `b`."""
        if dot is None:
            return acc + T.broadcast(T.Cast("int32", a[n, row, k]), lanes) * T.Cast(i32, b)
        word = T.reinterpret("int32", a[n, row, T.ramp(k, 1, 4)])
        return T.call_llvm_pure_intrin(i32, dot, acc, T.reinterpret(splat, T.broadcast(word, lanes)), b)

    def add_zero(acc: Any, b: Any) -> Any:
        if dot is None:
            return acc + T.broadcast(T.int32(zero), lanes) * T.Cast(i32, b)
        return T.call_llvm_pure_intrin(i32, dot, acc, T.broadcast(T.uint8(zero), lanes * 4), b)

    def signed(nibble: Any) -> Any:
        """Two's complement of 4 bits, in a byte: ``(x ^ 8) - 8``."""
        eight = T.broadcast(T.uint8(8), step)
        return T.reinterpret(codes, (nibble ^ eight) - eight)

    @T.inline
    def start_values(panel, start):
        for v in T.unroll(vectors):
            start[T.ramp(v * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes)
        if zero != 0:
            for k in T.serial(runs):
                for v in T.unroll(vectors):
                    start[T.ramp(v * lanes, 1, lanes)] = add_zero(
                        start[T.ramp(v * lanes, 1, lanes)], panel[k, T.ramp(v * step, 1, step)]
                    )
            for v in T.unroll(vectors):
                start[T.ramp(v * lanes, 1, lanes)] = T.broadcast(T.int32(0), lanes) - start[T.ramp(v * lanes, 1, lanes)]

    @T.inline
    def tile(a, panel, o, start, n, p, first, height_here):
        acc = T.alloc_buffer((height * panels.width,), "int32", scope="local")
        for r in T.unroll(height_here):
            for v in T.unroll(vectors):
                acc[T.ramp((r * vectors + v) * lanes, 1, lanes)] = start[T.ramp(v * lanes, 1, lanes)]
        for k in T.serial(runs):
            for r in T.unroll(height_here):
                for v in T.unroll(vectors):
                    acc[T.ramp((r * vectors + v) * lanes, 1, lanes)] = add(
                        acc[T.ramp((r * vectors + v) * lanes, 1, lanes)],
                        a,
                        n,
                        first + r,
                        k * group,
                        panel[k, T.ramp(v * step, 1, step)],
                    )
        for r in T.unroll(height_here):
            for v in T.unroll(vectors):
                o[n, first + r, T.ramp(p * panels.width + v * lanes, 1, lanes)] = acc[
                    T.ramp((r * vectors + v) * lanes, 1, lanes)
                ]

    @T.inline
    def all_tiles(a, panel, o, n, p, cut):
        start = T.alloc_buffer((panels.width,), "int32", scope="local")
        start_values(panel, start)
        for i in T.serial(per_cut):
            if cut * per_cut + i < full:
                tile(a, panel, o, start, n, p, (cut * per_cut + i) * height, height)
            if rest != 0:  # noqa: SIM102 - decided while the kernel is generated; the inner one runs in it
                if cut * per_cut + i == full:
                    tile(a, panel, o, start, n, p, full * height, rest)

    if panels.bits == 4:

        @T.prim_func(private=True, s_tir=True)
        def kernel(
            a: T.Buffer((batch, rows, panels.depth), "uint8"),
            b: T.Buffer((batch, count, stored_runs, line), stored),
            o: T.Buffer((batch, rows, panels.columns), "int32"),
        ):
            T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
            for task in tasks(batch * count * cuts):
                panel = T.alloc_buffer((runs, line), "int8")
                for k in T.serial(stored_runs):
                    for v in T.unroll(line // step):
                        pair = T.alloc_buffer((step,), "uint8", scope="local")
                        pair[T.ramp(0, 1, step)] = b[
                            task // (count * cuts), task // cuts % count, k, T.ramp(v * step, 1, step)
                        ]
                        panel[k * 2, T.ramp(v * step, 1, step)] = signed(
                            pair[T.ramp(0, 1, step)] & T.broadcast(T.uint8(15), step)
                        )
                        panel[k * 2 + 1, T.ramp(v * step, 1, step)] = signed(
                            T.shift_right(pair[T.ramp(0, 1, step)], T.broadcast(T.uint8(4), step))
                        )
                all_tiles(a, panel, o, task // (count * cuts), task // cuts % count, task % cuts)

        return kernel

    def panel_of(b: Any, n: Any, p: Any) -> Any:
        return _View(b, n, p)

    @T.prim_func(private=True, s_tir=True)
    def kernel8(
        a: T.Buffer((batch, rows, panels.depth), "uint8"),
        b: T.Buffer((batch, count, stored_runs, line), stored),
        o: T.Buffer((batch, rows, panels.columns), "int32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        for task in tasks(batch * count * cuts):
            all_tiles(
                a,
                panel_of(b, task // (count * cuts), task // cuts % count),
                o,
                task // (count * cuts),
                task // cuts % count,
                task % cuts,
            )

    return kernel8


class _View:
    """One panel of a packed operand, read like a buffer of its own."""

    def __init__(self, buffer: Any, *prefix: Any) -> None:
        self._buffer, self._prefix = buffer, prefix

    def __getitem__(self, index: tuple[Any, ...]) -> Any:
        return self._buffer[(*self._prefix, *index)]


@lru_cache(maxsize=512)  # TVM parses a kernel's text in 50 ms: equal layers share it
def float_kernel(isa: Isa, panels: Panels, batch: int, rows: int) -> Any:
    """``(batch, rows, depth) x (batch, *shape) -> (batch, rows, columns)``, all float32, as a PrimFunc."""
    from tvm.script import tirx as T

    lanes, height = isa.lanes, isa.rows
    count, runs, line = panels.shape
    vectors = panels.width // lanes
    tiles, full, rest = -(-rows // height), rows // height, rows % height
    cuts = _cuts(batch * count, tiles)
    per_cut = -(-tiles // cuts)
    tasks = _outer_loop(4 * batch * rows * panels.depth * panels.columns)

    @T.inline
    def tile(a, b, o, n, p, first, height_here):
        acc = T.alloc_buffer((height * panels.width,), "float32", scope="local")
        for r in T.unroll(height_here):
            for v in T.unroll(vectors):
                acc[T.ramp((r * vectors + v) * lanes, 1, lanes)] = T.broadcast(T.float32(0), lanes)
        for k in T.serial(runs):
            for r in T.unroll(height_here):
                for v in T.unroll(vectors):
                    acc[T.ramp((r * vectors + v) * lanes, 1, lanes)] = (
                        acc[T.ramp((r * vectors + v) * lanes, 1, lanes)]
                        + T.broadcast(a[n, first + r, k], lanes) * b[n, p, k, T.ramp(v * lanes, 1, lanes)]
                    )
        for r in T.unroll(height_here):
            for v in T.unroll(vectors):
                o[n, first + r, T.ramp(p * panels.width + v * lanes, 1, lanes)] = acc[
                    T.ramp((r * vectors + v) * lanes, 1, lanes)
                ]

    @T.prim_func(private=True, s_tir=True)
    def kernel(
        a: T.Buffer((batch, rows, panels.depth), "float32"),
        b: T.Buffer((batch, count, runs, line), "float32"),
        o: T.Buffer((batch, rows, panels.columns), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        for task in tasks(batch * count * cuts):
            for i in T.serial(per_cut):
                if task % cuts * per_cut + i < full:
                    tile(
                        a,
                        b,
                        o,
                        task // (count * cuts),
                        task // cuts % count,
                        (task % cuts * per_cut + i) * height,
                        height,
                    )
                if rest != 0:  # noqa: SIM102
                    if task % cuts * per_cut + i == full:
                        tile(a, b, o, task // (count * cuts), task // cuts % count, full * height, rest)

    return kernel
