"""What ONNX Runtime made of a model: its own optimized graph, contraction by contraction.

The optimizer renames, fuses and replaces nodes, and drops our metadata. A contraction is found again by its node
name (kept by most fusions, some append to it), otherwise by going back from the values that it computed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from s2d_deploy.errors import ArtifactError
from s2d_deploy.qgraph import attributes, metadata
from s2d_deploy.session import Audit, ExecutedOp, Rung, lowest_rung

from ._ort_loading import PLACED, new_session
from ._ort_providers import CPU, asked_for, short_name

INTEGER_KERNELS = frozenset(
    {"MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "ConvInteger", "QLinearConv", "QLinearMatMul",
     "QGemm", "QAttention"}
)  # fmt: skip
FLOAT_KERNELS = frozenset(
    {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulNBits", "Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose",
     "Einsum", "Attention", "MultiHeadAttention", "GroupQueryAttention", "PackedAttention", "GemmFloat8"}
)  # fmt: skip
COMPILED = "compiled nodes"  # of onnxruntime's refusal to save what a provider has compiled
_INT8_LEVEL = 4  # MatMulNBits accuracy_level that rounds activations to INT8
_SOURCES = ("MatMul", "Gemm", "Conv", "ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "MatMulNBits")
# What a kernel may compute along with its product: elementwise, or the quantizer of its output.
_FUSED_INTO = (
    "Add",
    "Mul",
    "Div",
    "Relu",
    "Gelu",
    "Clip",
    "HardSigmoid",
    "LeakyRelu",
    "Sigmoid",
    "Tanh",
    "QuantizeLinear",
)
_REACH = 4  # nodes between a fused contraction and the value that the original one made


def audit_graph(model: onnx.ModelProto, path: Path, info: Mapping[str, Any], version: str) -> Audit:
    """Load `path` once more, let ONNX Runtime save its optimized graph, and read that.

    Args:
        model: the artifact's model, for the names, MACs and declarations of its contractions.
        path: its file.
        info: of the artifact.
        version: of onnxruntime, for the evidence.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "optimized.onnx"
        try:
            new_session(path, info, 1, optimized=target)
        except ArtifactError as error:
            if COMPILED not in str(error):
                raise
            return _unseen(model, info, version)
        optimized = onnx.load(target, load_external_data=False)
    return compare(model, optimized, f"optimized graph saved by onnxruntime {version}")


def _unseen(model: onnx.ModelProto, info: Mapping[str, Any], version: str) -> Audit:
    """Of a provider that compiles whole subgraphs: nothing is known of what they compute in, and nothing is claimed."""
    empty = onnx.ModelProto()
    seen = compare(model, empty, "")
    names = ", ".join(short_name(name) for name, _ in asked_for(info) if name != CPU)
    note = f"compiled by {names}, which does not say in which arithmetic it computes"
    return Audit(seen.ops, seen.rung, f"onnxruntime {version} cannot save a graph with compiled nodes", (note,))


def compare(model: onnx.ModelProto, optimized: onnx.ModelProto, evidence: str) -> Audit:
    """Each contraction of `model` as `optimized` executes it."""
    kernels = {n.name: n for n in optimized.graph.node if n.op_type in INTEGER_KERNELS | FLOAT_KERNELS}
    producers = {value: node for node in optimized.graph.node for value in node.output}
    followers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for value in node.input:
            followers.setdefault(value, []).append(node)
    ops: list[ExecutedOp] = []
    rungs: list[Rung] = []
    notes: list[str] = []
    kept: list[ExecutedOp] = []
    for node in model.graph.node:
        props = metadata(node)
        if "s2d.op" not in props and node.op_type not in _SOURCES:
            continue
        name, declared = props.get("s2d.op", node.name), props.get("s2d.declared", "float")
        kernel = find_kernel(node, kernels, producers, followers)
        precision = _precision(kernel)
        op = ExecutedOp(
            name,
            kernel.op_type if kernel is not None else "unseen",
            precision,
            int(props.get("s2d.macs", "0")),
            declared,
        )
        ops.append(op)
        if props.get(PLACED) == "float" and not declared.endswith("A16"):
            kept.append(op)  # by a measured choice, so it does not lower the rung of those that were quantized
            continue
        rungs.append(_rung(op))
        notes += _notes(op, kernel)
    if kept:
        total = sum(op.macs for op in ops)
        share = f" ({sum(op.macs for op in kept) / total:.1%} of the multiply-accumulates)" if total else ""
        listed = ", ".join(op.name for op in kept[:4]) + (f" and {len(kept) - 4} more" if len(kept) > 4 else "")
        notes.append(f"kept in float by the placement search, as their quantized form is not faster{share}: {listed}")
    return Audit(tuple(ops), lowest_rung(rungs), evidence, tuple(notes))


