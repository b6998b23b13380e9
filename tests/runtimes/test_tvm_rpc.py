"""TVM on another machine: TVM's own RPC server and tracker, over loopback, started and ended by these tests."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import yaml
from command_line import TINY, Commands
from onnx import TensorProto, helper

from s2d_deploy.errors import ArtifactError, DeviceUnavailable, RecipeError
from s2d_deploy.latency import DeviceClock, measure
from s2d_deploy.registry import load_runtime, load_target
from s2d_deploy.session import Artifact

RUNTIME = load_runtime("tvm")
pytestmark = [
    pytest.mark.skipif(RUNTIME.available() is not None, reason=str(RUNTIME.available())),
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: without one there is no library to send"),
]
needs_tracker = pytest.mark.skipif(
    importlib.util.find_spec("tornado") is None, reason="TVM's tracker needs tornado: pip install tornado"
)
X86_LINUX = platform.machine() == "x86_64" and platform.system() == "Linux"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def end(process: subprocess.Popen[bytes]) -> None:
    """The process and its children: it leads a group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def tvm_process(module: str, port: int, *arguments: str, threads: int = 2) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", module, "--silent"),
            *("--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)),
            *arguments,
        ],
        env={**os.environ, "TVM_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until(lambda: listening(port))
        yield process
    finally:
        end(process)


@pytest.fixture(autouse=True)
def _devices_are_given_back() -> Iterator[None]:
    yield
    importlib.import_module("s2d_deploy.runtimes._tvm_rpc").disconnect()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    port = free_port()
    with tvm_process("tvm.exec.rpc_server", port):
        yield f"rpc://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A quantized product and a softmax."""
    folder = tmp_path_factory.mktemp("rpc")
    int4 = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
    stored = {
        "scale": np.float32(0.05),
        "zero": np.array(0, np.int8),
        "codes": np.random.default_rng(0).integers(-8, 8, (8, 5)).astype(int4),
        "codes.scale": np.linspace(0.01, 0.02, 5, dtype=np.float32),
        "codes.zero": np.zeros(5).astype(int4),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "fc.input.quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["xq"], "fc.input.dequantize"),
        helper.make_node("DequantizeLinear", ["codes", "codes.scale", "codes.zero"], ["w"], "fc.weight", axis=1),
        helper.make_node("MatMul", ["xq", "w"], ["z"], "fc"),
        helper.make_node("Softmax", ["z"], ["y"], "softmax", axis=-1),
    ]
    for node, facts in zip(nodes, [{"site": "fc.input"}] * 2 + [{"site": "fc.weight"}, None], strict=False):
        for key, value in (facts or {"op": "fc", "macs": "120", "declared": "W4A8"}).items():
            node.metadata_props.add(key=f"s2d.{key}", value=value)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 5])],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "m.onnx")
    options = {"batch": [1, 4]}
    return load_target("tvm").build(
        folder / "m.onnx", folder, precision="w4a8", options=options, progress=lambda _: None
    )


@pytest.fixture
def copied(artifact: Artifact, tmp_path: Path) -> Artifact:
    shutil.copytree(artifact.folder, tmp_path / "copy")
    return Artifact(tmp_path / "copy", "tvm", "w4a8", artifact.files)


def feeds(count: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(count).standard_normal((count, 3, 8)).astype(np.float32)}


def test_there_and_here_compute_the_same(server: str, artifact: Artifact) -> None:
    remote = RUNTIME.at(server)
    codes = np.random.default_rng(1).integers(-128, 128, (4, 3, 8)).astype(np.int8)
    with RUNTIME.open(artifact, threads=1) as here, remote.open(artifact, threads=1) as there:
        for count in (1, 4, 6):
            np.testing.assert_array_equal(here.run(feeds(count))["y"], there.run(feeds(count))["y"])
        np.testing.assert_array_equal(here.codes(feeds(2))["fc.input"], there.codes(feeds(2))["fc.input"])
        shape = (-1, *there._about["ops"]["fc"]["accumulate"]["1"]["left_shape"][1:])
        np.testing.assert_array_equal(
            here.accumulate("fc", codes.reshape(shape)), there.accumulate("fc", codes.reshape(shape))
        )
        assert here.audit() == there.audit()
        assert here.on_device_ns(feeds(1)) is None
    assert remote.version() == RUNTIME.version()
    assert RUNTIME.at(server) is remote


