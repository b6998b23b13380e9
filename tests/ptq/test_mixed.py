"""Sensitivity and the budgeted assignment: against every assignment there is."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import PlanError, RecipeError
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.sensitivity import assign, costs_of, measure_sensitivity
from s2d_deploy.simulation import simulate

figure = st.floats(0, 10, allow_nan=False)


@settings(max_examples=60)
@given(st.lists(st.tuples(figure, figure, figure, figure, figure, figure), min_size=1, max_size=5), st.floats(0, 30))
def test_no_assignment_within_the_budget_is_better(rows: list[tuple[float, ...]], budget: float):
    names = ("a", "b", "c")
    errors = {f"op{i}": dict(zip(names, row[:3], strict=True)) for i, row in enumerate(rows)}
    costs = {f"op{i}": dict(zip(names, row[3:], strict=True)) for i, row in enumerate(rows)}
    best = None
    for choice in itertools.product(names, repeat=len(rows)):
        cost = sum(costs[f"op{i}"][p] for i, p in enumerate(choice))
        error = sum(errors[f"op{i}"][p] for i, p in enumerate(choice))
        if cost <= budget and (best is None or error < best):
            best = error
    if best is None:
        cheapest = sum(min(row.values()) for row in costs.values())
        if cheapest > budget + 1e-6:
            with pytest.raises(PlanError, match="below the cheapest assignment"):
                assign(errors, costs, budget)
        return
    found = assign(errors, costs, budget)
    assert found.error <= best + 1e-6
    assert found.cost <= budget + 1e-6
    assert found.error == pytest.approx(sum(errors[o][p] for o, p in found.precisions.items()))


class Small(nn.Module):
    """`loud` feeds the output a hundred times as strongly as `quiet`."""

    def __init__(self):
        super().__init__()
        self.loud, self.quiet = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return 100 * self.loud(x) + self.quiet(x)


def small():
    torch.manual_seed(0)
    model, batches = Small().eval(), [{"x": torch.randn(8, 8)} for _ in range(2)]
    ops = discover(model, batches[0])
    return model, batches, ops


def test_sensitivity_is_the_error_of_that_part_alone():
    model, batches, ops = small()
    plans = {p: build_plan(model, ops, calibrate(model, ops, batches), p) for p in ("w4a4", "w8a8")}
    rows = {(r.op, r.precision, r.part): r.error for r in measure_sensitivity(model, plans, lambda: batches, "y")}
    assert len(rows) == 2 * 2 * 3
    simulated = simulate(model, plans["w4a4"]).eval()
    x = torch.cat([b["x"] for b in batches])
    with torch.no_grad():
        y = model(x)
        weight = simulated.loud.weight_quantizer(model.loud.weight)
        other = 100 * nn.functional.linear(x, weight, model.loud.bias) + model.quiet(x)
    wanted = float((y - other).double().square().sum() / y.double().square().sum())
    assert rows["loud", "w4a4", "weights"] == pytest.approx(wanted, rel=1e-5)
    for op in ("loud", "quiet"):
        assert rows[op, "w8a8", "both"] < rows[op, "w4a4", "both"]
    assert rows["quiet", "w4a4", "both"] < 1e-3 * rows["loud", "w4a4", "both"]


def test_the_budget_goes_to_the_layer_that_needs_it():
    model, batches, ops = small()
    steps = parse_steps([{"mixed": {"budget": 6}}])
    found = run_passes(model, ops, "w4a4", steps, Context(lambda: batches, "y"))
    assert found.plan.declared("loud") == "W8A8"
    assert found.plan.declared("quiet") == "W4A4"
    facts = found.plan.info["mixed"]
    assert facts["used"] == pytest.approx(6.0)
    assert facts["assignment"] == {"loud": "w8a8", "quiet": "w4a4"}
    json.dumps(found.plan.info)
    again = run_passes(model, ops, "w4a4", steps, Context(lambda: batches, "y"))
    assert again.plan.digest() == found.plan.digest()


def test_mean_bits():
    model, batches, ops = small()
    statistics, config = calibrate(model, ops, batches), QuantizeConfig(block_size=8)
    plans = {p: build_plan(model, ops, statistics, p, config) for p in ("w4a4", "w4a16", "w8a8")}
    weights = {"loud": model.loud.weight, "quiet": model.quiet.weight}
    by_weight, by_mac = costs_of(plans, weights, "weight_bits"), costs_of(plans, weights, "mac_bits")
    for precision, bits, mean in (("w4a4", 4, 4), ("w4a16", 4, 10), ("w8a8", 8, 8)):
        assert sum(row[precision] for row in by_weight.values()) == pytest.approx(bits)
        assert sum(row[precision] for row in by_mac.values()) == pytest.approx(mean)


def test_measured_costs(tmp_path: Path):
    model, batches, ops = small()
    path = tmp_path / "costs.json"
    path.write_text(json.dumps({op: {"w4a4": 1.0, "w8a8": 3.0} for op in ops}))
    steps = parse_steps([{"mixed": {"budget": 4, "costs": str(path)}}])
    found = run_passes(model, ops, "w4a4", steps, Context(lambda: batches, "y"))
    assert found.plan.info["mixed"]["assignment"] == {"loud": "w8a8", "quiet": "w4a4"}
    path.write_text(json.dumps({"loud": {"w4a4": 1.0}}))
    with pytest.raises(RecipeError, match="no cost for loud at w8a8, quiet at w4a4, quiet at w8a8"):
        run_passes(model, ops, "w4a4", steps, Context(lambda: batches, "y"))
    path.write_text("[1]")
    with pytest.raises(RecipeError, match="not a costs file"):
        run_passes(model, ops, "w4a4", steps, Context(lambda: batches, "y"))


def test_a_budget_that_nothing_meets():
    model, batches, ops = small()
    with pytest.raises(PlanError, match=r"below the cheapest assignment.*at least 4"):
        run_passes(model, ops, "w4a4", parse_steps([{"mixed": {"budget": 3}}]), Context(lambda: batches, "y"))


def test_a_budget_that_nothing_meets_is_refused_before_the_measurement_and_names_one_that_works():
    model, batches, ops = small()
    said: list[str] = []
    context = Context(lambda: batches, "y", progress=said.append)
    with pytest.raises(PlanError, match=r"Expected: at least ([\d.]+), every op at its cheapest") as caught:
        run_passes(model, ops, "w4a4", parse_steps([{"mixed": {"budget": 3.1, "unit": "weight_bits"}}]), context)
    assert not [text for text in said if text.startswith("sensitivity")]
    least = float(re.search(r"at least ([\d.]+),", str(caught.value))[1])
    run_passes(model, ops, "w4a4", parse_steps([{"mixed": {"budget": least, "unit": "weight_bits"}}]), context)
    costs = {"a": {"x": 1 / 3}, "b": {"x": 1 / 7}}
    with pytest.raises(PlanError) as caught:
        assign(costs, costs, 0.1)
    assign(costs, costs, float(re.search(r"at least ([\d.]+),", str(caught.value))[1]))
