"""Words of 32 bits as TensorIR expressions: four bytes of codes, or eight codes of 4 bits."""

from __future__ import annotations

from typing import Any


def constant(word: int) -> Any:
    """A word that is known now."""
    from tvm import tirx

    return tirx.const(word - (1 << 32) if word >= 1 << 31 else word, "int32")


def packed(low: Any, high: Any) -> Any:
    """Eight codes in a word, as stored weights have them: the low halves of `low`, then those of `high`, in turn."""
    from tvm import tirx

    fours = constant(0x0F0F0F0F)
    upper = tirx.shift_left(tirx.bitwise_and(high, fours), tirx.const(4, "int32"))
    return tirx.bitwise_or(tirx.bitwise_and(low, fours), upper)


def signed_nibbles(word: Any) -> Any:
    """Four bytes of 0 to 15 as signed 4-bit codes: ``(x ^ 8) - 8`` in each, and no borrow crosses a byte."""
    from tvm import tirx

    lifted = tirx.bitwise_xor(word, constant(0x88888888))  # (x ^ 8) + 128
    return tirx.bitwise_xor(lifted - constant(0x08080808), constant(0x80808080))
