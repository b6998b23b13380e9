"""CUDA source becomes machine code: by nvcc from PATH, or by NVRTC; and what is in it is read from the result.

TVM's own callback compiles with --use_fast_math, which makes divisions approximate and would change codes; ours does
not. The result is machine code for one architecture (a cubin), and no PTX goes into the artifact: a driver that
compiled it for a later GPU would replace the INT4 instructions by others, and the rung would be a lie.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s2d_deploy.errors import RuntimeUnavailable, UnsupportedError, message
from s2d_deploy.runtimes._tvm_cuda_toolkit import architectures, cuda_compiler, nvrtc_bindings, run_text

from ._tvm_cuda_isa import CudaIsa

_PTX = re.compile(r"\b(mma\.sync\.[\w.]+|dp4a\.[\w.]+)")
_SASS = re.compile(r"\b(IMMA\.\d+\.[US]\d\.[US]\d|IDP\.4A\.[US]8\.[US]8)")


@dataclass(frozen=True)
class DeviceCode:
    """What was compiled.

    Attributes:
        binary: cubin.
        compiler: for people, ``"nvcc 13.0"``.
        instructions: of each kernel, how often each integer product instruction stands in it.
        read_from: ``"SASS"`` where a disassembler was on PATH, otherwise ``"PTX"``.
        resources: of each kernel: registers, shared_bytes, spill_bytes, as ptxas says; {} where it says nothing.
    """

    binary: bytes
    compiler: str
    instructions: dict[str, dict[str, int]]
    read_from: str
    resources: dict[str, dict[str, int]]

    def description(self) -> dict[str, Any]:
        """What ``model.json`` says of it."""
        found = {"read_from": self.read_from, "compiler": self.compiler, "instructions": self.instructions}
        return {"disassembly": found, "resources": self.resources}


def require_cuda_compiler(isa: CudaIsa) -> str:
    """The compiler's name, after a check that it makes code for `isa`.

    Raises:
        RuntimeUnavailable: there is none, or it knows no such architecture.
    """
    name = cuda_compiler()
    if name is None:
        raise RuntimeUnavailable(
            message(
                "no CUDA compiler",
                expected="nvcc on PATH, or NVRTC",
                found="neither",
                fix="install the CUDA toolkit, or pip install cuda-bindings nvidia-cuda-nvrtc nvidia-cuda-cccl",
            )
        )
    known = architectures()
    if isa.arch not in known:
        raise RuntimeUnavailable(
            message(
                f"{name} makes no code for {isa.arch}",
                expected=", ".join(known) or "an architecture that it lists",
                fix="choose one of these by -arch=, or use a CUDA toolkit that knows it (CUDA 12 has sm_61 and sm_70)",
            )
        )
    return str(name)


def compile_source(source: str, isa: CudaIsa) -> DeviceCode:
    """Machine code of `source`.

    Raises:
        RuntimeUnavailable: see `require_cuda_compiler`.
        UnsupportedError: the compiler refuses; its first error is named.
    """
    name = require_cuda_compiler(isa)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        log = (_nvcc if name.startswith("nvcc") else _by_nvrtc)(source, isa, folder)
        sass = _sass(folder)
        ptx = (folder / "model.ptx").read_text()
        kernels = _counts(sass, r"^\.text\.(\w+):", _SASS) if sass else _counts(ptx, r"\.entry (\w+)\(", _PTX)
        return DeviceCode(
            (folder / "model.cubin").read_bytes(), name, kernels, "SASS" if sass else "PTX", _resources(log)
        )


def _nvcc(source: str, isa: CudaIsa, folder: Path) -> str:
    (folder / "model.cu").write_text(source)
    command = [
        "nvcc",
        "--cubin",
        f"-arch={isa.arch}",
        "-std=c++17",
        "-Xptxas",
        "-v",
        "--keep",
        "--keep-dir",
        str(folder),
    ]
    command += ["-o", str(folder / "model.cubin"), str(folder / "model.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise _refused("nvcc", done.stderr + done.stdout)
    return done.stderr + done.stdout


def _by_nvrtc(source: str, isa: CudaIsa, folder: Path) -> str:
    nvrtc = nvrtc_bindings()
    plain = "".join(line for line in source.splitlines(keepends=True) if line.strip() != "#include <cuda.h>")
    texts = {}
    # The device code of one program is PTX or a cubin, by the spelling of its architecture.
    for kind, arch in (("PTX", f"compute_{isa.number}"), ("CUBIN", isa.arch)):
        _, program = nvrtc.nvrtcCreateProgram(plain.encode(), b"model.cu", 0, [], [])
        options = [f"--gpu-architecture={arch}".encode(), b"--std=c++17"]
        options += [f"-I{folder}".encode() for folder in _nvrtc_headers()]
        if kind == "CUBIN":
            options.append(b"--ptxas-options=-v")
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise _refused("NVRTC", log.decode(errors="replace"))
        _, size = getattr(nvrtc, f"nvrtcGet{kind}Size")(program)
        texts[kind] = bytearray(size)
        getattr(nvrtc, f"nvrtcGet{kind}")(program, texts[kind])
        nvrtc.nvrtcDestroyProgram(program)
    (folder / "model.ptx").write_bytes(texts["PTX"].rstrip(b"\0"))
    (folder / "model.cubin").write_bytes(texts["CUBIN"])
    return log.decode(errors="replace")


def _nvrtc_headers() -> list[Path]:
    """Folders of CUDA's headers that pip has brought: NVRTC itself has none of the standard library."""
    found = find_spec("nvidia")
    roots = list(found.submodule_search_locations or []) if found is not None else []
    return [path for root in roots for path in Path(root).glob("*/include") if path.is_dir()] + [
        path for root in roots for path in Path(root).glob("*/include/cccl") if path.is_dir()
    ]


def _sass(folder: Path) -> str:
    """Disassembled machine code; "" without a disassembler."""
    tool = shutil.which("nvdisasm")
    if tool is None:
        return ""
    return str(run_text([tool, str(folder / "model.cubin")]))


def _counts(text: str, header: str, instruction: re.Pattern[str]) -> dict[str, dict[str, int]]:
    pieces = re.split(header, text, flags=re.MULTILINE)
    counts: dict[str, dict[str, int]] = {}
    for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
        found = counts.setdefault(name.removesuffix("_kernel"), {})
        for mnemonic in instruction.findall(body.replace(".reuse", "")):
            found[mnemonic] = found.get(mnemonic, 0) + 1
    return {name: found for name, found in counts.items() if found}


def _resources(log: str) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    pieces = re.split(r"Compiling entry function '(\w+)'", log)
    for name, text in zip(pieces[1::2], pieces[2::2], strict=True):

        def number(pattern: str, text: str = text) -> int:
            match = re.search(pattern, text)
            return int(match.group(1)) if match else 0

        found[name.removesuffix("_kernel")] = {
            "registers": number(r"Used (\d+) registers"),
            "shared_bytes": number(r"(\d+) bytes smem"),
            "spill_bytes": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        }
    return found


def _refused(compiler: str, log: str) -> UnsupportedError:
    lines = [line.strip() for line in log.splitlines() if "error" in line.lower()] or log.strip().splitlines()[-1:]
    return UnsupportedError(
        message(
            f"{compiler} refuses the CUDA code that TVM generated",
            found=lines[0] if lines else "no reason given",
            fix="report the model; `-kernels=dp4a` leaves tensor cores out",
        )
    )
