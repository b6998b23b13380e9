"""Common ONNX -> the explicit Q/DQ that TensorRT's parser and fusions take. Pure ONNX: needs no TensorRT.

TensorRT quantizes to signed INT8 with zero point 0, and nothing else. Worse, its parser reads a UINT8 zero point as
INT8 and only warns, so codes above 127 would saturate in silence. So every quantizer is brought into that form here,
with codes that stay exact:

- **Activation codes are stored less their zero point**, ``t = code - zero_point``. Where every t fits INT8 (all 4-bit
  grids, signed 8-bit with zero point 0, unsigned 8-bit with zero point 128), the pair becomes ``Clip`` to the grid's
  ends + INT8 Q/DQ. The ends are grid points, so clamping before rounding equals clamping after it.
- **Where t does not fit** (attention probabilities as UINT8: 0..255), t is shifted by a whole number o and quantized as
  ``u = clip(round(x / s)) - o`` with scale 1; the product gets back ``o * s * sum_k W[k, n]``. The product is on exact
  INT8 codes; the added term is float and differs from the reference by rounding only. TensorRT then runs attention as
  two INT8 products instead of its one fused kernel.
- **Weights of 4 bits stay INT4** for MatMul: TensorRT keeps them packed and casts them to INT8 in front of the
  product. A Conv takes no INT4 weights, so its codes are stored one in each byte.
- **A per-token scale** moves behind its product, which then runs on codes.
- **NVFP4** is in `_trt_fp4`, the float part in 16 bits in `_trt_compute`, attention as one kernel in `_trt_attention`.

Lost: TensorRT's quantizer multiplies by the rounded reciprocal of the scale where ONNX divides, so a value within an
ULP of a rounding boundary may get the neighbouring code.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from s2d_deploy.errors import UnsupportedError, message
from s2d_deploy.qgraph import attributes, load_model, metadata
from s2d_deploy.session import as_codes

from ._trt_files import require_opset, save, with_types
from ._trt_fp4 import is_fp4, to_tensorrt

CODES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}  # container -> its codes
INT8_MIN, INT8_MAX = CODES["INT8"]


@dataclass
class _Graph:
    """The model being rewritten, with the look-ups that every step needs."""

    model: onnx.ModelProto
    stored: dict[str, onnx.TensorProto] = field(default_factory=dict)
    producers: dict[str, onnx.NodeProto] = field(default_factory=dict)
    consumers: dict[str, list[onnx.NodeProto]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def index(self) -> None:
        graph = self.model.graph
        self.stored = {t.name: t for t in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                self.stored[node.output[0]] = node.attribute[0].t
        self.producers = {o: n for n in graph.node for o in n.output}
        self.consumers = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def array(self, name: str) -> npt.NDArray[Any]:
        return numpy_helper.to_array(self.stored[name])

    def add(self, name: str, array: npt.NDArray[Any]) -> str:
        if name not in self.stored:
            self.model.graph.initializer.append(numpy_helper.from_array(array, name))
            self.stored[name] = self.model.graph.initializer[-1]
        return name

    def insert(
        self, after: onnx.NodeProto | None, before: onnx.NodeProto | None, nodes: Iterable[onnx.NodeProto]
    ) -> None:
        """Put `nodes` behind `after`, or in front of `before` (the graph stays topologically sorted)."""
        every = self.model.graph.node
        anchor = before if before is not None else after
        at = next(i for i, n in enumerate(every) if n is anchor or n.name == anchor.name) if anchor is not None else 0
        for offset, node in enumerate(nodes):
            every.insert(at + offset + (before is None), node)


def to_dialect(model: onnx.ModelProto) -> onnx.ModelProto:
    """Rewrite a common ONNX model in place, and return it.

    Raises:
        UnsupportedError: quantizers that TensorRT cannot express; every offender is named, with the recipe key.
    """
    g = _Graph(model)
    g.index()
    _move_token_scales(g)
    g.index()
    _weights(g)
    _activations(g)
    if g.refused:
        text = message(
            f"TensorRT cannot express {len(g.refused)} quantizer(s)",
            expected="activations per tensor, weights symmetric, block scales beside float activations only",
        )
        raise UnsupportedError("\n  ".join([text, *g.refused]))
    _drop_unused(model)
    return model


def write_dialect(source: Path, target: Path) -> onnx.ModelProto:
    """Rewrite the common ONNX file `source` into `target`, checked by the ONNX checker with shape inference.

    Raises:
        ArtifactError: `source` is no readable ONNX file, or of another opset.
        UnsupportedError: see `to_dialect`.
    """
    model = load_model(source)
    require_opset(model, source)
    model = to_dialect(model)
    target.parent.mkdir(parents=True, exist_ok=True)
    model = with_types(model)
    to_tensorrt(model)
    save(model, target)
    return model


def widen_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Store per-channel INT4 weight codes one in each byte, in place: twice the size, no unpacking, same numbers."""
    g = _Graph(model)
    g.index()
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in g.stored and not attributes(node).get("block_size"):
            codes = g.stored[node.input[0]]
            if codes.data_type == onnx.TensorProto.INT4:
                _store(g, node, as_codes(g.array(node.input[0])), np.dtype(np.int8))
    del model.graph.value_info[:]
    _drop_unused(model)
    return model


