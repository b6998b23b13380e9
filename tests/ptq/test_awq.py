"""AWQ: scales and clips against plain loops, and a float function that stays."""

from __future__ import annotations

import pytest
import tiny_quantized as tiny
import torch
from torch import nn

from s2d_deploy.errors import ModelError
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Granularity, Grid, PerAxis, PerBlock, PerTensor
from s2d_deploy.observers import weight_parameters
from s2d_deploy.plan import Site
from s2d_deploy.ptq.awq import awq_scales, best_alpha
from s2d_deploy.ptq.awq_clip import clipped_scale
from s2d_deploy.quantize import QuantizeConfig


def site_of(weight: torch.Tensor, granularity: Granularity, method: str = "absmax") -> Site:
    grid = Grid(4, granularity=granularity)
    scale, zero = weight_parameters(weight, grid, method)
    return Site("l.weight", "l", "weight", grid, scale, zero, "")


def rounded(weight: torch.Tensor, site: Site, scale: torch.Tensor) -> torch.Tensor:
    return dequantize(quantize(weight, scale, site.zero_point, site.grid), scale, site.zero_point, site.grid)


def outliers(k: int = 16, count: int = 64) -> torch.Tensor:
    torch.manual_seed(0)
    rows = torch.randn(count, k)
    rows[:, 2] *= 30
    return rows


def test_scales_are_powers_of_the_mean_magnitude():
    rows = outliers()
    rows[:, 5] = 0
    for alpha in (0.0, 0.4, 1.0):
        found = awq_scales(rows, alpha)
        means = [sum(abs(float(x)) for x in rows[:, j]) / len(rows) for j in range(16)]
        powers = [m**alpha for m in means if m > 0]
        common = (max(powers) * min(powers)) ** 0.5
        for j, mean in enumerate(means):
            assert float(found[j]) == pytest.approx(mean**alpha / common if mean > 0 else 1.0, rel=1e-5)
    assert torch.equal(awq_scales(rows, 0.0), torch.ones(16, dtype=torch.float64))


@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 4)], ids=lambda g: g.kind)
def test_the_search_finds_the_least_output_error(granularity: Granularity):
    rows, config = outliers(), QuantizeConfig(weights="absmax")
    torch.manual_seed(1)
    weights = {"l": torch.randn(6, 16) * 0.1, "m": torch.randn(3, 16) * 0.1}
    sites = {f"{name}.weight": site_of(w, granularity) for name, w in weights.items()}
    errors = []
    for step in range(11):
        scales = awq_scales(rows, step / 10)
        error = 0.0
        for name, weight in weights.items():
            scaled = (weight.double() * scales).float()
            scale, _ = weight_parameters(scaled, sites[f"{name}.weight"].grid, "absmax")
            got = (rows.double() / scales).float() @ rounded(scaled, sites[f"{name}.weight"], scale).T
            wanted = rows @ weight.T
            error += float((got - wanted).square().sum() / wanted.square().sum())
        errors.append(error)
    alpha = best_alpha(rows, weights, sites, config, 10)
    assert alpha == errors.index(min(errors)) / 10
    assert alpha > 0  # an outlier channel of inputs wants a finer weight
    assert min(errors) < 0.8 * errors[0]


@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 4), PerTensor()], ids=lambda g: g.kind)
def test_clipping_finds_the_least_error_of_each_group(granularity: Granularity):
    rows = outliers().double()
    torch.manual_seed(1)
    weight = torch.randn(5, 16)
    weight[1, 3] = 5.0
    site, ratios = site_of(weight, granularity, "mse"), [1.0, 0.9, 0.8, 0.7, 0.6]
    found = clipped_scale(weight, site, rows.T @ rows / len(rows), ratios)
    widest, _ = weight_parameters(weight, site.grid, "absmax")
    groups = {"axis": [(slice(n, n + 1), slice(0, 16)) for n in range(5)], "tensor": [(slice(0, 5), slice(0, 16))]}
    groups["block"] = [(slice(n, n + 1), slice(b * 4, b * 4 + 4)) for n in range(5) for b in range(4)]
    for index, (r, c) in enumerate(groups[granularity.kind]):
        tried = [float(site.scale.flatten()[index]), *(float(widest.flatten()[index]) * ratio for ratio in ratios)]
        errors = []
        for scale in tried:
            value = torch.clamp(torch.round(weight[r, c] / scale), -8, 7) * scale
            errors.append(float((rows[:, c] @ (value - weight[r, c]).double().T).square().sum()))
        assert float(found.flatten()[index]) == pytest.approx(tried[errors.index(min(errors))], rel=1e-6)


@pytest.mark.parametrize(("kind", "precision"), [("bert", "w4a16"), ("vit", "w4a8"), ("vit", "w4a16")])
@pytest.mark.parametrize("insert", [False, True])
def test_the_float_function_stays(kind: str, precision: str, insert: bool):
    found, context, model = tiny.run(kind, precision, [{"awq": {"insert": insert, "grid": 5}}], block_size=8)
    info = found.plan.info["awq"]
    assert info["folded"] or info["unchanged"]
    assert not insert or info["inserted"] or info["unchanged"]
    for batch in context.batches():
        with torch.no_grad():
            wanted, got = model(**batch)[context.output], found.model(**batch)[context.output]
        # FP32: a scale and its inverse round once each, through two layers.
        assert float((got - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())
    if kind == "bert" and not insert:
        assert any("attention.output.dense" in title for title in (*info["folded"], *info["unchanged"]))
        assert "GELU" in info["left_out"]["encoder.layer.0.output.dense"]


def test_scales_and_clips_help_the_weights(monkeypatch: pytest.MonkeyPatch):
    """Outlier channels of the inputs, weight-only: the case that AWQ is made for."""
    original = tiny.case

    def outlying(kind: str):
        model, batches, output = original(kind)
        with torch.no_grad():
            for norm in [m for m in model.modules() if isinstance(m, nn.LayerNorm)]:
                norm.weight[3] *= 20
        return model, batches, output

    monkeypatch.setattr(tiny, "case", outlying)
    plain = tiny.error(*tiny.run("vit", "w4a16", [], block_size=8))
    scaled = tiny.error(*tiny.run("vit", "w4a16", ["awq"], block_size=8))
    both = tiny.error(*tiny.run("vit", "w4a16", ["awq", "ranges", "awq_clip"], block_size=8))
    assert scaled < 0.9 * plain
    assert both < 0.9 * plain


def test_clipping_changes_scales_only_and_gptq_follows():
    found, _, model = tiny.run("bert", "w4a16", ["awq_clip"], block_size=8)
    weights = [s for s in found.plan.sites.values() if s.role == "weight"]
    assert {s.source for s in weights} == {"rtn-awq_clip"}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, found.model.state_dict()[name])
    again, _, _ = tiny.run("bert", "w4a16", ["awq_clip", "gptq"], block_size=8)
    assert all(torch.equal(s.scale, again.plan.sites[s.name].scale) for s in weights)


def test_nothing_to_scale():
    with pytest.raises(ModelError, match=r"awq can change none of the model's layers.*set awq.insert: true"):
        tiny.run("conv", "w4a4", ["awq"], skip=("first", "second"))
