"""Reading the opset, inferring types, writing: what a dialect file needs that may be larger than protobuf can hold.

protobuf serializes at most 2 GB, and onnx's shape inference serializes. So for a large model the weights are put aside
while types are inferred, which do not depend on them, and the file keeps them beside it (`<name>.data`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from onnx import TensorProto

from s2d_deploy.errors import ArtifactError, message

OPSETS = (21, 24)  # INT4 begins with 21; 24 is the last that was tried
EXTERNAL_BEYOND = 1 << 30  # bytes
_LARGE = 1 << 10  # bytes; smaller tensors are sizes and axes, which inference reads


def require_opset(model: onnx.ModelProto, path: Path) -> None:
    """Refuse operators of other versions: TensorRT's parser reads any number, and guesses.

    Raises:
        ArtifactError: the file's opset is none that this project writes or TensorRT's parser knows.
    """
    found = next((i.version for i in model.opset_import if i.domain in ("", "ai.onnx")), 0)
    if not OPSETS[0] <= found <= OPSETS[1]:
        raise ArtifactError(
            message(
                f"{path}: opset {found}",
                expected=f"{OPSETS[0]} to {OPSETS[1]}",
                fix="export it again, or convert it with onnx.version_converter",
            )
        )


def with_types(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the type and shape of every value, checked strictly; a large one is changed in place."""
    if model.ByteSize() <= EXTERNAL_BEYOND:
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        onnx.checker.check_model(inferred, full_check=False)
        return inferred
    with _weights_aside(model):
        inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)
    for value, found in zip(model.graph.output, inferred.graph.output, strict=True):
        value.CopyFrom(found)
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write `model`; a large one's weights go to ``<path>.data``."""
    data = path.with_name(f"{path.name}.data")
    data.unlink(missing_ok=True)  # onnx appends to external data that is there
    if model.ByteSize() > EXTERNAL_BEYOND:
        onnx.save_model(model, path, save_as_external_data=True, location=data.name)
    else:
        onnx.save_model(model, path)


@contextmanager
def _weights_aside(model: onnx.ModelProto) -> Iterator[None]:
    """Within the block, large tensors claim to lie in a file; behind it, they are as before."""
    kept = []
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) > _LARGE:
            kept.append((tensor, tensor.raw_data))
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value="aside")
    try:
        yield
    finally:
        for tensor, data in kept:
            tensor.raw_data = data
            tensor.ClearField("data_location")
            del tensor.external_data[:]


__all__ = ["EXTERNAL_BEYOND", "OPSETS", "require_opset", "save", "with_types"]
