"""Per-sample outcomes as text that fits into a committed file: one bit for right or wrong, seven digits for a grade.

Two runs that judged the same samples can be compared sample by sample only where these are kept. What is lost: grades
beyond seven significant digits, which is more than any runtime reproduces.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from s2d_deploy.errors import ArtifactError, message

_UNITS = (1.0, 100.0)
_MOST = 10_000_000
_NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")


def pack(values: Sequence[float]) -> dict[str, Any]:
    """``{"n", "unit", "right"}`` with hexadecimal bits, first sample first, or ``{"n", "grades"}``.

    Raises:
        ValueError: no samples, or one that is not finite.
    """
    numbers = [float(v) for v in values]
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError("no samples, or samples that are not finite")
    unit = max(numbers)
    if unit in _UNITS and all(v in (0.0, unit) for v in numbers):
        bits = "".join("1" if v else "0" for v in numbers)
        bits += "0" * (-len(bits) % 8)
        text = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).hex()
        return {"n": len(numbers), "unit": unit, "right": text}
    return {"n": len(numbers), "grades": " ".join(f"{v:.7g}" for v in numbers)}


def unpack(document: Mapping[str, Any], place: str) -> list[float]:
    """The outcomes that `pack` was given, grades to seven digits.

    Raises:
        ArtifactError: not what `pack` writes; `place` says where.
    """
    n = document.get("n")
    if type(n) is not int or not 0 < n <= _MOST:
        raise _broken(place, f"n is {n!r}"[:80])
    if "right" in document and set(document) == {"n", "unit", "right"}:
        unit, text = document["unit"], document["right"]
        if unit not in _UNITS or not isinstance(text, str) or not re.fullmatch("([0-9a-f]{2})*", text):
            raise _broken(place, "bits that are not hexadecimal, or a unit that is neither 1 nor 100")
        if len(text) != 2 * (-(-n // 8)):
            raise _broken(place, f"{len(text) // 2} bytes of bits for {n} samples")
        bits = "".join(f"{byte:08b}" for byte in bytes.fromhex(text))
        if "1" in bits[n:]:
            raise _broken(place, "bits behind the last sample")
        return [float(unit) if bit == "1" else 0.0 for bit in bits[:n]]
    grades = document.get("grades")
    if set(document) != {"n", "grades"} or not isinstance(grades, str):
        raise _broken(place, f"keys {', '.join(sorted(map(str, document)))}"[:80])
    words = grades.split(" ")
    if len(words) != n or not all(len(w) <= 24 and _NUMBER.fullmatch(w) for w in words):
        raise _broken(place, f"{len(words)} grades for {n} samples, or one that is no number")
    values = [float(w) for w in words]
    if not all(map(math.isfinite, values)):
        raise _broken(place, "a grade that is not finite")
    return values


def of_row(row: Mapping[str, Any]) -> list[float] | None:
    """The runtime's outcomes in a report's row; None where there are none, or they are no list of numbers."""
    metric = row.get("metric")
    values = metric.get("per_sample_measured") if isinstance(metric, Mapping) else None
    if not isinstance(values, list) or not values:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        return None
    return [float(v) for v in values]


def _broken(place: str, found: str) -> ArtifactError:
    return ArtifactError(
        message(f"{place}: not the outcomes of samples", expected="n with right or grades", found=found)
    )
