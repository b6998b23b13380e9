"""Runtime `ort`: ONNX Runtime on the CPU (or another of its execution providers, where the artifact names one).

What is evidence of what:

- `run` is the artifact itself.
- `codes` runs a second session of the same file whose codes are graph outputs too. Every quantizer and integer kernel
  is a node of the file already, so showing the codes changes no fusion around them.
- `accumulate` runs the op's own kernel on the artifact's stored weights, cut out of the graph (`_ort_forced`).
- `audit` reads the graph as ONNX Runtime's optimizer leaves it (`_ort_audit`), not as we wrote it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx

from s2d_deploy.errors import ArtifactError, DataError, RuntimeUnavailable, UnsupportedError, message
from s2d_deploy.feeds import Input, check_feeds
from s2d_deploy.graph_check import sound
from s2d_deploy.qgraph import load_model, metadata
from s2d_deploy.session import Array, Artifact, Audit, Feeds, Rung

from ._cpu_features import byte_dot_product
from ._onnx_cuts import different_nodes, quantizer_model
from ._ort_audit import audit_graph
from ._ort_forced import ForcedOps
from ._ort_loading import SHIFT, STORAGE, new_session, optimized_graph, session_of
from ._ort_providers import asked_for, full_name, inventory, short_name

_RUNGS: dict[str, Rung] = {
    "fp32": "float",
    "w8a8": "native",
    "w4a16": "weight-only",
    "w4a8": "emulated",
    "w4a4": "emulated",
}
_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
_DISTRIBUTIONS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")


class OrtSession:
    """A loaded artifact; see `s2d_deploy.session.Session`."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._artifact, self._threads = artifact, threads
        self._path = artifact.path("model")
        self._session: Any = new_session(self._path, artifact.info, threads)
        self._inputs = {
            i.name: Input(None if i.type not in _TYPES else np.dtype(_TYPES[i.type]).name, tuple(i.shape))
            for i in self._session.get_inputs()
        }
        self._outputs = [o.name for o in self._session.get_outputs()]
        self._loaded: onnx.ModelProto | None = None
        self._tapped: Any = None
        self._forced: ForcedOps | None = None

    def __enter__(self) -> OrtSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs by name. Raises DataError for a wrong name, dtype, rank or dimension."""
        session = self._open()
        check_feeds(feeds, self._inputs)
        return dict(zip(self._outputs, _run(session, self._outputs, feeds), strict=True))

    def codes(self, feeds: Feeds) -> dict[str, Array]:
        """Codes at every activation site in the plan's own type; sites that share a quantizer each get them."""
        self._open()
        check_feeds(feeds, self._inputs)
        sites = self._sites()
        if not sites:
            return {}
        if self._tapped is None:
            self._tapped = session_of(self._with_taps(), self._artifact.info, self._threads)
        found = _run(self._tapped, [node.output[0] for node, _ in sites], feeds)
        result: dict[str, Array] = {}
        for (_, props), bytes_ in zip(sites, found, strict=True):
            result.update(dict.fromkeys(props["s2d.site"].split(","), _plan_codes(bytes_, props)))
        return result

    def facts(self) -> dict[str, str]:
        """What the artifact says that it was made from."""
        return dict(self._open().get_modelmeta().custom_metadata_map)

    def quantize(self, site: str, sources: Sequence[str], x: Array) -> Array:
        """Codes that the artifact's own nodes make of `x`; see `s2d_deploy.probing.QuantizerProbe`."""
        model, shift = self.quantizer(site, sources)
        session = session_of(model, self._artifact.info, 1)
        bytes_ = _run(session, [session.get_outputs()[0].name], {model.graph.input[0].name: x})[0]
        props = next(p for _, p in self._sites() if site in p["s2d.site"].split(","))
        return _plan_codes(bytes_, props | {SHIFT: str(shift)})

    def quantizer(self, site: str, sources: Sequence[str]) -> tuple[onnx.ModelProto, int]:
        """A site's quantizer as a model, and what its bytes are shifted by; see `s2d_deploy.probing.LayerCut`."""
        self._open()
        node, props = next(
            ((n, p) for n, p in self._sites() if site in p["s2d.site"].split(",")), (onnx.NodeProto(), {})
        )
        if not props:
            raise UnsupportedError(message(f"site {site!r} has no quantizer in this artifact"))
        return quantizer_model(self._model, site, node.output[0], sources), int(props[SHIFT])

    def layer(self, op: str, value: str) -> tuple[onnx.ModelProto, dict[str, tuple[str, int]]]:
        """One op with its own scales: codes in, float out; see `s2d_deploy.probing.LayerCut`."""
        self._open()
        if self._forced is None:
            self._forced = ForcedOps(self._model, self._artifact.info, self._threads)
        return self._forced.layer(op, value)

    def taps_changed(self) -> list[str]:
        """Nodes of the optimized graph that showing the codes changes; see `s2d_deploy.probing.TapCheck`."""
        self._open()
        plain, tapped = (optimized_graph(m, self._artifact.info) for m in (self._model, self._with_taps()))
        return different_nodes(plain, tapped)

    def _sites(self) -> list[tuple[onnx.NodeProto, dict[str, str]]]:
        return [(node, props) for node in self._model.graph.node if SHIFT in (props := metadata(node))]

    def _with_taps(self) -> onnx.ModelProto:
        """The model with the codes among its outputs."""
        tapped = onnx.ModelProto()
        tapped.CopyFrom(self._model)
        shown = {output.name for output in tapped.graph.output}
        for node, _ in self._sites():
            if node.output[0] not in shown:
                tapped.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.output[0]))
        return tapped

    def accumulate(self, op: str, lhs: Array, rhs: Array | None = None) -> Array:
        """The int32 accumulators of `op` for given codes, from the op's own kernel; see `_ort_forced`.

        Raises:
            UnsupportedError: unknown, or it does not run on integers in this artifact.
            DataError: codes of the wrong type, shape or number.
        """
        self._open()
        if self._forced is None:
            self._forced = ForcedOps(self._model, self._artifact.info, self._threads)
        return self._forced.accumulate(op, lhs, rhs)

    def audit(self) -> Audit:
        """Every contraction, as the optimized graph executes it."""
        self._open()
        with sound(str(self._path)):
            return audit_graph(self._model, self._path, self._artifact.info, RUNTIME.version())

    def close(self) -> None:
        """Free the sessions. A closed one refuses to run."""
        self._session = self._tapped = self._forced = self._loaded = None

    def precision(self) -> str:
        """What the model says that it was exported for, "" where it says nothing."""
        return str(self._open().get_modelmeta().custom_metadata_map.get("s2d.precision", ""))

    def _open(self) -> Any:
        if self._session is None:
            raise ArtifactError(message("this session is closed", fix="open the artifact again"))
        return self._session

    @property
    def _model(self) -> onnx.ModelProto:
        if self._loaded is None:
            self._loaded = load_model(self._path)
        return self._loaded


