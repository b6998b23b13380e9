"""The static ONNX graph as Relax functions: TVM's own importer, with our operators where precision or speed needs them.

TVM's importer knows several hundred operators. Ours replace it for contractions, quantizers (round half to even after a
true division, 4-bit codes one in each byte), LayerNormalization, Softmax, and functions that would call libm.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx

from s2d_deploy.errors import UnsupportedError, message
from s2d_deploy.qgraph import attributes
from s2d_deploy.session import Array

from . import _tvm_math as fast
from ._tvm_emit import Emitter
from ._tvm_epilogue import Epilogue, Place, Step
from ._tvm_fusion import Unit, find_units
from ._tvm_products import Product, Stored
from ._tvm_static import StaticGraph
from ._tvm_units import UnitEmitter

_RANGES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}
_INLINE = 16  # elements; larger float constants are parameters
_ELEMENTWISE: dict[str, Callable[[Any], Any]] = {
    "Erf": fast.erf,
    "Exp": fast.exp,
    "Tanh": fast.tanh,
    "Sigmoid": fast.sigmoid,
}


class GraphImporter:
    """Writes functions for one static graph into a shared BlockBuilder.

    Args:
        graph: the static graph.
        products: its contractions, by node name.
        emitter: holds the BlockBuilder and the kernels.
        store: parameters by name, shared by all functions of the artifact; filled here.
    """

    def __init__(
        self,
        graph: StaticGraph,
        products: dict[str, tuple[Product, Stored | None]],
        emitter: Emitter,
        store: dict[str, Array],
    ) -> None:
        self.graph, self.products, self.emitter, self.store = graph, products, emitter, store
        self.builder = emitter.builder
        self.nodes = _live(graph, products)

    def function(self, name: str, outputs: Sequence[str]) -> list[str]:
        """Write a function of the graph's inputs and a tuple of parameters, that returns the values `outputs`.

        Returns:
            names of the parameters in the tuple.
        """
        from tvm import relax

        self.emitter.start_function()
        inputs = [self._variable(i, self.graph.shapes[i], _dtype(self.graph.types[i])) for i in self.graph.inputs]
        names, variables = self._parameters()
        values: dict[str, Any] = dict(zip(self.graph.inputs, inputs, strict=True))
        delegate = _delegate(self.builder, self.graph.opset)
        used = self._read | set(self.graph.outputs)
        with self.builder.function(name, params=[*inputs, *variables.values()]):
            with self.builder.dataflow():
                for constant, tensor in self.graph.constants.items():
                    if constant in variables:
                        values[constant] = variables[constant]
                    elif constant in used:
                        values[constant] = relax.const(_plain(self.graph.array(constant), tensor.data_type))
                units = find_units(self.graph, self.nodes, self.products, outputs)
                last = {id(unit.nodes[-1]): unit for unit in units}
                inside = {id(node) for unit in units for node in unit.nodes}
                views = UnitEmitter(self.emitter, self.graph.shapes)
                for node in self.nodes:
                    if id(node) in last:
                        self._unit(last[id(node)], values, variables, views)
                    elif id(node) not in inside:
                        self._need(node, values, views)
                        self._convert(node, values, variables, delegate)
                for value in outputs:
                    if value not in values:
                        values[value] = views.tensor(value)
                results = [values[o] for o in outputs]
                out = self.builder.emit_output(relax.Tuple(results))
            self.builder.emit_func_output(out)
        gvar = self.builder.get().get_global_var(name)
        function = self.builder.get()[gvar].with_attr("num_input", len(inputs))
        self.builder.update_func(gvar, function)
        return names

    @property
    def _read(self) -> set[str]:
        """Values that nodes read, apart from what products have packed."""
        read: set[str] = set()
        for node in self.nodes:
            product = self.products[node.name][0] if node.name in self.products else None
            read |= set(node.input) if product is None else {product.left, product.right or "", *node.input[2:]}
        return read

    def _variable(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        from tvm import relax

        safe = "".join(c if c.isalnum() else "_" for c in name)
        return relax.Var(f"v_{safe}", relax.TensorType(shape, dtype))

    def _parameters(self) -> tuple[list[str], dict[str, Any]]:
        """Every stored tensor that the nodes read, as variables by name; the arrays go to the store."""
        found: dict[str, Array] = {}
        read = self._read
        for node in self.nodes:
            if node.name in self.products:
                found |= product_params(*self.products[node.name])
            for value in node.input:
                if value in self.graph.constants and value in read and value not in found:
                    array = _plain(self.graph.array(value), self.graph.types[value])
                    scale = node.op_type in _SCALED and value == node.input[1]
                    data = array.dtype.kind == "f" or node.op_type in _TENSOR_READERS
                    if scale or (data and array.size > _INLINE):
                        found[value] = array
        names = [self._stored_name(name, array) for name, array in found.items()]
        return names, {n: self._variable(n, a.shape, a.dtype.name) for n, a in found.items()}

    def _stored_name(self, name: str, array: Array) -> str:
        """Where `array` lies in the store; what was folded for one batch size may differ from another's."""
        unique, i = name, 1
        while unique in self.store:
            other = self.store[unique]
            if other is array or (other.dtype == array.dtype and np.array_equal(other, array)):
                return unique
            i += 1
            unique = f"{name}@{i}"
        self.store[unique] = array
        return unique

    def _convert(self, node: onnx.NodeProto, values: dict[str, Any], variables: dict[str, Any], delegate: Any) -> None:
        from tvm import relax

        if node.name in self.products:
            values[node.output[0]] = self._product(node, values, variables)
            return
        inputs = [values[i] if i else None for i in node.input]
        try:
            if node.op_type == "GatherND":  # TVM's own shape arithmetic hands on int32, its GatherND wants int64
                inputs[1] = self.builder.emit(relax.op.astype(inputs[1], "int64"))
            own = _OPERATORS.get(node.op_type)
            result = own(self, node, inputs) if own is not None else None
            if result is None:
                result = delegate(node, inputs, values)
        except UnsupportedError:
            raise
        except Exception as error:
            raise UnsupportedError(
                message(
                    f"TVM cannot import node {node.name or node.output[0]!r} ({node.op_type})",
                    found=f"{type(error).__name__}: {_first_line(error)}",
                    fix="replace the operator in the model, or use another target",
                )
            ) from error
        values.update(zip(node.output, result, strict=False))

    def _unit(self, unit: Unit, values: dict[str, Any], variables: dict[str, Any], views: UnitEmitter) -> None:
        """A kernel with its epilogue."""
        if unit.kind == "norm":
            views.norm(unit, values, float(attributes(unit.node).get("epsilon", 1e-5)))
            return
        product, stored = self.products[unit.node.name]
        params = {name.rsplit("::", 1)[1]: variables[name] for name in product_params(product, stored)}

        def tensor(name: str | None) -> Callable[[], Any]:
            def find() -> Any:
                if name not in values:
                    values[str(name)] = views.tensor(str(name))
                return values[str(name)]

            return find

        views.product(unit, product, values, params, tensor(product.left), tensor(product.right))

    def _need(self, node: onnx.NodeProto, values: dict[str, Any], views: UnitEmitter) -> None:
        """Make tensors of the codes that `node` reads."""
        names = list(node.input)
        if node.name in self.products:
            product = self.products[node.name][0]
            names = [v for v in (product.left, product.right, product.token_scale, *node.input[2:]) if v]
        for name in names:
            if name not in values and name in views.views:
                values[name] = views.tensor(name)

    def _product(self, node: onnx.NodeProto, values: dict[str, Any], variables: dict[str, Any]) -> Any:
        from tvm import relax

        product, stored = self.products[node.name]
        keys = product_params(product, stored)
        params = {name.rsplit("::", 1)[1]: variables[name] for name in keys}
        right = None if product.right is None else values[product.right]
        token = None if product.token_scale is None else values[product.token_scale]
        result = self.emitter.product(product, values[product.left], right, params, token)
        if len(node.input) > 2 and node.input[2]:
            bias = values[node.input[2]]
            shape = (1, -1, *([1] * (len(product.out_shape) - 2)))
            result = self.builder.emit(relax.op.add(result, relax.op.reshape(bias, shape)))
        return result

    # Operators of our own

    def _elementwise(self, function: Callable[[Any], Any], x: Any, name: str) -> Any:
        from tvm import te

        return self.builder.emit_te(
            lambda t: te.compute(t.shape, lambda *i: function(t[i]), name=name), x, primfunc_name_hint=name
        )

    def _scaled(self, function: Callable[[Any, Any], Any], inputs: list[Any], name: str) -> Any:
        """Elementwise with a scale of rank 0: a parameter, so that equal layers share one function."""
        from tvm import te

        return self.builder.emit_te(
            lambda t, s: te.compute(t.shape, lambda *i: function(t[i], s[()]), name=name),
            inputs[0],
            inputs[1],
            primfunc_name_hint=name,
        )

    def _constant(self, node: onnx.NodeProto, position: int) -> Array:
        name = node.input[position] if position < len(node.input) else ""
        if name not in self.graph.constants:
            raise UnsupportedError(
                message(
                    f"quantizer {node.name!r}: its scale and zero point must be stored",
                    found=f"{name or 'nothing'} as input {position}",
                    fix="export with static scales, or with per-token scales as the common file writes them",
                )
            )
        return self.graph.array(name)

    def _quantize(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
        from tvm import te, tirx

        scale = self._constant(node, 1).astype(np.float32)
        zero_name = node.input[2] if len(node.input) > 2 else ""
        storage = onnx.TensorProto.DataType.Name(self.graph.types[zero_name]) if zero_name else "UINT8"
        zero = self._constant(node, 2).astype(np.float32) if zero_name else np.zeros_like(scale)
        low, high = _RANGES[storage]
        dtype = "int8" if low < 0 else "uint8"
        values = attributes(node)

        def code(x: Any, s: Any, z: Any) -> Any:
            rounded = self.emitter.kernels.nearbyint(x / s) + z
            clamped = tirx.max(tirx.min(rounded, tirx.const(float(high), "float32")), tirx.const(float(low), "float32"))
            return clamped.astype("int32").astype(dtype)

        if scale.ndim == 0:
            z = tirx.const(float(zero), "float32")
            return [self._scaled(lambda x, s: code(x, s, z), inputs, "quantize")]
        place = _scale_index(values, len(self.graph.shapes[node.input[0]]), scale.ndim)
        out = self.builder.emit_te(
            lambda x, s, z: te.compute(x.shape, lambda *i: code(x[i], s[place(i)], z[place(i)]), name="quantize"),
            inputs[0],
            inputs[1],
            _const(zero),
            primfunc_name_hint="quantize",
        )
        return [out]

    def _dequantize(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
        from tvm import te, tirx

        scale = self._constant(node, 1)
        zero = self._constant(node, 2).astype(np.int32) if len(node.input) > 2 else np.zeros(scale.shape, np.int32)

        def value(code: Any, s: Any, z: Any) -> Any:
            return (code.astype("int32") - z).astype("float32") * s

        if scale.ndim == 0:
            z = tirx.const(int(zero), "int32")
            return [self._scaled(lambda x, s: value(x, s, z), inputs, "dequantize")]
        place = _scale_index(attributes(node), len(self.graph.shapes[node.input[0]]), scale.ndim)
        out = self.builder.emit_te(
            lambda x, s, z: te.compute(x.shape, lambda *i: value(x[i], s[place(i)], z[place(i)]), name="dequantize"),
            inputs[0],
            inputs[1],
            _const(zero),
            primfunc_name_hint="dequantize",
        )
        return [out]

    def _layer_norm(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any] | None:
        values: dict[str, Any] = attributes(node)
        shape = self.graph.shapes[node.input[0]]
        axis = values.get("axis", -1) % len(shape)
        width = int(np.prod(shape[axis:], dtype=np.int64))
        if any(node.output[1:]) or int(np.prod(self.graph.shapes[node.input[1]], dtype=np.int64)) != width:
            return None
        rows = int(np.prod(shape[:axis], dtype=np.int64))
        bias = inputs[2] if len(inputs) > 2 and inputs[2] is not None else _const(np.zeros(width, np.float32))
        column, whole = Place((width,), (0, 0, 0, 1)), Place((rows, width), (0, 0, width, 1))
        steps = (Step("Mul", (("value", 0), ("operand", 0))), Step("Add", (("value", 1), ("operand", 1))))
        epilogue = Epilogue((column, column), steps, ((2, whole),))
        kernel = self.emitter.kernels.layer_norm(rows, width, float(values.get("epsilon", 1e-5)), epilogue)
        flat = [self._flat(inputs[0], (rows, width)), self._flat(inputs[1], (width,)), self._flat(bias, (width,))]
        return [self._flat(self._kernel(kernel, f"layer_norm_{rows}x{width}", flat, (rows, width)), shape)]

    def _softmax(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any] | None:
        shape = self.graph.shapes[node.input[0]]
        if attributes(node).get("axis", -1) % len(shape) != len(shape) - 1 or self.graph.opset < 13:
            return None
        rows, width = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
        flat = self._flat(inputs[0], (rows, width))
        return [
            self._flat(
                self._kernel(
                    self.emitter.kernels.softmax(rows, width), f"softmax_{rows}x{width}", [flat], (rows, width)
                ),
                shape,
            )
        ]

    def _gelu(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any]:
        tanh = attributes(node).get("approximate", b"none") == b"tanh"
        return [self._elementwise(fast.gelu_tanh if tanh else fast.gelu, inputs[0], "gelu")]

    def _simple(self, node: onnx.NodeProto, inputs: list[Any]) -> list[Any] | None:
        if self.graph.types[node.input[0]] != onnx.TensorProto.FLOAT:
            return None
        return [self._elementwise(_ELEMENTWISE[node.op_type], inputs[0], node.op_type.lower())]

    def _kernel(self, kernel: Any, name: str, arguments: list[Any], shape: tuple[int, ...]) -> Any:
        from tvm import relax

        gvar = self.builder.add_func(kernel, name)
        return self.builder.emit(relax.call_tir(gvar, arguments, relax.TensorType(shape, "float32")))

    def _flat(self, value: Any, shape: tuple[int, ...]) -> Any:
        from tvm import relax

        if tuple(int(d) for d in value.ty.shape) == tuple(shape):
            return value
        return self.builder.emit(relax.op.reshape(value, shape))


_OPERATORS: dict[str, Callable[[GraphImporter, onnx.NodeProto, list[Any]], list[Any] | None]] = {
    "QuantizeLinear": GraphImporter._quantize,
    "DequantizeLinear": GraphImporter._dequantize,
    "LayerNormalization": GraphImporter._layer_norm,
    "Softmax": GraphImporter._softmax,
    "Gelu": GraphImporter._gelu,
    **dict.fromkeys(_ELEMENTWISE, GraphImporter._simple),
}
# Integer constants are parameters only where they are data; elsewhere TVM's importer wants to see axes and shapes.
_SCALED = frozenset({"QuantizeLinear", "DequantizeLinear"})
_TENSOR_READERS = frozenset({"DequantizeLinear"})


def product_params(product: Product, stored: Stored | None) -> dict[str, Array]:
    """Parameters of a product by name, ``<op>::packed`` and so on."""
    if stored is None:
        return {}
    arrays = {"packed": stored.packed, "scale": stored.scale, "correction": stored.correction, "offset": stored.offset}
    return {f"{product.name}::{key}": a for key, a in arrays.items() if a is not None and a.size}


def _live(graph: StaticGraph, products: dict[str, tuple[Product, Stored | None]]) -> list[onnx.NodeProto]:
    """Nodes that the outputs need, once products read codes instead of dequantized values."""
    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if not any(o in needed for o in node.output):
            continue
        kept.append(node)
        if node.name in products:
            product = products[node.name][0]
            needed |= {v for v in (product.left, product.right, product.token_scale, *node.input[2:]) if v}
        else:
            needed |= set(node.input)
    return kept[::-1]


def _delegate(builder: Any, opset: int) -> Callable[[onnx.NodeProto, list[Any], dict[str, Any]], list[Any]]:
    """TVM's own converter for one node."""
    from tvm import relax
    from tvm.ir import GenericConst
    from tvm.relax.frontend.onnx.onnx_frontend import ONNXGraphImporter, onnx_input

    importer = ONNXGraphImporter({}, {}, sanitize=False)
    importer.bb, importer.opset = builder, opset

    def convert(node: onnx.NodeProto, inputs: list[Any], values: dict[str, Any]) -> list[Any]:
        importer._nodes = values
        given = onnx_input()
        given.extend(inputs)
        parsed = importer._parse_attr(node.attribute)
        parsed["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = importer._convert_operator(node.op_type, given, parsed, opset)
        if isinstance(result, relax.Tuple):
            return [builder.emit(f) if not isinstance(f, relax.Var) else f for f in result.fields]
        bound = result if isinstance(result, relax.Var | GenericConst | relax.ShapeExpr) else builder.emit(result)
        if isinstance(bound.ty, relax.TupleType):
            return [builder.emit(relax.TupleGetItem(bound, i)) for i in range(len(bound.ty.fields))]
        return [bound]

    return convert


def _scale_index(values: dict[str, Any], rank: int, scale_rank: int) -> Callable[[tuple[Any, ...]], Any]:
    """Where the scale of an element stands: per channel along `axis`, or blocks along it."""
    axis, block = int(values.get("axis", 1)) % rank, int(values.get("block_size", 0) or 0)
    if scale_rank == rank and block:
        return lambda i: tuple(p // block if a == axis else p for a, p in enumerate(i))
    return lambda i: (i[axis],)


def _const(array: Array) -> Any:
    from tvm import relax

    return relax.const(array, array.dtype.name)


def _plain(array: Array, element: int) -> Array:
    """4-bit codes one in each byte; everything else as it is."""
    if element == onnx.TensorProto.INT4:
        return array.astype(np.int8)
    return array.astype(np.uint8) if element == onnx.TensorProto.UINT4 else array


def _dtype(element: int) -> str:
    return str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(element)).name)


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else "no reason given"
