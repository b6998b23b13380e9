"""Two gloo processes against one: the same layers flagged, the same weights.

Tolerances. A step's gradient is the same sum in another order, so each entry errs by about 2^-24 of the largest of
its terms. Where nothing but S2D moves a weight (the library under SGD) that is all: 1e-6 of the largest weight.
AdamW divides a gradient by its own size: an entry that cancels to 1e-4 of its terms is known to about 1e-3, and moves
its weight by at most the learning rate in a step. So no weight may differ by more than 1 % of the way that AdamW can
have taken it, the sum of the learning rates; below bfloat16 (8 bits) by as much as that way itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import distributed_worker as worker

from s2d_deploy.loop import learning_rate

WAY = sum(learning_rate(step, steps=worker.STEPS, lr=worker.RATE, warmup=0) for step in range(worker.STEPS))
Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    folder = tmp_path_factory.mktemp("two")
    script = str(Path(worker.__file__))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    for name, first in ranks[0].items():
        for weight, value in first["weights"].items():
            assert torch.equal(value, ranks[1][name]["weights"][weight]), (name, weight)
    return ranks[0], folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return worker.everything(tmp_path_factory.mktemp("one"))


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    return max(float((a["weights"][name] - value.detach()).abs().max()) for name, value in b["weights"].items())


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("application", ["coupled", "decoupled"])
def test_the_library(two: tuple[Results, Path], one: Results, sharding: str, application: str) -> None:
    name = f"{sharding} library {application}"
    found, expected = two[0][name], one[name]
    assert found["flagged"] == expected["flagged"] == {"blocks.0.out": 1, "blocks.1.qkv[1/3]": 1, "head": 1}
    assert difference(found, expected) <= 1e-6 * 9.0
    assert found["refreshes"] == expected["refreshes"] == 2
    assert abs(found["drift"] - expected["drift"]) < 1e-6
    start = dict(worker.Tiny().named_parameters())
    pressed = {n for n, value in found["weights"].items() if not torch.equal(value, start[n].detach())}
    assert pressed == {"blocks.0.out.weight", "blocks.1.qkv.weight", "head.weight"}
    rows = found["weights"]["blocks.1.qkv.weight"] != start["blocks.1.qkv.weight"].detach()
    assert rows[12:24].any()
    assert not rows[:12].any()
    assert not rows[24:].any()


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
@pytest.mark.parametrize("what", ["task", "distill", "accumulate", "resumed"])
def test_our_loop(two: tuple[Results, Path], one: Results, sharding: str, what: str) -> None:
    found, expected = two[0][f"{sharding} {what}"], one[f"{sharding} {what}"]
    assert found["flagged"] == expected["flagged"]
    assert any(found["flagged"].values())
    assert found["refreshes"] == expected["refreshes"] == [0, 3, 6]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4, abs=1e-6)
    assert difference(found, expected) <= 0.01 * WAY
    assert difference(found, {"weights": dict(worker.Tiny().named_parameters())}) > WAY / 4  # something did happen


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_bfloat16(two: tuple[Results, Path], one: Results, sharding: str) -> None:
    found, expected = two[0][f"{sharding} bf16"], one[f"{sharding} bf16"]
    assert found["refreshes"] == expected["refreshes"]
    assert all(value.dtype == torch.float32 for value in found["weights"].values())
    assert difference(found, expected) <= WAY


@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_an_interrupted_run_gives_the_same_weights(two: tuple[Results, Path], sharding: str) -> None:
    assert difference(two[0][f"{sharding} resumed"], two[0][f"{sharding} distill"]) == 0.0


def test_one_process_continues_what_two_began(two: tuple[Results, Path], one: Results) -> None:
    """The checkpoints of FSDP2 hold whole tensors."""
    seen: list[int] = []
    found = worker.by_condition(
        "auto", "distill", checkpoint_path=two[1] / "left.pt", progress=lambda done, *_: seen.append(done)
    )
    assert seen == list(range(4, worker.STEPS + 1))
    assert difference(found, one["ddp distill"]) <= 0.01 * WAY