def _move_token_scales(g: _Graph) -> None:
    """``MatMul(DQ(q) * scale[..., 1], W)`` -> ``MatMul(DQ(q), W) * scale[..., 1]``: the product then runs on codes."""
    for product in list(g.model.graph.node):
        scaling = g.producers.get(product.input[0]) if product.op_type == "MatMul" else None
        if scaling is None or scaling.op_type != "Mul":
            continue
        dequantize = g.producers.get(scaling.input[0])
        if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.input[0] in g.stored:
            continue
        raw = f"{product.output[0]}.unscaled"
        after = helper.make_node(
            "Mul", [raw, scaling.input[1]], [product.output[0]], name=f"{product.name}.token_scale"
        )
        product.input[0], product.output[0] = scaling.input[0], raw
        g.insert(product, None, [after])


def _weights(g: _Graph) -> None:
    for node in g.model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in g.stored or is_fp4(g.stored[node.input[0]]):
            continue
        site = _site(node)
        if not _usable(g, site, g.array(node.input[1])):
            continue
        users = g.consumers.get(node.output[0], [])
        blocked = bool(attributes(node).get("block_size"))
        if blocked and any(_quantized_left(g, user) for user in users):
            g.refused.append(
                f"{site}: scales in blocks along K beside quantized activations (they do not leave the integer sum); "
                "fix: per-channel weights, or float activations (w4a16), for this layer with quantize.overrides"
            )
            continue
        if along := _along_the_sum(node, users, g.array(node.input[1])):
            g.refused.append(
                f"{site}: scales along axis {along[0]} of {along[1]}'s weight, which is summed over; TensorRT takes "
                "one for each output channel; fix: per-channel weights as s2d-deploy quantize makes them"
            )
            continue
        packed = onnx.TensorProto.DataType.Name(g.stored[node.input[0]].data_type) == "INT4"
        codes = as_codes(g.array(node.input[0])).astype(np.int16)
        zero = as_codes(g.array(node.input[2])).astype(np.int16)
        if zero.any():
            codes = codes - _spread(zero, codes, attributes(node))
        if codes.size and (codes.min() < INT8_MIN or codes.max() > INT8_MAX):
            g.refused.append(
                f"{site}: 8-bit weights less their zero points reach {int(codes.min())}..{int(codes.max())}, "
                "INT8 holds -128..127; fix: symmetric weights"
            )
            continue
        keep = packed and not any(user.op_type == "Conv" for user in users) and _fits(codes, CODES["INT4"])
        if keep and not zero.any():
            continue
        if blocked and not keep:
            g.refused.append(f"{site}: block-wise weights with zero points; fix: symmetric weights")
            continue
        _store(g, node, codes, np.dtype(ml_dtypes.int4) if keep else np.dtype(np.int8))


def _along_the_sum(
    node: onnx.NodeProto, users: Iterable[onnx.NodeProto], scale: npt.NDArray[Any]
) -> tuple[int, str] | None:
    """The axis of per-channel scales, and the product that sums over it, if one does: TensorRT ignores such an axis."""
    values = attributes(node)
    if scale.ndim != 1 or scale.size < 2 or values.get("block_size"):
        return None
    axis = int(values.get("axis", 1))
    for user in users:
        outer = {"MatMul": (1, -1), "Conv": (0,)}.get(user.op_type)
        if outer is not None and axis not in outer:
            return axis, user.name
    return None


