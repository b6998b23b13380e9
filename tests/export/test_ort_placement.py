"""Placement search: every form means what the plan says, the rule decides as documented, what was measured ships.

Decisions are tested on scripted latencies; what runs, runs on ONNX Runtime. No test depends on how fast this machine
is: a margin of 0.999 asks for a thousandfold speedup, which nothing has.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from command_line import TINY
from common_graphs import Common, linear, quantized

from s2d_deploy.console import Display
from s2d_deploy.deployment import Deployment
from s2d_deploy.errors import ArtifactError, RecipeError, UnsupportedError
from s2d_deploy.gate import GateLimits, evaluate
from s2d_deploy.latency import LatencyStats
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.placement import placement_row, slower_than_float
from s2d_deploy.recipe import parse_recipe
from s2d_deploy.registry import load_runtime, load_target
from s2d_deploy.store import RunFolder

pytest.importorskip("onnxruntime")
TARGET, RUNTIME = load_target("ort"), load_runtime("ort")
MODULE = import_module("s2d_deploy.export._ort_placement")
REWRITE = import_module("s2d_deploy.export._ort_rewrite")


def opened(model, folder, precision, forms=None, **options):
    """A session of a common model in the given forms, as an artifact."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "common.onnx")
    placement = None
    if forms is not None:
        whole = {"why": "", "chosen": "searched"}
        placement = {"margin": 0.05, "int8_activations": False, "forms": forms, "kept_float": [], "whole": whole}
    dialect = TARGET.dialect_for(
        folder / "common.onnx", folder / "made", precision=precision, options=options, placement=placement
    )
    artifact = TARGET.build(dialect, folder / "made", precision=precision, options=options, progress=lambda _: None)
    return RUNTIME.open(artifact, threads=1)


def blocks(precision, activation=None, k=64, n=24, block=32):
    """INT4 blocks of K, with or without rounded activations; the weight's values."""
    rng = np.random.default_rng(1)
    codes, scale = rng.integers(-8, 8, (k, n)), rng.uniform(0.01, 0.1, (k // block, n)).astype(np.float32)
    common = Common(precision, x=(5, k))
    left = "x" if activation is None else common.activation("x", "fc.input", activation, 0.02)
    right = common.weight("fc.weight", "INT4", codes, scale, axis=0, block_size=block)
    common.add("Identity", [common.op("MatMul", "fc", [left, right], precision.upper(), macs=5 * k * n)], "y")
    return common.model("y"), codes * scale.repeat(block, 0).astype(np.float64)


def patches():
    """A Conv whose kernels tile the image."""
    rng = np.random.default_rng(3)
    common = Common("w8a8", x=(3, 8, 8))
    left = common.activation("x", "patch.input", "INT8", 0.02)
    right = common.weight("patch.weight", "INT8", rng.integers(-127, 128, (6, 3, 4, 4)), np.full(6, 0.01), axis=0)
    common.add("Identity", [common.op("Conv", "patch", [left, right], "W8A8", macs=1, strides=[4, 4])], "y")
    return common.model("y")


def test_forms_that_an_op_can_take():
    assert REWRITE.forms_of(linear("w8a8", "INT8", "INT8")[0]) == {"fc": ("matmul", "signed", "float")}
    assert REWRITE.forms_of(patches()) == {"patch": ("patches", "convinteger", "float")}
    assert REWRITE.forms_of(blocks("w4a16")[0]) == {"fc": ("nbits", "float")}
    assert REWRITE.forms_of(blocks("w4a16")[0], int8_activations=True) == {"fc": ("nbits", "float", "nbits-int8")}
    assert REWRITE.forms_of(blocks("w4a8", "INT8")[0]) == {}
    assert REWRITE.forms_of(blocks("w4a8", "INT8")[0], int8_activations=True) == {"fc": ("float", "nbits-int8")}


@pytest.mark.parametrize("activation", ["INT8", "UINT8", "INT4"])
def test_the_signed_form_is_the_same_integers(tmp_path, activation):
    model, codes, scale, zeros, bias, step = linear("w8a8", "INT8", activation, zero_point=3, k=40)
    x = np.random.default_rng(0).normal(size=(2, 5, 40)).astype(np.float32)
    lhs = quantized(x, activation, step, 3)
    with opened(model, tmp_path, "w8a8", {"fc": "signed"}) as session:
        np.testing.assert_array_equal(session.codes({"x": x})["fc.input"], lhs)
        dtype = np.uint8 if activation.startswith("U") else np.int8
        np.testing.assert_array_equal(session.accumulate("fc", lhs.astype(dtype)), (lhs - 3) @ (codes - zeros))
        expected = ((lhs - 3) @ (codes - zeros)) * (step * scale).astype(np.float64) + bias
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, atol=4 * 2.0**-23 * np.abs(expected).max())


def test_a_patch_embedding_as_a_convolution_is_the_same(tmp_path):
    x = {"x": np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)}
    with opened(patches(), tmp_path / "a", "w8a8") as default:
        wanted = default.run(x)["y"]
    with opened(patches(), tmp_path / "b", "w8a8", {"patch": "convinteger"}) as session:
        assert session.audit().ops[0].kernel == "ConvInteger"
        np.testing.assert_allclose(session.run(x)["y"], wanted, atol=1e-6)


