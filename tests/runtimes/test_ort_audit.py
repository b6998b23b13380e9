"""Audit of any ONNX model: what is declared, what ONNX Runtime executes, and every refusal's text.

The graphs are written by hand, so that what each must give is known: multiply-accumulates by shapes, arithmetic by
what ONNX Runtime's fusions are documented, or were found, to do.
"""

from __future__ import annotations

import json
from importlib.util import find_spec

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from s2d_deploy.audit import audit_onnx, audit_text, parse_shapes
from s2d_deploy.cli import main
from s2d_deploy.errors import (
    ArtifactError,
    DataError,
    DeviceUnavailable,
    ModelError,
    RecipeError,
    UnsupportedError,
)

pytestmark = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime is not installed")
TYPES = {"int8": np.int8, "uint8": np.uint8, "int4": ml_dtypes.int4}


class Graph:
    """Nodes and initializers of a foreign model: no metadata of ours."""

    def __init__(self, shape=(2, 5, 16), kind=TensorProto.FLOAT):
        self.nodes, self.stored = [], []
        self.input = helper.make_tensor_value_info("x", kind, shape)

    def constant(self, name, array):
        self.stored.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def add(self, op, inputs, output, name=None, **attributes):
        self.nodes.append(helper.make_node(op, inputs, [output], name=output if name is None else name, **attributes))
        return output

    def activation(self, value, kind="uint8", scale=0.02, zero=128):
        name = f"{value}.q"
        inputs = [
            self.constant(f"{name}.scale", np.float32(scale)),
            self.constant(f"{name}.zero", np.asarray(zero).astype(TYPES[kind])),
        ]
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [value, *inputs], name), *inputs], f"{name}.dq")

    def weight(self, shape, kind="int8", axis=1, block=None, scale=None, name="w"):
        rng = np.random.default_rng(0)
        low, high = (-7, 8) if kind == "int4" else (-127, 128)
        sizes = list(shape)
        if block is not None:
            sizes[axis] //= block
        else:
            sizes = [shape[axis]]
        values = rng.uniform(0.01, 1, sizes).astype(np.float32) if scale is None else np.full(sizes, scale, np.float32)
        inputs = [
            self.constant(name, rng.integers(low, high, shape).astype(TYPES[kind])),
            self.constant(f"{name}.scale", values),
            self.constant(f"{name}.zero", np.zeros(sizes, TYPES[kind])),
        ]
        attributes = {"axis": axis} | ({} if block is None else {"block_size": block})
        return self.add("DequantizeLinear", inputs, f"{name}.dq", **attributes)

    def model(self, output, opset=21, ir=10, kind=TensorProto.FLOAT, domains=()):
        shown = helper.make_tensor_value_info(output, kind, None)
        graph = helper.make_graph(self.nodes, "foreign", [self.input], [shown], self.stored)
        imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
        model = helper.make_model(graph, opset_imports=imports)
        model.ir_version = ir
        return model


def linear(k=16, n=16, axis=1, requantized=False, activation="uint8", weight="int8", block=None):
    graph = Graph((2, 5, k))
    left = "x" if activation is None else graph.activation("x", activation, zero=128 if activation == "uint8" else 0)
    graph.add("MatMul", [left, graph.weight((k, n), weight, axis, block)], "fc")
    if requantized:
        graph.activation("fc", scale=0.5)
    return graph.model("fc.q.dq" if requantized else "fc")


def audited(model, folder, *shapes, **options):
    path = folder / "foreign.onnx"
    onnx.save(model, path)
    settings = {"providers": (), "level": "all", "threads": 1} | options
    return audit_onnx(path, shapes, **settings)


def test_what_is_fused_as_declared_passes(tmp_path):
    document = audited(linear(), tmp_path)
    (layer,) = document["layers"]
    assert layer["macs"] == document["macs"] == 2 * 5 * 16 * 16
    assert (layer["declared"], layer["kernel"], layer["executed"]) == ("W8A8", "MatMulIntegerToFloat", "int8")
    assert layer["microseconds"] >= 0
    assert document["declared"] == {"W8A8": 1.0}
    assert document["executed"] == {"int8": 1.0}
    assert document["differ"] == []
    json.dumps(document, allow_nan=False)
    assert "1 of 1 layers run as declared" in audit_text(document)


def test_without_optimization_the_same_graph_is_float(tmp_path):
    document = audited(linear(), tmp_path, level="disable")
    assert document["differ"] == ["fc"]
    assert document["executed"] == {"float32": 1.0}
    assert "declared W8A8, computed in float32 by MatMul from dequantized values" in audit_text(document)


