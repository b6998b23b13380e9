"""What a session may offer beyond `session.Session`, so that a difference can be explained more closely.

None of it is required: where a runtime offers less, codes and accumulators have to do, and an explanation says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import onnx

from s2d_deploy.plan import Site
from s2d_deploy.qgraph import load_model, metadata
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
    """A session that can give one op of its artifact as an ONNX model: codes in, the op's own float result out."""

    def layer(self, op: str) -> onnx.ModelProto:
        """The model; its inputs are the codes as the artifact stores them.

        Raises:
            UnsupportedError: no such op.
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
    spread = rng.uniform(codes[0], codes[-1], 512).astype(np.float32) * scale
    values: Array = np.concatenate([exact, (codes.astype(np.float32) + np.float32(0.2)) * scale, spread])
    return values
