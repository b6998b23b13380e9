"""What a session may offer beyond `session.Session`, so that a difference can be explained more closely.

None of it is required: where a runtime offers less, codes and accumulators have to do, and an explanation says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import onnx
from onnx import numpy_helper

from s2d_deploy.plan import Site
from s2d_deploy.qgraph import contractions, initializers, load_model, metadata
from s2d_deploy.session import Array

_MOVES = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Identity")


@runtime_checkable
class Described(Protocol):
    """A session that knows what its artifact was made from."""

    def facts(self) -> Mapping[str, str]:
        """``{"s2d.plan_sha256": ..., ...}`` as the artifact carries it."""
        ...


@runtime_checkable
class QuantizerProbe(Protocol):
    """A session whose quantizers can be run alone."""

    def quantize(self, site: str, sources: Sequence[str], x: Array) -> Array:
        """Codes that the artifact's own nodes make of `x` at a static per-tensor site.

        Args:
            site: its name.
            sources: names of the float values that the quantizer may read: it itself, and what it was moved from.
            x: float32, one dimension.

        Raises:
            UnsupportedError: the artifact has no such nodes.
        """
        ...


@runtime_checkable
class LayerCut(Protocol):
    """A session that can give parts of its artifact as ONNX models of their own."""

    def layer(self, op: str, value: str) -> tuple[onnx.ModelProto, dict[str, tuple[str, int]]]:
        """The way from codes to a float value behind `op`.

        Args:
            op: for messages.
            value: as the common ONNX file names it (`op_values`).

        Returns:
            the model, and for each of its inputs the site whose codes it takes and what is added to them.

        Raises:
            UnsupportedError: there is no such value, or it needs more than codes.
        """
        ...

    def quantizer(self, site: str, sources: Sequence[str]) -> tuple[onnx.ModelProto, int]:
        """A quantizer (see `QuantizerProbe`), and what is added to its codes.

        Raises:
            UnsupportedError: it cannot be cut out.
        """
        ...


@runtime_checkable
class TapCheck(Protocol):
    """A session that shows codes by adding outputs, and can say whether that changed what is executed."""

    def taps_changed(self) -> list[str]:
        """Nodes of the optimized graph that differ from those without added outputs; empty where none do."""
        ...


def quantizer_sources(common: Path) -> dict[str, tuple[str, ...]]:
    """Site -> names of the float value in front of its quantizer in the common ONNX file, and of what it was moved
    from by reshapes and transposes."""
    model = load_model(common)
    producers = {value: node for node in model.graph.node for value in node.output}
    found: dict[str, tuple[str, ...]] = {}
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        names = [node.input[0]]
        while (producer := producers.get(names[-1])) is not None and producer.op_type in _MOVES:
            names.append(producer.input[0])
        for site in metadata(node).get("s2d.site", "").split(","):
            if site:
                found[site] = tuple(names)
    return found


@dataclass(frozen=True, slots=True)
class OpValue:
    """The float value behind an op, up to its bias or a constant factor: what every runtime has under that name.

    Attributes:
        name: in the common ONNX file.
        bias: whether the bias is in it.
        factor: that it was multiplied with.
    """

    name: str
    bias: bool
    factor: float


def op_values(common: Path) -> dict[str, OpValue]:
    """The value behind every contraction of the common ONNX file."""
    model = load_model(common)
    stored = initializers(model)
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[str, OpValue] = {}
    for op in contractions(model):
        value = op.node.output[0]
        users = readers.get(value, [])
        other = next((n for n in users[0].input if n != value), "") if len(users) == 1 else ""
        if op.node.op_type == "Conv":
            found[op.name] = OpValue(value, len(op.node.input) > 2, 1.0)
        elif other in stored and users[0].op_type == "Add" and len(stored[other].dims) == 1:
            found[op.name] = OpValue(users[0].output[0], True, 1.0)
        elif other in stored and users[0].op_type == "Mul" and not stored[other].dims:
            found[op.name] = OpValue(users[0].output[0], False, float(numpy_helper.to_array(stored[other])))
        else:
            found[op.name] = OpValue(value, False, 1.0)
    return found


def probe_values(site: Site) -> Array:
    """Float32 values that tell quantizers apart: exact ties of every pair of neighbouring codes, and the middles.

    A tie is a value whose quotient by the scale, rounded to float32, is k + 1/2 exactly; real data have next to none.
    """
    scale = np.float32(float(site.scale))
    zero = int(site.zero_point)
    codes = np.arange(site.grid.qmin - zero - 3, site.grid.qmax - zero + 4, dtype=np.float64)
    ties = (codes + 0.5).astype(np.float32)
    x = (ties.astype(np.float64) * np.float64(scale)).astype(np.float32)
    for candidate in (np.nextafter(x, np.float32(-np.inf)), np.nextafter(x, np.float32(np.inf))):
        x = np.where(x / scale == ties, x, candidate)
    exact = x[x / scale == ties]
    rng = np.random.default_rng(0)
    spread = rng.uniform(codes[0], codes[-1], 4096).astype(np.float32) * scale
    values: Array = np.concatenate([exact, (codes.astype(np.float32) + np.float32(0.2)) * scale, spread])
    return values
