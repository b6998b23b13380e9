"""NVFP4 for TensorRT: the common file's function becomes TensorRT's own operator; the rest is ONNX already.

TensorRT's parser takes ``trt::TRT_FP4DynamicQuantize`` (codes and E4M3 block scales at run time, "dynamic double
quantization") and two DequantizeLinear behind it, and makes one product of FP4 by FP4 of that on Blackwell. No other
GPU has the type: an engine for several GPUs is refused whole, so those without FP4 are left out of the list, and said.

Lost: which code TensorRT gives to a value within an ULP of a boundary, or in a block of zeros, is its own affair.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from s2d_deploy.errors import UnsupportedError, message
from s2d_deploy.qgraph import metadata

DOMAIN, OPERATOR = "trt", "TRT_FP4DynamicQuantize"
FUNCTION_DOMAIN, FUNCTION = "s2d", "NVFP4DynamicQuantize"  # what export/_onnx_fp4.py writes
BLOCK = 16
SINCE = 10.0  # compute capability of the first GPUs with FP4: Blackwell
_TYPES = (TensorProto.FLOAT4E2M1, TensorProto.FLOAT8E4M3FN)
_RANKS = (2, 3)  # of what TensorRT quantizes dynamically


def uses_fp4(model: onnx.ModelProto) -> bool:
    """Whether a file in either form holds NVFP4 quantizers or weights."""
    operators = (FUNCTION, OPERATOR)
    return any(n.op_type in operators for n in model.graph.node) or any(
        t.data_type == TensorProto.FLOAT4E2M1 for t in model.graph.initializer
    )


def is_fp4(tensor: onnx.TensorProto) -> bool:
    """Whether a stored tensor holds FP4 codes or their block scales."""
    return tensor.data_type in _TYPES


def to_tensorrt(model: onnx.ModelProto) -> None:
    """Put TensorRT's operator where the function stands, in place; types stay in ``value_info``.

    Raises:
        UnsupportedError: inputs that are neither matrices nor batches of them, or bad scales; every site is named.
    """
    if not uses_fp4(model):
        return
    refused = _bad_scales(model) + _bad_ranks(model)
    if refused:
        raise UnsupportedError(
            "\n  ".join([message(f"TensorRT cannot express {len(refused)} NVFP4 quantizer(s)"), *refused])
        )
    for node in model.graph.node:
        if node.op_type == FUNCTION and node.domain == FUNCTION_DOMAIN:
            node.op_type, node.domain = OPERATOR, DOMAIN
            for name, value in (("axis", -1), ("block_size", BLOCK), ("scale_type", TensorProto.FLOAT8E4M3FN)):
                node.attribute.append(helper.make_attribute(name, value))
    del model.functions[:]
    kept = [i for i in model.opset_import if i.domain != FUNCTION_DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend([*kept, helper.make_opsetid(DOMAIN, 1)])


def with_fp4(capabilities: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the list that have FP4, and those that have not; ``current`` counts as having it."""
    has = [c for c in capabilities if c == "current" or float(c) >= SINCE]
    return has, [c for c in capabilities if c not in has]


def _bad_scales(model: onnx.ModelProto) -> list[str]:
    """Block and tensor scales that are zero, denormal or not finite."""
    stored = {t.name: t for t in model.graph.initializer}
    refused = []
    for node in model.graph.node:
        codes = stored.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        names = []
        if codes is not None and codes.data_type == TensorProto.FLOAT8E4M3FN:
            names = [node.input[0], node.input[1]]
        elif node.op_type == FUNCTION:
            names = [node.input[1]]
        for name in names:
            scale = numpy_helper.to_array(stored[name]).astype(np.float32)
            bad = ~(np.isfinite(scale) & (scale >= np.finfo(np.float32).tiny))
            if bad.any():
                refused.append(
                    f"{name}: {int(bad.sum())} scale(s) that are zero, denormal or not finite "
                    f"({scale[bad].reshape(-1)[0]:g}); calibrate again"
                )
    return refused


def _bad_ranks(model: onnx.ModelProto) -> list[str]:
    shapes = {v.name: v.type.tensor_type.shape for v in (*model.graph.value_info, *model.graph.input)}
    refused = []
    for node in model.graph.node:
        if node.op_type == FUNCTION and node.input[0] in shapes:
            rank = len(shapes[node.input[0]].dim)
            if rank not in _RANKS:
                site = metadata(node).get("s2d.site", node.name)
                refused.append(
                    f"{site}: {rank} dimensions, TensorRT takes 2 or 3; fix: w4a4 here with quantize.overrides"
                )
    return refused


__all__ = ["BLOCK", "DOMAIN", "OPERATOR", "SINCE", "is_fp4", "to_tensorrt", "uses_fp4", "with_fp4"]
