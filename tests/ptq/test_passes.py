"""A list of passes: what it accepts, in which order it runs, and that nothing of the user's is changed."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from s2d_deploy.discovery import discover
from s2d_deploy.errors import DataError, PlanError, RecipeError
from s2d_deploy.fake_quant import quantize
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Context, Quantized, parse_steps, put_on_grid, run_passes
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.recipe import QuantizeSection, parse_recipe


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.b(self.a(x).relu())


def small():
    torch.manual_seed(0)
    model, batches = Small().eval(), [{"x": torch.randn(5, 8)} for _ in range(3)]
    return model, batches, discover(model, batches[0])


def test_an_empty_list_sets_ranges():
    model, batches, ops = small()
    context = Context(lambda: batches, "output", QuantizeConfig())
    found = run_passes(model, ops, "w4a4", parse_steps([]), context)
    wanted = build_plan(model, ops, context.calibration(model, ops), "w4a4", context.config)
    assert found.plan.sites.keys() == wanted.sites.keys()
    for name, site in wanted.sites.items():
        assert torch.equal(site.scale, found.plan.sites[name].scale)
    assert found.plan.info["passes"] == [{"name": "ranges"}]


def test_the_plan_is_the_same_bytes_for_the_same_seed():
    model, batches, ops = small()
    runs = [run_passes(model, ops, "w4a4", parse_steps([]), Context(lambda: batches, "o")) for _ in range(2)]
    assert runs[0].plan.digest() == runs[1].plan.digest()


def test_the_users_model_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch):
    model, batches, ops = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    install(monkeypatch, "zero", "weights", zero_codes)
    found = run_passes(model, ops, "w4a4", parse_steps(["zero"]), Context(lambda: batches, "o"))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not found.model.a.weight.any()


def install(monkeypatch: pytest.MonkeyPatch, name: str, kind: str, apply) -> None:
    """A pass that exists for one test."""
    import sys
    import types

    module = types.ModuleType(f"passes_of_tests_{name}")
    module.Options, module.apply = type("Options", (passes.Options,), {}), apply
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(passes.PASSES, name, passes.PassEntry(module.__name__, kind, name))


def zero_codes(quantized: Quantized, _context: Context, _options: object) -> Quantized:
    for site in [s for s in quantized.plan.sites.values() if s.role == "weight"]:
        weight = quantized.model.get_submodule(site.op).weight
        put_on_grid(quantized, site.name, torch.zeros_like(weight, dtype=torch.int32), "zero")
    return quantized


def off_grid(quantized: Quantized, context: Context, options: object) -> Quantized:
    quantized = zero_codes(quantized, context, options)
    with torch.no_grad():
        quantized.model.a.weight.add_(quantized.plan.sites["a.weight"].scale.reshape(-1, 1) * 0.25)
    return quantized


def test_a_pass_that_leaves_a_weight_off_its_grid_is_refused(monkeypatch: pytest.MonkeyPatch):
    model, batches, ops = small()
    install(monkeypatch, "zero", "weights", off_grid)
    with pytest.raises(PlanError, match="'zero' left the weight of 'a' off its grid"):
        run_passes(model, ops, "w4a4", parse_steps(["zero"]), Context(lambda: batches, "o"))


def test_codes_that_a_pass_chose_are_the_codes_that_rounding_finds():
    model, batches, ops = small()
    found = run_passes(model, ops, "w4a4", parse_steps([]), Context(lambda: batches, "o"))
    site = found.plan.sites["a.weight"]
    codes = torch.randint(site.grid.qmin, site.grid.qmax + 1, found.model.a.weight.shape, dtype=torch.int32)
    put_on_grid(found, site.name, codes, "chosen")
    assert torch.equal(quantize(found.model.a.weight, site.scale, site.zero_point, site.grid), codes)
    assert found.plan.sites["a.weight"].source == "chosen"


def test_ranges_stand_behind_the_transforms_where_they_are_not_listed(monkeypatch: pytest.MonkeyPatch):
    install(monkeypatch, "turn", "transform", lambda q, _c, _o: q)
    install(monkeypatch, "pick", "weights", zero_codes)
    assert [s.name for s in parse_steps(["turn", "pick"])] == ["turn", "ranges", "pick"]
    assert [s.name for s in parse_steps(["pick"])] == ["ranges", "pick"]
    assert [s.name for s in parse_steps(["turn"])] == ["turn", "ranges"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["rangs"], r"quantize.passes: unknown pass 'rangs'.*\n?.*did you mean 'ranges'"),
        ([{"ranges": {"bits": 4}}], r"quantize.passes.ranges: unknown option 'bits'"),
        ([3], "quantize.passes: not a pass"),
        ([{"ranges": {}, "turn": {}}], "quantize.passes: not a pass"),
        (["ranges", "ranges"], "listed twice: ranges"),
        (["ranges", {"mixed": {"budget": 6}}], "ranges and mixed both set ranges"),
        ([{"mixed": {}}], "quantize.passes.mixed.budget: field required"),
        (["ranges", "turn"], "'turn' cannot come behind 'ranges'"),
        (["pick", "turn"], "'ranges' cannot come behind|'turn' cannot come behind"),
    ],
)
def test_a_list_that_cannot_be(monkeypatch: pytest.MonkeyPatch, given: list[object], text: str):
    install(monkeypatch, "turn", "transform", lambda q, _c, _o: q)
    install(monkeypatch, "pick", "weights", zero_codes)
    with pytest.raises(RecipeError) as caught:
        parse_steps(given)
    import re

    assert re.search(text, str(caught.value), re.DOTALL), str(caught.value)


def test_every_pass_of_the_table_has_its_module():
    for name, entry in passes.PASSES.items():
        steps = parse_steps([{name: NEEDED.get(name, {})}])
        assert any(s.name == name for s in steps)
        assert entry.title
        json.dumps([s.document() for s in steps])


NEEDED = {"mixed": {"budget": 6}}  # options without a default
RECIPE = {
    "name": "r",
    "model": {"config": {"model_type": "vit"}},
    "train": {},
    "data": {"kind": "digits"},
    "targets": ["ort"],
}


def test_a_recipe_names_passes_and_presets():
    recipe = parse_recipe({**RECIPE, "quantize": {"passes": ["ranges"]}})
    assert recipe.quantize.passes == ("ranges",)
    assert parse_recipe(recipe.document()).quantize == recipe.quantize
    with pytest.raises(RecipeError, match="unknown pass 'gptk'"):
        parse_recipe({**RECIPE, "quantize": {"passes": ["gptk"]}})
    with pytest.raises(RecipeError, match="unknown preset 'int9'"):
        parse_recipe({**RECIPE, "quantize": {"preset": "int9"}})


def test_a_recipes_own_keys_win_over_its_preset():
    assert QuantizeSection(preset="w4a4").precisions == ("w4a4",)
    assert QuantizeSection(preset="w4a4", precisions=("w8a8",)).precisions == ("w8a8",)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["rotation", "smoothquant"], "'smoothquant' behind 'rotation' works on channels that rotation has mixed"),
        (["awq", "flatquant", "rotation"], "'rotation' behind 'flatquant' changes what flatquant was learned on"),
        (["repq", "rotation"], "'rotation' behind 'repq' mixes the channels whose ranges repq has evened out"),
        (["gptq", "adaround"], "'adaround' behind 'gptq' finds weights that gptq has rounded"),
        (["bias_correction", "erq"], "'erq' behind 'bias_correction' makes another error than the one that"),
        (["rotation", "rotation"], "listed twice: rotation"),
    ],
)
def test_passes_that_undo_each_other_are_refused_before_anything_runs(given: list[str], words: str):
    with pytest.raises(RecipeError) as caught:
        parse_steps(given)
    assert words in str(caught.value)


@pytest.mark.parametrize(("precision", "given"), [("w4a4", []), ("w4a8", ["gptq"]), ("w8a8", ["adaround"])])
def test_nan_in_the_calibration_data_is_named(precision: str, given: list[str]):
    model, batches, ops = small()
    bad = [batches[0], {"x": batches[1]["x"].clone()}]
    bad[1]["x"][0, :2] = float("inf")
    with pytest.raises(DataError, match=r"calibration batch 1, input 'x': NaN or infinity.*Found: 2 of 40"):
        run_passes(model, ops, precision, parse_steps(given), Context(lambda: bad, "output"))


def test_the_order_that_a_refusal_names_is_accepted():
    for first, second in passes._CONFLICTS:
        with pytest.raises(RecipeError) as caught:
            parse_steps([first, second])
        text = str(caught.value)
        assert "Fix: " in text
        if "keep one of them" not in text:  # the other way round
            assert {first, second} <= {step.name for step in parse_steps([second, first])}
