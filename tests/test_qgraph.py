"""Reading contractions and their operands out of hand-made ONNX graphs."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from s2d_deploy.errors import ArtifactError
from s2d_deploy.qgraph import attributes, contractions, load_model, metadata


def model(nodes, **tensors):
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(a), n) for n, a in tensors.items()],
        ),
        opset_imports=[helper.make_opsetid("", 21)],
    )


def node(op_type, inputs, outputs, name="", meta=None, **attrs):
    made = helper.make_node(op_type, inputs, outputs, name, **attrs)
    for key, value in (meta or {}).items():
        made.metadata_props.add(key=key, value=value)
    return made


PAIR = [
    node("QuantizeLinear", ["x", "xs", "xz"], ["q"]),
    node("DequantizeLinear", ["q", "xs", "xz"], ["dx"], "a", {"s2d.site": "fc.input,other.input"}),
]
X = {"xs": np.float32(0.5), "xz": np.array(3, np.int8)}


def weight(scale, zero_point, dtype=ml_dtypes.int4, shape=(4, 2), **attrs):
    codes = (np.arange(np.prod(shape)).reshape(shape) % 8).astype(dtype)
    nodes = [node("DequantizeLinear", ["w", "ws", "wz"], ["dw"], "b", {"s2d.site": "fc.weight"}, **attrs)]
    return nodes, {"w": codes, "ws": np.asarray(scale, np.float32), "wz": np.asarray(zero_point).astype(dtype)}


MATMUL = node("MatMul", ["dx", "dw"], ["y"], "fc", {"s2d.op": "fc", "s2d.macs": "8", "s2d.declared": "W4A8"})


def test_an_integer_product():
    nodes, tensors = weight([0.1, 0.2], [0, 0], axis=1)
    (c,) = contractions(model([*PAIR, *nodes, MATMUL], **X, **tensors))
    assert (c.name, c.declared, c.macs, c.integer) == ("fc", "W4A8", 8, True)
    assert (c.left.site, c.left.codes, c.left.dequantized, c.left.storage) == ("fc.input", "q", "dx", "INT8")
    assert (c.left.scale.item(), c.left.zero_point.item(), c.left.axis, c.left.stored) == (0.5, 3, None, None)
    assert (c.right.site, c.right.storage, c.right.axis, c.right.block) == ("fc.weight", "INT4", 1, None)
    assert c.right.stored.dtype == np.int8
    assert c.right.stored.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert c.right.zero_point.dtype == np.int8


@pytest.mark.parametrize(
    ("scale", "axis", "block", "integer"),
    [
        (0.1, None, None, True),
        ([0.1, 0.2], 1, None, True),
        ([0.1] * 4, 0, None, False),  # one for each k: it cannot leave the sum
        ([[0.1, 0.2]] * 2, 0, 2, False),
    ],
)
def test_which_scales_leave_the_inner_sum(scale, axis, block, integer):
    attrs = {} if axis is None else {"axis": axis} | ({"block_size": block} if block else {})
    nodes, tensors = weight(scale, np.zeros_like(scale), **attrs)
    (c,) = contractions(model([*PAIR, *nodes, MATMUL], **X, **tensors))
    assert c.integer is integer
    assert (c.right.axis, c.right.block) == (axis, block)


@pytest.mark.parametrize(("axis", "integer"), [(0, True), (1, False)])
def test_a_convolution_s_channels_come_first(axis, integer):
    nodes, tensors = weight([0.1] * 3, [0] * 3, np.int8, (3, 3, 1, 1), axis=axis)
    conv = node("Conv", ["dx", "dw"], ["y"], "conv")
    (c,) = contractions(model([*PAIR, *nodes, conv], **X, **tensors))
    assert c.integer is integer


def test_float_operands_are_none():
    nodes, tensors = weight([0.1, 0.2], [0, 0], axis=1)
    (c,) = contractions(model([*nodes, node("MatMul", ["x", "dw"], ["y"], "fc")], **tensors))
    assert c.left is None
    assert c.right is not None
    assert (c.integer, c.declared, c.macs, c.name) == (False, "float", 0, "fc")
    (c,) = contractions(model([node("MatMul", ["x", "w"], ["y"], "fc")], w=np.ones((4, 2), np.float32)))
    assert (c.left, c.right) == (None, None)


def test_a_scale_made_at_run_time_is_no_stored_operand():
    made = [node("Abs", ["xs0"], ["xs"]), *PAIR]
    nodes, tensors = weight([0.1, 0.2], [0, 0], axis=1)
    (c,) = contractions(model([*made, *nodes, MATMUL], xs0=np.float32(0.5), xz=X["xz"], **tensors))
    assert c.left is None
    assert not c.integer


def test_contractions_come_in_graph_order():
    nodes = [
        node("MatMul", ["x", "w"], ["a"], "one"),
        node("Relu", ["a"], ["b"]),
        node("MatMul", ["b", "w"], ["y"], "two"),
    ]
    assert [c.name for c in contractions(model(nodes, w=np.ones((4, 4), np.float32)))] == ["one", "two"]


def test_a_missing_zero_point_is_named():
    nodes = [node("DequantizeLinear", ["w", "ws"], ["dw"], "b"), node("MatMul", ["x", "dw"], ["y"])]
    tensors = {"w": np.ones((4, 2), np.int8), "ws": np.float32(0.1)}
    with pytest.raises(ArtifactError, match=r"b: DequantizeLinear without a zero point\. Fix: export it again\."):
        contractions(model(nodes, **tensors))


def test_attributes_and_metadata_as_python_values():
    n = node("Conv", ["x", "w"], ["y"], "c", {"k": "v"}, strides=[2, 1], group=2)
    assert attributes(n) == {"strides": [2, 1], "group": 2}
    assert metadata(n) == {"k": "v"}


def test_files_that_are_no_models(tmp_path):
    nodes, tensors = weight([0.1, 0.2], [0, 0], axis=1)
    whole = model([*PAIR, *nodes, MATMUL], **X, **tensors).SerializeToString()
    for name, blob in {"cut": whole[: len(whole) // 2], "text": b"hello, this is no model", "empty": b""}.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(blob)
        with pytest.raises(
            ArtifactError, match=rf"{name}\.onnx: (not a readable ONNX file|an ONNX file without nodes)"
        ):
            load_model(path)
    with pytest.raises(ArtifactError, match=r"gone\.onnx: not a readable ONNX file\. Found: FileNotFoundError"):
        load_model(tmp_path / "gone.onnx")
    (tmp_path / "whole.onnx").write_bytes(whole)
    assert isinstance(load_model(tmp_path / "whole.onnx"), onnx.ModelProto)
