"""Stages and rows of one target: what is built, what a missing runtime or a fault leaves in the report."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, Finished

from s2d_deploy.console import Display
from s2d_deploy.deployment import Deployment
from s2d_deploy.errors import DeviceUnavailable, RuntimeUnavailable, StageError, UnavailableError, UnsupportedError
from s2d_deploy.judge import gates
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.recipe import parse_recipe
from s2d_deploy.registry import load_runtime, load_target
from s2d_deploy.run import run
from s2d_deploy.store import RunFolder, read_json


class Runtime:
    """The reference runtime, with a fault planted in one of its methods."""

    def __init__(self, **faults: Any) -> None:
        self._own, self._faults = load_runtime("reference"), faults

    def __getattr__(self, name: str) -> Any:
        return self._faults.get(name) or getattr(self._own, name)


class Target(Runtime):
    """The reference target, likewise."""

    def __init__(self, **faults: Any) -> None:
        self._own, self._faults = load_target("reference"), faults


def raising(error: Exception) -> Any:
    def method(*_: Any, **__: Any) -> Any:
        raise error

    return method


@pytest.fixture
def deployment(finished: Finished, tmp_path: Path):
    """Of the reference, in a copy of the finished run; ``deployment(required)`` makes it."""
    folder = finished.copy(tmp_path / "run")
    with RunFolder(folder) as store:

        def make(required: bool = False) -> Deployment:
            recipe = parse_recipe(TINY | {"targets": [{"name": "reference", "required": required}]})
            return Deployment(Pipeline(recipe, store, Display(quiet=True)), recipe.targets[0])

        yield make


def test_rows_of_a_measured_target(deployment):
    made = deployment()
    rows = {row["precision"]: row for row in made.rows()}
    assert list(rows) == ["fp32", "w8a8", "w4a16"]
    assert made.errors == []
    for row in rows.values():
        assert row["status"] == "measured"
        assert row["metric"]["measured"] == row["metric"]["simulated"]
        assert len(row["metric"]["per_sample_measured"]) == row["metric"]["n"] == 24
        assert row["float_size_bytes"] == rows["fp32"]["size_bytes"]
        assert "latency_ms" not in row
        assert "slow on purpose" in row["reason"]
    assert rows["w8a8"]["parity"]["accumulators_different"] == 0
    assert rows["w8a8"]["parity"]["accumulators_checked"] > 0
    assert rows["w4a16"]["parity"]["accumulators_checked"] == 0
    # 12 Linears of 32 x 32 and 32 x 64, the projection, and the classifier: FP32 bytes of what is quantized.
    linears = 2 * (4 * 32 * 32 + 2 * 32 * 64) + 32 * 10
    assert rows["w4a16"]["weight_float_size_bytes"] == 4 * linears
    assert rows["w8a8"]["weight_float_size_bytes"] == 4 * (linears + 32 * 16)


@pytest.mark.parametrize("required", [False, True])
def test_a_missing_device_leaves_what_was_built(deployment, required: bool):
    made = deployment(required)
    made.runtime = Runtime(available=lambda: "no GPU here")
    rows = made.rows()
    assert {(row["status"], row["reason"]) for row in rows} == {("built", "no GPU here")}
    assert all(row["size_bytes"] > 0 and row["metric"]["measured"] is None for row in rows)
    assert [type(e) for e in made.errors] == [UnavailableError] * (3 if required else 0)
    assert all("target 'reference' is required by the recipe: no GPU here" in str(e) for e in made.errors)


@pytest.mark.parametrize("required", [False, True])
@pytest.mark.parametrize("error", [RuntimeUnavailable("not installed"), UnsupportedError("no INT4 here")])
def test_a_target_that_cannot_be_built(deployment, required: bool, error: Exception):
    made = deployment(required)
    made.target = Target(build=raising(error))
    made.runtime = Runtime(version=lambda: "other")  # so that nothing that was built before is reused
    rows = made.rows()
    assert {(row["status"], row["reason"]) for row in rows} == {("unavailable", str(error))}
    assert all("size_bytes" not in row or row["size_bytes"] is None for row in rows)
    assert made.errors == ([error] * 3 if required else [])


def test_a_fault_at_one_precision_leaves_the_others(deployment):
    made = deployment()
    real = load_runtime("reference").open

    def fails_at_w8a8(artifact: Any, **options: Any) -> Any:
        if artifact.precision == "w8a8":
            raise KeyError("x")
        return real(artifact, **options)

    made.runtime = Runtime(version=lambda: "other", open=fails_at_w8a8)
    rows = {row["precision"]: row for row in made.rows()}
    assert {p: row["status"] for p, row in rows.items()} == {
        "fp32": "measured",
        "w8a8": "unavailable",
        "w4a16": "measured",
    }
    assert rows["w8a8"]["reason"] == "KeyError: 'x'"
    assert [type(e) for e in made.errors] == [KeyError]


def test_a_device_that_goes_away_between_build_and_run(deployment):
    made = deployment()
    made.runtime = Runtime(version=lambda: "other", open=raising(DeviceUnavailable("the driver is gone")))
    assert {(row["status"], row["reason"]) for row in made.rows()} == {("built", "the driver is gone")}
    assert made.errors == []


def test_a_machine_that_refuses_stops_everything(deployment):
    made = deployment()
    made.runtime = Runtime(version=lambda: "other", open=raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(StageError, match="the disk is full"):
        made.rows()


def test_a_fault_while_timing_keeps_what_was_verified(deployment, monkeypatch):
    monkeypatch.setattr("s2d_deploy.deployment.UNTIMED", ())
    monkeypatch.setattr("s2d_deploy.bench.measure", raising(RuntimeError("clock")))
    made = deployment()
    rows = made.rows()
    assert {row["status"] for row in rows} == {"measured"}
    assert {row["reason"] for row in rows} == {"latency could not be measured: RuntimeError: clock"}
    assert all("latency_ms" not in row for row in rows)
    assert len(made.errors) == 1


def test_latency_with_its_ratio(deployment, monkeypatch):
    monkeypatch.setattr("s2d_deploy.deployment.UNTIMED", ())
    made = deployment()
    rows = {row["precision"]: row for row in made.rows()}
    for row in rows.values():
        latency = row["latency_ms"]
        assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"] <= latency["max"]
        assert latency["threads"] == 1
        assert latency["batch"] == 1
    assert "speedup_over_float" not in rows["fp32"]
    low, high = rows["w8a8"]["speedup_ci"]
    assert low <= rows["w8a8"]["speedup_over_float"] <= high


# --- a whole run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [None, RuntimeUnavailable("gone"), ZeroDivisionError("bug")])
def test_a_run_reports_whatever_happened(finished: Finished, tmp_path: Path, monkeypatch, fault: Exception | None):
    from s2d_deploy import deployment

    folder = finished.copy(tmp_path / "run")
    if fault is not None:
        broken = Runtime(version=lambda: "other", open=raising(fault))
        monkeypatch.setattr(deployment, "load_runtime", lambda _: broken)
    recipe = parse_recipe(TINY | {"targets": [{"name": "reference", "required": True}]})
    with RunFolder(folder) as store:
        outcome = run(Pipeline(recipe, store, Display(quiet=True)), command=["s2d-deploy", "run", "a b"])
    assert outcome.exit_code == {type(None): 0, RuntimeUnavailable: 3, ZeroDivisionError: 70}[type(fault)]
    assert outcome.errors == (() if fault is None else (fault,) * 3)
    assert outcome.report["verdict"] == ("pass" if fault is None else "undecided")
    assert outcome.report["command"] == "s2d-deploy run 'a b'"
    assert [f.name for f in outcome.files] == ["report.json", "report.md", "report.html", "junit.xml"]
    written = read_json(folder / "report.json")
    assert written["results"] == outcome.report["results"]
    status = "measured" if fault is None else "built" if isinstance(fault, UnavailableError) else "unavailable"
    assert {row["status"] for row in written["results"]} == {status}
    assert written["conditioning"]["seconds"] > 0
    assert len(written["conditioning"]["layers"]) == 14
    assert {row["site"] for row in written["ranges"]} >= {"classifier.input"}


def row(target: str, precision: str, **more: Any) -> dict[str, Any]:
    return {"target": target, "precision": precision, "status": "measured", "float_size_bytes": 100} | more


def limits(targets: list[Any], **given: Any) -> Any:
    return parse_recipe(TINY | {"targets": targets, "gates": {"accumulators_different": None} | given})


def test_limits_by_precision():
    recipe = limits(["ort"], size_ratio={"w8a8": 0.5})
    rows = [row("ort", "fp32", size_bytes=100), row("ort", "w8a8", size_bytes=60), row("ort", "w4a16", size_bytes=90)]
    found = {(v.name, v.precision): v.verdict for v in gates(recipe, rows) if v.name != "measured"}
    assert found == {("size_ratio", "w8a8"): "fail"}


def test_a_limit_that_only_one_part_can_hold_is_judged_once():
    recipe = limits(["reference", "ort"], size_ratio=0.5)
    whole = [row("reference", p, size_bytes=s) for p, s in (("fp32", 100), ("w8a8", 40), ("w4a16", 30))]
    missing = [row("ort", p, status="unavailable", size_bytes=None) for p in ("fp32", "w8a8", "w4a16")]
    verdicts = gates(recipe, whole + missing)
    assert {(v.target, v.verdict) for v in verdicts} == {("reference", "pass")}
    nobody = gates(recipe, missing)
    assert [(v.name, v.target, v.verdict) for v in nobody] == [("size_ratio", "*", "undecided")]


def test_a_required_target_must_be_measured():
    recipe = limits([{"name": "ort", "required": True}, "reference"])
    rows = [row("reference", p) for p in ("fp32", "w8a8", "w4a16")]
    rows += [row("ort", p, status="unavailable", reason="not installed") for p in ("fp32", "w8a8", "w4a16")]
    found = {(v.target, v.precision): v for v in gates(recipe, rows)}
    assert found["ort", "w8a8"].verdict == "undecided"
    assert "not installed" in str(found["ort", "w8a8"].evidence)
    assert found["reference", "w8a8"].verdict == "pass"


def test_what_was_measured_is_held_to_every_limit_beside_a_required_target():
    recipe = limits([{"name": "ort", "required": True}, "tvm"], size_ratio=0.5)
    rows = [row("ort", p, size_bytes=40) for p in ("fp32", "w8a8", "w4a16")]
    rows += [row("tvm", p) for p in ("fp32", "w8a8", "w4a16")]
    found = {(v.name, v.target, v.precision): v.verdict for v in gates(recipe, rows)}
    assert found["size_ratio", "ort", "w8a8"] == "pass"
    assert found["size_ratio", "tvm", "w8a8"] == "undecided"


def test_the_reference_has_no_latency_to_judge():
    recipe = limits(["reference"], latency_ratio=0.5)
    verdicts = gates(recipe, [row("reference", p) for p in ("fp32", "w8a8", "w4a16")])
    assert "latency_ratio" not in {v.name for v in verdicts if v.target == "reference"}
