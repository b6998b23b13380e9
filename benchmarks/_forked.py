"""Commands of s2d-deploy as processes of their own, that start at once: one process imports everything, then forks.

A forked child is a real process: it has its own memory, limits and signals, and can be killed like any other. Python
that is given as `before` runs first in the child; that is where faults are planted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SERVER = """
import contextlib, io, json, os, signal, sys, time
import scipy.special, sklearn.datasets, torch, transformers
from transformers import AutoModelForImageClassification
import s2d_deploy.export.to_onnx, s2d_deploy.run, s2d_deploy.runtimes.reference, s2d_deploy.tables
from s2d_deploy.cli import main

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    if job["warm"]:  # here, so that what is made once in a process is there in all that are forked
        os.chdir(job["cwd"])
        sys.argv = ["s2d-deploy", *job["arguments"]]
        print(os.getpid(), flush=True)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main(job["arguments"])
        print(code, flush=True)
        continue
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.chdir(job["cwd"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = ["s2d-deploy", *job["arguments"]]
            exec(job["before"], {})
            code = main(job["arguments"])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    print(pid, flush=True)
    killed = False
    while not killed:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if job["seconds"] is not None and time.monotonic() - job["now"] > job["seconds"]:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            killed = True
        time.sleep(0.002)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: exit code (negative: killed by that signal), seconds, stdout, stderr."""

    code: int
    seconds: float
    stdout: str
    stderr: str

    @property
    def killed(self) -> bool:
        """Whether a signal ended it."""
        return self.code < 0

    @property
    def clear(self) -> bool:
        """Whether it ended by itself, with an exit code of ours and without a traceback or a bug."""
        return self.code in (0, 1, 2, 3) and "Traceback" not in self.stderr and "unexpected" not in self.stderr


class Forked:
    """Runs commands, one at a time. Use it as a context manager.

    Args:
        logs: folder for their stdout and stderr.
        threads: of every numeric library.
    """

    def __init__(self, logs: Path, threads: int = 1) -> None:
        self.logs = logs.absolute()
        self.logs.mkdir(parents=True, exist_ok=True)
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        pools = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        self._server = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | offline | pools | {"TMPDIR": str(self.logs)},
        )
        self._line()

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.communicate()

    def __call__(
        self, arguments: Sequence[str], cwd: Path, *, before: str = "", seconds: float | None = None, warm: bool = False
    ) -> Ended:
        """Run a command in `cwd`; after `seconds`, where given, it is killed with signal 9.

        With `warm` it runs in the process that forks, so that those to come find loaded what it has loaded.
        """
        start = time.monotonic()
        job = {
            "arguments": list(arguments),
            "cwd": str(cwd.absolute()),
            "before": before,
            "warm": warm,
            "seconds": seconds,
            "now": start,
            "stdout": str(self.logs / "stdout"),
            "stderr": str(self.logs / "stderr"),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        self._line()
        code = int(self._line())
        if warm:
            return Ended(code, time.monotonic() - start, "", "")
        stdout, stderr = ((self.logs / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return Ended(code, time.monotonic() - start, stdout, stderr)

    def _line(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the process that forks has died: exit code {self._server.wait()}")
        return line.strip()
