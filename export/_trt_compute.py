"""The float part of the dialect in 16 bits: strongly typed TensorRT computes in the types that the ONNX file says.

Inputs and outputs of the file stay FP32; a Cast stands behind each input and in front of each output. Between them:

- **What quantizes stays FP32**: quantizers with their scales, since a scale rounded to 11 bits (FP16) or 8 (BF16) would
  be another grid than the plan's; products of two dequantized operands, which run on integers; and what lies between
  such a product and the next quantizer (bias, GELU, masks), which TensorRT computes in registers. So of a pre-norm
  model on integers the residual stream is what becomes 16 bits.
- **Weight-only layers** multiply in 16 bits, so their scales are rounded to 16 bits: that is what W4A16 means.
- **Softmax and LayerNormalization** are computed in FP32 between Casts: long sums lose bits otherwise.
- **Everything else** (additions, GELU, float products, weights) is in 16 bits.

Lost: float operators round to 16 bits, so more codes than before differ from the simulation's. FP16 has a largest
number, 65504: a stored weight beyond it is refused by name; magnitudes beyond 1e30, which mask, become that number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from s2d_deploy.errors import UnsupportedError, message

Compute = Literal["fp32", "fp16", "bf16"]
TYPES: Mapping[str, tuple[int, np.dtype[Any]]] = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
_BF16_OPSET = 22  # the first in which convolutions take it
_MASK = 1e30  # beyond it a constant means "never", not a number
# Computed in FP32 between Casts.
_PRECISE = ("Softmax", "LogSoftmax", "LayerNormalization", "ReduceMean", "ReduceSum", "ReduceL2", "Pow", "Exp", "Sqrt")
_ONTO_GRID = ("Div", "Round", "Clip", "Sub", "Min", "Max")
_PRODUCTS = ("MatMul", "Conv", "Gemm", "Einsum")
# Their float inputs are no values to compute with, or must have the type that ONNX says.
_UNTOUCHED = ("Shape", "Range", "Resize", "ConstantOfShape", "Size")


def to_compute(model: onnx.ModelProto, compute: Compute) -> onnx.ModelProto:
    """Rewrite a dialect model in place, so that its float part is computed in `compute`, and return it.

    Raises:
        UnsupportedError: weights beyond FP16's largest number (each named), or a value whose type the file leaves open.
    """
    if compute == "fp32":
        return model
    _Rewriter(model, compute).rewrite()
    return model


class _Rewriter:
    def __init__(self, model: onnx.ModelProto, compute: Compute) -> None:
        self.model, self.graph, self.compute = model, model.graph, compute
        self.type, self.dtype = TYPES[compute]
        self.stored = {t.name: t for t in self.graph.initializer}
        self.types = _types(model)
        self.producers = {o: n for n in self.graph.node for o in n.output}
        self.made: dict[tuple[str, int], str] = {}  # (value, type) -> its name in that type
        self.nodes: list[onnx.NodeProto] = []
        self.too_large: list[str] = []

    def rewrite(self) -> None:
        nodes, outputs = list(self.graph.node), [o.name for o in self.graph.output]
        self.wide = self._wide(nodes)
        for node in nodes:
            self._rewrite(node)
        for name in outputs:
            if self.types.get(name) == self.type:
                # The graph's output keeps its name and FP32; what made it gets another name.
                producer = next(n for n in self.nodes if name in n.output)
                inner = f"{name}.{self.compute}"
                producer.output[list(producer.output).index(name)] = inner
                for node in self.nodes:
                    for i, value in enumerate(node.input):
                        if value == name:
                            node.input[i] = inner
                self.nodes.append(helper.make_node("Cast", [inner], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
        if self.too_large:
            raise UnsupportedError(
                message(
                    f"FP16 cannot hold stored values of {len(self.too_large)} tensor(s)",
                    expected="magnitudes up to 65504",
                    found="; ".join(self.too_large[:4]),
                    fix="set targets[tensorrt].options.compute: bf16, or fp32",
                )
            )
        if self.compute == "bf16":
            for imported in self.model.opset_import:
                if not imported.domain:
                    imported.version = max(imported.version, _BF16_OPSET)
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        del self.graph.value_info[:]
        used = {v for n in self.graph.node for v in n.input}
        kept = [t for t in self.graph.initializer if t.name in used]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)

    def _wide(self, nodes: list[onnx.NodeProto]) -> set[str]:
        """First outputs of the nodes that stay FP32: quantizers, integer products, and what lies between the two."""
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for value in node.input:
                readers.setdefault(value, []).append(node)
        outputs = {o.name for o in self.graph.output}
        fixed = {n.output[0] for n in nodes if self._stays(n)}
        grids = {n.output[0] for n in nodes if n.op_type == "QuantizeLinear"}
        for node in reversed(nodes):  # what brings a value onto the grid, in front of its quantizer
            read_by = readers.get(node.output[0], [])
            if node.op_type in _ONTO_GRID and read_by and all(r.output[0] in grids for r in read_by):
                grids.add(node.output[0])
        fixed |= grids
        # Between them: whatever has one reader, in FP32, and an input that FP32 made. It never leaves the registers,
        # so a Cast would round for nothing; and TensorRT fuses attention into one kernel only where none stands
        # between its products. What has more readers (the residual stream) lies in memory, and is worth halving.
        between = {n.output[0] for n in nodes if n.op_type not in _PRODUCTS} - fixed - outputs
        while True:
            wide = fixed | between
            kept = {
                n.output[0]
                for n in nodes
                if n.output[0] in between
                and len(readers.get(n.output[0], [])) == 1
                and readers[n.output[0]][0].output[0] in wide
                and any((p := self.producers.get(v)) is not None and p.output[0] in wide for v in n.input)
            }
            if kept == between:
                return wide
            between = kept

    def _stays(self, node: onnx.NodeProto) -> bool:
        if node.op_type in _PRODUCTS:
            return all(self._dequantized(v) for v in node.input[:2])
        return node.op_type == "QuantizeLinear" or node.op_type in _PRECISE

    def _dequantized(self, value: str) -> bool:
        node = self.producers.get(value)
        return node is not None and node.op_type == "DequantizeLinear"

    def _rewrite(self, node: onnx.NodeProto) -> None:
        if node.op_type in _UNTOUCHED:
            self.nodes.append(node)
            return
        wide = node.output[0] in self.wide
        if node.op_type == "DequantizeLinear":
            self._dequantize(node)
            return
        if node.op_type == "Constant" and node.attribute[0].name in ("value", "value_float", "value_floats"):
            self.nodes.append(node)
            self._constant(node)
            return
        to = TensorProto.FLOAT if wide else self.type
        for i, value in enumerate(node.input):
            if self._is_float(value) and not (node.op_type == "TRT_FP4DynamicQuantize" and i == 1):
                node.input[i] = self._as(value, to)
        if node.op_type == "Cast":
            for a in node.attribute:
                if a.name == "to" and a.i == TensorProto.FLOAT:
                    a.i = self.type
        self.nodes.append(node)
        for value in node.output:
            if self.types.get(value) == TensorProto.FLOAT and not wide:
                self.types[value] = self.type

    def _dequantize(self, node: onnx.NodeProto) -> None:
        readers = [n for n in self.graph.node if node.output[0] in n.input]
        narrow = (
            node.input[0] in self.stored
            and node.input[1] in self.stored
            and self.types.get(node.output[0]) == TensorProto.FLOAT
            and not any(n.output[0] in self.wide or n.op_type == "DequantizeLinear" for n in readers)
        )
        if narrow:  # weights beside float activations
            node.input[1] = self._as(node.input[1], self.type)
            self.types[node.output[0]] = self.type
        self.nodes.append(node)

    def _constant(self, node: onnx.NodeProto) -> None:
        attribute = node.attribute[0]
        if attribute.name == "value":
            self.stored[node.output[0]] = attribute.t
        else:
            value = helper.get_attribute_value(attribute)
            self.stored[node.output[0]] = numpy_helper.from_array(np.asarray(value, np.float32), node.output[0])

    def _is_float(self, value: str) -> bool:
        return self.types.get(value) in (TensorProto.FLOAT, self.type)

    def _as(self, value: str, to: int) -> str:
        """The name of `value` in type `to`; a Cast or a converted copy is made where there is none."""
        if self.types[value] == to:
            return value
        key = (value, to)
        if key not in self.made:
            suffix = self.compute if to == self.type else "fp32"
            name = f"{value}.{suffix}"
            if value in self.stored:
                self._store(value, name)
            else:
                self.nodes.append(helper.make_node("Cast", [value], [name], name=f"{name}.cast", to=to))
            self.made[key], self.types[name] = name, to
        return self.made[key]

    def _store(self, value: str, name: str) -> None:
        array: npt.NDArray[Any] = numpy_helper.to_array(self.stored[value]).astype(np.float32)
        limit = float(ml_dtypes.finfo(self.dtype).max)  # type: ignore[no-untyped-call]
        never = np.abs(array) > _MASK
        array = np.where(never & np.isfinite(array), np.sign(array) * limit, array)
        beyond = np.isfinite(array) & (np.abs(array) > limit)
        if beyond.any():
            self.too_large.append(f"{value}: {float(np.abs(array[beyond]).max()):g}")
        with np.errstate(over="ignore"):
            self.graph.initializer.append(numpy_helper.from_array(array.astype(self.dtype), name))


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    found = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    found.update({t.name: t.data_type for t in graph.initializer})
    missing = [n.name for n in graph.node if any(o and not found.get(o) for o in n.output)]
    if missing:
        raise UnsupportedError(
            message(
                f"the type of what {len(missing)} node(s) make is not in the file",
                found=", ".join(missing[:4]),
                fix="set targets[tensorrt].options.compute: fp32",
            )
        )
    return found


__all__ = ["TYPES", "Compute", "to_compute"]
