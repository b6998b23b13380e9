"""What each contraction of the graph becomes: which operands are codes, which are stored, and in which shapes.

MatMul and Conv are brought to one form, ``(batch, M, K) x (batch, K, N)``: a stored right operand takes all leading
dimensions into M; a convolution unfolds its windows into rows; blocks of K with scales of their own become a batch
whose products are scaled and added up afterwards; groups of a convolution become a batch.

Integer products are exact whatever the zero points: stored codes are shifted into the signed range of their width,
and what the shift adds is taken back as ``(shift - zero_point[n]) * sum_k (a - a_zero)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx

from s2d_deploy.errors import UnsupportedError, message
from s2d_deploy.qgraph import Contraction, Operand, attributes
from s2d_deploy.session import Array

from ._tvm_cuda_isa import CudaIsa
from ._tvm_isa import Isa
from ._tvm_panels import Panels, panel_width
from ._tvm_static import StaticGraph

Arithmetic = Literal["integer", "weight-only", "float"]


@dataclass(frozen=True, slots=True)
class Window:
    """A convolution's window, over any number of spatial dimensions."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]
    groups: int


@dataclass(frozen=True, slots=True)
class Token:
    """A left operand with a run-time scale for each token: codes, and the graph value that holds the scales."""

    operand: Operand
    scale: str


@dataclass(frozen=True, slots=True)
class Product:
    """One contraction, as it will be compiled.

    Attributes:
        name, macs, declared: as in the common file.
        arithmetic: ``"integer"``: codes times codes; ``"weight-only"``: floats times 4/8-bit codes that are
            dequantized first; ``"float"``.
        left, right: graph values that are read; `right` is None where it is stored.
        left_shape, right_shape, out_shape: of the graph values.
        batch, rows: of the product, see the module.
        panels: geometry of the right operand.
        left_signed, left_zero, left_small: of the left codes; small are 4-bit codes.
        right_signed, right_small, right_zero: of the right codes where they are an activation; small are 4-bit codes.
        blocks: how many blocks of K have scales of their own; 1 otherwise.
        window: of a convolution.
        token_scale: graph value with a scale for each row of the left operand, or None.
        note: why it does not run on integers although it is declared to; "" otherwise.
    """

    name: str
    macs: int
    declared: str
    arithmetic: Arithmetic
    left: str
    right: str | None
    left_shape: tuple[int, ...]
    right_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    batch: int
    rows: int
    panels: Panels
    left_signed: bool = True
    left_zero: int = 0
    left_small: bool = False
    right_signed: bool = True
    right_small: bool = False
    right_zero: int = 0
    blocks: int = 1
    window: Window | None = None
    token_scale: str | None = None
    note: str = ""

    @property
    def byte_zero(self) -> int:
        """What stands for zero in the left bytes (codes made unsigned by adding 128 to signed ones)."""
        return self.left_zero + (128 if self.left_signed else 0)

    @property
    def shared_right(self) -> bool:
        """Whether the right operand is one matrix for all samples: a weight."""
        return len(self.right_shape) <= 2 or self.window is not None

    @property
    def rows_total(self) -> int:
        """Rows of the left operand with all leading dimensions."""
        return int(np.prod(self.left_shape[:-1], dtype=np.int64))

    @property
    def float_panels(self) -> Panels:
        """Geometry of the right operand as floats."""
        return Panels(self.panels.k, self.panels.n, self.panels.width, 1, 32)

    @property
    def right_shift(self) -> int:
        """What is subtracted from right codes of an activation so that they fit signed bytes."""
        if self.right_signed:
            return 0
        return self.right_zero if self.right_small else 128

    @property
    def right_correction(self) -> int:
        """Factor of the row sums that takes `right_shift` and the zero point back, for an activation."""
        return self.right_shift - self.right_zero if self.right is not None and self.arithmetic == "integer" else 0

    @property
    def out_batch(self) -> tuple[int, ...]:
        """Batch dimensions of a product of two activations."""
        return tuple(np.broadcast_shapes(self.left_shape[:-2], self.right_shape[:-2]))

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape of the result before dimensions of a vector operand are dropped."""
        if self.window is not None:
            return self.out_shape
        if self.shared_right:
            return (*self.left_shape[:-1], self.panels.n)
        return (*self.out_batch, self.left_shape[-2], self.panels.n)


@dataclass(frozen=True, slots=True)
class Stored:
    """Parameters of one product.

    Attributes:
        packed: the right operand in panels.
        scale: float32; integer products: ``(blocks, N)``, activation scale included where it is static; weight-only:
            ``(K / block, N)``.
        correction: int32 ``(blocks, N)``, see the module; None where it is zero.
        offset: weight-only: float32 zero points in the shape of `scale`, or None where they are zero.
    """

    packed: Array
    scale: Array | None = None
    correction: Array | None = None
    offset: Array | None = None


def token_operands(graph: StaticGraph) -> dict[str, Token]:
    """Per-token quantized values: ``DequantizeLinear(QuantizeLinear(x / s, 1), 1) * s``, by the Mul's output."""
    producers = {o: n for n in graph.nodes for o in n.output}
    found = {}
    for node in graph.nodes:
        if node.op_type != "Mul":
            continue
        for value, scale in (node.input, reversed(node.input)):
            dequantize = producers.get(value)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            quantize = producers.get(dequantize.input[0])
            divide = producers.get(quantize.input[0]) if quantize is not None else None
            unit = dequantize.input[1] in graph.constants and np.all(graph.array(dequantize.input[1]) == 1)
            if divide is None or divide.op_type != "Div" or divide.input[1] != scale or not unit:
                continue
            zero = graph.array(dequantize.input[2])
            storage = onnx.TensorProto.DataType.Name(graph.types[dequantize.input[2]])
            codes = dequantize.input[0]
            site = next((p.value for p in dequantize.metadata_props if p.key == "s2d.site"), dequantize.name)
            one = np.array(1, np.float32)
            operand = Operand(site, codes, node.output[0], storage, one, zero.astype(np.int8), None, None, None)
            found[node.output[0]] = Token(operand, scale)
    return found


