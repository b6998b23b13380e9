"""Where simulation and runtime differ in a code, is it a rounding boundary, or a fault?

The simulation is forced through the runtime's own codes site by site, so that each site shows only the codes that
*its* float operators moved, not what follows from codes that had moved before.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from planted import vit

from s2d_deploy.discovery import discover
from s2d_deploy.fake_quant import FakeQuantizer, dequantize, token_scale
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.simulation import recorded_codes, simulate
from s2d_deploy.verify import end_to_end_codes, teacher_forced

OUTPUT = "last_hidden_state"
IMAGES = {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def with_large_gains(layers: int = 2) -> nn.Module:
    """A ViT whose norms blow one channel up: a code that moves is seen in the output."""
    model = vit(layers=layers)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(torch.rand(module.weight.shape, generator=generator) - 0.3)
                module.weight[3] = 12.0
                module.bias.add_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model


def forced_through(simulated: nn.Module, batch, shown) -> dict[str, tuple[int, int, float]]:
    """Site -> codes that differ when all sites before it have the runtime's codes, the largest difference, and how far
    the simulation's value behind such a code is from the boundary between two codes (in codes)."""
    found = {}
    handles = []

    def hook(site: str):
        def force(module: FakeQuantizer, args, _output):
            x = args[0].detach()
            theirs = torch.from_numpy(np.asarray(shown[site]).astype(np.int32)).reshape(x.shape)
            scale = token_scale(x, module.grid) if module.grid.dynamic else module.scale
            zero = torch.zeros_like(scale, dtype=torch.int32) if module.grid.dynamic else module.zero_point
            off = (module.codes(x) - theirs).abs()
            value = (x.double() / scale.double())[off > 0]
            away = ((value - value.floor()) - 0.5).abs()
            found[site] = (int((off > 0).sum()), int(off.max()), float(away.max()) if away.numel() else 0.0)
            return dequantize(theirs, scale, zero, module.grid)

        return force

    for name, module in simulated.named_modules():
        if isinstance(module, FakeQuantizer) and not name.endswith("weight_quantizer"):
            handles.append(module.register_forward_hook(hook(name.removesuffix("_quantizer"))))
    with torch.no_grad():
        simulated(**batch)
    for handle in handles:
        handle.remove()
    return found


def deployed(folder: Path, target: str, precision: str, granularity: str):
    model = with_large_gains()
    ops = discover(model, {n: t[:1] for n, t in IMAGES.items()}, OUTPUT)
    context = Context(lambda: [IMAGES], OUTPUT, QuantizeConfig(activation_granularity=granularity))
    done = run_passes(model, ops, precision, parse_steps([{"rotation": {"online": True}}]), context)
    load_exporter()(done.model, done.plan, IMAGES, [OUTPUT], folder / "model.onnx", dynamic={})
    made = load_target(target)
    dialect = made.dialect(folder / "model.onnx", folder / target, precision=precision)
    artifact = made.build(dialect, folder / target, precision=precision, options={}, progress=lambda _text: None)
    return done, simulate(done.model, done.plan).eval(), load_runtime(target).open(artifact, threads=1)


@pytest.mark.parametrize(
    ("target", "precision", "granularity"),
    [("reference", "w4a4", "token"), ("ort", "w4a4", "token"), ("ort", "w8a8", "tensor")],
)
def test_only_codes_on_a_boundary_move(target: str, precision: str, granularity: str, tmp_path: Path):
    if target == "ort":
        pytest.importorskip("onnxruntime")
    (tmp_path / target).mkdir()
    done, simulated, session = deployed(tmp_path, target, precision, granularity)
    with session:
        assert teacher_forced(session, simulated, done.plan, IMAGES)["accumulators_different"] == 0
        shown = session.codes({n: t.numpy() for n, t in IMAGES.items()})
        assert end_to_end_codes(session, simulated, [IMAGES])["codes_checked"] > 50_000
    found = forced_through(simulated, IMAGES, shown)
    assert set(found) == {s.name for s in done.plan.sites.values() if s.role != "weight"}
    for site, (moved, largest, away) in found.items():
        assert largest <= 1, site  # a wrong scale, order or rounding mode would move codes further, or many of them
        assert away < 1e-4, (site, moved, away)
    assert sum(moved for moved, _, _ in found.values()) < 200


def test_run_time_scales_behind_an_integer_product_make_exact_ties(tmp_path: Path):
    """The 0.09 of the output that a two-layer ViT showed: not ULPs near a boundary, ties that lie *on* it.

    Context is ``n s`` with integers n, and the token's scale is ``n_max s / 7``: the ratio ``7 n / n_max`` of small
    integers is often k + 1/2 exactly. Which way such a tie goes, the last bit of the float arithmetic decides.
    """
    (tmp_path / "reference").mkdir()
    _done, simulated, session = deployed(tmp_path, "reference", "w4a4", "token")
    with session:
        shown = session.codes({n: t.numpy() for n, t in IMAGES.items()})
    with recorded_codes(simulated) as ours:
        simulated(**IMAGES)
    stem = "layers.0.attention"
    for site in (f"{stem}.probs", f"{stem}.value"):
        assert np.array_equal(ours[site].numpy(), shown[site])  # nothing had moved before
    exact = np.matmul(shown[f"{stem}.probs"].astype(np.int64), shown[f"{stem}.value"].astype(np.int64))
    exact = exact.transpose(0, 2, 1, 3).reshape(exact.shape[0], exact.shape[2], -1)
    moved = np.argwhere(ours[f"{stem}.o_proj.input"].numpy() != shown[f"{stem}.o_proj.input"])
    assert len(moved) > 20
    for image, token, channel in moved:
        row = exact[image, token]
        ratio = Fraction(7 * int(row[channel]), int(abs(row).max()))
        assert (ratio - Fraction(1, 2)).denominator == 1, ratio
