"""Runtime `tensorrt`: without a GPU its words, refusals and reading of layer lists; on a GPU, parity."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from s2d_deploy import load_runtime, load_target
from s2d_deploy.errors import ArtifactError, DataError, DeviceUnavailable, RuntimeUnavailable, UnsupportedError
from s2d_deploy.session import Artifact

trt = import_module("s2d_deploy.runtimes.trt")
driver = import_module("s2d_deploy.runtimes._cuda_driver")
layers = import_module("s2d_deploy.runtimes._trt_layers")
session = import_module("s2d_deploy.runtimes._trt_session")
package = import_module("s2d_deploy.runtimes._trt_package")
RUNTIME = load_runtime("tensorrt")
GPU = driver.Device("NVIDIA RTX A", "8.6", "13.0")
DESCRIPTION = {
    "format": 1,
    "package": "tensorrt_rtx",
    "version": "1.7.1.116",
    "compute_capabilities": ["8.6", "8.9"],
    "inputs": [{"name": "x", "dtype": "FLOAT", "shape": [-1, 4]}],
    "outputs": [{"name": "y", "dtype": "FLOAT", "shape": [-1, 4]}],
    "shapes": {"x": [[1, 4], [2, 4], [8, 4]]},
    "ops": [],
    "audit": {},
}


def artifact(folder: Path, document: dict | str = DESCRIPTION, engine: bytes = b"engine") -> Artifact:
    text = document if isinstance(document, str) else json.dumps(document)
    (folder / "engine.json").write_text(text)
    (folder / "model.engine").write_bytes(engine)
    return Artifact(folder, "tensorrt", "w8a8", {"engine": "model.engine", "description": "engine.json"})


@pytest.fixture
def without_driver(monkeypatch):
    monkeypatch.setattr(driver, "_LIBRARY", "libno_such_cuda.so.1")


# ---- without a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not package.installed(), reason="TensorRT is not installed")
def test_without_a_driver_it_says_so(without_driver):
    reason = RUNTIME.available()
    assert "no NVIDIA driver on this machine" in reason
    assert "run on a machine with an NVIDIA GPU" in reason
    assert RUNTIME.device() == "no NVIDIA GPU"
    assert RUNTIME.version().split()[0] in ("tensorrt", "tensorrt_rtx")


def test_without_the_package_it_gives_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setattr(package, "NAMES", ("no_such_tensorrt",))
    monkeypatch.setattr(trt, "_DISTRIBUTIONS", {"tensorrt": ("no-such-tensorrt",)})
    assert "pip install 's2d-deploy[tensorrt]'" in RUNTIME.available()
    assert RUNTIME.version() == ""
    with pytest.raises(RuntimeUnavailable, match=r"pip install 's2d-deploy\[tensorrt\]'"):
        RUNTIME.open(artifact(tmp_path), threads=1)


@pytest.mark.skipif(not package.installed(), reason="TensorRT is not installed")
def test_open_without_a_driver_is_a_missing_device(without_driver, tmp_path):
    with pytest.raises(DeviceUnavailable, match="no NVIDIA driver on this machine"):
        RUNTIME.open(artifact(tmp_path), threads=1)


def test_a_driver_without_a_gpu_is_told_apart(monkeypatch):
    class Library:
        def cuInit(self, flags):
            return 100

        def cuGetErrorString(self, status, text):
            text._obj.value = b"no CUDA-capable device is detected"
            return 0

    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Library())
    with pytest.raises(DeviceUnavailable, match=r"finds no usable GPU\. Found: CUDA error 100: no CUDA-capable device"):
        driver.Driver()


def test_asking_whether_it_is_available_loads_nothing_heavy():
    code = (
        "import sys; from s2d_deploy import load_runtime; r = load_runtime('tensorrt');"
        "r.available(); r.version(); r.device();"
        "heavy = {'tensorrt', 'tensorrt_rtx', 'torch', 'onnx'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("precision", "rung"),
    [("fp32", "float"), ("w8a8", "native"), ("w4a16", "weight-only"), ("w4a8", "emulated"), ("w4a4", "emulated")],
)
def test_rungs(precision, rung):
    assert RUNTIME.rung(precision) == rung


@pytest.mark.skipif(not package.installed(), reason="TensorRT is not installed")
def test_the_installed_package_has_what_is_called_on_a_gpu():
    """The calls themselves need a GPU; that their names exist does not."""
    module = package.load()
    names = {
        "Runtime": ["deserialize_cuda_engine"],
        "ICudaEngine": ["create_execution_context", "create_engine_inspector", "device_memory_size_v2"],
        "IExecutionContext": ["set_input_shape", "get_tensor_shape", "set_tensor_address", "execute_async_v3"],
        "EngineInspector": ["get_engine_information"],
        "LayerInformationFormat": ["JSON", "ONELINE"],
    }
    if module.__name__ == "tensorrt_rtx":
        names |= {
            "Runtime": ["deserialize_cuda_engine", "get_engine_validity"],
            "ICudaEngine": [*names["ICudaEngine"], "create_runtime_config"],
            "IRuntimeConfig": [
                "create_runtime_cache",
                "set_runtime_cache",
                "cuda_graph_strategy",
                "dynamic_shapes_kernel_specialization_strategy",
            ],
            "IRuntimeCache": ["serialize", "deserialize"],
            "CudaGraphStrategy": ["WHOLE_GRAPH_CAPTURE"],
            "DynamicShapesKernelSpecializationStrategy": ["EAGER"],
            "EngineValidity": ["INVALID"],
        }
    missing = [f"{c}.{n}" for c, listed in names.items() for n in listed if not hasattr(getattr(module, c), n)]
    assert not missing
    if module.__name__ == "tensorrt_rtx":
        assert set(session._REMEDIES) == set(module.EngineInvalidityDiagnostics.__members__)


# ---- what does not fit -----------------------------------------------------------------------------------------


def test_an_engine_that_fits():
    assert trt.why_not(DESCRIPTION, "tensorrt_rtx", "1.7.1.116", GPU) is None


def test_an_engine_of_another_version_names_both():
    text = trt.why_not(DESCRIPTION, "tensorrt_rtx", "1.8.0", GPU)
    assert "Expected: tensorrt_rtx 1.7.1.116. Found: tensorrt_rtx 1.8.0" in text
    assert "build it again for 8.6 here" in text


def test_an_engine_for_another_gpu_says_what_would_fit():
    text = trt.why_not(DESCRIPTION, "tensorrt_rtx", "1.7.1.116", replace(GPU, capability="12.0"))
    assert "Expected: compute capability 8.6 or 8.9. Found: 12.0" in text
    assert 'add "12.0" to targets[tensorrt].options.compute_capabilities' in text


def test_foreign_and_truncated_artifacts_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match="not a TensorRT artifact"):
        RUNTIME.open(replace(artifact(tmp_path), target="ort"), threads=1)
    with pytest.raises(ArtifactError, match=r"engine\.json"):
        RUNTIME.open(artifact(tmp_path, '{"format": 1, "pack'), threads=1)
    with pytest.raises(
        ArtifactError, match=r"not the description of a TensorRT engine\. Expected: format 1\. Found: format 7"
    ):
        RUNTIME.open(artifact(tmp_path, {**DESCRIPTION, "format": 7}), threads=1)
    whole = artifact(tmp_path)
    (tmp_path / "engine.json").unlink()
    with pytest.raises(ArtifactError, match=r"engine\.json: missing"):
        RUNTIME.open(whole, threads=1)


def test_a_truncated_engine_file_is_named(tmp_path):
    whole = artifact(tmp_path, engine=b"\xfd7zXZ\x00cut")
    (tmp_path / "model.engine").rename(tmp_path / "model.engine.xz")
    cut = replace(whole, files={**whole.files, "engine": "model.engine.xz"})
    with pytest.raises(ArtifactError, match=r"model\.engine\.xz: not a whole engine file"):
        trt._engine_bytes(cut)


@pytest.mark.parametrize("shape", [(9, 4), (0, 4), (2, 5), (2, 4, 1)])
def test_a_shape_outside_the_profile_is_refused(shape):
    with pytest.raises(DataError, match=r"input 'x': wrong shape\. Expected: \[1, 4\] to \[8, 4\]"):
        session.check_shape("x", shape, DESCRIPTION)
    session.check_shape("x", (8, 4), DESCRIPTION)


# ---- the layer list --------------------------------------------------------------------------------------------


def line(name: str, kind: str, inputs: str, constants: str, nodes: list[str], tactic: str = "") -> str:
    def tensors(text: str) -> str:
        parts = [t.split(":") for t in text.split()]
        return ", ".join(
            f"{{ Name: t, Dimensions: [{d}], Strides: [1], Datatype: {t}, Format: (Linear) Row major }}"
            for d, t in parts
        )

    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors(inputs)}], Constants: [ {tensors(constants)}], "
        f"Outputs: [], TacticName: {tactic}, StreamId: 0, Metadata: " + "".join(f"[ONNX Layer: {n}]" for n in nodes)
    )


def op(name: str, declared: str) -> dict:
    return {"name": name, "macs": 10, "declared": declared, "weight": f"{name}.weight.dequantize"}


def audit(*lines: str, ops: list[dict]):
    return layers.audit_layers(layers.parse_layers("\n".join(["Layers:", *lines, "no layer"])), ops, "test")


def test_operand_types_decide_the_precision():
    result = audit(
        line("fc1", "gemm", "-1,64:Int8", "64,64:Int8 1:Float", ["fc1", "fc1.weight.dequantize"]),
        line("fc2", "gemm", "-1,64:Float", "64,64:Float", ["fc2"]),
        line("pad", "kgen", "-1,64:Int8", "", ["fc1", "fc2"]),
        ops=[op("fc1", "W8A8"), op("fc2", "W8A8")],
    )
    assert [(o.name, o.precision, o.kernel) for o in result.ops] == [
        ("fc1", "int8", "gemm"),
        ("fc2", "float32", "gemm"),
    ]
    assert [o.name for o in result.mismatches()] == ["fc2"]  # a silent fallback is seen
    assert result.rung == "dequantized"
    assert result.executed == {"int8": 0.5, "float32": 0.5}


def test_codes_beside_floats_are_no_integer_product():
    result = audit(line("fc", "gemm", "-1,64:Int8", "64,64:Half", ["fc"]), ops=[op("fc", "W8A8")])
    assert result.ops[0].precision == "float16"


def test_packed_weights_are_emulated_with_integers_and_weight_only_with_floats():
    unpack = line("cast", "kgen", "", "64,64:Int4", ["fc.weight.dequantize"])
    product = line("fc", "gemm", "-1,64:Int8 64,64:Int8", "1:Float", ["fc"])
    assert audit(unpack, product, ops=[op("fc", "W4A4")]).rung == "emulated"
    fused = line("fc", "runtime_fusion", "-1,64:Float", "64,64:Int4 2,64:Float", ["fc", "fc.weight.dequantize"])
    result = audit(fused, ops=[op("fc", "W4A16")])
    assert (result.rung, result.ops[0].precision) == ("weight-only", "float32")
    assert layers.low_bit_bytes(layers.parse_layers(fused)) == 64 * 64 // 2


def test_an_op_that_the_list_does_not_show_is_not_claimed():
    result = audit(line("fc1", "gemm", "-1,64:Int8", "64,64:Int8", ["fc1"]), ops=[op("fc1", "W8A8"), op("fc2", "W8A8")])
    assert result.ops[1].precision == "unseen"
    assert [o.name for o in result.mismatches()] == ["fc2"]
    assert "fc2: no layer of the engine's list computes it" in result.notes


def test_a_fused_attention_kernel_is_noted():
    mha = line(
        "_gemm_mha_v2", "kgen", "-1,17,16:Int8 -1,16,17:Int8 -1,17,16:Int8", "", ["a.scores", "a.context"], "mha_0x1"
    )
    result = audit(mha, ops=[op("a.scores", "W8A8"), op("a.context", "W8A8")])
    assert {o.precision for o in result.ops} == {"int8"}
    assert any("its inner product is not" in note for note in result.notes)


def test_a_mask_is_no_operand():
    mha = line("_gemm_mha_v2", "kgen", "-1,17,16:Half -1,16,17:Half -1,17,17:Bool -1,17,16:Half", "", ["a.scores"])
    assert audit(mha, ops=[op("a.scores", "float")]).ops[0].precision == "float16"


def test_fp4_needs_both_operands():
    both = line("fc", "gemm", "-1,64:FP4E2M1 -1,4,32,1,4:FP8", "64,64:FP4E2M1 1,4,1,4,32:FP8 1:Float", ["fc"])
    result = audit(both, ops=[op("fc", "NVFP4")])
    assert (result.ops[0].precision, result.rung, result.mismatches()) == ("nvfp4", "native", [])
    assert layers.low_bit_bytes(layers.parse_layers(both)) == 64 * 64 // 2 + 4 * 4 * 32
    one = line("fc", "gemm", "-1,64:Half", "64,64:FP4E2M1 4,64:FP8", ["fc"])
    result = audit(one, ops=[op("fc", "NVFP4")])
    assert (result.ops[0].precision, result.rung) == ("float16", "dequantized")
    assert [o.name for o in result.mismatches()] == ["fc"]


def test_the_listing_names_what_was_fused():
    fused = line("fc+add", "gemm", "-1,64:Int8", "64,64:Int8", ["fc", "fc.add"], "imma")
    waiting = line("w", "wait", "", "", [])
    (entry,) = layers.listing(layers.parse_layers("\n".join([fused, waiting])))
    assert entry == {
        "name": "fc+add",
        "kind": "gemm",
        "kernel": "imma",
        "reads": ["Int8"],
        "writes": [],
        "nodes": ["fc", "fc.add"],
    }


# ---- on a GPU --------------------------------------------------------------------------------------------------


def model(folder: Path) -> Path:
    """x [batch, 64] -> INT8 codes -> MatMul with INT4 weights: one op, W4A8."""
    rng = np.random.default_rng(0)
    import ml_dtypes

    stored = {
        "fc.input.scale": np.float32(0.05),
        "fc.input.zero": np.int8(0),
        "fc.weight.codes": rng.integers(-7, 8, (64, 32)).astype(ml_dtypes.int4),
        "fc.weight.scale": rng.uniform(0.1, 0.2, 32).astype(np.float32),
        "fc.weight.zero": np.zeros(32, ml_dtypes.int4),
    }
    nodes = [
        helper.make_node(
            "QuantizeLinear", ["x", "fc.input.scale", "fc.input.zero"], ["codes"], name="fc.input.quantize"
        ),
        helper.make_node(
            "DequantizeLinear", ["codes", "fc.input.scale", "fc.input.zero"], ["values"], name="fc.input.dequantize"
        ),
        helper.make_node(
            "DequantizeLinear",
            ["fc.weight.codes", "fc.weight.scale", "fc.weight.zero"],
            ["weight"],
            name="fc.weight.dequantize",
            axis=1,
        ),
        helper.make_node("MatMul", ["values", "weight"], ["y"], name="fc"),
    ]
    for key, value in (("s2d.op", "fc"), ("s2d.declared", "W4A8"), ("s2d.macs", "2048")):
        nodes[-1].metadata_props.add(key=key, value=value)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in stored.items()],
    )
    result = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    result.metadata_props.add(key="s2d.precision", value="w4a8")
    onnx.save_model(result, folder / "common.onnx")
    return folder / "common.onnx"


def test_on_a_gpu_it_computes_what_the_file_says(tmp_path):
    reason = RUNTIME.available()
    if reason is not None:
        pytest.skip(reason)
    target = load_target("tensorrt")
    source = model(tmp_path)
    path = target.dialect(source, tmp_path / "out", precision="w4a8")
    capability = driver.Driver().device().capability
    built = target.build(
        path,
        tmp_path / "out",
        precision="w4a8",
        options={"compute_capabilities": [capability]},
        progress=lambda _: None,
    )
    x = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    (wanted,) = ReferenceEvaluator(str(source)).run(None, {"x": x})
    with RUNTIME.open(built, threads=1) as opened:
        np.testing.assert_allclose(opened.run({"x": x})["y"], wanted, rtol=1e-5, atol=1e-5)
        assert opened.audit().executed == {"int8": 1.0}
        assert opened.codes({"x": x}) == {}
        assert min(opened.on_device_ns({"x": x})() for _ in range(3)) > 0
        with pytest.raises(UnsupportedError, match="fc: TensorRT shows no int32 accumulators"):
            opened.accumulate("fc", np.zeros((1, 64), np.int8))
        with pytest.raises(DataError, match="wrong dtype"):
            opened.run({"x": x.astype(np.float64)})
