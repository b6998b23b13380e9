"""benchmarks/ptq_recipes.py on a tiny model: what it writes and keeps, what it says of a recipe that is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))
ptq_recipes, plot = import_module("ptq_recipes"), import_module("_ptq_plot")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTForImageClassification

    root = tmp_path_factory.mktemp("ptq")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=3, num_labels=2, **sizes)
    ViTForImageClassification(config).save_pretrained(root / "model")
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor"}
    (root / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("a", "b"):
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def run(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "ptq_recipes.py"), "--model", str(root / "model")]
    command += ["--data", str(root / "images"), "--task", "image-classification", "--results", str(root / "results")]
    command += ["--work", str(root / "work"), "--precisions", "w8a8", "w4a16", "--name", "tiny", *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_whole_run_and_its_second_start(prepared: Path):
    first = run(prepared, "--recipes", "rtn-mse", "--conditioned", str(prepared / "model"))
    assert first.returncode in (0, 1), first.stderr  # 1: a figure that a random model need not reach
    document = json.loads(next((prepared / "results").glob("*-ptq-tiny.json")).read_text())
    row = document["data"]["results"]["rtn-mse"]
    assert set(row) == {"original", "s2d"}
    assert set(row["original"]["precisions"]["w8a8"]) == {"seconds", "value", "agreement"}
    assert 0 <= row["original"]["precisions"]["w8a8"]["value"] <= 100
    # The tiny widths are no multiple of 32: a refusal is a result, with its reason.
    assert "not divisible by the block size" in row["original"]["precisions"]["w4a16"]["refused"]
    assert row["original"]["memory_bytes"] >= row["original"]["memory_before_bytes"] > 0
    assert str(prepared) not in json.dumps(document["command"])
    assert next((prepared / "results").glob("*-ptq-tiny.svg")).read_text().startswith("<svg")
    kept = {p: p.stat().st_mtime_ns for p in (prepared / "work").iterdir()}
    again = run(prepared, "--recipes", "rtn-mse", "--conditioned", str(prepared / "model"))
    assert again.returncode == first.returncode
    assert {p: p.stat().st_mtime_ns for p in (prepared / "work").iterdir()} == kept


def result(**values: float) -> dict[str, object]:
    return {"float": {"value": 90.0}, "precisions": {p: {"value": v, "seconds": 1.0} for p, v in values.items()}}


def test_the_best_recipe_is_judged():
    parsed = ptq_recipes.arguments_parser().parse_args(
        ["--model", "m", "--data", "d", "--task", "image-classification"]
    )
    found = {
        "one": {"original": result(w8a8=89.95, w4a4=80.0), "s2d": result(w8a8=89.0, w4a4=89.5)},
        "two": {"original": result(w8a8=85.0, w4a4=70.0)},
    }
    four, eight = ptq_recipes.figures_of(parsed, found)
    assert four.value == pytest.approx(0.5)
    assert four.verdict == "pass"
    assert four.note == "one on s2d"
    assert eight.value == pytest.approx(0.05)
    assert ptq_recipes.figures_of(parsed, {})[0].verdict == "undecided"


def test_the_plot_leaves_refused_recipes_out():
    found = {
        "fine": {"original": result(w4a4=80.0), "s2d": result(w4a4=82.0)},
        "refused": {"original": {"precisions": {"w4a4": {"refused": "why"}}}},
    }
    drawn = plot.draw(found, ["w4a4"], "embedding")
    assert "fine" in drawn
    assert "refused" not in drawn
    assert "80.0 / 82.0" in drawn


def test_every_recipe_is_one_that_the_passes_accept():
    from s2d_deploy.ptq.passes import parse_steps
    from s2d_deploy.quantize import QuantizeConfig

    for passes, keys in ptq_recipes.RECIPES.values():
        parse_steps(passes)
        QuantizeConfig(**keys)
