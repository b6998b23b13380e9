"""Execution providers: by name, with options, as plugins; what is missing is refused by name, and never replaced."""

from __future__ import annotations

import ctypes.util
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from common_graphs import linear, quantized

from s2d_deploy.cli import main
from s2d_deploy.doctor import examine_runtime
from s2d_deploy.errors import EXIT_UNAVAILABLE, DeviceUnavailable, exit_code_of
from s2d_deploy.placement import device_of
from s2d_deploy.registry import load_runtime, load_target

ort = pytest.importorskip("onnxruntime")
RUNTIME, TARGET = load_runtime("ort"), load_target("ort")
PROVIDERS = import_module("s2d_deploy.runtimes._ort_providers")
# In every wheel for a CPU, and no operator of ours is its own: what it cannot run would go to the CPU.
OTHER = "AzureExecutionProvider"
needs_another = pytest.mark.skipif(OTHER not in ort.get_available_providers(), reason=f"{OTHER} is not in this build")


@pytest.fixture
def artifact(tmp_path):
    onnx.save(linear("w8a8", "INT8", "INT8")[0], tmp_path / "common.onnx")
    dialect = TARGET.dialect(tmp_path / "common.onnx", tmp_path / "made", precision="w8a8")
    return TARGET.build(dialect, tmp_path / "made", precision="w8a8", options={}, progress=lambda _: None)


def opened(artifact, *providers):
    return RUNTIME.open(replace(artifact, info={"providers": list(providers)}), threads=1)


def test_names():
    names = ("cpu", "CUDA", "openvino", "Xnnpack", "tensorrt", "azure", "CPUExecutionProvider", "my_ep")
    assert [PROVIDERS.full_name(n) for n in names] == [
        "CPUExecutionProvider",
        "CUDAExecutionProvider",
        "OpenVINOExecutionProvider",
        "XnnpackExecutionProvider",
        "TensorrtExecutionProvider",
        "AzureExecutionProvider",
        "CPUExecutionProvider",
        "my_ep",
    ]
    assert PROVIDERS.normalized(["cuda", ["cuda", {"a": 1}], ("cpu", {"b": True})]) == [
        ("CUDAExecutionProvider", {}),
        ("CPUExecutionProvider", {"b": True}),
    ]
    # Every name that this onnxruntime knows has its short one, and back.
    for name in ort.get_all_providers():
        assert PROVIDERS.full_name(PROVIDERS.short_name(name)) == name


@pytest.mark.parametrize("name", ["cpu", "CPU", "CPUExecutionProvider"])
def test_the_cpu_by_any_name(artifact, name):
    with opened(artifact, name) as session:
        assert session.audit().executed == {"int8": 1.0}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cuda", r"no provider CUDAExecutionProvider here\. .*Fix: pip install onnxruntime-gpu; or choose another"),
        ("openvino", r"no provider OpenVINOExecutionProvider here\. .*pip install onnxruntime-openvino"),
        ("xnnpack", r"no provider XnnpackExecutionProvider here\. .*build onnxruntime with --use_xnnpack"),
        ("fast", r"no provider fast here\. .*Found: fast: no provider of this name is known"),
    ],
)
def test_what_is_not_here_is_refused_by_name(artifact, name, text):
    if PROVIDERS.full_name(name) in ort.get_available_providers():
        pytest.skip(f"{name} is in this build")
    with pytest.raises(DeviceUnavailable, match=text) as caught:
        opened(artifact, name)
    assert exit_code_of(caught.value) == EXIT_UNAVAILABLE
    with pytest.raises(DeviceUnavailable, match=text):
        opened(artifact, name, "cpu")


@needs_another
def test_the_cpu_takes_over_only_where_it_is_named(artifact):
    with pytest.raises(
        DeviceUnavailable, match=r"provider azure does not run all operators .*set providers: \[azure, cpu\] to allow"
    ):
        opened(artifact, "azure")
    with opened(artifact, "azure", "cpu") as session:
        assert session._session.get_providers() == [OTHER, "CPUExecutionProvider"]


@needs_another
def test_the_audit_names_what_the_cpu_did_for_another(artifact):
    document = RUNTIME.audit_file(artifact.path("model"), shapes={}, options={"providers": ["azure", "cpu"]}, threads=1)
    assert document["providers"] == ["azure", "cpu"]
    assert [row["differs"] for row in document["layers"]] == ["fell back to the CPU from azure"]


