"""What every test runs under: no network, one thread, repeatable examples."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
from command_line import Commands, Finished, stages

# Set before torch, NumPy or transformers is imported, since they read these once; subprocesses inherit them.
# One thread makes float sums repeatable bit for bit; a test about threads asks for its own number.
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
SINGLE_THREADED = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ.update({**OFFLINE, "HF_HUB_DISABLE_TELEMETRY": "1", "MPLBACKEND": "Agg"})
for _name, _value in SINGLE_THREADED.items():
    os.environ.setdefault(_name, _value)

# The same examples in every run, so that a red build can be repeated; no deadline, since shared machines stall.
settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line, each command a process of its own, in one working folder."""
    server = Commands(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def finished(commands: Commands) -> Finished:
    """One run of the tiny recipe, verb by verb. Copy it before you spoil it."""
    folder = commands.cwd / "runs" / "finished"
    steps = {}
    for verb in ("diagnose", "condition", "quantize", "export", "build", "verify", "gate"):
        result = commands(verb, "tiny.yaml", "-o", folder)
        assert result.code == 0, result.stderr
        steps[verb] = stages(folder)
    return Finished(commands, folder, steps, commands("run", "tiny.yaml", "-o", folder))
