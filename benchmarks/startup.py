"""Figures: ``s2d-deploy --help`` answers within half a second, and ``import s2d_deploy`` loads no torch and no runtime.

    python benchmarks/startup.py

Every sample is a fresh process, started and waited for; one more in front warms the file cache.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import _common
from _common import Figure, Record, at_most

from s2d_deploy.errors import RuntimeUnavailable, message

LIMIT_SECONDS = 0.5
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "tvm", "tensorrt", "tensorrt_rtx", "openvino", "matplotlib")


def program() -> str:
    """The installed command of this environment.

    Raises:
        RuntimeUnavailable: the project is not installed here.
    """
    found = shutil.which("s2d-deploy", path=str(Path(sys.executable).parent)) or shutil.which("s2d-deploy")
    if found is None:
        raise RuntimeUnavailable(message("the command s2d-deploy is not installed", fix="pip install -e ."))
    return found


def seconds_of(command: Sequence[str]) -> float:
    """Wall time of one process that must succeed."""
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def loaded() -> list[str]:
    """Heavy packages that a fresh interpreter holds after ``import s2d_deploy``."""
    code = f"import sys, s2d_deploy; print(*[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.split()


def run(chosen: argparse.Namespace) -> int:
    """Measure, print, write."""
    record = Record("startup")
    command = [program(), "--help"]
    seconds_of(command)
    samples = [seconds_of(command) for _ in range(chosen.runs)]
    bare = [seconds_of([sys.executable, "-c", "pass"]) for _ in range(chosen.runs)]
    heavy = loaded()
    note = f"{min(samples):.3f} to {max(samples):.3f} s; an interpreter alone takes {statistics.median(bare):.3f} s"
    figures: list[Figure] = [
        at_most("s2d-deploy --help, median seconds", statistics.median(samples), LIMIT_SECONDS, note),
        at_most("heavy packages loaded by import s2d_deploy", float(len(heavy)), 0.0, ", ".join(heavy)),
    ]
    data = {"help_seconds": samples, "interpreter_seconds": bare, "loaded": heavy, "looked_for": HEAVY}
    return _common.finish(record, chosen.results, figures, data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    made = _common.parser("startup.py", str(__doc__))
    made.add_argument("--runs", type=_common.positive, default=10, help="processes (default: 10)")
    return _common.guarded(run, made.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
