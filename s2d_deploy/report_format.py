"""Numbers as people read them. A missing number is an en dash, never a zero and never a guess."""

from __future__ import annotations

import json
import math
from typing import Any

MISSING = "\N{EN DASH}"
_SI = ("B", "kB", "MB", "GB", "TB")


def number(value: float | None, digits: int = 4) -> str:
    """`value` with `digits` significant digits, e.g. ``0.9833``, ``12.31``, ``1,204``, ``3.2e-06``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude > 9:
        return f"{value:.{max(digits - 2, 0)}e}"
    if float(value).is_integer() and magnitude >= digits - 1:
        return f"{value:,.0f}"
    decimals = max(digits - 1 - magnitude, 0)
    # Values of a table share their decimals down to 0.01; a smaller one keeps three significant digits.
    return f"{value:,.{min(decimals, max(digits, 2 - magnitude))}f}"


def trimmed(value: float | None, digits: int = 4) -> str:
    """As `number`, without trailing zeros: for limits and axis labels, e.g. ``0.005``, ``20``."""
    shown = number(value, digits)
    return shown.rstrip("0").rstrip(".") if "." in shown and "e" not in shown else shown


def signed(value: float | None, digits: int = 3) -> str:
    """A difference with its sign, e.g. ``+0.0021``, ``−0.0083``; an exact zero is ``±0``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "±0"
    fixed = f"{abs(value):.4f}"
    # Four decimals, as the metrics stand beside it, unless they would show nothing or too much.
    shown = fixed if 0.00005 <= abs(value) < 10 else number(abs(value), digits)
    return ("+" if value > 0 else "\N{MINUS SIGN}") + shown


def count(value: int | None) -> str:
    """A count with thousands separators."""
    return MISSING if value is None else f"{value:,}"


def short_count(value: int | None) -> str:
    """A count for a small place, e.g. ``4.81 M``."""
    if value is None or abs(value) < 10_000:
        return count(value)
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{number(value / factor, 3)} {unit}"
    return count(value)


def percent(share: float | None, digits: int = 1) -> str:
    """A share in 0..1 as a percentage; a tiny share is not rounded down to nothing."""
    if share is None or not math.isfinite(share):
        return MISSING
    floor = 10.0**-digits
    if 0 < share * 100 < floor / 2:
        return f"< {floor:g} %"
    return f"{share * 100:.{digits}f} %"


def ratio(value: float | None) -> str:
    """A factor, e.g. ``1.42×``."""
    return MISSING if value is None or not math.isfinite(value) else f"{number(value, 3)}\N{MULTIPLICATION SIGN}"


def milliseconds(value: float | None) -> str:
    """A duration given in milliseconds, e.g. ``12.3 ms``."""
    return MISSING if value is None or not math.isfinite(value) else f"{number(value, 3)} ms"


def seconds(value: float | None) -> str:
    """A duration given in seconds, e.g. ``83.2 s`` or ``12 min 4 s``."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value < 600:
        return f"{number(value, 3)} s"
    return f"{int(value) // 60} min {int(value) % 60} s"


def size(value: float | None) -> str:
    """Bytes in decimal units, e.g. ``22.6 MB``."""
    if value is None or not math.isfinite(value):
        return MISSING
    scaled, unit = float(value), 0
    while abs(scaled) >= 1000 and unit < len(_SI) - 1:
        scaled, unit = scaled / 1000, unit + 1
    return f"{scaled:.0f} B" if unit == 0 else f"{number(scaled, 3)} {_SI[unit]}"


def of(part: int | None, whole: int | None) -> str:
    """``3 of 1,200``; a missing part or a check that saw nothing is missing."""
    return MISSING if part is None or not whole else f"{part:,} of {whole:,}"


def anything(value: Any) -> str:
    """A value of unknown type (a gate's value, limit or evidence) as one line of text."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return trimmed(value)
    if isinstance(value, str):
        return value or MISSING
    if isinstance(value, list):
        return ", ".join(anything(item) for item in value) or MISSING
    if isinstance(value, dict):
        return ", ".join(f"{key}: {anything(item)}" for key, item in value.items()) or MISSING
    return json.dumps(value, default=str)


def command_line(command: str | list[str] | None) -> str:
    """A command as it is typed into a shell."""
    if isinstance(command, list):
        import shlex

        return shlex.join(command)
    return command or MISSING
