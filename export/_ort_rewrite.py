"""The common ONNX graph in the form that ONNX Runtime's integer kernels take directly.

Nothing is left for the optimizer to recognize; each integer contraction is written as the kernel itself:

- Left operands are UINT8, right operands INT8: the byte dot product of x86 multiplies just that pair. On a CPU with
  AVX512-VNNI, UINT8 x UINT8 took 1.5 times as long and INT8 x INT8 20 to 40 times (197 x 384 x 1536). A code is
  stored with a shift where its own type is the other one, and the zero point carries the same shift, so products
  of differences are unchanged.
- An activation site is one ``QuantizeLinear`` to that byte. A 4-bit site needs a ``Clip`` behind it: of bytes, a
  quarter of the traffic of a Clip of floats in front. Shifted INT4 codes start at 0, where UINT8 saturates by itself.
- Reshape and Transpose commute with a per-tensor quantizer: the quantizer goes first, so that bytes are moved.
- MatMul is ``com.microsoft.MatMulIntegerToFloat`` (int32 accumulators times both scales, plus the bias). A following
  Mul by a power of two (attention's 1 / sqrt(64)) goes into the scale, which is exact.
- A Conv whose patches do not overlap (stride = kernel: every patch embedding) is the same MatMul over rearranged bytes:
  ``ConvInteger`` with INT8 weights took 13.6 ms where this takes 0.2 (ViT 384 wide, 224 px). Any other Conv is
  ``ConvInteger``, where the kernel's weight is the left operand, with a Mul by the scales behind it.
- INT4 weights stay INT4 in the file; ``Cast`` to INT8 is folded when the session loads, before kernels pack weights.
- INT4 blocks with float activations are ``com.microsoft.MatMulNBits`` with accuracy_level 1 (float arithmetic). The
  level that ONNX Runtime chooses when it fuses, 4, rounds activations to INT8, which no plan declares.
- Per-token activations are the same kernel on codes with scale 1, and a Mul by the tokens' scales behind it.
- What has no integer kernel (blocks of weights under one accumulator) is computed in float from dequantized values. The
  audit says so.

That is the default form of each contraction. `forms` names another one for some of them, which a search has measured
(`_ort_placement`): ``signed`` (INT8 x INT8, which Arm has an instruction for), ``convinteger``, ``nbits-int8``
(accuracy_level 4), or ``float``: the stored weight dequantized when the session loads, activations not rounded at all.

What is lost: nothing but the order of float roundings (the product of the two scales is rounded once).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from s2d_deploy.qgraph import Contraction, Operand, attributes, contractions, metadata
from s2d_deploy.session import Array, as_codes

from ._ort_operands import CODES, CONTAINER, PART, SHIFT, SHIFTS, STORAGE, Operands
from ._ort_surgery import CONTRIB, annotate

FLOAT_LEVEL = 1  # MatMulNBits accuracy_level: 0 unset, 1 float32, 2 float16, 3 bfloat16, 4 int8 activations
NBITS_BLOCKS = (16, 32, 64, 128, 256)
INT8_LEVEL = 4
PLACED = "s2d.placement"  # metadata of a contraction that a search has put into another form than the default
# Default form -> all forms that mean the same; of "nbits-int8" see `forms_of`.
_FORMS = {
    "matmul": ("matmul", "signed", "float"),
    "token": ("token", "float"),
    "patches": ("patches", "convinteger", "float"),
    "conv": ("conv", "float"),
    "nbits": ("nbits", "float"),
}


def to_integer_kernels(model: onnx.ModelProto, forms: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """A copy of the common model on ONNX Runtime's integer kernels.

    Contractions keep their node names and ``s2d.*`` metadata. The node that makes a site's codes carries ``s2d.site``,
    and ``s2d.storage``, ``s2d.shift`` and ``s2d.container`` to get the plan's codes back; its output is named as in
    the common model.

    Args:
        model: the common model.
        forms: op -> one of `forms_of`; the default form for every other op. They stand in the node's ``s2d.placement``.
    """
    return _Rewriter(model, forms or {}).rewritten()


def to_plain_quantizers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the common model in Q/DQ, for execution providers that fuse those themselves.

    Activation codes are bytes: 4-bit ones are clipped behind an INT8 QuantizeLinear, since INT4 activations have no
    kernel anywhere. Weights stay behind DequantizeLinear with the type that they have.
    """
    return _Rewriter(model, {}, kernels=False).rewritten()


