"""Host facts: parsers on real texts, and the facts of this machine against other sources."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from s2d_deploy import host


def test_facts_of_this_machine():
    facts = host.host_facts()
    assert list(facts) == [
        "cpu",
        "architecture",
        "cores",
        "usable_cores",
        "threads",
        "memory_bytes",
        "os",
        "python",
        "features",
        "gpu",
    ]
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert 1 <= facts["usable_cores"] <= (os.cpu_count() or 1)
    assert facts["threads"] == facts["usable_cores"]
    assert host.host_facts(threads=7)["threads"] == 7
    assert facts["memory_bytes"] > 2**28
    json.dumps(facts, allow_nan=False)


def test_usable_cores_follow_the_affinity():
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); from s2d_deploy import host; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(host.usable_cores())"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000\n", None),
        ("150000 100000\n", 1),
        ("400000 100000\n", 4),
        ("10000 100000", 1),
        ("", None),
        ("x", None),
    ],
)
def test_a_containers_quota(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert host._cgroup_cores(tmp_path) == cores
    assert host._cgroup_cores(tmp_path / "absent") is None


def test_features_of_both_families():
    x86 = "processor\t: 0\nflags\t\t: fpu avx2 fma avx512f avx512_vnni amx_int8 avx_vnni\n"
    assert host.parse_features(x86) == ["avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8"]
    arm = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm\n\nprocessor\t: 1\nFeatures\t: fp asimd asimddp\n"
    assert host.parse_features(arm) == ["neon", "dotprod"]  # only what every core has
    assert host.parse_features("") == []
    assert host.parse_features("flags : noavx2 avx2x") == []


def test_gpus_from_the_answer():
    text = "NVIDIA H200, 9.0, 570.86.15, 143771\nTesla T4, 7.5, 570.86.15, [N/A]\ngarbage\n"
    assert host.parse_gpus(text) == [
        {
            "name": "NVIDIA H200",
            "compute_capability": "9.0",
            "driver": "570.86.15",
            "memory_bytes": 143771 * 1024**2,
        },
        {"name": "Tesla T4", "compute_capability": "7.5", "driver": "570.86.15", "memory_bytes": None},
    ]
    assert host.parse_gpus("") == []


@pytest.mark.parametrize(
    "script", ["exit 9", "echo 'NVIDIA-SMI has failed'; exit 0", "printf '\\377\\376'", "kill -9 $$"]
)
def test_a_broken_driver_is_no_gpu(tmp_path, monkeypatch, script):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert host.gpus() == []


def test_a_working_driver_is_asked(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "$@" > "$0.args"\necho "NVIDIA L4, 8.9, 550.1, 23034"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert host.gpus()[0]["compute_capability"] == "8.9"
    asked = Path(f"{program}.args").read_text().strip()
    assert asked == "--query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader,nounits"


def test_versions_are_those_of_the_metadata():
    found = host.versions()
    assert found["numpy"] == metadata.version("numpy")
    assert found["s2d-deploy"] == metadata.version("s2d-deploy")
    assert set(found) == {"python", *host.PACKAGES}
    assert "absent-package" not in found


def test_facts_import_no_runtime():
    code = (
        "import sys; from s2d_deploy import host; host.host_facts(); host.versions(); "
        "print([m for m in ('torch', 'numpy', 'onnxruntime', 'tvm', 'tensorrt_rtx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
