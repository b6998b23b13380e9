"""One contraction of a common ONNX file as a file of its own: float in, quantizers, the product, its bias, float out.

What is timed alone must be what the whole file would make of it, so nothing is built by hand: nodes, initializers and
metadata are the common file's. The result is a common ONNX file again, which every target takes.

Cut off: operators between contractions (norms, softmax, activation functions), and what a runtime fuses across the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper

from s2d_deploy.errors import ModelError, message
from s2d_deploy.qgraph import attributes, initializers, metadata

# What a quantizer consists of, in front of QuantizeLinear: bounds of odd widths, and a token's scale.
_BOUNDS = ("Clip", "Min", "Max")


def one_op(model: onnx.ModelProto, op: str, shapes: Sequence[Sequence[int]]) -> onnx.ModelProto:
    """The part of `model` that computes `op` from float tensors.

    Args:
        model: a common ONNX model.
        op: name of a contraction.
        shapes: of its float inputs, left before right; the first dimension stays open.

    Returns:
        A common ONNX model with inputs ``left`` and, where the right operand is no weight, ``right``; output ``y``.

    Raises:
        ModelError: no such contraction.
    """
    return _Cut(model, op).made(shapes)


class _Cut:
    def __init__(self, model: onnx.ModelProto, op: str) -> None:
        self.model = model
        self.producers = {name: node for node in model.graph.node for name in node.output}
        self.stored = initializers(model)
        self.constant = set(self.stored)  # values that no input reaches; producers stand before consumers
        for node in model.graph.node:
            if all(name in self.constant for name in node.input if name):
                self.constant.update(node.output)
        found = [
            n for n in model.graph.node if n.op_type in ("MatMul", "Conv") and metadata(n).get("s2d.op", n.name) == op
        ]
        if len(found) != 1:
            raise ModelError(message(f"op {op!r} is not in the exported graph", fix="name it in quantize.skip"))
        self.node = found[0]

    def made(self, shapes: Sequence[Sequence[int]]) -> onnx.ModelProto:
        cuts = list(dict.fromkeys(self._cut(v) for v in self.node.input[:2] if v not in self.constant))
        end = self._end()
        nodes = self._between(end, set(cuts))
        names = dict(zip([*cuts, end], [*("left", "right")[: len(cuts)], "y"], strict=True))
        copies = []
        for node in nodes:
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.input[:] = [names.get(n, n) for n in node.input]
            copy.output[:] = [names.get(n, n) for n in node.output]
            copies.append(copy)
        needed = {name for node in copies for name in node.input}
        inputs = [
            helper.make_tensor_value_info(names[cut], TensorProto.FLOAT, ["batch", *shape[1:]])
            for cut, shape in zip(cuts, shapes, strict=False)
        ]
        graph = helper.make_graph(
            copies,
            "op",
            inputs,
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [t for name, t in self.stored.items() if name in needed],
        )
        result = helper.make_model(graph, opset_imports=self.model.opset_import)
        result.ir_version = self.model.ir_version
        result.metadata_props.extend(self.model.metadata_props)
        return onnx.shape_inference.infer_shapes(result, check_type=True, strict_mode=True)

    def _cut(self, value: str) -> str:
        """The float tensor in front of the quantizer of `value`; itself where there is none."""
        node = self.producers.get(value)
        token = node is not None and node.op_type == "Mul"
        if node is not None and token:
            node = self.producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return value
        quantizer = self.producers.get(node.input[0])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            return value
        source: str = quantizer.input[0]
        while (before := self.producers.get(source)) is not None and (
            before.op_type in _BOUNDS or (token and before.op_type == "Div")
        ):
            source, token = before.input[0], token and before.op_type != "Div"
        return source

    def _end(self) -> str:
        """The contraction's output, behind its bias."""
        output: str = self.node.output[0]
        users = [n for n in self.model.graph.node if output in n.input]
        if len(users) == 1 and users[0].op_type == "Add":
            other = next((n for n in users[0].input if n != output), "")
            if other in self.stored and len(self.stored[other].dims) == 1:
                return str(users[0].output[0])
        return output

    def _between(self, end: str, cuts: set[str]) -> list[onnx.NodeProto]:
        """Nodes that `end` needs, back to the cuts, in the file's order."""
        needed: set[str] = set()
        pending = [end]
        while pending:
            value = pending.pop()
            node = self.producers.get(value)
            if value not in cuts and value not in needed and node is not None:
                needed.update(node.output)
                pending += [name for name in node.input if name]
        return [n for n in self.model.graph.node if needed.intersection(n.output)]


def signature(model: onnx.ModelProto) -> tuple[Any, ...]:
    """Equal for models that do the same work: operators, shapes and types, not values or names."""
    graph = model.graph
    return (
        tuple((n.op_type, str(sorted(attributes(n).items()))) for n in graph.node),
        tuple((t.data_type, tuple(t.dims)) for t in graph.initializer),
        tuple(tuple(d.dim_value for d in i.type.tensor_type.shape.dim) for i in graph.input),
    )


__all__ = ["one_op", "signature"]