def test_the_float_form_rounds_no_activation(tmp_path):
    model, codes, scale, zeros, bias, _ = linear("w8a8", "INT8", "INT8")
    x = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32)
    with opened(model, tmp_path, "w8a8", {"fc": "float"}) as session:
        expected = x.astype(np.float64) @ ((codes - zeros) * scale.astype(np.float64)) + bias
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, atol=24 * 2.0**-23 * np.abs(expected).max())
        assert session.codes({"x": x}) == {}
        with pytest.raises(UnsupportedError, match="does not run on integers"):
            session.accumulate("fc", np.zeros((1, 24), np.int8))
        audit = session.audit()
    foreign = RUNTIME.audit_file(tmp_path / "made" / "model.onnx", shapes={}, options={}, threads=1)
    assert [row["differs"] for row in foreign["layers"]] == [
        "declared W8A8, kept in float by the placement search that it was built with"
    ]
    assert audit.executed == {"float32": 1.0}
    assert audit.rung == "float"
    assert [op.name for op in audit.mismatches()] == ["fc"]
    assert audit.notes == (
        "kept in float by the placement search, as their quantized form is not faster "
        "(100.0% of the multiply-accumulates): fc",
    )


def test_a_quantizer_that_an_integer_op_still_reads_stays(tmp_path):
    common = Common("w8a8", x=(5, 8))
    left = common.activation("x", "q.input,k.input", "INT8", 0.02)
    codes = np.arange(64).reshape(8, 8) % 15 - 7
    for name in ("q", "k"):
        right = common.weight(f"{name}.weight", "INT8", codes, np.full(8, 0.1), axis=1)
        common.op("MatMul", name, [left, right], "W8A8", macs=320)
    common.add("Sub", ["q.product", "k.product"], "y")
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    with opened(common.model("y"), tmp_path, "w8a8", {"k": "float"}) as session:
        rounded = quantized(x, "INT8", 0.02) * np.float64(np.float32(0.02)) - x
        np.testing.assert_allclose(session.run({"x": x})["y"], rounded @ (codes * 0.1), atol=1e-4)
        audit = session.audit()
    assert {op.name: op.precision for op in audit.ops} == {"q": "int8", "k": "float32"}
    assert audit.rung == "native"


def test_int4_blocks_dequantized_at_load_are_the_same_product(tmp_path):
    model, weight = blocks("w4a16")
    x = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    with opened(model, tmp_path, "w4a16", {"fc": "float"}) as session:
        bound = 64 * 2.0**-23 * (np.abs(x).astype(np.float64) @ np.abs(weight))
        assert (np.abs(session.run({"x": x})["y"] - x @ weight) <= bound).all()
        audit = session.audit()
    assert audit.ops[0].kernel == "MatMul"
    assert audit.mismatches() == []
    stored = onnx.load(tmp_path / "made" / "model.onnx").graph.initializer
    assert onnx.TensorProto.INT4 in {t.data_type for t in stored}


