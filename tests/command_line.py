"""The command line as a user meets it: a process of its own, with its own stdout, stderr and exit code.

Importing torch takes seconds. So one process imports everything once, then forks a child for each command: the child
is a real process that can be killed, interrupted or limited like any other.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "config": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "num_labels": 10,
        }
    },
    "data": {"kind": "digits", "calibration_samples": 16, "test_samples": 24, "batch_size": 24},
    "train": {"epochs": 2},
    "condition": {"steps": 4, "warmup": 1, "batch_size": 16, "tau": 0.5, "refresh_every": 2},
    "quantize": {"precisions": ["w8a8", "w4a16"]},
    "targets": ["reference"],
    "verify": {"samples": 8, "batch_size": 4},
    "bench": {"min_samples": 3, "min_seconds": 0.01, "max_seconds": 1, "warmup": 1, "threads": 1},
}
# Digests are compared between machines nowhere, but within one session every process computes on one thread.
SERVER = """
import json, os, resource, signal, sys
import scipy.special, sklearn.datasets, torch, transformers
from transformers import AutoModelForImageClassification
import s2d_deploy.export.to_onnx, s2d_deploy.run, s2d_deploy.runtimes.reference, s2d_deploy.tables
from s2d_deploy.cli import main

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.chdir(job["cwd"])
            sys.path.insert(0, job["cwd"])
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
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What a command left: exit code (negative: killed by that signal), stdout, stderr."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON document and nothing else."""
        return json.loads(self.stdout)

    @property
    def done(self) -> dict[str, bool]:
        """Stage -> whether it was reused, from the progress lines."""
        lines = [line.split() for line in self.stderr.splitlines() if line.startswith("  ") and " s " in line]
        return {words[0]: words[-2:] == ["already", "done"] for words in lines}


class Commands:
    """Runs commands in `cwd`, one at a time."""

    def __init__(self, cwd: Path) -> None:
        self.cwd = cwd
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=os.environ | {"TMPDIR": str(cwd)},
        )
        self._line()
        self.recipe(TINY, "tiny.yaml")

    def recipe(self, document: dict[str, Any], name: str) -> Path:
        """Write a recipe."""
        path = self.cwd / name
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    def start(self, *arguments: str | Path, before: str = "") -> int:
        """Start a command; `before` is Python that runs first in its process. Returns its process id."""
        job = {
            "arguments": [str(a) for a in arguments],
            "before": before,
            "cwd": str(self.cwd),
            "stdout": str(self.cwd / "stdout"),
            "stderr": str(self.cwd / "stderr"),
        }
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return int(self._line())

    def wait(self) -> Result:
        """Wait for the command that was started."""
        code = int(self._line())
        return Result(code, (self.cwd / "stdout").read_text(), (self.cwd / "stderr").read_text())

    def __call__(self, *arguments: str | Path, before: str = "") -> Result:
        """Run a command to its end."""
        self.start(*arguments, before=before)
        return self.wait()

    def signalled(self, sign: signal.Signals, when: Any, *arguments: str | Path) -> Result:
        """Run a command, and send it `sign` as soon as ``when()`` holds."""
        pid = self.start(*arguments)
        deadline = time.monotonic() + 60
        while not when():
            assert time.monotonic() < deadline, "the moment never came"
            time.sleep(0.001)
        subprocess.run(["kill", f"-{sign.value}", str(pid)], check=True)  # noqa: S607
        return self.wait()

    def close(self) -> None:
        """End the server."""
        self._server.communicate()

    def _line(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the server of the tests died"
        return line.strip()


@dataclass(frozen=True, slots=True)
class Finished:
    """A run folder in which every verb has done its work.

    Attributes:
        commands: what made it.
        folder: where it lies.
        steps: verb -> what `stages` found when it had ended.
        result: of a `run` after them all.
    """

    commands: Commands
    folder: Path
    steps: dict[str, dict[str, int]]
    result: Result

    def copy(self, to: Path) -> Path:
        """A copy to spoil."""
        shutil.copytree(self.folder, to)
        return to


def stages(folder: Path) -> dict[str, int]:
    """Finished stages, with the time at which each was put in place."""
    return {
        str(path.parent.relative_to(folder)): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("manifest.json"))
        if path.parent != folder
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Every file that a stage made, without the manifests: they hold times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for stage in stages(folder)
        for path in sorted((folder / stage).iterdir())
        if path.name != "manifest.json" and path.is_file()
    }
