"""What an x86-64 processor behind TVM's RPC offers: its CPUID, asked by a library of two functions that is sent there.

TVM's RPC server can name neither the processor nor its features, and an artifact that needs others than it has would
end the server's process. The library is LLVM code with TVM's calling convention, compiled and linked here; it needs
nothing there but TVM's runtime. Bits: Intel SDM volume 2A, CPUID; volume 1, section 13.3 (XCR0).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

CODE = """\
target triple = "x86_64-unknown-linux-gnu"
define i32 @__tvm_ffi_cpuid(ptr %self, ptr %args, i32 %count, ptr %result) {
  %leaf.at = getelementptr i8, ptr %args, i64 8
  %sub.at = getelementptr i8, ptr %args, i64 24
  %which.at = getelementptr i8, ptr %args, i64 40
  %leaf = load i32, ptr %leaf.at
  %sub = load i32, ptr %sub.at
  %which = load i32, ptr %which.at
  %all = call { i32, i32, i32, i32 } asm sideeffect "cpuid", "={ax},={bx},={cx},={dx},{ax},{cx}"(i32 %leaf, i32 %sub)
  %kept = alloca { i32, i32, i32, i32 }
  store { i32, i32, i32, i32 } %all, ptr %kept
  %one.at = getelementptr i32, ptr %kept, i32 %which
  %one = load i32, ptr %one.at
  %wide = zext i32 %one to i64
  store i64 1, ptr %result
  %value.at = getelementptr i8, ptr %result, i64 8
  store i64 %wide, ptr %value.at
  ret i32 0
}
define i32 @__tvm_ffi_xgetbv(ptr %self, ptr %args, i32 %count, ptr %result) {
  %both = call { i32, i32 } asm sideeffect "xgetbv", "={ax},={dx},{cx}"(i32 0)
  %low = extractvalue { i32, i32 } %both, 0
  %wide = zext i32 %low to i64
  store i64 1, ptr %result
  %value.at = getelementptr i8, ptr %result, i64 8
  store i64 %wide, ptr %value.at
  ret i32 0
}
"""
_A, _B, _C, _D = range(4)
_AVX, _AVX512, _AMX = 0x6, 0xE6, 0x60000  # the state that the system must keep, bits of XCR0
# (leaf, subleaf, register, needed state) -> features by bit, as the kernel spells them
_BITS: dict[tuple[int, int, int, int], dict[str, int]] = {
    (1, 0, _C, 0): {"sse4_2": 20, "movbe": 22},
    (1, 0, _C, _AVX): {"fma": 12, "avx": 28, "f16c": 29},
    (7, 0, _B, 0): {"bmi1": 3, "bmi2": 8, "sha_ni": 29},
    (7, 0, _B, _AVX): {"avx2": 5},
    (7, 0, _B, _AVX512): {
        "avx512f": 16,
        "avx512dq": 17,
        "avx512ifma": 21,
        "avx512cd": 28,
        "avx512bw": 30,
        "avx512vl": 31,
    },
    (7, 0, _C, 0): {"gfni": 8},
    (7, 0, _C, _AVX): {"vaes": 9, "vpclmulqdq": 10},
    (7, 0, _C, _AVX512): {
        "avx512vbmi": 1,
        "avx512_vbmi2": 6,
        "avx512_vnni": 11,
        "avx512_bitalg": 12,
        "avx512_vpopcntdq": 14,
    },
    (7, 0, _D, _AVX512): {"avx512_vp2intersect": 8, "avx512_fp16": 23},
    (7, 0, _D, _AMX): {"amx_tile": 24, "amx_int8": 25},
    (7, 1, _A, _AVX): {"avx_vnni": 4},
    (7, 1, _A, _AVX512): {"avx512_bf16": 5},
    (0x80000001, 0, _C, 0): {"abm": 5},
}
KNOWN = frozenset(name for bits in _BITS.values() for name in bits)
_OSXSAVE = 27


def write_probe(tvm: Any, folder: Path) -> Path | None:
    """The library, made in `folder`; None where it cannot be made: TVM without its compiler, or no linker."""
    try:
        from tvm.support import cc

        (folder / "probe.ll").write_text(CODE)
        tvm.runtime.load_module(str(folder / "probe.ll")).write_to_file(str(folder / "probe.o"), "obj")
        cc.create_shared(str(folder / "probe.so"), [str(folder / "probe.o")], options=["-s"])
    except Exception:  # whatever is missing: the probe is a help, and its absence is reported
        return None
    return folder / "probe.so"


def read_processor(cpuid: Callable[[int, int, int], int], xgetbv: Callable[[], int]) -> tuple[str, frozenset[str]]:
    """Name and features (those of `KNOWN`).

    Args:
        cpuid: leaf, subleaf, register (0 to 3: EAX to EDX) -> its value.
        xgetbv: the low half of XCR0.
    """
    highest = {base: cpuid(base, 0, _A) for base in (0, 0x80000000)}
    state = xgetbv() if cpuid(1, 0, _C) >> _OSXSAVE & 1 else 0
    features = set()
    for (leaf, sub, register, needed), bits in _BITS.items():
        if leaf > highest[leaf & 0x80000000] or sub > (cpuid(7, 0, _A) if leaf == 7 else 0) or state & needed != needed:
            continue
        value = cpuid(leaf, sub, register)
        features |= {name for name, bit in bits.items() if value >> bit & 1}
    name = b""
    if highest[0x80000000] >= 0x80000004:
        words = (cpuid(leaf, 0, r) for leaf in range(0x80000002, 0x80000005) for r in range(4))
        name = b"".join(word.to_bytes(4, "little") for word in words)
    return name.split(b"\0")[0].decode("ascii", "replace").strip() or "x86-64", frozenset(features)
