"""TensorIR kernels for matrix products: exact integers with an epilogue on the register tile, and FP32.

One family, generated for an instruction set (`Isa`) and one shape: the right operand lies in panels (`Panels`), a task
is one panel times some rows, and a register tile of `Isa.rows` rows times one panel's width walks over K. Tasks run in
parallel; nothing is allocated but the unpacked panel of 4-bit weights and one tile.

Kernels compute ``sum_k (a - zero) * b`` in int32, exactly (`_tvm_multiply`): `a` are bytes without sign (signed codes
plus 128, with `zero` 128 more), because most byte dot products want them so, and ``-zero * sum_k b`` is what the
accumulators start from. What leaves a tile is decided by an `Epilogue`: the accumulators themselves, floats, or the
next kernel's bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ._tvm_builder import ir, loop, prim_func, ramp, splat, when
from ._tvm_epilogue import Epilogue, Place, place_of, scratch_of, store
from ._tvm_isa import Isa
from ._tvm_multiply import NARROW_RUNS, Multiplier
from ._tvm_panels import Panels

_TASKS = 16  # enough for a few threads to share evenly, few enough that starting one costs nothing
SERIAL_BELOW = 1 << 20  # multiply-accumulates; waking another thread takes longer than such a product


@dataclass(frozen=True, slots=True)
class Geometry:
    """One product of codes.

    Attributes:
        batch: independent products: outer, and inner (heads).
        rows: M.
        left: shape of the left operand's bytes, and elements from one batch, inner batch and row to the next; the
            bytes of one row lie side by side, `panels.depth` of them.
        panels: geometry of the right operand.
        zero: what to subtract from the bytes of the left operand, 0 to 255.
    """

    batch: tuple[int, int]
    rows: int
    left: Place
    panels: Panels
    zero: int

    @property
    def name(self) -> str:
        """Of the function, for people: bits of the right operand and the sizes."""
        return f"integer_{self.panels.bits}bit_{self.products}x{self.rows}x{self.panels.k}x{self.panels.n}"

    @property
    def products(self) -> int:
        """Number of independent products."""
        return self.batch[0] * self.batch[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding included."""
        return self.products * self.rows * self.panels.depth * self.panels.columns


