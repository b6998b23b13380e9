"""ONNX models beyond the 2 GB of a protobuf: their size, shape inference and saving, with tensors set aside.

A `ModelProto` in memory may be larger than 2 GB, but nothing that serializes it works then: not ``ByteSize``, not shape
inference, not ``SerializeToString``. So sizes are summed, inference runs without the large tensors, and a file gets its
tensors beside it.
"""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx import TensorProto

LARGE = 1 << 30  # bytes of tensors; half of what a protobuf holds, since nodes and shapes come on top
_SET_ASIDE = 1 << 10  # bytes of one tensor; shape inference reads the values of small ones only


def stored_bytes(model: onnx.ModelProto) -> int:
    """Bytes of the initializers' values."""
    total = 0
    for tensor in model.graph.initializer:
        if tensor.raw_data:
            total += len(tensor.raw_data)
        elif tensor.data_location != TensorProto.EXTERNAL:
            total += 4 * math.prod(tensor.dims)  # in a typed field: at most 8 bytes, mostly 4
    return total


def infer_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with inferred shapes, strictly; large tensors are set aside meanwhile, and `model` loses them.

    Raises:
        Whatever onnx raises for a graph that contradicts itself.
    """
    aside: dict[str, bytes] = {}
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _SET_ASIDE:
            aside[tensor.name] = tensor.raw_data
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="set-aside")
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    for tensor in inferred.graph.initializer:
        if tensor.name in aside:
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
            tensor.ClearField("data_location")
            tensor.raw_data = aside.pop(tensor.name)
    return inferred


def save_model(model: onnx.ModelProto, path: Path, *, beyond: int | None = None) -> Path | None:
    """Write `model`; beyond `beyond` bytes (default `LARGE`) tensors go to ``<path>.data``, which is returned.

    The tensors of a model that is written in two files are afterwards in the file only.
    """
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx appends to external data that is there
    if stored_bytes(model) <= (LARGE if beyond is None else beyond):
        onnx.save_model(model, path)
        return None
    onnx.save_model(model, path, save_as_external_data=True, location=data.name)
    return data if data.exists() else None  # where every tensor is small, none is taken out
