"""RepQ-ViT against its equations written out, on models whose function must stay, through to the exported file."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from planted import bert, vit

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, RecipeError, UnsupportedError
from s2d_deploy.grid import Grid
from s2d_deploy.plan import Plan
from s2d_deploy.ptq.passes import Context, Quantized, parse_steps, run_passes
from s2d_deploy.ptq.presets import preset
from s2d_deploy.ptq.repq import channel_parameters, reparameterize
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter
from s2d_deploy.simulation import simulate

HIDDEN = "last_hidden_state"


def images(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def sentences() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def uneven_vit() -> nn.Module:
    """A ViT whose norms give channels of very different range: what RepQ-ViT is about."""
    model = vit()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.mul_(torch.exp(torch.randn(module.weight.shape, generator=g)))
                module.bias.add_(torch.randn(module.bias.shape, generator=g))
    return model.eval()


def passed(model: nn.Module, batch, passes, precision: str = "w4a4", **config) -> Quantized:  # type: ignore[no-untyped-def]
    context = Context(lambda: [batch], HIDDEN, QuantizeConfig(**config))
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    return run_passes(model, ops, precision, parse_steps(passes), context)


def hidden(model: nn.Module, batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(**batch)[HIDDEN]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_one_scale_gives_the_codes_that_channel_scales_gave(symmetric: bool, bits: int) -> None:
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(12).double(), nn.Linear(12, 5).double()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.1, 4, 12))
        norm.bias.copy_(torch.linspace(-2, 3, 12))
    x = torch.randn(200, 12, dtype=torch.float64)
    grid = Grid(bits, symmetric=symmetric)
    made = norm(x).detach()
    scale, zero_point = channel_parameters(made.float(), grid, "absmax")
    before = layer(made).detach()
    codes = (torch.round(made / scale) + zero_point).clamp(grid.qmin, grid.qmax)
    reparameterize(norm, [layer], scale, zero_point)
    moved = norm(x).detach()
    assert torch.allclose(layer(moved), before, atol=1e-12)
    # Equation 10: the layer-wise quantizer is the mean of the channel-wise ones.
    one, offset = scale.mean(), zero_point.mean().round()
    assert torch.equal((torch.round(moved / one) + offset).clamp(grid.qmin, grid.qmax), codes)
    # Equations 11 to 13, by a loop over channels.
    for d in range(12):
        r1, r2 = scale[d] / one, zero_point[d] - offset
        assert torch.allclose(moved[:, d], (made[:, d] + scale[d] * r2) / r1)


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_channel_ranges_against_a_loop(method: str, symmetric: bool) -> None:
    rows = torch.randn(300, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 0.1, 0.0])
    rows[:, 1] += 6
    grid = Grid(4, symmetric=symmetric)
    scale, zero_point = channel_parameters(rows, grid, method)  # type: ignore[arg-type]

    def error(d: int, s: float, z: float) -> float:
        return sum((((min(max(round(v / s) + z, -8), 7)) - z) * s - v) ** 2 for v in rows[:, d].double().tolist())

    for d in range(3):
        low, high = min(float(rows[:, d].min()), 0.0), max(float(rows[:, d].max()), 0.0)
        if symmetric:
            plain = max(-low, high) / 7, 0.0
        else:
            plain = (high - low) / 15, float(min(max(round(-8 - low / ((high - low) / 15)), -8), 7))
        found = float(scale[d]), float(zero_point[d])
        if method == "absmax":
            assert found == pytest.approx(plain)
        elif method == "percentile":
            assert found[0] < plain[0]
        else:
            assert error(d, *found) <= error(d, *plain) * (1 + 1e-9)
    assert float(scale[3]) == pytest.approx(float(scale[:3].mean()))  # a channel of zeros stands for itself


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_function_stays_and_w4a4_gains_where_channels_differ(symmetric: bool) -> None:
    model, batch = uneven_vit(), images()
    before = copy.deepcopy(model.state_dict())
    wanted = hidden(model, batch)
    config = {"activation_symmetric": symmetric, "activations": "absmax"}
    plain = passed(model, batch, [], "w8a4", **config)
    repq = passed(model, batch, ["repq"], "w8a4", **config)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.allclose(hidden(repq.model, batch), wanted, atol=1e-4)
    assert repq.plan.info["repq"]["left_out"] == {}
    assert [len(layers) for layers in repq.plan.info["repq"]["folded"].values()] == [3, 1] * (
        len(repq.plan.info["repq"]["folded"]) // 2
    )

    def error(q: Quantized) -> float:
        return float((hidden(simulate(q.model, q.plan).eval(), batch) - wanted).square().mean())

    assert error(repq) < 0.7 * error(plain)
    again = passed(model, batch, ["repq"], "w8a4", **config)
    assert again.plan.digest() == repq.plan.digest()


def test_post_norm_models_are_refused_by_name() -> None:
    with pytest.raises(ModelError) as caught:
        passed(bert(), sentences(), ["repq"])
    text = str(caught.value)
    assert text.startswith("repq can change none of the model's LayerNorms. Expected: a LayerNorm that only quantized")
    assert "the residual stream reads the output of" in text
    assert text.endswith("Fix: leave the pass out, or use smoothquant with insert: true.")


def test_layers_without_a_bias_are_left_out_where_zero_points_move() -> None:
    model, batch = uneven_vit(), images()
    name = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.endswith("fc1"))
    model.get_submodule(name).bias = None
    info = passed(model, batch, ["repq"], activation_symmetric=False).plan.info["repq"]
    assert info["left_out"] == {name: f"{name} has no bias that could take the zero points"}
    assert passed(model, batch, ["repq"]).plan.info["repq"]["left_out"] == {}


@pytest.mark.parametrize("precision", ["w4a16", "nvfp4"])
def test_precisions_without_integer_activations_are_refused(precision: str) -> None:
    with pytest.raises(ModelError, match=rf"repq: {precision} quantizes no activation to integers"):
        passed(uneven_vit(), images(), ["repq"], precision, block_size=16)


@pytest.mark.parametrize("softmax", ["log2", "logsqrt2"])
def test_logarithmic_softmax_is_simulated_declared_and_not_exported(softmax: str, tmp_path: Path) -> None:
    model, batch = uneven_vit(), images()
    quantized = passed(model, batch, [{"repq": {"softmax": softmax}}])
    probs = [s for s in quantized.plan.sites.values() if s.role == "probs"]
    assert {s.grid.name for s in probs} == {f"{softmax}-4"}
    assert {s.source for s in probs} == {f"repq-{softmax}"}
    assert {quantized.plan.declared(s.op) for s in probs} == {f"W4A4 ({softmax}-4)"}
    quantized.plan.save(tmp_path)
    assert Plan.load(tmp_path).digest() == quantized.plan.digest()
    assert torch.isfinite(hidden(simulate(quantized.model, quantized.plan).eval(), batch)).all()
    with pytest.raises(UnsupportedError) as caught:
        load_exporter()(quantized.model, quantized.plan, batch, [HIDDEN], tmp_path / "m.onnx")
    assert f"Found: {softmax}-4: {probs[0].name}" in str(caught.value)
    assert "`softmax: uniform`" in str(caught.value)


def test_a_logarithmic_softmax_alone_serves_post_norm_models() -> None:
    quantized = passed(bert(), sentences(), [{"repq": {"softmax": "logsqrt2"}}])
    assert not quantized.plan.info["repq"]["folded"]
    assert len(quantized.plan.info["repq"]["probs"]) > 0


def test_the_exported_file_computes_the_simulation(tmp_path: Path) -> None:
    import onnxruntime as ort

    model, batch = uneven_vit(), images()
    quantized = passed(model, batch, ["repq"], "w8a8", activation_symmetric=False)
    path = tmp_path / "model.onnx"
    load_exporter()(quantized.model, quantized.plan, batch, [HIDDEN], path)
    found = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(
        None, {n: t.numpy() for n, t in batch.items()}
    )[0]
    expected = hidden(simulate(quantized.model, quantized.plan).eval(), batch).numpy()
    # Codes at a rounding boundary may flip: a few steps of 8 bits at the output.
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert np.abs(found - expected).mean() < 1e-3 * np.abs(expected).max()


def test_options_and_preset() -> None:
    assert preset("w4a4_repq") == {"precisions": ["w4a4"], "passes": ["repq"]}
    with pytest.raises(RecipeError, match=r"repq\.softmax"):
        parse_steps([{"repq": {"softmax": "log3"}}])
