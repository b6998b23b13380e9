"""TensorIR kernels for attention on codes: panels of keys and values, and scores to probabilities in one pass.

`scores_kernel` computes one run of rows of one head at a time: integer products with the keys, scale and mask, softmax,
and the codes of the probabilities; scores never leave the core's cache. The product of those codes with the values is
an ordinary product (`_tvm_kernels`), whose epilogue writes the codes that the output projection reads.

Softmax subtracts the largest score, its exponential is a polynomial (`_tvm_math`), and probabilities are multiplied by
the reciprocal of their sum: a few ULPs from a division.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from . import _tvm_math as fast
from ._tvm_builder import ir, loop, prim_func, ramp, splat, when
from ._tvm_epilogue import Epilogue, Place, Step, byte_code, place_of, scratch_of, values_of
from ._tvm_isa import Isa
from ._tvm_kernels import SERIAL_BELOW, Geometry, Tile, cuts_of, each_tile, each_vector
from ._tvm_panels import Panels
from ._tvm_rows import folded

_LOWEST = -3.4028234663852886e38


@lru_cache(maxsize=512)
def panels_kernel(isa: Isa, batch: tuple[int, int], panels: Panels, source: Place, offset: int) -> Any:
    """Codes of an activation (bytes, or int8) -> panels ``(products, *shape) int8``, as a PrimFunc.

    Args:
        isa: the instruction set.
        batch: outer and inner number of matrices.
        panels: what they become.
        source: strides of (outer, inner, k, n); one of the last two is 1.
        offset: what the bytes of the source have too much: 128, or 0.
    """
    b = ir()
    count, runs, line = panels.shape
    width, group, lanes = panels.width, panels.group, isa.lanes
    products = batch[0] * batch[1]
    by_rows = source.strides[3] == 1 and group == 4 and panels.n % lanes == 0
    by_columns = source.strides[2] == 1 and group == 4 and panels.k % 4 == 0

    def code(value: Any) -> Any:
        return (value.astype("int32") - offset).astype("int8") if offset else value.astype("int8")

    def words(x: Any, at: Any, o: Any, to: Any) -> None:
        """Four consecutive k of one column, as one word."""
        from tvm import tirx

        word = x[ramp(at, 4)]
        if offset:
            word = tirx.bitwise_xor(word, splat(tirx.const(offset, "uint8"), 4))
        b.buffer_store(o, tirx.reinterpret("int8x4", word), [ramp(to, 4)])

    def interleaved(x: Any, base: Any, k: Any, taken: int, o: Any, to: Any) -> None:
        """`taken` rows of k, byte by byte side by side."""
        from tvm import tirx

        word: Any = splat(tirx.const(0, "int32"), lanes)
        for g in range(taken):
            row = x[ramp(base + (k + g) * source.strides[2], lanes)]
            if source.dtype == "int8":
                row = tirx.reinterpret(f"uint8x{lanes}", row)
            if offset:
                row = tirx.bitwise_xor(row, splat(tirx.const(offset, "uint8"), lanes))
            wide = row.astype(f"int32x{lanes}")
            word = tirx.bitwise_or(word, tirx.shift_left(wide, splat(tirx.const(8 * g, "int32"), lanes)))
        b.buffer_store(o, tirx.reinterpret(f"int8x{4 * lanes}", word), [ramp(to, 4 * lanes)])

    def body(x: Any, o: Any) -> None:
        from tvm import tirx

        zero = tirx.const(0, "int8")
        with loop(products * panels.depth * panels.columns, SERIAL_BELOW)(0, products) as product:
            base = place_of(source, product // batch[1], product % batch[1], 0, 0)
            whole_runs = panels.k // group
            with b.serial(0, count) as p:
                target = (product * count + p) * runs * line
                if by_rows:
                    for v in range(width // lanes):
                        column = p * width + v * lanes
                        at = target + v * 4 * lanes
                        with when(True if panels.columns == panels.n else column < panels.n):
                            with b.serial(0, whole_runs) as run:
                                interleaved(x, base + column, run * 4, 4, o, at + run * line)
                            if panels.k % 4:
                                interleaved(x, base + column, whole_runs * 4, panels.k % 4, o, at + whole_runs * line)
                    _zero_rest(o, target, -(-panels.k // 4), runs, line)
                    return_columns = panels.columns != panels.n
                    if return_columns:
                        with b.serial(0, width) as n, when(p * width + n >= panels.n), b.serial(0, runs * 4) as g:
                            b.buffer_store(o, zero, [target + g // 4 * line + n * 4 + g % 4])
                elif by_columns:
                    with b.serial(0, runs) as run, b.serial(0, width) as n:
                        column = p * width + n
                        at = target + run * line + n * 4
                        inside: Any = True if panels.columns == panels.n else column < panels.n
                        if panels.depth != panels.k:
                            inside = tirx.all(inside, run < whole_runs)
                        with when(inside):
                            words(x, base + column * source.strides[3] + run * 4, o, at)
                        if inside is not True:
                            with when(tirx.Not(inside)):
                                b.buffer_store(o, splat(zero, 4), [ramp(at, 4)])
                else:
                    with b.serial(0, runs) as run, b.serial(0, width) as n, b.serial(0, group) as g:
                        k, column = run * group + g, p * width + n
                        at = target + run * line + n * group + g
                        inside = tirx.all(k < panels.k, column < panels.n)
                        place = base + k * source.strides[2] + column * source.strides[3]
                        with when(inside):
                            b.buffer_store(o, code(x[place]), [at])
                        with when(tirx.Not(inside)):
                            b.buffer_store(o, zero, [at])

    return prim_func([("x", source.shape, source.dtype), ("o", (products, *panels.shape), "int8")], body)


def _zero_rest(o: Any, target: Any, first: int, runs: int, line: int) -> None:
    from tvm import tirx

    for run in range(first, runs):
        with ir().serial(0, line) as at:
            ir().buffer_store(o, tirx.const(0, "int8"), [target + run * line + at])


@lru_cache(maxsize=512)
def scores_kernel(isa: Isa, geometry: Geometry, epilogue: Epilogue, code: Step, depth: int) -> Any:
    """left bytes, key panels, `Geometry.extra`, operands, scale -> probabilities' bytes, as a PrimFunc.

    The result is ``(products, rows, depth)``.

    Args:
        isa: the instruction set.
        geometry: of the product of queries and keys.
        epilogue: from accumulators to the scores that softmax sees: its last step's value; no outputs.
        code: the quantizer of the probabilities.
        depth: bytes of a row of the result; those beyond N are 0.
    """
    from tvm import tirx

    b, panels, lanes = ir(), geometry.panels, isa.lanes
    count, columns, valid = panels.count, panels.columns, panels.n
    vectors = -(-valid // lanes)
    high = isa.rows_of(panels.width)
    cuts = cuts_of(geometry.products, geometry.rows, high)
    one_matrix = count * panels.shape[1] * panels.shape[2]
    one_panel = panels.shape[1] * panels.shape[2]
    arguments = [
        ("a", geometry.left.shape, "uint8"),
        ("b", (geometry.products, *panels.shape), "int8"),
        *geometry.extra,
        *((f"x{i}", place.shape, place.dtype) for i, place in enumerate(epilogue.operands)),
        ("scale", (), "float32"),
        ("o", (geometry.products, geometry.rows, depth), "uint8"),
    ]

    extra = len(geometry.extra)  # row sums, where the keys have a zero point

    def body(a: Any, keys: Any, *others: Any) -> None:
        operands, scale, o = others[extra : extra + len(epilogue.operands)], others[-2], others[-1]
        tile = Tile(isa, geometry)
        with loop(geometry.macs, SERIAL_BELOW)(0, geometry.products * cuts) as task:
            product, cut = task // cuts, task % cuts
            outer, inner = product // geometry.batch[1], product % geometry.batch[1]
            base, left = product * one_matrix, place_of(geometry.left, outer, inner, 0, 0)
            starts = b.alloc_buffer((columns,), "int32")
            out = b.alloc_buffer((high * panels.width,), "int32")
            scores = b.alloc_buffer((high * columns,), "float32")
            largest = b.alloc_buffer((high * lanes,), "float32")
            lane_values = b.alloc_buffer((lanes,), "float32")
            totals = b.alloc_buffer((high,), "float32")
            scratch = scratch_of(epilogue, lanes)

            def codes_of(p: Any) -> Any:
                return lambda k, v: keys[ramp(base + p * one_panel + k * tile.line + v * tile.step, tile.step)]

            with b.serial(0, count) as p:
                tile.start(codes_of(p), starts, p * panels.width)

            def score(p: Any, r: Any, row: Any, first: int, lane: Any) -> None:
                column = p * panels.width + first + lane
                accumulator = out[r * panels.width + first + lane]
                if extra:
                    accumulator = accumulator + others[0][product * geometry.rows + row] * geometry.factor
                at = (outer, inner, row, column)
                value = values_of(epilogue, operands, accumulator, at, scratch, lane)[-1]
                b.buffer_store(scores, value, [r * columns + column])
                b.buffer_store(largest, tirx.max(largest[r * lanes + lane], value), [r * lanes + lane])

            def softmax(first: Any, height: int) -> None:
                """One step for all rows of the tile before the next: what a row waits for, others hide."""
                zero, lowest = tirx.const(0.0, "float32"), tirx.const(_LOWEST, "float32")
                with b.serial(0, height) as r:
                    if valid % lanes:
                        with b.serial(0, vectors * lanes - valid) as lane:
                            b.buffer_store(scores, lowest, [r * columns + valid + lane])
                    with b.vectorized(0, lanes) as lane:
                        b.buffer_store(lane_values, largest[r * lanes + lane], [lane])
                    b.buffer_store(totals, folded(lane_values, lanes, tirx.max), [r])
                with b.serial(0, height) as r:
                    with b.vectorized(0, lanes) as lane:
                        b.buffer_store(lane_values, zero, [lane])
                    with b.serial(0, vectors) as i:
                        power = b.alloc_buffer((lanes,), "float32")
                        with b.vectorized(0, lanes) as lane:
                            at = r * columns + i * lanes + lane
                            b.buffer_store(power, fast.exp_of_negative(scores[at] - totals[r]), [lane])
                            b.buffer_store(scores, power[lane], [at])
                            b.buffer_store(lane_values, lane_values[lane] + power[lane], [lane])
                    whole = folded(lane_values, lanes, lambda x, y: x + y)
                    b.buffer_store(totals, tirx.const(1.0, "float32") / whole, [r])
                with b.serial(0, height) as r:
                    target = (product * geometry.rows + first + r) * depth

                    def finish(n: Any) -> None:
                        value = scores[r * columns + n] * totals[r]
                        b.buffer_store(o, byte_code(value, scale[0], code), [target + n])

                    if valid // lanes:
                        with b.serial(0, valid // lanes) as i, b.vectorized(0, lanes) as lane:
                            finish(i * lanes + lane)
                    if valid % lanes:
                        with b.serial(0, valid % lanes) as n:
                            finish(valid // lanes * lanes + n)
                    if depth > valid:
                        with b.serial(0, depth - valid) as n:
                            b.buffer_store(o, tirx.const(0, "uint8"), [target + valid + n])

            def rows(first: Any, height: int) -> None:
                with b.serial(0, height) as r, b.vectorized(0, lanes) as lane:
                    b.buffer_store(largest, tirx.const(_LOWEST, "float32"), [r * lanes + lane])
                with b.serial(0, count) as p:
                    row_starts = [left + (first + r) * geometry.left.strides[2] for r in range(height)]
                    tile.accumulate(
                        a,
                        row_starts,
                        lambda v: starts[ramp(p * panels.width + v * lanes, lanes)],
                        codes_of(p),
                        out,
                    )
                    with b.serial(0, height) as r:
                        each_vector(panels, lanes, p, lambda v, lane: score(p, r, first + r, v, lane))
                softmax(first, height)

            each_tile(geometry.rows, high, cut, cuts, rows)

    return prim_func(arguments, body)
