"""A map in front of a Linear: seen by calibration, kept by simulation, written down and made again."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ArtifactError, ModelError
from s2d_deploy.ptq.input_transform import BlockHadamard, ChannelScale, attach, hadamard, load_changes, save_changes
from s2d_deploy.quantize import build_plan
from s2d_deploy.registry import load_exporter
from s2d_deploy.simulation import recorded_codes, simulate


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


def transformed(model: nn.Module, name: str, size: int) -> nn.Module:
    changed = copy.deepcopy(model)
    layer = changed.get_submodule(name)
    attach(layer, BlockHadamard(size))
    with torch.no_grad():
        block = torch.block_diag(*[hadamard(size)] * (layer.in_features // size))
        layer.weight.copy_(layer.weight @ block)
    return changed


def small():
    torch.manual_seed(0)
    return Small().eval(), {"x": torch.randn(6, 16)}


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_the_matrix_is_orthogonal_and_its_own_inverse(size: int):
    h = hadamard(size).double()
    assert torch.allclose(h @ h, torch.eye(size, dtype=torch.float64), atol=1e-6)  # sqrt(size) rounded to FP32
    assert torch.equal(h, h.T)
    assert torch.allclose(h.abs(), torch.full_like(h, size**-0.5))


def test_a_width_without_such_a_matrix_is_refused():
    with pytest.raises(ModelError, match="no Sylvester Hadamard matrix"):
        hadamard(12)


def test_the_function_stays():
    model, batch = small()
    for size in (2, 16):
        assert torch.allclose(transformed(model, "a", size)(**batch), model(**batch), atol=1e-5)


def test_the_site_lies_behind_the_map():
    model, batch = small()
    changed = transformed(model, "a", 16)
    ops = discover(changed, batch)
    assert list(ops) == ["a", "b"]
    statistics = calibrate(changed, ops, [batch])
    wanted = float((batch["x"] @ hadamard(16)).abs().max())
    assert statistics.histograms["a.input"].absmax == pytest.approx(wanted, rel=1e-6)
    plan = build_plan(changed, ops, statistics, "w8a8")
    simulated = simulate(changed, plan).eval()
    with recorded_codes(simulated) as codes:
        simulated(**batch)
    site = plan.sites["a.input"]
    assert torch.equal(codes["a.input"], torch.round(batch["x"] @ hadamard(16) / site.scale).clamp(-128, 127).int())


def test_export_computes_what_the_simulation_does(tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    model, batch = small()
    changed = transformed(model, "b", 4)
    ops = discover(changed, batch)
    plan = build_plan(changed, ops, calibrate(changed, ops, [batch]), "w4a4")
    load_exporter()(changed, plan, batch, ["output"], tmp_path / "model.onnx", dynamic={})
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": batch["x"].numpy()})[0]
    with torch.no_grad():
        assert np.abs(found - simulate(changed, plan).eval()(**batch).numpy()).max() < 1e-5


def test_a_second_map_comes_behind_the_first(tmp_path: Path):
    model, batch = small()
    changed = transformed(model, "a", 8)
    factor = torch.rand(16) + 0.5
    for times in (1, 2):
        scale = ChannelScale(16)
        scale.factor.copy_(factor)
        attach(changed.a, scale)
        with torch.no_grad():
            changed.a.weight.div_(factor)
        assert torch.allclose(changed(**batch), model(**batch), atol=1e-5)
        assert len(changed.a.input_transform.parts) == 1 + times  # one list, not chains of chains
    wanted = (batch["x"] @ torch.block_diag(hadamard(8), hadamard(8))) * factor * factor
    assert torch.allclose(changed.a.input_transform(batch["x"]), wanted, atol=1e-5)
    save_changes(model, changed, tmp_path)
    again = copy.deepcopy(model)
    load_changes(again, tmp_path)
    assert torch.equal(again(**batch), changed(**batch))


def test_changes_are_written_down_and_made_again(tmp_path: Path):
    model, batch = small()
    changed = transformed(model, "a", 8)
    with torch.no_grad():
        changed.b.bias.add_(1.0)
    save_changes(model, changed, tmp_path)
    again = copy.deepcopy(model)
    load_changes(again, tmp_path)
    assert torch.equal(again(**batch), changed(**batch))


def test_an_unchanged_model_writes_nothing(tmp_path: Path):
    model, batch = small()
    save_changes(model, copy.deepcopy(model), tmp_path)
    assert list(tmp_path.iterdir()) == []
    again = copy.deepcopy(model)
    load_changes(again, tmp_path)
    assert torch.equal(again(**batch), model(**batch))


@pytest.mark.parametrize("text", ["", "{}", '{"transforms": {"c": {"kind": "block-hadamard", "arguments": {}}}}'])
def test_foreign_changes_are_refused(tmp_path: Path, text: str):
    model, _ = small()
    save_changes(model, transformed(model, "a", 8), tmp_path)
    (tmp_path / "changed.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"changed.json: (not changes of this model|truncated, or not JSON)"):
        load_changes(copy.deepcopy(model), tmp_path)


def test_changes_of_another_model_are_refused(tmp_path: Path):
    model, _ = small()
    save_changes(model, transformed(model, "a", 8), tmp_path)
    other = nn.Module()
    other.a = nn.Linear(4, 4)
    with pytest.raises(ArtifactError, match=r"not changes of this model\. Found: .*size 8 in front of 4 channels"):
        load_changes(other, tmp_path)
