"""Which nodes of the graph become one kernel: a product with what follows it, a LayerNorm with its quantizers.

- **tail**: integer product, then elementwise operators with one reader each (scale, bias, GELU, residual, mask), then
  reshapes and transposes that only relabel places, then a quantizer;
- **scores**: integer product of two activations, elementwise operators, softmax, quantizer;
- **norm**: LayerNorm and the quantizers that read it.

A tail ends where a value has several readers or is wanted itself: values that anything else reads, and all codes, lie
in memory. What fits none of these is emitted operator by operator. Reshapes and transposes cost nothing in a tail: the
kernel writes its rows in one layout, and the reader is told how to walk them (`View`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx

from s2d_deploy.qgraph import attributes
from s2d_deploy.session import Array

from ._tvm_epilogue import SIGNED_OFFSET, Argument, Place, Step
from ._tvm_products import Product, Stored
from ._tvm_static import StaticGraph

_RANGES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}
_BINARY = frozenset({"Add", "Sub", "Mul", "Div"})
_UNARY = frozenset({"Relu", "Gelu", "Erf", "Exp", "Tanh", "Sigmoid"})
_SHAPE = frozenset({"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
Strides = tuple[int, int, int, int]


@dataclass
class Unit:
    """Nodes that become one kernel.

    Attributes:
        kind: "tail", "scores" or "norm".
        nodes: in execution order; the unit is emitted in place of the last.
        node: the product's, or the LayerNorm.
        steps: behind the product's own scale (operand 0), or behind the normalization.
        operands: graph values that the steps read (numbered from 1 for products, from 0 for norms) and their places.
        results: graph value, and the number of its value in the epilogue.
        layout: strides of the first result in its buffer, for (outer, inner, row, column).
        views: of each result that are bytes: strides of the graph value's axes in its buffer.
    """

    kind: str
    nodes: list[onnx.NodeProto]
    node: onnx.NodeProto
    steps: list[Step] = field(default_factory=list)
    operands: list[tuple[str, Place]] = field(default_factory=list)
    results: list[tuple[str, int]] = field(default_factory=list)
    layout: Strides = (0, 0, 0, 1)
    views: dict[str, tuple[int, ...]] = field(default_factory=dict)


def find_units(
    graph: StaticGraph,
    nodes: list[onnx.NodeProto],
    products: Mapping[str, tuple[Product, Stored | None]],
    wanted: Iterable[str],
) -> list[Unit]:
    """The units of `nodes` (live, in execution order); no node is in two of them.

    Args:
        graph: they lie in.
        nodes: the ones that are emitted.
        products: contractions by node name.
        wanted: values that the function returns.
    """
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for value in _reads(node, products):
            users.setdefault(value, []).append(node)
    finder = _Finder(graph, products, users, set(wanted))
    units = []
    for node in nodes:
        unit = finder.unit(node)
        if unit is not None:
            units.append(unit)
    return units


def fusible(product: Product) -> bool:
    """Whether the kernel with an epilogue computes this product."""
    return (
        product.arithmetic == "integer"
        and (product.blocks == 1 or product.panels.depth == product.panels.k)
        and product.window is None
        and (product.token_scale is None or product.shared_right)
        and product.full_shape == product.out_shape
        and (product.shared_right or len(product.out_batch) <= 2)
        and min(len(product.left_shape), len(product.right_shape)) >= 2
    )


def batch_of(product: Product) -> tuple[int, int]:
    """Outer and inner number of products."""
    if product.shared_right:
        return 1, 1
    outer, inner = (1, 1, *product.out_batch)[-2:]
    return int(outer), int(inner)


def strides_of(places: Array) -> tuple[int, ...] | None:
    """Strides of an array of flat places that are affine in every index and begin at 0; None where they are not."""
    strides = []
    for axis, size in enumerate(places.shape):
        strides.append(int(places.take(1, axis).flat[0] - places.flat[0]) if size > 1 else 0)
    expected = np.zeros(places.shape, np.int64)
    for axis, (size, stride) in enumerate(zip(places.shape, strides, strict=True)):
        expected += (np.arange(size) * stride).reshape([-1 if a == axis else 1 for a in range(places.ndim)])
    return tuple(strides) if np.array_equal(expected, places) else None


class _Finder:
    def __init__(
        self,
        graph: StaticGraph,
        products: Mapping[str, tuple[Product, Stored | None]],
        users: Mapping[str, list[onnx.NodeProto]],
        wanted: set[str],
    ) -> None:
        self.graph, self.products, self.users, self.wanted = graph, products, users, wanted
        self.taken: set[int] = set()  # nodes by identity; two products that meet in a sum both reach it

    def unit(self, node: onnx.NodeProto) -> Unit | None:
        unit = self._unit(node)
        self.taken |= {id(n) for n in unit.nodes} if unit is not None else set()
        return unit

    def _unit(self, node: onnx.NodeProto) -> Unit | None:
        if node.name in self.products:
            product = self.products[node.name][0]
            if not fusible(product) or len([i for i in node.input if i]) > 2:
                return None
            return self._scores(node, product) or self._tail(node, product)
        return self._norm(node) if node.op_type == "LayerNormalization" else None

    def _reader(self, value: str) -> onnx.NodeProto | None:
        """The only node that reads `value`; None where there are several, or it is wanted itself."""
        readers = self.users.get(value, [])
        if len(readers) != 1 or value in self.wanted or id(readers[0]) in self.taken:
            return None
        return readers[0]

    def _elementwise(self, unit: Unit, value: str, number: int, full: Array) -> tuple[str, int]:
        """Take elementwise nodes behind `value` into `unit`; returns the last value and its number.

        Args:
            unit: grows.
            value: graph value.
            number: of it in the epilogue.
            full: for each element of the product (outer, inner, row, column) its flat place; its shape is what counts.
        """
        first = 1 if unit.kind != "norm" else 0
        while (node := self._reader(value)) is not None and node.name not in self.products:
            if self.graph.types[node.output[0]] != onnx.TensorProto.FLOAT:
                break
            if node.op_type in _UNARY:
                tanh = attributes(node).get("approximate", b"none") == b"tanh"
                op = "GeluTanh" if node.op_type == "Gelu" and tanh else node.op_type
                arguments: tuple[Argument, ...] = (("value", number),)
            elif node.op_type in _BINARY and self.graph.shapes[node.output[0]] == self.graph.shapes[value]:
                op = node.op_type
                given: list[Argument] = []
                for name in node.input:
                    if name == value:
                        given.append(("value", number))
                        continue
                    found = self._operand(unit, name, self.graph.shapes[value], full, first)
                    if found is None:
                        return value, number
                    given.append(found)
                arguments = tuple(given)
            else:
                break
            unit.steps.append(Step(op, arguments))
            unit.nodes.append(node)
            value, number = node.output[0], len(unit.steps) + first
        return value, number

    def _operand(self, unit: Unit, name: str, shape: tuple[int, ...], full: Array, first: int) -> Argument | None:
        if self.graph.types[name] != onnx.TensorProto.FLOAT:
            return None
        own = self.graph.shapes[name]
        size = int(np.prod(own, dtype=np.int64))
        if name in self.graph.constants and size == 1:
            return "constant", float(self.graph.array(name).reshape(()))
        if size != int(np.prod(shape, dtype=np.int64)) and len(own) > len(shape):
            return None
        try:
            places = np.broadcast_to(np.arange(size).reshape(own), shape)
        except ValueError:
            return None
        strides = strides_of(places.reshape(full.shape))
        if strides is None or strides[3] not in (0, 1):
            return None
        unit.operands.append((name, Place(own, _four(strides))))
        return "operand", len(unit.operands) - 1 + first

    def _code(self, node: onnx.NodeProto) -> Step | None:
        """The quantizer `node` as a step without arguments, where it has one stored scale."""
        if node.op_type != "QuantizeLinear" or any(v not in self.graph.constants for v in node.input[1:] if v):
            return None
        if self.graph.shapes[node.input[1]] not in ((), (1,)):
            return None
        zero_name = node.input[2] if len(node.input) > 2 else ""
        storage = onnx.TensorProto.DataType.Name(self.graph.types[zero_name]) if zero_name else "UINT8"
        if storage not in _RANGES:
            return None
        low, high = _RANGES[storage]
        zero = int(np.asarray(self.graph.array(zero_name)).astype(np.int32).reshape(())) if zero_name else 0
        return Step("quantize", (), low, high, zero, SIGNED_OFFSET if low < 0 else 0)

    def _quantize(self, unit: Unit, node: onnx.NodeProto, number: int) -> bool:
        code = self._code(node)
        if code is None:
            return False
        first = 1 if unit.kind != "norm" else 0
        scale = node.input[1]
        unit.operands.append((scale, Place(self.graph.shapes[scale], (0, 0, 0, 0))))
        arguments: tuple[Argument, ...] = (("value", number), ("operand", len(unit.operands) - 1 + first))
        unit.steps.append(Step("quantize", arguments, code.low, code.high, code.zero, code.offset))
        unit.nodes.append(node)
        return True

    def _full(self, product: Product) -> Array:
        size = int(np.prod(product.out_shape, dtype=np.int64))
        rows = product.rows if not product.shared_right else size // product.panels.n
        return np.arange(size).reshape(*batch_of(product), rows, product.panels.n)

    def _tail(self, node: onnx.NodeProto, product: Product) -> Unit | None:
        unit, full = Unit("tail", [node], node), self._full(product)
        number = 1
        if product.token_scale is not None:
            shape = self.graph.shapes[product.token_scale]
            if int(np.prod(shape, dtype=np.int64)) != product.rows:
                return None
            unit.operands.append((product.token_scale, Place(shape, (0, 0, 1, 0))))
            unit.steps.append(Step("Mul", (("value", number), ("operand", 1))))
            number += 1
        value, number = self._elementwise(unit, node.output[0], number, full)
        # Relabelled places: worth it only where a quantizer comes behind.
        moves: list[onnx.NodeProto] = []
        end, labels = value, full.reshape(self.graph.shapes[value])
        while (reader := self._reader(end)) is not None and reader.op_type in _SHAPE:
            moves.append(reader)
            labels = _moved(reader, labels, self.graph.shapes[reader.output[0]])
            end = reader.output[0]
        inverse = np.empty(labels.size, np.int64)
        inverse[labels.ravel()] = np.arange(labels.size)
        written = strides_of(inverse.reshape(full.shape))
        if written is not None and written[3] == 1:  # the kernel writes the reader's layout
            layout, view = _four(written), _contiguous(labels.shape)
        else:
            natural, seen = strides_of(full), strides_of(labels)
            if natural is None or seen is None:
                reader = None
                layout, view = (0, 0, 0, 1), ()
            else:
                layout, view = _four(natural), seen
        if reader is not None and reader.op_type == "QuantizeLinear":
            count = len(unit.nodes)
            unit.nodes += moves
            if self._quantize(unit, reader, number):
                unit.layout = layout
                unit.results = [(reader.output[0], len(unit.steps) + 1)]
                unit.views[reader.output[0]] = view
                return unit
            del unit.nodes[count:]
        unit.layout = _four(strides_of(full) or ())
        unit.results = [(value, number)]
        return unit

    def _scores(self, node: onnx.NodeProto, product: Product) -> Unit | None:
        if product.right is None:
            return None
        unit = Unit("scores", [node], node)
        value, number = self._elementwise(unit, node.output[0], 1, self._full(product))
        softmax = self._reader(value)
        rank = len(product.out_shape)
        if softmax is None or softmax.op_type != "Softmax" or self.graph.opset < 13:
            return None
        if attributes(softmax).get("axis", -1) % rank != rank - 1:
            return None
        reader = self._reader(softmax.output[0])
        if reader is None or self._code(reader) is None:
            return None
        unit.nodes.append(softmax)
        self._quantize(unit, reader, number)
        unit.results = [(reader.output[0], len(unit.steps) + 1)]
        return unit

    def _norm(self, node: onnx.NodeProto) -> Unit | None:
        shape = self.graph.shapes[node.input[0]]
        axis = attributes(node).get("axis", -1) % len(shape)
        if axis != len(shape) - 1 or any(node.output[1:]):
            return None
        width = shape[-1]
        if any(self.graph.shapes[i] != (width,) for i in node.input[1:] if i):
            return None
        unit = Unit("norm", [node], node)
        for number, (op, name) in enumerate(zip(("Mul", "Add"), [i for i in node.input[1:] if i], strict=False)):
            unit.operands.append((name, Place((width,), (0, 0, 0, 1))))
            unit.steps.append(Step(op, (("value", number), ("operand", number))))
        value, number = node.output[0], len(unit.steps)
        readers = self.users.get(value, [])
        quantizers = [r for r in readers if self._code(r) is not None and id(r) not in self.taken]
        if len(quantizers) < len(readers) or value in self.wanted or not readers:
            unit.results.append((value, number))
        for reader in quantizers:
            self._quantize(unit, reader, number)
            unit.results.append((reader.output[0], len(unit.steps)))
            unit.views[reader.output[0]] = _contiguous(shape)
        unit.layout = (0, 0, width, 1)
        return unit


def _reads(node: onnx.NodeProto, products: Mapping[str, tuple[Product, Stored | None]]) -> list[str]:
    if node.name not in products:
        return list(dict.fromkeys(node.input))
    product = products[node.name][0]
    return [v for v in dict.fromkeys((product.left, product.right, product.token_scale, *node.input[2:])) if v]


def _moved(node: onnx.NodeProto, labels: Array, shape: tuple[int, ...]) -> Array:
    if node.op_type == "Transpose":
        return np.ascontiguousarray(labels.transpose(attributes(node).get("perm") or None))
    return labels.reshape(shape)


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


def _four(strides: tuple[int, ...]) -> Strides:
    a, b, c, d = strides
    return a, b, c, d


__all__ = ["Unit", "batch_of", "find_units", "fusible", "strides_of"]
