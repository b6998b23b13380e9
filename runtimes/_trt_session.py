"""A loaded TensorRT engine: buffers, a stream, CUDA graphs, the device's own clock, the inspector.

What is used of the library exists in TensorRT 10 and 11 and in TensorRT-RTX; what only one of them has is asked for
first. RTX captures CUDA graphs itself and keeps compiled kernels in a runtime cache (`_trt_cache`); for TensorRT the
graph is captured here, through the driver.

`run` is what a caller waits for: copies to the device, execution, copies back. `on_device_ns` is the execution alone,
between two events on the stream.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from s2d_deploy.errors import ArtifactError, DataError, DeviceUnavailable, UnsupportedError, message
from s2d_deploy.feeds import require_feeds
from s2d_deploy.session import Array, Audit, ExecutedOp, Feeds

from . import _trt_cache as cache
from . import _trt_package as package
from ._cuda_driver import Driver, out_of_memory
from ._trt_layers import audit_layers, parse_layers

logger = logging.getLogger(__name__)
_DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "UINT8": np.uint8,
    "INT32": np.int32,
    "INT64": np.int64,
    "BOOL": np.bool_,
}
# TensorRT-RTX names what is wrong with an engine; what to do about it.
_REMEDIES = {
    "VERSION_MISMATCH": "it is of another version: build it again with the one that is installed here",
    "UNSUPPORTED_CC": "it has no kernels for this GPU: add its compute capability and build again",
    "OLD_CUDA_DRIVER": "the NVIDIA driver is too old for it: update the driver",
    "OLD_CUDA_RUNTIME": "the CUDA runtime is too old for it: update the package",
    "INSUFFICIENT_GPU_MEMORY": "the GPU has too little memory: build with a smaller targets[tensorrt].options.batch",
    "MALFORMED_ENGINE": "the file is damaged: build it again",
    "CUDA_ERROR": "CUDA failed: see whether other programs can use the GPU",
}


class TensorRTSession:
    """See `s2d_deploy.session.Session`. Not for use from two threads at once.

    Args:
        trt: the package.
        driver: with the device.
        description: the artifact's ``engine.json``.
        engine: the serialized engine.
        kernels: file of the runtime cache, or None for none.

    Raises:
        ArtifactError: TensorRT does not take the engine; the message says what is wrong with it.
        DeviceUnavailable: no memory for it on the GPU.
    """

    def __init__(
        self, trt: Any, driver: Driver, description: Mapping[str, Any], engine: bytes, kernels: Path | None = None
    ) -> None:
        self._trt, self._driver, self._description, self._kernels = trt, driver, description, kernels
        self._buffers: dict[str, tuple[int, int]] = {}  # tensor -> address, bytes
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._changes = 0  # counts new shapes and buffers: a captured graph holds for one state of them
        self._events: tuple[int, ...] = ()
        self._graph = self._stream = 0  # graph: 0 not captured yet, -1 never to be
        self._runtime: Any = None
        self._engine: Any = None
        self._context: Any = None
        self._compiled: Any = None  # RTX's runtime cache
        self._log = package.new_log(trt)
        driver.retain_context()
        self._open = True
        try:
            self._stream = driver.stream()
            self._runtime = trt.Runtime(self._log)
            self._refuse_invalid(engine)
            self._engine = self._runtime.deserialize_cuda_engine(engine)
            if self._engine is None:
                raise ArtifactError(
                    message(
                        "TensorRT does not load the engine",
                        found=self._last_error(),
                        fix="build it again on this version",
                    )
                )
            self._require_memory()
            self._context = self._new_context()
        except BaseException:
            self._release()
            raise

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Copy in, execute, copy out.

        Raises:
            DataError: a wrong name, dtype or shape (outside the range that the engine was built for).
            DeviceUnavailable: the GPU failed, or its memory is full.
        """
        hosts, results = self._bound(feeds)
        self._enqueue()
        for name, host in results.items():
            self._driver.to_host(host, self._buffers[name][0], self._stream)
        self._driver.wait(self._stream)
        del hosts  # alive until the stream is drained
        return results

    def on_device_ns(self, feeds: Feeds) -> Callable[[], int]:
        """A call that executes `feeds` once and returns nanoseconds between CUDA events, transfers apart.

        Raises:
            DataError, DeviceUnavailable: as `run`.
        """
        first, last = self._driver.event(), self._driver.event()
        self._events += (first, last)
        bound_at = -1

        def once() -> int:
            nonlocal bound_at
            self._driver.use_context()
            if bound_at != self._changes or not self._graph:
                hosts, _ = self._bound(feeds)
                self._enqueue()  # kernels are compiled and memory is taken in the first run, which is not timed
                self._driver.wait(self._stream)
                del hosts
                self._capture()
                bound_at = self._changes
            self._driver.record(first, self._stream)
            if self._graph > 0:
                self._driver.launch(self._graph, self._stream)
            else:
                self._enqueue()
            self._driver.record(last, self._stream)
            return self._driver.elapsed_ns(first, last)

        return once

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
        for form in ("JSON", "ONELINE"):
            text = inspector.get_engine_information(getattr(self._trt.LayerInformationFormat, form))
            if found := parse_layers(text):
                evidence = f"engine inspector of {self._trt.__name__} {self._trt.__version__} on the loaded engine"
                audit = audit_layers(found, self._description["ops"], evidence)
                return replace(audit, notes=(*self._description.get("notes", ()), *audit.notes))
        built = self._description["audit"]
        ops = tuple(ExecutedOp(**op) for op in built["ops"])
        return Audit(ops, built["rung"], built["evidence"], (*built["notes"], "the engine inspector showed no layers"))

    def close(self) -> None:
        """Keep compiled kernels, free the engine, the buffers and the stream; a second call does nothing."""
        if self._compiled is not None:
            cache.write(self._kernels, bytes(self._compiled.serialize()))
        self._release()

    def __enter__(self) -> TensorRTSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- loading ------------------------------------------------------------------------------------------------

    def _refuse_invalid(self, engine: bytes) -> None:
        """Ask RTX whether the engine fits before it is loaded: it says what does not."""
        ask = getattr(self._runtime, "get_engine_validity", None)
        if ask is None:
            return
        validity, flags = ask(engine)
        if validity != self._trt.EngineValidity.INVALID:
            return
        members = self._trt.EngineInvalidityDiagnostics.__members__
        found = [name for name, value in members.items() if int(flags) & int(value)]
        reasons = [_REMEDIES.get(name, name) for name in found] or [self._last_error()]
        raise ArtifactError(
            message(
                "TensorRT does not take the engine",
                expected=f"{self._description['package']} {self._description['version']}, compute capability "
                f"{' or '.join(self._description['compute_capabilities'])}",
                found=f"{'; '.join(reasons)} ({', '.join(found) or 'no diagnosis'})",
                fix="see above",
            )
        )

    def _require_memory(self) -> None:
        """Compare what the engine's activations take with what is free, before TensorRT asks for it."""
        engine = self._engine
        needed = int(getattr(engine, "device_memory_size_v2", 0) or getattr(engine, "device_memory_size", 0))
        free, total = self._driver.memory()
        if needed > free:
            raise DeviceUnavailable(out_of_memory("the engine's activations", needed, free, total))

    def _new_context(self) -> Any:
        config = self._engine.create_runtime_config() if hasattr(self._engine, "create_runtime_config") else None
        if config is not None and hasattr(config, "create_runtime_cache"):  # RTX
            self._compiled = config.create_runtime_cache()
            stored = cache.read(self._kernels)
            if stored and not self._compiled.deserialize(stored):
                logger.info("%s: TensorRT-RTX does not take this cache; kernels are compiled again", self._kernels)
            config.set_runtime_cache(self._compiled)
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            # Kernels for the shapes that are fed, before they run: the default swaps them in at some later run.
            strategies = self._trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
            self._graph = -1  # captured by the library
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise DeviceUnavailable(
                message(
                    "TensorRT cannot prepare the engine on this GPU",
                    found=self._last_error(),
                    fix="free device memory, or build with a smaller batch (targets[tensorrt].options.batch)",
                )
            )
        return context

    # ---- running ------------------------------------------------------------------------------------------------

    def _bound(self, feeds: Feeds) -> tuple[list[Array], dict[str, Array]]:
        """Inputs on their way to the device, and arrays for the outputs, all bound."""
        inputs = [tensor["name"] for tensor in self._description["inputs"]]
        require_feeds(feeds, inputs)
        self._driver.use_context()  # the caller's thread may not be the one that opened the session
        hosts: list[Array] = []
        for name in inputs:
            host = self._checked(name, feeds[name])
            hosts.append(host)
            if self._shapes.get(name) != host.shape:
                self._shapes[name] = host.shape
                self._changed()
                if not self._context.set_input_shape(name, tuple(host.shape)):
                    raise DataError(
                        message(f"input {name!r}: TensorRT refuses the shape {host.shape}", found=self._last_error())
                    )
            self._driver.to_device(self._bind(name, host.nbytes), host, self._stream)
        results: dict[str, Array] = {}
        for tensor in self._description["outputs"]:
            name = tensor["name"]
            shape = tuple(int(d) for d in self._context.get_tensor_shape(name))
            if min(shape, default=1) < 0:
                raise UnsupportedError(
                    message(
                        f"output {name!r}: its shape depends on values",
                        found=str(list(shape)),
                        fix="export an output whose shape follows from the inputs' shapes",
                    )
                )
            results[name] = np.empty(shape, self._dtype(tensor))
            self._bind(name, results[name].nbytes)
        return hosts, results

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream):
            raise DeviceUnavailable(message("TensorRT could not run the engine", found=self._last_error()))

    def _capture(self) -> None:
        """Record the execution as a CUDA graph, unless the library does; where it cannot be, enqueue each time."""
        if self._graph < 0:
            return
        capturable = getattr(self._context, "is_stream_capturable", None)
        if capturable is not None and not capturable(self._stream):
            self._graph = -1
            return
        try:
            self._graph = self._driver.capture(self._stream, self._enqueue)
        except DeviceUnavailable as error:
            logger.info("without a CUDA graph: %s", error)
            self._graph = -1

    def _changed(self) -> None:
        self._changes += 1
        if self._graph > 0:
            self._driver.drop_graph(self._graph)
            self._graph = 0

    def _dtype(self, tensor: Mapping[str, Any]) -> np.dtype[Any]:
        if tensor["dtype"] not in _DTYPES:
            raise UnsupportedError(
                message(
                    f"tensor {tensor['name']!r}: NumPy has no type for it",
                    expected=", ".join(_DTYPES),
                    found=str(tensor["dtype"]),
                )
            )
        return np.dtype(_DTYPES[tensor["dtype"]])

    def _checked(self, name: str, value: Array) -> Array:
        tensor = next(t for t in self._description["inputs"] if t["name"] == name)
        array, wanted = np.ascontiguousarray(value), self._dtype(tensor)
        if array.dtype != wanted:
            raise DataError(message(f"input {name!r}: wrong dtype", expected=str(wanted), found=str(array.dtype)))
        check_shape(name, array.shape, self._description)
        return array

    def _bind(self, name: str, size_bytes: int) -> int:
        """The tensor's device buffer, at least `size_bytes` large."""
        address, held = self._buffers.get(name, (0, -1))
        if held < size_bytes:
            self._changed()
            if held >= 0:
                self._driver.free(address)
                del self._buffers[name]
            address = self._driver.allocate(size_bytes, f"tensor {name!r}")
            self._buffers[name] = (address, size_bytes)
            self._context.set_tensor_address(name, address)
        return address

    def _release(self) -> None:
        if self._graph > 0:
            self._driver.drop_graph(self._graph)
        self._graph = 0
        self._context = self._compiled = self._engine = self._runtime = None
        for event in self._events:
            self._driver.drop_event(event)
        self._events = ()
        for address, _ in self._buffers.values():
            self._driver.free(address)
        self._buffers.clear()
        if self._stream:
            self._driver.drop_stream(self._stream)
            self._stream = 0
        if self._open:
            self._open = False
            self._driver.release_context()

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
