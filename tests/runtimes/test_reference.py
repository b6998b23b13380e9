"""The reference runtime beyond the contract: its own operators, block weights, feeds, and the script of its target."""

from __future__ import annotations

import math
from importlib import import_module

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from s2d_deploy.errors import ArtifactError, DataError, UnsupportedError
from s2d_deploy.registry import load_runtime, load_target

reference = import_module("s2d_deploy.runtimes.reference")
to_reference = import_module("s2d_deploy.export.to_reference")


def evaluate(op_type, inputs, **attributes):
    feeds = {f"i{n}": np.asarray(a) for n, a in enumerate(inputs)}
    values = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), None) for n, a in feeds.items()
    ]
    node = helper.make_node(op_type, list(feeds), ["y"], **attributes)
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "g", values, [out]), opset_imports=[helper.make_opsetid("", 21)]
    )
    ours = [reference.QuantizeLinear, reference.Erf, reference.Gelu]
    return ReferenceEvaluator(model, new_ops=ours).run(None, feeds)[0], ReferenceEvaluator(model).run(None, feeds)[0]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.int4, ml_dtypes.uint4])
@pytest.mark.parametrize(
    ("scale", "attributes"),
    [(np.float32(0.1), {}), ([0.1, 0.2, 0.3, 0.4], {"axis": 1}), ([[0.1, 0.2]] * 3, {"axis": 1, "block_size": 2})],
)
def test_quantize_linear_is_onnx_s(dtype, scale, attributes):
    scale = np.asarray(scale, np.float32)
    x = np.random.default_rng(0).normal(scale=5, size=(3, 4)).astype(np.float32)
    ours, onnx_s = evaluate("QuantizeLinear", [x, scale, np.full(scale.shape, 3).astype(dtype)], **attributes)
    assert ours.dtype == onnx_s.dtype == dtype
    assert ours.tolist() == onnx_s.tolist()


def test_quantize_linear_saturates_where_int32_would_wrap():
    x = np.array([3e9, -3e9, np.inf, -np.inf], np.float32)
    codes = reference.QuantizeLinear._run(None, x, np.float32(1), np.array(0, np.int8))[0]
    assert codes.tolist() == [127, -128, 127, -128]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_onnx_s(approximate):
    x = np.linspace(-6, 6, 301, dtype=np.float32)
    ours, onnx_s = evaluate("Gelu", [x], approximate=approximate)
    assert ours.dtype == np.float32
    # x times a number near 1 that a few roundings may move: 4 ULPs of the largest x.
    np.testing.assert_allclose(ours, onnx_s, rtol=0, atol=4 * 6 * 2.0**-23)


def test_erf_is_the_error_function():
    x = np.linspace(-6, 6, 301, dtype=np.float32)
    ours, _ = evaluate("Erf", [x])
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, [math.erf(v) for v in x.tolist()], rtol=0, atol=2.0**-23)


def block_model():
    """y = x @ w, W4A8 with blocks of 4 along K = 8."""
    rng = np.random.default_rng(1)
    codes = rng.integers(-8, 8, size=(8, 3))
    scales = rng.uniform(0.01, 0.1, size=(2, 3)).astype(np.float32)
    tensors = {
        "xs": np.float32(0.05),
        "xz": np.array(2, np.int8),
        "w": codes.astype(ml_dtypes.int4),
        "ws": scales,
        "wz": np.zeros((2, 3)).astype(ml_dtypes.int4),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["q"], "fc.input.quantize"),
        helper.make_node("DequantizeLinear", ["q", "xs", "xz"], ["dx"], "fc.input.dequantize"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], "fc.weight.dequantize", axis=0, block_size=4),
        helper.make_node("MatMul", ["dx", "dw"], ["y"], "fc"),
    ]
    for key, value in (("s2d.macs", "24"), ("s2d.declared", "W4A8")):
        nodes[-1].metadata_props.add(key=key, value=value)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), codes, scales


