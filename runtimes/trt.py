"""Runtime `tensorrt`: engines that `s2d_deploy.export.to_tensorrt` built, on an NVIDIA GPU.

An engine is bound to the library's version and to the GPUs that it was built for; both are checked before it is
loaded, and a refusal says what would fit. Without a GPU nothing is run and nothing is measured: `available` says so.

Device memory and streams come from the CUDA driver itself (`_cuda_driver`), so neither torch with CUDA nor a CUDA
toolkit is needed. Inputs are copied to the device and outputs back inside `run`.
"""

from __future__ import annotations

import lzma
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as distribution_version
from types import TracebackType
from typing import Any

import numpy as np

from s2d_deploy.errors import ArtifactError, DataError, DeviceUnavailable, UnsupportedError, message
from s2d_deploy.feeds import require_feeds
from s2d_deploy.files import read_json
from s2d_deploy.precision import FP4
from s2d_deploy.session import Array, Artifact, Audit, ExecutedOp, Feeds, Rung

from . import _trt_package as package
from ._cuda_driver import Device, Driver
from ._trt_layers import audit_layers, parse_layers

_RUNGS: dict[str, Rung] = {"fp32": "float", "w8a8": "native"}
_DISTRIBUTIONS = {"tensorrt": ("tensorrt",), "tensorrt_rtx": ("tensorrt-rtx", "tensorrt_rtx")}
FORMAT = 1  # of engine.json
FP4_SINCE = 10  # major compute capability: Blackwell


class TensorRTRuntime:
    """See `s2d_deploy.session.Runtime`."""

    name = "tensorrt"

    def available(self) -> str | None:
        """None where an engine can run; else the reason. Asks for the driver first: that loads no package."""
        if not package.installed():
            return message("TensorRT is not installed", fix=package.INSTALL)
        try:
            Driver()
        except DeviceUnavailable as error:
            return str(error)
        return None

    def version(self) -> str:
        """Package and version, as ``"tensorrt_rtx 1.7.1.116"``; "" where none is installed."""
        for name, distributions in _DISTRIBUTIONS.items():
            for distribution in distributions:
                try:
                    return f"{name} {distribution_version(distribution)}"
                except PackageNotFoundError:
                    continue
        return ""

    def device(self) -> str:
        """The GPU, or that there is none."""
        try:
            found = Driver().device()
        except DeviceUnavailable:
            return "no NVIDIA GPU"
        return f"{found.name}, compute capability {found.capability}, CUDA driver {found.driver}"

    def rung(self, precision: str) -> Rung | None:
        """What TensorRT offers: every GPU that it builds for multiplies INT8, none INT4, and Blackwell NVFP4."""
        if precision in _RUNGS:
            return _RUNGS[precision]
        if precision == "nvfp4":
            return "native" if self._has_fp4() else None
        if precision in FP4:  # simulated only; no exporter writes it
            return None
        return "weight-only" if precision.endswith("a16") else "emulated"

    def _has_fp4(self) -> bool:
        """Whether the GPU here multiplies NVFP4; without a GPU, what the library builds for counts."""
        try:
            return int(Driver().device().capability.split(".")[0]) >= FP4_SINCE
        except DeviceUnavailable:
            return True

    def open(self, artifact: Artifact, *, threads: int) -> TensorRTSession:  # noqa: ARG002 - the GPU has no such setting
        """Load an engine onto the GPU.

        Raises:
            ArtifactError: truncated, foreign, built by another version, or for other GPUs; says what would fit.
            RuntimeUnavailable, DeviceUnavailable: the package, or the GPU with its driver, is missing.
        """
        description = read_description(artifact)
        trt = package.load()
        driver = Driver()
        misfit = why_not(description, trt.__name__, str(trt.__version__), driver.device())
        if misfit:
            raise ArtifactError(misfit)
        return TensorRTSession(trt, driver, description, _engine_bytes(artifact))


RUNTIME = TensorRTRuntime()


