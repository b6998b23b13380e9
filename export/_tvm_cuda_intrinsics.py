"""Device functions that the CUDA kernels call: one warp's matrix products, dp4a with an unsigned operand, warp folds.

All matrix products have one shape, whatever instruction does them: 16 rows x 8 columns, K = 32 bytes or 64 codes of 4
bits. Lane ``l`` of a warp, with ``g = l / 4`` and ``t = l % 4``, holds

    a0 .. a3   rows g, g + 8, g, g + 8; of each 32 bits from K: word t for a0 and a1, word t + 4 for a2 and a3
    b0, b1     column g, words t and t + 4 of K
    c[0..3]    row g: columns 2 t, 2 t + 1; row g + 8: the same

as PTX defines it for m16n8k32 (bytes) and m16n8k64 (4 bits). On sm_75 four m8n8k16 (m8n8k32) instructions do the same.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ._tvm_builder import ir

_SIGNATURE = "int* c, int a0, int a1, int a2, int a3, int b0, int b1"


def mma_name(left: str, right: str) -> str:
    """Of the device function for operand types like ``"u8", "s8"``."""
    return f"s2d_mma_{left}_{right}"


@lru_cache
def mma_source(left: str, right: str, number: int) -> str:
    """The device function, for compute capability `number`."""
    small = left.endswith("4")
    if number >= 80:
        shape = "m16n8k64" if small else "m16n8k32"
        body = (
            f'  asm volatile("mma.sync.aligned.{shape}.row.col.s32.{left}.{right}.s32 "\n'
            '    "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"\n'
            '    : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])\n'
            '    : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));\n'
        )
    else:
        shape = "m8n8k32" if small else "m8n8k16"
        body = "".join(
            f'  asm volatile("mma.sync.aligned.{shape}.row.col.s32.{left}.{right}.s32 "\n'
            '    "{%0, %1}, {%2}, {%3}, {%0, %1};"\n'
            f'    : "+r"(c[{c}]), "+r"(c[{c + 1}]) : "r"({a}), "r"({b}));\n'
            for c, a, b in ((0, "a0", "b0"), (2, "a1", "b0"), (0, "a2", "b1"), (2, "a3", "b1"))
        )
    return f"__device__ __forceinline__ void {mma_name(left, right)}({_SIGNATURE}) {{\n{body}}}\n"


@lru_cache
def dp4a_source(left: str) -> str:
    """``s2d_dp4a_u8(a, b, c)``: c plus four products of the bytes of `a` (``"u8"`` or ``"s8"``) and of signed `b`."""
    kind = "u32" if left == "u8" else "s32"
    return (
        f"__device__ __forceinline__ int s2d_dp4a_{left}(int a, int b, int c) {{\n"
        f'  asm("dp4a.{kind}.s32 " "%0, %1, %2, %0;" : "+r"(c) : "r"(a), "r"(b));\n'
        "  return c;\n}\n"
    )


@lru_cache
def fold_source(kind: str) -> str:
    """``s2d_warp_sum(x)``, ``s2d_warp_max(x)``: over the 32 lanes, in every one of them."""
    step = "x + other" if kind == "sum" else "fmaxf(x, other)"
    return (
        f"__device__ __forceinline__ float s2d_warp_{kind}(float x) {{\n"
        "  for (int step = 16; step > 0; step /= 2) {\n"
        "    float other = __shfl_xor_sync(0xffffffffu, x, step);\n"
        f"    x = {step};\n"
        "  }\n  return x;\n}\n"
    )


def mma(left: str, right: str, number: int, acc: Any, a: tuple[Any, ...], b: tuple[Any, ...]) -> None:
    """Writes ``acc[0..3] += a x b``; `acc` is a buffer element."""
    builder = ir()
    source = mma_source(left, right, number)
    call = builder.cuda.func_call(mma_name(left, right), builder.address_of(acc), *a, *b, source_code=source)
    builder.evaluate(call)


def dp4a(left: str, a: Any, b: Any, c: Any) -> Any:
    """The expression ``c + sum of four products``."""
    return ir().cuda.func_call(f"s2d_dp4a_{left}", a, b, c, source_code=dp4a_source(left), return_type="int32")


def fold(kind: str, value: Any) -> Any:
    """`value` of all lanes of the warp together, ``"sum"`` or ``"max"``."""
    return ir().cuda.func_call(f"s2d_warp_{kind}", value, source_code=fold_source(kind), return_type="float32")


def barrier() -> None:
    """All threads of the block meet."""
    builder = ir()
    builder.evaluate(builder.tvm_storage_sync("shared"))
