"""The few calls of the CUDA driver that running an engine takes, through ctypes.

The driver library comes with every NVIDIA driver, so this needs no Python package and no CUDA toolkit, and works beside
a CPU build of torch. The device's primary context is used, the one that TensorRT's own CUDA runtime uses.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from s2d_deploy.errors import DeviceUnavailable, message

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_OUT_OF_MEMORY = 2
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may go on using the device


@dataclass(frozen=True, slots=True)
class Device:
    """The first CUDA device.

    Attributes:
        name: as NVIDIA calls it.
        capability: compute capability, e.g. ``"8.6"``.
        driver: CUDA version of the driver, e.g. ``"13.0"``.
    """

    name: str
    capability: str
    driver: str


class Driver:
    """The loaded driver library with its first device.

    Raises:
        DeviceUnavailable: no driver, or no GPU; the message says which.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise DeviceUnavailable(_missing("no NVIDIA driver on this machine", str(error))) from error
        status = self._library.cuInit(0)
        if status:
            raise DeviceUnavailable(_missing("the NVIDIA driver finds no usable GPU", self._text(status)))
        count = ctypes.c_int()
        self.check(self._library.cuDeviceGetCount(ctypes.byref(count)), "counting GPUs")
        if not count.value:
            raise DeviceUnavailable(_missing("the NVIDIA driver finds no GPU", "0 devices"))
        self._device = ctypes.c_int()
        self.check(self._library.cuDeviceGet(ctypes.byref(self._device), 0), "opening the first GPU")

    def device(self) -> Device:
        """What the device is."""
        name = ctypes.create_string_buffer(128)
        self.check(self._library.cuDeviceGetName(name, len(name), self._device), "reading the GPU's name")
        version = ctypes.c_int()
        self.check(self._library.cuDriverGetVersion(ctypes.byref(version)), "reading the driver's version")
        return Device(
            name.value.decode(errors="replace"),
            f"{self._attribute(_MAJOR)}.{self._attribute(_MINOR)}",
            f"{version.value // 1000}.{version.value % 1000 // 10}",
        )

    def retain_context(self) -> None:
        """Open the device's primary context, and make it current in this thread."""
        self._context = ctypes.c_void_p()
        self.check(
            self._library.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), self._device),
            "opening the GPU's context",
        )
        self.use_context()

    def use_context(self) -> None:
        """Make the opened context current in this thread; every thread that makes a call below needs it."""
        self.check(self._library.cuCtxSetCurrent(self._context), "using the GPU's context")

    def release_context(self) -> None:
        """Give back what `retain_context` took."""
        self._library.cuDevicePrimaryCtxRelease_v2(self._device)

    def stream(self) -> int:
        """A new stream's handle."""
        handle = ctypes.c_void_p()
        self.check(self._library.cuStreamCreate(ctypes.byref(handle), 1), "creating a stream")  # 1: non-blocking
        return int(handle.value or 0)

    def wait(self, stream: int) -> None:
        """Return when everything queued on `stream` is done."""
        self.check(self._library.cuStreamSynchronize(ctypes.c_void_p(stream)), "waiting for the GPU")

    def drop_stream(self, stream: int) -> None:
        """Free a stream."""
        self._library.cuStreamDestroy_v2(ctypes.c_void_p(stream))

    def memory(self) -> tuple[int, int]:
        """Bytes of device memory: free, and in all. Needs the context."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.check(self._library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)), "reading the GPU's memory")
        return int(free.value), int(total.value)

    def allocate(self, size_bytes: int, what: str = "a buffer") -> int:
        """Address of `size_bytes` of device memory.

        Raises:
            DeviceUnavailable: out of device memory; the message says for what, how much, and what there is.
        """
        address = ctypes.c_uint64()
        status = self._library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(max(size_bytes, 1)))
        if status == _OUT_OF_MEMORY:
            raise DeviceUnavailable(out_of_memory(what, size_bytes, *self.memory()))
        self.check(status, "allocating device memory")
        return int(address.value)

    def free(self, address: int) -> None:
        """Free device memory."""
        self._library.cuMemFree_v2(ctypes.c_uint64(address))

    def to_device(self, address: int, host: Any, stream: int) -> None:
        """Copy a contiguous NumPy array to `address`."""
        self.check(
            self._library.cuMemcpyHtoDAsync_v2(
                ctypes.c_uint64(address),
                ctypes.c_void_p(host.ctypes.data),
                ctypes.c_size_t(host.nbytes),
                ctypes.c_void_p(stream),
            ),
            "copying to the GPU",
        )

    def to_host(self, host: Any, address: int, stream: int) -> None:
        """Copy from `address` into a contiguous NumPy array."""
        self.check(
            self._library.cuMemcpyDtoHAsync_v2(
                ctypes.c_void_p(host.ctypes.data),
                ctypes.c_uint64(address),
                ctypes.c_size_t(host.nbytes),
                ctypes.c_void_p(stream),
            ),
            "copying from the GPU",
        )

    def event(self) -> int:
        """A new event's handle; it keeps the time at which a stream passed it."""
        handle = ctypes.c_void_p()
        self.check(self._library.cuEventCreate(ctypes.byref(handle), ctypes.c_uint(0)), "creating an event")
        return int(handle.value or 0)

    def record(self, event: int, stream: int) -> None:
        """Let `event` take the time when `stream` gets there."""
        self.check(self._library.cuEventRecord(ctypes.c_void_p(event), ctypes.c_void_p(stream)), "recording an event")

    def elapsed_ns(self, first: int, last: int) -> int:
        """Nanoseconds on the device between two recorded events, waiting for the second (resolution: half a us)."""
        self.check(self._library.cuEventSynchronize(ctypes.c_void_p(last)), "waiting for an event")
        milliseconds = ctypes.c_float()
        self.check(
            self._library.cuEventElapsedTime(ctypes.byref(milliseconds), ctypes.c_void_p(first), ctypes.c_void_p(last)),
            "reading events",
        )
        return round(milliseconds.value * 1e6)

    def drop_event(self, event: int) -> None:
        """Free an event."""
        self._library.cuEventDestroy_v2(ctypes.c_void_p(event))

    def capture(self, stream: int, work: Callable[[], object]) -> int:
        """Record what `work` queues on `stream` into an executable graph, without running it.

        Raises:
            DeviceUnavailable: the driver cannot record it; `stream` is usable afterwards.
        """
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(
            self._library.cuStreamBeginCapture_v2(ctypes.c_void_p(stream), ctypes.c_int(_THREAD_LOCAL)),
            "recording a CUDA graph",
        )
        try:
            work()
        finally:
            status = self._library.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
        self.check(status, "recording a CUDA graph")
        try:
            self.check(
                self._library.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, ctypes.c_ulonglong(0)),
                "preparing a CUDA graph",
            )
        finally:
            self._library.cuGraphDestroy(graph)
        return int(executable.value or 0)

    def launch(self, graph: int, stream: int) -> None:
        """Queue a captured graph."""
        self.check(
            self._library.cuGraphLaunch(ctypes.c_void_p(graph), ctypes.c_void_p(stream)), "launching a CUDA graph"
        )

    def drop_graph(self, graph: int) -> None:
        """Free a captured graph."""
        self._library.cuGraphExecDestroy(ctypes.c_void_p(graph))

    def check(self, status: int, doing: str) -> None:
        """Raise DeviceUnavailable with the driver's own words unless `status` is 0."""
        if status:
            raise DeviceUnavailable(message(f"the NVIDIA driver failed while {doing}", found=self._text(status)))

    def _attribute(self, which: int) -> int:
        value = ctypes.c_int()
        self.check(
            self._library.cuDeviceGetAttribute(ctypes.byref(value), which, self._device), "reading the GPU's properties"
        )
        return value.value

    def _text(self, status: int) -> str:
        text = ctypes.c_char_p()
        self._library.cuGetErrorString(status, ctypes.byref(text))
        return f"CUDA error {status}: {(text.value or b'unknown').decode(errors='replace')}"


def out_of_memory(what: str, size_bytes: int, free: int, total: int) -> str:
    """The refusal's text: what was asked for, what there is, what to lower."""
    return message(
        f"out of device memory for {what}",
        expected=f"{size_bytes / 2**20:.1f} MiB",
        found=f"{free / 2**20:.1f} of {total / 2**20:.1f} MiB free",
        fix="lower bench.batch_size or the largest batch in targets[tensorrt].options.batch, or free memory that other "
        "processes hold on the GPU",
    )


def _missing(what: str, found: str) -> str:
    return message(what, found=found, fix="run on a machine with an NVIDIA GPU and its driver")