def test_block_weights_with_integer_activations_are_exact():
    model, codes, scales = block_model()
    x = np.random.default_rng(2).normal(size=(5, 8)).astype(np.float32)
    session = reference.ReferenceSession(model)
    found = session.run({"x": x})["y"]
    shifted = np.clip(np.rint(x / np.float32(0.05)) + 2, -128, 127).astype(np.int64) - 2
    expected = np.zeros((5, 3), np.float32)
    for b in range(2):
        sums = shifted[:, 4 * b : 4 * b + 4] @ codes[4 * b : 4 * b + 4]
        expected += sums.astype(np.float32) * (np.float32(0.05) * scales[b])
    assert found.tobytes() == expected.tobytes()
    assert session.audit().executed == {"int8": 1.0}
    assert session.audit().rung == "emulated"
    with pytest.raises(UnsupportedError, match=r"op 'fc' has no single integer accumulator.*Found: declared W4A8"):
        session.accumulate("fc", np.zeros((1, 8), np.int8))


def test_named_dimensions_must_agree(exported):
    session = reference.ReferenceSession(onnx.load(exported("bert", "w8a8").path))
    ids = np.zeros((2, 5), np.int64)
    with pytest.raises(DataError) as caught:
        session.run({"input_ids": ids, "attention_mask": np.ones((2, 4), np.int64)})
    assert str(caught.value) == (
        "input 'attention_mask': dimension 'sequence' disagrees with input 'input_ids'. Expected: 5. "
        "Found: 4 in shape 2x4."
    )


def test_wrong_operands_of_accumulate_are_named(exported):
    session = reference.ReferenceSession(onnx.load(exported("vit", "w8a8").path))
    name = "vit.layers.0.mlp.fc1"
    codes = np.zeros((1, 17, 32), np.int8)
    with pytest.raises(DataError, match=rf"op '{name}': wrong operands\. Expected: codes of the left operand only"):
        session.accumulate(name, codes, codes)
    with pytest.raises(DataError, match=r"wrong operands\. Expected: codes of both operands\. Found: one"):
        session.accumulate("vit.layers.0.attention.scores", codes)
    with pytest.raises(DataError, match=rf"site '{name}\.input': wrong codes\. Expected: int8\. Found: uint8"):
        session.accumulate(name, codes.astype(np.uint8))
    with pytest.raises(DataError, match=rf"op '{name}': wrong shapes\. Expected: K = 32 on both sides\."):
        session.accumulate(name, codes[..., :31])
    with pytest.raises(UnsupportedError, match=r"op 'gone' .*Found: no such op"):
        session.accumulate("gone", codes)


def test_a_file_of_another_precision_is_refused(exported, tmp_path):
    path = exported("vit", "w8a8").path
    with pytest.raises(ArtifactError) as caught:
        load_target("reference").dialect(path, tmp_path, precision="w4a4")
    assert "not the common ONNX file for this precision. Expected: s2d.precision 'w4a4'" in str(caught.value)
    assert "Found: 'w8a8'." in str(caught.value)


@pytest.mark.parametrize(
    ("precision", "rung"),
    [("fp32", "float"), ("w4a16", "weight-only"), ("w8a8", "emulated"), ("w3a5", "emulated"), ("w9a9", None)],
)
def test_rungs(precision, rung):
    assert load_runtime("reference").rung(precision) == rung


def test_the_script_makes_an_artifact(exported, tmp_path, capsys):
    assert to_reference.main([str(exported("vit", "w4a4").path), str(tmp_path / "out")]) == 0
    assert "w4a4" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.onnx").read_bytes() == exported("vit", "w4a4").path.read_bytes()
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    assert to_reference.main([str(tmp_path / "bad.onnx"), str(tmp_path / "out")]) == 2
    assert "bad.onnx: not a readable ONNX file" in capsys.readouterr().out
