"""The benchmark scripts: their arithmetic, their result files, their verdicts, and one small real run."""

from __future__ import annotations

import argparse
import ast
import ctypes
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from s2d_deploy import peak as peak_module
from s2d_deploy.errors import ArtifactError, RecipeError, RuntimeUnavailable
from s2d_deploy.grid import Grid, PerAxis
from s2d_deploy.latency import LatencyStats, measure
from s2d_deploy.plan import Op, Plan, Site
from s2d_deploy.session import Artifact

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "benchmarks"
SCRIPTS = sorted(file.name for file in FOLDER.glob("*.py") if not file.name.startswith("_"))
LOADING = (  # research scripts around torch itself: their help waits for it
    "cifar_vit.py",
    "minilm_one_shot.py",
    "minilm_s2d.py",
    "s2d_cost.py",
)
sys.path.append(str(FOLDER))  # scripts import each other by name, as they do when they are run
_common, _models, _peak, _peers = map(import_module, ("_common", "_models", "_peak", "_peers"))
demo_time, latency, ort_w4a4, startup, trt_engines, weight_sizes = map(
    import_module, ("demo_time", "latency", "ort_w4a4", "startup", "trt_engines", "weight_sizes")
)
at_most, Figure, Record = _common.at_most, _common.Figure, _common.Record

MS = 1_000_000


def python(script: str, *arguments: str, threads: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment | ({"OMP_NUM_THREADS": threads} if threads else {}),
    )


# ---- scripts and documents ----------------------------------------------------------------------------------


