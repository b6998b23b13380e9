"""Hand-made graphs in the common form (docs/architecture.md, section 4), for tests of targets and runtimes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

TYPES = {"INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4, "INT8": np.int8, "UINT8": np.uint8}
RANGES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}


class Common:
    """Collects nodes; `model` checks and returns the whole. Inputs are float32 with a dynamic first dimension."""

    def __init__(self, precision: str, **inputs: tuple[int, ...]) -> None:
        self.precision, self.nodes, self.stored = precision, [], {}
        self.inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape]) for name, shape in inputs.items()
        ]

    def constant(self, name, array):
        self.stored[name] = numpy_helper.from_array(np.asarray(array), name)
        return name

    def add(self, op_type, inputs, output, name=None, props=None, **attributes):
        node = helper.make_node(op_type, inputs, [output], name=name or output, **attributes)
        for key, value in (props or {}).items():
            entry = node.metadata_props.add()
            entry.key, entry.value = key, value
        self.nodes.append(node)
        return output

    def activation(self, value, site, storage, scale, zero_point=0):
        """Q/DQ of `value`; `site` may list several, separated by commas. Returns the dequantized value."""
        first = site.split(",")[0]
        inputs = [
            self.constant(f"{first}.scale", np.float32(scale)),
            self.constant(f"{first}.zero_point", np.asarray(zero_point).astype(TYPES[storage])),
        ]
        props = {"s2d.site": site}
        codes = self.add("QuantizeLinear", [value, *inputs], f"{first}.codes", f"{first}.quantize", props)
        return self.add("DequantizeLinear", [codes, *inputs], f"{first}.value", f"{first}.dequantize", props)

    def weight(self, site, storage, codes, scale, zero_point=None, **attributes):
        scale = np.asarray(scale, np.float32)
        zeros = np.zeros(scale.shape, np.int8) if zero_point is None else np.asarray(zero_point)
        inputs = [
            self.constant(f"{site}.codes", codes.astype(TYPES[storage])),
            self.constant(f"{site}.scale", scale),
            self.constant(f"{site}.zero_point", zeros.astype(TYPES[storage])),
        ]
        return self.add(
            "DequantizeLinear", inputs, f"{site}.value", f"{site}.dequantize", {"s2d.site": site}, **attributes
        )

    def op(self, kind, name, inputs, declared, macs=1, **attributes):
        props = {"s2d.op": name, "s2d.macs": str(macs), "s2d.declared": declared}
        return self.add(kind, inputs, f"{name}.product", name, props, **attributes)

    def model(self, *outputs):
        shown = [helper.make_empty_tensor_value_info(name) for name in outputs]
        for value in shown:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
        graph = helper.make_graph(self.nodes, "common", self.inputs, shown, list(self.stored.values()))
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
        model.ir_version = 10
        entry = model.metadata_props.add()
        entry.key, entry.value = "s2d.precision", self.precision
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
        onnx.checker.check_model(inferred)
        return inferred


def quantized(x, storage, scale, zero_point=0):
    """The definition: ``clamp(round_half_even(x / scale) + zero_point)``, int64."""
    codes = np.rint(x.astype(np.float32) / np.float32(scale)).astype(np.float64) + zero_point
    return np.clip(codes, *RANGES[storage]).astype(np.int64)


def linear(precision, storage, activation, *, k=24, n=10, seed=0, zero_point=0, weight_zeros=False, bias=True):
    """``x [batch, 5, k]`` -> one quantized Linear ``fc`` -> ``y``; returns the model and its weights.

    Returns:
        (model, weight codes [k, n], weight scale [n], weight zero points [n], bias [n], activation scale)
    """
    rng = np.random.default_rng(seed)
    low, high = RANGES[storage]
    codes = rng.integers(low, high + 1, (k, n))
    zeros = rng.integers(low, high + 1, n) if weight_zeros else np.zeros(n, np.int64)
    scale = rng.uniform(0.01, 0.1, n).astype(np.float32)
    offset = rng.normal(size=n).astype(np.float32)
    step = np.float32(0.25 if activation.endswith("4") else 0.02)
    common = Common(precision, x=(5, k))
    left = common.activation("x", "fc.input", activation, step, zero_point)
    right = common.weight("fc.weight", storage, codes, scale, zeros, axis=1)
    product = common.op("MatMul", "fc", [left, right], precision.upper(), macs=5 * k * n)
    if bias:
        product = common.add("Add", [product, common.constant("fc.bias", offset)], "sum")
    common.add("Identity", [product], "y")
    return common.model("y"), codes, scale, zeros, offset if bias else np.zeros(n, np.float32), step
