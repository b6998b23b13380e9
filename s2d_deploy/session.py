"""The seams: what a target writes, what a runtime runs, and what it must admit to have executed.

Third parties implement these protocols; there is no base class to inherit from.

    Target.dialect(common ONNX)   -> ONNX that this runtime's optimizer really fuses
    Target.build(dialect folder)  -> Artifact: a folder with a manifest, loadable by the runtime
    Runtime.open(artifact)        -> Session: run, codes, accumulate, audit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from s2d_deploy.errors import ArtifactError, message

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Rung = Literal["native", "emulated", "weight-only", "dequantized", "float"]
Progress = Callable[[str], None]
_AGAIN = "build it again with `s2d-deploy build`"


@dataclass(frozen=True, slots=True)
class ExecutedOp:
    """One contraction (matrix product or convolution) as the built artifact executes it.

    Attributes:
        name: the op's name in the plan, e.g. ``"encoder.layers.0.mlp.fc1"``, or the graph node's name.
        kernel: what the runtime calls it, e.g. ``"MatMulIntegerToFloat"``.
        precision: the arithmetic that is executed: ``"int8"`` (8-bit multipliers), ``"int4"``, ``"float32"``, ...
        macs: multiply-accumulates for one sample of the model's input.
        declared: what the plan promised, as ``"W4A4"``, or ``"float"`` where the plan quantizes nothing.
        instruction: that multiplies, where the compiled code was looked at, e.g. ``"vpdpbusd"``; "" where not.
    """

    name: str
    kernel: str
    precision: str
    macs: int
    declared: str = "float"
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class Audit:
    """What the built artifact really executes, layer by layer.

    Attributes:
        ops: every contraction of the graph.
        rung: the lowest rung that an op with a declared precision runs on; ``"float"`` when none is declared.
        evidence: where this was read, e.g. ``"optimized graph and profile of onnxruntime 1.32.0"``.
        notes: sentences for the report: fallbacks, refusals, what could not be seen.
    """

    ops: tuple[ExecutedOp, ...]
    rung: Rung
    evidence: str
    notes: tuple[str, ...] = ()

    @property
    def executed(self) -> dict[str, float]:
        """Share of the multiply-accumulates at each executed precision; the shares sum to 1."""
        total = sum(op.macs for op in self.ops)
        macs: dict[str, int] = {}
        for op in self.ops:
            macs[op.precision] = macs.get(op.precision, 0) + op.macs
        return {precision: count / total if total else 0.0 for precision, count in macs.items()}

    def mismatches(self) -> list[ExecutedOp]:
        """Ops whose arithmetic is not the declared one: integers promised and float executed, or the reverse."""

        def integers(text: str) -> bool:
            return text.startswith(("int", "nvfp4"))

        return [
            op
            for op in self.ops
            if integers(op.precision) != (op.declared != "float" and not op.declared.endswith("A16"))
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return {**asdict(self), "executed": self.executed}


@dataclass(frozen=True, slots=True)
class Artifact:
    """A built folder: everything that `Runtime.open` needs, described by its ``manifest.json``.

    Attributes:
        folder: where it lies.
        target: name of the target that wrote it.
        precision: ``"fp32"``, ``"w8a8"``, ``"w4a16"``, ``"w4a8"``, ``"w4a4"``.
        files: role -> file name inside `folder` (no separators, no parents).
        info: further facts for the manifest (threads, compute capabilities, versions, ...), JSON only.
    """

    folder: Path
    target: str
    precision: str
    files: dict[str, str]
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Bytes on disk of all files of the artifact that the runtime needs."""
        return sum(self.path(role).stat().st_size for role in self.files)

    def path(self, role: str) -> Path:
        """The file that plays `role`.

        Raises:
            ArtifactError: there is none, or its name leads out of the folder.
        """
        name = self.files.get(role)
        if name is None:
            raise ArtifactError(
                message(f"{self.folder}: no file for {role!r}", found=", ".join(self.files) or "none", fix=_AGAIN)
            )
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\") or not name.isprintable():
            raise ArtifactError(
                message(
                    f"{self.folder}: the name of the file for {role!r} leads out of the folder",
                    found=repr(name)[:80],
                    fix=_AGAIN,
                )
            )
        return self.folder / name


