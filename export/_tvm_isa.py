"""Instruction sets: which dot product the kernels use on a target, and what the processor must offer for it.

`native` stands for the best row of the table below that this machine has. The rows are psABI levels of x86-64 plus
the one extension that matters, and not a processor's name, so that an artifact runs on every processor of its class.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any, Literal

from s2d_deploy.errors import RecipeError, message
from s2d_deploy.runtimes._cpu_features import cpu_features, cpu_name

from ._tvm_quiet import muted_stderr

NATIVE = "native"
# LLVM's names for features, and the kernel's (/proc/cpuinfo), for everything that a refusal may have to name.
_KERNEL_NAMES = {
    "sse4.2": "sse4_2",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "lzcnt": "abm",
    "movbe": "movbe",
    "gfni": "gfni",
    "vaes": "vaes",
    "vpclmulqdq": "vpclmulqdq",
    "sha": "sha_ni",
    "avxvnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512vnni": "avx512_vnni",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512ifma": "avx512ifma",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
}
_ARM_KERNEL_NAMES = {
    "neon": "asimd",
    "lse": "atomics",
    "crc": "crc32",
    "rdm": "asimdrdm",
    "fullfp16": "asimdhp",
    "fp16fml": "asimdfhm",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_CLASSES: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((*_V4, "avx512_vnni"), {"mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]}),
    ((*_V3, "avx_vnni"), {"mcpu": "x86-64-v3", "mattr": ["+avxvnni"]}),
    (_V4, {"mcpu": "x86-64-v4"}),
    (_V3, {"mcpu": "x86-64-v3"}),
    (("sse4_2",), {"mcpu": "x86-64-v2"}),
    (("asimddp", "i8mm"), {"mattr": ["+neon", "+dotprod", "+i8mm"]}),
    (("asimddp",), {"mattr": ["+neon", "+dotprod"]}),
    (("asimd",), {"mattr": ["+neon"]}),
)
_MOST_ROWS = 12  # more make larger functions, not faster ones
Form = Literal["bytes", "signed bytes", "pairs", "one by one"]


@dataclass(frozen=True, slots=True)
class Isa:
    """What the kernels are generated for.

    Attributes:
        name: for people, e.g. ``"AVX512-VNNI"``.
        lanes: 32-bit lanes of a vector register.
        rows: rows of the register tile of the widest panel; narrower ones have more, see `rows_of`.
        widths: panel widths, the ones to prefer first.
        form: how codes are multiplied, see `_tvm_multiply`: ``"bytes"``: `dot` takes bytes without sign times signed
            ones; ``"signed bytes"``: it takes signed ones only; ``"pairs"``: bytes are widened to 16 bits and `dot`
            adds pairs of products; ``"one by one"``: widened to 32 bits.
        dot: LLVM intrinsic that multiplies and adds; "" where `form` needs none.
        narrow: of "pairs": the intrinsic that multiplies bytes and adds pairs in 16 bits, saturating.
        mnemonic: of `dot` as a disassembly shows it in the inner loop; "" where there is none.
        group: bytes of K that one lane takes together.
        ahead: groups of the left operand that are loaded at once.
    """

    name: str
    lanes: int
    rows: int
    widths: tuple[int, ...]
    form: Form = "one by one"
    dot: str = ""
    narrow: str = ""
    mnemonic: str = ""
    group: int = 1
    ahead: int = 1

    def rows_of(self, width: int) -> int:
        """Rows of a panel's register tile: as many accumulators as the widest panel's tile has, at most 12 rows."""
        return max(1, min(_MOST_ROWS, self.rows * max(self.widths) // width))


def _dot(name: str, lanes: int, rows: int, widths: tuple[int, ...], dot: str, mnemonic: str) -> Isa:
    return Isa(name, lanes, rows, widths, "bytes", dot, "", mnemonic, 4)


def _pairs(name: str, lanes: int, rows: int, widths: tuple[int, ...], dot: str, narrow: str, mnemonic: str) -> Isa:
    return Isa(name, lanes, rows, widths, "pairs", f"llvm.x86.{dot}", f"llvm.x86.{narrow}", mnemonic, 4)


_AVX512_VNNI = _dot("AVX512-VNNI", 16, 6, (48, 64, 32, 16), "llvm.x86.avx512.vpdpbusd.512", "vpdpbusd")
_AVX_VNNI = _dot("AVX-VNNI", 8, 6, (16, 8), "llvm.x86.avx512.vpdpbusd.256", "vpdpbusd")
_AVX512 = _pairs("AVX512", 16, 6, (48, 32, 16), "avx512.pmaddw.d.512", "avx512.pmaddubs.w.512", "vpmaddwd")
_AVX2 = _pairs("AVX2", 8, 6, (16, 8), "avx2.pmadd.wd", "avx2.pmadd.ub.sw", "vpmaddwd")
_SSSE3 = _pairs("SSSE3", 4, 4, (8, 4), "sse2.pmadd.wd", "ssse3.pmadd.ub.sw.128", "pmaddwd")
_I8MM = Isa("Arm i8mm", 4, 4, (16, 8, 4), "bytes", "llvm.aarch64.neon.usdot.v4i32.v16i8", "", "sudot", 4, 4)
_DOTPROD = Isa("Arm dotprod", 4, 4, (16, 8, 4), "signed bytes", "llvm.aarch64.neon.sdot.v4i32.v16i8", "", "sdot", 4, 4)
_PLAIN = Isa("plain vectors of 128 bits", 4, 4, (8, 4))


def resolve_target(device: str) -> dict[str, Any]:
    """The TVM target for the build option `device`: ``"native"`` or ``"llvm -mcpu=... -mattr=... -mtriple=..."``.

    Raises:
        RecipeError: it is neither.
    """
    if device == NATIVE:
        features = cpu_features()
        for needed, attributes in _CLASSES:
            if features is not None and features.issuperset(needed):
                return {"kind": "llvm", **attributes}
        return {"kind": "llvm"}
    words = shlex.split(device)
    target: dict[str, Any] = {"kind": "llvm"}
    known = ("mcpu", "mattr", "mtriple")
    for word in words[1:]:
        key, _, value = word.lstrip("-").partition("=")
        if key not in known or not value:
            words = []
            break
        target[key] = value.split(",") if key == "mattr" else value
    if not words or words[0] != "llvm":
        raise RecipeError(
            message(
                f"unknown device {device!r} for TVM",
                expected='"native", "llvm" with any of -mcpu=, -mattr=, -mtriple=, or "cuda" with -arch=',
                fix="for example device: 'llvm -mcpu=x86-64-v3'",
            )
        )
    return target


def require_known_processor(target: dict[str, Any]) -> None:
    """Refuse what LLVM does not know for its triple: it would build for something plainer, and only log that.

    Raises:
        RecipeError: a processor, or features, that it does not know.
    """
    from tvm.target.codegen import llvm_get_system_triple, llvm_is_valid_cpu

    name, triple = target.get("mcpu"), target.get("mtriple") or llvm_get_system_triple()
    if name is not None and not llvm_is_valid_cpu(name, triple):
        raise RecipeError(
            message(
                f"LLVM knows no processor {name!r} for {triple}",
                expected="a name that `clang --print-supported-cpus` lists for it",
                fix="for example x86-64-v3, or for -mtriple=aarch64-linux-gnu cortex-a76",
            )
        )
    words = target.get("mattr", ())
    unsigned = [word for word in words if word[:1] not in "+-" or len(word) < 2]
    unknown = unsigned or [word for word in words if word[0] == "+" and not _has_feature(target, word[1:])]
    if unknown:
        raise RecipeError(
            message(
                f"LLVM knows no feature {', '.join(map(repr, unknown))} for {triple}",
                expected="+name or -name, separated by commas, as `llc -mattr=help` lists them",
                fix="for example -mattr=+avx512vnni, or for aarch64 -mattr=+neon,+dotprod",
            )
        )


def _has_feature(target: dict[str, Any], name: str) -> bool:
    import tvm
    from tvm.target.codegen import target_has_features

    with muted_stderr():
        return bool(target_has_features(name, tvm.target.Target(target)))


def isa_of(target: Any) -> Isa:
    """The kernels' instruction set for a TVM target."""
    from tvm.target.codegen import target_has_features

    def has(*names: str) -> bool:
        return all(bool(target_has_features(name, target)) for name in names)

    if is_arm(target):
        if has("i8mm"):
            return _I8MM
        return _DOTPROD if has("dotprod") else _PLAIN
    if not is_x86(target):
        return _PLAIN
    if has("avx512vnni", "avx512bw"):
        return _AVX512_VNNI
    if has("avxvnni", "avx2"):
        return _AVX_VNNI
    if has("avx512bw"):
        return _AVX512
    if has("avx2", "fma"):
        return _AVX2
    return _SSSE3 if has("ssse3", "sse4.1") else _PLAIN


