"""The TVM adapter: exact accumulators, codes, batches, audit, and refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from s2d_deploy.errors import (
    ArtifactError,
    DataError,
    DeviceUnavailable,
    RuntimeUnavailable,
    UnsupportedError,
)
from s2d_deploy.qgraph import contractions
from s2d_deploy.registry import load_runtime, load_target
from s2d_deploy.session import Artifact

RUNTIME = load_runtime("tvm")
TARGET = load_target("tvm")
pytestmark = pytest.mark.skipif(RUNTIME.available() is not None, reason=str(RUNTIME.available()))

TOKENS, WIDTH, HEADS = 5, 12, 2


class GraphBuilder:
    """Writes nodes as the common file has them."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(1)

    def constant(self, name: str, array: np.ndarray) -> str:
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(
        self, kind: str, inputs: list[str], name: str, props: dict[str, str] | None = None, **attributes: Any
    ) -> str:
        node = helper.make_node(kind, inputs, [f"{name}.out"], name, **attributes)
        for key, value in (props or {}).items():
            node.metadata_props.add(key=key, value=value)
        self.nodes.append(node)
        return f"{name}.out"

    def quantized(self, value: str, site: str, scale: float, zero: int, kind: int) -> str:
        s = self.constant(f"{site}.scale", np.float32(scale))
        z = self.constant(f"{site}.zero_point", np.array(zero).astype(helper.tensor_dtype_to_np_dtype(kind)))
        q = self.node("QuantizeLinear", [value, s, z], f"{site}.quantize", {"s2d.site": site})
        return self.node("DequantizeLinear", [q, s, z], f"{site}.dequantize", {"s2d.site": site})

    def weight(
        self, op: str, shape: tuple[int, ...], kind: int, *, zero: bool = False, block: int = 0, axis: int = 1
    ) -> str:
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        low, high = {TensorProto.INT4: (-8, 7), TensorProto.UINT4: (0, 15), TensorProto.INT8: (-128, 127)}[kind]
        scale_shape = (shape[0] // block, shape[1]) if block else (shape[axis],)
        codes = self.rng.integers(low, high + 1, shape).astype(dtype)
        zeros = self.rng.integers(low, high + 1, scale_shape) if zero else np.zeros(scale_shape)
        names = [
            self.constant(f"{op}.weight.codes", codes),
            self.constant(f"{op}.weight.scale", self.rng.uniform(0.005, 0.02, scale_shape).astype(np.float32)),
            self.constant(f"{op}.weight.zero_point", zeros.astype(dtype)),
        ]
        attributes = {"axis": 0, "block_size": block} if block else {"axis": axis}
        return self.node(
            "DequantizeLinear", names, f"{op}.weight.dequantize", {"s2d.site": f"{op}.weight"}, **attributes
        )

    def matmul(self, op: str, left: str, right: str, declared: str) -> str:
        return self.node("MatMul", [left, right], op, {"s2d.op": op, "s2d.declared": declared, "s2d.macs": "100"})


def common_model() -> onnx.ModelProto:
    """A little of everything: grouped Conv, INT4, INT8 and UINT4 with zero points, blocks, attention, floats."""
    g = GraphBuilder()
    image = g.quantized("image", "patch.input", 0.05, 7, TensorProto.INT8)
    kernel = g.weight("patch", (WIDTH, 2, 3, 3), TensorProto.INT4, axis=0)
    bias = g.constant("patch.bias", g.rng.standard_normal(WIDTH).astype(np.float32))
    conv = g.node(
        "Conv",
        [image, kernel, bias],
        "patch",
        {"s2d.op": "patch", "s2d.declared": "W4A8", "s2d.macs": "100"},
        group=2,
        pads=[1, 1, 1, 0],
        strides=[2, 1],
    )
    flat = g.node("Reshape", [conv, g.constant("rows", np.array([0, WIDTH, -1]))], "reshape")
    x = g.node("Transpose", [flat], "transpose", perm=[0, 2, 1])
    quantized = g.quantized(x, "q.input", 0.05, 0, TensorProto.INT4)
    projections = []
    for op, kind, zero in (
        ("q", TensorProto.INT4, False),
        ("k", TensorProto.UINT4, True),
        ("v", TensorProto.INT8, True),
    ):
        out = g.matmul(op, quantized, g.weight(op, (WIDTH, WIDTH), kind, zero=zero), "W4A4")
        shape = g.constant(f"{op}.heads", np.array([0, -1, HEADS, WIDTH // HEADS]))
        split = g.node("Reshape", [out, shape], f"{op}.split")
        perm = [0, 2, 3, 1] if op == "k" else [0, 2, 1, 3]
        projections.append(g.node("Transpose", [split], f"{op}.transpose", perm=perm))
    query = g.quantized(projections[0], "a.query", 0.02, 3, TensorProto.INT8)
    key = g.quantized(projections[1], "a.key", 0.02, 9, TensorProto.UINT4)
    value = g.quantized(projections[2], "a.value", 0.05, 120, TensorProto.UINT8)
    scores = g.matmul("a.scores", query, key, "W8A8")
    probs = g.quantized(g.node("Softmax", [scores], "softmax", axis=-1), "a.probs", 1 / 255, 0, TensorProto.UINT8)
    context = g.matmul("a.context", probs, value, "W8A8")
    merged = g.node("Transpose", [context], "merge", perm=[0, 2, 1, 3])
    joined = g.node("Reshape", [merged, g.constant("joined", np.array([0, -1, WIDTH]))], "join")
    gelu = g.node("Gelu", [joined], "gelu")
    blocked = g.quantized(gelu, "fc.input", 0.02, 0, TensorProto.INT8)
    out = g.matmul("fc", blocked, g.weight("fc", (WIDTH, 10), TensorProto.INT4, block=4, zero=True), "W4A8")
    weights_only = g.weight("head", (10, 7), TensorProto.INT4, block=5)
    head = g.matmul("head", out, weights_only, "W4A16")
    last = g.constant("last.weight", g.rng.standard_normal((7, 3)).astype(np.float32))
    g.matmul("last", head, last, "float")
    g.nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        g.nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 4, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "tokens", 3])],
        g.stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    model.metadata_props.add(key="s2d.precision", value="w4a8")
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[onnx.ModelProto, Artifact]:
    folder = tmp_path_factory.mktemp("tvm")
    model = common_model()
    onnx.save(model, folder / "common.onnx")
    artifact = TARGET.build(
        folder / "common.onnx", folder, precision="w4a8", options={"batch": [1, 3]}, progress=lambda _: None
    )
    return model, artifact


@pytest.fixture
def session(built: tuple[onnx.ModelProto, Artifact]) -> Iterator[Any]:
    with RUNTIME.open(built[1], threads=1) as opened:
        yield opened


def images(count: int) -> dict[str, np.ndarray]:
    return {"image": np.random.default_rng(5).standard_normal((count, 4, 3, 3)).astype(np.float32) * 3}


def convolve(codes: np.ndarray, weight: np.ndarray, zero: int) -> np.ndarray:
    """int64 accumulators of the test's convolution, by loops."""
    padded = np.pad(codes.astype(np.int64) - zero, ((0, 0), (0, 0), (1, 1), (1, 0)))
    high, wide = (padded.shape[2] - 3) // 2 + 1, padded.shape[3] - 3 + 1
    out = np.zeros((codes.shape[0], weight.shape[0], high, wide), np.int64)
    for o in range(weight.shape[0]):
        first = o // (weight.shape[0] // 2) * 2
        for i in range(high):
            for j in range(wide):
                window = padded[:, first : first + 2, 2 * i : 2 * i + 3, j : j + 3]
                out[:, o, i, j] = (window * weight[o].astype(np.int64)).sum((1, 2, 3))
    return out


def test_accumulators_equal_the_integer_reference(built: tuple[onnx.ModelProto, Artifact], session: Any) -> None:
    rng = np.random.default_rng(0)
    about = json.loads(built[1].path("description").read_text())
    seen = []
    for c in contractions(built[0]):
        entry = about["ops"][c.name]["accumulate"]
        if not entry:
            continue
        ranges = {"INT4": (-8, 8), "UINT4": (0, 16), "INT8": (-128, 128), "UINT8": (0, 256)}
        assert c.left is not None
        assert c.right is not None
        shape = [4 * entry["1"]["left_shape"][0], *entry["1"]["left_shape"][1:]]
        lhs = rng.integers(*ranges[c.left.storage], shape).astype(c.left.zero_point.dtype)
        left = lhs.astype(np.int64) - int(c.left.zero_point)
        rhs = None
        if c.name == "patch":
            expected = convolve(lhs, c.right.stored, int(c.left.zero_point))
        elif c.right.stored is None:
            shape = [4 * entry["1"]["right_shape"][0], *entry["1"]["right_shape"][1:]]
            rhs = rng.integers(*ranges[c.right.storage], shape).astype(c.right.zero_point.dtype)
            expected = left @ (rhs.astype(np.int64) - int(c.right.zero_point))
        else:
            zeros = c.right.zero_point.astype(np.int64)
            if c.right.block is not None:
                zeros = zeros.repeat(c.right.block, axis=0)
            expected = left @ (c.right.stored.astype(np.int64) - zeros)
        got = session.accumulate(c.name, lhs, rhs)
        assert got.dtype == np.int32
        np.testing.assert_array_equal(got, expected, err_msg=c.name)
        seen.append(c.name)
    assert seen == ["patch", "q", "k", "v", "a.scores", "a.context", "fc"]


def test_outputs_and_codes_equal_the_onnx_reference(built: tuple[onnx.ModelProto, Artifact], session: Any) -> None:
    feeds = images(3)
    sites = {
        p.value: n.output[0]
        for n in built[0].graph.node
        if n.op_type == "QuantizeLinear"
        for p in n.metadata_props
        if p.key == "s2d.site"
    }
    shown = onnx.ModelProto()
    shown.CopyFrom(built[0])
    shown.graph.output.extend(helper.make_empty_tensor_value_info(v) for v in sites.values())
    expected, *codes = ReferenceEvaluator(shown).run(None, feeds)
    found = session.codes(feeds)
    assert found.keys() == sites.keys()
    for site, reference in zip(sites, codes, strict=True):
        steps = np.abs(found[site].astype(np.int64) - reference.astype(np.int64))
        # Float operators between quantizers differ by ULPs: a code at a rounding boundary may differ by one step.
        assert steps.max() <= 1, site
        assert (steps > 0).mean() <= 0.01, site
    np.testing.assert_array_equal(found["patch.input"], codes[0].astype(np.int8))
    y = session.run(feeds)["y"]
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, expected, atol=0.02 * np.abs(expected).max())