def read_description(artifact: Artifact) -> dict[str, Any]:
    """The artifact's ``engine.json``.

    Raises:
        ArtifactError: missing, truncated, or not written by this project's TensorRT target.
    """
    if artifact.target != "tensorrt" or not {"engine", "description"} <= set(artifact.files):
        raise ArtifactError(
            message(
                f"{artifact.folder}: not a TensorRT artifact",
                expected="target 'tensorrt' with the files engine and description",
                found=f"target {artifact.target!r} with {', '.join(artifact.files) or 'no files'}",
                fix="build it with s2d-deploy build, or python -m s2d_deploy.export.to_tensorrt",
            )
        )
    path = artifact.path("description")
    if not path.is_file():
        raise ArtifactError(message(f"{path}: missing", fix="build the artifact again"))
    document = read_json(path)
    needed = {"format", "package", "version", "compute_capabilities", "inputs", "outputs", "ops", "shapes", "audit"}
    if document.get("format") != FORMAT or not needed <= set(document):
        raise ArtifactError(
            message(
                f"{path}: not the description of a TensorRT engine",
                expected=f"format {FORMAT}",
                found=f"format {document.get('format')!r}",
                fix="build the artifact again",
            )
        )
    return document


def why_not(description: Mapping[str, Any], name: str, version: str, device: Device) -> str | None:
    """None where an engine fits this library and this GPU; else a sentence that says what would."""
    rebuild = f"build it again for {device.capability}"
    if (description["package"], description["version"]) != (name, version):
        return message(
            "the engine was built by another version of TensorRT",
            expected=f"{description['package']} {description['version']}",
            found=f"{name} {version}",
            fix=f"install that version, or {rebuild} here",
        )
    capabilities = description["compute_capabilities"]
    if device.capability in capabilities or capabilities == ["current"]:
        return None  # an engine for "current" carries its own check, which TensorRT makes
    return message(
        f"the engine does not fit {device.name}",
        expected=f"compute capability {' or '.join(capabilities)}",
        found=device.capability,
        fix=f'add "{device.capability}" to targets[tensorrt].options.compute_capabilities and build again',
    )


def _engine_bytes(artifact: Artifact) -> bytes:
    path = artifact.path("engine")
    try:
        data = path.read_bytes()
        return lzma.decompress(data) if path.suffix == ".xz" else data
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise ArtifactError(
            message(f"{path}: not a whole engine file", found=str(error), fix="build it again")
        ) from error


