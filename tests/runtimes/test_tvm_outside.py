"""A TVM artifact outside this package: the documented Python lines and the C++ program, with TVM's runtime alone."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from s2d_deploy.registry import load_runtime, load_target
from s2d_deploy.session import Artifact

RUNTIME, TARGET = load_runtime("tvm"), load_target("tvm")
PYTHON: str = sys.modules[type(TARGET).__module__].PYTHON
pytestmark = pytest.mark.skipif(RUNTIME.available() is not None, reason=str(RUNTIME.available()))

ROOT = Path(__file__).parent.parent.parent
PROGRAM, DOCUMENT = ROOT / "examples" / "tvm_run.cc", ROOT / "docs" / "tvm.md"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A quantized product behind an embedding of int64 tokens, with a second, float input."""
    folder = tmp_path_factory.mktemp("outside")
    rng = np.random.default_rng(0)
    stored = {
        "table": rng.standard_normal((7, 8)).astype(np.float32),
        "scale": np.float32(0.05),
        "zero": np.array(0, np.int8),
        "codes": rng.integers(-8, 8, (8, 5)).astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4)),
        "codes.scale": rng.uniform(0.01, 0.02, 5).astype(np.float32),
        "codes.zero": np.zeros(5).astype(helper.tensor_dtype_to_np_dtype(TensorProto.INT4)),
    }
    contraction = helper.make_node("MatMul", ["x", "w"], ["y"], "fc")
    for key, value in (("s2d.op", "fc"), ("s2d.macs", "120"), ("s2d.declared", "W4A8")):
        contraction.metadata_props.add(key=key, value=value)
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["embedded"], "embed"),
        helper.make_node("Add", ["embedded", "shift"], ["sum"], "add"),
        helper.make_node("QuantizeLinear", ["sum", "scale", "zero"], ["q"], "fc.input.quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["x"], "fc.input.dequantize"),
        helper.make_node("DequantizeLinear", ["codes", "codes.scale", "codes.zero"], ["w"], "fc.weight", axis=1),
        contraction,
    ]
    for node in nodes[2:5]:
        node.metadata_props.add(key="s2d.site", value="fc.weight" if node.name == "fc.weight" else "fc.input")
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", 3]),
            helper.make_tensor_value_info("shift", TensorProto.FLOAT, ["batch", 3, 8]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 3, 5])],
        [onnx.numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "m.onnx")
    return TARGET.build(folder / "m.onnx", folder, precision="w4a8", options={"batch": [1, 4]}, progress=lambda _: None)