def test_blocks_with_int8_activations_run_on_integers_and_say_so(tmp_path):
    model, weight = blocks("w4a8", "INT8")
    x = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    with opened(model, tmp_path, "w4a8", {"fc": "nbits-int8"}) as session:
        found, audit = session.run({"x": x})["y"], session.audit()
    # Activations are rounded to 1/127 of their block's largest value: half a step each, K of them.
    bound = np.abs(x).max() / 127 * np.abs(weight).sum(0).max()
    assert np.abs(found - x @ weight).max() <= bound
    assert audit.executed == {"int8": 1.0}
    assert audit.mismatches() == []


def stats(*milliseconds):
    return LatencyStats("scripted", tuple(round(ms * 1e6) for ms in milliseconds), run=0)


@pytest.mark.parametrize(
    ("times", "margin", "chosen"),
    [
        ({"matmul": 0.90, "signed": 2.0, "float": 1.0}, 0.05, "matmul"),
        ({"matmul": 0.96, "signed": 2.0, "float": 1.0}, 0.05, "float"),
        ({"matmul": 0.96, "signed": 2.0, "float": 1.0}, 0.0, "matmul"),
        ({"matmul": 0.90, "signed": 0.5, "float": 1.0}, 0.05, "signed"),
        ({"matmul": 0.90, "float": 1.0}, 0.2, "float"),
    ],
)
def test_the_rule(times, margin, chosen):
    found, why = MODULE._choose({name: stats(*[ms] * 20) for name, ms in times.items()}, margin)
    assert found == chosen
    assert why.endswith(f"limit {1 - margin:.2f}")


def test_a_drifting_machine_is_no_reason():
    """Both slow down by half in the second half: ratios are paired by round, so float is not called faster."""
    drift = [1.0] * 10 + [3.0] * 10
    found, _ = MODULE._choose({"matmul": stats(*[0.8 * d for d in drift]), "float": stats(*drift)}, 0.05)
    assert found == "matmul"


def scripted(monkeypatch, table):
    """`measure` that runs each candidate once and reports scripted milliseconds."""

    def measure(calls, **_):
        for call in calls.values():
            call()
        return {name: stats(*[table[name]] * 20) for name in calls}

    monkeypatch.setattr(MODULE, "measure", measure)


def searched(model, folder, precision, **options):
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "common.onnx")
    return TARGET.search(
        folder / "common.onnx",
        precision=precision,
        options={"placement": "search", **options},
        batches=[4, 2],
        sizes={"sequence": 7},
        threads=1,
        progress=lambda _: None,
    )


def test_the_whole_model_has_the_last_word(tmp_path, monkeypatch):
    model = linear("w8a8", "INT8", "INT8")[0]
    scripted(monkeypatch, {"matmul": 0.5, "signed": 0.7, "float": 1.0, "default": 0.99})
    found = searched(model, tmp_path / "a", "w8a8")
    assert found["groups"][0]["chosen"] == "matmul"
    assert found["whole"]["chosen"] == "float"
    assert found["forms"] == {"fc": "float"}
    assert found["kept_float"] == ["fc"]
    scripted(monkeypatch, {"matmul": 0.5, "signed": 0.4, "float": 1.0, "default": 0.6, "searched": 0.5})
    found = searched(model, tmp_path / "b", "w8a8")
    assert found["forms"] == {"fc": "signed"}
    assert found["kept_float"] == []
    json.dumps(found, allow_nan=False)


def test_weight_only_layers_that_stay_in_float_break_no_promise(tmp_path, monkeypatch):
    scripted(monkeypatch, {"nbits": 1.1, "float": 1.0, "default": 1.1})
    found = searched(blocks("w4a16")[0], tmp_path, "w4a16")
    assert found["forms"] == {"fc": "float"}
    assert found["kept_float"] == []


def test_a_form_that_computes_something_else_is_out(tmp_path, monkeypatch):
    scripted(monkeypatch, {"matmul": 0.9, "signed": 0.1, "float": 1.0, "default": 0.9})
    monkeypatch.setattr(MODULE, "_equal", lambda wanted, found: False)
    (group,) = searched(linear("w8a8", "INT8", "INT8")[0], tmp_path, "w8a8")["groups"]
    assert group["out"] == {"signed": "its output is not that of the default form"}
    assert group["chosen"] == "matmul"


