"""What reconstruction passes leave behind goes to disk, to ONNX and to a runtime as any plan does."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import tiny_quantized as tiny
import torch

from s2d_deploy.plan import Plan
from s2d_deploy.ptq.input_transform import load_changes, save_changes
from s2d_deploy.ptq.presets import preset
from s2d_deploy.recipe import QuantizeSection
from s2d_deploy.registry import load_exporter
from s2d_deploy.simulation import simulate

CASES = {
    "bert gptq": ("bert", "w4a4", ["gptq", "bias_correction", "norm_tweaking"]),
    "vit erq": ("vit", "w4a4", ["erq"]),
    "vit adaround": ("vit", "w4a8", [{"adaround": {"iterations": 20}}]),
    "bert awq": ("bert", "w4a16", [{"awq": {"insert": True, "grid": 4}}, "ranges", "awq_clip", "gptq"]),
}


@pytest.mark.parametrize("case", CASES)
def test_onnx_runtime_computes_the_simulation(case: str, tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    kind, precision, steps = CASES[case]
    found, context, model = tiny.run(kind, precision, steps, block_size=8)
    batch = next(iter(context.batches()))
    simulated = simulate(found.model, found.plan).eval()
    with torch.no_grad():
        wanted = simulated(**batch)[context.output]
    load_exporter()(found.model, found.plan, batch, [context.output], tmp_path / "model.onnx", dynamic={})
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})[0]
    # Float operators between quantizers differ in the last bits and may flip a code; nearly all outputs are the same.
    assert np.quantile(np.abs(got - wanted.numpy()), 0.99) < 1e-4 * float(wanted.abs().max())

    found.plan.save(tmp_path)
    save_changes(model, found.model, tmp_path)
    again = copy.deepcopy(model)
    load_changes(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(simulate(again, Plan.load(tmp_path)).eval()(**batch)[context.output], wanted)


@pytest.mark.parametrize(
    ("name", "precision", "passes"),
    [
        ("int4_gptq", "w4a16", [{"gptq": {"sequential": False}}]),
        ("int4_awq", "w4a16", ["awq", "ranges", "awq_clip"]),
        ("w4a4_erq", "w4a4", ["erq"]),
    ],
)
def test_presets(name: str, precision: str, passes: list):
    section = QuantizeSection(preset=name)
    assert section.precisions == (precision,)
    assert list(section.passes) == passes == preset(name)["passes"]
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in passes]
    found, _, _ = tiny.run("vit", precision, list(section.passes), block_size=8)
    assert [p["name"] for p in found.plan.info["passes"] if p["name"] != "ranges"] == [
        n for n in names if n != "ranges"
    ]
