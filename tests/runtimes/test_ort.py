"""The ONNX Runtime adapter: codes in the plan's types, accumulators of the artifact's kernels, an honest audit."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))
from common_graphs import Common, linear, quantized

from s2d_deploy.errors import ArtifactError, DataError, DeviceUnavailable, RuntimeUnavailable, UnsupportedError
from s2d_deploy.registry import load_runtime, load_target
from s2d_deploy.session import Artifact

pytest.importorskip("onnxruntime")
RUNTIME, TARGET = load_runtime("ort"), load_target("ort")


def build(model, folder, precision, **options):
    """Common model -> artifact."""
    (folder / "common").mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "common" / "model.onnx")
    dialect = TARGET.dialect(folder / "common" / "model.onnx", folder / "built", precision=precision)
    return TARGET.build(dialect, folder / "built", precision=precision, options=options, progress=lambda _: None)


def as_artifact(model, folder, precision):
    """An artifact that holds `model` as it is, whatever our dialect would have made of it."""
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    return Artifact(folder, "ort", precision, {"model": "model.onnx"})


@pytest.fixture
def w4a4(tmp_path):
    model, *rest = linear("w4a4", "INT4", "INT4", k=32, n=16)
    with RUNTIME.open(build(model, tmp_path, "w4a4"), threads=1) as session:
        yield session, rest


@pytest.mark.parametrize(
    ("activation", "zero_point"), [("INT4", 0), ("INT4", 3), ("UINT4", 0), ("INT8", 0), ("INT8", -9), ("UINT8", 100)]
)
def test_codes_are_the_plans(tmp_path, activation, zero_point):
    model, *_, step = linear("w4a8", "INT4", activation, zero_point=zero_point)
    x = np.random.default_rng(0).normal(size=(2, 5, 24)).astype(np.float32) * 3
    with RUNTIME.open(build(model, tmp_path, "w4a8"), threads=1) as session:
        found = session.codes({"x": x})["fc.input"]
    assert found.dtype == (np.uint8 if activation.startswith("U") else np.int8)
    np.testing.assert_array_equal(found, quantized(x, activation, step, zero_point))


def test_a_shared_site_is_reported_under_every_name(tmp_path):
    common = Common("w4a4", x=(5, 8))
    left = common.activation("x", "q.input,k.input", "INT4", 0.25)
    codes = np.arange(64).reshape(8, 8) % 15 - 7
    for name in ("q", "k"):
        right = common.weight(f"{name}.weight", "INT4", codes, np.full(8, 0.1), axis=1)
        common.op("MatMul", name, [left, right], "W4A4")
    common.add("Add", ["q.product", "k.product"], "y")
    with RUNTIME.open(build(common.model("y"), tmp_path, "w4a4"), threads=1) as session:
        found = session.codes({"x": np.ones((1, 5, 8), np.float32)})
    assert set(found) == {"q.input", "k.input"}
    np.testing.assert_array_equal(found["q.input"], found["k.input"])


@pytest.mark.parametrize(
    ("precision", "storage", "activation"),
    [("w8a8", "INT8", "INT8"), ("w4a8", "INT4", "INT8"), ("w4a4", "INT4", "INT4"), ("w4a4", "INT4", "UINT4")],
)
@pytest.mark.parametrize("zero_point", [0, 2])
@pytest.mark.parametrize("dot_product", [True, False])
def test_accumulators_are_exact(tmp_path, monkeypatch, precision, storage, activation, zero_point, dot_product):
    """At the ends of the grids, where 16-bit sums would saturate, with and without the kernel for older processors."""
    if not dot_product:
        monkeypatch.setattr(
            sys.modules[type(RUNTIME).__module__.rsplit(".", 1)[0] + "._ort_loading"], "byte_dot_product", lambda: None
        )
    model, codes, _, zeros, *_ = linear(
        precision, storage, activation, k=200, n=33, zero_point=zero_point, weight_zeros=zero_point > 0
    )
    low, high = {"INT8": (-128, 127), "INT4": (-8, 7), "UINT4": (0, 15)}[activation]
    dtype = np.uint8 if low == 0 else np.int8
    lhs = np.random.default_rng(1).choice([low, high], (3, 7, 200), p=[0.1, 0.9]).astype(dtype)
    with RUNTIME.open(build(model, tmp_path, precision), threads=1) as session:
        found = session.accumulate("fc", lhs)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, (lhs.astype(np.int64) - zero_point) @ (codes - zeros))


def test_accumulators_beyond_exact_floats(tmp_path):
    """K * 255 * 127 > 2**24: the fused kernel's float32 cannot tell, MatMulInteger's int32 does."""
    common = Common("w8a8", x=(1, 2001))
    left = common.activation("x", "fc.input", "INT8", 0.1, zero_point=-128)
    right = common.weight("fc.weight", "INT8", np.full((2001, 3), 127), np.full(3, 0.1), axis=1)
    common.add("Identity", [common.op("MatMul", "fc", [left, right], "W8A8")], "y")
    with RUNTIME.open(build(common.model("y"), tmp_path, "w8a8"), threads=1) as session:
        found = session.accumulate("fc", np.full((1, 2001), 127, np.int8))
    assert 2001 * 255 * 127 > 2**24
    assert int(np.float32(2001 * 255 * 127)) != 2001 * 255 * 127
    np.testing.assert_array_equal(found, np.full((1, 3), 2001 * 255 * 127))


def test_accumulators_come_from_the_artifacts_own_weights(tmp_path):
    model, codes, *_ = linear("w8a8", "INT8", "INT8", k=8, n=4)
    artifact = build(model, tmp_path, "w8a8")
    proto = onnx.load(artifact.path("model"))
    (weight,) = [t for t in proto.graph.initializer if t.name == "fc.weight.codes"]
    changed = numpy_helper.to_array(weight).copy()
    changed[0, 0] ^= 1
    weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
    onnx.save(proto, artifact.path("model"))
    lhs = np.ones((1, 8), np.int8)
    with RUNTIME.open(artifact, threads=1) as session:
        assert (session.accumulate("fc", lhs) != lhs.astype(int) @ codes).tolist() == [[True, False, False, False]]


def test_operands_are_checked(w4a4):
    session, _ = w4a4
    with pytest.raises(
        UnsupportedError, match=r"op 'fc9' does not run on integers.*Expected: one of fc\. Found: no such op"
    ):
        session.accumulate("fc9", np.zeros((1, 32), np.int8))
    with pytest.raises(DataError, match=r"site 'fc\.input': wrong codes\. Expected: int8\. Found: uint8\."):
        session.accumulate("fc", np.zeros((1, 32), np.uint8))
    with pytest.raises(DataError, match=r"Expected: codes of the left operand only\. Found: 2 operand"):
        session.accumulate("fc", np.zeros((1, 32), np.int8), np.zeros((32, 16), np.int8))
    with pytest.raises(DataError, match=r"codes of shape \(1, 31\) do not fit"):
        session.accumulate("fc", np.zeros((1, 31), np.int8))


def test_the_declared_integers_are_executed(w4a4):
    audit = w4a4[0].audit()
    (op,) = audit.ops
    assert (op.name, op.kernel, op.precision, op.macs, op.declared) == (
        "fc",
        "MatMulIntegerToFloat",
        "int8",
        2560,
        "W4A4",
    )
    assert audit.rung == "emulated"
    assert audit.executed == {"int8": 1.0}
    assert audit.evidence == f"optimized graph saved by onnxruntime {RUNTIME.version()}"
    assert audit.notes == ()


def test_a_silent_float_fallback_is_caught(tmp_path):
    """The common file itself: ONNX Runtime takes its INT4 activations and computes in float without a word."""
    model, *_ = linear("w4a4", "INT4", "INT4")
    with RUNTIME.open(as_artifact(model, tmp_path / "qdq", "w4a4"), threads=1) as session:
        audit = session.audit()
        with pytest.raises(UnsupportedError, match="MatMul, declared W4A4"):
            session.accumulate("fc", np.zeros((1, 24), np.int8))
    assert [op.precision for op in audit.mismatches()] == ["float32"]
    assert audit.rung == "dequantized"
    assert "fc: declared W4A4, computed in float by" in audit.notes[0]


def test_one_broken_fusion_among_good_ones_is_caught(tmp_path):
    """A Relu between weight and product, an identity on these weights, is enough to lose the integer kernel."""
    common = Common("w8a8", x=(5, 16))
    value = "x"
    for name in ("good", "broken"):
        left = common.activation(value, f"{name}.input", "INT8", 0.05)
        codes = np.random.default_rng(0).integers(0, 128, (16, 16))
        right = common.weight(f"{name}.weight", "INT8", codes, np.full(16, 0.01), axis=1)
        if name == "broken":
            right = common.add("Relu", [right], "relu")
        value = common.op("MatMul", name, [left, right], "W8A8", macs=1280)
    common.add("Identity", [value], "y")
    with RUNTIME.open(build(common.model("y"), tmp_path, "w8a8"), threads=1) as session:
        audit = session.audit()
    assert {op.name: op.precision for op in audit.ops} == {"good": "int8", "broken": "float32"}
    assert audit.executed == {"int8": 0.5, "float32": 0.5}
    assert audit.rung == "dequantized"


def test_undeclared_int8_activations_are_caught(tmp_path):
    """MatMulNBits of accuracy_level 4 rounds activations to INT8; W4A16 promises float."""
    node = helper.make_node(
        "MatMulNBits",
        ["x", "b", "s"],
        ["y"],
        "fc",
        domain="com.microsoft",
        K=32,
        N=4,
        bits=4,
        block_size=32,
        accuracy_level=4,
    )
    for key, value in {"s2d.op": "fc", "s2d.macs": "128", "s2d.declared": "W4A16"}.items():
        entry = node.metadata_props.add()
        entry.key, entry.value = key, value
    stored = [
        numpy_helper.from_array(np.full((4, 1, 16), 0x99, np.uint8), "b"),
        numpy_helper.from_array(np.ones(4, np.float32), "s"),
    ]
    shapes = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, k]) for n, k in (("x", 32), ("y", 4))]
    graph = helper.make_graph([node], "nbits", shapes[:1], shapes[1:], stored)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 10
    entry = model.metadata_props.add()
    entry.key, entry.value = "s2d.precision", "w4a16"
    with RUNTIME.open(as_artifact(model, tmp_path, "w4a16"), threads=1) as session:
        audit = session.audit()
    assert audit.notes == ("fc: declared W4A16, but MatMulNBits rounds activations to INT8 (accuracy_level 4)",)
    assert audit.ops[0].precision == "int8"


@pytest.mark.parametrize("precision", ["fp32", "w8a8", "w4a16", "w4a8", "w4a4"])
def test_a_whole_model_is_seen_whole(exported, tmp_path, precision):
    """A ViT: fused, blocked and renamed nodes are found again, MACs and all, and the rung is as promised."""
    common = onnx.load(exported("vit", precision).path)
    ops = [n for n in common.graph.node if n.op_type in ("MatMul", "Conv")]
    with RUNTIME.open(build(common, tmp_path, precision), threads=1) as session:
        audit = session.audit()
    assert [op.name for op in audit.ops if op.precision == "unseen"] == []
    assert {op.name for op in audit.ops} == {n.name for n in ops}
    assert all(op.macs > 0 for op in audit.ops)
    assert audit.rung == RUNTIME.rung(precision)
    assert audit.mismatches() == []
    declared = {op.name for op in audit.ops if op.declared not in ("float", "W4A16")}
    assert declared == {op.name for op in audit.ops if op.precision == "int8"}


def test_showing_codes_changes_no_code_and_no_kernel(exported, tmp_path):
    """Every site alone, against all at once: extra outputs must not change the fusions that they look at."""
    case = exported("vit", "w4a4")
    artifact = build(onnx.load(case.path), tmp_path, "w4a4")
    proto = onnx.load(artifact.path("model"))
    import onnxruntime

    kinds = {}
    for name, taps in {"plain": [], "tapped": [n.output[0] for n in proto.graph.node if n.op_type == "Clip"]}.items():
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        copy.graph.output.extend(helper.make_empty_tensor_value_info(tap) for tap in taps)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / f"{name}.onnx")
        onnxruntime.InferenceSession(copy.SerializeToString(), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(tmp_path / f"{name}.onnx").graph.node
        kinds[name] = sorted((n.op_type, n.name) for n in nodes)
    assert kinds["plain"] == kinds["tapped"]
    assert len([k for k, _ in kinds["plain"] if k == "MatMulIntegerToFloat"]) > 10


def test_wrong_feeds_are_named(w4a4):
    session, _ = w4a4
    good = np.zeros((2, 5, 32), np.float32)
    with pytest.raises(DataError, match=r"Expected: x\. Found: images\."):
        session.run({"images": good})
    with pytest.raises(DataError, match=r"input 'x': wrong dtype\. Expected: float32\. Found: float64\."):
        session.run({"x": good.astype(np.float64)})
    with pytest.raises(DataError, match=r"input 'x': wrong shape\. Expected: batchx5x32\. Found: 2x5x31\."):
        session.codes({"x": good[..., :31]})
    with pytest.raises(DataError, match=r"Found: 2x5\."):
        session.run({"x": good[..., 0]})


def test_a_closed_session_refuses(tmp_path):
    session = RUNTIME.open(build(linear("w4a4", "INT4", "INT4")[0], tmp_path, "w4a4"), threads=1)
    session.close()
    for call in (
        lambda: session.run({}),
        session.audit,
        lambda: session.codes({}),
        lambda: session.accumulate("fc", np.zeros(1)),
    ):
        with pytest.raises(ArtifactError, match="this session is closed"):
            call()


@pytest.mark.parametrize("content", [b"", b"not an ONNX file", None])
def test_truncated_and_foreign_files_are_refused_quietly(tmp_path, capfd, content):
    artifact = build(linear("w4a4", "INT4", "INT4", k=64, n=64)[0], tmp_path, "w4a4")
    path = artifact.path("model")
    path.write_bytes(path.read_bytes()[:-500] if content is None else content)
    with pytest.raises(ArtifactError, match=rf"{path}: onnxruntime .* cannot load it"):
        RUNTIME.open(artifact, threads=1)
    assert capfd.readouterr().err == ""


def test_artifacts_of_others_are_refused(tmp_path):
    artifact = build(linear("w4a4", "INT4", "INT4")[0], tmp_path, "w4a4")
    with pytest.raises(ArtifactError, match="Found: target 'tvm', roles model"):
        RUNTIME.open(replace(artifact, target="tvm"), threads=1)
    with pytest.raises(ArtifactError, match=r"Expected: s2d\.precision 'w8a8' in its metadata\. Found: 'w4a4'"):
        RUNTIME.open(replace(artifact, precision="w8a8"), threads=1)
    artifact.path("model").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx: no such file"):
        RUNTIME.open(artifact, threads=1)


def test_a_missing_provider_is_named(tmp_path):
    artifact = build(linear("w4a4", "INT4", "INT4")[0], tmp_path, "w4a4")
    with pytest.raises(
        DeviceUnavailable, match=r"has no provider FastExecutionProvider here\. Expected: one of .*CPUExec"
    ):
        RUNTIME.open(replace(artifact, info={"providers": ["FastExecutionProvider"]}), threads=1)


def test_a_missing_package_gives_the_pip_line(tmp_path, monkeypatch):
    artifact = build(linear("w4a4", "INT4", "INT4")[0], tmp_path, "w4a4")
    module = sys.modules[type(RUNTIME).__module__]
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    line = "onnxruntime is not installed. Fix: pip install 's2d-deploy[ort]'."
    assert RUNTIME.available() == line
    with pytest.raises(RuntimeUnavailable) as caught:
        RUNTIME.open(artifact, threads=1)
    assert str(caught.value) == line


def test_asking_does_not_import_onnxruntime():
    program = (
        "import sys; from s2d_deploy.registry import load_runtime, load_target; "
        "r = load_runtime('ort'); load_target('ort'); "
        "print(r.available(), r.version(), r.device(), r.rung('w4a4'), "
        "'onnxruntime' in sys.modules, 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert said[0] == "None"
    assert said[-3:] == ["emulated", "False", "False"]


def test_rungs():
    rungs = [RUNTIME.rung(p) for p in ("fp32", "w8a8", "w4a16", "w4a8", "w4a4", "w2a2")]
    assert rungs == ["float", "native", "weight-only", "emulated", "emulated", None]


def test_both_sides_name_the_metadata_alike():
    folder = "s2d_deploy.export._ort_rewrite", "s2d_deploy.runtimes._ort_loading"
    load_target("ort")
    writer, reader = (sys.modules[name] for name in folder)
    for name in ("PART", "PLACED", "STORAGE", "SHIFT", "CONTAINER"):
        assert getattr(writer, name) == getattr(reader, name)
