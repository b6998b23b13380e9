"""Plans: default grids as docs/architecture.md section 3 has them, selection, overrides, refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from s2d_deploy.calibrate import Calibration, calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import DataError, ModelError, PlanError, RecipeError
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor, PerToken
from s2d_deploy.models import load_model
from s2d_deploy.observers import activation_parameters, weight_parameters
from s2d_deploy.plan import Op, Plan
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.recipe import ModelSection
from s2d_deploy.simulation import simulate

CONFIG = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_labels": 3,
}
Prepared = tuple[nn.Module, dict[str, Op], Calibration]


def batch(n: int = 8) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(0))}


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    model = load_model(ModelSection(config=CONFIG)).module
    ops = discover(model, batch(1))
    return model, ops, calibrate(model, ops, [batch()])


def named(ops: Mapping[str, Op], kind: str) -> str:
    return next(n for n, op in ops.items() if op.kind == kind)


def grids(plan: Plan) -> set[tuple[str, str, Grid]]:
    return {(plan.ops[s.op].kind, s.role, s.grid) for s in plan.sites.values()}


INT8_WEIGHT = Grid(8, narrow=True, granularity=PerAxis(0))
INT4_WEIGHT = Grid(4, granularity=PerAxis(0))


def activations(bits: int) -> set[tuple[str, str, Grid]]:
    signed, unsigned = Grid(bits, granularity=PerTensor()), Grid(bits, signed=False, granularity=PerTensor())
    return {
        ("linear", "input", signed),
        ("conv", "input", signed),
        ("scores", "query", signed),
        ("scores", "key", signed),
        ("context", "probs", unsigned),
        ("context", "value", signed),
    }


def weights(grid: Grid) -> set[tuple[str, str, Grid]]:
    return {("linear", "weight", grid), ("conv", "weight", grid)}


EXPECTED = {
    "w8a8": weights(INT8_WEIGHT) | activations(8),
    "w4a16": {("linear", "weight", Grid(4, granularity=PerBlock(1, 32)))},
    "w4a8": weights(INT4_WEIGHT) | activations(8),
    "w4a4": weights(INT4_WEIGHT) | activations(4),
    "w6a6": weights(Grid(6, granularity=PerAxis(0))) | activations(6),
    "w5a5": weights(Grid(5, granularity=PerAxis(0))) | activations(5),
    "w8a16": {("linear", "weight", INT8_WEIGHT)},
    "w16a8": activations(8),
    "fp32": set(),
}


@pytest.mark.parametrize("precision", EXPECTED)
def test_the_default_grids_are_the_documented_ones(prepared: Prepared, precision: str) -> None:
    plan = build_plan(*prepared, precision)
    assert grids(plan) == EXPECTED[precision]
    assert plan.precision == precision
    assert list(plan.ops) == list(prepared[1])
    kinds = {kind for kind, _, _ in EXPECTED[precision]}
    for op in plan.ops.values():  # every op of a quantized kind, none left out
        assert bool([s for s in plan.sites.values() if s.op == op.name]) == (op.kind in kinds)


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
def test_scales_are_those_of_the_observers(prepared: Prepared, method: str) -> None:
    model, ops, calibration = prepared
    config = QuantizeConfig(weights=method, activations=method, percentile=99.0)  # type: ignore[arg-type]
    plan = build_plan(model, ops, calibration, "w4a4", config)
    for site in plan.sites.values():
        if site.role == "weight":
            weight = model.get_submodule(site.op).weight
            scale, zero_point = weight_parameters(weight, site.grid, method, 99.0)  # type: ignore[arg-type]
        else:
            histogram = calibration.histograms[site.name]
            scale, zero_point = activation_parameters(histogram, site.grid, method, 99.0)  # type: ignore[arg-type]
        assert torch.equal(site.scale, scale)
        assert torch.equal(site.zero_point, zero_point)
        assert site.source == f"rtn-{method}"


@pytest.mark.parametrize("precision", ["w8a8", "w6a6", "w5a5", "w4a4", "w4a16", "w16a8", "w2a2"])
def test_the_plan_simulates(prepared: Prepared, precision: str) -> None:
    model, _, _ = prepared
    with torch.no_grad():
        exact = model(**batch()).logits
        simulated = simulate(model, build_plan(*prepared, precision))(**batch()).logits
    assert bool(torch.isfinite(simulated).all())
    assert not torch.equal(simulated, exact)
    if precision == "w8a8":
        assert float((simulated - exact).norm() / exact.norm()) < 0.1


def test_plans_repeat_bit_for_bit_and_survive_the_disk(prepared: Prepared, tmp_path: Path) -> None:
    first, second = (build_plan(*prepared, "w4a4") for _ in range(2))
    assert first.digest() == second.digest()
    first.save(tmp_path)
    loaded = Plan.load(tmp_path)
    assert loaded.digest() == first.digest()
    assert loaded.ops == first.ops
    assert loaded.info == first.info
    assert loaded.info["calibration_samples"] == 8
    for name, site in first.sites.items():
        other = loaded.sites[name]
        assert (other.op, other.role, other.grid, other.source) == (site.op, site.role, site.grid, site.source)
        assert torch.equal(other.scale, site.scale)
        assert torch.equal(other.zero_point, site.zero_point)


def test_skip_leaves_ops_float_and_wins_over_overrides(prepared: Prepared) -> None:
    config = QuantizeConfig(skip=("classifier", "*.scores"), overrides={"classifier": "w8a8"})
    plan = build_plan(*prepared, "w4a4", config)
    left = {s.op for s in plan.sites.values()}
    assert left == {n for n in plan.ops if n != "classifier" and not n.endswith(".scores")}


def test_attention_can_stay_float(prepared: Prepared) -> None:
    plan = build_plan(*prepared, "w8a8", QuantizeConfig(attention=False))
    assert {plan.ops[s.op].kind for s in plan.sites.values()} == {"linear", "conv"}


def test_the_first_override_that_matches_wins(prepared: Prepared) -> None:
    config = QuantizeConfig(overrides={"classifier": "w8a8", "*": "w6a6"})
    plan = build_plan(*prepared, "w4a4", config)
    assert plan.sites["classifier.weight"].grid.bits == 8
    assert {s.grid.bits for s in plan.sites.values() if s.op != "classifier"} == {6}
    reversed_ = build_plan(*prepared, "w4a4", QuantizeConfig(overrides={"*": "w6a6", "classifier": "w8a8"}))
    assert {s.grid.bits for s in reversed_.sites.values()} == {6}


def test_an_override_never_lowers_bits_nor_quantizes_what_weight_only_leaves_float(prepared: Prepared) -> None:
    kept = build_plan(*prepared, "w8a8", QuantizeConfig(overrides={"classifier": "w4a4"}))
    assert kept.digest() == build_plan(*prepared, "w8a8").digest()
    weight_only = build_plan(*prepared, "w4a16", QuantizeConfig(overrides={"classifier": "w8a8"}))
    assert {s.role for s in weight_only.sites.values()} == {"weight"}
    assert weight_only.sites["classifier.weight"].grid == INT8_WEIGHT
    assert not build_plan(*prepared, "fp32", QuantizeConfig(overrides={"*": "w8a8"})).sites
    float_layer = build_plan(*prepared, "w4a4", QuantizeConfig(overrides={"classifier": "fp32"}))
    assert "classifier" not in {s.op for s in float_layer.sites.values()}


def test_patterns_that_match_nothing_are_all_named(prepared: Prepared) -> None:
    config = QuantizeConfig(skip=("clasifier",), overrides={"nowhere.*": "w8a8", "classifier": "w8a8"})
    with pytest.raises(RecipeError) as caught:
        build_plan(*prepared, "w4a4", config)
    text = str(caught.value)
    assert "quantize.skip: 'clasifier' matches no layer; quantize.overrides: 'nowhere.*' matches no layer" in text
    assert "Fix: did you mean 'classifier'?" in text
    with pytest.raises(RecipeError, match=r"quantize\.overrides\['\*'\]: unknown precision 'w9a9'"):
        build_plan(*prepared, "w4a4", QuantizeConfig(overrides={"*": "w9a9"}))


def test_every_layer_that_the_block_size_does_not_divide_is_listed(prepared: Prepared) -> None:
    _, ops, _ = prepared
    with pytest.raises(PlanError) as caught:
        build_plan(*prepared, "w4a16", QuantizeConfig(block_size=48))
    linear = [n for n, op in ops.items() if op.kind == "linear"]
    assert f"width not divisible by the block size in {len(linear)} layer(s): " in str(caught.value)
    for name in linear:
        assert f"{name} (K = {ops[name].k})" in str(caught.value)
    assert "Expected: a multiple of quantize.block_size = 48." in str(caught.value)
    # 8-bit weights and skipped layers have no blocks, so nothing is wrong with them.
    build_plan(*prepared, "w4a16", QuantizeConfig(block_size=48, overrides={"*": "w8a8"}))
    wide = tuple(n for n in linear if ops[n].k % 64)
    build_plan(*prepared, "w4a16", QuantizeConfig(block_size=64, skip=wide))
    build_plan(*prepared, "w4a4", QuantizeConfig(block_size=48))


def test_every_layer_with_nan_weights_is_named() -> None:
    model = load_model(ModelSection(config=CONFIG)).module
    ops = discover(model, batch(1))
    calibration = calibrate(model, ops, [batch()])
    linear = [n for n, op in ops.items() if op.kind == "linear"]
    for name, value in ((linear[0], math.nan), (linear[-1], math.inf)):
        with torch.no_grad():
            model.get_submodule(name).weight[0, :2] = value
    with pytest.raises(ModelError) as caught:
        build_plan(model, ops, calibration, "w4a4")
    assert "NaN or infinite weights in 2 layer(s): " in str(caught.value)
    assert f"{linear[0]} (2 of 1024)" in str(caught.value)
    assert f"{linear[-1]} (2 of 96)" in str(caught.value)
    build_plan(model, ops, calibration, "w4a4", QuantizeConfig(skip=(linear[0], linear[-1])))


def test_per_token_plans_store_no_scale_for_linear_inputs(prepared: Prepared) -> None:
    plan = build_plan(*prepared, "w4a4", QuantizeConfig(activation_granularity="token"))
    for site in plan.sites.values():
        dynamic = plan.ops[site.op].kind == "linear" and site.role == "input"
        assert (site.grid == Grid(4, granularity=PerToken())) == dynamic
        assert (site.scale.numel() == 0) == dynamic


def test_affine_activations_leave_weights_and_probabilities_symmetric(prepared: Prepared) -> None:
    plan = build_plan(*prepared, "w8a8", QuantizeConfig(activation_symmetric=False))
    for site in plan.sites.values():
        assert site.grid.symmetric == (site.role in ("weight", "probs"))
    assert any(int(s.zero_point) for s in plan.sites.values() if not s.grid.symmetric)


def test_a_site_that_was_never_observed_is_named(prepared: Prepared) -> None:
    model, ops, calibration = prepared
    rest = {n: h for n, h in calibration.histograms.items() if n != "classifier.input"}
    with pytest.raises(DataError, match=r"site 'classifier\.input' has no calibration statistics"):
        build_plan(model, ops, Calibration(rest, 8), "w8a8")
    build_plan(model, ops, Calibration({}, 8), "w4a16")  # needs none


def test_the_first_and_the_last_layer_keep_their_bits():
    model, ops, statistics = first_last_model()
    plan = build_plan(model, ops, statistics, "w4a4", QuantizeConfig(first_last="w8a8"))
    assert [plan.declared(name) for name in ops] == ["W8A8", "W4A4", "W8A8"]
    # The user's own override comes first, and a precision above the wish is not lowered.
    mine = QuantizeConfig(first_last="w8a8", overrides={"c": "w6a6"})
    assert [build_plan(model, ops, statistics, "w4a4", mine).declared(n) for n in ops] == ["W8A8", "W4A4", "W6A6"]
    low = QuantizeConfig(first_last="w4a4")
    assert [build_plan(model, ops, statistics, "w8a8", low).declared(n) for n in ops] == ["W8A8"] * 3


def first_last_model():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    torch.manual_seed(0)
    model, batch = Three().eval(), {"x": torch.randn(3, 4)}
    ops = discover(model, batch)
    return model, ops, calibrate(model, ops, [batch])