def test_per_token_scales_leave_the_sum(tmp_path: Path) -> None:
    g = GraphBuilder()
    one, zero = g.constant("one", np.float32(1)), g.constant("zero", np.array(0, np.int8))
    largest = g.node("ReduceMax", [g.node("Abs", ["x"], "abs"), g.constant("axes", np.array([-1]))], "max", keepdims=1)
    scale = g.node("Div", [largest, g.constant("qmax", np.float32(127))], "scale")
    props = {"s2d.site": "fc.input"}
    codes = g.node("QuantizeLinear", [g.node("Div", ["x", scale], "div"), one, zero], "fc.input.quantize", props)
    unit = g.node("DequantizeLinear", [codes, one, zero], "fc.input.dequantize", props)
    left = g.node("Mul", [unit, scale], "mul")
    g.matmul("fc", left, g.weight("fc", (WIDTH, 10), TensorProto.INT4), "W4A8")
    g.nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        g.nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 10])],
        g.stored,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    artifact = TARGET.build(tmp_path / "m.onnx", tmp_path, precision="w4a8", options={}, progress=lambda _: None)
    x = np.random.default_rng(3).standard_normal((2, 3, WIDTH)).astype(np.float32) * np.float32([[1], [10], [0.1]])
    stored = {t.name: numpy_helper.to_array(t) for t in g.stored}
    weight = stored["fc.weight.codes"].astype(np.int64)
    with RUNTIME.open(artifact, threads=1) as session:
        found = session.codes({"x": x})["fc.input"]
        s = np.abs(x).max(-1, keepdims=True) / np.float32(127)
        np.testing.assert_array_equal(found, np.round(x / s).astype(np.int8))
        sums = session.accumulate("fc", found)
        np.testing.assert_array_equal(sums, found.astype(np.int64) @ weight)
        expected = sums * stored["fc.weight.scale"].astype(np.float64) * s
        np.testing.assert_allclose(session.run({"x": x})["y"], expected, rtol=1e-6, atol=1e-6)
        assert session.audit().executed == {"int8": 1.0}