def forms_of(model: onnx.ModelProto, *, int8_activations: bool = False) -> dict[str, tuple[str, ...]]:
    """The forms that each contraction can take, the default first; contractions with one form only are left out.

    Args:
        model: a common model.
        int8_activations: also ``nbits-int8``, which rounds the activations of INT4 blocks to INT8, block by block: for
            W4A8, whose own rounding it replaces by a finer one, and for W4A16 where the user allows it.
    """
    rewriter = _Rewriter(model, {})
    found = {}
    for op in contractions(model):
        forms = _FORMS.get(rewriter.default_form(op), ())
        if int8_activations and rewriter.fits_nbits(op):
            forms = (*(forms or ("float",)), "nbits-int8")
        if len(forms) > 1:
            found[op.name] = forms
    return found


class _Rewriter(Operands):
    def __init__(self, model: onnx.ModelProto, forms: Mapping[str, str], *, kernels: bool = True) -> None:
        super().__init__(model)
        self.forms, self.kernels = forms, kernels

    def rewritten(self) -> onnx.ModelProto:
        self.ops = contractions(self.model)
        self.kinds = {op.name: self._kind(op) for op in self.ops}
        # Codes that some kernel wants as UINT8; a value that is wanted as both is UINT8 (UINT8 x UINT8 exists).
        self.unsigned = {
            operand.codes
            for op in self.ops
            for operand in (op.left, op.right)
            if operand is not None and self.kernels and not self._signed(op, operand)
        } | {
            found[0].codes
            for op in self.ops
            if self.kinds[op.name] == "token" and (found := self.token(op)) is not None
        }
        for node in self.model.graph.node:
            if node.op_type == "QuantizeLinear":
                self._activation(node)
        for op in self.ops:
            kind = self.kinds[op.name]
            if kind == "matmul":
                self._integer_matmul(op)
            elif kind == "token":
                self._token_matmul(op)
            elif kind == "patches":
                self._patch_matmul(op)
            elif kind == "conv":
                self._integer_conv(op)
            elif kind in ("nbits", "nbits-int8"):
                self._weight_only(op)
            elif kind == "raw":
                self._raw_product(op)
        for node in self.model.graph.node:
            if self.kernels and node.op_type == "DequantizeLinear" and node.input[0] in self.stored:
                self.weight_in_float(node)
        return self.result()

    def _signed(self, op: Contraction, operand: Operand) -> bool:
        """Whether `op` does not ask for `operand` as UINT8."""
        kind = self.kinds[op.name]
        if kind in ("conv", "raw", "nbits-int8", "token"):
            return True
        return kind == "matmul" and (operand is op.right or self.forms.get(op.name) == "signed")

    def _kind(self, op: Contraction) -> str:
        """How `op` is written: `default_form`, or what another form of `forms` comes to."""
        default = self.default_form(op) if self.kernels else "float"
        asked = self.forms.get(op.name, default)
        if asked == default or not self.kernels:
            return default
        if asked == "float":
            return "raw"
        return {"signed": "matmul", "convinteger": "conv"}.get(asked, asked)

    def fits_nbits(self, op: Contraction) -> bool:
        """Whether the weight is INT4 in blocks that MatMulNBits takes."""
        right = op.right
        if right is None or right.stored is None or op.node.op_type != "MatMul":
            return False
        blocks = right.stored.ndim == 2 and right.axis == 0
        return blocks and right.block in NBITS_BLOCKS and right.storage.endswith("INT4")

    def default_form(self, op: Contraction) -> str:
        """``matmul``, ``token``, ``patches``, ``conv``, ``nbits``, or ``float``."""
        if self.token(op) is not None:
            return "token"
        left, right, matmul = op.left, op.right, op.node.op_type == "MatMul"
        if left is None and right is not None and matmul:
            return "nbits" if self.fits_nbits(op) else "float"
        if not op.integer or left is None or right is None or left.scale.ndim or left.stored is not None:
            return "float"
        if matmul and right.stored is None:
            return "matmul" if right.scale.ndim == 0 else "float"
        if right.stored is None:
            return "float"
        if matmul:
            return "matmul" if right.stored.ndim == 2 and (right.scale.ndim == 0 or right.axis in (1, -1)) else "float"
        if right.scale.ndim and right.axis != 0:
            return "float"
        if self._patches(op, right.stored) is not None:
            return "patches"
        return "float" if right.zero_point.any() else "conv"

    # -- activations

    def _activation(self, node: onnx.NodeProto) -> None:
        """QuantizeLinear(x) -> the codes as bytes, under the name that they have in the common graph."""
        scale, zero = self.stored.get(node.input[1]), self.stored.get(node.input[2]) if len(node.input) > 2 else None
        storage = TensorProto.DataType.Name(zero.data_type) if zero is not None else ""
        if zero is None or scale is None or scale.dims or storage not in CODES:
            return  # blocked or computed scales stay as they are
        codes = node.output[0]
        unsigned = codes in self.unsigned
        shift = SHIFTS[unsigned, storage]
        zero_point = int(as_codes(numpy_helper.to_array(zero))) + shift
        source, moves = self.behind_moves(node.input[0])
        typed = self.byte(zero_point, unsigned)
        nodes = [helper.make_node("QuantizeLinear", [source, node.input[1], typed], [f"{codes}.byte"], name=node.name)]
        low, high = (code + shift for code in CODES[storage])
        producer = self.producers.get(source)
        if storage.endswith("INT4") and not (producer is not None and producer.op_type == "Clip"):
            bounds = ["" if unsigned and low == 0 else self.byte(low, unsigned), self.byte(high, unsigned)]
            nodes.append(
                helper.make_node("Clip", [f"{codes}.byte", *bounds], [f"{codes}.clip"], name=f"{node.name}.clip")
            )
        for i, move in enumerate(moves):
            copy = onnx.NodeProto()
            copy.CopyFrom(move)
            copy.name, copy.input[0], copy.output[0] = (
                f"{node.name}.{move.name}",
                nodes[-1].output[0],
                f"{codes}.moved{i}",
            )
            nodes.append(copy)
        nodes[-1].output[0] = codes
        container = "UINT8" if unsigned else "INT8"
        annotate(nodes[-1], {**metadata(node), STORAGE: storage, SHIFT: str(shift), CONTAINER: container})
        self.replace(node, nodes)
        for user in self.consumers.get(codes, []):
            if user.op_type == "DequantizeLinear":
                inputs = [codes, user.input[1], typed]
                self.replace(user, [helper.make_node("DequantizeLinear", inputs, list(user.output), name=user.name)])

    # -- contractions

    def _integer_matmul(self, op: Contraction) -> None:
        left, right = _operands(op)
        nodes: list[onnx.NodeProto] = []
        if right.stored is None:
            codes, zero_point = right.codes, self._activation_zero(right)
        else:
            codes, zero_point = self.weight_bytes(right, right.stored, unsigned=False, nodes=nodes)
        scale, bias, output = self.scale_of(left), "", op.node.output[0]
        if (add := self.sole_consumer(output, "Add")) is not None and right.stored is not None:
            if list(self.stored[add[1]].dims) == [right.stored.shape[1]]:
                bias, output = add[1], add[0].output[0]
                self.replace(add[0], [])
        elif (mul := self.sole_consumer(output, "Mul")) is not None and not self.stored[mul[1]].dims:
            factor = numpy_helper.to_array(self.stored[mul[1]]).astype(np.float32)
            if factor > 0 and np.frexp(factor)[0] == 0.5:
                scale, output = self.constant(f"{op.name}.scale", left.scale * factor, np.float32), mul[0].output[0]
                self.replace(mul[0], [])
        inputs = [left.codes, codes, scale, self.scale_of(right), self._activation_zero(left), zero_point, bias]
        self.replace(op.node, [*nodes, _kernel(op, inputs, output, self._marked(op))])

    def _token_matmul(self, op: Contraction) -> None:
        """Accumulators times the weight's scales, then times the scale of each row."""
        found, right = self.token(op), op.right
        if found is None or right is None or right.stored is None:
            raise ValueError(f"{op.name}: no per-token product")
        left, scales = found
        nodes: list[onnx.NodeProto] = []
        codes, zero_point = self.weight_bytes(right, right.stored, unsigned=False, nodes=nodes)
        inputs = [left.codes, codes, self.scale_of(left), self.scale_of(right), self._activation_zero(left), zero_point]
        steps, output = f"{op.name}.steps", op.node.output[0]
        mul = helper.make_node("Mul", [steps, scales], [output], name=f"{op.name}.scales")
        self.replace(op.node, [*nodes, _kernel(op, inputs, steps, self._marked(op)), mul])

    def _patches(self, op: Contraction, weight: Array) -> tuple[int, ...] | None:
        """``(C, H, W, kh, kw)`` of a Conv whose kernels tile the image exactly; None for any other Conv."""
        values = attributes(op.node)
        kernel = list(weight.shape[2:])
        shape = self.shapes.get(op.node.input[0], [])
        if len(kernel) != 2 or len(shape) != 4 or 0 in shape[1:]:
            return None
        tiled = (
            list(values.get("strides", [1, 1])) == kernel
            and not any(values.get("pads", [0]))
            and set(values.get("dilations", [1])) == {1}
            and values.get("group", 1) == 1
            and values.get("auto_pad", b"NOTSET") in (b"NOTSET", b"VALID")
            and not (shape[2] % kernel[0] or shape[3] % kernel[1])
            and (len(op.node.input) < 3 or op.node.input[2] in self.stored)
        )
        return (*shape[1:], *kernel) if tiled else None

    def _patch_matmul(self, op: Contraction) -> None:
        """Conv -> bytes as ``[B, H/kh * W/kw, C * kh * kw]`` -> MatMulIntegerToFloat -> ``[B, O, H/kh, W/kw]``."""
        left, right = _operands(op)
        weight: Array = np.asarray(right.stored)
        c, h, w, kh, kw = self._patches(op, weight) or ()
        nodes: list[onnx.NodeProto] = []
        matrix = weight.reshape(len(weight), -1).T
        codes, zero_point = self.weight_bytes(right, matrix, unsigned=False, nodes=nodes, rewritten=True)
        steps: list[tuple[str, list[int]]] = [
            ("Reshape", [-1, c, h // kh, kh, w // kw, kw]),
            ("Transpose", [0, 2, 4, 1, 3, 5]),
            ("Reshape", [-1, (h // kh) * (w // kw), c * kh * kw]),
            ("MatMul", []),
            ("Transpose", [0, 2, 1]),
            ("Reshape", [-1, len(weight), h // kh, w // kw]),
        ]
        value = left.codes
        for i, (kind, argument) in enumerate(steps):
            output = op.node.output[0] if i == len(steps) - 1 else f"{op.name}.step{i}"
            if kind == "MatMul":
                inputs = [
                    value,
                    codes,
                    self.scale_of(left),
                    self.scale_of(right),
                    self._activation_zero(left),
                    zero_point,
                ]
                nodes.append(_kernel(op, [*inputs, *op.node.input[2:]], output, self._marked(op)))
            elif kind == "Reshape":
                inputs = [value, self.constant(f"{op.name}.shape{i}", argument, np.int64)]
                nodes.append(helper.make_node("Reshape", inputs, [output], name=f"{op.name}.step{i}"))
            else:
                nodes.append(helper.make_node("Transpose", [value], [output], name=f"{op.name}.step{i}", perm=argument))
            if kind != "MatMul":
                annotate(nodes[-1], {PART: op.name})
            value = output
        self.replace(op.node, nodes)

    def _integer_conv(self, op: Contraction) -> None:
        left, right = _operands(op)
        weight: Array = np.asarray(right.stored)
        nodes: list[onnx.NodeProto] = []
        codes, zero_point = self.weight_bytes(right, weight, unsigned=True, nodes=nodes, rewritten=True)
        name, output = op.node.name, op.node.output[0]
        spread = (1, -1, *[1] * (weight.ndim - 2))
        inputs = [left.codes, codes, self._activation_zero(left), zero_point]
        accumulate = helper.make_node("ConvInteger", inputs, [f"{name}.accumulators"], name=name)
        accumulate.attribute.extend(op.node.attribute)
        scale = self.constant(f"{name}.scale", (left.scale * right.scale).reshape(spread), np.float32)
        nodes += [
            annotate(accumulate, self._marked(op)),
            helper.make_node(
                "Cast", [f"{name}.accumulators"], [f"{name}.float"], name=f"{name}.cast", to=TensorProto.FLOAT
            ),
            helper.make_node("Mul", [f"{name}.float", scale], [output], name=f"{name}.mul"),
        ]
        if len(op.node.input) > 2 and op.node.input[2]:
            nodes[-1].output[0] = f"{name}.scaled"
            shape = self.constant(f"{name}.spread", spread, np.int64)
            nodes += [
                helper.make_node("Reshape", [op.node.input[2], shape], [f"{name}.spread.bias"], name=f"{name}.reshape"),
                helper.make_node("Add", [f"{name}.scaled", f"{name}.spread.bias"], [output], name=f"{name}.add"),
            ]
        self.replace(op.node, nodes)

    def _weight_only(self, op: Contraction) -> None:
        """INT4 blocks along K -> MatMulNBits: B ``[N, K / block, block / 2]``, two codes in a byte, zero point 8."""
        right = op.right
        if right is None or right.stored is None or right.block is None:
            return
        k, n = right.stored.shape
        shift = SHIFTS[True, right.storage]
        nibbles = (right.stored.astype(np.int16) + shift).T.reshape(n, k // right.block, right.block)
        inputs = [
            self.unquantized(op.node.input[0]),
            self.constant(f"{right.site}.packed", _pack(nibbles), np.uint8),
            self.constant(f"{right.site}.scales", right.scale.T.reshape(-1), np.float32),
        ]
        zero_point = (right.zero_point.astype(np.int16) + shift).T
        if (zero_point != 8).any():
            padded = np.pad(zero_point, ((0, 0), (0, zero_point.shape[1] % 2)))
            inputs.append(self.constant(f"{right.site}.zeros", _pack(padded).reshape(-1), np.uint8))
        node = helper.make_node(
            "MatMulNBits", inputs, list(op.node.output), name=op.node.name, domain=CONTRIB,
            K=k, N=n, bits=4, block_size=right.block,
            accuracy_level=INT8_LEVEL if self.kinds[op.name] == "nbits-int8" else FLOAT_LEVEL,
        )  # fmt: skip
        self.replace(op.node, [annotate(node, self._marked(op))])

    def _raw_product(self, op: Contraction) -> None:
        """The contraction on its weight's dequantized values and on activations as they are."""
        node = onnx.NodeProto()
        node.CopyFrom(op.node)
        for i, operand in enumerate((op.left, op.right)):
            if operand is None or operand.stored is None:
                node.input[i] = self.unquantized(op.node.input[i])
        del node.metadata_props[:]
        self.replace(op.node, [annotate(node, self._marked(op))])

    def _marked(self, op: Contraction) -> dict[str, str]:
        """The op's metadata, and the form that it was put in where that is not the default."""
        form = self.forms.get(op.name, "")
        return metadata(op.node) | ({PLACED: form} if form and form != self.default_form(op) else {})

    # -- operands

    def _activation_zero(self, operand: Operand) -> str:
        unsigned = operand.codes in self.unsigned
        return self.byte(int(operand.zero_point) + SHIFTS[unsigned, operand.storage], unsigned)


def _operands(op: Contraction) -> tuple[Operand, Operand]:
    if op.left is None or op.right is None:
        raise ValueError(f"{op.name}: not an integer contraction")
    return op.left, op.right


def _kernel(op: Contraction, inputs: list[Any], output: str, props: dict[str, str]) -> onnx.NodeProto:
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node("MatMulIntegerToFloat", inputs, [output], name=op.node.name, domain=CONTRIB)
    return annotate(node, props)


def _pack(nibbles: Array) -> Array:
    """Pairs along the last axis in one byte, the first in the low half."""
    pairs = nibbles.astype(np.uint8)
    packed: Array = pairs[..., 0::2] | (pairs[..., 1::2] << 4)
    return packed
