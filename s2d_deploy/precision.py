"""Precision names: ``w<weight bits>a<activation bits>``, 16 meaning float; ``fp32`` quantizes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from s2d_deploy.errors import RecipeError, message

STANDARD = ("w8a8", "w4a16", "w4a8", "w4a4")
BASELINE = "fp32"


@dataclass(frozen=True, slots=True)
class Precision:
    """Bits of weights and activations; 16 stands for float.

    Attributes:
        name: canonical lower-case name.
        weights: 2 to 8, or 16.
        activations: 2 to 8, or 16.
    """

    name: str
    weights: int
    activations: int


def parse_precision(name: str, key: str = "precision") -> Precision:
    """``"w4a8"`` -> ``Precision("w4a8", 4, 8)``.

    Raises:
        RecipeError: not a precision; the message names `key`.
    """
    text = str(name).lower()
    if text in (BASELINE, "float", "float32"):
        return Precision(BASELINE, 16, 16)
    match = re.fullmatch(r"w([0-9]{1,2})a([0-9]{1,2})", text)
    bits = [int(g) for g in match.groups()] if match else []
    if not bits or any(b not in (2, 3, 4, 5, 6, 7, 8, 16) for b in bits) or bits == [16, 16]:
        raise RecipeError(
            message(
                f"{key}: unknown precision {name!r}",
                expected=f"{', '.join(STANDARD)}, {BASELINE}, or w<bits>a<bits> with 2 to 8 bits (16 for float)",
            )
        )
    return Precision(f"w{bits[0]}a{bits[1]}", *bits)