def test_a_real_search_measures_distinct_work_once_and_ships_what_it_chose(tmp_path):
    common = Common("w8a8", x=(5, 8))
    value = "x"
    for name in ("a", "b", "c"):
        left = common.activation(value, f"{name}.input", "INT8", 0.02)
        right = common.weight(f"{name}.weight", "INT8", np.arange(64).reshape(8, 8) - 32, np.full(8, 0.01), axis=1)
        value = common.op("MatMul", name, [left, right], "W8A8", macs=320)
    common.add("Identity", [value], "y")
    found = searched(common.model("y"), tmp_path, "w8a8", margin=0.999)
    assert found["shapes"] == {"x": [2, 5, 8]}
    (group,) = found["groups"]
    assert group["ops"] == ["a", "b", "c"]
    assert set(group["forms"]) == {"matmul", "signed", "float"}
    assert found["kept_float"] == ["a", "b", "c"]
    dialect = TARGET.dialect_for(
        tmp_path / "common.onnx", tmp_path / "made", precision="w8a8", options={}, placement=found
    )
    artifact = TARGET.build(dialect, tmp_path / "made", precision="w8a8", options={}, progress=lambda _: None)
    assert artifact.info["placed"]["forms"] == found["forms"]
    assert artifact.info["placed"]["whole"] == found["whole"]
    with RUNTIME.open(artifact, threads=1) as session:
        assert session.audit().executed == {"float32": 1.0}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"placement": "serch"}, r"placement\. Expected: one of default, search\. Found: 'serch'\. .*'search'\?"),
        ({"dialect": "qqd"}, r"dialect\. Expected: one of kernels, qdq"),
        ({"margin": 1.0}, r"margin\. Expected: 0 or more, below 1\. Found: 1\.0"),
        ({"margin": True}, r"margin\. Expected: 0 or more"),
        ({"int8_activations": 1}, r"int8_activations\. Expected: true or false"),
        ({"placement": "search", "providers": ["cuda"]}, r"placement: search measures the CPU's kernels"),
    ],
)
def test_wrong_options(tmp_path, options, text):
    with pytest.raises(RecipeError, match=text):
        opened(linear("w8a8", "INT8", "INT8")[0], tmp_path, "w8a8", **options)


def test_other_providers_get_q_dq(tmp_path):
    """No such provider is here, so the graph is looked at, and computed by the CPU."""
    model, codes, scale, _, bias, step = linear("w4a4", "INT4", "INT4")
    onnx.save(model, tmp_path / "common.onnx")
    path = TARGET.dialect_for(
        tmp_path / "common.onnx",
        tmp_path / "out",
        precision="w4a4",
        options={"providers": ["openvino"]},
        placement=None,
    )
    found = onnx.load(path)
    kinds = [n.op_type for n in found.graph.node]
    assert kinds == ["QuantizeLinear", "Clip", "DequantizeLinear", "DequantizeLinear", "MatMul", "Add", "Identity"]
    x = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32) * 3
    expected = (quantized(x, "INT4", step) @ codes) * (step * scale).astype(np.float64) + bias
    with opened(model, tmp_path / "cpu", "w4a4", dialect="qdq") as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, atol=24 * 2.0**-23 * np.abs(expected).max())
        np.testing.assert_array_equal(session.codes({"x": x})["fc.input"], quantized(x, "INT4", step))


def result(**more):
    ops = [
        {"name": name, "declared": "W8A8", "precision": precision, "macs": 10, "kernel": "MatMul"}
        for name, precision in (("a", "int8"), ("b", "float32"))
    ]
    return {"target": "ort", "precision": "w8a8", "status": "measured", "audit": {"ops": ops}, **more}


def executed(row):
    (verdict,) = [v for v in evaluate([row], GateLimits(executed=1.0)) if v.name == "executed"]
    return verdict


def test_the_gate_excepts_by_name_what_the_recipe_let_the_search_keep():
    assert executed(result()).verdict == "fail"
    kept = executed(result(placement={"kept_float": ["b"]}))
    assert (kept.verdict, kept.value) == ("pass", 0.5)
    assert kept.evidence == (
        "1 of 2 declared operations ran as declared; kept in float by the placement search that the recipe asks for: b"
    )
    assert executed(result(placement={"kept_float": ["c"]})).verdict == "fail"
    info = {"placed": {"margin": 0.05, "kept_float": ["b"], "forms": {"b": "float"}, "whole": {"why": "slow"}}}
    assert placement_row({}, info) == {}
    assert placement_row({"placement": "search"}, {}) == {}
    assert placement_row({"placement": "search"}, info)["placement"]["kept_float"] == ["b"]


