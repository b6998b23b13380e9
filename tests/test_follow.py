"""`s2d-deploy condition` under torchrun: two processes, one folder, one process's weights."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import TINY
from safetensors.torch import load_file

ONE = [sys.executable, "-m", "s2d_deploy.cli"]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "s2d_deploy.cli"]


def conditioned(command: list[str], folder: Path, *more: str) -> Path:
    document: dict[str, Any] = copy.deepcopy(TINY)
    document["condition"] |= {"objective": "distill", "tau": 0.3, "steps": 4}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(document))
    done = subprocess.run(
        [*command, "condition", "tiny.yaml", "-o", "out", "-q", *more],
        cwd=folder, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out" / "condition"


def test_two_processes_condition_as_one(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = conditioned(ONE, tmp_path / "one"), conditioned(TWO, tmp_path / "two")
    expected, found = (json.loads((folder / "conditioning.json").read_text()) for folder in (one, two))
    assert any(layer["flagged"] for layer in expected["layers"])
    assert [layer["k_target"] for layer in expected["layers"]] == [layer["k_target"] for layer in found["layers"]]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-3, abs=1e-6)
    weights = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    # As in test_distributed: 1 % of the way that AdamW can have taken a weight in 4 steps at 1e-4.
    assert max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0]) <= 0.01 * 4e-4
    before = load_file(tmp_path / "two" / "out" / "train" / "model.safetensors")
    assert any(not torch.equal(before[name], value) for name, value in weights[1].items())
    conditioned(TWO, tmp_path / "two")  # nothing is left to do: all are sent home