class OrtRuntime:
    """See `s2d_deploy.session.Runtime`."""

    name = "ort"

    def available(self) -> str | None:
        """None where onnxruntime can be imported (it is not imported for the answer)."""
        if find_spec("onnxruntime") is not None:
            return None
        return message("onnxruntime is not installed", fix="pip install 's2d-deploy[ort]'")

    def preload(self) -> None:
        """Load the library, which opening an artifact would do otherwise."""
        import_module("onnxruntime")

    def version(self) -> str:
        """The version of onnxruntime, "" where it is not installed."""
        for name in _DISTRIBUTIONS:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return ""

    def device(self) -> str:
        """The CPU with its byte dot product; a session uses as many threads as `open` is given."""
        return f"cpu: {byte_dot_product() or 'no byte dot product'}"

    def device_for(self, options: Mapping[str, Any]) -> str:
        """What an artifact with these options runs on: its providers in their order."""
        names = [short_name(name) for name, _ in asked_for(options)]
        return self.device() if names == ["cpu"] else ", then ".join(self.device() if n == "cpu" else n for n in names)

    def provider(self, name: str) -> str:
        """``"cuda"`` -> ``"CUDAExecutionProvider"``, as onnxruntime's own API wants it."""
        return full_name(name)

    def details(self) -> list[str]:
        """Lines for `doctor`: the execution providers that this onnxruntime has, and those that it lacks."""
        found = inventory()
        return [
            f"providers: {', '.join(found['here'])}",
            f"not in this build: {', '.join(found['missing'])}",
        ]

    def rung(self, precision: str) -> Rung | None:
        """W8A8 is native; 4-bit codes are multiplied exactly by 8-bit units."""
        return _RUNGS.get(precision)

    def audit_file(
        self, path: Path, *, shapes: Mapping[str, Sequence[int]], options: Mapping[str, Any], threads: int
    ) -> dict[str, Any]:
        """Audit any ONNX model, whoever wrote it; see `_ort_any.audit_any`.

        Args:
            path: the file.
            shapes: of inputs, or sizes of named dimensions.
            options: ``providers`` and ``graph_optimization_level``.
            threads: of the session.

        Raises:
            RuntimeUnavailable: onnxruntime is not installed. Else as `audit_any`.
        """
        if (reason := self.available()) is not None:
            raise RuntimeUnavailable(reason)
        from ._ort_any import audit_any

        return audit_any(path, shapes=shapes, info=options, threads=threads, version=self.version())

    def operand_shapes(
        self, path: Path, shapes: Mapping[str, Sequence[int]], threads: int
    ) -> tuple[dict[str, list[tuple[int, ...]]], dict[str, Array]]:
        """Operand shapes of each contraction by node name, and random inputs of these shapes; see `_ort_any`."""
        from ._ort_any import operand_shapes

        return operand_shapes(path, shapes, threads)

    def open(self, artifact: Artifact, *, threads: int) -> OrtSession:
        """Load an artifact on `threads` threads.

        Raises:
            RuntimeUnavailable: onnxruntime is not installed.
            DeviceUnavailable: it lacks a provider that the artifact asks for.
            ArtifactError: missing, truncated, foreign, or of another precision.
        """
        if (reason := self.available()) is not None:
            raise RuntimeUnavailable(reason)
        if artifact.target != self.name or "model" not in artifact.files:
            raise ArtifactError(
                message(
                    f"{artifact.folder}: not an artifact of ONNX Runtime",
                    expected="target 'ort' with a file in the role 'model'",
                    found=f"target {artifact.target!r}, roles {', '.join(sorted(artifact.files)) or 'none'}",
                    fix="build it for the target 'ort'",
                )
            )
        path = artifact.path("model")
        if not path.is_file():
            raise ArtifactError(message(f"{path}: no such file", fix="build the artifact again"))
        session = OrtSession(artifact, threads)
        found = session.precision()
        if found != artifact.precision:
            session.close()
            raise ArtifactError(
                message(
                    f"{path}: not the model that this artifact describes",
                    expected=f"s2d.precision {artifact.precision!r} in its metadata",
                    found=repr(found) if found else "none: the file is foreign",
                    fix="build the artifact again",
                )
            )
        return session


RUNTIME = OrtRuntime()


def _plan_codes(bytes_: Array, props: Mapping[str, str]) -> Array:
    """The dialect's bytes as codes of the plan."""
    dtype = np.uint8 if props[STORAGE].startswith("U") else np.int8
    codes: Array = (bytes_.astype(np.int16) - int(props[SHIFT])).astype(dtype)
    return codes


def _run(session: Any, names: list[str], feeds: Feeds) -> list[Array]:
    try:
        return list(session.run(names, dict(feeds)))
    except Exception as error:  # onnxruntime's exceptions share no base class
        shapes = ", ".join(f"{name} {tuple(array.shape)}" for name, array in feeds.items())
        raise DataError(
            message(
                f"onnxruntime cannot run the model on {shapes}",
                found=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:400]}",
                fix="feed shapes that the model was exported for",
            )
        ) from error
