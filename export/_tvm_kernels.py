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
from typing import Any, Literal

from ._tvm_builder import ir, loop, prim_func, ramp, splat, when
from ._tvm_epilogue import Epilogue, Place
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
        blocks: how many blocks of K have scales of their own; `panels` are those of one block, without padding of K.
        factors: zero points of the right operand: ``"none"``; ``"columns"``: the sum of a row (of its block) times a
            stored factor is added to the accumulator; ``"one"``: times `factor`.
        factor: see there.
    """

    batch: tuple[int, int]
    rows: int
    left: Place
    panels: Panels
    zero: int
    blocks: int = 1
    factors: Literal["none", "columns", "one"] = "none"
    factor: int = 0

    @property
    def name(self) -> str:
        """Of the function, for people: bits of the right operand and the sizes."""
        k = f"{self.blocks}x{self.panels.k}" if self.blocks > 1 else f"{self.panels.k}"
        return f"integer_{self.panels.bits}bit_{self.products}x{self.rows}x{k}x{self.panels.n}"

    @property
    def products(self) -> int:
        """Number of independent products."""
        return self.batch[0] * self.batch[1]

    @property
    def macs(self) -> int:
        """Multiply-accumulates, padding included."""
        return self.products * self.rows * self.blocks * self.panels.depth * self.panels.columns

    @property
    def extra(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Arguments between the operands of the product and those of the epilogue: name, shape, dtype."""
        found: list[tuple[str, tuple[int, ...], str]] = []
        if self.factors != "none":
            found.append(("sums", (self.products, self.blocks, self.rows), "int32"))
        if self.factors == "columns":
            found.append(("factors", (self.blocks, self.panels.n), "int32"))
        if self.blocks > 1:
            found.append(("scales", (self.blocks, self.panels.n), "float32"))
        return found


def product_arguments(geometry: Geometry, epilogue: Epilogue) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of a product's buffers: both operands, `Geometry.extra`, those of the epilogue, outputs."""
    panels = geometry.panels
    return [
        ("a", geometry.left.shape, "uint8"),
        ("b", (geometry.products * geometry.blocks, *panels.stored_shape), "uint8" if panels.bits == 4 else "int8"),
        *geometry.extra,
        *((f"x{i}", place.shape, place.dtype) for i, place in enumerate(epilogue.operands)),
        *((f"o{i}", place.shape, place.dtype) for i, (_, place) in enumerate(epilogue.outputs)),
    ]


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

    def unpack(self, stored: Any, base: Any, panel: Any, to: Any = 0) -> None:
        """One panel of 4-bit codes, two a byte from flat `base` on, as ``runs * line`` signed bytes from `to` on."""
        from tvm import tirx

        b, step = ir(), self.step
        eight, fifteen, four = (splat(tirx.const(x, "uint8"), step) for x in (8, 15, 4))

        def signed(nibble: Any) -> Any:
            """Two's complement of 4 bits, in a byte: ``(x ^ 8) - 8``."""
            return tirx.reinterpret(f"int8x{step}", tirx.bitwise_xor(nibble, eight) - eight)

        with b.serial(0, self.panels.stored_shape[1]) as k:
            for v in range(self.line // step):
                pair = stored[ramp(base + k * self.line + v * step, step)]
                low, high = tirx.bitwise_and(pair, fifteen), tirx.shift_right(pair, four)
                b.buffer_store(panel, signed(low), [ramp(to + k * 2 * self.line + v * step, step)])
                b.buffer_store(panel, signed(high), [ramp(to + (k * 2 + 1) * self.line + v * step, step)])


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
    high = isa.rows_of(panels.width)
    cuts = cuts_of(batch * count, rows, high)
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

            each_tile(rows, high, cut, cuts, tile)

    arguments = [
        ("a", (batch, rows, depth), "float32"),
        ("b", (batch, count, runs, line), "float32"),
        ("o", (batch, rows, columns), "float32"),
    ]
    return prim_func(arguments, body)