def lower_product(
    graph: StaticGraph,
    contraction: Contraction,
    tokens: dict[str, Token],
    isa: Isa | CudaIsa,
    packed: dict[str, Stored | None],
) -> tuple[Product, Stored | None]:
    """Decide how `contraction` is compiled, and pack what it stores.

    Args:
        graph: it lies in.
        contraction: of the common file.
        tokens: see `token_operands`.
        isa: what the kernels are generated for.
        packed: what was packed for another batch size, by name; used again, and filled here.

    Raises:
        UnsupportedError: a convolution with ``auto_pad``; the message names it.
    """
    node = contraction.node
    window = _window(node, graph) if node.op_type == "Conv" else None
    token = tokens.get(node.input[0])
    left = token.operand if token is not None else contraction.left
    arithmetic, note = _arithmetic(contraction, left, window)
    quantized_right = contraction.right if arithmetic != "float" else None
    stored = quantized_right is not None and quantized_right.stored is not None
    right_name = node.input[1]
    constant = (
        not stored
        and arithmetic == "float"
        and right_name in graph.constants
        and (window is not None or len(graph.shapes[right_name]) <= 2)
    )
    matrix, left_shape, right_shape = _shapes(graph, node, window)
    blocks = 1
    if arithmetic == "integer" and contraction.right is not None and contraction.right.block is not None:
        blocks = matrix[1] // contraction.right.block
    groups = window.groups if window is not None else 1
    batch, k, n = matrix[0] * groups * blocks, matrix[1] // blocks, matrix[2]
    bits = 32
    if arithmetic == "integer":
        bits = 4 if stored and quantized_right is not None and quantized_right.storage.endswith("INT4") else 8
    group = isa.group if arithmetic == "integer" else 1
    panels = Panels(k, n, panel_width(n, isa.widths), group, bits)
    reads_codes = arithmetic == "integer"
    product = Product(
        name=contraction.name,
        macs=contraction.macs or matrix[0] * matrix[3] * matrix[1] * matrix[2] * groups // _samples(graph),
        declared=contraction.declared,
        arithmetic=arithmetic,
        left=left.codes if reads_codes and left is not None else node.input[0],
        right=None
        if stored or constant
        else (contraction.right.codes if reads_codes and contraction.right is not None else right_name),
        left_shape=left_shape,
        right_shape=right_shape,
        out_shape=graph.shapes[node.output[0]],
        batch=batch,
        rows=matrix[3],
        panels=panels,
        left_signed=left is None or not left.storage.startswith("U"),
        left_zero=int(left.zero_point) if reads_codes and left is not None else 0,
        left_small=left is not None and left.storage.endswith("INT4"),
        right_signed=contraction.right is None or not contraction.right.storage.startswith("U"),
        right_small=contraction.right is not None and contraction.right.storage.endswith("INT4"),
        right_zero=int(contraction.right.zero_point)
        if reads_codes and not stored and contraction.right is not None
        else 0,
        blocks=blocks,
        window=window,
        token_scale=token.scale if token is not None and reads_codes else None,
        note=note,
    )
    if product.name not in packed:
        weights = graph.array(right_name) if constant else None
        packed[product.name] = _store(product, left, quantized_right, weights)
    return product, packed[product.name]


