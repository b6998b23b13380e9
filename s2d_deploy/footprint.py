"""Cold start and memory of an artifact, measured in a process of its own.

In the process that verifies and times, everything is warm and several artifacts share the memory. So a child loads
nothing but the runtime, opens the artifact, runs it, and says what that took. Cold is the process, not the machine: the
files were just written, and lie in the page cache.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from s2d_deploy.session import Artifact, Feeds, PreloadedRuntime

log = logging.getLogger(__name__)
_WARM_RUNS = 5
_SECONDS = 300  # until a child is given up


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one process needs for one artifact.

    Attributes:
        import_ms: loading the runtime's libraries (0 where the adapter loads them with the artifact).
        open_ms: loading the artifact.
        first_run_ms: the first inference.
        memory_bytes: the most resident memory at any moment, less what was resident once the runtime was loaded.
        process_bytes: the most resident memory of the whole process, Python and the runtime included.
    """

    import_ms: float
    open_ms: float
    first_run_ms: float
    memory_bytes: int | None
    process_bytes: int | None

    @property
    def cold_start_ms(self) -> float:
        """From an artifact on disk to its first result, the runtime being loaded."""
        return self.open_ms + self.first_run_ms

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return {**asdict(self), "cold_start_ms": self.cold_start_ms}


def measure_footprint(artifact: Artifact, feeds: Feeds, *, threads: int) -> Footprint | None:
    """Open and run `artifact` in a new process; None where that process did not come to its end (the log says why).

    Args:
        artifact: for a runtime of this machine.
        feeds: one batch.
        threads: for the runtime.
    """
    task = {
        "target": artifact.target,
        "precision": artifact.precision,
        "folder": str(artifact.folder.resolve()),
        "files": artifact.files,
        "info": artifact.info,
        "threads": threads,
    }
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "feeds.npz", **dict(feeds))  # type: ignore[arg-type]  # names of arrays, no options
        (Path(folder) / "task.json").write_text(json.dumps(task))
        command = [sys.executable, "-m", __name__, folder]
        # TVM without its compiler, as an artifact needs it.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TVM_USE_RUNTIME_LIB": "1"}
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=_SECONDS, check=True, env=environment
            )
            return Footprint(**json.loads(done.stdout.splitlines()[-1]))
        except (OSError, subprocess.SubprocessError, ValueError, TypeError, IndexError) as error:
            said = str(getattr(error, "stderr", "") or "").strip().splitlines()
            log.warning(
                "cold start and memory of %s %s are not known: %s",
                artifact.target,
                artifact.precision,
                said[-1] if said else error,
            )
            return None


def _child(folder: Path) -> Footprint:
    from s2d_deploy.registry import load_runtime

    task = json.loads((folder / "task.json").read_text())
    with np.load(folder / "feeds.npz", allow_pickle=False) as stored:
        feeds = {name: stored[name] for name in stored.files}
    begin = time.perf_counter_ns()
    runtime = load_runtime(task["target"])
    if isinstance(runtime, PreloadedRuntime):
        runtime.preload()
    imported = time.perf_counter_ns()
    resident = _status("VmRSS")
    artifact = Artifact(Path(task["folder"]), task["target"], task["precision"], task["files"], task["info"])
    with runtime.open(artifact, threads=task["threads"]) as session:
        opened = time.perf_counter_ns()
        session.run(feeds)
        first = time.perf_counter_ns()
        for _ in range(_WARM_RUNS):
            session.run(feeds)
        highest = _status("VmHWM")
    return Footprint(
        import_ms=(imported - begin) / 1e6,
        open_ms=(opened - imported) / 1e6,
        first_run_ms=(first - opened) / 1e6,
        memory_bytes=None if highest is None or resident is None else max(0, highest - resident),
        process_bytes=highest,
    )


def _status(name: str) -> int | None:
    """A figure of /proc/self/status in bytes; None where there is none (other systems than Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_child(Path(sys.argv[1])))) + "\n")