def find_kernel(
    node: onnx.NodeProto,
    kernels: Mapping[str, onnx.NodeProto],
    producers: Mapping[str, onnx.NodeProto],
    followers: Mapping[str, list[onnx.NodeProto]],
) -> onnx.NodeProto | None:
    """The node of the optimized graph that computes `node` of the model.

    Args:
        node: a contraction of the model.
        kernels: contractions of the optimized graph by name.
        producers: of the optimized graph: the node that makes a value.
        followers: of the model: the nodes that read a value.
    """
    if node.name in kernels:
        return kernels[node.name]
    # Fusions name their node after one of those they replace: "<name>/MatMulScaleFusion/", "<name>_nchwc".
    for name, kernel in kernels.items():
        if node.name and name.startswith((f"{node.name}/", f"{node.name}_nchwc")):
            return kernel
    value: str | None = node.output[0]
    for _ in range(_REACH):
        if value is None:
            break
        found = _behind(value, producers)
        if found is not None:
            return found
        users = followers.get(value, [])
        # A sole elementwise follower may have been fused in, so that only its value is left.
        value = users[0].output[0] if len(users) == 1 and users[0].op_type in _FUSED_INTO else None
    return None


def _behind(value: str, producers: Mapping[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The contraction that makes `value`, possibly through the reordering nodes of a blocked layout."""
    for _ in range(_REACH):
        node = producers.get(value)
        if node is None:
            return None
        if node.op_type in INTEGER_KERNELS | FLOAT_KERNELS:
            return node
        if node.op_type not in ("ReorderOutput", "Transpose", "Reshape", "DequantizeLinear", "Cast"):
            return None
        value = node.input[0]
    return None


def _precision(kernel: onnx.NodeProto | None) -> str:
    if kernel is None:
        return "unseen"
    if kernel.op_type in INTEGER_KERNELS:
        return "int8"
    if kernel.op_type == "MatMulNBits" and attributes(kernel).get("accuracy_level", 0) == _INT8_LEVEL:
        return "int8"
    return "float32"


def _rung(op: ExecutedOp) -> Rung:
    """The rung of one op: W8A8 is native on 8-bit multipliers, narrower codes are emulated by them."""
    if op.declared == "float":
        return "float"
    if op.precision != "int8":
        return "weight-only" if op.kernel == "MatMulNBits" else "dequantized"
    widths = re.fullmatch(r"W(\d+)A(\d+)", op.declared)
    return "native" if widths is not None and set(widths.groups()) == {"8"} else "emulated"


def _notes(op: ExecutedOp, kernel: onnx.NodeProto | None) -> list[str]:
    if kernel is None:
        return [f"{op.name}: not found in the optimized graph; what executes it could not be seen"]
    if op.declared == "float":
        return (
            [f"{op.name}: runs on {op.kernel} in int8, but the plan declares float"] if op.precision == "int8" else []
        )
    activations = op.declared.partition("A")[2]
    if op.precision == "int8" and activations == "16":
        level = f"accuracy_level {_INT8_LEVEL}"
        return [f"{op.name}: declared {op.declared}, but {op.kernel} rounds activations to INT8 ({level})"]
    if op.precision != "int8" and activations != "16":
        return [f"{op.name}: declared {op.declared}, computed in float by {op.kernel} from dequantized values"]
    if activations == "16" and op.kernel != "MatMulNBits":
        return [f"{op.name}: weights are dequantized when the session loads, and multiplied in float by {op.kernel}"]
    return []