def _store(product: Product, left: Operand | None, right: Operand | None, weights: Array | None) -> Stored | None:
    if weights is not None:
        return Stored(product.panels.pack(_as_matrices(weights.astype(np.float32), product.window)))
    if right is None:
        return None
    if product.arithmetic == "weight-only":
        return _weight_only(product, right)
    if left is None:
        raise TypeError("an integer product has two quantized operands")
    return _integer(product, left, right)


def _samples(graph: StaticGraph) -> int:
    shape = graph.shapes[graph.inputs[0]]
    return shape[0] if shape and shape[0] else 1


def _arithmetic(contraction: Contraction, left: Operand | None, window: Window | None) -> tuple[Arithmetic, str]:
    right = contraction.right
    if right is None:
        return "float", "" if contraction.declared == "float" else "its right operand is not quantized in the file"
    axis = 0 if window is not None else 1
    per_channel = right.scale.ndim == 0 or (right.block is None and right.stored is not None and right.axis == axis)
    blocked = right.block is not None and right.axis == 0 and window is None and right.stored is not None
    if left is None:
        if right.stored is not None and window is None and right.stored.ndim == 2 and (per_channel or blocked):
            return "weight-only", ""
        return "float", "" if contraction.declared == "float" else "computed in float from dequantized operands"
    if left.scale.ndim or left.block is not None:
        return "float", "the scale of its left operand changes inside the sum"
    if right.stored is None and right.scale.ndim:
        return "float", "the scale of its right activation is not per tensor"
    if not (per_channel or blocked):
        return "float", "the scale of its weight changes inside the sum"
    if right.stored is not None and window is None and right.stored.ndim != 2:
        return "float", "its stored right operand is not a matrix"
    return "integer", ""


