"""Whether an ONNX file is whole and sound, before anything believes it.

A file that parses may still lie: tensors whose bytes do not make their shape, names that are no text, inputs that
nothing makes, external data outside of the folder (onnx refuses those while it loads). What is checked here costs no
more than a look at each node and tensor; values are not read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import onnx

from s2d_deploy.errors import ArtifactError, S2DDeployError, message

_BITS: dict[int, int] = {
    onnx.TensorProto.FLOAT: 32,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT16: 16,
    onnx.TensorProto.INT16: 16,
    onnx.TensorProto.INT32: 32,
    onnx.TensorProto.INT64: 64,
    onnx.TensorProto.BOOL: 8,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.DOUBLE: 64,
    onnx.TensorProto.UINT32: 32,
    onnx.TensorProto.UINT64: 64,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT4: 4,
}


def check_graph(model: onnx.ModelProto, where: str) -> None:
    """Refuse a graph that cannot be meant.

    Args:
        model: with its external data loaded.
        where: the file, for the message.

    Raises:
        ArtifactError: what is wrong, and with which node or tensor.
    """
    with sound(where):
        wrong = next(_faults(model), None)
    if wrong is not None:
        raise ArtifactError(message(f"{where}: not a sound ONNX file", found=wrong, fix="export it again"))


@contextmanager
def sound(where: str) -> Iterator[None]:
    """Around code that walks a graph: whatever it stumbles over is said to be the graph's fault, with the reason.

    Raises:
        ArtifactError: in the place of anything that is neither an error of ours nor the machine's refusal.
    """
    try:
        yield
    except (S2DDeployError, OSError):  # a disk that is full is not the graph's fault
        raise
    except Exception as error:
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ArtifactError(
            message(
                f"{where}: not a sound ONNX file of this package",
                found=found,
                fix="export it again; if it has just been exported, report this as a bug, with --debug",
            )
        ) from error


def _faults(model: onnx.ModelProto) -> Iterator[str]:
    graph = model.graph
    known = {"", *(i.name for i in graph.input)}
    for tensor in graph.initializer:
        known.add(tensor.name)
        yield from _tensor_faults(tensor)
    for node in graph.node:
        for name in node.input:
            if name not in known:
                yield f"node {node.name!r} ({node.op_type}) reads {name!r}, which nothing before it makes"
        known.update(node.output)
        # A string that is no UTF-8 is found by who reads it, with UnicodeDecodeError.
        _ = (node.name, node.op_type, node.domain, [(p.key, p.value) for p in node.metadata_props])
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield from _tensor_faults(attribute.t)
    for output in graph.output:
        if output.name not in known:
            yield f"output {output.name!r} is made by no node"


def _tensor_faults(tensor: onnx.TensorProto) -> Iterator[str]:
    bits = _BITS.get(tensor.data_type)
    if any(size < 0 for size in tensor.dims):
        yield f"tensor {tensor.name!r} has the shape {list(tensor.dims)}"
    elif bits is not None and tensor.HasField("raw_data"):
        expected = (math.prod(tensor.dims) * bits + 7) // 8
        if len(tensor.raw_data) != expected:
            yield (
                f"tensor {tensor.name!r} of shape {list(tensor.dims)[:8]} has {len(tensor.raw_data)} bytes "
                f"in the place of {expected}"
            )
