"""Emit one contraction into a Relax function: bring operands into place, run the kernel, scale what comes out.

The kernel computes integers only, and the same kernel serves the model and its teacher-forced check (`accumulators`):
what is checked is what runs. Scales are applied afterwards by an elementwise function that TVM fuses with what follows
(bias, GELU, the next quantizer).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._tvm_cuda_isa import CudaIsa
from ._tvm_epilogue import Epilogue, Place
from ._tvm_isa import Isa
from ._tvm_kernel_set import kernels_of
from ._tvm_kernels import Geometry
from ._tvm_panels import Panels
from ._tvm_products import Product

OPAQUE = 8  # TVM's OpPatternKind: never fused, so that codes exist in memory where a check can see them


class Emitter:
    """Emits products into one Relax BlockBuilder; equal kernels become one function."""

    def __init__(self, builder: Any, isa: Isa | CudaIsa) -> None:
        self.builder, self.kernels = builder, kernels_of(isa)
        self._kernels: dict[int, tuple[Any, Any]] = {}
        self._names: dict[str, str] = {}
        self._placed: dict[tuple[object, ...], Any] = {}

    def start_function(self) -> None:
        """Forget what was emitted into the function before."""
        self._placed.clear()

    def product(self, product: Product, left: Any, right: Any, params: dict[str, Any], token: Any) -> Any:
        """The whole contraction, float32 in the shape of the graph's value.

        Args:
            product: what to compute.
            left: codes (int8/uint8) or floats.
            right: codes or floats of an activation; None where `params` holds the packed operand.
            params: ``"packed"``, ``"scale"``, ``"correction"``, ``"offset"`` as far as the product has them.
            token: run-time scales of the left operand's rows, or None.
        """
        if product.arithmetic != "integer":
            return self._floats(product, left, right, params)
        parts = self._integers(product, left, right, params)
        flat = None if token is None else self._reshape(token, (product.rows_total,))
        return self._combine(product, parts, params["scale"], flat)

    def accumulators(self, product: Product, left: Any, right: Any, params: dict[str, Any]) -> Any:
        """int32 accumulators of an integer product, in the shape of the graph's value."""
        return self._combine(product, self._integers(product, left, right, params), None, None)

    def _integers(self, product: Product, left: Any, right: Any, params: dict[str, Any]) -> dict[str, Any]:
        places = self.left_bytes(product, left)
        packed = params["packed"] if product.right is None else self.right_panels(product, right)
        panels, batch, rows = product.panels, product.batch, product.rows
        shape = (batch, rows, panels.n)
        left = Place((batch, rows, panels.depth), (rows * panels.depth, 0, panels.depth, 0), "uint8")
        out = Place(shape, (rows * panels.n, 0, panels.n, 1), "int32")
        geometry = Geometry((batch, 1), rows, left, panels, product.byte_zero)
        geometry = self.kernels.geometry(geometry, product)
        kernel = self.kernels.integer(geometry, Epilogue(outputs=((-1, out),)))
        function = self.add(kernel, geometry.name)
        self.name_kernel(product.name, function)
        parts = {"acc": self._call(function, [places, packed], shape, "int32")}
        if "correction" in params or product.right_correction:
            parts["sums"] = self._row_sums(product, places)
            parts["correction"] = params.get("correction")
        return parts

    def kernel_name(self, product: Product) -> str:
        """The compiled function's name that runs the product's inner loop."""
        return self._names[product.name]

    def add(self, kernel: Any, name: str) -> Any:
        """The kernel as a function of the module; equal kernels (the same object) are one function."""
        if id(kernel) not in self._kernels:
            self._kernels[id(kernel)] = kernel, self.builder.add_func(kernel, name)
        return self._kernels[id(kernel)][1]

    def name_kernel(self, product: str, function: Any) -> None:
        """Remember that `function` runs the inner loop of `product`."""
        self._names[product] = str(function.name_hint)

    def _floats(self, product: Product, left: Any, right: Any, params: dict[str, Any]) -> Any:
        panels = product.float_panels
        place = self._left_floats(product, left)
        if product.arithmetic == "weight-only":
            packed = self._dequantize_panels(product, params)
        elif product.right is None:
            packed = params["packed"]
        else:
            packed = self._pack_floats(product, right)
        kernel = self.kernels.floats(panels, product.batch, product.rows)
        function = self.add(kernel, f"float_{product.batch}x{product.rows}x{panels.k}x{panels.n}")
        self.name_kernel(product.name, function)
        out = self._call(function, [place, packed], (product.batch, product.rows, panels.columns), "float32")
        if panels.columns == panels.n and product.window is None:
            return self._reshape(out, product.out_shape)
        return self._combine(product, {"acc": out}, None, None)

    # Left operands

    def left_bytes(self, product: Product, left: Any) -> Any:
        """Codes of the left operand as bytes, ``(batch, rows, depth)``."""
        panels = product.panels
        shape = (product.batch, product.rows, panels.depth)
        if not product.left_signed and panels.depth == panels.k and product.window is None and product.blocks == 1:
            return self._reshape(self._broadcast(product, left, product.left_shape), shape)
        pad = 0 if product.window is None else product.byte_zero
        offset = 128 if product.left_signed else 0

        def byte(value: Any) -> Any:
            return (value.astype("int32") + offset).astype("uint8")

        return self._place(product, left, byte, "uint8", pad, "bytes")

    def _left_floats(self, product: Product, left: Any) -> Any:
        shape = (product.batch, product.rows, product.panels.k)
        if product.window is None:
            return self._reshape(self._broadcast(product, left, product.left_shape), shape)
        return self._place(product, left, lambda value: value, "float32", 0, "windows")

    def _place(
        self, product: Product, left: Any, convert: Callable[[Any], Any], dtype: str, pad: int, name: str
    ) -> Any:
        from tvm import te, tirx

        depth = product.float_panels.depth if dtype == "float32" else product.panels.depth
        shape = (product.batch, product.rows, depth)
        key = (product.left, shape, dtype, product.window, pad)
        if key in self._placed:
            return self._placed[key]
        k_real = product.panels.k
        source = left
        if product.window is None:
            source = self._broadcast(product, left, product.left_shape)
            source = self._reshape(source, (product.batch // product.blocks, product.rows, k_real * product.blocks))

        def compute(x: Any) -> Any:
            def element(b: Any, m: Any, k: Any) -> Any:
                if product.window is not None:
                    value = _windowed(product, x, b, m, k, convert, tirx.const(pad, dtype))
                else:
                    value = convert(x[b // product.blocks, m, b % product.blocks * k_real + k])
                return value if depth == k_real else tirx.if_then_else(k < k_real, value, tirx.const(0, dtype))

            return te.compute(shape, element, name=name)

        self._placed[key] = self._opaque(compute, source, name=name)
        return self._placed[key]

    def _row_sums(self, product: Product, places: Any) -> Any:
        from tvm import te

        def compute(x: Any) -> Any:
            k = te.reduce_axis((0, product.panels.k), name="k")
            return te.compute(
                (product.batch, product.rows),
                lambda b, m: te.sum(x[b, m, k].astype("int32") - product.byte_zero, axis=k),
                name="row_sums",
            )

        return self._opaque(compute, places, name="row_sums")

    # Right operands

    def right_panels(self, product: Product, right: Any) -> Any:
        """Codes of an activation as the right operand, ``(batch, *panels.shape)`` int8."""
        shift = product.right_shift
        return self._pack(product, right, product.panels, "int8", lambda v: (v.astype("int32") - shift).astype("int8"))

    def _pack_floats(self, product: Product, right: Any) -> Any:
        return self._pack(product, right, product.float_panels, "float32", lambda value: value)

    def _pack(self, product: Product, right: Any, panels: Panels, dtype: str, convert: Callable[[Any], Any]) -> Any:
        from tvm import te, tirx

        shape = (product.batch, *panels.shape)
        source = right
        if product.window is None:
            source = self._broadcast(product, right, product.right_shape)
            source = self._reshape(source, (product.batch, panels.k, panels.n))

        def compute(x: Any) -> Any:
            def element(b: Any, p: Any, run: Any, place: Any) -> Any:
                k = run * panels.group + place % panels.group
                n = p * panels.width + place // panels.group
                if product.window is None:
                    value = convert(x[b, k, n])
                else:
                    taps = _unravel(k, (product.right_shape[1], *product.window.kernel))
                    value = convert(x[(b * panels.n + n, *taps)])
                if panels.depth == panels.k and panels.columns == panels.n:
                    return value
                inside = tirx.all(k < panels.k, n < panels.n)
                return tirx.if_then_else(inside, value, tirx.const(0, dtype))

            return te.compute(shape, element, name="panels")

        return self._opaque(compute, source, name="panels")

    def _dequantize_panels(self, product: Product, params: dict[str, Any]) -> Any:
        from tvm import te, tirx

        panels, n_real = product.float_panels, product.panels.n
        packed, scale, offset = params["packed"], params["scale"], params.get("offset")
        four = str(packed.ty.dtype) == "uint8"
        rows = int(scale.ty.shape[0])
        block = panels.k // rows

        def compute(codes: Any, scales: Any, *offsets: Any) -> Any:
            def element(b: Any, p: Any, k: Any, j: Any) -> Any:
                if four:
                    nibble = (codes[b, p, k // 2, j].astype("int32") >> (k % 2 * 4)) & 15
                    code = (nibble ^ 8) - 8
                else:
                    code = codes[b, p, k, j].astype("int32")
                n = tirx.min(p * panels.width + j, n_real - 1)
                value = code.astype("float32")
                if offsets:
                    value = value - offsets[0][k // block, n]
                return value * scales[k // block, n]

            return te.compute((1, *panels.shape), element, name="dequantized")

        arguments = [packed, scale] if offset is None else [packed, scale, offset]
        return self._opaque(compute, *arguments, name="dequantize_panels")

    # Results

    def _combine(self, product: Product, parts: dict[str, Any], scale: Any, token: Any) -> Any:
        """Slice, add blocks up, correct zero points, scale: elementwise, so that TVM fuses it with what follows."""
        from tvm import te

        shape = product.full_shape
        dtype = "float32" if scale is not None or product.arithmetic != "integer" else "int32"
        names = [name for name in ("acc", "sums", "correction") if parts.get(name) is not None]
        extra = {"scale": scale, "token": token}
        arguments = {**{n: parts[n] for n in names}, **{n: v for n, v in extra.items() if v is not None}}

        def compute(*tensors: Any) -> Any:
            t = dict(zip(arguments, tensors, strict=True))

            def term(part: Any, m: Any, n: Any, group: Any) -> Any:
                value = t["acc"][part, m, n]
                if "sums" in t:
                    factor = t["correction"][group, n] if "correction" in t else product.right_correction
                    value = value + t["sums"][part, m] * factor
                if "scale" in t:
                    value = value.astype("float32") * t["scale"][group, n]
                return value * t["token"][m] if "token" in t else value

            def element(*index: Any) -> Any:
                b, m, n = _locate(product, index)
                if product.blocks == 1:
                    return term(b, m, n, b if product.window is not None else 0)
                block = te.reduce_axis((0, product.blocks), name="block")
                return te.sum(term(b * product.blocks + block, m, n, block), axis=block)

            return te.compute(shape, element, name="scaled" if dtype == "float32" else "accumulators")

        out = self.builder.emit_te(compute, *arguments.values(), primfunc_name_hint=f"combine_{dtype}")
        return self._reshape(out, product.out_shape)

    # Small steps

    def _broadcast(self, product: Product, value: Any, shape: tuple[int, ...]) -> Any:
        from tvm import relax

        if product.shared_right or product.window is not None:
            return value
        wanted = (*product.out_batch, *shape[-2:])
        return value if shape == wanted else self.builder.emit(relax.op.broadcast_to(value, wanted))

    def _reshape(self, value: Any, shape: tuple[int, ...]) -> Any:
        from tvm import relax

        if tuple(int(d) for d in value.ty.shape) == tuple(shape):
            return value
        return self.builder.emit(relax.op.reshape(value, tuple(shape)))

    def _call(self, function: Any, arguments: list[Any], shape: tuple[int, ...], dtype: str) -> Any:
        from tvm import relax

        return self.builder.emit(relax.call_tir(function, arguments, relax.TensorType(shape, dtype)))

    def _opaque(self, compute: Callable[..., Any], *arguments: Any, name: str) -> Any:
        return self.builder.emit_te(compute, *arguments, primfunc_name_hint=name, primfunc_attrs={"op_pattern": OPAQUE})


def _unravel(index: Any, shape: tuple[int, ...]) -> list[Any]:
    places = []
    for size in reversed(shape[1:]):
        places.append(index % size)
        index = index // size
    return [index, *reversed(places)]


def _ravel(index: tuple[Any, ...], shape: tuple[int, ...]) -> Any:
    flat: Any = 0
    for place, size in zip(index, shape, strict=True):
        flat = flat * size + place
    return flat


def _locate(product: Product, index: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Batch (blocks apart), row and column of the product for an element of its full shape."""
    shape = product.full_shape
    if product.window is not None:
        row = _ravel((index[0], *index[2:]), (shape[0], *shape[2:]))
        return index[1] // product.panels.n, row, index[1] % product.panels.n
    if product.shared_right:
        return 0, _ravel(index[:-1], shape[:-1]), index[-1]
    return _ravel(index[:-2], shape[:-2]), index[-2], index[-1]


def _windowed(product: Product, x: Any, group: Any, row: Any, k: Any, convert: Callable[[Any], Any], pad: Any) -> Any:
    """The element of an unfolded convolution input: row = (sample, place), k = (channel, tap)."""
    from tvm import tirx

    window = product.window
    if window is None:
        raise TypeError("not a convolution")
    spatial = len(window.kernel)
    sample, *places = _unravel(row, (product.out_shape[0], *product.out_shape[2:]))
    channel, *taps = _unravel(k, (product.left_shape[1] // window.groups, *window.kernel))
    at = [
        place * stride + tap * dilation - before
        for place, tap, stride, dilation, before in zip(
            places, taps, window.strides, window.dilations, window.pads[:spatial], strict=True
        )
    ]
    value = convert(x[(sample, group * (product.left_shape[1] // window.groups) + channel, *at)])
    if not any(window.pads):
        return value
    inside = [tirx.all(p >= 0, p < size) for p, size in zip(at, product.left_shape[2:], strict=True)]
    return tirx.if_then_else(tirx.all(*inside), value, pad)
