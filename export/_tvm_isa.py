"""Instruction sets: which dot product the kernels use on a target, and what the processor must offer for it.

`native` stands for the best row of the table below that this machine has. The rows are psABI levels of x86-64 plus
the one extension that matters, and not a processor's name, so that an artifact runs on every processor of its class.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from typing import Any

from s2d_deploy.errors import RecipeError, message
from s2d_deploy.runtimes._cpu_features import cpu_features, cpu_name

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
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "sve": "sve",
}
_V3 = ("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_CLASSES: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    ((*_V4, "avx512_vnni"), {"mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]}),
    ((*_V3, "avx_vnni"), {"mcpu": "x86-64-v3", "mattr": ["+avxvnni"]}),
    (_V4, {"mcpu": "x86-64-v4"}),
    (_V3, {"mcpu": "x86-64-v3"}),
    (("sse4_2",), {"mcpu": "x86-64-v2"}),
)


@dataclass(frozen=True, slots=True)
class Isa:
    """What the kernels are generated for.

    Attributes:
        name: for people, e.g. ``"AVX512-VNNI"``.
        lanes: 32-bit lanes of a vector register.
        rows: rows of the register tile.
        widths: panel widths that fit the registers together with `rows`.
        dot: LLVM intrinsic of the byte dot product; None where products are widened one by one.
        mnemonic: of that instruction, as a disassembly shows it; "" where there is none.
        group: bytes that one lane of `dot` takes together.
    """

    name: str
    lanes: int
    rows: int
    widths: tuple[int, ...]
    dot: str | None
    mnemonic: str
    group: int


_AVX512_VNNI = Isa("AVX512-VNNI", 16, 6, (64, 48, 32, 16), "llvm.x86.avx512.vpdpbusd.512", "vpdpbusd", 4)
_AVX_VNNI = Isa("AVX-VNNI", 8, 6, (16, 8), "llvm.x86.avx512.vpdpbusd.256", "vpdpbusd", 4)
_AVX512 = Isa("AVX512", 16, 6, (64, 48, 32, 16), None, "", 1)
_AVX2 = Isa("AVX2", 8, 6, (16, 8), None, "", 1)
_PLAIN = Isa("plain vectors of 128 bits", 4, 4, (8, 4), None, "", 1)


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
                expected='"native", or "llvm" with any of -mcpu=, -mattr=, -mtriple=',
                fix="for example device: 'llvm -mcpu=x86-64-v3'",
            )
        )
    return target


def isa_of(target: Any) -> Isa:
    """The kernels' instruction set for a TVM target."""
    from tvm.target.codegen import target_has_features

    def has(*names: str) -> bool:
        return all(bool(target_has_features(name, target)) for name in names)

    if "x86" not in _architecture(target):
        return _PLAIN
    if has("avx512vnni", "avx512bw"):
        return _AVX512_VNNI
    if has("avxvnni", "avx2"):
        return _AVX_VNNI
    if has("avx512bw"):
        return _AVX512
    return _AVX2 if has("avx2", "fma") else _PLAIN


def required_features(target: Any) -> list[str]:
    """Features (kernel's names) that a processor must have to run code for `target`."""
    from tvm.target.codegen import target_has_features

    relevant = {k for k in _KERNEL_NAMES if ("dotprod", "i8mm", "sve").count(k) == ("x86" not in _architecture(target))}
    return [_KERNEL_NAMES[name] for name in _KERNEL_NAMES if name in relevant and target_has_features(name, target)]


def host_name() -> str:
    """The processor of this machine, for people."""
    return str(cpu_name())


def _architecture(target: Any) -> str:
    from tvm.target.codegen import llvm_get_system_triple

    return str(target.attrs.get("mtriple") or llvm_get_system_triple())
