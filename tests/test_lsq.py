"""Learned steps against autograd of the paper's formula, in the training loop, and through to the deployed plan."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.condition import condition
from s2d_deploy.discovery import discover
from s2d_deploy.errors import PlanError, RecipeError
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor, PerToken
from s2d_deploy.lsq import LearnedQuantizer, learnable
from s2d_deploy.plan import Plan, Site
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.qat import FakeQuantization
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.recipe import Recipe
from s2d_deploy.simulation import simulate


def by_formula(x: Tensor, s: Tensor, z: Tensor, grid: Grid) -> Tensor:
    """Equations 1 and 2; autograd gives equation 3 when rounding has the gradient of the identity."""
    ratio = (x / s + z).clamp(grid.qmin, grid.qmax)
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    return (rounded - z) * s


@pytest.mark.parametrize(
    ("role", "grid", "shape"),
    [
        ("input", Grid(4), ()),
        ("input", Grid(8), ()),
        ("input", Grid(4, symmetric=False), ()),
        ("probs", Grid(4, signed=False), ()),
        ("weight", Grid(4, granularity=PerAxis(0)), (6,)),
        ("weight", Grid(8, narrow=True, granularity=PerAxis(0)), (6,)),
        ("weight", Grid(4, granularity=PerBlock(1, 4)), (6, 2)),
        ("weight", Grid(2, granularity=PerTensor()), ()),
    ],
)
def test_values_and_gradients_are_those_of_the_paper(role, grid: Grid, shape: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=g) * 3
    x = x.abs() if role == "probs" else x
    scale = 0.3 + torch.rand(shape, generator=g)
    zero_point = torch.full(shape, 0 if grid.symmetric else 2, dtype=torch.int32)
    site = Site("a.x", "a", role, grid, scale, zero_point, "t")
    quantizer, mine = LearnedQuantizer(site), x.clone().requires_grad_()
    upstream = torch.randn(6, 8, generator=g)
    made = quantizer(mine)
    assert torch.equal(made, FakeQuantizer.of(site)(x))  # the simulation's forward, bit for bit
    made.backward(upstream)
    other, s = x.clone().requires_grad_(), scale.clone().requires_grad_()
    wide = {0: s, 1: s.reshape(-1, 1), 2: s.repeat_interleave(4, dim=1) if len(shape) == 2 else s}[len(shape)]
    by_formula(other, wide, zero_point.flatten()[0].float() if zero_point.numel() else 0, grid).backward(upstream)
    shared = {0: 48 if role == "weight" else 8, 1: 8, 2: 4}[len(shape)]
    assert torch.allclose(mine.grad, other.grad)
    assert torch.allclose(quantizer.scale.grad, s.grad / math.sqrt(shared * grid.qmax), rtol=1e-5, atol=1e-7)


def test_which_sites_have_steps() -> None:
    empty, one, zero = torch.empty(0), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    assert learnable(Site("a", "a", "input", Grid(4), one, zero, "t"))
    assert not learnable(Site("a", "a", "input", Grid(4, granularity=PerToken()), empty, empty.int(), "t"))
    assert not learnable(Site("a", "a", "probs", Grid(4, signed=False, format="log2"), one, zero, "t"))


def test_a_step_stays_positive() -> None:
    site = Site("a", "a", "input", Grid(4), torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), "t")
    quantizer = LearnedQuantizer(site)
    with torch.no_grad():
        quantizer.scale.fill_(-3.0)
    quantizer.keep_positive()
    assert float(quantizer.scale.detach()) == pytest.approx(0.0005)
    assert quantizer.learned_site().source == "lsq"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(12, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        y = self.fc2(torch.relu(self.fc1(x)))
        return {"logits": y} if labels is None else {"logits": y, "loss": nn.functional.cross_entropy(y, labels)}


def data(seed: int = 0) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(16, 12, generator=g)} for _ in range(3)]


CONFIG = QuantizeConfig(weights="absmax", activations="absmax")


def make_plan(model: nn.Module) -> Plan:
    ops = discover(model, data()[0], "logits")
    return build_plan(model, ops, calibrate(model, ops, data()), "w3a3", CONFIG)


def train(model: nn.Module, learned: bool, **changes: object):  # type: ignore[no-untyped-def]
    return condition(
        model,
        "distill",
        lambda: data(2),
        data(),
        None,
        steps=40,
        lr=2e-3,
        plan=make_plan,
        learned_steps=learned,
        **changes,
    )


def test_learned_steps_move_help_and_are_what_is_deployed(tmp_path: Path) -> None:
    original = Net()

    def error(model: nn.Module, plan: Plan) -> float:
        simulated = simulate(model, plan)
        return sum(float((simulated(**b)["logits"] - original(**b)["logits"]).square().sum().detach()) for b in data(5))

    model = Net()
    result = train(model, True)
    plan = result.learned_plan
    assert result.method == "distill+qat+lsq"
    assert "learned_plan" not in result.to_dict()
    start = make_plan(original)
    assert {s.source for s in plan.sites.values()} == {"lsq"}
    assert all(not torch.equal(s.scale, start.sites[n].scale) for n, s in plan.sites.items())
    assert all(bool((s.scale > 0).all()) for s in plan.sites.values())
    # The trained weights belong to the trained steps: better with them than with steps calibrated anew.
    assert error(model, plan) < error(model, make_plan(model))
    assert error(model, plan) < error(original, start)
    # What `quantize` makes of it is that plan, also from disk.
    plan.save(tmp_path)
    learned = Plan.load(tmp_path)
    ops = discover(model, data()[0], "logits")
    context = Context(data, "logits", CONFIG, learned=learned)
    made = run_passes(model, ops, "w3a3", parse_steps([]), context).plan
    assert made.info["learned_steps"] == 4
    assert all(torch.equal(s.scale, plan.sites[n].scale) and s.source == "lsq" for n, s in made.sites.items())
    other = replace(CONFIG, activation_granularity="token")
    with pytest.raises(
        PlanError, match=r"2 site\(s\) have learned scales that do not fit the plan: fc1.input, fc2.input"
    ):
        run_passes(model, ops, "w3a3", parse_steps([]), Context(data, "logits", other, learned=learned))


def test_without_learning_the_plan_is_calibrated_and_none_is_carried() -> None:
    model = Net()
    result = train(model, False)
    assert result.learned_plan is None
    quantization = FakeQuantization(model, make_plan(model))
    assert quantization.steps == []
    assert quantization.learned_plan().digest() == make_plan(model).digest()


def test_an_interrupted_run_ends_with_the_same_steps(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"

    def stop(done: int, *_: object) -> None:
        if done == 25:
            raise KeyboardInterrupt

    whole, broken, resumed = Net(), Net(), Net()
    expected = train(whole, True)
    with pytest.raises(KeyboardInterrupt):
        train(broken, True, checkpoint_path=path, checkpoint_every=20, progress=stop)
    result = train(resumed, True, checkpoint_path=path, checkpoint_every=20)
    assert result.learned_plan.digest() == expected.learned_plan.digest()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def recipe(**condition: object) -> dict[str, object]:
    return {
        "name": "t",
        "model": {"pretrained": "folder"},
        "data": {"kind": "digits"},
        "targets": ["reference"],
        "condition": condition,
    }


def test_the_recipe_says_what_it_learns_for() -> None:
    good = Recipe.model_validate(recipe(qat="w4a4", qat_steps="learned"))
    assert good.condition.qat_steps == "learned"
    assert Recipe.model_validate(recipe(qat="w4a4")).condition.qat_steps == "calibrated"
    with pytest.raises(ValueError, match=r"condition.qat_steps: learned needs a precision to learn for"):
        Recipe.model_validate(recipe(qat_steps="learned"))
    with pytest.raises(ValueError, match=r"learned scales are deployed as they are, and quantize.passes would change"):
        Recipe.model_validate(recipe(qat="w4a4", qat_steps="learned") | {"quantize": {"passes": ["gptq"]}})
    assert issubclass(RecipeError, ValueError)


def test_the_pipeline_deploys_what_was_learned(commands, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    flags = ("--set", "condition.qat=w4a4", "--set", "condition.qat_steps=learned", "--set", "condition.steps=3")
    result = commands(
        "quantize", "tiny.yaml", "-o", folder, *flags, "--set", "condition.warmup=0",
        "--set", "quantize.precisions=[w4a4, w8a8]",
    )  # fmt: skip
    assert result.code == 0, result.stderr
    trained, deployed = Plan.load(folder / "condition"), Plan.load(folder / "quantize" / "w4a4")
    assert deployed.info["learned_steps"] == len(deployed.sites) == len(trained.sites)
    assert all(torch.equal(s.scale, trained.sites[n].scale) for n, s in deployed.sites.items())
    # Steps were learned for one precision, and serve no other.
    assert "learned_steps" not in json.loads((folder / "quantize" / "w8a8" / "plan.json").read_text())["info"]