def test_what_is_slower_than_float_says_what_to_use_instead():
    slow, fast = {"median": 0.9, "ci": [0.88, 0.92]}, {"median": 1.1, "ci": [0.99, 1.2]}
    assert slower_than_float("ort", "w4a16", fast, {}) is None
    said = slower_than_float("ort", "w4a16", slow, {})
    assert said.startswith("w4a16 takes 1.11 of the float model's time on ort: MatMulNBits unpacks each weight")
    assert "placement: search" in said
    assert said.endswith("or w8a8 or w4a8, which multiply integers")
    assert "placement: search" not in slower_than_float("ort", "w4a16", slow, {"placement": "search"})
    assert slower_than_float("tvm", "w4a16", slow, {}).endswith("quantized weights save memory here, not time")


def test_a_run_searches_once_and_reports_it(finished, tmp_path):
    """The stage, its cache, the row and the gate, on the tiny recipe; a thousandfold speedup is asked for."""
    folder = finished.copy(tmp_path / "run")
    options = {"placement": "search", "margin": 0.999}
    document = TINY | {"targets": [{"name": "ort", "options": options}], "gates": {"executed": 1.0}}
    document["quantize"] = {**TINY["quantize"], "precisions": ["w8a8"]}
    recipe = parse_recipe(document)

    def deployment(store):
        return Deployment(Pipeline(recipe, store, Display(quiet=True)), recipe.targets[0])

    with RunFolder(folder) as store:
        made = deployment(store)
        row = {r["precision"]: r for r in made.rows(bench=False)}["w8a8"]
        assert made.errors == []
    ops = [op["name"] for op in row["audit"]["ops"] if op["declared"] != "float"]
    assert sorted(row["placement"]["kept_float"]) == sorted(ops)
    assert row["executed"] == {"float32": 1.0}
    assert executed(row).verdict == "pass"
    (exact,) = [v for v in evaluate([row], GateLimits()) if v.name == "accumulators_different"]
    assert (exact.verdict, exact.evidence.split(":")[0]) == ("pass", "no integer product is left")
    with RunFolder(folder) as store:
        again = deployment(store)
        assert again.export("w8a8").cached
        assert again.pipeline._stages["placement/ort/w8a8"].cached


def test_an_earlier_search_is_taken_from_its_file_and_checked(tmp_path, capsys):
    from s2d_deploy.export.to_ort import main  # noqa: TID251

    onnx.save(linear("w8a8", "INT8", "INT8")[0], tmp_path / "c.onnx")
    onnx.save(linear("w4a8", "INT4", "INT8")[0], tmp_path / "other.onnx")
    common, first, second = (str(tmp_path / name) for name in ("c.onnx", "first", "second"))
    assert main([common, first, "--placement", "search", "--margin", "0.999"]) == 0
    assert main([common, second, "--placement", f"{first}/placement.json"]) == 0
    said = capsys.readouterr().out
    assert said.count("kept in float by the placement search") == 2
    assert (tmp_path / "first/model.onnx").read_bytes() == (tmp_path / "second/model.onnx").read_bytes()
    assert main([str(tmp_path / "other.onnx"), second, "--placement", f"{first}/placement.json"]) == 2
    assert "not the placement of this model. Expected: kind 's2d-deploy placement' of w4a8" in capsys.readouterr().err


def test_a_search_of_an_op_without_shapes_is_refused():
    with pytest.raises(UnsupportedError, match=r"op 'fc': its shapes are not known"):
        MODULE.search(linear("w8a8", "INT8", "INT8")[0], {}, {}, None)


def test_artifact_errors_name_the_file(tmp_path):
    with pytest.raises(ArtifactError, match="not a readable ONNX file"):
        TARGET.search(
            tmp_path / "none.onnx",
            precision="w8a8",
            options={"placement": "search"},
            batches=[1],
            sizes={},
            threads=1,
            progress=lambda _: None,
        )
