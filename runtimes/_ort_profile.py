"""One run of a model under ONNX Runtime's profiler: which kernels ran, on what types and shapes, where and how long.

The optimized graph says what was planned; the profile says what ran, on which execution provider. Of several runs the
fastest counts for each node, since the first pays for memory and caches.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from s2d_deploy.session import Array

from ._ort_audit import COMPILED
from ._ort_loading import new_session

_RUNS = 3
_SUFFIX = "_kernel_time"


@dataclass(frozen=True, slots=True)
class Event:
    """One node of the optimized graph in the fastest of several runs.

    Attributes:
        name: of the node; `<op type>_<index>` for a node without a name.
        kernel: its operator.
        provider: the execution provider that ran it.
        inputs, outputs: (type, shape) of each tensor; weights that a kernel has packed are left out.
        microseconds: wall clock; summed over the calls of a run where a loop runs the node often.
    """

    name: str
    kernel: str
    provider: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    microseconds: int


@dataclass(frozen=True, slots=True)
class Profile:
    """A profiled model: events by node name, its outputs by name, and the optimized graph where it could be saved."""

    events: dict[str, Event]
    outputs: dict[str, Array]
    optimized: onnx.ModelProto | None
    providers: tuple[str, ...]


def profiled(
    model: Path | bytes,
    info: Mapping[str, Any],
    threads: int,
    feeds: Mapping[str, Array],
    *,
    weights: Path | None = None,
) -> Profile:
    """Load `model`, run it on `feeds`, and read ONNX Runtime's profile.

    Args:
        model: the ONNX file, or its bytes.
        info: ``providers`` and ``graph_optimization_level``, as an artifact's.
        threads: of the session.
        feeds: inputs by name.
        weights: folder of external data, for a model in bytes.

    Raises:
        ArtifactError, DeviceUnavailable: as `new_session`. Whatever onnxruntime raises while it runs.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved: Path | None = Path(folder) / "optimized.onnx"
        try:
            session = new_session(model, info, threads, saved, profile=Path(folder) / "profile", weights=weights)
        except Exception as error:
            if COMPILED not in str(error):  # what a provider compiles cannot be saved
                raise
            saved = None
            session = new_session(model, info, threads, profile=Path(folder) / "profile", weights=weights)
        names = [output.name for output in session.get_outputs()]
        for _ in range(_RUNS):
            outputs = dict(zip(names, session.run(names, dict(feeds)), strict=True))
        events = _events(json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")))
        optimized = None if saved is None else onnx.load(saved, load_external_data=False)
        return Profile(events, outputs, optimized, tuple(session.get_providers()))


def _events(trace: list[dict[str, Any]]) -> dict[str, Event]:
    runs = sorted((e["ts"], e["ts"] + e["dur"]) for e in trace if e["name"] == "model_run")
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for entry in trace:
        if entry.get("cat") != "Node" or not entry["name"].endswith(_SUFFIX):
            continue
        run = next((i for i, (begin, end) in enumerate(runs) if begin <= entry["ts"] <= end), 0)
        found.setdefault(entry["name"].removesuffix(_SUFFIX), {}).setdefault(run, []).append(entry)
    result = {}
    for name, by_run in found.items():
        best = min(by_run.values(), key=lambda entries: sum(e["dur"] for e in entries))
        facts = best[0]["args"]
        result[name] = Event(
            name,
            facts["op_name"],
            facts.get("provider", ""),
            _tensors(facts.get("input_type_shape", [])),
            _tensors(facts.get("output_type_shape", [])),
            sum(e["dur"] for e in best),
        )
    return result


def _tensors(entries: list[dict[str, list[int]]]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((kind, tuple(shape)) for entry in entries for kind, shape in entry.items())