def cuts_of(tasks: int, rows: int, height: int) -> int:
    """Into how many runs of row tiles each panel's work is cut."""
    return max(1, min(-(-rows // height), -(-_TASKS // tasks)))


def each_tile(rows: int, height: int, cut: Any, cuts: int, write: Callable[[Any, int], None]) -> None:
    """``write(first row, rows)`` for every tile of run `cut` of `cuts`; the last tile may have fewer rows."""
    full, rest = rows // height, rows % height
    per_cut = -(-(full + (rest > 0)) // cuts)
    with ir().serial(0, per_cut) as i:
        at = cut * per_cut + i
        if full:
            with when(at < full):
                write(at * height, height)
        if rest:
            with when(at == full):
                write(full * height, rest)


class Tile:
    """Writes the inner loops of a product: the register tile that walks over K."""

    def __init__(self, isa: Isa, geometry: Geometry) -> None:
        self.isa, self.geometry, self.panels = isa, geometry, geometry.panels
        self.vectors = self.panels.width // isa.lanes
        self.line = self.panels.width * self.panels.group
        self.step = isa.lanes * self.panels.group
        self.runs = self.panels.shape[1]
        self.multiplier = Multiplier(isa)
        self.narrow = bool(isa.narrow) and self.panels.bits == 4

    def start(self, codes: Callable[[Any, int], Any], into: Any, base: Any = 0) -> None:
        """What the accumulators of a panel start from: `width` elements of `into`, from `base` on."""
        from tvm import tirx

        b, lanes = ir(), self.isa.lanes
        sums = b.alloc_buffer((self.panels.width,), "int32")
        nothing = splat(tirx.const(0, "int32"), lanes)
        places = [(v, ramp(v * lanes, lanes)) for v in range(self.vectors)]
        for _, at in places:
            b.buffer_store(sums, nothing, [at])
        zero = self.multiplier.word_of(self.geometry.zero)
        if not self.multiplier.is_nothing(self.geometry.zero):
            with b.serial(0, self.runs) as k:
                for v, at in places:
                    b.buffer_store(sums, self.multiplier.add(sums[at], zero, codes(k, v)), [at])
        for v, at in places:
            b.buffer_store(into, nothing - sums[at], [ramp(base + v * lanes, lanes)])

    def accumulate(
        self, a: Any, row_starts: list[Any], start: Callable[[int], Any], codes: Callable[[Any, int], Any], out: Any
    ) -> None:
        """``out[r, :width] = start + sum_k a[row r, k] * codes[k, :]``, `out` being flat with rows of `width`."""
        b, lanes, width = ir(), self.isa.lanes, self.panels.width
        # A vector for each accumulator, small enough for the stack: LLVM keeps them in registers.
        acc = {(r, v): b.alloc_buffer((lanes,), "int32") for r in range(len(row_starts)) for v in range(self.vectors)}
        every = ramp(0, lanes)
        for (_, v), vector in acc.items():
            b.buffer_store(vector, start(v), [every])
        if self.narrow:
            self._walk_narrow(a, row_starts, codes, acc)
        else:
            self._walk(a, row_starts, codes, acc)
        for (r, v), vector in acc.items():
            b.buffer_store(out, vector[every], [ramp(r * width + v * lanes, lanes)])

    def _walk(
        self, a: Any, row_starts: list[Any], codes: Callable[[Any, int], Any], acc: dict[tuple[int, int], Any]
    ) -> None:
        """Add the products of all of K to the accumulators."""
        b, multiplier, every = ir(), self.multiplier, ramp(0, self.isa.lanes)

        def groups(first: Any, count: int) -> None:
            words = [multiplier.words(a, start + first * self.panels.group, count) for start in row_starts]
            for i in range(count):
                for (r, v), vector in acc.items():
                    b.buffer_store(vector, multiplier.add(vector[every], words[r][i], codes(first + i, v)), [every])

        ahead = self.isa.ahead
        if self.runs // ahead:
            with b.serial(0, self.runs // ahead) as k:
                groups(k * ahead, ahead)
        for run in range(self.runs // ahead * ahead, self.runs):
            groups(run, 1)

    def _walk_narrow(
        self, a: Any, row_starts: list[Any], codes: Callable[[Any, int], Any], acc: dict[tuple[int, int], Any]
    ) -> None:
        """The same for 4-bit codes: accumulated in 16 bits as long as that is exact, then added to the accumulators."""
        from tvm import tirx

        b, multiplier, every = ir(), self.multiplier, ramp(0, self.isa.lanes)
        narrow = {at: b.alloc_buffer((2 * self.isa.lanes,), "int16") for at in acc}
        both = ramp(0, 2 * self.isa.lanes)

        def groups(first: Any, count: int) -> None:
            for vector in narrow.values():
                b.buffer_store(vector, splat(tirx.const(0, "int16"), 2 * self.isa.lanes), [both])
            with b.serial(0, count) as i:
                run = first + i
                for (r, v), vector in narrow.items():
                    (word,) = multiplier.words(a, row_starts[r] + run * self.panels.group, 1)
                    b.buffer_store(vector, multiplier.add_narrow(vector[both], word, codes(run, v)), [both])
            for at, vector in acc.items():
                b.buffer_store(vector, multiplier.widen(vector[every], narrow[at][both]), [every])

        whole, rest = divmod(self.runs, NARROW_RUNS)
        if whole:
            with b.serial(0, whole) as chunk:
                groups(chunk * NARROW_RUNS, NARROW_RUNS)
        if rest:
            groups(whole * NARROW_RUNS, rest)

    def unpack(self, stored: Any, base: Any) -> Any:
        """One panel of 4-bit codes, two a byte from flat `base` on, as signed bytes: a buffer of ``runs * line``."""
        from tvm import tirx

        b, step = ir(), self.step
        panel = b.alloc_buffer((self.runs * self.line,), "int8")
        eight, fifteen, four = (splat(tirx.const(x, "uint8"), step) for x in (8, 15, 4))

        def signed(nibble: Any) -> Any:
            """Two's complement of 4 bits, in a byte: ``(x ^ 8) - 8``."""
            return tirx.reinterpret(f"int8x{step}", tirx.bitwise_xor(nibble, eight) - eight)

        with b.serial(0, self.panels.stored_shape[1]) as k:
            for v in range(self.line // step):
                pair = stored[ramp(base + k * self.line + v * step, step)]
                low, high = tirx.bitwise_and(pair, fifteen), tirx.shift_right(pair, four)
                b.buffer_store(panel, signed(low), [ramp(k * 2 * self.line + v * step, step)])
                b.buffer_store(panel, signed(high), [ramp((k * 2 + 1) * self.line + v * step, step)])
        return panel


@lru_cache(maxsize=512)
def integer_kernel(isa: Isa, geometry: Geometry, epilogue: Epilogue) -> Any:
    """left bytes, right panels, operands -> outputs, as a PrimFunc.

    Args:
        isa: the instruction set; its `group` is the panels'.
        geometry: of the product; the right operand is ``(products or 1, *stored_shape)``: stored weights (4-bit ones
            are unpacked once for each panel and run of rows), or the panels of an activation.
        epilogue: operands and outputs have the places that it says.
    """
    b, panels = ir(), geometry.panels
    count = panels.count
    cuts = cuts_of(geometry.products * count, geometry.rows, isa.rows)
    stored = (geometry.products, *panels.stored_shape)
    arguments = [
        ("a", geometry.left.shape, "uint8"),
        ("b", stored, "uint8" if panels.bits == 4 else "int8"),
        *((f"x{i}", place.shape, place.dtype) for i, place in enumerate(epilogue.operands)),
        *((f"o{i}", place.shape, place.dtype) for i, (_, place) in enumerate(epilogue.outputs)),
    ]
    one_matrix = panels.stored_shape[0] * panels.stored_shape[1] * panels.stored_shape[2]
    one_panel = panels.stored_shape[1] * panels.stored_shape[2]

    def body(a: Any, right: Any, *rest_of_them: Any) -> None:
        operands = rest_of_them[: len(epilogue.operands)]
        outputs = rest_of_them[len(epilogue.operands) :]
        tile = Tile(isa, geometry)
        with loop(geometry.macs, SERIAL_BELOW)(0, geometry.products * count * cuts) as task:
            product, p, cut = task // (count * cuts), task // cuts % count, task % cuts
            outer, inner = product // geometry.batch[1], product % geometry.batch[1]
            base = product * one_matrix + p * one_panel
            if panels.bits == 4:
                panel = tile.unpack(right, base)

                def codes(k: Any, v: int) -> Any:
                    return panel[ramp(k * tile.line + v * tile.step, tile.step)]
            else:

                def codes(k: Any, v: int) -> Any:
                    return right[ramp(base + k * tile.line + v * tile.step, tile.step)]

            start = b.alloc_buffer((panels.width,), "int32")
            tile.start(codes, start)
            left = place_of(geometry.left, outer, inner, 0, 0)
            out = b.alloc_buffer((isa.rows * panels.width,), "int32")

            def rows(first: Any, height: int) -> None:
                starts = [left + (first + r) * geometry.left.strides[2] for r in range(height)]
                tile.accumulate(a, starts, lambda v: start[ramp(v * isa.lanes, isa.lanes)], codes, out)
                with b.serial(0, height) as r:
                    _finish(isa, geometry, epilogue, operands, outputs, out, (outer, inner, p, first + r), r)

            each_tile(geometry.rows, isa.rows, cut, cuts, rows)

    return prim_func(arguments, body)


def _finish(
    isa: Isa,
    geometry: Geometry,
    epilogue: Epilogue,
    operands: tuple[Any, ...],
    outputs: tuple[Any, ...],
    out: Any,
    at: tuple[Any, Any, Any, Any],
    r: Any,
) -> None:
    """Store row `r` of the tile `out`, whole vectors of it and, in the last panel, what is left of N one by one."""
    panels, lanes = geometry.panels, isa.lanes
    outer, inner, p, row = at
    scratch = scratch_of(epilogue, lanes)

    def columns(first: Any, lane: Any) -> None:
        column = p * panels.width + first + lane
        store(
            epilogue,
            operands,
            outputs,
            out[r * panels.width + first + lane],
            (outer, inner, row, column),
            scratch,
            lane,
        )

    each_vector(panels, lanes, p, columns)


def each_vector(panels: Panels, lanes: int, p: Any, write: Callable[[int, Any], None]) -> None:
    """``write(first, lane)`` for the whole vectors of panel `p`, then for what is left of N one by one."""
    b = ir()
    last = panels.n - (panels.count - 1) * panels.width  # columns of the last panel
    for first in range(0, panels.width, lanes):
        whole = first + lanes <= last
        if whole or panels.count > 1:
            with when(True if whole else p < panels.count - 1), b.vectorized(0, lanes) as lane:
                write(first, lane)
        if not whole and first < last:
            with when(True if panels.count == 1 else p == panels.count - 1), b.serial(0, last - first) as lane:
                write(first, lane)


@lru_cache(maxsize=512)
def float_kernel(isa: Isa, panels: Panels, batch: int, rows: int) -> Any:
    """``(batch, rows, depth) x (batch, *shape) -> (batch, rows, columns)``, all float32, as a PrimFunc.

    Sums run in another order than other libraries': they agree within a few ULPs, not bit for bit.
    """
    from tvm import tirx

    b, lanes = ir(), isa.lanes
    count, runs, line = panels.shape
    cuts = cuts_of(batch * count, rows, isa.rows)
    depth, columns = panels.depth, panels.columns
    nothing = splat(tirx.const(0.0, "float32"), lanes)

    def body(a: Any, right: Any, o: Any) -> None:
        with loop(4 * batch * rows * depth * columns, SERIAL_BELOW)(0, batch * count * cuts) as task:
            product, p, cut = task // (count * cuts), task // cuts % count, task % cuts
            base = (product * count + p) * runs * line

            def tile(first: Any, tall: int) -> None:
                # A vector for each accumulator, small enough for the stack: LLVM keeps them in registers.
                vectors = [(r, v) for r in range(tall) for v in range(panels.width // lanes)]
                acc = {place: b.alloc_buffer((lanes,), "float32") for place in vectors}
                every = ramp(0, lanes)
                for vector in acc.values():
                    b.buffer_store(vector, nothing, [every])
                with b.serial(0, runs) as k:
                    for (r, v), vector in acc.items():
                        left = splat(a[(product * rows + first + r) * depth + k], lanes)
                        value = vector[every] + left * right[ramp(base + k * line + v * lanes, lanes)]
                        b.buffer_store(vector, value, [every])
                for (r, v), vector in acc.items():
                    place = (product * rows + first + r) * columns + p * panels.width + v * lanes
                    b.buffer_store(o, vector[every], [ramp(place, lanes)])

            each_tile(rows, isa.rows, cut, cuts, tile)

    arguments = [
        ("a", (batch, rows, depth), "float32"),
        ("b", (batch, count, runs, line), "float32"),
        ("o", (batch, rows, columns), "float32"),
    ]
    return prim_func(arguments, body)
