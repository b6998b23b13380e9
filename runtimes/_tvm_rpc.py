"""TVM artifacts on another machine, by TVM's own RPC: ``rpc://host:port/key`` (tracker), ``rpc://host:port`` (server).

Library and parameters are sent once; `run` sends inputs and fetches outputs, so verification works as it does here.
Latency is measured there, by TVM's own evaluator: one warm run, then one timed run for each sample, transfers apart. A
process keeps one connection to an address, which the precisions that are compared share.

TVM's RPC is neither encrypted nor guarded: whoever reaches the server runs code there. Use it in a trusted network.
"""

from __future__ import annotations

import itertools
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit

from s2d_deploy.errors import ArtifactError, DataError, DeviceUnavailable, RecipeError, UnsupportedError, message
from s2d_deploy.session import Array, Artifact, Rung

from ._tvm_artifact import read_parameters
from ._tvm_cuda import is_for_gpu
from ._tvm_machine import import_tvm, loading, refuse_missing
from ._tvm_probe import read_processor, write_probe
from .tvm_vm import RUNTIME, TvmSession

T = TypeVar("T")

TIMEOUT_S = 60.0
_NUMBERS = itertools.count()


@dataclass(frozen=True, slots=True)
class Address:
    """Where a device is.

    Attributes:
        host: name or number.
        port: of the tracker, or of the server.
        key: what the tracker calls the device; None for a server.
        timeout_s: how long to wait for it.
    """

    host: str
    port: int
    key: str | None
    timeout_s: float = TIMEOUT_S

    def __str__(self) -> str:
        return f"rpc://{self.host}:{self.port}" + (f"/{self.key}" if self.key else "")


def parse_address(text: str) -> Address:
    """``rpc://host:port[/key][?timeout=seconds]``.

    Raises:
        RecipeError: anything else.
    """
    try:
        parts = urlsplit(text)
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
        timeout = float(options.pop("timeout", TIMEOUT_S))
        key = parts.path.removeprefix("/") or None
        good = parts.scheme == "rpc" and parts.hostname and parts.port and timeout > 0 and not options
        if good and "/" not in (key or "") and "@" not in parts.netloc and not parts.fragment:
            return Address(str(parts.hostname), int(parts.port or 0), key, timeout)
    except ValueError:
        pass
    raise RecipeError(
        message(
            f"device {text!r}",
            expected="rpc://host:port/key (a tracker and the key of a device), or rpc://host:port (a server)",
            fix="for example rpc://192.168.0.7:9190/board, or rpc://192.168.0.7:9190/board?timeout=300",
        )
    )


class Link:
    """A connection to a device.

    Attributes:
        address: where it is.
        remote: TVM's session.
        name: the processor's, for people.
        features: what it offers, as its kernel would spell it; None where it could not be asked.
        lost: the device's process has ended.
    """

    def __init__(self, address: Address) -> None:
        self.address, self.lost = address, False
        tvm = import_tvm()
        self.version: str = tvm.__version__
        self.remote: Any = _within(address, partial(_connected, import_module("tvm.rpc"), address))
        self.device: Any = self.remote.cpu()
        self.name = "an unknown processor"
        self.features: frozenset[str] | None = None
        with tempfile.TemporaryDirectory() as folder:
            probe = write_probe(tvm, Path(folder))
            if probe is not None:
                self._ask(probe)

    def _ask(self, probe: Path) -> None:
        try:
            self.remote.upload(str(probe), "probe.so")
            module = self.remote.load_module("probe.so")
        except Exception:  # no x86-64: what it offers stays unknown
            return
        self.name, self.features = read_processor(module["cpuid"], module["xgetbv"])

    def function(self, name: str) -> Callable[..., Any]:
        """A function of TVM's runtime there."""
        found: Callable[..., Any] = self.remote.get_function(name)
        return found

    @contextmanager
    def watching(self, about: dict[str, Any], what: str) -> Iterator[None]:
        """If the device's process ends within, say so, and what it may have lacked."""
        try:
            yield
        except Exception as error:
            if self._answers():
                raise
            self.lost = True
            raise DeviceUnavailable(
                message(
                    f"{self.address}: the device's process ended while {what}",
                    expected=f"a processor with {', '.join(about['features']) or about['isa']}",
                    found=self.name,
                    fix="see the RPC server's own output, start it again, and build for that processor "
                    "(targets.options.device)",
                )
            ) from error

    def _answers(self) -> bool:
        try:
            self.function("runtime.NumThreads")()
        except Exception:
            return False
        return True


