"""TensorIR kernels for products of codes: register tiles of exact integers, and an epilogue on each of them.

The work is cut into units, one register tile of one panel each, and every worker thread gets one run of them
(`shares`). Units of one panel follow each other, so that a worker unpacks its 4-bit codes, and adds up what zero
points take away, once.

Blocks of K with scales of their own are accumulated in int32, block by block, and added up in float32, in their order.
Zero points of the right operand cost one sum for each row of the left one (`row_sums_kernel`), not a product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ._tvm_builder import ir, loop, prim_func, ramp, shares, splat, when
from ._tvm_epilogue import Epilogue, place_of, scratch_of, store
from ._tvm_isa import Isa
from ._tvm_kernels import SERIAL_BELOW, Geometry, Tile, each_vector, product_arguments


@lru_cache(maxsize=512)
def integer_kernel(isa: Isa, geometry: Geometry, epilogue: Epilogue) -> Any:
    """left bytes, right panels, `Geometry.extra`, operands -> outputs, as a PrimFunc.

    Args:
        isa: the instruction set; its `group` is the panels'.
        geometry: of the product; the right operand is ``(products or blocks, *stored_shape)``: stored weights, or the
            panels of an activation.
        epilogue: operands and outputs have the places that it says. With blocks its value 0 is the sum over blocks of
            accumulator times scale, in float32 and in their order.
    """
    return prim_func(
        product_arguments(geometry, epilogue), lambda *buffers: _Writer(isa, geometry, epilogue, buffers).write()
    )


@dataclass(frozen=True)
class _Unit:
    """One register tile: where it stands.

    Attributes:
        product, outer, inner: of the batch.
        panel: of the right operand.
        first: row.
    """

    product: Any
    outer: Any
    inner: Any
    panel: Any
    first: Any


class _Writer:
    """Writes the body of one kernel; what every worker has for itself are its attributes."""

    def __init__(self, isa: Isa, geometry: Geometry, epilogue: Epilogue, buffers: tuple[Any, ...]) -> None:
        self.isa, self.geometry, self.epilogue, self.panels = isa, geometry, epilogue, geometry.panels
        self.tile = Tile(isa, geometry)
        self.left, self.right, *others = buffers
        names = [name for name, _, _ in geometry.extra]
        self.extra = dict(zip(names, others, strict=False))
        self.operands = tuple(others[len(names) : len(names) + len(epilogue.operands)])
        self.outputs = tuple(others[len(names) + len(epilogue.operands) :])
        self.one_panel = self.panels.stored_shape[1] * self.panels.stored_shape[2]
        self.one_matrix = self.panels.stored_shape[0] * self.one_panel
        self.one_unpacked = self.tile.runs * self.tile.line

    def write(self) -> None:
        """The whole kernel."""
        from tvm import tirx

        b, panels, blocks, width = ir(), self.panels, self.geometry.blocks, self.panels.width
        height = self.isa.rows_of(width)
        tiles = -(-self.geometry.rows // height)
        with shares(self.geometry.macs, SERIAL_BELOW, self.geometry.products * panels.count * tiles) as (begin, end):
            self.start = b.alloc_buffer((blocks * width,), "int32")
            self.unpacked = b.alloc_buffer((blocks * self.one_unpacked,), "int8") if panels.bits == 4 else self.right
            self.out = b.alloc_buffer((height * width,), "int32")
            self.total = b.alloc_buffer((height * width,), "float32") if blocks > 1 else self.out
            prepared = b.alloc_buffer((1,), "int32")  # the panel that was unpacked and summed up last
            b.buffer_store(prepared, tirx.const(-1, "int32"), [0])
            with b.serial(begin, end) as unit:
                which = unit // tiles
                product, tile = which // panels.count, unit % tiles
                outer, inner = product // self.geometry.batch[1], product % self.geometry.batch[1]
                at = _Unit(product, outer, inner, which % panels.count, tile * height)
                with when(prepared[0] != which):
                    self.each_block(lambda block: self.prepare(at, block))
                    b.buffer_store(prepared, which, [0])
                full, rest = divmod(self.geometry.rows, height)
                if full:
                    with when(True if not rest else tile < full):
                        self.rows(at, height)
                if rest:
                    with when(True if not full else tile == full):
                        self.rows(at, rest)

    def each_block(self, write: Callable[[Any], None]) -> None:
        """``write(block)`` for every block of K."""
        if self.geometry.blocks == 1:
            write(0)
        else:
            with ir().serial(0, self.geometry.blocks) as block:
                write(block)

    def codes(self, at: _Unit, block: Any) -> Callable[[Any, int], Any]:
        """Vector `v` of the right operand's run `k`, as signed bytes."""
        tile = self.tile
        begin = block * self.one_unpacked if self.panels.bits == 4 else self._stored(at, block)
        return lambda k, v: self.unpacked[ramp(begin + k * tile.line + v * tile.step, tile.step)]

    def prepare(self, at: _Unit, block: Any) -> None:
        """Unpack a panel, and add up what its accumulators start from."""
        if self.panels.bits == 4:
            self.tile.unpack(self.right, self._stored(at, block), self.unpacked, block * self.one_unpacked)
        self.tile.start(self.codes(at, block), self.start, block * self.panels.width)

    def rows(self, at: _Unit, height: int) -> None:
        """A register tile, and its epilogue."""
        b, panels, lanes = ir(), self.panels, self.isa.lanes
        if self.geometry.blocks > 1:
            for place in range(0, height * panels.width, lanes):
                b.buffer_store(self.total, splat(_zero("float32"), lanes), [ramp(place, lanes)])
        self.each_block(lambda block: self.accumulate(at, height, block))
        with b.serial(0, height) as r:
            scratch = scratch_of(self.epilogue, lanes)

            def finish(first: int, lane: Any) -> None:
                column = at.panel * panels.width + first + lane
                value = self.total[r * panels.width + first + lane]
                if self.geometry.blocks == 1:
                    value = self.corrected(at, r, 0, column, value)
                place = (at.outer, at.inner, at.first + r, column)
                store(self.epilogue, self.operands, self.outputs, value, place, scratch, lane)

            each_vector(panels, lanes, at.panel, finish)

    def accumulate(self, at: _Unit, height: int, block: Any) -> None:
        """One block of K: into `out`, and where there are several, scaled onto `total`."""
        b, panels, lanes = ir(), self.panels, self.isa.lanes
        left = place_of(self.geometry.left, at.outer, at.inner, 0, 0) + block * panels.k
        starts = [left + (at.first + r) * self.geometry.left.strides[2] for r in range(height)]
        begin = block * panels.width
        codes = self.codes(at, block)
        self.tile.accumulate(self.left, starts, lambda v: self.start[ramp(begin + v * lanes, lanes)], codes, self.out)
        if self.geometry.blocks == 1:
            return
        with b.serial(0, height) as r:

            def add(first: int, lane: Any) -> None:
                column, place = at.panel * panels.width + first + lane, r * panels.width + first + lane
                value = self.corrected(at, r, block, column, self.out[place]).astype("float32")
                value = self.total[place] + value * self.extra["scales"][block * panels.n + column]
                b.buffer_store(self.total, value, [place])

            each_vector(panels, lanes, at.panel, add)

    def corrected(self, at: _Unit, r: Any, block: Any, column: Any, accumulator: Any) -> Any:
        """What zero points of the right operand add to an accumulator."""
        if self.geometry.factors == "none":
            return accumulator
        which = at.product * self.geometry.blocks + block
        sums = self.extra["sums"][which * self.geometry.rows + at.first + r]
        factor: Any = self.geometry.factor
        if self.geometry.factors == "columns":
            factor = self.extra["factors"][block * self.panels.n + column]
        return accumulator + sums * factor

    def _stored(self, at: _Unit, block: Any) -> Any:
        return (at.product * self.geometry.blocks + block) * self.one_matrix + at.panel * self.one_panel


