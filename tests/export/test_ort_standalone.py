"""From a quantized checkpoint to files that need nothing of this project; large, half-precision, many-headed models."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from s2d_deploy import large_models
from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ArtifactError, DataError, ModelError
from s2d_deploy.files import sha256_file
from s2d_deploy.models import load_model
from s2d_deploy.plan import Plan
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.quantized_checkpoint import load_quantized
from s2d_deploy.recipe import ModelSection
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.simulation import simulate

pytest.importorskip("onnxruntime")
TARGET, RUNTIME = load_target("ort"), load_runtime("ort")


def scripts():
    from s2d_deploy.export import to_onnx, to_ort  # noqa: TID251

    return to_onnx.main, to_ort.main


@pytest.fixture
def without_the_project(tmp_path):
    """Runs a script in a process in which importing s2d_deploy fails, and says what it printed."""
    blocked = tmp_path / "blocked"
    (blocked / "s2d_deploy").mkdir(parents=True)
    (blocked / "s2d_deploy" / "__init__.py").write_text("raise ImportError('the example imports the project')\n")

    def run(script):
        # From elsewhere: a script's own folder, or the current one for -c, comes first in the path.
        options = {
            "env": os.environ | {"PYTHONPATH": str(blocked)},
            "cwd": tmp_path,
            "capture_output": True,
            "text": True,
        }
        done = subprocess.run([sys.executable, "-c", "import s2d_deploy"], check=False, **options)
        assert "ImportError: the example imports the project" in done.stderr  # the block works
        done = subprocess.run([sys.executable, str(script)], check=False, **options)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_a_checkpoint_becomes_files_that_stand_alone(finished, tmp_path, without_the_project, capsys):
    to_onnx, to_ort = scripts()
    checkpoint, out = finished.folder / "quantize" / "w8a8", tmp_path / "out"
    assert to_ort([str(checkpoint), str(out)]) == 0
    assert "executes 100.0% int8" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == ["example.py", "manifest.json", "model.onnx"]
    assert without_the_project(out / "example.py") == "logits (1, 10) float32\n"
    assert len((out / "example.py").read_text().splitlines()) <= 12
    manifest = json.loads((out / "manifest.json").read_text())
    (entry,) = manifest["files"]
    assert (entry["name"], entry["sha256"]) == ("model.onnx", sha256_file(out / "model.onnx"))
    assert manifest["inputs"] == {"pixel_values": {"dtype": "float", "shape": ["batch", 1, 8, 8]}}
    assert manifest["info"]["rung"] == "native"
    assert manifest["source"] == {"checkpoint": "w8a8", "plan_sha256": Plan.load(checkpoint).digest()}

    assert to_onnx([str(checkpoint), str(tmp_path / "common.onnx")]) == 0
    assert without_the_project(tmp_path / "common.example.py") == "logits (1, 10) float32\n"
    # The run's own common file, made by the pipeline from the same checkpoint.
    assert (tmp_path / "common.onnx").read_bytes() == (finished.folder / "onnx/w8a8/model.onnx").read_bytes()


def test_a_checkpoint_outside_its_run_wants_its_model(finished, tmp_path, capsys):
    _, to_ort = scripts()
    copy = shutil.copytree(finished.folder / "quantize" / "w4a16", tmp_path / "alone" / "w4a16")
    with pytest.raises(DataError, match=r"lies in no run folder.* Fix: name it: --model FOLDER_OR_HUB_ID"):
        load_quantized(copy)
    model = finished.folder / "condition"
    assert to_ort([str(copy), str(tmp_path / "out"), "--model", str(model)]) == 0
    assert "w4a16" in capsys.readouterr().out
    with pytest.raises(ModelError, match="no model"):
        load_quantized(copy, str(tmp_path))


def test_what_is_no_checkpoint_is_refused(finished, tmp_path, capsys):
    _, to_ort = scripts()
    with pytest.raises(ArtifactError, match=r"no quantized checkpoint\. Expected: a folder with plan\.json"):
        load_quantized(finished.folder)
    copy = shutil.copytree(finished.folder / "quantize" / "w8a8", tmp_path / "w8a8")
    path = copy / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    assert to_ort([str(copy), str(tmp_path / "out")]) == 2
    assert "plan.safetensors: truncated" in capsys.readouterr().err


class TwoHeads(nn.Module):
    """Two inputs of open length, two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places, self.out = nn.Linear(8, 160), nn.Linear(4, 160), nn.Linear(160, 6)

    def forward(self, words, places):
        hidden = torch.relu(self.words(words) + self.places(places))
        return {"tags": self.out(hidden), "pooled": hidden.mean(1)}


def deployed(model, sample, outputs, precision, folder, **more):
    """Exported and built; the common file's path, the artifact and the simulation."""
    ops = discover(model, {n: t[:1] for n, t in sample.items()})
    plan = build_plan(model, ops, calibrate(model, ops, [sample]), precision, QuantizeConfig())
    common = folder / "common" / "model.onnx"
    load_exporter()(model, plan, sample, outputs, common, **more)
    dialect = TARGET.dialect(common, folder / "made", precision=precision)
    artifact = TARGET.build(dialect, folder / "made", precision=precision, options={}, progress=lambda _: None)
    return common, artifact, simulate(model, plan).eval()