class TensorRTSession:
    """See `s2d_deploy.session.Session`. Not for use from two threads at once."""

    def __init__(self, trt: Any, driver: Driver, description: Mapping[str, Any], engine: bytes) -> None:
        self._trt, self._driver, self._description = trt, driver, description
        self._buffers: dict[str, tuple[int, int]] = {}  # tensor -> address, bytes
        self._log = package.new_log(trt)
        driver.retain_context()
        self._stream = driver.stream()
        self._runtime = trt.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            self.close()
            raise ArtifactError(
                message(
                    "TensorRT does not load the engine", found=self._last_error(), fix="build it again on this version"
                )
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            self.close()
            raise DeviceUnavailable(
                message(
                    "TensorRT cannot prepare the engine on this GPU",
                    found=self._last_error(),
                    fix="free device memory, or build with a smaller batch (targets[tensorrt].options.batch)",
                )
            )

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Copy in, execute, copy out.

        Raises:
            DataError: a wrong name, dtype or shape (outside the range that the engine was built for).
            DeviceUnavailable: the GPU failed, or its memory is full.
        """
        inputs = [tensor["name"] for tensor in self._description["inputs"]]
        require_feeds(feeds, inputs)
        self._driver.use_context()  # the caller's thread may not be the one that opened the session
        hosts: list[Array] = []  # alive until the stream is drained
        for name in inputs:
            host = self._checked(name, feeds[name])
            hosts.append(host)
            self._context.set_input_shape(name, tuple(host.shape))
            self._driver.to_device(self._bind(name, host.nbytes), host, self._stream)
        results: dict[str, Array] = {}
        for tensor in self._description["outputs"]:
            name = tensor["name"]
            shape = tuple(int(d) for d in self._context.get_tensor_shape(name))
            results[name] = np.empty(shape, self._dtype(name))
            self._bind(name, results[name].nbytes)
        if not self._context.execute_async_v3(self._stream):
            raise DeviceUnavailable(message("TensorRT could not run the engine", found=self._last_error()))
        for name, host in results.items():
            self._driver.to_host(host, self._buffers[name][0], self._stream)
        self._driver.wait(self._stream)
        return results

    def codes(self, feeds: Feeds) -> dict[str, Array]:  # noqa: ARG002 - the protocol's
        """Nothing: TensorRT keeps codes inside fused kernels, and asking for them would change the fusions."""
        return {}

    def accumulate(self, op: str, lhs: Array, rhs: Array | None = None) -> Array:  # noqa: ARG002 - the protocol's
        """Accumulators stay inside TensorRT's kernels.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            message(
                f"{op}: TensorRT shows no int32 accumulators",
                expected="a runtime that does (reference, ort, tvm) for teacher-forced parity",
                fix="judge this target by its end-to-end parity",
            )
        )

    def audit(self) -> Audit:
        """Read from the loaded engine by TensorRT's inspector; if that shows no layers, what the builder printed."""
        inspector = self._engine.create_engine_inspector()
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.ONELINE)
        found = parse_layers(text)
        if not found:
            built = self._description["audit"]
            ops = tuple(ExecutedOp(**op) for op in built["ops"])
            return Audit(
                ops, built["rung"], built["evidence"], (*built["notes"], "the engine inspector showed no layers")
            )
        evidence = f"engine inspector of {self._trt.__name__} {self._trt.__version__} on the loaded engine"
        return audit_layers(found, self._description["ops"], evidence)

    def close(self) -> None:
        """Free the engine, the buffers and the stream; a second call does nothing."""
        self._context = self._engine = self._runtime = None
        for address, _ in self._buffers.values():
            self._driver.free(address)
        self._buffers.clear()
        if self._stream:
            self._driver.drop_stream(self._stream)
            self._stream = 0
            self._driver.release_context()

    def __enter__(self) -> TensorRTSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _dtype(self, name: str) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        return dtype

    def _checked(self, name: str, value: Array) -> Array:
        array = np.ascontiguousarray(value)
        if array.dtype != self._dtype(name):
            raise DataError(
                message(f"input {name!r}: wrong dtype", expected=str(self._dtype(name)), found=str(array.dtype))
            )
        check_shape(name, array.shape, self._description)
        return array

    def _bind(self, name: str, size_bytes: int) -> int:
        """The tensor's device buffer, at least `size_bytes` large."""
        address, held = self._buffers.get(name, (0, -1))
        if held < size_bytes:
            if held >= 0:
                self._driver.free(address)
                del self._buffers[name]
            address = self._driver.allocate(size_bytes)
            self._buffers[name] = (address, size_bytes)
            self._context.set_tensor_address(name, address)
        return address

    def _last_error(self) -> str:
        return self._log.errors[-1].strip() if self._log.errors else "no reason given"


def check_shape(name: str, shape: tuple[int, ...], description: Mapping[str, Any]) -> None:
    """Compare an input's shape with what the engine was built for.

    Raises:
        DataError: another rank, or a dimension outside the range of the optimization profile.
    """
    built = next(tensor["shape"] for tensor in description["inputs"] if tensor["name"] == name)
    least, _, most = description["shapes"].get(name, [built, built, built])
    if len(shape) != len(least) or any(not low <= d <= high for d, low, high in zip(shape, least, most, strict=True)):
        raise DataError(
            message(
                f"input {name!r}: wrong shape",
                expected=f"{list(least)} to {list(most)}",
                found=str(list(shape)),
                fix="feed such a batch, or build with another targets[tensorrt].options.batch",
            )
        )
