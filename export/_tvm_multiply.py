"""How a kernel multiplies codes: the instructions that an instruction set (`Isa`) has for bytes, each of them exact.

The left operand `a` are bytes without sign, the right one `b` signed bytes, and a lane of 32 bits takes `Isa.group`
of them together:

    bytes          one instruction (vpdpbusd, usdot) multiplies, adds four products and accumulates, in 32 bits
    signed bytes   the same for two signed operands (sdot): `a` becomes ``a ^ 0x80``, which is a - 128 as a signed byte
    pairs          both widened to 16 bits, even and odd bytes apart, and pmaddwd: two products added in 32 bits
    one by one     both widened to 32 bits

pmaddubsw multiplies bytes without widening, but adds two products in 16 bits and saturates: 255 * 127 * 2 = 64770 does
not fit. For 4-bit codes it does: |a * b| <= 255 * 8 = 2040, a pair 4080, and the pairs of `NARROW_RUNS` = 8 groups
32640 <= 32767. So 4-bit weights are accumulated in 16 bits for eight groups, and then widened (pmaddwd by ones).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._tvm_builder import ramp, splat
from ._tvm_isa import Isa

NARROW_RUNS = 8


@dataclass(frozen=True, slots=True)
class Multiplier:
    """Writes products of codes for one instruction set."""

    isa: Isa

    @property
    def i32(self) -> str:
        """Type of an accumulator."""
        return f"int32x{self.isa.lanes}"

    @property
    def i16(self) -> str:
        """Type of a vector of 16-bit values."""
        return f"int16x{2 * self.isa.lanes}"

    def words(self, a: Any, at: Any, count: int) -> list[Any]:
        """`count` groups of the left operand's bytes from `at` on, each in every lane of a vector of int32."""
        from tvm import tirx

        lanes, group = self.isa.lanes, self.isa.group
        if self.isa.form == "one by one":
            return [splat(a[at + i].astype("int32"), lanes) for i in range(count)]
        bytes_ = a[ramp(at, group * count)]
        if self.isa.form == "signed bytes":
            bytes_ = tirx.bitwise_xor(bytes_, splat(tirx.const(128, "uint8"), group * count))
        if count == 1:
            return [splat(tirx.reinterpret("int32", bytes_), lanes)]
        # A shuffle of the whole vector: LLVM would load single elements apart, and miss the product with one lane.
        vector = tirx.reinterpret(f"int32x{count}", bytes_)
        return [tirx.Shuffle([vector], [i] * lanes) for i in range(count)]

    def word_of(self, byte: int) -> Any:
        """A group that is the same byte (0 to 255) throughout, as `words` has it."""
        from tvm import tirx

        if self.isa.form == "signed bytes":
            byte ^= 128
        size = 1 if self.isa.form == "one by one" else self.isa.group
        word = int.from_bytes(bytes([byte] * size), "little", signed=size > 1)
        return splat(tirx.const(word, "int32"), self.isa.lanes)

    def is_nothing(self, byte: int) -> bool:
        """Whether products with `word_of(byte)` are all 0."""
        return byte == (128 if self.isa.form == "signed bytes" else 0)

    def add(self, acc: Any, word: Any, codes: Any) -> Any:
        """`acc` plus a group of the left operand (of `words`) times `codes`: exact, modulo 2^32."""
        from tvm import tirx

        isa, lanes = self.isa, self.isa.lanes
        if isa.form == "one by one":
            return acc + word * codes.astype(self.i32)
        if isa.form == "pairs":
            eight = splat(tirx.const(8, "int16"), 2 * lanes)
            low = tirx.reinterpret(self.i16, tirx.bitwise_and(word, splat(tirx.const(0x00FF00FF, "int32"), lanes)))
            unsigned = tirx.reinterpret(f"u{self.i16}", word)
            high = tirx.reinterpret(self.i16, tirx.shift_right(unsigned, splat(tirx.const(8, "uint16"), 2 * lanes)))
            right = tirx.reinterpret(self.i16, codes)
            even, odd = tirx.shift_right(tirx.shift_left(right, eight), eight), tirx.shift_right(right, eight)
            return acc + self._call(self.i32, isa.dot, low, even) + self._call(self.i32, isa.dot, high, odd)
        if isa.form == "signed bytes":  # the group last: LLVM takes it from a lane there
            return self._call(self.i32, isa.dot, acc, codes, tirx.reinterpret(f"int8x{4 * lanes}", word))
        return self._call(self.i32, isa.dot, acc, tirx.reinterpret(f"uint8x{4 * lanes}", word), codes)

    def add_narrow(self, acc: Any, word: Any, codes: Any) -> Any:
        """`acc`, 16 bits, plus a group times 4-bit codes; exact for `NARROW_RUNS` of them (see the module)."""
        from tvm import tirx

        lanes = self.isa.lanes
        left = tirx.reinterpret(f"uint8x{4 * lanes}", word)
        return acc + self._call(self.i16, self.isa.narrow, left, codes)

    def widen(self, acc: Any, narrow: Any) -> Any:
        """`acc` plus what `add_narrow` accumulated."""
        from tvm import tirx

        ones = splat(tirx.const(1, "int16"), 2 * self.isa.lanes)
        return acc + self._call(self.i32, self.isa.dot, narrow, ones)

    @staticmethod
    def _call(dtype: str, name: str, *arguments: Any) -> Any:
        from tvm import tirx

        return tirx.call_llvm_pure_intrin(dtype, name, *arguments)
