"""Roofline arithmetic, conditions, throughput and footprint: the figures against what they must be."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from s2d_deploy.bench import measure_throughput, roofline_of, roofline_share
from s2d_deploy.conditions import conditions
from s2d_deploy.console import Display, Step
from s2d_deploy.footprint import measure_footprint
from s2d_deploy.peak import Peak, Roofline, measure_roofline
from s2d_deploy.recipe import BenchSection
from s2d_deploy.session import Artifact


def roofline(int8: float = 1000.0, fp32: float = 250.0, memory: float | None = 20.0) -> Roofline:
    peaks = {"int8": Peak("int8", 2, int8, "x", False, ()), "fp32": Peak("fp32", 2, fp32, "y", False, ())}
    return Roofline(2, peaks, memory)


def test_floor_adds_the_times_of_each_precision_or_is_the_memory() -> None:
    # 2 GMAC at 1000 GMAC/s and 0.5 GMAC at 250: 2 ms each.
    assert roofline().floor_ms({"int8": 2e9, "float32": 0.5e9}, 10) == (pytest.approx(4.0), "compute")
    assert roofline().floor_ms({"int4": 2e9}, 10) == (pytest.approx(2.0), "compute")
    assert roofline().floor_ms({"int8": 1e6}, 200_000_000) == (pytest.approx(10.0), "memory")
    assert roofline(memory=None).floor_ms({"int8": 1e6}, 200_000_000) == (pytest.approx(1e-3), "compute")


def test_a_missing_ceiling_gives_no_floor() -> None:
    bare = Roofline(2, {}, 20.0)
    assert bare.floor_ms({"int8": 1e9}, 1) is None
    assert bare.floor_ms({}, 20_000_000) == (pytest.approx(1.0), "memory")


def test_share_of_a_result() -> None:
    ops = [{"precision": "int8", "macs": 1_000_000}, {"precision": "int8", "macs": 1_000_000}]
    found = roofline_share(roofline().to_dict(), ops, 1000, 8, 0.032)
    assert found is not None
    assert found["share"] == pytest.approx(0.5)
    assert found["bound"] == "compute"
    assert roofline_of(json.loads(json.dumps(roofline().to_dict()))).to_dict() == roofline().to_dict()


def test_this_machine_has_ceilings_where_it_has_a_compiler() -> None:
    found = measure_roofline(1, repeats=2)
    if not found.peaks:
        pytest.skip("no C compiler, or no instruction that the loop knows")
    assert found.gigabytes_per_second is not None
    assert 0.1 < found.gigabytes_per_second < 10_000
    assert found.peaks["fp32"].gmacs > 0.1


def test_conditions_are_facts_or_nothing() -> None:
    found = conditions(0.01)
    assert set(found) == {"clock_mhz", "governor", "load_average", "other_cores", "steal_percent"}
    assert found["other_cores"] >= 0
    json.dumps(found)


class Sleeper:
    """A session that counts the samples it was given."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def run(self, feeds: Any) -> dict[str, Any]:
        self.batches.append(len(feeds["x"]))
        return {"y": feeds["x"]}


def test_throughput_fills_batches_and_counts_samples() -> None:
    session = Sleeper()
    section = BenchSection(throughput=(1, 5), warmup=0, min_samples=9, min_seconds=0, max_seconds=1)
    with Display(quiet=True).step("bench") as step:
        assert isinstance(step, Step)
        feeds = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
        found = measure_throughput({"w4a4": session}, feeds, section, step)  # type: ignore[dict-item]
    assert [entry["batch"] for entry in found["w4a4"]] == [1, 5]
    assert set(session.batches) == {1, 5}
    for entry in found["w4a4"]:
        assert entry["samples_per_second"] == pytest.approx(1e3 * entry["batch"] / entry["p50_ms"])
        assert len(entry["samples_ms"]) == 3


def test_footprint_of_a_real_artifact(tmp_path: Path) -> None:
    """A model with 16 MB of weights: its process needs them and says how long it took."""
    pytest.importorskip("onnxruntime")
    import onnx

    weight = onnx.numpy_helper.from_array(np.ones((2048, 2048), np.float32), "w")
    shape = [1, 2048]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")],
        "g",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape)],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    entry = model.metadata_props.add()
    entry.key, entry.value = "s2d.precision", "fp32"
    from s2d_deploy.registry import load_target

    source = tmp_path / "model.onnx"
    onnx.save(model, source)
    target = load_target("ort")
    (tmp_path / "out").mkdir()
    dialect = target.dialect(source, tmp_path / "out", precision="fp32")
    artifact = target.build(dialect, tmp_path / "out", precision="fp32", options={}, progress=lambda _: None)
    found = measure_footprint(artifact, {"x": np.ones(shape, np.float32)}, threads=1)
    assert found is not None
    assert found.cold_start_ms == found.open_ms + found.first_run_ms > 0
    if found.memory_bytes is not None:
        assert 16e6 < found.memory_bytes < 500e6
        assert found.process_bytes is not None
        assert found.process_bytes > found.memory_bytes


def test_a_child_that_breaks_is_no_figure(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    artifact = Artifact(tmp_path, "ort", "w4a4", {"model": "missing.onnx"}, {})
    with caplog.at_level(logging.WARNING):
        assert measure_footprint(artifact, {"x": np.ones(1)}, threads=1) is None
    assert "cold start and memory of ort w4a4 are not known" in caplog.text
