"""A TensorRT session's calls, without a GPU: real ctypes calls into a CUDA driver on host memory, a scripted library.

What runs here is the adapter: buffers, shapes, copies, graphs, events, refusals, and that everything is given back.
What TensorRT itself computes is tested on a GPU only (test_trt.py).
"""

from __future__ import annotations

import ctypes
import lzma
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from s2d_deploy.errors import ArtifactError, DataError, DeviceUnavailable, UnsupportedError

cache = import_module("s2d_deploy.runtimes._trt_cache")
driver_module = import_module("s2d_deploy.runtimes._cuda_driver")
session_module = import_module("s2d_deploy.runtimes._trt_session")
CC = shutil.which("cc")
pytestmark = pytest.mark.skipif(CC is None, reason="no C compiler for the driver that the test calls")

DESCRIPTION = {
    "package": "tensorrt_rtx",
    "version": "1.7.1.116",
    "compute_capabilities": ["8.6"],
    "inputs": [{"name": "x", "dtype": "FLOAT", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "dtype": "FLOAT", "shape": [-1, 4]}],
    "shapes": {"x": [[1, 4], [2, 4], [8, 4]]},
    "ops": [{"name": "fc", "macs": 16, "declared": "W8A8", "weight": "fc.weight.dequantize"}],
    "audit": {"ops": [], "rung": "native", "evidence": "builder", "notes": []},
    "notes": ["built without 8.0"],
}
LAYERS = """{"Layers": [{"Name": "fc", "LayerType": "CaskGemmMatrixMultiply", "TacticName": "sm80_imma",
 "Inputs": [{"Name": "q", "Dimensions": [-1, 4], "Format/Datatype": "Row major Int8 format"}],
 "Outputs": [{"Name": "y", "Dimensions": [-1, 4], "Format/Datatype": "Row major linear FP32"}],
 "Weights": {"Type": "Int8", "Count": 16}, "Metadata": "[ONNX Layer: fc]\\u001e[ONNX Layer: fc.weight.dequantize]"},
 "Reformatting CopyNode"]}"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    source = Path(__file__).with_name("fake_cuda.c")
    subprocess.run([str(CC), "-shared", "-fPIC", "-Wall", "-Werror", "-O1", "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture
def gpu(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    monkeypatch.setattr(driver_module, "_LIBRARY", str(library))
    counters = ctypes.CDLL(str(library))
    counters.fake_order.restype = ctypes.c_char_p
    counters.fake_reset(ctypes.c_size_t(1 << 20))
    yield counters
    assert counters.fake_live() == 0, "contexts, streams, buffers, events or graphs were not given back"


class Context:
    """y = 2 x, on the addresses that it was given."""

    def __init__(self, calls: list[str]) -> None:
        self.calls, self.address, self.shape = calls, {}, (0, 0)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.calls.append(f"shape {shape}")
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.calls.append(f"address {name}")
        self.address[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.calls.append("execute")
        x, y = (np.ctypeslib.as_array((ctypes.c_float * 4 * self.shape[0]).from_address(self.address[n])) for n in "xy")
        y[:] = 2 * x
        return True


class Engine:
    def __init__(self, calls: list[str], memory: int, text: str = LAYERS) -> None:
        self.calls, self.device_memory_size_v2, self.text = calls, memory, text

    def create_execution_context(self) -> Context:
        return Context(self.calls)

    def create_engine_inspector(self) -> SimpleNamespace:
        return SimpleNamespace(get_engine_information=lambda form: self.text if form == "json" else "")


class RtxEngine(Engine):
    """With a runtime configuration, as TensorRT-RTX has it."""

    stored = b"compiled kernels"

    def create_runtime_config(self) -> SimpleNamespace:
        calls = self.calls

        def deserialize(blob: bytes) -> bool:
            calls.append(f"cache {blob!r}")
            return blob == RtxEngine.stored

        kernels = SimpleNamespace(serialize=lambda: RtxEngine.stored, deserialize=deserialize)
        return SimpleNamespace(create_runtime_cache=lambda: kernels, set_runtime_cache=lambda c: c is kernels)

    def create_execution_context(self, config: SimpleNamespace | None = None) -> Context:
        assert config is not None
        self.calls.append(f"graph {config.cuda_graph_strategy}")
        self.calls.append(f"shapes {config.dynamic_shapes_kernel_specialization_strategy}")
        return Context(self.calls)


def package(calls: list[str], *, engine: Engine | None, validity: tuple[str, int] | None = None) -> SimpleNamespace:
    class Runtime:
        def __init__(self, log: object) -> None:
            if validity is not None:
                self.get_engine_validity = lambda blob: validity

        def deserialize_cuda_engine(self, blob: bytes) -> Engine | None:
            return engine

    class ILogger:
        ERROR = 1

        def __init__(self) -> None:
            pass

    return SimpleNamespace(
        __name__="tensorrt_rtx",
        __version__="1.7.1.116",
        Runtime=Runtime,
        ILogger=ILogger,
        EngineValidity=SimpleNamespace(INVALID="invalid"),
        EngineInvalidityDiagnostics=SimpleNamespace(
            __members__={"VERSION_MISMATCH": 1, "UNSUPPORTED_CC": 2, "OLD_CUDA_DRIVER": 4}
        ),
        CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        LayerInformationFormat=SimpleNamespace(JSON="json", ONELINE="oneline"),
    )


def opened(kind: type[Engine] = Engine, memory: int = 0, kernels: Path | None = None, **engine: str):
    calls: list[str] = []
    made = package(calls, engine=kind(calls, memory, **engine))
    return session_module.TensorRTSession(made, driver_module.Driver(), DESCRIPTION, b"engine", kernels), calls


def test_the_driver_says_what_it_is(gpu: ctypes.CDLL) -> None:
    driver = driver_module.Driver()
    assert driver.device() == driver_module.Device("Fake RTX", "8.6", "13.1")
    assert driver.memory() == (1 << 20, 1 << 20)


def test_run_copies_in_executes_and_copies_out(gpu: ctypes.CDLL) -> None:
    rng = np.random.default_rng(0)
    session, calls = opened()
    with session:
        for batch in (2, 2, 8, 1):
            x = rng.normal(size=(batch, 4)).astype(np.float32)
            np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x)
        x = np.asfortranarray(rng.normal(size=(3, 4)).astype(np.float32))
        np.testing.assert_array_equal(session.run({"x": x})["y"], 2 * x)
    assert gpu.fake_order() == b"s" + b"><w" * 5
    assert [c for c in calls if c.startswith("shape")] == [f"shape ({n}, 4)" for n in (2, 8, 1, 3)]
    assert calls.count("address x") == 2  # buffers grow, and never shrink
    session.close()


def test_latency_is_a_graph_between_two_events(gpu: ctypes.CDLL) -> None:
    session, calls = opened()
    x = np.ones((2, 4), np.float32)
    with session:
        timer = session.on_device_ns({"x": x})
        assert [timer() for _ in range(3)] == [250_000] * 3
        # Copied and run once, captured once, then launched between events: no transfer is timed.
        assert gpu.fake_order() == b"s>w[]" + b"ege" * 3
        assert calls.count("execute") == 2
        assert gpu.fake_launches() == 3
        session.run({"x": np.ones((8, 4), np.float32)})  # other shapes and buffers: the graph is no longer valid
        assert timer() == 250_000
        assert gpu.fake_order().endswith(b"><w>w[]ege")


def test_a_stream_that_cannot_be_captured_is_timed_without_a_graph(gpu: ctypes.CDLL, monkeypatch) -> None:
    monkeypatch.setattr(Context, "is_stream_capturable", lambda self, stream: False, raising=False)
    session, calls = opened()
    with session:
        timer = session.on_device_ns({"x": np.ones((2, 4), np.float32)})
        timer(), timer()
    assert gpu.fake_order() == b"s>w" + b"ee" * 2
    assert calls.count("execute") == 3


def test_rtx_captures_by_itself_and_keeps_its_kernels(gpu: ctypes.CDLL, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels.cache"
    session, calls = opened(RtxEngine, kernels=path)
    with session:
        timer = session.on_device_ns({"x": np.ones((2, 4), np.float32)})
        timer()
    assert calls[:2] == ["graph whole", "shapes eager"]
    assert gpu.fake_order() == b"s>wee"
    assert path.read_bytes() == RtxEngine.stored
    second, calls = opened(RtxEngine, kernels=path)
    second.close()
    assert calls[0] == f"cache {RtxEngine.stored!r}"
    path.write_bytes(b"of another driver")
    third, calls = opened(RtxEngine, kernels=path)  # costs time, and nothing else
    third.close()
    assert path.read_bytes() == RtxEngine.stored


def test_the_cache_has_one_file_for_an_engine_and_a_gpu(tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    path = cache.place(b"engine", "8.6")
    assert path.parent == tmp_path / "tensorrt"
    assert path.name.endswith("-sm86.cache")
    assert len({cache.place(e, c) for e in (b"engine", b"other") for c in ("8.6", "12.0")}) == 4
    assert cache.read(path) == b""
    cache.write(path, b"kernels")
    assert cache.read(path) == b"kernels"
    path.parent.joinpath("file").write_bytes(b"")
    cache.write(path.parent / "file" / "below", b"kernels")
    assert "not written" in caplog.text
    monkeypatch.setenv(cache.VARIABLE, "")
    assert cache.place(b"engine", "8.6") is None
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.place(b"engine", "8.6").is_relative_to(tmp_path / "xdg" / "s2d-deploy")


def test_out_of_memory_says_how_much_for_what_and_what_to_lower(gpu: ctypes.CDLL) -> None:
    with pytest.raises(DeviceUnavailable) as caught:
        opened(memory=3 << 20)
    assert str(caught.value).startswith(
        "out of device memory for the engine's activations. Expected: 3.0 MiB. Found: 1.0 of 1.0 MiB free."
    )
    assert "targets[tensorrt].options.batch" in str(caught.value)
    gpu.fake_reset(ctypes.c_size_t(100))
    session, _ = opened()
    with session, pytest.raises(DeviceUnavailable, match=r"out of device memory for tensor 'x'\. Expected: 0\.0 MiB"):
        session.run({"x": np.ones((8, 4), np.float32)})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (1, "of another version: build it again with the one that is installed here (VERSION_MISMATCH)"),
        (2, "no kernels for this GPU: add its compute capability and build again (UNSUPPORTED_CC)"),
        (4, "driver is too old for it: update the driver (OLD_CUDA_DRIVER)"),
        (0, "no reason given (no diagnosis)"),
    ],
)
def test_an_engine_that_tensorrt_refuses_is_explained(gpu: ctypes.CDLL, flags: int, words: str) -> None:
    made = package([], engine=None, validity=("invalid", flags))
    with pytest.raises(ArtifactError) as caught:
        session_module.TensorRTSession(made, driver_module.Driver(), DESCRIPTION, b"engine")
    assert words in str(caught.value)
    assert "Expected: tensorrt_rtx 1.7.1.116, compute capability 8.6." in str(caught.value)


def test_an_engine_that_does_not_load_gives_everything_back(gpu: ctypes.CDLL) -> None:
    made = package([], engine=None, validity=("valid", 0))
    with pytest.raises(ArtifactError, match="TensorRT does not load the engine"):
        session_module.TensorRTSession(made, driver_module.Driver(), DESCRIPTION, b"engine")


def test_bad_feeds_are_refused_before_anything_is_copied(gpu: ctypes.CDLL, monkeypatch) -> None:
    session, _ = opened()
    with session:
        with pytest.raises(DataError, match=r"input 'x': wrong dtype\. Expected: float32\. Found: float64"):
            session.run({"x": np.ones((2, 4))})
        with pytest.raises(DataError, match=r"wrong shape\. Expected: \[1, 4\] to \[8, 4\]\. Found: \[9, 4\]"):
            session.run({"x": np.ones((9, 4), np.float32)})
        with pytest.raises(DataError, match="x"):
            session.run({})
        assert gpu.fake_order() == b"s"
        monkeypatch.setattr(Context, "get_tensor_shape", lambda self, name: (-1, 4))
        with pytest.raises(UnsupportedError, match=r"output 'y': its shape depends on values"):
            session.run({"x": np.ones((2, 4), np.float32)})


FAKE = """
import ctypes, numpy as np
class Logger:
    WARNING = 1
    def __init__(self, level): pass