def test_other_batches_are_split_and_padded_without_a_trace(
    built: tuple[onnx.ModelProto, Artifact], session: Any
) -> None:
    feeds = images(8)
    whole, codes = session.run(feeds)["y"], session.codes(feeds)
    singles = np.concatenate([session.run({"image": feeds["image"][i : i + 1]})["y"] for i in range(8)])
    np.testing.assert_array_equal(whole, singles)
    np.testing.assert_array_equal(codes["a.probs"][:2], session.codes({"image": feeds["image"][:2]})["a.probs"])


def test_a_rest_smaller_than_every_batch_is_padded(tmp_path: Path, session: Any) -> None:
    onnx.save(common_model(), tmp_path / "m.onnx")
    artifact = TARGET.build(
        tmp_path / "m.onnx", tmp_path, precision="w4a8", options={"batch": 3}, progress=lambda _: None
    )
    feeds = images(4)
    with RUNTIME.open(artifact, threads=1) as padded:
        np.testing.assert_array_equal(padded.run(feeds)["y"], session.run(feeds)["y"])
        assert padded.codes(feeds)["q.input"].shape[0] == 4


def test_two_threads_give_the_same(built: tuple[onnx.ModelProto, Artifact], session: Any) -> None:
    with RUNTIME.open(built[1], threads=2) as two:
        np.testing.assert_array_equal(two.run(images(3))["y"], session.run(images(3))["y"])
        assert two.threads in (1, 2)  # a process that started TVM's pool smaller keeps it


