"""Runtime `tvm`: the VM executable that `export/to_tvm.py` built, on this processor, or for CUDA on the first GPU.

- `run` calls the entry of the batch size at hand. An artifact has entries for the batch sizes it was built for; other
  batches are cut into those, the largest first, and a rest smaller than all of them is padded with copies of its last
  sample, whose results are dropped. No sample's result depends on its neighbours, so nothing changes.
- `codes` calls a second entry of the same file that returns the codes, too, computed by the very functions that `run`
  calls: codes lie in memory between functions, never inside one.
- `accumulate` calls the integer kernel alone, the same function that `run` calls, on the artifact's packed weights.
- `audit` says which kernel each contraction runs on, and how often its dot-product instruction stands in the assembly
  that was read when the artifact was built (the library's digest is checked, so it is that one).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from types import TracebackType
from typing import Any, cast

import numpy as np

from s2d_deploy.errors import ArtifactError, DataError, UnsupportedError, message
from s2d_deploy.feeds import Input, check_feeds
from s2d_deploy.session import Array, Artifact, Audit, ExecutedOp, Feeds, Rung, Runtime, lowest_rung

from ._cpu_features import byte_dot_product, cpu_name
from ._tvm_artifact import read_description
from ._tvm_cuda import GpuMachine, doctor_lines, gpu_audit, is_for_gpu
from ._tvm_machine import LocalMachine, Machine, TimingMachine, import_tvm
from ._tvm_profile import KernelTime

_RUNGS: dict[str, Rung] = {
    "fp32": "float",
    "w8a8": "native",
    "w4a16": "weight-only",
    "w4a8": "emulated",
    "w4a4": "emulated",
}


class TvmSession:
    """A loaded artifact; see `s2d_deploy.session.Session`. One thread at a time may call it."""

    def __init__(self, artifact: Artifact, load: Callable[[Artifact, dict[str, Any]], Machine]) -> None:
        self._about = read_description(artifact)
        self._machine: Machine | None = load(artifact, self._about)
        self.threads = self._machine.threads
        self._batches: list[int] = self._about["batches"]

    def __enter__(self) -> TvmSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs by name. Raises DataError for a wrong name, dtype or shape."""
        arrays = self._checked(feeds)
        outputs = self._in_pieces(arrays, self._samples(arrays), "run")
        return dict(zip(self._about["outputs"], outputs, strict=True))

    def codes(self, feeds: Feeds) -> dict[str, Array]:
        """Codes at every activation site in the plan's own type; sites that share a quantizer each get them."""
        arrays = self._checked(feeds)
        entry = self._about["functions"].get(f"codes_{self._batches[0]}")
        if entry is None:
            return {}
        values = self._in_pieces(arrays, self._samples(arrays), "codes")
        return {site: values[place] for site, place in entry["sites"].items()}

    def accumulate(self, op: str, lhs: Array, rhs: Array | None = None) -> Array:
        """The int32 accumulators of `op` for given codes, from the op's own kernel.

        Raises:
            UnsupportedError: unknown, or it does not run on integers in this artifact.
            DataError: codes of the wrong type, shape or number.
        """
        self._open()
        entries = self._integer_op(op)
        smallest = entries[str(self._batches[0])]
        operands = [("lhs", lhs, smallest["left_shape"])]
        if smallest["right_shape"] is not None:
            if rhs is None:
                raise DataError(message(f"op {op!r} multiplies two activations", expected="rhs codes", found="none"))
            operands.append(("rhs", rhs, smallest["right_shape"]))
        elif rhs is not None:
            raise DataError(message(f"op {op!r} multiplies by its stored weight", expected="no rhs"))
        rows = smallest["left_shape"][0] // self._batches[0] or 1
        arrays = [self._code_operand(op, name, array, shape) for name, array, shape in operands]
        samples = arrays[0].shape[0] // rows
        pieces = []
        for first, count, batch in _pieces(samples, self._batches):
            entry = entries[str(batch)]
            shapes = [entry["left_shape"], entry["right_shape"]]
            given = []
            for array, shape in zip(arrays, shapes, strict=False):
                per_sample = array.shape[0] // samples
                part = _padded(array[first * per_sample : (first + count) * per_sample], shape[0])
                given.append(_contiguous(part))
            result = self._open().call(entry["function"], given, entry["parameters"])[0]
            pieces.append(result[: count * (result.shape[0] // batch)])
        return np.concatenate(pieces)

    def audit(self) -> Audit:
        """Every contraction with its kernel and the arithmetic that it executes."""
        self._open()
        if is_for_gpu(self._about):
            return gpu_audit(self._about, self._batches[0])
        about, ops, rungs, notes = self._about, [], [], []
        smallest = str(self._batches[0])
        counts: dict[str, int] = about["disassembly"]["kernels"]
        mnemonic: str = about["disassembly"]["mnemonic"]
        for name, op in about["ops"].items():
            kernel = op["kernels"][smallest]
            seen = mnemonic if counts.get(kernel) else ""
            ops.append(ExecutedOp(name, kernel, op["precision"], op["macs"], op["declared"], seen))
            rungs.append(_executed_rung(op, bool(counts.get(kernel))))
            if op["note"]:
                notes.append(f"{name}: runs in FP32, because {op['note']}")
        used = {op["kernels"][smallest] for op in about["ops"].values() if op["arithmetic"] == "integer"}
        with_dot = sum(counts.get(kernel, 0) > 0 for kernel in used)
        evidence = f"kernels of the VM executable built with TVM {about['tvm']} for {about['isa']}"
        if used and mnemonic:
            evidence += f"; its assembly holds {mnemonic} in {with_dot} of {len(used)} integer kernels"
        elif used:
            evidence += "; no byte dot product on this target: the integer kernels widen each product"
        if len(self._batches) > 1 or self._batches[0] > 1:
            notes.append(f"built for batch sizes {_listing(self._batches)}; others are split and padded")
        declared = [r for r in rungs if r != "float"]
        return Audit(tuple(ops), lowest_rung(declared), evidence, tuple(notes))

    def profile(self, feeds: Feeds, runs: int = 20) -> list[KernelTime]:
        """Time of every compiled function in a run of `feeds`, in the order of the calls.

        Args:
            feeds: a batch of a size that was built.
            runs: samples of each.

        Raises:
            UnsupportedError: it runs on another machine, or on a GPU.
            DataError: wrong inputs, or a batch that would be run in pieces.
        """
        machine = self._open()
        if not isinstance(machine, LocalMachine):
            raise UnsupportedError(message("kernels are timed one by one on this machine's processor only"))
        arrays = self._checked(feeds)
        calls = list(self._calls(arrays, self._samples(arrays), "run"))
        if len(calls) != 1:
            raise DataError(
                message(
                    "a profile is of one batch",
                    expected=f"a batch of {_listing(self._batches)}",
                    found=f"{self._samples(arrays)} samples",
                )
            )
        entry, inputs, _, batch = calls[0]
        ops = [(name, op["kernels"][str(batch)]) for name, op in self._about["ops"].items()]
        return machine.profile(entry, inputs, self._about["functions"][entry]["parameters"], ops, runs)

    def close(self) -> None:
        """Free the executable and its parameters. A closed session refuses to run."""
        if self._machine is not None:
            self._machine.close()
        self._machine = None

    def precision(self) -> str:
        """What the model says that it was exported for."""
        return str(self._about["precision"])

    def facts(self) -> dict[str, str]:
        """What the artifact says that it was made from."""
        return {"s2d.precision": self.precision(), "s2d.plan_sha256": str(self._about.get("plan_sha256", ""))}

    def on_device_ns(self, feeds: Feeds) -> Callable[[], int] | None:
        """For an artifact on another machine: a call that runs `feeds` there once and returns the nanoseconds it took.

        The inputs are sent now and the outputs stay there, so that no transfer is counted. None for this machine.
        """
        machine = self._open()
        if not isinstance(machine, TimingMachine):
            return None
        arrays = self._checked(feeds)
        timers = [
            machine.timer(entry, inputs, self._about["functions"][entry]["parameters"])
            for entry, inputs, _, _ in self._calls(arrays, self._samples(arrays), "run")
        ]
        return lambda: sum(timer() for timer in timers)

    def _open(self) -> Machine:
        if self._machine is None:
            raise ArtifactError(message("this session is closed", fix="open the artifact again"))
        return self._machine

    def _checked(self, feeds: Feeds) -> dict[str, Array]:
        self._open()
        batch = self._about["batch_dimension"]
        inputs = {
            i["name"]: Input(i["dtype"], tuple(batch if d == -1 else d for d in i["shape"]))
            for i in self._about["inputs"]
        }
        check_feeds(feeds, inputs, fix="feed that shape, or build for yours with the option `shapes`")
        return {name: feeds[name] for name in inputs}

    def _samples(self, arrays: dict[str, Array]) -> int:
        batched = [i["name"] for i in self._about["inputs"] if i["shape"] and i["shape"][0] == -1]
        sizes = {name: arrays[name].shape[0] for name in batched}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            found = ", ".join(f"{name}: {size}" for name, size in sizes.items())
            raise DataError(message("inputs must have the same number of samples, at least one", found=found))
        return next(iter(sizes.values()), self._batches[0])

    def _calls(self, arrays: dict[str, Array], samples: int, kind: str) -> Iterator[tuple[str, list[Array], int, int]]:
        """``(entry, inputs, samples that count, batch size of the entry)`` of every call that `arrays` need."""
        batched = {i["name"] for i in self._about["inputs"] if i["shape"] and i["shape"][0] == -1}
        for first, count, batch in _pieces(samples, self._batches):
            inputs = []
            for name, array in arrays.items():
                part = _padded(array[first : first + count], batch) if name in batched else array
                inputs.append(_contiguous(part))
            yield f"{kind}_{batch}", inputs, count, batch

    def _in_pieces(self, arrays: dict[str, Array], samples: int, kind: str) -> list[Array]:
        results: list[list[Array]] = []
        for entry, inputs, count, batch in self._calls(arrays, samples, kind):
            outputs = self._open().call(entry, inputs, self._about["functions"][entry]["parameters"])
            results.append([self._cut(o, count, batch) for o in outputs])
        if len(results) == 1:
            return results[0]
        return [self._joined(list(parts)) for parts in zip(*results, strict=True)]

    def _cut(self, output: Array, count: int, batch: int) -> Array:
        if count == batch or not output.ndim or output.shape[0] % batch:
            return output
        return output[: count * (output.shape[0] // batch)]

    def _joined(self, parts: list[Array]) -> Array:
        return np.concatenate(parts) if parts[0].ndim else parts[0]

    def _integer_op(self, op: str) -> dict[str, Any]:
        known: dict[str, Any] = self._about["ops"]
        if op not in known:
            raise UnsupportedError(
                message(f"no op {op!r} in this artifact", expected=f"one of {', '.join(list(known)[:8])} ...")
            )
        if not known[op]["accumulate"]:
            why = known[op]["note"] or f"it is {known[op]['arithmetic']}, declared {known[op]['declared']}"
            raise UnsupportedError(message(f"op {op!r} does not run on integers in this artifact", found=why))
        return cast("dict[str, Any]", known[op]["accumulate"])

    def _code_operand(self, op: str, name: str, array: Array, shape: list[int]) -> Array:
        parameters = self._about["ops"][op]
        wanted = parameters["left_dtype"] if name == "lhs" else parameters["right_dtype"]
        rows = shape[0] // self._batches[0] or 1
        fits = array.ndim == len(shape) and list(array.shape[1:]) == shape[1:] and array.shape[0] % rows == 0
        if array.dtype.name != wanted or not fits or not array.size:
            raise DataError(
                message(
                    f"op {op!r}: {name} codes do not fit",
                    expected=f"{wanted}, {_shape_text([-1, *shape[1:]], 'samples')}",
                    found=f"{array.dtype.name}, {'x'.join(map(str, array.shape))}",
                )
            )
        return array


class TvmRuntime:
    """Implements `session.Runtime` for TVM."""

    name = "tvm"

    def available(self) -> str | None:
        """None when artifacts can be run here; otherwise what to install."""
        if find_spec("tvm") is None:
            return "TVM is not installed: pip install 's2d-deploy[tvm]'"
        return None

    def preload(self) -> None:
        """Load the library, which opening an artifact would do otherwise."""
        import_tvm()

    def version(self) -> str:
        """TVM's version, or "" where it is not installed."""
        try:
            return version("apache-tvm")
        except PackageNotFoundError:
            return ""

    def device(self) -> str:
        """The processor and the dot product that our kernels use on it."""
        return f"cpu: {os.cpu_count()} threads, {byte_dot_product() or 'no byte dot product'} ({cpu_name()})"

    def device_for(self, options: Mapping[str, Any]) -> str:
        """What an artifact with these options runs on: the GPU of its option ``device``, or this processor."""
        device = str(options.get("device", ""))
        return f"gpu: {device}" if device.startswith("cuda") else self.device()

    def details(self) -> list[str]:
        """Lines for `doctor`: whether artifacts for CUDA can be built here, and whether they can be run."""
        return doctor_lines()

    def rung(self, precision: str) -> Rung | None:
        """The rung that `precision` gets here; None for an unknown precision."""
        rung = _RUNGS.get(precision)
        # Without a byte dot product the same integers come from wider multiplications.
        return "emulated" if rung == "native" and byte_dot_product() is None else rung

    def open(self, artifact: Artifact, *, threads: int) -> TvmSession:
        """Load an artifact.

        Raises:
            ArtifactError: truncated, foreign or changed.
            RuntimeUnavailable: TVM is not installed.
            DeviceUnavailable: this processor lacks features that the artifact was built for, or there is no GPU of the
                compute capability that it was built for.
        """
        if threads < 1:
            raise DataError(message("the number of threads", expected="1 or more", found=str(threads)))
        return TvmSession(artifact, partial(_machine, threads=threads))

    def at(self, address: str) -> Runtime:
        """This runtime on another machine: ``rpc://host:port/key`` (a tracker), ``rpc://host:port`` (a server).

        Raises:
            RecipeError: not such an address.
            RuntimeUnavailable: TVM is not installed here.
            DeviceUnavailable: nothing listens there, or no device of that key is free; see `_tvm_rpc.connect`.
        """
        from ._tvm_rpc import remote_runtime

        return remote_runtime(address)


def _machine(artifact: Artifact, about: dict[str, Any], threads: int) -> Machine:
    return (GpuMachine if is_for_gpu(about) else LocalMachine)(artifact, about, threads)


RUNTIME = TvmRuntime()


def _executed_rung(op: dict[str, Any], dot: bool) -> Rung:
    declared = op["declared"]
    if declared == "float":
        return "float"
    if op["arithmetic"] == "integer":
        return "native" if declared == "W8A8" and dot else "emulated"
    return "weight-only" if op["arithmetic"] == "weight-only" else "dequantized"


def _pieces(samples: int, batches: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """``(first sample, how many, batch size of the entry)``: the largest entries first, the rest padded."""
    first = 0
    while first < samples:
        rest = samples - first
        batch = max((b for b in batches if b <= rest), default=min(batches))
        yield first, min(rest, batch), batch
        first += batch


def _padded(part: Array, rows: int) -> Array:
    if part.shape[0] == rows:
        return part
    return np.concatenate([part, np.repeat(part[-1:], rows - part.shape[0], axis=0)])


def _contiguous(array: Array) -> Array:
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _listing(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _shape_text(shape: Sequence[int], batch: str) -> str:
    return "x".join(str(d) if d != -1 else batch or "batch" for d in shape)