class Runtime:
    def __init__(self, log): pass
    def deserialize_cuda_engine(self, data): return Engine() if data == b"engine" else None
class Engine:
    def create_execution_context(self): return Context()
class Context:
    at, shape = {}, None
    def set_input_shape(self, name, shape): self.shape = shape
    def get_tensor_shape(self, name): return self.shape
    def set_tensor_address(self, name, address): self.at[name] = address
    def execute_async_v3(self, stream):
        x, y = (np.ctypeslib.as_array((ctypes.c_float * 8).from_address(self.at[n])) for n in "xy")
        y[:] = x + 3
"""


@pytest.mark.parametrize("packed", [True, False])
def test_the_example_beside_an_engine_runs_without_this_project(library: Path, tmp_path: Path, packed: bool) -> None:
    example = import_module("s2d_deploy.export._trt_example")
    name = "model.engine.xz" if packed else "model.engine"
    (tmp_path / name).write_bytes(lzma.compress(b"engine") if packed else b"engine")
    (tmp_path / "tensorrt_rtx.py").write_text(FAKE)
    path = example.write_example(tmp_path, name, DESCRIPTION)
    path.write_text(path.read_text() + "    print(array.ravel().tolist())\n")
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path += {[p for p in sys.path if p]}; "
         f"sys.path.insert(0, {str(tmp_path)!r}); exec(compile(open({str(path)!r}).read(), {str(path)!r}, 'exec'), "
         f"{{'__file__': {str(path)!r}}}); assert 's2d_deploy' not in sys.modules"],
        capture_output=True,
        text=True,
        check=False,
        env={"LD_LIBRARY_PATH": str(library.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["y (2, 4) float32", str([3.0] * 8)]


def test_the_inspectors_json_is_audited(gpu: ctypes.CDLL) -> None:
    session, _ = opened()
    with session:
        audit = session.audit()
    assert [(op.name, op.precision, op.kernel) for op in audit.ops] == [("fc", "int8", "sm80_imma")]
    assert audit.rung == "native"
    assert "engine inspector of tensorrt_rtx" in audit.evidence
    assert audit.notes == ("built without 8.0",)
    silent, _ = opened(text='{"Layers": ["fc", "softmax"]}')
    with silent:
        assert silent.audit().notes == ("the engine inspector showed no layers",)
