"""Facts about this machine: what a figure was measured on. Nothing here fails, and nothing imports a runtime.

What cannot be found out is None, never guessed. Instruction sets are those that the kernel offers to
programs; whether a library was compiled to use them is the library's affair.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

# The name a reader knows -> what /proc/cpuinfo calls it. x86 first, then ARM.
FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512_vnni": "avx512_vnni",
    "avx_vnni": "avx_vnni",
    "avx_vnni_int8": "avx_vnni_int8",
    "avx512_bf16": "avx512_bf16",
    "amx_tile": "amx_tile",
    "amx_int8": "amx_int8",
    "amx_bf16": "amx_bf16",
    "neon": "asimd",
    "dotprod": "asimddp",
    "i8mm": "i8mm",
    "sve": "sve",
    "sve2": "sve2",
}
PACKAGES = (
    "s2d-deploy",
    "torch",
    "transformers",
    "numpy",
    "scikit-learn",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "apache-tvm",
    "tensorrt",
    "tensorrt-rtx",
    "nvidia-modelopt",
    "openvino",
    "nncf",
)
_GPU_QUERY = ("name", "compute_cap", "driver_version", "memory.total")


def host_facts(threads: int | None = None) -> dict[str, Any]:
    """The report's ``host``.

    Args:
        threads: how many threads the runtimes are given; None: the usable cores.

    Returns:
        cpu, architecture, cores (physical), usable_cores (this process may use), threads, memory_bytes, os,
        python, features (names of `FEATURES` that are there), gpu (a list of name, compute_capability,
        driver, memory_bytes; empty without one).
    """
    usable = usable_cores()
    return {
        "cpu": cpu_model(),
        "architecture": platform.machine(),
        "cores": physical_cores(),
        "usable_cores": usable,
        "threads": threads or usable,
        "memory_bytes": memory_bytes(),
        "os": _os_name(),
        "python": platform.python_version(),
        "features": cpu_features(),
        "gpu": gpus(),
    }


def versions() -> dict[str, str | None]:
    """Version of each package of `PACKAGES`, without importing it; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def cpu_model() -> str | None:
    """The processor's name as the kernel gives it."""
    text = _cpuinfo()
    for key in ("model name", "Model", "Hardware", "cpu model"):
        if match := re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1].strip()
    return platform.processor() or None


def physical_cores() -> int | None:
    """Cores, hyper-threads not counted."""
    try:
        import psutil  # type: ignore[import-untyped]

        cores = psutil.cpu_count(logical=False)
        return int(cores) if cores else None
    except Exception:  # facts never fail: psutil raises what the platform's calls raise
        log.debug("physical cores unknown", exc_info=True)
        return None


def usable_cores() -> int:
    """Logical cores that this process may run on: affinity and the container's CPU quota respected; at least 1."""
    try:
        cores = len(os.sched_getaffinity(0))
    except (AttributeError, OSError):
        cores = os.cpu_count() or 1
    quota = _cgroup_cores(Path("/sys/fs/cgroup"))
    return max(1, min(cores, quota) if quota else cores)


def memory_bytes() -> int | None:
    """Memory of this machine, or of this container where that has less."""
    try:
        import psutil

        total = int(psutil.virtual_memory().total)
    except Exception:  # as in physical_cores
        log.debug("memory unknown", exc_info=True)
        return None
    limit = _read(Path("/sys/fs/cgroup/memory.max")).strip()
    return min(total, int(limit)) if limit.isdecimal() else total


def cpu_features() -> list[str]:
    """Names of `FEATURES` that this CPU offers to programs, in that order."""
    return parse_features(_cpuinfo())


def parse_features(cpuinfo: str) -> list[str]:
    """The same, from the text of /proc/cpuinfo. With cores of several kinds: what all of them offer."""
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", cpuinfo, re.MULTILINE)
    if not lines:
        return []
    common = set.intersection(*(set(line.split()) for line in lines))
    return [name for name, flag in FEATURES.items() if flag in common]


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs, asked of ``nvidia-smi``; empty where there is none, or where it does not answer within 10 s."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={','.join(_GPU_QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        log.debug("nvidia-smi gave no answer", exc_info=True)
        return []
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """GPUs from the answer of ``nvidia-smi``: one line each, fields as in the query, memory in MiB."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) != len(_GPU_QUERY):
            continue
        name, capability, driver, memory = (
            None if "N/A" in cell or "Not Supported" in cell else cell for cell in cells
        )
        found.append(
            {
                "name": name,
                "compute_capability": capability,
                "driver": driver,
                "memory_bytes": int(memory) * 1024**2 if memory and memory.isdecimal() else None,
            }
        )
    return found


def _cgroup_cores(folder: Path) -> int | None:
    """Whole cores that a container's quota allows (cgroup v2: "max 100000" or "150000 100000")."""
    cells = _read(folder / "cpu.max").split()
    if len(cells) != 2 or not all(cell.isdecimal() for cell in cells) or int(cells[1]) == 0:
        return None
    return max(1, int(cells[0]) // int(cells[1]))


def _os_name() -> str:
    try:
        pretty = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        pretty = ""
    kernel = f"{platform.system()} {platform.release()}"
    return f"{pretty} ({kernel})" if pretty else kernel


def _cpuinfo() -> str:
    return _read(Path("/proc/cpuinfo")) if sys.platform == "linux" else ""


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
