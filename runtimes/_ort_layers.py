"""What an ONNX model declares, layer by layer: any model, whoever wrote it.

A layer is a contraction: a matrix product, a convolution, a fused attention. What it declares stands in our metadata
(``s2d.declared``) where it has any. Otherwise it is read off the graph: operands behind DequantizeLinear are codes, and
their width is that of the codes' type; an integer operator declares itself. ``W4A16`` is INT4 weights and float
activations; of two activations (attention) the right one stands for the weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from s2d_deploy.qgraph import attributes, initializers, metadata

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Einsum", "GemmFloat8")
CONVOLUTIONS = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "ConvInteger", "QLinearConv")
ATTENTIONS = ("Attention", "QAttention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention")
INTEGERS = (
    "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "QLinearConv", "QLinearMatMul",
    "QGemm", "QAttention",
)  # fmt: skip
NBITS = "MatMulNBits"
KINDS = frozenset({*PRODUCTS, *CONVOLUTIONS, *ATTENTIONS, *INTEGERS, NBITS})
UNCOUNTED = ("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM")  # they multiply, too; nobody here takes them apart
INT8_LEVEL = 4  # MatMulNBits accuracy_level that rounds activations to INT8
_MOVES = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Identity", "Cast", "Clip", "Expand", "Slice", "Concat")
_REACH = 8
# Where the weight stands, for operators whose right operand is not their second input.
_RIGHT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
_BITS = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}


@dataclass(frozen=True, slots=True)
class Layer:
    """One contraction of a model as it was written.

    Attributes:
        name: its op's name in our metadata, else the node's.
        node: the node.
        declared: ``"W8A8"``, ``"W4A16"``, ..., ``"float"``.
        problem: why no integer kernel can compute what the graph says, or "".
    """

    name: str
    node: onnx.NodeProto
    declared: str
    problem: str = ""


def named(model: onnx.ModelProto) -> bool:
    """Give every node of the main graph a name of its own; whether any was changed."""
    taken: set[str] = set()
    changed = False
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in taken:
            node.name = f"{node.name or node.op_type}_{i}"
            changed = True
        taken.add(node.name)
    return changed


def layers_of(model: onnx.ModelProto) -> list[Layer]:
    """Every contraction of the main graph, in its order."""
    producers = {value: node for node in model.graph.node for value in node.output}
    stored = {**initializers(model), **_constants(model)}
    result = []
    for node in model.graph.node:
        if node.op_type not in KINDS:
            continue
        props = metadata(node)
        declared = props.get("s2d.declared", "float")
        if declared == "float":  # also what is left of ours where another tool has quantized the model since
            declared = _declared(node, producers, stored)
        name = props.get("s2d.op", node.name)
        result.append(Layer(name, node, declared, "" if declared == "float" else _problem(node, producers, stored)))
    return result


def integer(declared: str) -> bool:
    """Whether a declaration promises integer products: codes on both sides."""
    widths = re.fullmatch(r"W(\d+)A(\d+)", declared)
    return widths is not None and all(int(w) < 16 for w in widths.groups())


def bad_scales(model: onnx.ModelProto) -> list[str]:
    """``"<node>: <what is wrong>"`` for every quantizer whose stored scale nothing can divide by."""
    stored = {**initializers(model), **_constants(model)}
    wrong = []
    for node in model.graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.input[1] not in stored:
            continue
        tensor = stored[node.input[1]]
        if tensor.data_location == TensorProto.EXTERNAL and not tensor.raw_data:
            continue
        scale = numpy_helper.to_array(tensor)
        if (text := _scale_problem(scale)) is not None:
            wrong.append(f"{node.name}: {text}")
    return wrong


def _scale_problem(scale: np.ndarray) -> str | None:
    values = scale.astype(np.float64)
    if np.isnan(values).any():
        return "NaN"
    if np.isinf(values).any():
        return "infinite"
    if (values == 0).any():
        return "zero"
    if (values < 0).any():
        return "negative"
    # Below the smallest normal number processors compute slowly or flush to zero; 16-bit scales lie there by right.
    if scale.dtype == np.float32 and (values < np.finfo(np.float32).tiny).any():
        return "denormal (below 1.2e-38)"
    return None


def macs_of(
    node: onnx.NodeProto,
    inputs: Sequence[tuple[str, tuple[int, ...]]],
    outputs: Sequence[tuple[str, tuple[int, ...]]],
    stored: Mapping[str, onnx.TensorProto],
) -> int:
    """Multiply-accumulates of one run of a contraction, by the shapes that a profile shows; 0 where they do not say.

    Args:
        node: the node, for its attributes and weight.
        inputs, outputs: (type, shape) as in `Event`.
        stored: initializers, since kernels that pack their weights show no shape of them.
    """
    if not inputs or not outputs:
        return 0
    values, left, out = attributes(node), inputs[0][1], outputs[0][1]
    weight = next((tuple(stored[n].dims) for n in node.input[1:] if n in stored and len(stored[n].dims) > 1), None)
    if node.op_type in CONVOLUTIONS:
        if weight is None:
            weight = next((shape for _, shape in inputs[1:] if len(shape) == len(left)), None)
        if weight is None:
            return 0
        whole = left if node.op_type == "ConvTranspose" else out
        return math.prod(whole) * math.prod(weight[1:])
    if node.op_type in ATTENTIONS:
        return _attention_macs(node, [shape for _, shape in inputs], out, weight)
    if node.op_type == "Einsum":
        return _einsum_macs(values, [shape for _, shape in inputs])
    if node.op_type == NBITS:
        return math.prod(out) * int(values["K"])
    if not left:
        return 0
    return math.prod(out) * (left[0] if values.get("transA") and len(left) == 2 else left[-1])


def _attention_macs(
    node: onnx.NodeProto, shapes: Sequence[tuple[int, ...]], out: tuple[int, ...], weight: tuple[int, ...] | None
) -> int:
    """Scores and context: 2 x queries x keys x width; and the projection where the operator holds one."""
    query = shapes[0]
    if node.op_type in ("Attention", "QAttention", "PackedAttention") and weight is not None:
        # com.microsoft: input (B, S, D), weight (D, 3 x width)
        batch, length = (query[0], query[1]) if len(query) == 3 else (1, query[0])
        return batch * length * math.prod(weight) + 2 * batch * length * length * out[-1]
    keys = shapes[1] if len(shapes) > 1 else query
    if len(query) == 4:  # ai.onnx: (B, heads, S, size)
        return 2 * math.prod(query) * keys[2]
    if len(query) == 3 and len(keys) == 3:
        return 2 * math.prod(query) * keys[1]
    return 0


def _einsum_macs(values: Mapping[str, object], shapes: Sequence[tuple[int, ...]]) -> int:
    equation = values.get("equation", b"")
    terms = (equation.decode() if isinstance(equation, bytes) else str(equation)).replace(" ", "").split("->")[0]
    sizes: dict[str, int] = {}
    for term, shape in zip(terms.split(","), shapes, strict=False):
        if len(term) != len(shape):
            return 0
        sizes.update(zip(term, shape, strict=True))
    return math.prod(sizes.values())


def _declared(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], stored: Mapping[str, TensorProto]) -> str:
    if node.op_type == NBITS:
        values = attributes(node)
        activations = 8 if values.get("accuracy_level", 0) == INT8_LEVEL else 16
        return f"W{values.get('bits', 4)}A{activations}"
    if node.op_type in INTEGERS:
        return "W8A8"
    if node.op_type in ATTENTIONS or len(node.input) < 2:
        return "float"
    left, right = (_width(name, producers, stored) for name in node.input[:2])
    if right is None:  # rounded activations alone promise no integer product
        return "float"
    return f"W{right}A{left or 16}" if left is not None or _is_weight(node.input[1], producers, stored) else "float"


def _dequantizer(name: str, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The DequantizeLinear that makes a value, possibly behind nodes that only move it, or a per-token scale."""
    for _ in range(_REACH):
        node = producers.get(name)
        if node is None:
            return None
        if node.op_type == "DequantizeLinear":
            return node
        if node.op_type == "Mul":
            inner = producers.get(node.input[0])
            return inner if inner is not None and inner.op_type == "DequantizeLinear" else None
        if node.op_type not in _MOVES:
            return None
        name = node.input[0]
    return None