def _store(g: _Graph, node: onnx.NodeProto, codes: npt.NDArray[Any], dtype: np.dtype[Any]) -> None:
    shape = g.array(node.input[1]).shape
    node.input[0] = g.add(f"{node.name}.codes_{dtype.name}", np.ascontiguousarray(codes).astype(dtype))
    node.input[2] = g.add(f"{node.name}.zero_{dtype.name}", np.zeros(shape, dtype))


def _activations(g: _Graph) -> None:
    for node in list(g.model.graph.node):
        if node.op_type != "QuantizeLinear" or node.input[0] in g.stored:
            continue
        site = _site(node)
        readers = [n for n in g.consumers.get(node.output[0], []) if n.op_type == "DequantizeLinear"]
        if len(node.input) < 3 or node.input[1] not in g.stored or g.array(node.input[1]).ndim or not readers:
            g.refused.append(
                f"{site}: an activation scale that is not one constant; fix: quantize.activation_granularity: tensor"
            )
            continue
        scale = g.array(node.input[1]).astype(np.float32)
        if not _usable(g, site, scale):
            continue
        container = onnx.TensorProto.DataType.Name(g.stored[node.input[2]].data_type)
        zero = int(as_codes(g.array(node.input[2])))
        low, high = (end - zero for end in CODES[container])
        if low >= INT8_MIN and high <= INT8_MAX:
            _clip(g, node, scale, low, high)
            for quantizer in (node, *readers):
                quantizer.input[2] = g.add("zero_int8", np.zeros((), np.int8))
        else:
            _shift(g, node, readers, scale, low, high)


def _clip(g: _Graph, node: onnx.NodeProto, scale: npt.NDArray[np.float32], low: int, high: int) -> None:
    if (low, high) == (INT8_MIN, INT8_MAX):
        return  # Q saturates there by itself
    name = f"{node.name}.clip"
    bounds = [
        g.add(f"{name}.low", np.asarray(np.float32(low) * scale)),
        g.add(f"{name}.high", np.asarray(np.float32(high) * scale)),
    ]
    clip = helper.make_node("Clip", [node.input[0], *bounds], [name], name=name)
    node.input[0] = name
    g.insert(None, node, [clip])


def _shift(
    g: _Graph,
    node: onnx.NodeProto,
    readers: list[onnx.NodeProto],
    scale: npt.NDArray[np.float32],
    low: int,
    high: int,
) -> None:
    """Codes less their zero point reach low..high, 256 values in a row beside INT8's: store them less `offset`."""
    offset = low - INT8_MIN
    site = _site(node)
    products = [(reader, user) for reader in readers for user in g.consumers.get(reader.output[0], [])]
    for _, product in products:
        other = [v for v in product.input[:2] if v not in {r.output[0] for r in readers}]
        if product.op_type != "MatMul" or len(other) != 1 or _shifted(g, other[0]):
            g.refused.append(
                f"{site}: 8-bit codes {low}..{high} less the zero point do not fit INT8 in front of {product.op_type} "
                f"{product.name!r}; fix: quantize.activation_symmetric: true"
            )
            return
    base, one = node.name, g.add("one_float", np.ones((), np.float32))
    names = [f"{base}.{step}" for step in ("units", "rounded", "clamped", "shifted")]
    ends = [g.add(f"{base}.{end}", np.asarray(np.float32(value))) for end, value in (("low", low), ("high", high))]
    moved = g.add(f"{base}.offset", np.asarray(np.float32(offset)))
    steps = [
        helper.make_node("Div", [node.input[0], node.input[1]], [names[0]], name=names[0]),
        helper.make_node("Round", [names[0]], [names[1]], name=names[1]),
        helper.make_node("Clip", [names[1], *ends], [names[2]], name=names[2]),
        helper.make_node("Sub", [names[2], moved], [names[3]], name=names[3]),
    ]
    g.insert(None, node, steps)
    node.input[0], node.input[1] = names[3], one
    for quantizer in (node, *readers):
        quantizer.input[2] = g.add("zero_int8", np.zeros((), np.int8))
    step = np.float32(offset) * scale
    for reader, product in products:
        _give_back(g, product, left=product.input[0] == reader.output[0], step=step)


