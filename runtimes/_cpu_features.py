"""What this processor offers, read without importing any runtime."""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")


@lru_cache(maxsize=1)
def _fields() -> dict[str, str]:
    try:
        text = _CPUINFO.read_text()
    except OSError:
        return {}
    first = text.split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def cpu_features() -> frozenset[str] | None:
    """Feature names as the kernel spells them (``avx512_vnni``, ``asimddp``); None where it cannot be asked."""
    text = _fields().get("flags") or _fields().get("Features")
    return None if text is None else frozenset(text.split())


def cpu_name() -> str:
    """The processor's name, for people."""
    return _fields().get("model name") or platform.processor() or platform.machine()


def missing_features(required: list[str]) -> list[str]:
    """Those of `required` that this processor lacks; none where it cannot be asked."""
    features = cpu_features()
    return [] if features is None else [name for name in required if name not in features]


def byte_dot_product() -> str | None:
    """The byte dot product of this processor that our kernels use, for people; None where it has none."""
    features = cpu_features() or frozenset()
    if {"avx512_vnni", "avx512bw", "avx512vl"} <= features:
        return "AVX512-VNNI"
    if {"avx_vnni", "avx2"} <= features:
        return "AVX-VNNI"
    if "asimddp" in features:
        return "Arm i8mm" if "i8mm" in features else "Arm dotprod"
    return None
