"""Replace nodes of an ONNX graph by lists of nodes; values keep their names, so the rest of the graph stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from s2d_deploy.qgraph import initializers
from s2d_deploy.session import Array

CONTRIB = "com.microsoft"


class Surgery:
    """One rewriting of `model`, which itself is not changed.

    Attributes:
        stored: initializers by name.
        producers: the node that makes a value.
        consumers: the nodes that read a value.
        outputs: names of the graph's outputs.
        shapes: known shapes of inputs and inner values; 0 for a dynamic dimension.
        added: new initializers by name.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        graph = model.graph
        self.model = model
        self.stored = initializers(model)
        self.producers = {name: node for node in graph.node for name in node.output}
        self.consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in set(node.input):
                self.consumers.setdefault(name, []).append(node)
        self.outputs = {value.name for value in graph.output}
        self.shapes = {
            value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.value_info)
        }
        self.added: dict[str, onnx.TensorProto] = {}
        self._replaced: dict[str, list[onnx.NodeProto]] = {}  # a node's first output -> the nodes that take its place

    def replace(self, node: onnx.NodeProto, nodes: list[onnx.NodeProto]) -> None:
        """Put `nodes` where `node` was; an empty list drops it."""
        self._replaced[node.output[0]] = nodes

    def constant(self, name: str, value: Any, dtype: Any) -> str:
        """An initializer (made once for each name) with `value` as `dtype`; returns its name in the graph."""
        while name in self.stored or name in self.producers:
            name += ".ort"
        if name not in self.added:
            array: Array = np.asarray(value).astype(dtype)
            self.added[name] = numpy_helper.from_array(array if array.ndim == 0 else np.ascontiguousarray(array), name)
        return name

    def sole_consumer(self, value: str, op_type: str) -> tuple[onnx.NodeProto, str] | None:
        """The `op_type` node that alone reads `value`, and its other input where that is an initializer."""
        users = self.consumers.get(value, [])
        if len(users) != 1 or users[0].op_type != op_type or value in self.outputs:
            return None
        other = next((name for name in users[0].input if name != value), "")
        return (users[0], other) if other in self.stored else None

    def result(self) -> onnx.ModelProto:
        """The new model: without nodes and initializers that no output needs, producers before consumers."""
        nodes = [new for node in self.model.graph.node for new in self._replaced.get(node.output[0], [node])]
        nodes = _used(in_order(nodes), self.outputs)
        old = self.model.graph
        names = {name for node in nodes for name in node.input}
        kept = [t for t in (*old.initializer, *self.added.values()) if t.name in names]
        graph = helper.make_graph(nodes, old.name, old.input, old.output, kept)
        opsets = [o for o in self.model.opset_import if o.domain != CONTRIB]
        model = helper.make_model(graph, opset_imports=[*opsets, helper.make_opsetid(CONTRIB, 1)])
        model.ir_version = self.model.ir_version
        model.producer_name, model.producer_version = self.model.producer_name, self.model.producer_version
        model.metadata_props.extend(self.model.metadata_props)
        return model


def annotate(node: onnx.NodeProto, props: dict[str, str]) -> onnx.NodeProto:
    """Add metadata to a node, and return it."""
    for key, value in props.items():
        entry = node.metadata_props.add()
        entry.key, entry.value = key, value
    return node


def _used(nodes: Sequence[onnx.NodeProto], outputs: set[str]) -> list[onnx.NodeProto]:
    needed = set(outputs)
    kept: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(node.input)
            kept.append(node)
    return kept[::-1]


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The same nodes with producers before consumers, otherwise in their order."""
    makers = {name: i for i, node in enumerate(nodes) for name in node.output}
    result: list[onnx.NodeProto] = []
    done: set[int] = set()
    for root in range(len(nodes)):
        stack = [(root, False)]
        while stack:
            i, ready = stack.pop()
            if i in done:
                continue
            if ready:
                done.add(i)
                result.append(nodes[i])
                continue
            stack.append((i, True))
            stack.extend((makers[name], False) for name in nodes[i].input if makers.get(name, i) not in done | {i})
    return result