def test_scales_along_the_summed_axis_are_found_where_the_kernel_ignores_their_axis(tmp_path):
    """K = N, so that the kernel takes the scales of K for those of N: the session's outputs are wrong, and no error."""
    document = audited(linear(axis=0), tmp_path)
    assert document["layers"][0]["kernel"] == "MatMulIntegerToFloat"
    assert document["outputs"]["fc"] < 10
    (text,) = [row["differs"] for row in document["layers"]]
    assert text == (
        "MatMulIntegerToFloat ignores the axis of its scales, so its output is wrong: weight scales lie along axis 0, "
        "which is summed over; an integer kernel reads them as axis 1"
    )
    right = audited(linear(axis=1), tmp_path)
    assert right["outputs"]["fc"] is None or right["outputs"]["fc"] > 100


def test_scales_along_the_summed_axis_in_front_of_a_quantizer_are_named_too(tmp_path):
    """onnxruntime 1.32 computes this one in float; 1.24 takes QLinearMatMul, and is wrong again."""
    (layer,) = audited(linear(axis=0, requantized=True), tmp_path)["layers"]
    assert layer["executed"] in ("float32", "int8")
    assert layer["differs"].endswith("an integer kernel reads them as axis 1")


@pytest.mark.parametrize(
    ("activation", "block", "declared", "executed", "differs"),
    [
        (None, 16, "W4A16", "int8", "declared W4A16, but MatMulNBits rounds activations to INT8"),
        ("uint8", 16, "W4A8", "float32", "declared W4A8, computed in float32 by "),
        ("int4", None, "W4A4", "float32", "declared W4A4, computed in float32 by MatMul"),
    ],
)
def test_four_bits(tmp_path, activation, block, declared, executed, differs):
    axis = 0 if block else 1
    model = linear(32, 32, axis, activation=activation, weight="int4", block=block)
    (layer,) = audited(model, tmp_path)["layers"]
    assert layer["declared"] == declared
    assert layer["executed"] == executed
    assert layer["differs"].startswith(differs)
    assert bool(layer["differs"]) is bool(differs)


def test_convolutions_and_gemm_are_counted(tmp_path):
    graph = Graph((3, 4, 8, 8))
    conv = graph.add("Conv", [graph.activation("x"), graph.weight((6, 2, 3, 3), axis=0)], "conv", group=2)
    flat = graph.add("Flatten", [graph.activation(conv, scale=1.0)], "flat")
    right = graph.weight((10, 6 * 36), axis=0, name="v")
    graph.add("Gemm", [graph.activation(flat, scale=1.0), right], "head", transB=1)
    document = audited(graph.model("head"), tmp_path)
    macs = {row["name"]: row["macs"] for row in document["layers"]}
    assert macs == {"conv": 3 * 6 * 36 * 2 * 9, "head": 3 * 10 * 216}
    assert {row["executed"] for row in document["layers"]} == {"int8"}
    assert document["differ"] == []


def test_a_float_attention_is_counted_by_its_shapes(tmp_path):
    graph = Graph((2, 7, 16))
    graph.add("MultiHeadAttention", ["x", "x", "x"], "mha", num_heads=2, domain="com.microsoft")
    document = audited(graph.model("mha", domains=["com.microsoft"]), tmp_path)
    (layer,) = document["layers"]
    assert layer["macs"] == 2 * (2 * 7 * 7 * 16)
    assert (layer["declared"], layer["executed"], layer["differs"]) == ("float", "float32", "")


def test_half_precision_that_the_cpu_computes_in_float32_is_seen(tmp_path):
    graph = Graph((2, 5, 16), TensorProto.FLOAT16)
    graph.add("MatMul", ["x", graph.constant("w", np.ones((16, 4), np.float16))], "fc")
    document = audited(graph.model("fc", kind=TensorProto.FLOAT16), tmp_path)
    (layer,) = document["layers"]
    assert layer["macs"] == 2 * 5 * 16 * 4
    assert layer["executed"] in ("float16", "float32")


def test_unnamed_nodes_external_weights_and_open_dimensions(tmp_path):
    graph = Graph(("batch", "sequence", 64))
    left = graph.activation("x")
    graph.add("MatMul", [left, graph.weight((64, 64))], "fc", name="")
    model = graph.model("fc")
    onnx.save_model(
        model,
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
        convert_attribute=True,
    )
    document = audit_onnx(tmp_path / "m.onnx", ["sequence=9"], (), "all", 1)
    assert document["shapes"] == {"x": [1, 9, 64]}
    assert document["macs"] == 9 * 64 * 64
    assert document["differ"] == []
    assert audit_onnx(tmp_path / "m.onnx", ["x=2x3x64"], (), "all", 1)["macs"] == 2 * 3 * 64 * 64
    with pytest.raises(DataError, match=r"input 'x': dimension 1 \('sequence'\) is open\. Fix: --shape sequence=128"):
        audit_onnx(tmp_path / "m.onnx", [], (), "all", 1)
    with pytest.raises(DataError, match=r"--shape x\. Expected: batchxsequencex64\. Found: 2x3x65"):
        audit_onnx(tmp_path / "m.onnx", ["x=2x3x65"], (), "all", 1)
    with pytest.raises(DataError, match=r"--shape y: .* Expected: an input \(x\) or a dimension \(batch, sequence\)"):
        audit_onnx(tmp_path / "m.onnx", ["y=3"], (), "all", 1)
    (tmp_path / "m.data").unlink()
    with pytest.raises(ArtifactError, match=r"its weights are missing\. Expected: m\.data"):
        audit_onnx(tmp_path / "m.onnx", ["sequence=9"], (), "all", 1)


