"""Which CUDA compiler is at hand, for artifacts of the TVM target: nvcc from PATH, or NVRTC's Python bindings."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def cuda_compiler() -> str | None:
    """The CUDA compiler that would be used, for people: ``"nvcc 13.0"``, ``"NVRTC 13.0"``; None where there is none."""
    if shutil.which("nvcc"):
        found = re.search(r"release (\d+\.\d+)", run_text(["nvcc", "--version"]))
        return f"nvcc {found.group(1) if found else '(unknown version)'}"
    nvrtc = nvrtc_bindings()
    if nvrtc is None:
        return None
    _, major, minor = nvrtc.nvrtcVersion()
    return f"NVRTC {major}.{minor}"


def architectures() -> list[str]:
    """Architectures that the compiler makes code for, ``"sm_75"`` and so on."""
    if shutil.which("nvcc"):
        return re.findall(r"sm_\d+", run_text(["nvcc", "--list-gpu-code"]))
    nvrtc = nvrtc_bindings()
    if nvrtc is None:
        return []
    _, archs = nvrtc.nvrtcGetSupportedArchs() if hasattr(nvrtc, "nvrtcGetSupportedArchs") else (0, [])
    return [f"sm_{arch}" for arch in archs]


def nvrtc_bindings() -> Any | None:
    """The module of NVRTC's bindings, loaded and working; None where it is not."""
    try:
        if find_spec("cuda.bindings.nvrtc") is None:
            return None
        nvrtc = import_module("cuda.bindings.nvrtc")
        nvrtc.nvrtcVersion()
    except Exception:  # bindings without the library raise errors of their own
        return None
    return nvrtc


def run_text(command: list[str]) -> str:
    """What `command` prints; "" where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