class RemoteMachine:
    """An artifact on the device at the other end of `link`; see `_tvm_machine.Machine`.

    Raises:
        ArtifactError: truncated, foreign, changed, or for another architecture.
        DeviceUnavailable: the device lacks features or threads, or its process ended.
        UnsupportedError: built for CUDA.
    """

    def __init__(self, artifact: Artifact, about: dict[str, Any], link: Link, threads: int) -> None:
        if is_for_gpu(about):
            raise UnsupportedError(
                message(
                    f"{artifact.folder}: artifacts for CUDA are not run over RPC",
                    found=f"one for compute capability {about['compute_capability']}, device {link.address}",
                    fix="run it on the machine with the GPU, or build for that device's processor",
                )
            )
        if "library" not in artifact.files:
            raise ArtifactError(
                message(f"{artifact.folder}: built without a linker, so there is no library to send", fix="install g++")
            )
        if link.features is not None:
            missing = [name for name in about["features"] if name not in link.features]
            refuse_missing(artifact, about, missing, f"{link.name} at {link.address}")
        stored = read_parameters(artifact, about)
        tvm = import_tvm()
        self._tvm, self._link, self._about, self._number = tvm, link, about, next(_NUMBERS)
        self.threads = threads
        with link.watching(about, "loading"):
            self._use_threads()
            name = f"model_{self._number}.so"
            link.remote.upload(str(artifact.path("library")), name)
            with loading(artifact, about, link.version):
                self._vm: Any = tvm.runtime.vm.VirtualMachine(link.remote.load_module(name), link.device)
            # RPC passes tensors, but no tuples of them: they become one on the device, out of TVM's cache by name.
            store = link.function("vm.builtin.tensor_cache.update")
            for parameter, array in stored.items():
                store(self._name(parameter), tvm.runtime.tensor(array, link.device), True)
        self._stored = tuple(stored)
        self._arguments: dict[str, tuple[Sequence[str], Any]] = {}

    def call(self, entry: str, inputs: Sequence[Array], parameters: Sequence[str]) -> list[Array]:
        """What `entry` returns for contiguous `inputs` and stored `parameters`."""
        with self._link.watching(self._about, f"running {entry}"):
            self._use_threads()
            module = self._vm.module
            module["set_input"](entry, *self._sent(inputs), self._tuple(entry, parameters))
            module["invoke_stateful"](entry)
            count = module["get_output_arity"](entry)
            return [module["get_output"](entry, i).numpy() for i in range(count)]

    def timer(self, entry: str, inputs: Sequence[Array], parameters: Sequence[str]) -> Callable[[], int]:
        """A call that runs `entry` once and returns nanoseconds, counted there; outputs stay there."""
        saved = f"timed_{self._number}_{next(_NUMBERS)}"
        arguments = [*self._sent(inputs), self._tuple(entry, parameters)]
        self._vm.module["save_function"](entry, saved, 0, *arguments)
        evaluate = self._vm.time_evaluator(saved, self._link.device, number=1, repeat=1)

        def timed() -> int:
            with self._link.watching(self._about, f"running {entry}"):
                seconds: float = evaluate().results[0]
            return round(seconds * 1e9)

        return timed

    def close(self) -> None:
        """Free executable and parameters there."""
        self._vm, self._arguments = None, {}
        if not self._link.lost:
            remove = self._link.function("vm.builtin.tensor_cache.remove")
            for parameter in self._stored:
                remove(self._name(parameter))

    def _name(self, parameter: str) -> str:
        return f"{self._number}/{parameter}"

    def _sent(self, inputs: Sequence[Array]) -> list[Any]:
        return [self._tvm.runtime.tensor(array, self._link.device) for array in inputs]

    def _tuple(self, entry: str, parameters: Sequence[str]) -> Any:
        known = self._arguments.get(entry)
        if known is None or known[0] is not parameters:
            collect = self._link.function("vm.builtin.param_array_from_cache_by_name_unpacked")
            known = self._arguments[entry] = (parameters, collect(*map(self._name, parameters)))
        return known[1]

    def _use_threads(self) -> None:
        self._link.function("runtime.config_threadpool")(1, self.threads)
        used = int(self._link.function("runtime.NumThreads")())
        if used != self.threads:
            raise DeviceUnavailable(
                message(
                    f"{self._link.address}: the device's thread pool has another size",
                    expected=f"{self.threads} threads",
                    found=str(used),
                    fix=f"start its server with TVM_NUM_THREADS={self.threads}, or use --threads {used}",
                )
            )