def test_two_artifacts_share_a_device_and_time_is_counted_there(server: str, artifact: Artifact) -> None:
    remote = RUNTIME.at(server)
    with remote.open(artifact, threads=1) as first, remote.open(artifact, threads=1) as second:
        clock = DeviceClock()
        timers = {"one": first.on_device_ns(feeds(4)), "split": second.on_device_ns(feeds(6))}
        stats = measure(
            {name: clock.candidate(timer) for name, timer in timers.items()},
            warmup=1,
            min_samples=20,
            min_seconds=0,
            max_seconds=60,
            clock=clock,
        )
        begin = time.perf_counter_ns()
        first.run(feeds(4))
        round_trip = time.perf_counter_ns() - begin
        first.close()
        np.testing.assert_allclose(second.run(feeds(1))["y"].sum(-1), 1, rtol=1e-5)  # its parameters are still there
    assert len(stats["one"].samples_ns) >= 20
    assert 0 < min(stats["one"].samples_ns) < round_trip


@pytest.mark.skipif(not X86_LINUX, reason="asks CPUID, and compares with /proc/cpuinfo")
def test_the_devices_processor_is_asked(server: str) -> None:
    cpu = importlib.import_module("s2d_deploy.runtimes._cpu_features")
    known = importlib.import_module("s2d_deploy.runtimes._tvm_probe").KNOWN
    needed = importlib.import_module("s2d_deploy.export._tvm_isa")._KERNEL_NAMES
    assert known >= set(needed.values())  # what is not asked for would be missing everywhere
    remote = RUNTIME.at(server)
    assert remote._link.features == cpu.cpu_features() & known
    assert remote.device() == f"{cpu.cpu_name()} at {server}"
    assert remote.rung("w8a8") == RUNTIME.rung("w8a8")
    assert remote.rung("w4a4") == "emulated"


@pytest.mark.skipif(not X86_LINUX, reason="asks CPUID")
def test_missing_features_are_named_before_anything_runs(server: str, copied: Artifact) -> None:
    about = json.loads(copied.path("description").read_text())
    about["features"].append("amx_of_the_future")
    copied.path("description").write_text(json.dumps(about))
    with pytest.raises(DeviceUnavailable, match=rf"with amx_of_the_future\. Found: .* at {server}"):
        RUNTIME.at(server).open(copied, threads=1)


def test_another_architecture_is_refused_here_and_there(server: str, copied: Artifact) -> None:
    library = copied.path("library")
    whole = library.read_bytes()
    library.write_bytes(whole[:18] + (8).to_bytes(2, "little") + whole[20:])  # e_machine of the ELF header: MIPS
    about = json.loads(copied.path("description").read_text())
    about["sha256"][library.name] = hashlib.sha256(library.read_bytes()).hexdigest()
    copied.path("description").write_text(json.dumps(about))
    for runtime in (RUNTIME, RUNTIME.at(server)):
        with pytest.raises(ArtifactError, match=r"TVM cannot load it.*for this architecture"):
            runtime.open(copied, threads=1)


def test_the_thread_pool_has_another_size(artifact: Artifact) -> None:
    port = free_port()
    words = r"Expected: 2 threads\. Found: 1\. Fix: .*TVM_NUM_THREADS=2"
    with (
        tvm_process("tvm.exec.rpc_server", port, threads=1),
        pytest.raises(DeviceUnavailable, match=words),
    ):
        RUNTIME.at(f"rpc://127.0.0.1:{port}").open(artifact, threads=2)


def test_a_device_that_ends_is_named(artifact: Artifact) -> None:
    port = free_port()
    address = f"rpc://127.0.0.1:{port}"
    with tvm_process("tvm.exec.rpc_server", port) as process:
        session = RUNTIME.at(address).open(artifact, threads=1)
        timer = session.on_device_ns(feeds(1))
        end(process)
        with pytest.raises(DeviceUnavailable, match=f"{address}: the device's process ended while running run_1"):
            session.run(feeds(1))
        with pytest.raises(DeviceUnavailable, match="process ended"):
            timer()
        session.close()
        with pytest.raises(DeviceUnavailable, match=f"{address}: no TVM RPC server answers there.*rpc_server"):
            RUNTIME.at(address).open(artifact, threads=1)


@pytest.mark.parametrize(
    "text",
    [
        *("rpc://", "rpc://host", "rpc://host:x/key", "rpc://host:99999/key", "http://host:1/key", "rpc://h:1/a/b"),
        *("rpc://u@h:1/key", "rpc://h:1/key?timeout=0", "rpc://h:1/key?time=3", "rpc://h:1/key#x", "host:9190"),
    ],
)
def test_wrong_addresses(text: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(f"device {text!r}. Expected: rpc://host:port/key")):
        RUNTIME.at(text)


def test_nothing_listens() -> None:
    port = free_port()
    with pytest.raises(DeviceUnavailable, match=f"no TVM RPC server answers there.*--port {port}"):
        RUNTIME.at(f"rpc://127.0.0.1:{port}")
    with pytest.raises(DeviceUnavailable, match=r"no TVM RPC tracker answers there.*refused.*rpc_tracker"):
        RUNTIME.at(f"rpc://127.0.0.1:{port}/board")