def _zero(dtype: str) -> Any:
    from tvm import tirx

    return tirx.const(0, dtype)


@lru_cache(maxsize=512)
def row_sums_kernel(isa: Isa, geometry: Geometry) -> Any:
    """left bytes -> ``(products, blocks, rows) int32``: sums of ``a - zero`` over K of each block, as a PrimFunc."""
    from tvm import tirx

    b, k, lanes = ir(), geometry.panels.k, isa.lanes
    blocks, rows = geometry.blocks, geometry.rows
    whole = k // lanes

    def body(a: Any, o: Any) -> None:
        with loop(geometry.products * blocks * rows * k, SERIAL_BELOW)(0, geometry.products * blocks) as task:
            product, block = task // blocks, task % blocks
            outer, inner = product // geometry.batch[1], product % geometry.batch[1]
            left = place_of(geometry.left, outer, inner, 0, 0) + block * k
            sums = b.alloc_buffer((lanes,), "int32")
            every = ramp(0, lanes)
            with b.serial(0, rows) as row:
                begin = left + row * geometry.left.strides[2]
                b.buffer_store(sums, splat(_zero("int32"), lanes), [every])
                if whole:
                    with b.serial(0, whole) as i:
                        part = a[ramp(begin + i * lanes, lanes)].astype(f"int32x{lanes}")
                        b.buffer_store(sums, sums[every] + part, [every])
                total: Any = tirx.const(-geometry.zero * k, "int32")
                for lane in range(lanes):
                    total = total + sums[lane]
                for rest in range(whole * lanes, k):
                    total = total + a[begin + rest].astype("int32")
                b.buffer_store(o, total, [task * rows + row])

    shape = (geometry.products, blocks, rows)
    return prim_func([("a", geometry.left.shape, "uint8"), ("o", shape, "int32")], body)
