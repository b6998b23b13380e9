"""Fix every dynamic dimension of an ONNX graph, and compute its shape arithmetic away.

TVM compiles one program for each batch size; with all shapes known, nothing is left to decide at run time.
Values stay exactly the same: only nodes whose inputs are all known (shapes, positions, masks of constants)
are evaluated, by onnx's own reference evaluator. Dequantized weights are never folded: they stay codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference
from onnx.reference import ReferenceEvaluator

from s2d_deploy.errors import RecipeError, UnsupportedError, message
from s2d_deploy.qgraph import attributes
from s2d_deploy.session import Array

_NEVER_FOLD = frozenset({"QuantizeLinear", "DequantizeLinear", "MatMul", "Conv", "RandomNormal", "RandomUniform"})
_SMALL = 4096  # elements; larger float results would weigh more than computing them
_KEEP_IN_GRAPH = 64  # elements; larger initializers are hidden from shape inference, which copies the model


@dataclass
class StaticGraph:
    """A graph without dynamic dimensions.

    Attributes:
        nodes: in execution order.
        constants: initializers, and what was folded, by value name.
        shapes: of every value, by name.
        types: ONNX element type of every value, by name.
        inputs, outputs: names, in the model's order.
        opset: of the default domain.
    """

    nodes: list[onnx.NodeProto]
    constants: dict[str, onnx.TensorProto]
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, int]
    inputs: list[str]
    outputs: list[str]
    opset: int
    _arrays: dict[str, Array] = field(default_factory=dict)

    def array(self, name: str) -> Array:
        """A constant as a numpy array (4-bit codes in ml_dtypes' types)."""
        if name not in self._arrays:
            self._arrays[name] = numpy_helper.to_array(self.constants[name])
        return self._arrays[name]


def dynamic_names(model: onnx.ModelProto) -> list[str]:
    """Names of the dynamic dimensions of the model's inputs, the batch dimension first."""
    known = {t.name for t in model.graph.initializer}
    names: dict[str, None] = {}
    for value in sorted(model.graph.input, key=lambda v: v.name in known):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                names[dim.dim_param] = None
    return list(names)


def fix_dimensions(model: onnx.ModelProto, sizes: Mapping[str, int]) -> StaticGraph:
    """`model` with its dynamic dimensions set to `sizes` and everything that follows from them folded.

    Raises:
        RecipeError: a dynamic dimension has no size.
        UnsupportedError: a shape depends on the data.
    """
    missing = [name for name in dynamic_names(model) if name not in sizes]
    if missing:
        raise RecipeError(
            message(
                "TVM builds for fixed shapes, and a dynamic dimension has no size",
                expected=f"a size for each of {', '.join(dynamic_names(model))}",
                found=", ".join(f"{k}={v}" for k, v in sizes.items()) or "none",
                fix=f"set it in the build options, e.g. shapes: {{{missing[0]}: 128}}",
            )
        )
    constants = {t.name: t for t in model.graph.initializer}
    nodes = list(model.graph.node)
    inputs = [_with_sizes(v, sizes) for v in model.graph.input if v.name not in constants]
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    while True:
        shapes, types = _infer(nodes, constants, inputs, model)
        remaining = [n for n in nodes if not _fold(n, constants, shapes, opset)]
        if len(remaining) == len(nodes):
            break
        nodes = remaining
    _require_shapes(nodes, shapes)
    outputs = [o.name for o in model.graph.output]
    return StaticGraph(nodes, constants, shapes, types, [v.name for v in inputs], outputs, opset)


def _with_sizes(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> onnx.ValueInfoProto:
    fixed = onnx.ValueInfoProto()
    fixed.CopyFrom(value)
    for dim in fixed.type.tensor_type.shape.dim:
        if dim.dim_param:
            dim.dim_value = sizes[dim.dim_param]
    return fixed


def _infer(
    nodes: list[onnx.NodeProto],
    constants: dict[str, onnx.TensorProto],
    inputs: list[onnx.ValueInfoProto],
    model: onnx.ModelProto,
) -> tuple[dict[str, tuple[int, ...]], dict[str, int]]:
    used = {i for n in nodes for i in n.input} | {o.name for o in model.graph.output}
    small, hidden = [], []
    for name, tensor in constants.items():
        if name in used:
            count = int(np.prod(tensor.dims, dtype=np.int64))
            if count <= _KEEP_IN_GRAPH:
                small.append(tensor)
            else:
                hidden.append(onnx.helper.make_tensor_value_info(name, tensor.data_type, list(tensor.dims)))
    outputs = []
    for output in model.graph.output:  # their recorded shapes name the dynamic dimensions: leave them open
        elem = output.type.tensor_type.elem_type
        outputs.append(onnx.helper.make_tensor_value_info(output.name, elem, None))
    graph = onnx.helper.make_graph(nodes, "static", [*inputs, *hidden], outputs, small)
    bare = onnx.helper.make_model(graph, opset_imports=list(model.opset_import), ir_version=model.ir_version)
    inferred = shape_inference.infer_shapes(bare, strict_mode=False, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {t.name: tuple(t.dims) for t in constants.values()}
    types = {t.name: t.data_type for t in constants.values()}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        tensor_type = value.type.tensor_type
        types[value.name] = tensor_type.elem_type
        if tensor_type.HasField("shape") and all(d.HasField("dim_value") for d in tensor_type.shape.dim):
            shapes[value.name] = tuple(d.dim_value for d in tensor_type.shape.dim)
    return shapes, types


def _fold(
    node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], shapes: dict[str, tuple[int, ...]], opset: int
) -> bool:
    """Evaluate `node` into `constants` when everything it reads is known. Returns whether it was."""
    if node.op_type in _NEVER_FOLD or node.domain not in ("", "ai.onnx"):
        return False
    if node.op_type == "Shape" and node.input[0] in shapes:
        values: dict[str, Any] = attributes(node)
        shape = shapes[node.input[0]][slice(values.get("start", 0), values.get("end"))]
        constants[node.output[0]] = numpy_helper.from_array(np.array(shape, np.int64), node.output[0])
        return True
    if node.op_type == "Size" and node.input[0] in shapes:
        size = np.array(np.prod(shapes[node.input[0]], dtype=np.int64))
        constants[node.output[0]] = numpy_helper.from_array(size, node.output[0])
        return True
    names = [i for i in node.input if i]
    if any(i not in constants for i in names) or any(a.HasField("g") for a in node.attribute):
        return False
    feeds = {i: numpy_helper.to_array(constants[i]) for i in names}
    if node.op_type == "GatherElements":
        # The reference evaluator goes through np.choose, which takes at most 64 arrays.
        data, index = feeds[names[0]], feeds[names[1]]
        axis = int(attributes(node).get("axis", 0)) % data.ndim
        index = np.where(index < 0, index + data.shape[axis], index)
        part = data[tuple(slice(None) if d == axis else slice(n) for d, n in enumerate(index.shape))]
        results: list[Any] = [np.take_along_axis(part, index, axis)]
    else:
        results = list(ReferenceEvaluator(_single(node, constants, opset)).run(None, feeds))
    read = max([_SMALL, *(a.size for a in feeds.values())])
    if any(r.dtype.kind == "f" and r.size > read for r in results):
        return False
    for name, result in zip([o for o in node.output if o], results, strict=True):
        constants[name] = numpy_helper.from_array(np.ascontiguousarray(result).reshape(result.shape), name)
    return True


def _single(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto], opset: int) -> onnx.ModelProto:
    inputs = [
        onnx.helper.make_tensor_value_info(i, constants[i].data_type, list(constants[i].dims))
        for i in dict.fromkeys(node.input)
        if i
    ]
    outputs = [onnx.ValueInfoProto(name=o) for o in node.output if o]
    graph = onnx.helper.make_graph([node], "one", inputs, outputs)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10)


def _require_shapes(nodes: list[onnx.NodeProto], shapes: dict[str, tuple[int, ...]]) -> None:
    unknown = [f"{n.name or n.output[0]} ({n.op_type})" for n in nodes if any(o and o not in shapes for o in n.output)]
    if unknown:
        raise UnsupportedError(
            message(
                "TVM needs shapes that do not depend on the data",
                found=f"no static shape behind {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}",
                fix="export the model without data-dependent shapes",
            )
        )