class Session(Protocol):
    """A loaded artifact. Use it as a context manager; `close` frees the device."""

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs by name for inputs by name. Raises DataError for a wrong name, dtype or shape."""
        ...

    def codes(self, feeds: Feeds) -> dict[str, Array]:
        """Codes that the runtime computes at every activation site, by site name (int8/uint8 arrays).

        4-bit codes come unpacked, one in each byte. A runtime that cannot show them returns ``{}``.
        """
        ...

    def accumulate(self, op: str, lhs: Array, rhs: Array | None = None) -> Array:
        """Teacher-forced: the int32 accumulators of contraction `op` for given input codes.

        The runtime's own kernel for that op computes ``sum_k (lhs - lhs_zp) * (rhs - rhs_zp)``.

        Args:
            op: the contraction's name.
            lhs: int8/uint8 codes of the left operand, as the simulation made them, shape ``(..., M, K)``
                (convolution: ``(B, C, H, W)``).
            rhs: codes of the right operand where it is an activation (attention), shape ``(..., K, N)``;
                None where it is the stored weight.

        Returns:
            int32 of the shape that the op has in the model.

        Raises:
            UnsupportedError: the op does not run on integers in this artifact.
        """
        ...

    def audit(self) -> Audit:
        """What this artifact executes."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


class Runtime(Protocol):
    """One adapter. `available` imports nothing heavy when it can answer without."""

    name: str

    def available(self) -> str | None:
        """None when artifacts can be run here; otherwise why not, and what to install or plug in."""
        ...

    def version(self) -> str:
        """The runtime's version, or "" where it is not installed."""
        ...

    def device(self) -> str:
        """What it runs on here, e.g. ``"cpu: 2 threads, AVX512-VNNI"``."""
        ...

    def rung(self, precision: str) -> Rung | None:
        """The rung that `precision` gets on this machine; None where it cannot be expressed."""
        ...

    def open(self, artifact: Artifact, *, threads: int) -> AbstractContextManager[Session]:
        """Load an artifact.

        Raises:
            ArtifactError: truncated or foreign.
            RuntimeUnavailable, DeviceUnavailable: it cannot run here.
        """
        ...


@runtime_checkable
class PreloadedRuntime(Protocol):
    """What a runtime has, too, whose library can be loaded apart from an artifact, so that each can be measured."""

    def preload(self) -> None:
        """Load the library."""
        ...


@runtime_checkable
class RemoteRuntime(Protocol):
    """What a runtime has, too, whose artifacts run on other machines."""

    def at(self, address: str) -> Runtime:
        """The runtime on the machine at `address`, connected. Raises RecipeError and DeviceUnavailable."""
        ...


@runtime_checkable
class RemoteSession(Protocol):
    """What a session has, too, that may run on another machine."""

    def on_device_ns(self, feeds: Feeds) -> Callable[[], int] | None:
        """A call that runs `feeds` there once and returns nanoseconds, transfers apart; None on this machine."""
        ...


class Target(Protocol):
    """One exporter."""

    name: str

    def dialect(self, model: Path, folder: Path, *, precision: str) -> Path:
        """Rewrite the common ONNX file `model` into this target's dialect, as a file inside `folder`.

        Raises:
            UnsupportedError: the plan uses a quantizer that the target cannot express; every offender is named.
        """
        ...

    def shape_options(self, batches: Sequence[int], sizes: Mapping[str, int]) -> dict[str, Any]:
        """Options that make `build` serve these shapes; {} for a target that serves any.

        Args:
            batches: batch sizes that will be run.
            sizes: length of every other dynamic dimension, by its name in the ONNX file.
        """
        ...

    def build(
        self,
        dialect: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        progress: Progress,
    ) -> Artifact:
        """Compile the dialect file into an artifact inside `folder` (not the manifest: the caller writes it).

        Raises:
            RuntimeUnavailable: the compiler is not installed.
            UnsupportedError: an operator cannot be compiled; the message names it and our layer.
        """
        ...


@runtime_checkable
class SearchingTarget(Protocol):
    """What a target has, too, whose dialect depends on options, or on what a search measures on the runtime."""

    def search(
        self,
        model: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        batches: Sequence[int],
        sizes: Mapping[str, int],
        threads: int,
        progress: Progress,
    ) -> dict[str, Any] | None:
        """Measure placements of the common file `model`: a JSON document, or None where the options ask for none."""
        ...

    def dialect_for(
        self,
        model: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        placement: Mapping[str, Any] | None,
    ) -> Path:
        """As `Target.dialect`, with the target's options and what `search` returned."""
        ...


def lowest_rung(rungs: Sequence[Rung]) -> Rung:
    """The weakest of several rungs; ``"float"`` for none."""
    order: tuple[Rung, ...] = ("native", "emulated", "weight-only", "dequantized")
    known = [r for r in rungs if r in order]
    return max(known, key=order.index) if known else "float"


def as_codes(array: Array) -> Array:
    """Codes as plain int8/uint8, one in each byte, whatever 4-bit dtype they came in."""
    name = array.dtype.name
    if name in ("int4", "int8"):
        return array.astype(np.int8)
    if name in ("uint4", "uint8"):
        return array.astype(np.uint8)
    raise TypeError(f"not a code array: {name}")