def test_audit_tells_what_runs(session: Any) -> None:
    audit = session.audit()
    executed = {op.name: op.precision for op in audit.ops}
    assert executed == {
        **dict.fromkeys(["patch", "q", "k", "v", "a.scores", "a.context", "fc"], "int8"),
        "head": "float32",
        "last": "float32",
    }
    assert audit.rung == "weight-only"
    assert audit.mismatches() == []
    assert audit.executed == pytest.approx({"int8": 7 / 9, "float32": 2 / 9})
    if "vpdpbusd" in audit.evidence:
        assert {op.instruction for op in audit.ops if op.precision == "int8"} == {"vpdpbusd"}
        assert {op.instruction for op in audit.ops if op.precision == "float32"} == {""}
        assert re.search(r"vpdpbusd in (\d+) of \1 integer kernels", audit.evidence)


def test_a_profile_names_the_kernel_of_every_contraction(session: Any) -> None:
    found = session.profile(images(1), runs=3)
    audited = {op.name: op.kernel for op in session.audit().ops}
    assert {k.op: k.function for k in found if k.op} == audited
    assert all(len(k.samples_us) == 3 and k.p50_us > 0 for k in found)
    # Watching ends with the profile.
    session.run(images(1))
    with pytest.raises(DataError, match="a profile is of one batch"):
        session.profile(images(5))


def test_an_artifact_without_a_linker_runs_the_same(
    tmp_path: Path, session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(common_model(), tmp_path / "m.onnx")
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    artifact = TARGET.build(tmp_path / "m.onnx", tmp_path, precision="w4a8", options={}, progress=lambda _: None)
    assert artifact.files["code"] == "model.ll"
    assert any("no C compiler" in note for note in artifact.info["notes"])
    with RUNTIME.open(artifact, threads=1) as opened:
        np.testing.assert_array_equal(opened.run(images(2))["y"], session.run(images(2))["y"])


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, "the fed inputs are not the model's. Expected: image. Found: nothing"),
        ({"image": np.zeros((1, 4, 3, 3))}, "input 'image': wrong dtype. Expected: float32. Found: float64"),
        ({"image": np.zeros((1, 4, 3, 2), np.float32)}, "Expected: batchx4x3x3. Found: 1x4x3x2"),
        ({"image": np.zeros((0, 4, 3, 3), np.float32)}, "at least one. Found: image: 0"),
    ],
)
def test_wrong_feeds(session: Any, feeds: dict[str, np.ndarray], text: str) -> None:
    with pytest.raises(DataError, match=text):
        session.run(feeds)