@pytest.mark.parametrize(
    ("scale", "said"),
    [(0.0, "zero"), (-1.0, "negative"), (np.inf, "infinite"), (np.nan, "NaN"), (1e-40, "denormal (below 1.2e-38)")],
)
def test_scales_that_nothing_can_divide_by(tmp_path, scale, said):
    graph = Graph()
    graph.add("MatMul", [graph.activation("x", scale=scale), graph.weight((16, 4), scale=scale)], "fc")
    with pytest.raises(ModelError, match="3 quantizer") as caught:
        audited(graph.model("fc"), tmp_path)
    assert f"x.q: {said}; x.q.dq: {said}; w.dq: {said}" in str(caught.value)


def foreign(op="Relu", opset=21, ir=10, domain="", domains=(), kind=TensorProto.FLOAT):
    graph = Graph((2, 4), kind)
    graph.add(op, ["x"], "y", domain=domain)
    return graph.model("y", opset, ir, kind, domains)


@pytest.mark.parametrize(
    ("model", "kind", "text"),
    [
        (foreign("Foo"), UnsupportedError, r"operator Foo is not in opset 21"),
        (foreign("Gelu", opset=12), UnsupportedError, r"operator Gelu is not in opset 12"),
        (foreign("Foo", domain="my.ops", domains=["my.ops"]), UnsupportedError, r"operator Foo of domain 'my.ops'"),
        (
            foreign("Foo", domain="my.ops"),
            UnsupportedError,
            r"domain 'my.ops' is used, but the model does not import it",
        ),
        (foreign(opset=90), UnsupportedError, r"opset 90 is newer than this onnxruntime\. Fix: export with an older"),
        (foreign(ir=99), UnsupportedError, r"IR version 99 is newer than this onnxruntime, which reads up to \d+"),
        (foreign(kind=TensorProto.BFLOAT16), UnsupportedError, r"node 'y': Relu has no kernel for its types here"),
        (foreign("MatMul"), ModelError, r"onnxruntime .* refuses the model\. Found: .*MatMul"),
    ],
)
def test_models_that_onnxruntime_refuses(tmp_path, model, kind, text):
    with pytest.raises(kind, match=text):
        audited(model, tmp_path)


def test_shapes_on_the_command_line():
    assert parse_shapes(["x=1x3x8x8", "sequence=128"]) == {"x": (1, 3, 8, 8), "sequence": (128,)}
    for wrong in ("x", "x=", "=3", "x=1xx2", "x=0", "x=-1"):
        with pytest.raises(RecipeError, match="Expected: NAME=1x3x224x224 for an input"):
            parse_shapes([wrong])
    with pytest.raises(RecipeError, match="--shape x: given twice"):
        parse_shapes(["x=1", "x=2"])


def test_a_runtime_that_cannot_is_named():
    with pytest.raises(UnsupportedError, match="runtime 'reference' audits no foreign files"):
        audit_onnx(None, (), (), "all", 1, runtime="reference")


def test_a_provider_that_is_not_here(tmp_path):
    with pytest.raises(DeviceUnavailable, match="has no provider XnnpackExecutionProvider here"):
        audited(linear(), tmp_path, providers=("xnnpack",))


def test_the_command_says_it_and_its_exit_code(tmp_path, capsys):
    good, bad = tmp_path / "good.onnx", tmp_path / "bad.onnx"
    onnx.save(linear(), good)
    onnx.save(linear(activation="int4", weight="int4"), bad)
    assert main(["audit", str(good)]) == 0
    assert "100.0% W8A8" in capsys.readouterr().out
    assert main(["audit", str(bad), "--layers", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["differ"] == ["fc"]
    assert main(["audit", str(tmp_path / "none.onnx")]) == 2
    assert (
        capsys.readouterr().err == f"error: {tmp_path}/none.onnx: no such file. Fix: give the path of an ONNX file.\n"
    )
    assert main(["audit", str(good), "--provider", "xnnpack"]) == 3
    (tmp_path / "text.onnx").write_text("not an ONNX file")
    assert main(["audit", str(tmp_path / "text.onnx")]) == 2
    assert "not a readable ONNX file" in capsys.readouterr().err
