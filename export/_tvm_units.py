"""Emit units: one kernel with its epilogue each, and bytes that are handed on in the layout they were written in.

Codes have two forms here. As *bytes* (a `View`) they go from kernel to kernel; as tensors of the graph's own type and
shape they are made only where an operator without a kernel of its own, or the caller, asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ._tvm_emit import Emitter
from ._tvm_epilogue import SIGNED_OFFSET, Epilogue, Place, Step
from ._tvm_fusion import Unit, batch_of, strides_of
from ._tvm_kernels import Geometry
from ._tvm_panels import Panels
from ._tvm_products import Product


@dataclass(frozen=True)
class View:
    """Codes as bytes somewhere in a buffer.

    Attributes:
        buffer: Relax variable, uint8.
        shape: of the graph's value.
        strides: elements of the buffer from one index to the next, for each axis of the value.
        offset: what the bytes have too much: 128 for signed codes.
        padded: readable bytes of a row from its first on; at least the last axis.
    """

    buffer: Any
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    padded: int


class UnitEmitter:
    """Emits the units of one Relax function.

    Args:
        emitter: of products; holds the BlockBuilder.
        shapes: of the graph's values.
    """

    def __init__(self, emitter: Emitter, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.emitter, self.builder, self.shapes = emitter, emitter.builder, shapes
        self.views: dict[str, View] = {}
        self._panels: dict[tuple[object, ...], Any] = {}
        self._sums: dict[tuple[object, ...], Any] = {}

    def tensor(self, name: str) -> Any:
        """The codes of `views[name]` as a tensor of their own type and shape."""
        from tvm import relax, te

        view = self.views[name]
        size = int(np.prod(_shape(view.buffer), dtype=np.int64))
        flat = self.builder.emit(relax.op.reshape(view.buffer, (size,)))
        dtype = "int8" if view.offset else "uint8"

        def compute(x: Any) -> Any:
            def element(*index: Any) -> Any:
                place: Any = 0
                for at, stride in zip(index, view.strides, strict=True):
                    place = place + at * stride
                return (x[place].astype("int32") - view.offset).astype(dtype)

            return te.compute(view.shape, element, name="codes")

        return self.builder.emit_te(compute, flat, primfunc_name_hint="codes", primfunc_attrs={"op_pattern": 8})

    def product(
        self, unit: Unit, product: Product, values: dict[str, Any], params: dict[str, Any], left: Any, right: Any
    ) -> None:
        """A tail or scores; its results go to `values` (floats) and `views` (bytes).

        Args:
            unit: what to emit.
            product: its contraction.
            values: operands of the steps by name.
            params: ``"packed"`` and ``"scale"`` of the product.
            left, right: tensors of the operands' codes, called where there is no view of them.
        """
        bytes_, place = self._left(product, left)
        panels, shift = (params["packed"], 0) if product.right is None else self._right_panels(product, right)
        factor = shift - product.right_zero if product.right is not None else 0
        factors = "columns" if "correction" in params else "one" if factor else "none"
        geometry = Geometry(
            batch_of(product),
            product.rows,
            place,
            product.panels,
            product.byte_zero,
            product.blocks,
            factors,  # type: ignore[arg-type]
            factor,
        )
        geometry = self.emitter.kernels.geometry(geometry, product)
        scale = params["scale"]
        first = Place(_shape(scale), (0, 0, 0, 1))
        operands = (first, *(p for _, p in unit.operands))
        # Blocks are scaled before they are added up: value 0 is scaled already.
        scaled = (
            Step("Mul", (("value", 0), ("operand", 0))) if product.blocks == 1 else Step("Identity", (("value", 0),))
        )
        steps = (scaled, *unit.steps)
        extra = {"factors": params.get("correction"), "scales": scale}
        if factors != "none":
            extra["sums"] = self._row_sums(product, bytes_, geometry)
        given = [
            *(extra[name] for name, _, _ in geometry.extra),
            scale,
            *(values[name] for name, _ in unit.operands),
        ]
        result, number = unit.results[0]
        if unit.kind == "scores":
            self._scores(unit, product, geometry, (operands, steps), [bytes_, panels, *given])
            return
        shape = product.out_shape
        is_bytes = result in unit.views
        if is_bytes:
            shape = (geometry.products, geometry.rows, geometry.panels.n)
        place = Place(shape, unit.layout, "uint8" if is_bytes else "float32")
        kernel = self.emitter.kernels.integer(geometry, Epilogue(operands, steps, ((number, place),)))
        out = self._call(kernel, geometry.name, product.name, [bytes_, panels, *given], [place])[0]
        if is_bytes:
            self._see(result, out, unit, steps[number - 1])
        else:
            values[result] = out

    def norm(self, unit: Unit, values: dict[str, Any], epsilon: float) -> None:
        """A LayerNorm with its quantizers."""
        x = values[unit.node.input[0]]
        shape = _shape(x)
        rows, width = int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]
        outputs = tuple(
            (number, Place(shape, unit.layout, "uint8" if name in unit.views else "float32"))
            for name, number in unit.results
        )
        epilogue = Epilogue(tuple(p for _, p in unit.operands), tuple(unit.steps), outputs)
        kernel = self.emitter.kernels.layer_norm(rows, width, epsilon, epilogue)
        given = [self._reshaped(x, (rows, width)), *(values[name] for name, _ in unit.operands)]
        found = self._call(kernel, f"layer_norm_{rows}x{width}", "", given, [p for _, p in outputs])
        for (name, number), out in zip(unit.results, found, strict=True):
            if name in unit.views:
                self._see(name, out, unit, unit.steps[number - 1])
            else:
                values[name] = out

    def _scores(
        self,
        unit: Unit,
        product: Product,
        geometry: Geometry,
        epilogue: tuple[tuple[Place, ...], tuple[Step, ...]],
        given: list[Any],
    ) -> None:
        operands, steps = epilogue
        code = replace(steps[-1], arguments=())
        depth = -(-product.panels.n // 8) * 8  # whole pairs of groups, whatever the next product reads
        before = Epilogue(operands[:-1], steps[:-1], ())
        kernel, softmax = self.emitter.kernels.scores(geometry, before, code, depth)
        place = Place((geometry.products, geometry.rows, depth), (0, 0, 0, 0), "uint8")
        if softmax is None:
            out = self._call(kernel, f"{geometry.name}_softmax", product.name, given, [place])[0]
        else:
            shape = (geometry.products, geometry.rows, product.panels.n)
            scores = self._call(kernel, geometry.name, product.name, given[:-1], [Place(shape, (0, 0, 0, 0))])
            out = self._call(softmax, f"softmax_codes_{'x'.join(map(str, shape))}", "", [*scores, given[-1]], [place])[
                0
            ]
        name = unit.results[0][0]
        outer = product.out_batch
        strides = [geometry.rows * depth] * len(outer)
        for axis in range(len(outer) - 2, -1, -1):
            strides[axis] = strides[axis + 1] * outer[axis + 1]
        self.views[name] = View(out, product.out_shape, (*strides, depth, 1), code.offset, depth)

    def _see(self, name: str, out: Any, unit: Unit, code: Step) -> None:
        shape = self.shapes[name]
        self.views[name] = View(out, shape, unit.views[name], code.offset, shape[-1])

    # Operands

    def _row_sums(self, product: Product, bytes_: Any, geometry: Geometry) -> Any:
        """Sums of the left operand's rows; once for all products that read it."""
        panels = geometry.panels
        key = (product.left, geometry.left, geometry.zero, panels.k, geometry.blocks)
        if key not in self._sums:
            # Only what the sums depend on, so that equal ones are one function.
            own = Geometry(
                geometry.batch,
                geometry.rows,
                geometry.left,
                Panels(panels.k, 1, 1, panels.group, 8),
                geometry.zero,
                geometry.blocks,
            )
            kernel = self.emitter.kernels.row_sums(own)
            place = Place((geometry.products, geometry.blocks, geometry.rows), (0, 0, 0, 0), "int32")
            name = f"row_sums_{geometry.products}x{geometry.rows}x{panels.k}"
            self._sums[key] = self._call(kernel, name, "", [bytes_], [place])[0]
        return self._sums[key]

    def _left(self, product: Product, tensor: Any) -> tuple[Any, Place]:
        """Bytes of the left operand, and where the rows begin; blocks of K lie side by side."""
        view = self.views.get(product.left)
        if product.blocks > 1:
            whole = replace(product.panels, k=product.panels.k * product.blocks)
            product = replace(product, panels=whole, blocks=1, batch=product.batch // product.blocks)
        depth = product.panels.depth
        offset = SIGNED_OFFSET if product.left_signed else 0
        if view is not None and view.offset == offset and view.strides[-1] == 1 and view.padded >= depth:
            strides = self._four(product, view)
            if strides is not None:
                return view.buffer, Place(_shape(view.buffer), (*strides, 0), "uint8")
        bytes_ = self.emitter.left_bytes(product, tensor())
        outer, inner = batch_of(product)
        rows = product.rows
        return bytes_, Place((outer * inner, rows, depth), (inner * rows * depth, rows * depth, depth, 0), "uint8")

    def _four(self, product: Product, view: View) -> tuple[int, int, int] | None:
        """Strides of (outer, inner, row) of the left operand."""
        rows = view.shape[:-1]
        if not product.shared_right:
            rows = (*product.out_batch, view.shape[-2])
        size = int(np.prod(_shape(view.buffer), dtype=np.int64))
        if size > 2**27:
            return None
        places = np.zeros(view.shape[:-1], np.int64)
        for axis, stride in enumerate(view.strides[:-1]):
            index = [-1 if a == axis else 1 for a in range(len(view.shape) - 1)]
            places = places + (np.arange(view.shape[axis]) * stride).reshape(index)
        places = np.broadcast_to(places, rows).reshape(*batch_of(product), product.rows)
        found = strides_of(places)
        return None if found is None else (found[0], found[1], found[2])

    def _right_panels(self, product: Product, tensor: Any) -> tuple[Any, int]:
        """The right operand of two activations in panels, and what was subtracted from its codes.

        Packed once for all products that read it.
        """
        view = self.views.get(product.right or "")
        shape = (*product.out_batch, product.panels.k, product.panels.n)
        if view is None or view.shape != shape:
            return self.emitter.right_panels(product, tensor()), product.right_shift
        shift = 0 if product.right_signed else 128  # of codes; their bytes become signed by 128 in any case
        strides = (0, 0, *view.strides)[-4:]
        source = Place(_shape(view.buffer), (strides[0], strides[1], strides[2], strides[3]), "uint8")
        key = (product.right, product.panels)
        if key not in self._panels:
            kernel = self.emitter.kernels.panels(batch_of(product), product.panels, source, 128)
            products = int(np.prod(batch_of(product)))
            place = Place((products, *product.panels.shape), (0, 0, 0, 0), "int8")
            name = f"panels_{products}x{product.panels.k}x{product.panels.n}"
            self._panels[key] = self._call(kernel, name, "", [view.buffer], [place])[0]
        return self._panels[key], shift

    # Small steps

    def _call(self, kernel: Any, name: str, product: str, given: Sequence[Any], places: Sequence[Place]) -> list[Any]:
        from tvm import relax

        function = self.emitter.add(kernel, name)
        if product:
            self.emitter.name_kernel(product, function)
        types = [relax.TensorType(place.shape, place.dtype) for place in places]
        out = self.builder.emit(relax.call_tir(function, list(given), types if len(types) > 1 else types[0]))
        if len(types) == 1:
            return [out]
        return [self.builder.emit(relax.TupleGetItem(out, i)) for i in range(len(types))]

    def _reshaped(self, value: Any, shape: tuple[int, ...]) -> Any:
        from tvm import relax

        return value if _shape(value) == shape else self.builder.emit(relax.op.reshape(value, shape))


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(int(d) for d in value.ty.shape)