def test_wrong_codes(session: Any) -> None:
    good = np.zeros((1, 9, WIDTH), np.int8)
    with pytest.raises(UnsupportedError, match="no op 'nothing' in this artifact"):
        session.accumulate("nothing", good)
    with pytest.raises(UnsupportedError, match=r"op 'head' does not run on integers.*weight-only"):
        session.accumulate("head", good)
    with pytest.raises(DataError, match="op 'q' multiplies by its stored weight"):
        session.accumulate("q", good, good)
    with pytest.raises(DataError, match=r"op 'q': lhs codes do not fit\. Expected: int8"):
        session.accumulate("q", good.astype(np.int32))
    with pytest.raises(DataError, match=r"op 'a\.scores' multiplies two activations"):
        session.accumulate("a.scores", good)


def copied(artifact: Artifact, folder: Path) -> Artifact:
    for name in artifact.files.values():
        (folder / name).write_bytes((artifact.folder / name).read_bytes())
    return replace(artifact, folder=folder)


def test_broken_artifacts(built: tuple[onnx.ModelProto, Artifact], tmp_path: Path) -> None:
    artifact = copied(built[1], tmp_path)
    library = artifact.path("library")
    library.write_bytes(library.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match=r"model\.so: truncated or changed"):
        RUNTIME.open(artifact, threads=1)
    library.unlink()
    with pytest.raises(ArtifactError, match=r"model\.so: missing"):
        RUNTIME.open(artifact, threads=1)
    artifact.path("description").write_text("{")
    with pytest.raises(ArtifactError, match=r"model\.json: cannot be read"):
        RUNTIME.open(artifact, threads=1)
    artifact.path("description").write_text("{}")
    with pytest.raises(ArtifactError, match=r"model\.json: not written by s2d-deploy's TVM target"):
        RUNTIME.open(artifact, threads=1)
    with pytest.raises(ArtifactError, match="not a TVM artifact"):
        RUNTIME.open(replace(artifact, target="ort"), threads=1)


def test_an_artifact_built_again_at_the_same_place_is_the_new_one(tmp_path: Path) -> None:
    feeds, results = images(1), []
    for ending in ("Tanh", "Exp"):
        model = common_model()
        model.graph.node[-1].output[0] = "before"
        model.graph.node.append(helper.make_node(ending, ["before"], ["y"], "end"))
        onnx.save(model, tmp_path / "m.onnx")
        artifact = TARGET.build(tmp_path / "m.onnx", tmp_path, precision="w4a8", options={}, progress=lambda _: None)
        session = RUNTIME.open(artifact, threads=1)
        results.append((session, session.run(feeds)["y"]))
    # The first session still runs the library that it has loaded.
    np.testing.assert_array_equal(results[0][0].run(feeds)["y"], results[0][1])
    assert results[1][1].min() > 0
    assert results[0][1].min() < 0


def test_missing_processor_features_are_named(built: tuple[onnx.ModelProto, Artifact], tmp_path: Path) -> None:
    artifact = copied(built[1], tmp_path)
    about = json.loads(artifact.path("description").read_text())
    about["features"].append("amx_of_the_future")
    artifact.path("description").write_text(json.dumps(about))
    with pytest.raises(DeviceUnavailable, match=r"built for features that this processor lacks.*amx_of_the_future"):
        RUNTIME.open(artifact, threads=1)


def test_missing_package(built: tuple[onnx.ModelProto, Artifact], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tvm", None)
    with pytest.raises(RuntimeUnavailable, match=r"pip install 's2d-deploy\[tvm\]'"):
        RUNTIME.open(built[1], threads=1)
    with pytest.raises(RuntimeUnavailable, match=r"pip install 's2d-deploy\[tvm\]'"):
        TARGET.build(
            built[1].folder / "common.onnx", built[1].folder, precision="", options={}, progress=lambda _: None
        )


def test_a_closed_session_refuses(built: tuple[onnx.ModelProto, Artifact]) -> None:
    session = RUNTIME.open(built[1], threads=1)
    session.__enter__()
    session.__exit__(None, None, None)
    with pytest.raises(ArtifactError, match="this session is closed"):
        session.run(images(1))
    with pytest.raises(DataError, match="number of threads"):
        RUNTIME.open(built[1], threads=0)


def test_importing_the_adapter_does_not_import_tvm() -> None:
    code = (
        "import sys; from s2d_deploy.registry import load_runtime, load_target; r = load_runtime('tvm'); "
        "load_target('tvm'); r.available(), r.version(), r.device(), r.rung('w4a4'); assert 'tvm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert RUNTIME.rung("w4a4") == "emulated"
    assert RUNTIME.rung("w3a3") is None
