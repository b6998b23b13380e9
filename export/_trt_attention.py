"""Attention in the one form that TensorRT fuses into a single INT8 kernel, at the price of other codes in softmax.

TensorRT-RTX 1.7 compiles ``scores -> softmax -> context`` into one kernel (``_gemm_mha_v2``) where query, key, value,
and probabilities are signed INT8 with zero point 0, nothing but scale, mask and softmax stands between the products,
and the result is quantized to INT8 at once. The exact dialect has more there for 8-bit probabilities: 0..255 does not
fit INT8, so codes are shifted and the shift is given back behind the product. TensorRT then makes two products, a
softmax and copies of that: seven kernels for a layer of a ViT where the fused form has one.

`fuse_attention` gives 8-bit probabilities the codes 0..127 and a step twice as large (times 255 / 127). The plan's
simulation does not know that step; the artifact names the sites that have it.

Of 4 bits nothing is fused, with or without this: the codes behind the context are clipped to 4 bits in front of their
quantizer, and that Clip is what TensorRT does not take into the kernel (without it, it does: tried).
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from s2d_deploy.qgraph import metadata

_STEPS = ("units", "rounded", "clamped", "shifted")  # of the exact form, behind "<quantizer>."


def fuse_attention(model: onnx.ModelProto) -> list[str]:
    """Rewrite a dialect model in place.

    Returns:
        Sites of probabilities whose step is no longer the plan's.
    """
    graph = model.graph
    nodes = {n.name: n for n in graph.node}
    stored = {t.name: t for t in graph.initializer}
    changed: list[str] = []
    dropped: list[onnx.NodeProto] = []
    for node in graph.node:
        site = metadata(node).get("s2d.site", "")
        steps = [nodes.get(f"{node.name}.{step}") for step in _STEPS]
        if node.op_type != "QuantizeLinear" or not site.endswith(".probs") or steps[0] is None or None in steps:
            continue
        units = steps[0]
        scale = numpy_helper.to_array(stored[units.input[1]]).astype(np.float64) * (255 / 127)
        name = f"{node.name}.fused_scale"
        graph.initializer.append(numpy_helper.from_array(np.asarray(scale, np.float32), name))
        node.input[0], node.input[1] = units.input[0], name
        dropped += [step for step in steps if step is not None]
        for reader in graph.node:
            if reader.op_type == "DequantizeLinear" and reader.input[0] == node.output[0]:
                reader.input[1] = name
                dropped += _take_back(graph, nodes, reader.output[0])
        changed.append(site)
    for node in dropped:
        graph.node.remove(node)
    return changed


def _take_back(graph: onnx.GraphProto, nodes: dict[str, onnx.NodeProto], value: str) -> list[onnx.NodeProto]:
    """Let the products of `value` end where the shift was given back; the nodes that gave it."""
    gone = []
    for product in graph.node:
        add = nodes.get(f"{product.name}.shift.add")
        if value in product.input and product.op_type == "MatMul" and add is not None:
            product.output[0] = add.output[0]
            names = (f"{product.name}.shift.{part}" for part in ("sum", "term", "add"))
            gone += [nodes[name] for name in names if name in nodes]
    return gone


__all__ = ["fuse_attention"]
