"""What the benchmark scripts share: result files, verdicts, tables, the note about a busy machine.

A result file holds everything that a figure needs to be believed or doubted later: the command, the machine, the
versions, the load before and after, every raw sample, and the verdicts. Files are never overwritten.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from s2d_deploy.conditions import busy_cores
from s2d_deploy.errors import RecipeError, S2DDeployError, exit_code_of, message
from s2d_deploy.files import write_json
from s2d_deploy.host import host_facts, usable_cores, versions

RESULTS = Path("benchmarks/results")
WORK = Path("build/benchmarks")
SCHEMA = 1
Verdict = Literal["pass", "fail", "undecided"]
# Of the usable cores: what other processes may take before the machine counts as busy.
_BUSY = 0.25
_BUSY_WINDOW_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One promised figure: what was measured, what was promised.

    Attributes:
        name: what a reader calls it.
        value: None where it could not be measured.
        limit: `value` must not exceed it; None for a figure that is only reported.
        verdict: pass, fail, or undecided where the evidence does not separate `value` from `limit`.
        note: evidence, or why there is no value.
    """

    name: str
    value: float | None
    limit: float | None
    verdict: Verdict
    note: str = ""


def at_most(name: str, value: float | None, limit: float | None, note: str = "") -> Figure:
    """A figure whose value is exact. Without a limit it passes; without a value it is undecided."""
    if value is None:
        return Figure(name, None, limit, "undecided" if limit is not None else "pass", note)
    return Figure(name, value, limit, "pass" if limit is None or value <= limit else "fail", note)


def overall(figures: Iterable[Figure]) -> Verdict:
    """fail before undecided before pass."""
    found = {figure.verdict for figure in figures}
    return "fail" if "fail" in found else "undecided" if "undecided" in found else "pass"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is left-aligned, the others right-aligned."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([text(lines[0]), "-" * len(text(["-" * w for w in widths])), *map(text, lines[1:])])


def show_figures(figures: Sequence[Figure]) -> str:
    """The verdicts as a table."""
    rows = [
        (f.name, "-" if f.value is None else f"{f.value:.4g}", "-" if f.limit is None else f"{f.limit:g}", f.verdict)
        for f in figures
    ]
    notes = [f"  {f.name}: {f.note}" for f in figures if f.note]
    return "\n".join([table(("figure", "value", "limit", "verdict"), rows), *notes])


class Record:
    """One run of one script: made before it measures, written after.

    Args:
        name: of the result file, ``YYYY-MM-DD-<name>.json``.
        threads: that candidates were given, or None.
        command: as typed; the running one by default.
    """

    def __init__(self, name: str, threads: int | None = None, command: Sequence[str] | None = None) -> None:
        self.name, self.threads = name, threads
        self.command = shlex.join(command if command is not None else ["python", *sys.argv])
        self.started = datetime.now(UTC)
        self._clock = time.perf_counter()
        self.busy_cores = busy_cores(_BUSY_WINDOW_SECONDS)
        if self.busy_cores > _BUSY * usable_cores():
            print(
                f"note: other processes use {self.busy_cores:.2f} of {usable_cores()} cores: "
                "good enough to see that this works, no ground for a figure\n",
                file=sys.stderr,
            )

    def document(self, figures: Sequence[Figure], data: dict[str, Any]) -> dict[str, Any]:
        """The result file's content."""
        return {
            "schema_version": SCHEMA,
            "name": self.name,
            "created": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._clock, 1),
            "command": self.command,
            "host": host_facts(self.threads),
            "versions": {k: v for k, v in versions().items() if v is not None},
            "other_load_cores_before": round(self.busy_cores, 2),
            "figures": [asdict(figure) for figure in figures],
            "verdict": overall(figures),
            "data": data,
        }

    def write(self, folder: Path, figures: Sequence[Figure], data: dict[str, Any]) -> Path:
        """Write the document; a second run on one day gets a number behind its name."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = f"{self.started:%Y-%m-%d}-{self.name}"
        names = (f"{stem}.json", *(f"{stem}-{i}.json" for i in range(2, 1000)))
        path = next(folder / name for name in names if not (folder / name).exists())
        write_json(path, self.document(figures, data))
        return path


def names(text: str) -> tuple[str, ...]:
    """``"a,b"`` -> ``("a", "b")``; empty text gives nothing."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def positive(text: str) -> int:
    """An integer of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected 1 or more")
    return value


def parser(script: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    made = argparse.ArgumentParser(
        prog=f"python benchmarks/{script}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument(
        "--results", type=Path, default=RESULTS, metavar="DIR", help=f"where the result file goes (default: {RESULTS})"
    )
    return made


def finish(record: Record, folder: Path, figures: Sequence[Figure], data: dict[str, Any]) -> int:
    """Print the verdicts, write the result file; the exit code: 0 only where every figure passed."""
    if figures:
        print(show_figures(figures))
    print(f"results: {record.write(folder, figures, data)}")
    return 0 if overall(figures) == "pass" else 1


def limit_threads(threads: int) -> None:
    """Tell every thread pool of this process its size; before NumPy, torch or a runtime is imported.

    Raises:
        RecipeError: one of those is imported already, and would not read it.
    """
    late = [name for name in ("torch", "onnxruntime", "openvino", "tvm") if name in sys.modules]
    if late and os.environ.get("OMP_NUM_THREADS") != str(threads):
        raise RecipeError(
            message("the number of threads is fixed already", found=f"{', '.join(late)} imported before --threads")
        )
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if threads > usable_cores():
        print(f"note: {threads} threads on {usable_cores()} usable cores", file=sys.stderr)


def guarded(main: Any, arguments: argparse.Namespace) -> int:
    """Run `main`; an error of ours becomes one line and its exit code."""
    try:
        return int(main(arguments))
    except S2DDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