def required_features(target: Any) -> list[str]:
    """Features (kernel's names) that a processor must have to run code for `target`."""
    from tvm.target.codegen import target_has_features

    names = _ARM_KERNEL_NAMES if is_arm(target) else _KERNEL_NAMES if is_x86(target) else {}
    return [kernel for name, kernel in names.items() if target_has_features(name, target)]


def host_name() -> str:
    """The processor of this machine, for people."""
    return str(cpu_name())


def is_arm(target: Any) -> bool:
    """Whether a TVM target is a 64-bit Arm."""
    return triple_of(target).startswith(("aarch64", "arm64"))


def is_x86(target: Any) -> bool:
    """Whether a TVM target is an x86-64."""
    return triple_of(target).startswith(("x86_64", "amd64"))


def is_foreign(target: Any) -> bool:
    """Whether a TVM target is of another architecture or system than this process."""
    from tvm.target.codegen import llvm_get_system_triple

    theirs, ours = _platform(triple_of(target)), _platform(str(llvm_get_system_triple()))
    return theirs != ours


def _platform(triple: str) -> tuple[str, str]:
    """Architecture and system of a triple."""
    parts = triple.lower().split("-")
    architecture = {"arm64": "aarch64", "amd64": "x86_64"}.get(parts[0], parts[0])
    system = next((name for name in ("linux", "darwin", "macos", "ios", "windows", "android") if name in triple), "")
    return architecture, {"macos": "darwin"}.get(system, system)


def triple_of(target: Any) -> str:
    """LLVM's name of the platform that a TVM target is for; this machine's where the target says none."""
    from tvm.target.codegen import llvm_get_system_triple

    return str(target.attrs.get("mtriple") or llvm_get_system_triple())
