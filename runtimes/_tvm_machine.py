"""Where a TVM executable runs: `LocalMachine`, this processor. (`_tvm_rpc` has the one behind TVM's RPC.)"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from s2d_deploy.errors import ArtifactError, DeviceUnavailable, RuntimeUnavailable, message
from s2d_deploy.session import Array, Artifact

from ._cpu_features import cpu_name, missing_features
from ._tvm_artifact import LIBRARY, read_parameters
from ._tvm_profile import KernelTime, profile

_POOL = threading.Lock()


class Machine(Protocol):
    """A loaded executable with its parameters."""

    threads: int

    def call(self, entry: str, inputs: Sequence[Array], parameters: Sequence[str]) -> list[Array]:
        """What `entry` returns for contiguous `inputs` and stored `parameters`."""
        ...

    def close(self) -> None:
        """Free everything."""
        ...


@runtime_checkable
class TimingMachine(Protocol):
    """A machine that times its own calls, because the way there takes time, too."""

    def timer(self, entry: str, inputs: Sequence[Array], parameters: Sequence[str]) -> Callable[[], int]:
        """A call that runs `entry` once and returns nanoseconds; the inputs are there already, the outputs stay."""
        ...


class LocalMachine:
    """This processor.

    Raises:
        ArtifactError: truncated, foreign or changed.
        RuntimeUnavailable: TVM is not installed.
        DeviceUnavailable: this processor lacks features that the artifact was built for.
    """

    def __init__(self, artifact: Artifact, about: dict[str, Any], threads: int) -> None:
        refuse_missing(artifact, about, missing_features(about["features"]), cpu_name())
        stored = read_parameters(artifact, about)
        tvm = import_tvm()
        self.threads = set_threads(tvm, threads)
        self._wanted_threads = threads
        self._tensor: Callable[[Array], Any] = tvm.runtime.tensor
        with loading(artifact, about, tvm.__version__):
            self._vm: Any = tvm.runtime.vm.VirtualMachine(load_executable(tvm, artifact), tvm.cpu())
        # Each is given up as soon as it is copied: else the most memory would be twice the parameters.
        self._stored = {name: self._tensor(stored.pop(name)) for name in list(stored)}
        self._arguments: dict[str, tuple[Sequence[str], tuple[Any, ...]]] = {}

    def call(self, entry: str, inputs: Sequence[Array], parameters: Sequence[str]) -> list[Array]:
        """What `entry` returns for contiguous `inputs` and stored `parameters`."""
        known = self._arguments.get(entry)
        if known is None or known[0] is not parameters:  # one kernel may serve several ops, with weights of their own
            known = self._arguments[entry] = (parameters, tuple(self._stored[n] for n in parameters))
        set_threads(import_tvm(), self._wanted_threads)  # the pool is the process's: another session may have set it
        outputs = self._vm[entry](*map(self._tensor, inputs), known[1])
        return [o.numpy() for o in outputs]

    def profile(
        self, entry: str, inputs: Sequence[Array], parameters: Sequence[str], ops: Sequence[tuple[str, str]], runs: int
    ) -> list[KernelTime]:
        """Time of every function that `entry` calls (`_tvm_profile.profile`)."""
        return profile(self._vm, lambda: self.call(entry, inputs, parameters), ops, runs)

    def close(self) -> None:
        """Free the executable and its parameters."""
        self._vm = None
        self._stored, self._arguments = {}, {}


@contextmanager
def loading(artifact: Artifact, about: dict[str, Any], tvm: str) -> Iterator[None]:
    """Whatever TVM says about a file that it cannot load, as an ArtifactError."""
    try:
        yield
    except Exception as error:
        raise ArtifactError(
            message(
                f"{artifact.folder}: TVM cannot load it",
                expected=f"an artifact built with TVM {about['tvm']} for this architecture",
                found=f"{str(error).strip().splitlines()[-1]} (TVM {tvm})",
                fix="build it again with `s2d-deploy build`",
            )
        ) from error


def import_tvm() -> Any:
    try:
        import tvm
        import tvm.runtime.vm  # not tvm.relax: TVM without its compiler has no such package
    except ImportError as error:
        raise RuntimeUnavailable(
            message("TVM is not installed", found=str(error), fix="pip install 's2d-deploy[tvm]'")
        ) from error
    return tvm


def load_executable(tvm: Any, artifact: Artifact) -> Any:
    """The VM executable: a linked library, or its two parts (see `_tvm_artifact`)."""
    from tvm_ffi import load_module

    if "library" in artifact.files:
        # The dynamic loader remembers libraries by path: one that was built again at the same place would come back
        # as it was. A link of its own name makes it look at the file (tvm.runtime.load_module would resolve the link).
        with tempfile.TemporaryDirectory() as folder:
            link = Path(folder) / LIBRARY
            link.symlink_to(artifact.path("library").resolve())
            return load_module(str(link))
    program = tvm.get_global_func("ffi.Module.load_from_file.relax.VMExecutable")(str(artifact.path("program")))
    program.import_module(tvm.runtime.load_module(str(artifact.path("code"))))
    return program


def set_threads(tvm: Any, threads: int) -> int:
    """Let TVM's thread pool, of which a process has one, use `threads` threads. Returns how many it then uses.

    The pool's size is fixed when it starts, by a variable; so it starts with all processors, and later settings choose
    how many of them work.
    """
    with _POOL:
        if _STATE.get("threads") != threads:
            most = max(threads, os.cpu_count() or 1)
            os.environ.setdefault("TVM_NUM_THREADS", str(most))
            tvm.get_global_func("runtime.config_threadpool")(1, threads)
            _STATE["threads"] = threads
            _STATE["used"] = int(tvm.get_global_func("runtime.NumThreads")())
        return _STATE["used"]


_STATE: dict[str, int] = {}


def refuse_missing(artifact: Artifact, about: dict[str, Any], missing: list[str], where: str) -> None:
    """Refuse, before an illegal instruction ends the process."""
    if missing:
        raise DeviceUnavailable(
            message(
                f"{artifact.folder}: built for features that this processor lacks",
                expected=f"{about['isa']}, with {', '.join(missing)}",
                found=where,
                fix="build it on this machine, or with the option `device` of one like it (docs/tvm.md)",
            )
        )
