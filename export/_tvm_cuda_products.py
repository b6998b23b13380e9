"""TensorIR kernels for CUDA: exact integer products with an epilogue.

A block of threads makes one tile: up to 64 rows times one panel of columns, one warp for each 16 rows. It walks over K
in stages of 64 codes: all threads bring a stage from global to shared memory (4-bit codes are unpacked, or packed,
on the way, in registers; the next stage is under way while this one is multiplied), and each warp multiplies its rows
with the whole panel. Accumulators stay in registers; at the end they go through shared memory once, so that
the epilogue runs, and reads and writes, along rows.

What is multiplied, `_Operands` decides: bytes by dp4a or INT8 tensor cores, 4-bit codes by INT4 ones. A zero point of
the left operand costs a second product, with the zero point in place of the codes (``sum (a - z) b`` is
``sum a b - sum z b``);
128 for signed codes costs nothing, for they are made signed again. Every sum is exact, modulo 2^32.

Tiles are not tuned: no GPU was at hand. The right operand lies in the CPU's own panels (`_tvm_panels`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ._tvm_builder import ir, prim_func, ramp, when
from ._tvm_cuda_intrinsics import barrier, dp4a, mma
from ._tvm_cuda_isa import CudaIsa
from ._tvm_cuda_words import constant, packed, signed_nibbles
from ._tvm_epilogue import Epilogue, place_of, store
from ._tvm_kernels import Geometry, product_arguments

WARP = 32
_STAGE = 64  # codes of K that a stage brings
_WARPS = 4  # of a block, at most


@dataclass(frozen=True, slots=True)
class SmallGeometry(Geometry):
    """A product of 4-bit codes on both sides, for INT4 tensor cores."""

    @property
    def name(self) -> str:
        """Of the function, for people."""
        return f"{Geometry.name.fget(self)}_int4"  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class _Operands:
    """How codes are multiplied, which follows from the range of the left ones.

    Attributes:
        unit: "dp4a", "int8" or "int4".
        left, right: PTX's names of their types.
        flip: what makes the left bytes of that type: 128, or 0.
        zero: of the left codes of that type.
    """

    unit: str
    left: str
    right: str
    flip: int
    zero: int

    @property
    def small(self) -> bool:
        """Whether a word holds eight codes, not four."""
        return self.unit == "int4"

    @property
    def words(self) -> int:
        """Of 32 bits in a stage of one row."""
        return _STAGE // (8 if self.small else 4)

    @property
    def zero_word(self) -> int:
        """A word that is the zero point throughout."""
        word = (self.zero & 15) * 0x11111111 if self.small else (self.zero & 255) * 0x01010101
        return word - (1 << 32) if word >= 1 << 31 else word


def operands_of(isa: CudaIsa, geometry: Geometry) -> _Operands:
    """See `_Operands`. Small codes are 4-bit ones on both sides; signed ones carry 128 as bytes."""
    zero = geometry.zero
    if isinstance(geometry, SmallGeometry):
        signed = zero >= 120  # 128 - 8; unsigned codes have zero points up to 15
        return _Operands("int4", "s4" if signed else "u4", "s4", 0, zero - 128 if signed else zero)
    flip = 128 if zero == 128 else 0
    return _Operands("dp4a" if isa.unit == "dp4a" else "int8", "s8" if flip else "u8", "s8", flip, zero - flip)


@lru_cache(maxsize=512)
def integer_kernel(isa: CudaIsa, geometry: Geometry, epilogue: Epilogue) -> Any:
    """left bytes, right panels, `Geometry.extra`, operands -> outputs, as a PrimFunc: see `_tvm_kernels`."""
    extra = geometry.extra

    def body(a: Any, right: Any, *others: Any) -> None:
        given = {name: buffer for (name, _, _), buffer in zip(extra, others, strict=False)}
        rest = others[len(extra) :]
        count = len(epilogue.operands)
        _Tile(isa, geometry, epilogue, a, right, given, rest[:count], rest[count:]).write()

    return prim_func(product_arguments(geometry, epilogue), body)


class _Tile:
    """Writes one kernel."""

    def __init__(
        self,
        isa: CudaIsa,
        geometry: Geometry,
        epilogue: Epilogue,
        a: Any,
        right: Any,
        given: dict[str, Any],
        operands: tuple[Any, ...],
        outputs: tuple[Any, ...],
    ) -> None:
        self.isa, self.geometry, self.epilogue, self.panels = isa, geometry, epilogue, geometry.panels
        self.a, self.right, self.given, self.operands, self.outputs = a, right, given, operands, outputs
        self.kind = operands_of(isa, geometry)
        self.width = self.panels.width
        self.runs = self.panels.depth // 4
        self.warps = min(_WARPS, -(-geometry.rows // 16))
        self.height, self.threads = 16 * self.warps, WARP * self.warps
        self.row_tiles = -(-geometry.rows // self.height)
        # Odd multiples of 4 (rows of `a`) and of 8 (rows of `b`): the lanes of a warp then read from different banks.
        self.left_pitch = self.kind.words + 4
        self.right_pitch = self.width + 8
        self.columns = self.width // 8
        self.stages = -(-self.runs * 4 // _STAGE)

    def write(self) -> None:
        """The body of the kernel."""
        b, geometry, width = ir(), self.geometry, self.width
        tasks = geometry.products * self.panels.count * self.row_tiles
        with b.launch_thread("blockIdx.x", tasks) as task, b.launch_thread("threadIdx.x", self.threads) as thread:
            self.thread, lane = thread, thread % WARP
            self.warp, self.g, self.t = thread // WARP, lane // 4, lane % 4
            tile, p = task % self.row_tiles, task // self.row_tiles % self.panels.count
            product = task // (self.row_tiles * self.panels.count)
            outer, inner = product // geometry.batch[1], product % geometry.batch[1]
            self.first_row, self.first_column = tile * self.height, p * width
            self.product = product
            self.left = b.alloc_buffer((self.height * self.left_pitch,), "int32", scope="shared")
            self.shared = b.alloc_buffer((self.kind.words * self.right_pitch,), "int32", scope="shared")
            self.acc = b.alloc_buffer((self.columns * 4,), "int32", scope="local")
            whole = geometry.blocks == 1
            dtype = "int32" if whole else "float32"
            self.total = self.acc if whole else b.alloc_buffer((self.columns * 4,), "float32", scope="local")
            if self.kind.zero:
                self.zeros = b.alloc_buffer((self.columns * 4,), "int32", scope="local")
            begin = place_of(geometry.left, outer, inner, 0, 0)
            one = self._matrix
            base = product * geometry.blocks * one + p * (one // self.panels.count)
            if whole:
                self._multiply(begin, base)
            else:
                self._set(self.total, 0.0)
                with b.serial(0, geometry.blocks) as block:
                    self._multiply(begin + block * self.panels.k, base + block * one)
                    self._add_block(block)
            out = b.alloc_buffer((self.height * width,), dtype, scope="shared")
            for i in range(self.columns * 4):
                row, column = self._own(i)
                b.buffer_store(out, self._value(i) if whole else self.total[i], [row * width + column])
            barrier()
            self._finish(out, outer, inner)

    @property
    def _matrix(self) -> int:
        """Bytes of one stored matrix."""
        shape = self.panels.stored_shape
        return shape[0] * shape[1] * shape[2]

    def _own(self, i: int) -> tuple[Any, Any]:
        """Row and column, in the tile, of this thread's accumulator `i`."""
        return self.warp * 16 + self.g + i % 4 // 2 * 8, i // 4 * 8 + self.t * 2 + i % 2

    def _value(self, i: int) -> Any:
        """Accumulator `i`, the left zero point taken off."""
        return self.acc[i] - self.zeros[i] if self.kind.zero else self.acc[i]

    def _set(self, buffer: Any, value: float) -> None:
        from tvm import tirx

        for i in range(self.columns * 4):
            ir().buffer_store(buffer, tirx.const(value, buffer.dtype), [i])

    # From global memory to registers, and on to shared memory

    def _multiply(self, begin: Any, base: Any) -> None:
        """The accumulators of a tile; K of the left operand begins at `begin`, the panel at `base`."""
        b = ir()
        self._set(self.acc, 0)
        if self.kind.zero:
            self._set(self.zeros, 0)
        left, right = self._left_loads(), self._right_loads()
        held_left = b.alloc_buffer((len(left),), "int32", scope="local")
        held_right = b.alloc_buffer((len(right),), "int32", scope="local")

        def load(stage: Any) -> None:
            for i, item in enumerate(left):
                b.buffer_store(held_left, self._left_word(begin, stage, item), [i])
            for i, item in enumerate(right):
                b.buffer_store(held_right, self._right_word(base, stage, item), [i])

        load(0)
        with b.serial(0, self.stages) as stage:
            for i, item in enumerate(left):
                self._keep(item, self.height * self.kind.words, lambda at, i=i: self._put_left(at, held_left[i]))
            for i, item in enumerate(right):
                self._keep(item, self._right_items, lambda at, i=i: self._put_right(at, held_right[i]))
            barrier()
            if self.stages > 1:
                with when(stage + 1 < self.stages):
                    load(stage + 1)
            self._stage()
            barrier()

    def _left_loads(self) -> list[int]:
        return list(range(-(-self.height * self.kind.words // self.threads)))

    @property
    def _right_items(self) -> int:
        """Words that a stage reads of the stored panel: packed words are read as such."""
        return (self.kind.words if self.kind.small else _STAGE // (8 if self.panels.bits == 4 else 4)) * self.width

    def _right_loads(self) -> list[int]:
        return list(range(-(-self._right_items // self.threads)))

    def _keep(self, item: int, items: int, write: Any) -> None:
        """``write(place)`` of this thread's `item`, where there is one."""
        at = item * self.threads + self.thread
        with when(True if (item + 1) * self.threads <= items else at < items):
            write(at)

    def _word(self, buffer: Any, at: Any, aligned: bool) -> Any:
        """Four bytes from `at` on."""
        from tvm import tirx

        if aligned:
            return tirx.reinterpret("int32", buffer[ramp(at, 4)])
        word: Any = None
        for i in range(4):
            byte = tirx.bitwise_and(buffer[at + i].astype("int32"), tirx.const(255, "int32"))
            part = tirx.shift_left(byte, tirx.const(8 * i, "int32")) if i else byte
            word = part if word is None else tirx.bitwise_or(word, part)
        return word

    def _left_word(self, begin: Any, stage: Any, item: int) -> Any:
        from tvm import tirx

        kind, geometry = self.kind, self.geometry
        at = item * self.threads + self.thread
        row, word = self.first_row + at // kind.words, stage * kind.words + at % kind.words
        strides = geometry.left.strides
        place = begin + row * strides[2]
        aligned = all(stride % 4 == 0 for stride in strides[:3]) and (geometry.blocks == 1 or self.panels.k % 4 == 0)
        inside = []
        if geometry.rows % self.height or self.height * kind.words % self.threads:
            inside.append(row < geometry.rows)
        if self.runs * 4 % _STAGE:
            inside.append(word * (2 if kind.small else 1) < self.runs)
        if kind.small:
            low = self._word(self.a, place + word * 8, aligned)
            high: Any = self._word(self.a, place + word * 8 + 4, aligned)
            if self.runs % 2:
                high = tirx.if_then_else(word * 2 + 1 < self.runs, high, tirx.const(0, "int32"))
            value = packed(low, high)
        else:
            value = self._word(self.a, place + word * 4, aligned)
            if kind.flip:
                value = tirx.bitwise_xor(value, constant(0x80808080))
        return _where(inside, value)

    def _right_word(self, base: Any, stage: Any, item: int) -> Any:
        from tvm import tirx

        at, line = item * self.threads + self.thread, self.width * 4
        run, column = at // self.width, at % self.width
        per_stage = self._right_items // self.width
        stored_run = stage * per_stage + run
        inside = []
        if self.kind.small and self.panels.bits != 4:  # two runs of bytes become one of 4-bit codes
            if self.runs * 4 % _STAGE or self._right_items % self.threads:
                inside.append(stored_run * 2 < self.runs)
            low = self._word(self.right, base + stored_run * 2 * line + column * 4, True)
            high: Any = self._word(self.right, base + (stored_run * 2 + 1) * line + column * 4, True)
            if self.runs % 2:
                high = tirx.if_then_else(stored_run * 2 + 1 < self.runs, high, tirx.const(0, "int32"))
            return _where(inside, packed(low, high))
        stored_runs = self.panels.stored_shape[1]
        if stored_runs % per_stage or self._right_items % self.threads:
            inside.append(stored_run < stored_runs)
        return _where(inside, self._word(self.right, base + stored_run * line + column * 4, True))

    def _put_left(self, at: Any, word: Any) -> None:
        place = at // self.kind.words * self.left_pitch + at % self.kind.words
        ir().buffer_store(self.left, word, [place])

    def _put_right(self, at: Any, word: Any) -> None:
        from tvm import tirx

        b, run, column = ir(), at // self.width, at % self.width
        if self.kind.small or self.panels.bits == 8:
            b.buffer_store(self.shared, word, [run * self.right_pitch + column])
            return
        fours = constant(0x0F0F0F0F)
        halves = (word, tirx.shift_right(word, tirx.const(4, "int32")))
        for i, half in enumerate(halves):
            b.buffer_store(
                self.shared, signed_nibbles(tirx.bitwise_and(half, fours)), [(run * 2 + i) * self.right_pitch + column]
            )

    # From shared memory to accumulators

    def _stage(self) -> None:
        from tvm import tirx

        kind, zero = self.kind, tirx.const(self.kind.zero_word, "int32")
        row = (self.warp * 16 + self.g) * self.left_pitch
        if kind.unit == "dp4a":
            with ir().serial(0, kind.words, annotations={"pragma_unroll_explicit": 0}) as word:
                self._dp4a_word(row, word, zero)
            return
        for chunk in range(kind.words // 8):
            at = row + chunk * 8 + self.t
            a = tuple(self.left[at + extra] for extra in (0, 8 * self.left_pitch, 4, 8 * self.left_pitch + 4))
            for column in range(self.columns):
                place = (chunk * 8 + self.t) * self.right_pitch + column * 8 + self.g
                right = (self.shared[place], self.shared[place + 4 * self.right_pitch])
                mma(kind.left, kind.right, self.isa.number, self.acc[column * 4], a, right)
                if kind.zero:
                    mma(kind.left, kind.right, self.isa.number, self.zeros[column * 4], (zero,) * 4, right)

    def _dp4a_word(self, row: Any, word: Any, zero: Any) -> None:
        b = ir()
        a = [self.left[row + word], self.left[row + word + 8 * self.left_pitch]]
        for i in range(self.columns * 4):
            right = self.shared[word * self.right_pitch + self._own(i)[1]]
            b.buffer_store(self.acc, dp4a(self.kind.left, a[i % 4 // 2], right, self.acc[i]), [i])
            if self.kind.zero:
                b.buffer_store(self.zeros, dp4a(self.kind.left, zero, right, self.zeros[i]), [i])

    # From accumulators to the result

    def _corrected(self, value: Any, block: Any, row: Any, column: Any) -> Any:
        """Zero points of the right operand (`Geometry.factors`)."""
        geometry = self.geometry
        if geometry.factors == "none":
            return value
        sums = self.given["sums"][(self.product * geometry.blocks + block) * geometry.rows + row]
        if geometry.factors == "columns":
            return value + sums * self.given["factors"][block * self.panels.n + column]
        return value + sums * geometry.factor

    def _add_block(self, block: Any) -> None:
        for i in range(self.columns * 4):
            row, column = self._own(i)
            row, column = self.first_row + row, self.first_column + column
            with when(_all([*self._within(row, column)])):
                value = self._corrected(self._value(i), block, row, column).astype("float32")
                scaled = value * self.given["scales"][block * self.panels.n + column]
                ir().buffer_store(self.total, self.total[i] + scaled, [i])

    def _within(self, row: Any, column: Any) -> list[Any]:
        conditions = []
        if self.geometry.rows % self.height:
            conditions.append(row < self.geometry.rows)
        if self.panels.columns != self.panels.n:
            conditions.append(column < self.panels.n)
        return conditions

    def _finish(self, out: Any, outer: Any, inner: Any) -> None:
        b = ir()
        scratch = scalars(self.epilogue)
        with b.serial(0, self.height * self.width // self.threads) as i:
            at = i * self.threads + self.thread
            row, column = self.first_row + at // self.width, self.first_column + at % self.width
            with when(_all(self._within(row, column))):
                value = out[at]
                if self.geometry.blocks == 1:
                    value = self._corrected(value, 0, row, column)
                store(self.epilogue, self.operands, self.outputs, value, (outer, inner, row, column), scratch, 0)


def scalars(epilogue: Epilogue) -> list[Any]:
    """A register for each float step (as `_tvm_epilogue.scratch_of`)."""
    steps = sum(step.op != "quantize" for step in epilogue.steps)
    return [ir().alloc_buffer((1,), "float32", scope="local") for _ in range(steps)]


def _all(conditions: list[Any]) -> Any:
    from tvm import tirx

    return tirx.all(*conditions) if conditions else True


def _where(conditions: list[Any], value: Any) -> Any:
    """`value`, which is read only where all of `conditions` hold; elsewhere 0."""
    from tvm import tirx

    return tirx.if_then_else(tirx.all(*conditions), value, tirx.const(0, "int32")) if conditions else value
