"""Precision names: ``w<weight bits>a<activation bits>``, 16 meaning float; ``fp32`` quantizes nothing.

``nvfp4`` and ``mxfp4`` are 4-bit floats (E2M1) in blocks, for weights and activations.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from s2d_deploy.errors import RecipeError, message

STANDARD = ("w8a8", "w4a16", "w4a8", "w4a4")
BASELINE = "fp32"
NumberFormat = Literal["int", "nvfp4", "mxfp4"]
FP4: tuple[Literal["nvfp4"], Literal["mxfp4"]] = ("nvfp4", "mxfp4")


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits of weights and activations; 16 stands for float.

    Attributes:
        name: canonical lower-case name.
        weights: 2 to 8, or 16.
        activations: 2 to 8, or 16.
        format: of both: integers, or 4-bit floats in blocks.
    """

    name: str
    weights: int
    activations: int
    format: NumberFormat = "int"


def parse_precision(name: str, key: str = "precision") -> Precision:
    """``"w4a8"`` -> ``Precision("w4a8", 4, 8)``.

    Raises:
        RecipeError: not a precision; the message names `key`.
    """
    text = str(name).lower()
    if text in (BASELINE, "float", "float32"):
        return Precision(BASELINE, 16, 16)
    for fp4 in FP4:
        if text == fp4:
            return Precision(fp4, 4, 4, fp4)
    match = re.fullmatch(r"w([0-9]{1,2})a([0-9]{1,2})", text)
    bits = [int(g) for g in match.groups()] if match else []
    if not bits or any(b not in (2, 3, 4, 5, 6, 7, 8, 16) for b in bits) or bits == [16, 16]:
        raise RecipeError(
            message(
                f"{key}: unknown precision {name!r}",
                expected=f"{', '.join((*STANDARD, *FP4))}, {BASELINE}, or w<bits>a<bits> with 2 to 8 bits (16: float)",
            )
        )
    return Precision(f"w{bits[0]}a{bits[1]}", bits[0], bits[1])