def test_several_inputs_and_outputs_of_open_sizes(tmp_path, without_the_project):
    sample = {"words": torch.randn(2, 5, 8), "places": torch.randn(2, 5, 4)}
    dynamic = {name: {1: "sequence"} for name in sample}
    _, artifact, simulated = deployed(TwoHeads().eval(), sample, ["tags", "pooled"], "w8a8", tmp_path, dynamic=dynamic)
    with RUNTIME.open(artifact, threads=1) as session:
        assert session.audit().executed == {"int8": 1.0}
        for batch, length in ((1, 1), (3, 7)):
            feeds = {"words": torch.randn(batch, length, 8), "places": torch.randn(batch, length, 4)}
            found = session.run({n: t.numpy() for n, t in feeds.items()})
            with torch.no_grad():
                wanted = simulated(**feeds)
            for name in ("tags", "pooled"):
                # One code of the last quantizer may flip at a boundary; its step bounds what that costs.
                np.testing.assert_allclose(found[name], wanted[name].numpy(), atol=0.05)
    write_example = import_module("s2d_deploy.export._standalone").write_example
    model = onnx.load(artifact.path("model"))
    script = write_example(artifact.folder / "example.py", model, file="model.onnx", providers=["CPUExecutionProvider"])
    assert without_the_project(script) == "tags (1, 16, 6) float32\npooled (1, 160) float32\n"


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_computed_in_float32(tmp_path, kind):
    """Rounded weights are the model: they are read as they are, and what is deployed computes in float32."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, num_labels=4,
    )  # fmt: skip
    ViTForImageClassification(config).to(kind).save_pretrained(tmp_path / "half")
    loaded = load_model(ModelSection.model_validate({"pretrained": str(tmp_path / "half")}))
    assert {p.dtype for p in loaded.module.parameters()} == {torch.float32}
    weight = loaded.module.classifier.weight
    assert torch.equal(weight, weight.to(kind).float())
    sample = {"pixel_values": torch.randn(2, 1, 8, 8)}
    for precision in ("w8a8", "w4a16"):
        common, artifact, simulated = deployed(loaded.module, sample, ["logits"], precision, tmp_path / precision)
        types = {t.data_type for t in onnx.load(common).graph.initializer}
        assert not types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
        with RUNTIME.open(artifact, threads=1) as session, torch.no_grad():
            found = session.run({n: t.numpy() for n, t in sample.items()})["logits"]
            np.testing.assert_allclose(found, simulated(**sample).logits.numpy(), atol=0.02)


def test_a_large_model_goes_through_whole(tmp_path, monkeypatch):
    """With the limits lowered to 100 bytes: every step goes the way of a model beyond 2 GB, and means the same."""
    sample = {"words": torch.randn(2, 5, 8), "places": torch.randn(2, 5, 4)}
    small, plain, _ = deployed(TwoHeads().eval(), sample, ["tags", "pooled"], "w8a8", tmp_path / "small")
    for module in (large_models, import_module("s2d_deploy.runtimes._ort_loading")):
        name = "LARGE" if module is large_models else "_IN_MEMORY_BELOW"
        monkeypatch.setattr(module, name, 100)
    monkeypatch.setattr(large_models, "_SET_ASIDE", 64)
    monkeypatch.setattr(import_module("s2d_deploy.export.to_ort"), "_EXTERNAL_BEYOND", 100)
    common, artifact, _ = deployed(TwoHeads().eval(), sample, ["tags", "pooled"], "w8a8", tmp_path / "large")
    assert common.with_name("model.onnx.data").is_file()
    assert artifact.files == {"model": "model.onnx", "data": "model.onnx.data"}
    assert onnx.load(common) == onnx.load(small) or _same(onnx.load(common), onnx.load(small))
    feeds = {n: t.numpy() for n, t in sample.items()}
    with RUNTIME.open(plain, threads=1) as one, RUNTIME.open(artifact, threads=1) as other:
        for name, value in one.run(feeds).items():
            np.testing.assert_array_equal(other.run(feeds)[name], value)
        assert other.codes(feeds).keys() == one.codes(feeds).keys()
        codes = one.codes(feeds)["out.input"]
        np.testing.assert_array_equal(other.accumulate("out", codes), one.accumulate("out", codes))
        assert replace(other.audit(), evidence="") == replace(one.audit(), evidence="")
    audit = RUNTIME.audit_file(artifact.path("model"), shapes={}, options={}, threads=1)
    assert audit["differ"] == []


def _same(a, b):
    """Equal but for how tensors are stored."""
    for model in (a, b):
        for tensor in model.graph.initializer:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor), tensor.name))
    return a == b


def test_sizes_of_stored_tensors_are_summed_without_serializing():
    tensors = [
        onnx.numpy_helper.from_array(np.zeros((3, 5), np.float32), "a"),
        onnx.helper.make_tensor("b", onnx.TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0]),
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors))
    assert large_models.stored_bytes(model) == 3 * 5 * 4 + 4 * 4
