"""Tuning: the values stay, the fastest is kept, a second build needs no trials, wrong options are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

tvm = pytest.importorskip("tvm")

from common_graphs import Common  # noqa: E402

from s2d_deploy.errors import RecipeError, RuntimeUnavailable  # noqa: E402
from s2d_deploy.export import _tvm_tune, to_tvm  # noqa: E402, TID251
from s2d_deploy.registry import load_runtime, load_target  # noqa: E402

WIDTH, TOKENS = 96, 256


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A transpose between a product and a sum: nothing that has a kernel of its own."""
    rng = np.random.default_rng(0)
    g = Common("w4a4", x=(TOKENS, WIDTH))
    weight = g.weight("fc.weight", "INT4", rng.integers(-7, 8, (WIDTH, WIDTH)), rng.uniform(0.05, 0.1, WIDTH), axis=1)
    product = g.op("MatMul", "fc", [g.activation("x", "fc.in", "INT4", 0.3), weight], "W4A4", TOKENS * WIDTH**2)
    turned = g.add("Transpose", [product], "turned", perm=[0, 2, 1])
    table = g.constant("table", rng.standard_normal((WIDTH, TOKENS)).astype(np.float32))
    g.add("Relu", [g.add("Add", [turned, table], "sum")], "y")
    path = tmp_path / "model.onnx"
    onnx.save(g.model("y"), path)
    return path


def build(model: Path, folder: Path, tune: Any) -> Any:
    folder.mkdir()
    options = {"batch": 1, "tune": tune}
    return load_target("tvm").build(model, folder, precision="w4a4", options=options, progress=lambda _: None)


def test_values_stay_and_a_second_build_takes_no_trials(model: Path, tmp_path: Path) -> None:
    import json

    tune = {"seconds": 20, "trials": 3, "folder": str(tmp_path / "database")}
    artifacts = [build(model, tmp_path / name, t) for name, t in (("plain", None), ("one", tune), ("two", tune))]
    x = np.random.default_rng(1).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    outputs = []
    for artifact in artifacts:
        with load_runtime("tvm").open(artifact, threads=2) as session:
            outputs.append(session.run({"x": x})["y"])
    np.testing.assert_array_equal(outputs[1], outputs[0])
    np.testing.assert_array_equal(outputs[2], outputs[0])
    plain, first, second = (json.loads((a.folder / "model.json").read_text()).get("tuning") for a in artifacts)
    assert plain is None
    assert first
    assert {entry["trials"] for entry in first} <= {1, 2, 3}
    assert [entry["function"] for entry in first] == [entry["function"] for entry in second]
    assert all(entry["trials"] == 0 for entry in second)
    assert all(entry["plain_us"] > 0 and entry["best_us"] > 0 for entry in first)


def test_no_time_means_no_trials(model: Path, tmp_path: Path) -> None:
    artifact = build(model, tmp_path / "out", {"seconds": 1e-9, "folder": str(tmp_path / "database")})
    assert not [note for note in artifact.info["notes"] if "tuning" in note]


@pytest.mark.parametrize(
    ("tune", "words"),
    [
        ({"trials": 3}, "write tune: 60"),
        ({"seconds": 3, "rounds": 1}, "a mapping with seconds, trials and folder"),
        ("fast", "seconds to spend"),
        (-1, "tune.seconds"),
        ({"seconds": 1, "trials": 0}, "tune.trials"),
    ],
)
def test_wrong_options(tune: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        to_tvm._tuning(tune, "native")


def test_tuning_is_for_this_machine() -> None:
    with pytest.raises(RecipeError, match="tries loops on this machine"):
        to_tvm._tuning(5, "llvm -mcpu=x86-64-v3")


def test_a_version_that_crashes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tvm_tune.metadata, "version", lambda _: "0.1.15.post2")
    with pytest.raises(RuntimeUnavailable, match=r"crashes when it saves a schedule.*apache-tvm-ffi<0\.1\.15"):
        _tvm_tune.require_sound_ffi()
    monkeypatch.setattr(_tvm_tune.metadata, "version", lambda _: "0.1.14.post1")
    _tvm_tune.require_sound_ffi()
