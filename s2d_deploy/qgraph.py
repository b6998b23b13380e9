"""Read the common ONNX file: its contractions with their quantized operands.

Audit, reference, dialects and verification all look at a graph through `contractions`; nobody else matches
Q/DQ patterns in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from s2d_deploy.errors import ArtifactError, UnsupportedError, message
from s2d_deploy.graph_check import check_graph, sound
from s2d_deploy.session import Array, as_codes


@dataclass(frozen=True, slots=True)
class Operand:
    """A dequantized operand of a contraction.

    Attributes:
        site: name of its site in the plan (the first, where several share the quantizer).
        codes: graph value that holds the codes (the QuantizeLinear's output, or an initializer).
        dequantized: graph value that the contraction reads.
        storage: ONNX element type of the codes: ``"INT4"``, ``"UINT4"``, ``"INT8"``, ``"UINT8"``.
        scale: float32; rank 0 per tensor, ``(N,)`` per channel, ``(K / block, N)`` for blocks.
        zero_point: int8/uint8 of the same shape.
        axis: of the scale; None per tensor.
        block: block size along `axis`, or None.
        stored: the codes themselves (int8/uint8, one in each byte) where they are an initializer.
    """

    site: str
    codes: str
    dequantized: str
    storage: str
    scale: npt.NDArray[np.float32]
    zero_point: Array
    axis: int | None
    block: int | None
    stored: Array | None


@dataclass(frozen=True, slots=True)
class Contraction:
    """A MatMul or Conv node of the graph.

    Attributes:
        name: the op's name in the plan.
        node: the node itself.
        declared: ``"W4A4"``, ..., or ``"float"``.
        macs: multiply-accumulates for one sample; 0 where the file does not say.
        left, right: its operands where they are dequantized; None where they are float.
    """

    name: str
    node: onnx.NodeProto
    declared: str
    macs: int
    left: Operand | None
    right: Operand | None

    @property
    def integer(self) -> bool:
        """Whether both operands are codes with scales that leave the inner sum: an integer product is exact."""
        if self.left is None or self.right is None or self.left.axis is not None or self.right.block is not None:
            return False
        # One scale for each output channel: the weight's first dimension for Conv, its last for MatMul.
        return self.right.axis in (None, 0 if self.node.op_type == "Conv" else 1)


def load_model(path: Path) -> onnx.ModelProto:
    """Read an ONNX file, with external data where it has some.

    Raises:
        ArtifactError: missing, truncated, no ONNX, or a graph that contradicts itself.
    """
    try:
        model = onnx.load(path)
    except Exception as error:
        raise ArtifactError(
            message(
                f"{path}: not a readable ONNX file", found=f"{type(error).__name__}: {error}", fix="export it again"
            )
        ) from error
    if not model.graph.node:
        raise ArtifactError(message(f"{path}: an ONNX file without nodes", fix="export it again"))
    check_graph(model, str(path))
    return model


def metadata(element: Any) -> dict[str, str]:
    """``metadata_props`` of a model or node as a dictionary."""
    return {p.key: p.value for p in element.metadata_props}


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes of a node as Python values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def require_integer_codes(model: onnx.ModelProto, target: str) -> None:
    """Refuse NVFP4 on a target that has no kernels for it, before anything is rewritten.

    Raises:
        UnsupportedError: every site is named.
    """
    quantizers = [n for n in model.graph.node if n.domain == "s2d" and n.op_type == "NVFP4DynamicQuantize"]
    if quantizers:
        sites = [metadata(n).get("s2d.site", n.name) for n in quantizers]
        raise UnsupportedError(
            message(
                f"{target} has no NVFP4",
                expected="integer codes",
                found=", ".join(sites[:4]) + (f" and {len(sites) - 4} more" if len(sites) > 4 else ""),
                fix="use w4a4 here; target tensorrt runs nvfp4 on Blackwell GPUs",
            )
        )


def initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """Initializers by name."""
    return {t.name: t for t in model.graph.initializer}


def contractions(model: onnx.ModelProto) -> list[Contraction]:
    """Every MatMul and Conv of a common ONNX model, in graph order.

    Raises:
        ArtifactError: one whose operands or metadata are not what the exporter writes; it is named.
    """
    producers = {output: node for node in model.graph.node for output in node.output}
    stored = initializers(model)
    result = []
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Conv"):
            with sound(f"node {node.name!r}"):
                result.append(_contraction(node, producers, stored))
    return result


def _contraction(
    node: onnx.NodeProto, producers: dict[str, onnx.NodeProto], stored: dict[str, onnx.TensorProto]
) -> Contraction:
    props = metadata(node)
    left, right = (_operand(name, producers, stored) for name in node.input[:2])
    return Contraction(
        props.get("s2d.op", node.name),
        node,
        props.get("s2d.declared", "float"),
        int(props.get("s2d.macs", "0")),
        left,
        right,
    )


def _operand(name: str, producers: dict[str, onnx.NodeProto], stored: dict[str, onnx.TensorProto]) -> Operand | None:
    node = producers.get(name)
    if node is None or node.op_type != "DequantizeLinear" or node.input[1] not in stored:
        return None
    scale = numpy_helper.to_array(stored[node.input[1]]).astype(np.float32)
    if len(node.input) > 2 and node.input[2]:
        tensor = stored[node.input[2]]
        storage = onnx.TensorProto.DataType.Name(tensor.data_type)
        zero_point = as_codes(numpy_helper.to_array(tensor))
    else:
        raise ArtifactError(message(f"{node.name}: DequantizeLinear without a zero point", fix="export it again"))
    values = attributes(node)
    codes = stored.get(node.input[0])
    return Operand(
        site=metadata(node).get("s2d.site", node.name).split(",")[0],
        codes=node.input[0],
        dequantized=name,
        storage=storage,
        scale=scale,
        zero_point=zero_point,
        axis=None if scale.ndim == 0 else int(values.get("axis", 1)),
        block=int(values["block_size"]) if values.get("block_size") else None,
        stored=None if codes is None else as_codes(numpy_helper.to_array(codes)),
    )
