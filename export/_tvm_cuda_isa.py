"""GPUs by compute capability: which instructions multiply codes there, and what a build option says about them.

    dp4a               four bytes each, one thread                         sm_61 and later
    INT8 tensor cores  mma.sync m8n8k16 (sm_75), m16n8k32 (sm_80 on)       sm_75 and later
    INT4 tensor cores  mma.sync m8n8k32 (sm_75), m16n8k64 (sm_80 on)       sm_75 to sm_89

The compiler accepts the INT4 instruction for sm_90 and later, too, and makes INT8 ones of it: seen in the machine code
that ptxas of CUDA 13.0 writes (IMMA.16864.S4 for sm_80, 86 and 89; IMMA.16832.S8 alone for sm_90, 100 and 120). There
4-bit codes are unpacked and multiplied as bytes, and the rung says "emulated".
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any, Literal

from s2d_deploy.errors import RecipeError, message

DEFAULT_ARCH = "sm_80"
KERNELS = ("dp4a", "int8", "int4")
Unit = Literal["dp4a", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class CudaIsa:
    """What the kernels are generated for.

    Attributes:
        arch: ``"sm_80"``.
        unit: the strongest that may be used: 4-bit codes on ``"int4"``, everything else on bytes.
        group: bytes of K that lie together (as `Isa.group`).
        widths: widths of a panel, which is a block's tile.
    """

    arch: str
    unit: Unit
    group: int = 4
    widths: tuple[int, ...] = (64, 32, 16)

    @property
    def number(self) -> int:
        """``sm_80`` -> 80."""
        return int(self.arch.removeprefix("sm_"))

    @property
    def capability(self) -> str:
        """As NVIDIA writes it, ``"8.0"``."""
        return f"{self.number // 10}.{self.number % 10}"

    @property
    def name(self) -> str:
        """For people."""
        words = {"dp4a": "dp4a", "int8": "INT8 tensor cores", "int4": "INT8 and INT4 tensor cores"}
        return f"CUDA {self.arch}, {words[self.unit]}"

    @property
    def int4(self) -> bool:
        """Whether 4-bit codes are multiplied as such."""
        return self.unit == "int4"


def is_cuda(device: str) -> bool:
    """Whether a build option names a GPU."""
    return device.split(" ", 1)[0] == "cuda"


def best_unit(number: int) -> Unit:
    """The strongest unit of compute capability `number` (80 for 8.0)."""
    if number < 75:
        return "dp4a"
    return "int4" if number < 90 else "int8"


def parse_device(device: str) -> CudaIsa:
    """``"cuda"`` or ``"cuda -arch=sm_86 -kernels=int8"``.

    ``-kernels`` takes a weaker unit than the device's best: ``dp4a``, ``int8`` or ``int4``.

    Raises:
        RecipeError: not such a text, a device without byte products, or a unit that it lacks.
    """
    words = shlex.split(device)
    values = {"arch": DEFAULT_ARCH}
    known = bool(words) and words[0] == "cuda"
    for word in words[1:]:
        key, _, value = word.lstrip("-").partition("=")
        known = known and key in ("arch", "kernels") and bool(value)
        values[key] = value
    if not known:
        raise RecipeError(
            message(
                f"unknown device {device!r} for TVM",
                expected='"cuda" with any of -arch=sm_NN, -kernels=dp4a|int8|int4',
                fix="for example device: 'cuda -arch=sm_86'",
            )
        )
    if not re.fullmatch(r"sm_\d{2,3}", values["arch"]) or int(values["arch"][3:]) < 61:
        raise RecipeError(
            message(
                f"{device!r}: no GPU that multiplies bytes",
                expected="-arch=sm_61 or later, for example sm_75, sm_80, sm_86, sm_89, sm_90",
                found=values["arch"],
            )
        )
    best = best_unit(int(values["arch"][3:]))
    unit = values.get("kernels", best)
    if unit not in KERNELS or KERNELS.index(unit) > KERNELS.index(best):
        raise RecipeError(
            message(
                f"{device!r}: {values['arch']} has no such kernels",
                expected=f"-kernels= one of {', '.join(KERNELS[: KERNELS.index(best) + 1])}",
                found=unit,
            )
        )
    return CudaIsa(values["arch"], unit)  # type: ignore[arg-type]


def cuda_target(isa: CudaIsa) -> dict[str, Any]:
    """TVM's target: device code for `isa`, and host code for this platform's plainest processor."""
    return {"kind": "cuda", "arch": isa.arch, "host": {"kind": "llvm"}}