def _give_back(g: _Graph, product: onnx.NodeProto, *, left: bool, step: npt.NDArray[np.float32]) -> None:
    """Add what the shift took from a product: ``step * (sum over K of the other operand)``."""
    other, result, name = product.input[1 if left else 0], product.output[0], f"{product.name}.shift"
    raw = f"{result}.shifted"
    product.output[0] = raw
    dequantize = g.producers.get(other)
    nodes = []
    if left and dequantize is not None and dequantize.op_type == "DequantizeLinear" and dequantize.input[0] in g.stored:
        codes = as_codes(g.array(dequantize.input[0])).astype(np.int64)
        zero = as_codes(g.array(dequantize.input[2])).astype(np.int64)
        # Exact until the last rounding: the sum of codes is an integer, the product is taken in double.
        total = (codes - zero).sum(axis=-2) * g.array(dequantize.input[1]).astype(np.float64) * np.float64(step)
        term = g.add(f"{name}.term", total.astype(np.float32))
    else:
        axis = g.add(f"{name}.axis", np.asarray([-2 if left else -1], np.int64))
        term = f"{name}.term"
        nodes = [
            helper.make_node("ReduceSum", [other, axis], [f"{name}.sum"], name=f"{name}.sum", keepdims=1),
            helper.make_node("Mul", [f"{name}.sum", g.add(f"{name}.step", np.asarray(step))], [term], name=term),
        ]
    nodes.append(helper.make_node("Add", [raw, term], [result], name=f"{name}.add"))
    g.insert(product, None, nodes)


def _shifted(g: _Graph, value: str) -> bool:
    """Whether `value` is an activation whose codes will be, or were, shifted."""
    reader = g.producers.get(value)
    quantizer = (
        g.producers.get(reader.input[0]) if reader is not None and reader.op_type == "DequantizeLinear" else None
    )
    if reader is None or quantizer is None or quantizer.op_type != "QuantizeLinear":
        return False
    container = onnx.TensorProto.DataType.Name(g.stored[reader.input[2]].data_type)
    zero = int(as_codes(g.array(reader.input[2])))
    fits = CODES[container][0] - zero >= INT8_MIN and CODES[container][1] - zero <= INT8_MAX
    return not fits or quantizer.input[0].endswith(".shifted")


def _quantized_left(g: _Graph, product: onnx.NodeProto) -> bool:
    node = g.producers.get(product.input[0])
    return node is not None and node.op_type == "DequantizeLinear"


def _usable(g: _Graph, site: str, scale: npt.NDArray[Any]) -> bool:
    """TensorRT multiplies by 1 / scale: a scale that is zero, denormal or not finite has no such thing in FP32."""
    bad = ~(np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny))
    if bad.any():
        worst = scale[bad].reshape(-1)[0]
        g.refused.append(
            f"{site}: {int(bad.sum())} scale(s) that are zero, denormal or not finite ({worst:g}); calibrate again"
        )
    return not bad.any()


def _fits(codes: npt.NDArray[Any], ends: tuple[int, int]) -> bool:
    return not codes.size or bool(codes.min() >= ends[0] and codes.max() <= ends[1])


def _spread(zero: npt.NDArray[Any], codes: npt.NDArray[Any], values: dict[str, Any]) -> npt.NDArray[Any]:
    axis = int(values.get("axis", 1)) % max(codes.ndim, 1)
    if zero.ndim == 0:
        return zero
    if block := values.get("block_size"):
        return np.repeat(zero, int(block), axis=axis)
    return zero.reshape([-1 if i == axis else 1 for i in range(codes.ndim)])


def _site(node: onnx.NodeProto) -> str:
    return metadata(node).get("s2d.site", node.name)


def _drop_unused(model: onnx.ModelProto) -> None:
    graph = model.graph
    outputs = {o.name for o in graph.output}
    while True:
        used = {name for node in graph.node for name in node.input} | outputs
        dead = [n for n in graph.node if not used.intersection(n.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]  # types of codes changed; inferred anew
