"""Weights with one scale for the whole tensor (rank 0 in the file) go through every target."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from s2d_deploy.discovery import discover
from s2d_deploy.grid import PerTensor
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.simulation import simulate
from s2d_deploy.verify import end_to_end_codes, teacher_forced


class Mixed(nn.Module):
    """A tiled convolution, an overlapping one, a grouped one, and Linears on one tensor and on many."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.overlapping = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 3, padding=1)
        self.grouped, self.plain = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.Conv2d(8, 8, 1, bias=False)
        self.a, self.b = nn.Linear(32, 16), nn.Linear(16, 5, bias=False)

    def forward(self, x):
        x = self.plain(self.grouped(self.overlapping(self.patches(x)).relu()).relu())
        return {"y": self.b(self.a(x.flatten(2).transpose(1, 2).reshape(-1, 4, 32)).relu())}


def planned(precision: str, granularity: str):
    model = Mixed().eval()
    batch = {"x": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    ops = discover(model, batch, "y")
    config = QuantizeConfig(activation_granularity=granularity, weight_granularity="channel")
    done = run_passes(model, ops, precision, parse_steps([]), Context(lambda: [batch], "y", config))
    for name, site in done.plan.sites.items():
        if site.role == "weight":
            grid = replace(site.grid, granularity=PerTensor())
            weight = model.get_submodule(site.op).weight.detach()
            scale = weight.abs().max() / grid.qmax
            done.plan.sites[name] = replace(site, grid=grid, scale=scale, zero_point=torch.tensor(0, dtype=torch.int32))
    return done, batch


@pytest.mark.parametrize(
    ("precision", "granularity"), [("w8a8", "tensor"), ("w8a8", "token"), ("w4a4", "tensor"), ("w4a16", "tensor")]
)
@pytest.mark.parametrize("target", ["reference", "ort", "tvm", "tensorrt"])
def test_every_target_takes_them(target: str, precision: str, granularity: str, tmp_path: Path):
    package = {"ort": "onnxruntime", "tvm": "tvm", "tensorrt": "tensorrt_rtx"}.get(target)
    if package is not None:
        pytest.importorskip(package)
    done, batch = planned(precision, granularity)
    proto = load_exporter()(done.model, done.plan, batch, ["y"], tmp_path / "model.onnx", dynamic={})
    weights = [tensor for tensor in proto.graph.initializer if tensor.name.endswith(".weight.scale")]
    assert len(weights) == (2 if precision == "w4a16" else 6)  # weight-only leaves convolutions alone
    assert all(list(tensor.dims) == [] for tensor in weights)  # an axis of length 1 was what no target could read
    (tmp_path / "made").mkdir()
    made = load_target(target)
    dialect = made.dialect(tmp_path / "model.onnx", tmp_path / "made", precision=precision)
    if target == "tensorrt":
        return  # nothing to run it on here
    artifact = made.build(dialect, tmp_path / "made", precision=precision, options={}, progress=lambda _text: None)
    simulated = simulate(done.model, done.plan).eval()
    feeds = {n: t.numpy() for n, t in batch.items()}
    with torch.no_grad():
        wanted = simulated(**batch)["y"].numpy()
    with load_runtime(target).open(artifact, threads=1) as session:
        found = session.run(feeds)
        found = found["y"] if isinstance(found, dict) else found[0]
        assert teacher_forced(session, simulated, done.plan, batch)["accumulators_different"] == 0
        codes = end_to_end_codes(session, simulated, [batch])
    assert codes.get("codes_different", 0) <= 2
    assert np.median(np.abs(found - wanted)) < 1e-5 * np.abs(wanted).max()
