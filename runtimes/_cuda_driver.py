"""The few calls of the CUDA driver that running an engine takes, through ctypes.

The driver library comes with every NVIDIA driver, so this needs no Python package and no CUDA toolkit, and works beside
a CPU build of torch. The device's primary context is used, the one that TensorRT's own CUDA runtime uses.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

from s2d_deploy.errors import DeviceUnavailable, message

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_OUT_OF_MEMORY = 2


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

    def allocate(self, size_bytes: int) -> int:
        """Address of `size_bytes` of device memory.

        Raises:
            DeviceUnavailable: out of device memory; the message says how much was asked for.
        """
        address = ctypes.c_uint64()
        status = self._library.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(max(size_bytes, 1)))
        if status == _OUT_OF_MEMORY:
            raise DeviceUnavailable(
                message(
                    "out of device memory",
                    found=f"{size_bytes} bytes asked for",
                    fix="lower bench.batch_size, or free memory that other processes hold on the GPU",
                )
            )
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


def _missing(what: str, found: str) -> str:
    return message(what, found=found, fix="run on a machine with an NVIDIA GPU and its driver")