@pytest.mark.skipif(
    "OpenVINOExecutionProvider" not in ort.get_available_providers(), reason="onnxruntime-openvino is not installed"
)
@pytest.mark.parametrize(("precision", "weight", "activation"), [("w8a8", "INT8", "INT8"), ("w4a4", "INT4", "INT4")])
def test_openvino_computes_the_integers_and_admits_that_it_is_not_seen(tmp_path, precision, weight, activation):
    model, codes, scale, _, bias, step = linear(precision, weight, activation, k=64, n=32)
    onnx.save(model, tmp_path / "common.onnx")
    options = {"providers": ["openvino"]}
    dialect = TARGET.dialect_for(
        tmp_path / "common.onnx", tmp_path / "made", precision=precision, options=options, placement=None
    )
    made = TARGET.build(dialect, tmp_path / "made", precision=precision, options=options, progress=lambda _: None)
    x = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
    wanted = (quantized(x, activation, step) @ codes) * (step * scale).astype(np.float64) + bias
    with RUNTIME.open(made, threads=1) as session:
        np.testing.assert_allclose(session.run({"x": x})["y"], wanted, atol=64 * 2.0**-23 * np.abs(wanted).max())
        audit = session.audit()
    said = "compiled by openvino, which does not say in which arithmetic it computes"
    assert (audit.executed, audit.notes) == ({"unseen": 1.0}, (said,))
    (row,) = RUNTIME.audit_file(made.path("model"), shapes={}, options=options, threads=1)["layers"]
    assert (row["kernel"], row["provider"], row["differs"]) == ("compiled", "openvino", said)


def test_a_session_that_came_up_without_its_provider_is_refused():
    """onnxruntime goes on without a provider whose libraries are missing, and says so in its log only."""

    class Session:
        def get_providers(self):
            return ["CPUExecutionProvider"]

    PROVIDERS.check_loaded(Session(), ["CPUExecutionProvider"])
    with pytest.raises(
        DeviceUnavailable, match=r"provider CUDAExecutionProvider did not load; .* Found: a session on CPUExec"
    ):
        PROVIDERS.check_loaded(Session(), ["CUDAExecutionProvider", "CPUExecutionProvider"])


def test_plugins_that_do_not_load(artifact, tmp_path):
    with pytest.raises(DeviceUnavailable, match=r"plugin .*none\.so does not load\. Found: no such file"):
        opened(artifact, ["my_ep", {"library": str(tmp_path / "none.so")}])
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(DeviceUnavailable, match=r"provider my_ep: plugin .*text\.so does not load\. Found: .*text\.so"):
        opened(artifact, ["my_ep", {"library": str(text)}])
    foreign = ctypes.util.find_library("m")
    paths = [p / foreign for p in (Path("/lib/x86_64-linux-gnu"), Path("/usr/lib/x86_64-linux-gnu"), Path("/lib64"))]
    library = next((p for p in paths if p.is_file()), None)
    if library is not None:
        with pytest.raises(DeviceUnavailable, match="Fix: use a plugin that was built for onnxruntime"):
            opened(artifact, ["my_ep", {"library": str(library)}])


def test_doctor_and_rows_name_them():
    entry = examine_runtime("ort")
    assert entry["problems"] == []
    here, missing = entry["details"]
    assert "cpu" in here
    assert ("cuda" in here) != ("cuda" in missing)
    assert device_of(RUNTIME, {}) == RUNTIME.device()
    assert device_of(RUNTIME, {"providers": ["cuda", "cpu"]}) == f"cuda, then {RUNTIME.device()}"
    assert device_of(load_runtime("reference"), {}) == load_runtime("reference").device()


def test_the_script_and_the_audit_take_them(tmp_path, capsys):
    from s2d_deploy.export.to_ort import main as to_ort  # noqa: TID251

    if "CUDAExecutionProvider" in ort.get_available_providers():
        pytest.skip("CUDA is in this build")
    onnx.save(linear("w8a8", "INT8", "INT8")[0], tmp_path / "c.onnx")
    assert to_ort([str(tmp_path / "c.onnx"), str(tmp_path / "out"), "--provider", "cuda"]) == 3
    assert "no provider CUDAExecutionProvider here" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "c.onnx"), "--provider", "cuda"]) == 3
    assert to_ort([str(tmp_path / "c.onnx"), str(tmp_path / "out"), "--provider", "cpu"]) == 0
    assert '["CPUExecutionProvider"]' in (tmp_path / "out" / "example.py").read_text()