def test_a_busy_server_is_waited_for_no_longer_than_asked(server: str) -> None:
    RUNTIME.at(server)  # holds it
    with pytest.raises(DeviceUnavailable, match=r"no device became free within 0\.5 s"):
        RUNTIME.at(f"{server}?timeout=0.5")


@needs_tracker
def test_a_tracker_gives_the_device_of_a_key(artifact: Artifact) -> None:
    port, device = free_port(), free_port()
    tracker = f"127.0.0.1:{port}"
    with tvm_process("tvm.exec.rpc_tracker", port):
        with pytest.raises(DeviceUnavailable, match=r"knows no device of the key 'board'\. .*Found: none"):
            RUNTIME.at(f"rpc://{tracker}/board")
        with tvm_process("tvm.exec.rpc_server", device, "--tracker", tracker, "--key", "board"):

            def registered() -> bool:
                with suppress(DeviceUnavailable):
                    RUNTIME.at(f"rpc://{tracker}/board")
                    return True
                return False

            wait_until(registered)
            with RUNTIME.at(f"rpc://{tracker}/board").open(artifact, threads=1) as session:
                assert session.run(feeds(1))["y"].shape == (1, 3, 5)
            with pytest.raises(DeviceUnavailable, match=r"no device of the key 'plank'\. Expected: one of board"):
                RUNTIME.at(f"rpc://{tracker}/plank")
            with pytest.raises(DeviceUnavailable, match=r"no device became free within 0\.5 s"):
                RUNTIME.at(f"rpc://{tracker}/board?timeout=0.5")


# --- the command line -----------------------------------------------------------------------------------------


@pytest.fixture
def recipe(commands: Commands) -> str:
    document: dict[str, Any] = {**TINY, "name": "far", "targets": ["tvm"]}
    document["quantize"] = {"precisions": ["w8a8"]}
    document["bench"] = {**TINY["bench"], "batch_size": 24}  # one batch size to build for
    commands.recipe(document, "far.yaml")
    return "far.yaml"


def test_bench_and_verify_there(commands: Commands, recipe: str, server: str) -> None:
    folder = commands.cwd / "runs" / "far"
    result = commands("bench", recipe, "-o", folder, "--device", server, "--json")
    assert result.code == 0, result.stderr
    rows = {row["precision"]: row for row in result.json}
    assert rows.keys() == {"fp32", "w8a8"}
    for row in rows.values():
        assert row["status"] == "measured"
        assert row["device"].endswith(f" at {server}")
        assert 0 < row["latency_ms"]["p50"] < row["latency_ms"]["round_trip_ms"]
        assert len(row["latency_ms"]["samples"]) >= TINY["bench"]["min_samples"]
    assert rows["w8a8"]["parity"]["accumulators_checked"] > 0
    assert rows["w8a8"]["parity"]["accumulators_different"] == 0
    again = commands("bench", recipe, "-o", folder, "--device", server)
    assert again.code == 0
    assert all(again.done.values())
    here = commands("verify", recipe, "-o", folder, "--json")  # the same artifact, other stages
    assert here.code == 0, here.stderr
    assert here.json[1]["device"] != rows["w8a8"]["device"]
    assert here.done["export/tvm/w8a8"]
    assert not here.done["verify/tvm/w8a8"]
    # The same device by the recipe, and by a flag of `gate`: the same stages, judged, in a report of its own.
    judged = commands("gate", recipe, "-o", folder, "--device", server, "--json")
    assert judged.code in (0, 1), judged.stderr
    assert {r["device"] for r in judged.json["results"]} == {rows["w8a8"]["device"]}
    assert not (folder / "report.json").exists()
    assert list(folder.glob("parts/rpc-*/report.json"))
    document = yaml.safe_load((commands.cwd / recipe).read_text()) | {"targets": [{"name": "tvm", "device": server}]}
    commands.recipe(document, "there.yaml")
    there = commands("bench", "there.yaml", "-o", folder, "--update", "--json")
    assert there.code == 0, there.stderr
    assert {row["device"] for row in there.json} == {rows["w8a8"]["device"]}
    gone = commands("bench", recipe, "-o", folder, "--update", "--device", f"rpc://127.0.0.1:{free_port()}/board")
    assert gone.code == 3
    assert gone.stderr.count("error: ") == 1
    assert "no TVM RPC tracker answers there" in gone.stderr


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--device", "rpc://nowhere"], "device 'rpc://nowhere'. Expected: rpc://host:port/key"),
        (["--device", "llvm -mcpu=nonsense"], "LLVM knows no processor 'nonsense' for "),
        (["--target", "reference", "--device", "rpc://h:1"], "--device is for the target tvm. Found: reference"),
    ],
)
def test_a_wrong_device_is_one_line(commands: Commands, recipe: str, flags: list[str], text: str) -> None:
    result = commands("verify", recipe, "-o", commands.cwd / "runs" / "far", *flags)
    assert result.code == 2
    assert text in result.stderr
    assert "Traceback" not in result.stderr
