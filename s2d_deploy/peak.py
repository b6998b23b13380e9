"""What this CPU can do at best: multiply on registers, and read from memory. The roofline that latencies stand under.

The ceiling of arithmetic comes from a loop on registers (`peak.c`, compiled here for this CPU): no program that uses
the same instruction can be faster. The ceiling of memory is the fastest sum over an array much larger than any cache.
Without a C compiler, or for an instruction that the loop does not know, there is no figure.

Roofline: Williams, Waterman and Patterson 2009, "Roofline: an insightful visual performance model".
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal

import numpy as np

Kind = Literal["int8", "fp32"]
KINDS: tuple[Kind, ...] = ("int8", "fp32")
_SOURCE = Path(__file__).with_name("peak.c")
_ROUNDS = 2_000_000  # about 10 ms on one core
_REPEATS = 40
_MEMORY_BYTES = 1 << 28  # read once a repeat: far more than caches hold
_MEMORY_REPEATS = 6


@dataclass(frozen=True, slots=True)
class Peak:
    """The best rate seen.

    Attributes:
        kind: int8 or fp32.
        threads: how many.
        gmacs: 10^9 multiply-accumulates a second.
        method: what was measured.
        lower_bound: the machine may do better: a library's product, not a register loop.
        repeats: GMAC/s of every repeat.
    """

    kind: Kind
    threads: int
    gmacs: float
    method: str
    lower_bound: bool
    repeats: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return asdict(self)

    def __str__(self) -> str:
        bound = "at least " if self.lower_bound else ""
        return f"{self.kind}, {self.threads} thread(s): {bound}{self.gmacs:.0f} GMAC/s ({self.method})"


def share_of_peak(macs: int, milliseconds: float, peak_gmacs: float) -> float:
    """Which part of the peak a computation of `macs` multiply-accumulates reaches in `milliseconds`."""
    return gmacs(macs, milliseconds) / peak_gmacs


def gmacs(macs: int, milliseconds: float) -> float:
    """10^9 multiply-accumulates a second."""
    return macs / milliseconds / 1e6


@dataclass(frozen=True, slots=True)
class Roofline:
    """The ceilings of one number of threads.

    Attributes:
        threads: how many.
        peaks: of arithmetic, by kind; without the kinds that could not be measured.
        gigabytes_per_second: read from memory at best; None without a compiler.
    """

    threads: int
    peaks: Mapping[str, Peak]
    gigabytes_per_second: float | None

    def floor_ms(self, macs: Mapping[str, float], size_bytes: int) -> tuple[float, str] | None:
        """The least time that the work can take, and what it is bound by: ``"compute"`` or ``"memory"``.

        Args:
            macs: multiply-accumulates by executed precision (``"int8"``, ``"float32"``, ...); an integer precision
                runs on the byte unit, all others on FP32's.
            size_bytes: read at least once.

        None where a ceiling is missing that the work needs.
        """
        compute = 0.0
        for precision, count in macs.items():
            peak = self.peaks.get("int8" if precision.startswith("int") else "fp32")
            if count and peak is None:
                return None
            compute += count / peak.gmacs / 1e6 if peak is not None else 0.0
        memory = size_bytes / self.gigabytes_per_second / 1e6 if self.gigabytes_per_second else 0.0
        return (compute, "compute") if compute >= memory else (memory, "memory")

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return {
            "threads": self.threads,
            "peaks": {kind: {"gmacs": p.gmacs, "method": p.method} for kind, p in self.peaks.items()},
            "gigabytes_per_second": self.gigabytes_per_second,
        }


def measure_roofline(threads: int, repeats: int = _REPEATS) -> Roofline:
    """The ceilings of `threads` threads, in about a second."""
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        if library is None:
            return Roofline(threads, {}, None)
        peaks = {str(kind): register_peak(kind, threads, library, repeats) for kind in KINDS}
        found = {kind: peak for kind, peak in peaks.items() if peak is not None}
        return Roofline(threads, found, _bandwidth(threads, library))


def register_peak(kind: Kind, threads: int, library: ctypes.CDLL, repeats: int = _REPEATS) -> Peak | None:
    """The peak of one kind; None where the loop knows no instruction for it on this CPU.

    Args:
        kind: int8 or fp32.
        threads: simultaneous loops.
        library: what `compiled` gave.
        repeats: loops of about 10 ms; the best one counts.
    """
    name = text_of(library, f"{kind}_name")
    if not name:
        return None
    loop = getattr(library, f"{kind}_peak")
    loop.argtypes, loop.restype = [ctypes.c_int64], ctypes.c_int64
    macs = number_of(library, f"{kind}_macs") * _ROUNDS * threads
    rates = [gmacs(macs, _milliseconds([(loop, (_ROUNDS,))] * threads)) for _ in range(repeats)]
    # The best, not the median: a ceiling is what the machine can do, and disturbance only ever slows it.
    return Peak(kind, threads, max(rates), f"{name}, register loop", False, tuple(rates))


def _bandwidth(threads: int, library: ctypes.CDLL) -> float:
    """Gigabytes (10^9) a second."""
    data = np.ones(_MEMORY_BYTES // 8, np.int64)
    read = library.read_sum
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_int64
    parts = [part for part in np.array_split(data, threads) if len(part)]
    calls = [(read, (part.ctypes.data, len(part))) for part in parts]
    return max(data.nbytes / _milliseconds(calls) / 1e6 for _ in range(_MEMORY_REPEATS))


def _milliseconds(calls: Sequence[tuple[Callable[..., int], tuple[int, ...]]]) -> float:
    """Wall time of simultaneous calls; ctypes releases the interpreter's lock while it calls."""
    others = [Thread(target=function, args=arguments) for function, arguments in calls[1:]]
    begin = time.perf_counter_ns()
    for other in others:
        other.start()
    calls[0][0](*calls[0][1])
    for other in others:
        other.join()
    return (time.perf_counter_ns() - begin) / 1e6


def compiled(folder: Path) -> ctypes.CDLL | None:
    """The loops compiled for this CPU; None without a C compiler that can."""
    candidates = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    compiler = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if compiler is None:
        return None
    target = folder / "peak.so"
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(target), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return ctypes.CDLL(str(target)) if done.returncode == 0 else None


def text_of(library: ctypes.CDLL, name: str) -> str:
    """What a function of the library says of itself."""
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    return str(function().decode())


def number_of(library: ctypes.CDLL, name: str) -> int:
    """A number that the library says of itself."""
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    return int(function())
