"""The condition section through the pipeline: every method, QAT, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import TINY

from s2d_deploy.console import Display
from s2d_deploy.errors import RecipeError
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.recipe import parse_recipe
from s2d_deploy.store import RunFolder, read_json


def recipe(**condition: Any) -> Any:
    document = copy.deepcopy(TINY)
    document["condition"] |= condition
    return parse_recipe(document)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs") / "tiny"


CASES: list[tuple[dict[str, Any], str, bool]] = [
    ({"method": "s2d", "split": {"*.q_proj": 2}, "refresh_drift": 0.5}, "task+s2d-decoupled", True),
    ({"method": "control"}, "task", False),
    ({"method": "weight-decay", "objective": "distill", "accumulate": 2}, "distill+weight-decay", False),
    ({"method": "muon", "autocast": "bf16"}, "task+muon", False),
    ({"method": "s2d", "qat": "W4A4", "objective": "distill"}, "distill+qat+s2d-decoupled", True),
    ({"method": "control", "qat": "w3a4"}, "task+qat", False),
]


@pytest.mark.parametrize(("condition", "method", "refreshed"), CASES)
def test_every_method_conditions(folder: Path, condition: dict[str, Any], method: str, refreshed: bool) -> None:
    torch.set_num_threads(1)
    chosen = recipe(**condition)
    with RunFolder(folder, {}) as store:
        store.claim(chosen.document(), True)
        pipeline = Pipeline(chosen, store, Display(quiet=True))
        stage = pipeline.condition()
        found = read_json(stage.folder / "conditioning.json")
        before = {k: v.clone() for k, v in pipeline.original.module.state_dict().items()}
        after = pipeline.model.module.state_dict()
    assert found["method"] == method
    assert len(found["losses"]) == 4
    assert bool(found["refreshes"]) == refreshed
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in after)


@pytest.mark.parametrize(
    ("condition", "text"),
    [
        ({"qat": "w9a9"}, "condition.qat: unknown precision 'w9a9'"),
        ({"qat": "fp32"}, "condition.qat: fp32 quantizes nothing. Fix: leave condition.qat out"),
        ({"split": {"*": 0}}, "condition.split: *. Expected: 1 to 4096 matrices"),
        ({"decay": 1.5}, "key 'condition.decay'"),
        ({"accumulate": 0}, "key 'condition.accumulate'"),
        ({"autocast": "fp8"}, "key 'condition.autocast'"),
        ({"method": "adam"}, "key 'condition.method'"),
        ({"refresh_drift": 0}, "key 'condition.refresh_drift'"),
    ],
)
def test_bad_values_are_explained(condition: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as raised:
        recipe(**condition)
    assert text in str(raised.value)