def _shapes(
    graph: StaticGraph, node: onnx.NodeProto, window: Window | None
) -> tuple[tuple[int, int, int, int], tuple[int, ...], tuple[int, ...]]:
    """``(batch, K, N, M)`` without groups and blocks, and the operands' shapes."""
    left, right = graph.shapes[node.input[0]], graph.shapes[node.input[1]]
    if window is not None:
        out = graph.shapes[node.output[0]]
        rows = out[0] * int(np.prod(out[2:], dtype=np.int64))
        return (1, int(np.prod(right[1:], dtype=np.int64)), right[0] // window.groups, rows), left, right
    left2 = left if len(left) > 1 else (1, *left)
    right2 = right if len(right) > 1 else (*right, 1)
    if len(right2) == 2:
        return (1, left2[-1], right2[-1], int(np.prod(left2[:-1], dtype=np.int64))), left2, right2
    batch = int(np.prod(np.broadcast_shapes(left2[:-2], right2[:-2]), dtype=np.int64))
    return (batch, left2[-1], right2[-1], left2[-2]), left2, right2


def _window(node: onnx.NodeProto, graph: StaticGraph) -> Window:
    values: dict[str, Any] = attributes(node)
    kernel = tuple(graph.shapes[node.input[1]][2:])
    if values.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UnsupportedError(
            message(
                f"convolution {node.name!r} uses auto_pad",
                found=values["auto_pad"].decode(),
                fix="export it with explicit padding",
            )
        )
    ones, zeros = (1,) * len(kernel), (0,) * (2 * len(kernel))
    return Window(
        kernel,
        tuple(values.get("strides", ones)),
        tuple(values.get("pads", zeros)),
        tuple(values.get("dilations", ones)),
        int(values.get("group", 1)),
    )


def _as_matrices(weights: Array, window: Window | None) -> Array:
    """``(batch, K, N)``: a matrix (or vector) alone, or a convolution's weight with groups as the batch."""
    if window is None:
        return weights.reshape(1, weights.shape[0], -1)
    per_group = weights.reshape(window.groups, weights.shape[0] // window.groups, -1)
    return per_group.transpose(0, 2, 1)


def _integer(product: Product, left: Operand, right: Operand) -> Stored | None:
    scale = left.scale.astype(np.float32) if product.token_scale is None else np.float32(1)
    panels, groups = product.panels, product.window.groups if product.window is not None else 1
    parts = product.blocks * groups
    scales = np.broadcast_to(right.scale, _per_part(right, parts, panels.n)).astype(np.float32)
    combined = np.ascontiguousarray((scale * scales).reshape(parts, panels.n), dtype=np.float32)
    if right.stored is None:
        return Stored(np.empty(0, np.int8), combined[:1])
    signed = not right.storage.startswith("U")
    shift = 0 if signed else (8 if panels.bits == 4 else 128)
    codes = _as_matrices(right.stored.astype(np.int16) - shift, product.window).astype(np.int8)
    if product.blocks > 1:
        codes = codes.reshape(product.blocks, panels.k, panels.n)
    zeros = np.broadcast_to(right.zero_point.astype(np.int32), _per_part(right, parts, panels.n))
    correction = np.ascontiguousarray(shift - zeros.reshape(parts, panels.n), dtype=np.int32)
    return Stored(panels.pack(codes), combined, correction if correction.any() else None)


def _per_part(right: Operand, parts: int, n: int) -> tuple[int, ...]:
    if right.scale.ndim == 0:
        return (parts, n)
    return right.scale.shape


def _weight_only(product: Product, right: Operand) -> Stored:
    if right.stored is None:
        raise TypeError("a weight-only product has a stored weight")
    bits = 4 if right.storage.endswith("INT4") else 8
    signed = not right.storage.startswith("U")
    shift = 0 if signed else (8 if bits == 4 else 128)
    n = product.panels.n
    layout = Panels(product.panels.k, n, product.panels.width, 1, bits)
    codes = (right.stored.astype(np.int16) - shift).astype(np.int8)
    rows = right.scale.shape[0] if right.block is not None else 1
    scale = np.broadcast_to(right.scale, (rows, n)).astype(np.float32)
    zeros = np.broadcast_to(right.zero_point.astype(np.float32), (rows, n)) - np.float32(shift)
    offset = np.ascontiguousarray(zeros, dtype=np.float32)
    return Stored(layout.pack(codes[None]), np.ascontiguousarray(scale), None, offset if offset.any() else None)
