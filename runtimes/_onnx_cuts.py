"""Parts of an artifact's ONNX graph as models of their own, and whether added outputs changed what is fused.

A quantizer is cut out with every node that lies between the float value it reads and its codes: a node that somebody
put in between is part of what is asked about. Reshapes and transposes behind it are left out, so that it takes a plain
list of values.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from s2d_deploy.errors import UnsupportedError, message
from s2d_deploy.qgraph import initializers

MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")
VALUES, CODES = "values", "codes"
_SIZE = 64  # nodes of one quantizer: more means that the source was missed


def quantizer_model(model: onnx.ModelProto, site: str, codes: str, sources: Collection[str]) -> onnx.ModelProto:
    """The model from ``values`` (float32, one dimension) to ``codes``.

    Args:
        model: the artifact's.
        site: for the message.
        codes: graph value of the codes.
        sources: where the cut may begin.

    Raises:
        UnsupportedError: no way leads from `codes` to a source, or it is not elementwise.
    """
    producers = {value: node for node in model.graph.node for value in node.output}
    stored = initializers(model)
    while (node := producers.get(codes)) is not None and node.op_type in MOVES:
        codes = node.input[0]
    nodes: dict[str, onnx.NodeProto] = {}  # by first output: to compare nodes themselves takes seconds in a large graph
    begins: set[str] = set()
    stack, seen = [codes], set()
    while stack:
        value = stack.pop()
        if value in seen or value in stored or not value:
            continue
        seen.add(value)
        if value in sources:
            begins.add(value)
            continue
        node = producers.get(value)
        if node is None or len(nodes) > _SIZE:
            begins.add("")
            break
        nodes[node.output[0]] = node
        stack.extend(node.input)
    if len(begins) != 1 or "" in begins or not nodes:
        raise UnsupportedError(
            message(f"site {site!r}: its quantizer cannot be cut out", expected=f"a way to {', '.join(sources)}")
        )
    (begin,) = begins
    used = {value for node in nodes.values() for value in node.input}
    graph = helper.make_graph(
        [n for n in model.graph.node if n.output[0] in nodes],
        "quantizer",
        [helper.make_tensor_value_info(begin, TensorProto.FLOAT, ["n"])],
        [helper.make_empty_tensor_value_info(codes)],
        [t for name, t in stored.items() if name in used],
    )
    return _model(graph, model)


def until(model: onnx.ModelProto, result: str, inputs: Sequence[onnx.ValueInfoProto]) -> onnx.ModelProto:
    """The model from `inputs` to the value `result`.

    Raises:
        UnsupportedError: `result` needs more than `inputs`.
    """
    producers = {value: node for node in model.graph.node for value in node.output}
    stored, given = initializers(model), {i.name for i in inputs}
    nodes: dict[str, onnx.NodeProto] = {}
    stack, seen = [result], set()
    while stack:
        value = stack.pop()
        if value in seen or value in stored or value in given or not value:
            continue
        seen.add(value)
        node = producers.get(value)
        if node is None:
            raise UnsupportedError(message(f"{result}: cannot be cut out", found=f"it needs {value}"))
        nodes[node.output[0]] = node
        stack.extend(node.input)
    used = {value for node in nodes.values() for value in node.input}
    graph = helper.make_graph(
        [n for n in model.graph.node if n.output[0] in nodes],
        "layer",
        list(inputs),
        [helper.make_empty_tensor_value_info(result)],
        [t for name, t in stored.items() if name in used],
    )
    return _model(graph, model)


def ancestors(producers: Mapping[str, onnx.NodeProto], value: str, stops: Collection[str]) -> list[str]:
    """Values among `stops` that `value` is computed from, past no other of them, nearest to the left first."""
    found: list[str] = []
    seen: set[str] = set()
    stack = [value]
    while stack:
        name = stack.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in stops:
            found.append(name)
        elif name in producers:
            stack.extend(reversed(producers[name].input))
    return found


def different_nodes(one: onnx.ModelProto, other: onnx.ModelProto) -> list[str]:
    """Nodes (kind, name, inputs and outputs) that only one of two graphs has, sorted."""

    def shape(model: onnx.ModelProto) -> Counter[str]:
        return Counter(
            f"{n.op_type} {n.name} ({', '.join(n.input)}) -> {', '.join(n.output)}" for n in model.graph.node
        )

    a, b = shape(one), shape(other)
    return sorted(((a - b) + (b - a)).elements())


def _model(graph: onnx.GraphProto, model: onnx.ModelProto) -> onnx.ModelProto:
    made = helper.make_model(graph, opset_imports=list(model.opset_import))
    made.ir_version = model.ir_version
    return made