def _width(name: str, producers: Mapping[str, onnx.NodeProto], stored: Mapping[str, TensorProto]) -> int | None:
    node = _dequantizer(name, producers)
    if node is None:
        return None
    kind: int = TensorProto.INT8
    if node.input[0] in stored:
        kind = stored[node.input[0]].data_type
    elif len(node.input) > 2 and node.input[2] in stored:
        kind = stored[node.input[2]].data_type
    text = TensorProto.DataType.Name(kind)
    if text in ("INT16", "UINT16", "INT32"):
        return 16
    return _BITS.get(text, 8)


def _is_weight(name: str, producers: Mapping[str, onnx.NodeProto], stored: Mapping[str, TensorProto]) -> bool:
    node = _dequantizer(name, producers)
    return node is not None and node.input[0] in stored


def _problem(node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], stored: Mapping[str, TensorProto]) -> str:
    """A scale that varies along the sum cannot leave it; onnxruntime fuses some of those all the same."""
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return ""
    for side, name in enumerate(node.input[:2]):
        maker = _dequantizer(name, producers)
        if maker is None or maker is not producers.get(name) or maker.input[1] not in stored:
            continue
        values, scale = attributes(maker), stored[maker.input[1]]
        if len(scale.dims) != 1 or scale.dims[0] == 1 or values.get("block_size"):
            continue
        axis = int(values.get("axis", 1))
        if side == 0:
            return f"activations have {scale.dims[0]} scales along axis {axis}"
        rank = len(stored[maker.input[0]].dims) if maker.input[0] in stored else 2
        out = 0 if node.op_type == "Conv" or (node.op_type == "Gemm" and attributes(node).get("transB")) else rank - 1
        if axis % rank != out:
            return (
                f"weight scales lie along axis {axis}, which is summed over; an integer kernel reads them as axis {out}"
            )
    return ""


def _constants(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """Tensors that Constant nodes hold, by value name."""
    return {
        node.output[0]: attribute.t
        for node in model.graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
