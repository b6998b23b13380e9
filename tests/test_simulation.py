"""The simulation against the same arithmetic written out, and the attention it makes visible."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2d_deploy.attention import attention, use_visible_attention, watching
from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Grid, PerAxis
from s2d_deploy.plan import Op, Plan, Site
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.simulation import recorded_codes, simulate, weight_codes

ABSMAX = QuantizeConfig(weights="absmax", activations="absmax")


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, padding=1, groups=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.conv(x).relu().mean((2, 3)))


def small():
    torch.manual_seed(0)
    model, batch = Small().eval(), {"x": torch.randn(5, 2, 6, 6)}
    ops = discover(model, batch)
    return model, batch, ops, calibrate(model, ops, [batch])


def vit(**changes):
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=3, **{**sizes, **changes})
    return ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 1, 8, 8)}


def through(plan, name, x):
    s = plan.sites[name]
    return dequantize(quantize(x, s.scale, s.zero_point, s.grid), s.scale, s.zero_point, s.grid)


@pytest.mark.parametrize("precision", ["w8a8", "w4a4"])
def test_it_is_the_written_out_arithmetic(precision):
    model, batch, ops, statistics = small()
    plan = build_plan(model, ops, statistics, precision, ABSMAX)
    x = through(plan, "conv.input", batch["x"])
    x = nn.functional.conv2d(x, through(plan, "conv.weight", model.conv.weight), model.conv.bias, 2, 1, 1, 2)
    x = through(plan, "fc.input", x.relu().mean((2, 3)))
    x = nn.functional.linear(x, through(plan, "fc.weight", model.fc.weight), model.fc.bias)
    simulated = simulate(model, plan)
    assert torch.equal(simulated(**batch), x)
    assert not torch.equal(model(**batch), x)


def test_the_model_is_left_as_it_was():
    model, batch, ops, statistics = small()
    before, kinds = model(**batch), [type(m) for m in model.modules()]
    simulated = simulate(model, build_plan(model, ops, statistics, "w4a4", ABSMAX))
    with torch.no_grad():
        for parameter in simulated.parameters():
            parameter.zero_()
    assert torch.equal(model(**batch), before)
    assert [type(m) for m in model.modules()] == kinds
    assert not simulated.training
    assert simulate(model.train(), Plan("fp32", ops)).training


def test_an_empty_plan_changes_no_bit():
    model, batch = vit()
    reference = model(**batch).logits
    ops = discover(model, batch)
    found = simulate(model, Plan("fp32", ops))(**batch).logits
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-6)  # another attention kernel computed the reference


def test_codes_are_those_of_the_inputs():
    model, batch, ops, statistics = small()
    plan = build_plan(model, ops, statistics, "w4a8", ABSMAX)
    simulated = simulate(model, plan)
    with recorded_codes(simulated) as codes:
        simulated(**batch)
    assert set(codes) == {"conv.input", "fc.input"}
    s = plan.sites["conv.input"]
    assert torch.equal(codes["conv.input"], quantize(batch["x"], s.scale, s.zero_point, s.grid))
    assert codes["conv.input"].abs().max() == 127  # absmax of this very batch
    simulated(x=batch["x"] * 0)
    assert codes["conv.input"].abs().max() == 127  # outside of the block nothing is recorded
    weights = weight_codes(simulated)
    assert {n: tuple(c.shape) for n, c in weights.items()} == {"conv.weight": (4, 1, 3, 3), "fc.weight": (3, 4)}
    s = plan.sites["fc.weight"]
    assert torch.equal(weights["fc.weight"], quantize(model.fc.weight, s.scale, s.zero_point, s.grid))


def test_all_four_operands_of_attention_are_quantized():
    model, batch = vit()
    ops = discover(model, batch)
    plan = build_plan(model, ops, calibrate(model, ops, [batch]), "w4a4", ABSMAX)
    simulated = simulate(model, plan)
    with recorded_codes(simulated) as codes:
        simulated(**batch)
    assert set(codes) == {n for n, s in plan.sites.items() if s.role != "weight"}
    name = next(n for n in ops if n.endswith(".scores")).removesuffix(".scores")
    shapes = {o: tuple(codes[f"{name}.{o}"].shape) for o in ("query", "key", "probs", "value")}
    # Keys come transposed, as the product reads them.
    assert shapes == {"query": (2, 2, 5, 8), "key": (2, 2, 8, 5), "probs": (2, 2, 5, 5), "value": (2, 2, 5, 8)}
    assert codes[f"{name}.probs"].min() >= 0
    assert codes[f"{name}.probs"].max() == 15


def test_it_can_be_trained():
    model, batch, ops, statistics = small()
    simulated = simulate(model, build_plan(model, ops, statistics, "w4a4", ABSMAX)).train()
    optimizer = torch.optim.SGD(simulated.parameters(), lr=0.05)
    target, losses = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)), []
    for _ in range(40):
        loss = (simulated(**batch) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in simulated.parameters())
    assert losses[-1] < 0.8 * losses[0]


def test_attention_is_softmax_attention():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 4) for _ in range(3))
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[0, :, :, 3:] = False
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    module, expected = nn.Module(), torch.empty(2, 5, 3, 4)
    for b in range(2):
        for h in range(3):
            for t in range(5):
                seen = [u for u in range(5) if mask[b, 0, t, u]]
                weights = torch.softmax(torch.stack([q[b, h, t] @ k[b, h, u] / 2 for u in seen]), 0)
                expected[b, t, h] = sum(w * v[b, h, u] for w, u in zip(weights, seen, strict=True))
    for given_mask in (mask, additive):
        context, probs = attention(module.eval(), q, k, v, given_mask)
        torch.testing.assert_close(context, expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3, 5), rtol=0, atol=1e-6)


def test_a_watcher_sees_each_operand_in_its_block_only():
    model, batch = vit()
    assert use_visible_attention(model)
    seen = []
    with watching(lambda module, operand, x: seen.append((operand, tuple(x.shape)))):
        model(**batch)
    model(**batch)
    assert [operand for operand, _ in seen] == ["query", "key", "probs", "value"]
    assert not use_visible_attention(nn.Linear(2, 2))


def _plan(op, shape, granularity):
    scale = torch.ones(shape)
    zeros = torch.zeros(shape, dtype=torch.int32)
    name, role = op.sites[1]
    return Plan(
        "w8a8", {op.name: op}, {name: Site(name, op.name, role, Grid(8, granularity=granularity), scale, zeros, "t")}
    )


def test_a_plan_of_another_model_is_refused():
    model = small()[0]
    with pytest.raises(ModelError) as caught:
        simulate(model, _plan(Op("gone", "linear", 4, 3, 12), (3,), PerAxis(0)))
    assert str(caught.value) == (
        "op 'gone' of the plan is not in this model. Expected: linear. Found: nothing of that name. "
        "Fix: use the plan's own model."
    )
    with pytest.raises(ModelError, match=r"op 'x\.scores'.*Expected: an attention module"):
        simulate(model, _plan(Op("x.scores", "scores", 4, 3, 12), (), PerAxis(0)))
    with pytest.raises(ModelError) as caught:
        simulate(model, _plan(Op("fc", "linear", 4, 3, 12), (7,), PerAxis(0)))
    assert "layer 'fc': the plan's weight scale does not fit. Expected: shape (3,) for a weight of (3, 4). " in str(
        caught.value
    )
