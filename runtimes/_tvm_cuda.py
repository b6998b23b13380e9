"""TVM artifacts for CUDA: whether this machine can run one, running it, and what it executes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from s2d_deploy.errors import DeviceUnavailable, RuntimeUnavailable, UnavailableError, message
from s2d_deploy.session import Array, Artifact, Audit, ExecutedOp, Rung, lowest_rung

from ._cuda_driver import Driver
from ._tvm_artifact import read_parameters
from ._tvm_cuda_toolkit import architectures, cuda_compiler
from ._tvm_machine import import_tvm, load_executable, loading


def is_for_gpu(about: dict[str, Any]) -> bool:
    """Whether an artifact's description says that it was built for CUDA."""
    return bool(about.get("compute_capability"))


class GpuMachine:
    """The first CUDA device.

    Raises:
        ArtifactError: truncated, foreign or changed.
        DeviceUnavailable: no GPU, or one that the artifact's machine code is not for.
        RuntimeUnavailable: TVM is not installed, or its CUDA runtime cannot be loaded.
    """

    def __init__(self, artifact: Artifact, about: dict[str, Any], threads: int) -> None:
        require_gpu(artifact, about)
        tvm = import_tvm()
        if tvm.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is None:
            raise RuntimeUnavailable(
                message(
                    f"{artifact.folder}: TVM's CUDA runtime is not loaded",
                    expected=f"libtvm_runtime_cuda and what it needs, to run for compute capability "
                    f"{about['compute_capability']}",
                    fix="pip install nvidia-cuda-runtime, and check that libcudart.so.13 and libcuda.so.1 are found",
                )
            )
        self.threads = threads
        self._device = tvm.cuda(0)
        self._to_device = tvm.runtime.tensor
        stored = read_parameters(artifact, about)
        with loading(artifact, about, tvm.__version__):
            self._vm: Any = tvm.runtime.vm.VirtualMachine(load_executable(tvm, artifact), self._device)
        self._stored = {name: self._to_device(array, self._device) for name, array in stored.items()}

    def call(self, entry: str, inputs: Sequence[Array], parameters: Sequence[str]) -> list[Array]:
        """What `entry` returns for contiguous `inputs` and stored `parameters`; copies to and from the GPU included."""
        given = [self._to_device(array, self._device) for array in inputs]
        outputs = self._vm[entry](*given, tuple(self._stored[name] for name in parameters))
        return [output.numpy() for output in outputs]

    def close(self) -> None:
        """Free the executable and its parameters."""
        self._vm, self._stored = None, {}


def require_gpu(artifact: Artifact, about: dict[str, Any]) -> None:
    """Check that the first GPU of this machine runs the artifact's machine code.

    Raises:
        DeviceUnavailable: there is none, or it is another; the message names both compute capabilities.
    """
    wanted = about["compute_capability"]
    expected = f"a GPU of compute capability {wanted}" + (
        "" if wanted.endswith(".9") else f", or a later {wanted.split('.')[0]}.x"
    )
    try:
        device = Driver().device()
    except UnavailableError as error:
        raise DeviceUnavailable(
            message(
                f"{artifact.folder}: built for CUDA, and there is no GPU to run it",
                expected=expected,
                found=str(error).split(". ")[0],
                fix="run it on a machine with such a GPU and its driver",
            )
        ) from error
    if not runs_on(wanted, device.capability):
        raise DeviceUnavailable(
            message(
                f"{artifact.folder}: its machine code is for another GPU",
                expected=expected,
                found=f"{device.name}, compute capability {device.capability}",
                fix=f"build it again with --device 'cuda -arch=sm_{device.capability.replace('.', '')}'",
            )
        )


def runs_on(built: str, device: str) -> bool:
    """Whether machine code for compute capability `built` runs on `device`: the same major number, no lower minor."""
    major, minor = (int(part) for part in built.split("."))
    theirs, below = (int(part) for part in device.split("."))
    return major == theirs and minor <= below


def gpu_audit(about: dict[str, Any], batch: int) -> Audit:
    """What an artifact for CUDA executes, read from its machine code when it was built."""
    found = about["disassembly"]
    instructions: dict[str, dict[str, int]] = found["instructions"]
    ops, rungs, notes, used = [], [], [], {}
    for name, op in about["ops"].items():
        kernel = op["kernels"][str(batch)]
        within = instructions.get(kernel, {})
        seen = ", ".join(sorted(within)) if op["arithmetic"] == "integer" else ""
        ops.append(ExecutedOp(name, kernel, executed_precision(op, within), op["macs"], op["declared"], seen))
        rungs.append(_rung(op, within))
        if op["note"]:
            notes.append(f"{name}: runs in FP32, because {op['note']}")
        if op["arithmetic"] == "integer":
            used[kernel] = within
    mnemonics = sorted({mnemonic for within in used.values() for mnemonic in within})
    evidence = f"{found['read_from']} of the kernels that {found['compiler']} compiled for {about['isa']}"
    if used:
        evidence += "; integer kernels by their instruction: " + ", ".join(
            f"{mnemonic} in {sum(mnemonic in within for within in used.values())} of {len(used)}"
            for mnemonic in mnemonics
        )
    declared: list[Rung] = [rung for rung in rungs if rung != "float"]
    return Audit(tuple(ops), lowest_rung(declared), evidence, tuple(notes))


def executed_precision(op: dict[str, Any], within: dict[str, int]) -> str:
    """``"int4"``, ``"int8"`` or ``"float32"``: by the instructions of the op's kernel."""
    if op["arithmetic"] != "integer":
        return str(op["precision"])
    return "int4" if multiplies_4_bits(within) else "int8"


def _rung(op: dict[str, Any], within: dict[str, int]) -> Rung:
    declared = op["declared"]
    if declared == "float":
        return "float"
    if op["arithmetic"] == "integer":
        native = {"W8A8": bool(within), "W4A4": multiplies_4_bits(within)}.get(declared, False)
        return "native" if native else "emulated"
    return "weight-only" if op["arithmetic"] == "weight-only" else "dequantized"


def multiplies_4_bits(instructions: dict[str, int]) -> bool:
    """Whether one of them takes 4-bit codes: ``mma.sync...s4.s4.s32`` in PTX, ``IMMA.16864.S4.S4`` in machine code."""
    return any(re.search(r"\.[su]4\.s4(\.|$)", name, re.IGNORECASE) for name in instructions)


def doctor_lines() -> list[str]:
    """What `doctor` says about CUDA: whether artifacts can be built, and whether they can be run."""
    compiler = cuda_compiler()
    if compiler is None:
        pip = "pip install cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-cccl"
        builds = f"CUDA: cannot be built: no nvcc on PATH, and no NVRTC ({pip})"
    else:
        known = architectures()
        reach = f" for {known[0]} to {known[-1]}" if known else ""
        builds = f"CUDA: built{reach} by {compiler} (--device 'cuda -arch=sm_86')"
    try:
        device = Driver().device()
    except UnavailableError as error:
        runs = f"CUDA: cannot be run: {str(error).split('. ')[0]}"
    else:
        runs = f"CUDA: run on {device.name}, compute capability {device.capability}, driver {device.driver}"
    return [builds, runs]
