"""Under which conditions something was timed: clock, load of others, time that the host took away.

None of it changes a figure. A reader who doubts one finds here whether the machine was busy, throttled or shared.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

_LOOK_SECONDS = 0.2


def conditions(seconds: float = _LOOK_SECONDS) -> dict[str, Any]:
    """What can be seen now; a key without a value is None.

    Args:
        seconds: how long to watch other processes; waited for here.

    Returns:
        clock_mhz (lowest and highest of the cores), governor, load_average (1 minute), other_cores (busy with other
        processes), steal_percent (of the cores' time, taken by the host of a virtual machine while watching).
    """
    before = _processor_times()
    other = busy_cores(seconds)
    after = _processor_times()
    steal = None
    if before is not None and after is not None and after[0] > before[0]:
        steal = round(100 * (after[1] - before[1]) / (after[0] - before[0]), 2)
    load = None
    with suppress(OSError, AttributeError):
        load = round(os.getloadavg()[0], 2)
    return {
        "clock_mhz": _clock(),
        "governor": _first_line(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "load_average": load,
        "other_cores": round(other, 2),
        "steal_percent": steal,
    }


def busy_cores(seconds: float) -> float:
    """How many cores other processes used during `seconds`, waited for here; 0 where unknown."""
    try:
        import psutil  # type: ignore[import-untyped]

        mine = sum(os.times()[:2])
        percent = psutil.cpu_percent(interval=seconds)
        mine = sum(os.times()[:2]) - mine
        return max(0.0, float(percent) / 100 * (psutil.cpu_count() or 1) - mine / seconds)
    except Exception:  # a fact about the machine, never a reason to fail
        return 0.0


def _clock() -> list[float] | None:
    with suppress(OSError):
        found = re.findall(r"^cpu MHz\s*:\s*([0-9.]+)", Path("/proc/cpuinfo").read_text(errors="replace"), re.MULTILINE)
        if found:
            clocks = [float(value) for value in found]
            return [round(min(clocks)), round(max(clocks))]
    return None


def _processor_times() -> tuple[int, int] | None:
    """All ticks of all cores, and those that the host took."""
    line = _first_line(Path("/proc/stat"))
    cells = line.split()[1:] if line else []
    ticks = [int(cell) for cell in cells[:8]]
    return (sum(ticks), ticks[7]) if len(ticks) == 8 else None


def _first_line(path: Path) -> str | None:
    with suppress(OSError):
        return path.read_text(errors="replace").split("\n", 1)[0]
    return None
