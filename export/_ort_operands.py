"""Operands as ONNX Runtime's kernels take them: weights as bytes or in float, activations in front of what moves them.

One half of the rewriting of `_ort_rewrite`, which says what is written and why; here is how an operand gets its form.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from s2d_deploy.qgraph import Contraction, Operand, attributes, metadata
from s2d_deploy.session import Array, as_codes

from ._ort_surgery import Surgery

PART = "s2d.part"  # metadata of a node that only rearranges codes or accumulators for the op that it names
# Of a site's codes: the plan's type, what was added to each code, and the type that holds the sum.
STORAGE, SHIFT, CONTAINER = "s2d.storage", "s2d.shift", "s2d.container"
_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")
# (container is unsigned, ONNX type of the codes) -> shift
SHIFTS = {
    (True, "INT4"): 8, (True, "UINT4"): 0, (True, "INT8"): 128, (True, "UINT8"): 0,
    (False, "INT4"): 0, (False, "UINT4"): 0, (False, "INT8"): 0, (False, "UINT8"): -128,
}  # fmt: skip
CODES = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}


class Operands(Surgery):
    """Surgery that knows quantized operands.

    Attributes:
        unpacked: 4-bit weights that a Cast unpacks already.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        self.unpacked: set[str] = set()

    def token(self, op: Contraction) -> tuple[Operand, str] | None:
        """The codes of a per-token left operand and the tokens' scales, where the right one is a weight by channel.

        In the common file: ``Mul(DequantizeLinear(codes, 1, zero_point), scales)``; see `to_onnx._token_pair`.
        """
        right = op.right
        if op.left is not None or right is None or right.stored is None or op.node.op_type != "MatMul":
            return None
        if right.stored.ndim != 2 or right.block is not None or (right.scale.ndim and right.axis not in (1, -1)):
            return None
        mul = self.producers.get(op.node.input[0])
        dequantizer = self.producers.get(mul.input[0]) if mul is not None and mul.op_type == "Mul" else None
        if mul is None or dequantizer is None or dequantizer.op_type != "DequantizeLinear":
            return None
        quantizer = self.producers.get(dequantizer.input[0])
        scale = self.stored.get(dequantizer.input[1])
        zero = self.stored.get(dequantizer.input[2]) if len(dequantizer.input) > 2 else None
        if quantizer is None or quantizer.op_type != "QuantizeLinear" or scale is None or scale.dims or zero is None:
            return None
        codes = Operand(
            site=metadata(dequantizer).get("s2d.site", dequantizer.name).split(",")[0],
            codes=dequantizer.input[0],
            dequantized=op.node.input[0],
            storage=TensorProto.DataType.Name(zero.data_type),
            scale=numpy_helper.to_array(scale).astype(np.float32),
            zero_point=as_codes(numpy_helper.to_array(zero)),
            axis=None,
            block=None,
            stored=None,
        )
        return codes, str(mul.input[1])

    def unquantized(self, value: str) -> str:
        """The float tensor in front of the quantizer that makes `value`; itself where there is none."""
        node = self.producers.get(value)
        scales = node.input[1] if node is not None and node.op_type == "Mul" else None  # of tokens
        if node is not None and scales is not None:
            node = self.producers.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            return value
        quantizer = self.producers.get(node.input[0])
        if quantizer is None or quantizer.op_type != "QuantizeLinear":
            return value
        if scales is not None:
            division = self.producers.get(quantizer.input[0])
            same = division is not None and division.op_type == "Div" and division.input[1] == scales
            return str(division.input[0]) if same and division is not None else value
        # The bounds of a width between 4 and 8 bits, a Clip in front of the quantizer, stay.
        return str(quantizer.input[0])

    def behind_moves(self, value: str) -> tuple[str, list[onnx.NodeProto]]:
        """The tensor before a chain of Reshape and Transpose that nothing else reads, and that chain."""
        moves: list[onnx.NodeProto] = []
        while (
            (node := self.producers.get(value)) is not None
            and node.op_type in _MOVES
            and len(self.consumers.get(value, [])) == 1
            and value not in self.outputs
        ):
            moves.insert(0, node)
            value = node.input[0]
        return value, moves

    def weight_in_float(self, node: onnx.NodeProto) -> None:
        """(codes - zero_point) * scale from nodes that are folded at load; a DequantizeLinear would run every time."""
        values = attributes(node)
        codes, scale = self.stored[node.input[0]], self.stored[node.input[1]]
        zeros = as_codes(numpy_helper.to_array(self.stored[node.input[2]]))
        shape, block = list(codes.dims), int(values.get("block_size", 0))
        full, spread = shape, [1] * len(shape)
        if scale.dims:
            axis = int(values.get("axis", 1)) % len(shape)
            spread[axis] = shape[axis]
            if block:
                full = [*shape[:axis], shape[axis] // block, block, *shape[axis + 1 :]]
                spread = [*shape[:axis], shape[axis] // block, 1, *shape[axis + 1 :]]
        base = node.name
        nodes = [helper.make_node("Cast", [node.input[0]], [f"{base}.0"], name=f"{base}.0", to=TensorProto.FLOAT)]
        steps = [("Mul", self.constant(f"{base}.scale", numpy_helper.to_array(scale).reshape(spread), np.float32))]
        if zeros.any():
            steps.insert(0, ("Sub", self.constant(f"{base}.zero_point", zeros.reshape(spread), np.float32)))
        if block:
            steps.insert(0, ("Reshape", self.constant(f"{base}.blocks", full, np.int64)))
            steps.append(("Reshape", self.constant(f"{base}.shape", shape, np.int64)))
        for i, (op_type, other) in enumerate(steps, 1):
            nodes.append(helper.make_node(op_type, [nodes[-1].output[0], other], [f"{base}.{i}"], name=f"{base}.{i}"))
        nodes[-1].output[0] = node.output[0]
        self.replace(node, nodes)

    def weight_bytes(
        self, right: Operand, codes: Array, *, unsigned: bool, nodes: list[onnx.NodeProto], rewritten: bool = False
    ) -> tuple[str, str]:
        """The weight as bytes and its zero point ("" for 0); appends the Cast that unpacks 4-bit codes to `nodes`.

        Args:
            right: the weight.
            codes: its codes, possibly in another layout than it has in the common graph; then `rewritten`.
            unsigned: what the kernel wants; the codes are stored in the file with that signedness.
            nodes: receives the Cast.
        """
        kind = "INT4" if right.storage.endswith("INT4") else "INT8"
        plain = "UINT" if unsigned else "INT"
        target = f"{plain}{kind[-1]}"
        shift = CODES[target][0] - CODES[right.storage][0]
        name = right.codes
        if rewritten or shift:
            dtype = {"INT4": ml_dtypes.int4, "UINT4": ml_dtypes.uint4, "INT8": np.int8, "UINT8": np.uint8}[target]
            name = self.constant(f"{right.codes}.{target}", codes.astype(np.int16) + shift, dtype)
        zeros = right.zero_point.astype(np.int16) + shift
        byte = np.uint8 if unsigned else np.int8
        zero_point = ""
        if zeros.any():
            uniform = unsigned or zeros.ndim == 0
            value = zeros.reshape(-1)[0] if uniform else zeros
            zero_point = self.constant(f"{right.site}.zero_point.byte", value, byte)
        if kind == "INT4":
            to = TensorProto.UINT8 if unsigned else TensorProto.INT8
            packed, name = name, f"{name}.byte"
            if name not in self.unpacked:  # tied weights are unpacked once
                self.unpacked.add(name)
                nodes.append(helper.make_node("Cast", [packed], [name], name=name, to=to))
        return name, zero_point

    def byte(self, value: int, unsigned: bool) -> str:
        return self.constant(f"{'u8' if unsigned else 's8'}.{value}", value, np.uint8 if unsigned else np.int8)

    def scale_of(self, operand: Operand) -> str:
        return self.constant(f"{operand.site}.scale.float", operand.scale, np.float32)