class RemoteTvmRuntime:
    """Implements `session.Runtime` for a device behind RPC."""

    name = "tvm"

    def __init__(self, address: Address) -> None:
        self._address = address
        self._link = Link(address)

    def available(self) -> str | None:
        """None: it is connected."""
        return None

    def version(self) -> str:
        """TVM's version here, which writes what the device loads."""
        return RUNTIME.version()

    def device(self) -> str:
        """The device's processor and address."""
        return f"{self._link.name} at {self._address}"

    def rung(self, precision: str) -> Rung | None:
        """The rung that `precision` gets there, as far as its features are known."""
        rung = RUNTIME.rung(precision)
        known: frozenset[str] = self._link.features or frozenset()
        dot = {"avx512_vnni", "avx512bw", "avx512vl"} <= known or {"avx_vnni", "avx2"} <= known
        return ("native" if dot else "emulated") if precision == "w8a8" else rung

    def open(self, artifact: Artifact, *, threads: int) -> TvmSession:
        """Send an artifact there, and load it.

        Raises:
            ArtifactError: truncated, foreign, changed, or for another architecture.
            DeviceUnavailable: the device lacks features or threads, or is gone.
        """
        if threads < 1:
            raise DataError(message("the number of threads", expected="1 or more", found=str(threads)))
        if self._link.lost:
            self._link = Link(self._address)
        return TvmSession(artifact, partial(RemoteMachine, link=self._link, threads=threads))


_RUNTIMES: dict[Address, RemoteTvmRuntime] = {}


def remote_runtime(text: str) -> RemoteTvmRuntime:
    """The runtime at an address, connected; a process has one for each.

    Raises:
        RecipeError: no such address.
        RuntimeUnavailable: TVM is not installed here.
        DeviceUnavailable: nothing listens there, there is no device of that key, or none is free in time.
    """
    address = parse_address(text)
    if address not in _RUNTIMES:
        _RUNTIMES[address] = RemoteTvmRuntime(address)
    return _RUNTIMES[address]


def disconnect() -> None:
    """Give all devices back. (The end of the process does, too.)"""
    _RUNTIMES.clear()


def _connected(rpc: Any, address: Address) -> Any:
    if address.key is None:
        try:
            return rpc.connect(address.host, address.port)
        except Exception as error:
            raise DeviceUnavailable(
                message(
                    f"{address}: no TVM RPC server answers there",
                    found=str(error).strip().splitlines()[-1],
                    fix=f"start one: python -m tvm.exec.rpc_server --host 0.0.0.0 --port {address.port}",
                )
            ) from error
    start = f"python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port {address.port}"
    try:  # TVM itself would try again for a minute
        socket.create_connection((address.host, address.port), timeout=address.timeout_s).close()
        tracker = rpc.connect_tracker(address.host, address.port)
        listed = {str(info["key"]).removeprefix("server:") for info in tracker.summary()["server_info"]}
    except Exception as error:
        raise DeviceUnavailable(
            message(f"{address}: no TVM RPC tracker answers there", found=str(error), fix=f"start one: {start}")
        ) from error
    if address.key not in listed:
        raise DeviceUnavailable(
            message(
                f"{address}: the tracker knows no device of the key {address.key!r}",
                expected=f"one of {', '.join(sorted(listed))}" if listed else "a device that has registered",
                found="none" if not listed else None,
                fix=f"on the device: python -m tvm.exec.rpc_server --tracker {address.host}:{address.port} "
                f"--key {address.key}",
            )
        )
    try:
        return tracker.request(address.key)  # again, where a server has just changed its key
    except Exception as error:
        reason = str(error).strip().splitlines()[-1]
        raise DeviceUnavailable(message(f"{address}: the device does not answer", found=reason)) from error


def _within(address: Address, work: Callable[[], T]) -> T:
    """`work` done, or DeviceUnavailable after the address's time: TVM itself waits without end for a busy device."""
    done: list[T] = []
    failed: list[BaseException] = []

    def attempt() -> None:
        try:
            done.append(work())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(address.timeout_s)
    if failed:
        raise failed[0]
    if not done:
        raise DeviceUnavailable(
            message(
                f"{address}: no device became free within {address.timeout_s:g} s",
                fix=f"wait until it is free, or wait longer: {address}?timeout={10 * address.timeout_s:g}",
            )
        )
    return done[0]
