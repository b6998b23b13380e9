"""modelopt as a source of scales for TensorRT: its preset and our plan give the engine the same inputs, bit for bit."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from s2d_deploy import load_target
from s2d_deploy.discovery import discover
from s2d_deploy.plan import Plan
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
package = import_module("s2d_deploy.runtimes._trt_package")
TARGET = load_target("tensorrt")


class Block(nn.Module):
    """A patch embedding and an MLP: what modelopt's patterns and ours both quantize."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 64, 2, stride=2)
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.fc2(nn.functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


def plans(preset: str, precision: str) -> tuple[nn.Module, dict[str, torch.Tensor], Plan, Plan]:
    torch.set_num_threads(1)
    model = Block().eval()
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(4, 3, 8, 8, generator=generator) * 2} for _ in range(3)]
    ops = discover(model, batches[0])
    # What "max calibration" means here: the largest magnitude over the largest code.
    config = QuantizeConfig(weights="absmax", activations="absmax", block_size=64)
    context = Context(lambda: batches, "output", config)
    theirs = run_passes(
        model, ops, precision, parse_steps([{"modelopt": {"preset": preset, "block_size": 64}}]), context
    )
    ours = run_passes(model, ops, precision, parse_steps([]), context)
    return model, batches[0], theirs.plan, ours.plan


def engine_input(folder: Path, model: nn.Module, batch: dict[str, torch.Tensor], plan: Plan) -> onnx.ModelProto:
    """What TensorRT's parser reads."""
    folder.mkdir()
    load_exporter()(model, plan, {"x": batch["x"][:2]}, ["y"], folder / "common.onnx")
    return onnx.load(TARGET.dialect(folder / "common.onnx", folder / "out", precision=plan.precision))


def built(folder: Path) -> bytes:
    artifact = TARGET.build(
        folder / "model.onnx",
        folder,
        precision="w8a8",
        options={"compute_capabilities": ["8.6"], "compress": False},
        progress=lambda _: None,
    )
    assert set(artifact.info["audit"]["executed"]) == {"int8"}
    return artifact.path("engine").read_bytes()


@pytest.mark.parametrize(("preset", "precision"), [("int8", "w8a8"), ("int4_blockwise", "w4a16")])
def test_the_preset_and_our_plan_give_the_same_engine_inputs(tmp_path: Path, preset: str, precision: str) -> None:
    model, batch, theirs, ours = plans(preset, precision)
    assert {s.source for s in theirs.sites.values()} == {f"modelopt-{preset}"}
    assert {s.source for s in ours.sites.values()}.isdisjoint({f"modelopt-{preset}"})
    assert set(theirs.sites) == set(ours.sites)
    files = [engine_input(tmp_path / name, model, batch, plan) for name, plan in (("theirs", theirs), ("ours", ours))]
    nodes = [[(n.op_type, n.name, list(n.input), list(n.output)) for n in f.graph.node] for f in files]
    assert nodes[0] == nodes[1]
    stored = [{t.name: numpy_helper.to_array(t) for t in f.graph.initializer} for f in files]
    assert stored[0].keys() == stored[1].keys()
    for name, array in stored[0].items():
        assert array.dtype == stored[1][name].dtype, name
        np.testing.assert_array_equal(array, stored[1][name], err_msg=name)
    codes = [name for name in stored[0] if name.endswith(".codes") or ".codes_" in name]
    assert len(codes) == (3 if precision == "w8a8" else 2)
    # And they are what the definition says, for one layer, computed here.
    weight = model.fc1.weight.detach().numpy()  # type: ignore[union-attr]
    if precision == "w8a8":
        scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    else:
        scale = np.repeat(np.abs(weight.reshape(128, -1, 64)).max(axis=2) / np.float32(7), 64, axis=1)
    found = next(stored[0][name] for name in codes if name.startswith("fc1.weight."))
    np.testing.assert_array_equal(found.astype(np.int8).T, np.rint(weight / scale))
    if precision == "w8a8" and package.installed():
        engines = [built(tmp_path / name / "out") for name in ("theirs", "ours")]
        assert engines[0] == engines[1]