def feeds(count: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(count)
    return {
        "tokens": rng.integers(0, 7, (count, 3)),
        "shift": rng.standard_normal((count, 3, 8)).astype(np.float32),
    }


def expected(artifact: Artifact, count: int) -> np.ndarray:
    with RUNTIME.open(artifact, threads=1) as session:
        return session.run(feeds(count))["y"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_python_lines_run_without_the_compiler(tmp_path: Path) -> None:
    """Exactly the lines that `--help` prints; they feed one input."""
    shown = subprocess.run(
        [sys.executable, "-m", "s2d_deploy.export.to_tvm", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert textwrap.indent(PYTHON, "  ") in shown
    assert PYTHON in blocks("python")
    graph = helper.make_graph(
        [helper.make_node("Softmax", ["x"], ["y"], "softmax", axis=-1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 6])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    folder = tmp_path / "OUT_FOLDER"
    built = TARGET.build(tmp_path / "m.onnx", folder, precision="fp32", options={}, progress=lambda _: None)
    if "library" not in built.files:
        pytest.skip("no C compiler on PATH: without one there is no model.so")
    x = np.random.default_rng(1).standard_normal((1, 6)).astype(np.float32)
    np.save(tmp_path / "batch.npy", x)
    check = "\nimport tvm.base\nassert list(tvm.base._LOADED_LIBS) == ['tvm_runtime']\nnumpy.save('y.npy', outputs[0])"
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    subprocess.run([sys.executable, "-c", PYTHON + check], cwd=tmp_path, env=environment, check=True)
    with RUNTIME.open(built, threads=1) as session:
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), session.run({"x": x})["y"])


def test_the_documents_cpp_lines_are_the_programs() -> None:
    (core,) = blocks("cpp")
    assert core in PROGRAM.read_text(encoding="utf-8")


def test_the_adapter_runs_without_the_compiler(artifact: Artifact, tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", **feeds(4))
    (tmp_path / "run.py").write_text(
        "import json, sys, numpy, tvm.base\n"
        "from pathlib import Path\n"
        "from s2d_deploy.registry import load_runtime\n"
        "from s2d_deploy.session import Artifact\n"
        "artifact = Artifact(Path(sys.argv[1]), 'tvm', 'w4a8', json.loads(sys.argv[2]))\n"
        "session = load_runtime('tvm').open(artifact, threads=1)\n"
        "numpy.save('y.npy', session.run(dict(numpy.load('feeds.npz')))['y'])\n"
        "assert list(tvm.base._LOADED_LIBS) == ['tvm_runtime']\n"
    )
    if "library" not in artifact.files:
        pytest.skip("no C compiler on PATH: without one there is no model.so")
    environment = {**os.environ, "TVM_USE_RUNTIME_LIB": "1"}
    command = [sys.executable, "run.py", str(artifact.folder), json.dumps(artifact.files)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), expected(artifact, 4))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, made by the very lines of the document."""
    spec = importlib.util.find_spec("tvm_ffi")
    headers = Path(str(spec.origin)).parent / "include" / "tvm" / "ffi" if spec else None
    if shutil.which("g++") is None:
        pytest.skip("no g++ on PATH")
    if headers is None or not headers.is_dir():
        pytest.skip("the installed tvm_ffi has no headers")
    folder = tmp_path_factory.mktemp("cc")
    (commands,) = (block for block in blocks("bash") if "tvm_run.cc" in block and "g++" in block)
    compiling = commands.replace("examples/tvm_run.cc", str(PROGRAM)).split("# run")[0]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(shutil.which("bash")), "-e", "-c", compiling],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder / "tvm_run"


def ran(program: Path, artifact: Artifact, count: int, folder: Path) -> subprocess.CompletedProcess[str]:
    files = []
    for name, array in feeds(count).items():
        array.tofile(folder / f"{name}.bin")
        files.append(str(folder / f"{name}.bin"))
    return subprocess.run([program, artifact.folder, *files], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("count", [1, 4])
def test_cpp_prints_what_the_session_computes(program: Path, artifact: Artifact, tmp_path: Path, count: int) -> None:
    done = ran(program, artifact, count, tmp_path)
    assert done.returncode == 0, done.stderr
    about, values = done.stdout.splitlines()
    assert about == f"y float32 {count} 3 5"
    printed = np.array(values.split(), np.float32).reshape(count, 3, 5)
    np.testing.assert_array_equal(printed, expected(artifact, count))


def test_cpp_refuses_in_words(program: Path, artifact: Artifact, tmp_path: Path) -> None:
    copy = Artifact(tmp_path / "copy", "tvm", "w4a8", artifact.files)
    shutil.copytree(artifact.folder, copy.folder)

    def refusal(count: int = 1) -> tuple[int, str]:
        done = ran(program, copy, count, tmp_path)
        assert done.stdout == ""
        assert done.stderr.count("\n") == 1
        return done.returncode, done.stderr

    code, text = refusal(2)
    assert (code, "2 samples, but the artifact was built for 1, 4" in text) == (2, True)
    library, description = copy.path("library"), copy.path("description")
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    code, text = refusal()
    assert (code, "model.so: truncated or changed" in text) == (2, True)
    # Another architecture: e_machine, two bytes at 18 of the ELF header, names another processor.
    library.write_bytes(whole[:18] + (8).to_bytes(2, "little") + whole[20:])
    code, text = refusal()
    assert (code, "model.so" in text) == (2, True)
    library.write_bytes(whole)
    if platform.system() == "Linux":
        about = json.loads(description.read_text())
        description.write_text(json.dumps({**about, "features": [*about["features"], "amx_of_the_future"]}))
        code, text = refusal()
        assert (code, "this processor lacks: amx_of_the_future" in text) == (3, True)
        description.write_text(json.dumps({**about, "compute_capability": "8.6"}))
        code, text = refusal()
        assert (code, "built for CUDA, compute capability 8.6" in text) == (3, True)
    description.write_text("[]")
    assert refusal() == (2, f"error: {description}: no JSON object\n")