def test_there_is_a_script_for_every_figure() -> None:
    assert {"demo_time.py", "latency.py", "ort_w4a4.py", "startup.py", "weight_sizes.py"} <= set(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_how_to_call_it_and_the_harness_imports_nothing_heavy(script: str) -> None:
    code = (
        f"import runpy, sys; sys.argv = [{script!r}, '--help']; sys.path.insert(0, {str(FOLDER)!r})\n"
        f"try: runpy.run_path({str(FOLDER / script)!r}, run_name='__main__')\n"
        "except SystemExit as end: print('EXIT', end.code)\n"
        f"print('LOADED', *[n for n in {startup.HEAVY!r} if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"usage: python benchmarks/{script}" in done.stdout
    assert "--results" in done.stdout
    assert "EXIT 0" in done.stdout
    if script not in LOADING:
        assert done.stdout.splitlines()[-1].split() == ["LOADED"]


def test_commands_of_the_readme_are_accepted() -> None:
    text = (FOLDER / "README.md").read_text()
    commands = re.findall(r"`python benchmarks/(\w+\.py)([^`]*)`", text)
    assert {script for script, _ in commands} == set(SCRIPTS)
    for script, rest in commands:
        if script == "latency.py":
            chosen = latency.arguments_parser().parse_args(rest.split())
            _models.shape_of(chosen.model, chosen.width, chosen.depth, chosen.tokens)
            _peers.expand(chosen.peers)
            made = {f"{t}-{p}" for t in chosen.targets for p in chosen.precisions} | set(_peers.expand(chosen.peers))
            made |= {f"{name}-placed" for name in chosen.placed}
            assert {name for limit in chosen.limit for name in (limit.candidate, limit.baseline)} <= made, rest


def test_no_script_names_a_folder_of_one_machine() -> None:
    for file in FOLDER.glob("*.py"):
        if file.name.startswith("_fuzz"):
            continue  # names that lead out of a folder are what it tries
        literals = [n.value for n in ast.walk(ast.parse(file.read_text())) if isinstance(n, ast.Constant)]
        assert not [v for v in literals if isinstance(v, str) and re.search(r"(^|\s)(/(work|tmp|home|root)/|\.\./)", v)]


# ---- shared parts -------------------------------------------------------------------------------------------


def test_table_aligns_columns() -> None:
    text = _common.table(("name", "ms"), [("a", "1.00"), ("longer", "12.50")])
    assert text.splitlines() == ["name       ms", "-------------", "a        1.00", "longer  12.50"]


@pytest.mark.parametrize(
    ("value", "limit", "verdict"),
    [(0.1, 0.1, "pass"), (0.11, 0.1, "fail"), (None, 0.1, "undecided"), (None, None, "pass"), (9.0, None, "pass")],
)
def test_verdict_of_an_exact_figure(value: float | None, limit: float | None, verdict: str) -> None:
    assert at_most("x", value, limit).verdict == verdict


def test_the_worst_verdict_decides_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad, unknown = at_most("good", 1.0, 2.0), at_most("bad", 3.0, 2.0), at_most("unknown", None, 2.0, "why")
    record = Record("x", command=["python", "x.py"])
    assert _common.overall([good]) == "pass"
    assert _common.overall([good, unknown]) == "undecided"
    assert _common.overall([unknown, bad]) == "fail"
    assert [_common.finish(record, tmp_path, f, {}) for f in ([good], [good, unknown], [bad], [])] == [0, 1, 1, 0]
    assert "unknown: why" in capsys.readouterr().out


def test_result_file_holds_what_a_figure_needs(tmp_path: Path) -> None:
    record = Record("some-name", 2, command=["python", "benchmarks/x.py", "--flag", "a b"])
    figure = Figure("speed", 0.5, 1.0, "pass", "note")
    path = record.write(tmp_path / "new", [figure], {"samples": [1.5, 2.5]})
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-some-name\.json", path.name)
    document = json.loads(path.read_text())
    assert document["command"] == "python benchmarks/x.py --flag 'a b'"
    assert document["host"]["threads"] == 2
    assert document["host"]["cpu"]
    assert {"python", "numpy", "torch"} <= document["versions"].keys()
    assert None not in document["versions"].values()
    assert document["data"] == {"samples": [1.5, 2.5]}
    assert document["figures"] == [{"name": "speed", "value": 0.5, "limit": 1.0, "verdict": "pass", "note": "note"}]
    assert document["verdict"] == "pass"
    assert document["other_load_cores_before"] >= 0
    assert document["schema_version"] == _common.SCHEMA


def test_result_files_are_never_overwritten(tmp_path: Path) -> None:
    record = Record("twice", command=["x"])
    first, second, third = (record.write(tmp_path, [], {"n": n}) for n in range(3))
    assert second.name == first.name.replace("twice", "twice-2")
    assert third.name == first.name.replace("twice", "twice-3")
    assert [json.loads(p.read_text())["data"]["n"] for p in (first, second, third)] == [0, 1, 2]


# ---- peak ---------------------------------------------------------------------------------------------------


def test_rates_and_shares() -> None:
    assert _peak.gmacs(2_000_000_000, 10.0) == pytest.approx(200.0)  # 2 GMAC in 10 ms
    assert _peak.share_of_peak(2_000_000_000, 10.0, 400.0) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", peak_module.KINDS)
def test_register_loop_does_what_it_counts(kind: str, tmp_path: Path) -> None:
    """The INT8 loop multiplies ones, so its sum is the number of multiply-accumulates that it claims."""
    library = peak_module.compiled(tmp_path)
    if library is None or not peak_module.text_of(library, f"{kind}_name"):
        pytest.skip(f"no C compiler, or no {kind} vector instruction that the loop knows")
    macs, loop = peak_module.number_of(library, f"{kind}_macs"), getattr(library, f"{kind}_peak")
    loop.argtypes, loop.restype = [ctypes.c_int64], ctypes.c_int64
    assert macs % 16 == 0
    if kind == "int8":
        assert loop(1000) == 1000 * macs
        assert loop(0) == 0


@pytest.mark.parametrize("kind", peak_module.KINDS)
def test_peak_without_a_compiler_is_a_lower_bound(kind: Any) -> None:
    pytest.importorskip("onnxruntime")
    peak = _peak._measured(kind, 1, None)
    assert peak.lower_bound
    assert peak.gmacs == max(peak.repeats) > 0
    assert "at least" in str(peak)
    json.dumps(peak.to_dict())


# ---- latency ------------------------------------------------------------------------------------------------


def stats(**milliseconds: list[float]) -> dict[str, LatencyStats]:
    run = object()
    return {
        n.replace("_", "-"): LatencyStats(n, tuple(int(x * MS) for x in v), run=run) for n, v in milliseconds.items()
    }


def limit(value: float) -> Any:
    return latency.Limit.parse(f"ort-w4a4/ort-fp32={value}")


def test_limit_is_parsed() -> None:
    assert latency.Limit.parse("tvm-w4a4/openvino-int8=0.70") == latency.Limit("tvm-w4a4", "openvino-int8", 0.7)
    with pytest.raises(argparse.ArgumentTypeError, match="expected CANDIDATE/BASELINE=RATIO"):
        latency.Limit.parse("tvm-w4a4<0.7")


def test_limit_needs_the_whole_interval() -> None:
    timed = stats(ort_w4a4=[5.0, 5.1] * 20, ort_fp32=[10.0, 10.1] * 20)
    assert latency.judge(limit(1.0), timed, {}).verdict == "pass"
    assert latency.judge(limit(0.4), timed, {}).verdict == "fail"
    near = stats(ort_w4a4=[10.0, 9.9, 10.1, 10.0] * 10, ort_fp32=[10.0, 10.1, 9.9, 10.0] * 10)
    figure = latency.judge(limit(1.0), near, {})
    assert figure.value == pytest.approx(1.0)
    assert figure.verdict in ("pass", "undecided")  # an interval that ends exactly at the limit holds it
    assert latency.judge(limit(0.9999), near, {}).verdict != "pass"


def test_limit_is_undecided_where_the_evidence_is_no_good() -> None:
    drifting = stats(ort_w4a4=[5.0] * 20 + [6.0] * 20, ort_fp32=[10.0] * 40)
    figure = latency.judge(limit(1.0), drifting, {})
    assert figure.verdict == "undecided"
    assert "ort-w4a4 is not stable" in figure.note
    assert "the median drifted by +20.0%" in figure.note
    steady = stats(ort_w4a4=[5.0] * 40, ort_fp32=[10.0] * 40)
    wrong = latency.judge(limit(1.0), steady, {"ort-fp32": "3 dB from torch"})
    assert (wrong.verdict, wrong.value) == ("undecided", pytest.approx(0.5))
    assert "ort-fp32 is wrong: 3 dB from torch" in wrong.note
    missing = latency.judge(latency.Limit("ort-w4a4", "openvino-int8", 1.0), steady, {})
    assert (missing.verdict, missing.value, missing.note) == ("undecided", None, "not measured: openvino-int8")


def test_latency_table_shows_the_share_of_the_right_peak() -> None:
    timed = stats(ort_w4a4=[4.0] * 40, ort_fp32=[10.0] * 40)
    candidates = [
        latency.Candidate("ort-w4a4", lambda: None, "int8", {"snr_db": 12.3}),
        latency.Candidate("ort-fp32", lambda: None, "fp32"),
    ]
    rows = latency.latency_rows(candidates, timed, 1_000_000_000, {"int8": 500.0, "fp32": 200.0})
    assert rows[0] == ("ort-w4a4", "4.00", "4.00", "4.00", "250", "50% of int8", "12", "stable")
    assert rows[1][5] == "50% of fp32"
    assert len(rows[0]) == len(latency.LATENCY_HEADER)


def test_pause_comes_before_every_call_and_is_not_timed() -> None:
    now, events = 0, []

    def spend(name: str, ns: int) -> None:
        nonlocal now
        now += ns
        events.append(name)

    found = measure(
        {"a": lambda: spend("a", 3 * MS), "b": lambda: spend("b", 5 * MS)},
        warmup=0,
        min_samples=4,
        min_seconds=0,
        max_seconds=10,
        clock=lambda: now,
        pause=lambda: spend("pause", 100 * MS),
    )
    assert set(found["a"].samples_ns) == {3 * MS}
    assert set(found["b"].samples_ns) == {5 * MS}
    assert events[::2] == ["pause"] * 8


# ---- models and peers ---------------------------------------------------------------------------------------


def test_named_architectures() -> None:
    assert [(s.name, s.width, s.tokens) for s in _models.SHAPES.values()] == [
        ("vit-tiny", 192, 197),
        ("vit-small", 384, 197),
        ("vit-base", 768, 197),
        ("minilm-l6", 384, 128),
    ]
    assert _models.SHAPES["vit-base"].image_size == 224
    assert all(s.width // s.heads in (32, 64) for s in _models.SHAPES.values())


def test_other_dimensions() -> None:
    shape = _models.shape_of("vit-small", width=512, depth=3, tokens=17)
    assert (shape.name, shape.heads, shape.image_size) == ("vit-w512-d3-t17", 8, 64)
    assert _models.shape_of("minilm-l6", tokens=64).name == "bert-w384-d6-t64"
    with pytest.raises(RecipeError, match=r"--tokens 100\. Expected: a square number"):
        _models.shape_of("vit-tiny", tokens=100)
    with pytest.raises(RecipeError, match=r"--width 100\. Expected: a multiple of 64"):
        _models.shape_of("vit-tiny", width=100)
    with pytest.raises(RecipeError, match=r"--model resnet\. Expected: one of vit-tiny"):
        _models.shape_of("resnet")


@pytest.mark.parametrize("name", ["vit-tiny", "minilm-l6"])
def test_multiply_accumulates_are_those_of_the_formula(name: str, tmp_path: Path) -> None:
    tokens, width, depth = 17, 64, 2
    bench = _models.Bench(_models.shape_of(name, width=width, depth=depth, tokens=tokens), tmp_path)
    layer = tokens * 12 * width**2 + 2 * tokens**2 * width  # q, k, v, o, two of the MLP; scores and context
    ends = (tokens - 1) * 3 * 16**2 * width + 1000 * width if name == "vit-tiny" else 0
    assert bench.macs == depth * layer + ends
    assert {k: v.tolist() for k, v in bench.batch(1).items()} == {k: v.tolist() for k, v in bench.batch(1).items()}


def test_sources_decide_whether_an_artifact_is_kept() -> None:
    assert _models._digest(export=("to_onnx",)) == _models._digest(export=("to_onnx",))
    assert len({_models._digest(export=("to_onnx",)), _models._digest(export=()), _models._digest(runtimes=())}) == 3


def test_peers_by_name() -> None:
    assert _peers.expand(("openvino", "ort-static", "openvino-int8")) == (
        "openvino-fp32",
        "openvino-int8",
        "ort-static",
    )
    with pytest.raises(RecipeError, match=r"--peers onnx\. Expected: any of ort-static"):
        _peers.expand(("onnx",))


def test_a_peer_that_is_not_installed_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_peers, "find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailable, match=r"openvino and nncf not installed.*'s2d-deploy\[bench\]'"):
        _peers.make_peer("openvino-int8", None, 1, 1)
    with pytest.raises(RuntimeUnavailable, match=r"'s2d-deploy\[ort\]'"):
        _peers.make_peer("ort-static", None, 1, 1)


def test_a_candidate_that_breaks_is_a_failed_figure_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(name: str, *_: object) -> Any:
        if name == "ort-static":
            raise ValueError("cannot\n reshape")
        return _peers.Peer(lambda: None, "fp32", "how")

    monkeypatch.setattr(_peers, "make_peer", make)
    chosen = latency.arguments_parser().parse_args(["--targets", "", "--peers", "ort-static,torch-eager"])
    with latency.ExitStack() as stack:
        found, unavailable, broken = latency.prepare(None, chosen, stack)
    assert ([c.name for c in found], unavailable) == (["torch-eager"], {})
    assert broken == [Figure("ort-static can be built and run", None, None, "fail", "ValueError: cannot reshape")]
    assert "ort-static: BROKEN: ValueError: cannot reshape" in capsys.readouterr().out


def test_the_ort_figure_is_for_wide_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert ort_w4a4.main(["--model", "vit-tiny"]) == 2
    assert "Expected: a ViT of width 384 or more" in capsys.readouterr().err
    chosen = latency.arguments_parser().parse_args([*ort_w4a4.PRESET])
    assert chosen.limit == [latency.Limit("ort-w4a4", "ort-fp32", 1.0)]


# ---- sizes --------------------------------------------------------------------------------------------------


def plan_of_one_layer(bits: int) -> Plan:
    import torch

    plan = Plan("w4a4", {"fc": Op("fc", "linear", 64, 32, 64 * 32), "free": Op("free", "linear", 8, 8, 64)})
    grid = Grid(bits, granularity=PerAxis(0))
    plan.add(Site("fc.weight", "fc", "weight", grid, torch.ones(32), torch.zeros(32, dtype=torch.int32), "test"))
    return plan


def test_bytes_of_quantized_weights(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    plan = plan_of_one_layer(4)
    assert weight_sizes.float_bytes(plan) == 4 * 64 * 32
    tensors = {
        "fc::packed": np.zeros((32, 32), np.uint8),
        "fc::scale": np.zeros(32, np.float32),
        "free::packed": np.zeros((8, 8), np.float32),
    }
    save_file(tensors, tmp_path / "p")
    artifact = Artifact(tmp_path, "tvm", "w4a4", {"parameters": "p"})
    size = weight_sizes.size_of("m", artifact, plan)
    assert size.stored == 32 * 32 + 4 * 32
    assert size.ratio == pytest.approx((1024 + 128) / 8192)
    counted = Artifact(tmp_path, "ort", "w4a4", {"parameters": "p"}, {"weight_size_bytes": 2000})
    assert weight_sizes.stored_bytes(counted, plan) == 2000
    lost = Artifact(tmp_path, "ort", "w4a4", {"parameters": "p"}, {"weight_size_bytes": 1000})
    with pytest.raises(ArtifactError, match=r"quantized weights are missing\. Expected: 1024 bytes\. Found: 1000"):
        weight_sizes.stored_bytes(lost, plan)


def test_only_limited_targets_can_fail() -> None:
    sizes = [
        weight_sizes.Size("m", "ort", "w4a4", 30, 100),
        weight_sizes.Size("m", "tvm", "w4a4", 15, 100),
        weight_sizes.Size("m", "tensorrt", "w4a4", note="not installed"),
        weight_sizes.Size("m", "tvm", "w8a8", 30, 100),
    ]
    assert [(f.verdict, f.value) for f in weight_sizes.figures(sizes)] == [
        ("pass", 0.3),
        ("pass", 0.15),
        ("undecided", None),
    ]
    assert weight_sizes.figures([weight_sizes.Size("m", "tvm", "w4a4", 16, 100)])[0].verdict == "fail"


def test_engines_that_do_not_execute_what_they_declare_fail() -> None:
    def engine(precision: str, mismatches: int | None, ratio: float | None = None, form: str = "default") -> object:
        gpus = ("8.0", "8.6", "12.0")
        sizes = (None, None) if mismatches is None else (10, 40)
        return trt_engines.Engine("m", precision, form, gpus, *sizes, ratio, 1.0, mismatches=mismatches)

    found = [engine("w4a4", 0, 0.14), engine("nvfp4", 2, 0.19), engine("w8a8", 0, 0.5, "fp16"), engine("fp32", None)]
    assert [(f.name, f.verdict) for f in trt_engines.figures(found)] == [
        ("m w4a4 (default): ops not as declared", "pass"),
        ("m w4a4 (default): weights over FP32", "pass"),
        ("m nvfp4 (default): ops not as declared", "fail"),
        ("m nvfp4 (default): weights over FP32", "fail"),
        ("m w8a8 (fp16): ops not as declared", "pass"),
    ]
    assert trt_engines.row(found[0])[:4] == ("m w4a4 (default) all", "10", "40", "0.1400")
    assert "refused" in trt_engines.row(found[-1])


# ---- the demo's report --------------------------------------------------------------------------------------


def row(target: str, precision: str, measured: float, simulated: float, different: int = 0) -> dict[str, Any]:
    return {
        "target": target,
        "precision": precision,
        "status": "measured",
        "metric": {"n": 597, "float": 96.0, "simulated": simulated, "measured": measured},
        "parity": {"accumulators_checked": 100, "accumulators_different": different},
    }


def test_figures_of_a_report() -> None:
    rows = [row(t, p, 96.0, 96.0) for t in ("ort", "tvm") for p in ("w8a8", "w4a4")]
    good = demo_time.figures({"results": rows})
    assert {f.verdict for f in good} == {"pass"}
    assert len(good) == 2 + 4 + 4  # W8A8 from float, each from the simulation, accumulators
    rows[0] = row("ort", "w8a8", 95.4, 95.1, different=1)
    failed = {f.name for f in demo_time.figures({"results": rows}) if f.verdict == "fail"}
    assert failed == {
        "ort w8a8: points from float",
        "ort w8a8: points from the simulation",
        "ort w8a8: accumulators different, teacher-forced",
    }
    del rows[3]
    missing = [f for f in demo_time.figures({"results": rows}) if f.verdict == "undecided"]
    assert [(f.name, f.note) for f in missing] == [("tvm w4a4: accumulators different, teacher-forced", "not measured")]


def test_seconds_by_stage(tmp_path: Path) -> None:
    for stage, seconds in {"train": 3.0, "export/tvm/w4a4": 5.0, "export/tvm/w8a8": 4.0, "onnx/w4a4": 1.0}.items():
        (tmp_path / stage).mkdir(parents=True)
        (tmp_path / stage / "manifest.json").write_text(json.dumps({"stage": stage, "seconds": seconds}))
    stages = demo_time.stage_seconds(tmp_path)
    assert next(iter(stages.items())) == ("export/tvm/w4a4", 5.0)
    assert demo_time.by_verb(stages) == {"export/tvm": 9.0, "train": 3.0, "onnx": 1.0}


# ---- real runs ----------------------------------------------------------------------------------------------


def test_a_small_real_comparison(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = python(
        "latency.py",
        *("--model", "vit-tiny", "--width", "64", "--depth", "1", "--tokens", "5", "--targets", "ort"),
        *("--precisions", "fp32,w4a4", "--peers", "ort-dynamic,torch-eager", "--skip", "ort-w4a4"),
        *("--runs", "4", "--warmup", "1", "--threads", "1", "--pause-ms", "0"),
        *("--limit", "ort-fp32/torch-eager=1000", "--work", str(tmp_path / "work"), "--results", str(tmp_path)),
    )
    assert done.returncode == 1, done.stdout + done.stderr  # four samples are too few for a verdict
    assert "fewer than 30" in done.stdout
    assert "random weights and inputs" in done.stdout
    assert re.search(r"^peak, int8, 1 thread\(s\)", done.stdout, re.MULTILINE)
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text())["data"]
    assert set(data["candidates"]) == {"ort-fp32", "ort-dynamic", "torch-eager"}
    for candidate in data["candidates"].values():
        assert len(candidate["latency_ms"]["samples"]) == 4
        assert candidate["latency_ms"]["threads"] == 1
    assert data["candidates"]["ort-fp32"]["snr_db"] > 60
    assert data["wrong"] == {}
    assert data["ratios"]["ort-fp32"].keys() == {"ort-dynamic", "torch-eager"}


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = python("latency.py", "--model", "resnet", "--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --model resnet. Expected: one of vit-tiny")
    assert list(tmp_path.iterdir()) == []


def test_startup_is_measured_in_fresh_processes(tmp_path: Path) -> None:
    done = python("startup.py", "--runs", "2", "--results", str(tmp_path))
    (path,) = tmp_path.glob("*-startup.json")
    document = json.loads(path.read_text())
    assert len(document["data"]["help_seconds"]) == 2
    assert document["data"]["loaded"] == []
    assert done.returncode == (0 if document["verdict"] == "pass" else 1), done.stderr
