"""Norm tweaking: its loss against loops, its gradient, its bounds, and that statistics do get closer."""

from __future__ import annotations

import pytest
import tiny_quantized as tiny
import torch
from torch import nn

from s2d_deploy.errors import ModelError
from s2d_deploy.ptq.norm_tweaking import channel_statistics, compared, norm_order, statistics_loss
from s2d_deploy.simulation import simulate


def total(found, context, model) -> list[float]:
    """Loss in front of every norm and at the output, over all batches."""
    simulated = simulate(found.model, found.plan).eval()
    places = [*norm_order(model, next(iter(context.batches())))[1:], None]
    losses = []
    with torch.no_grad():
        for place in places:
            each = []
            for batch in context.batches():
                target = channel_statistics(compared(model, place, batch, context.output), batch)
                each.append(statistics_loss(compared(simulated, place, batch, context.output), batch, target))
            losses.append(float(torch.stack(each).mean()))
    return losses


def test_statistics_leave_padding_out():
    torch.manual_seed(0)
    x, mask = torch.randn(3, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    mean, variance = channel_statistics(x, {"attention_mask": mask})
    for c in range(2):
        values = [float(x[i, j, c]) for i in range(3) for j in range(4) if mask[i, j]]
        m = sum(values) / len(values)
        assert float(mean[c]) == pytest.approx(m, abs=1e-6)
        assert float(variance[c]) == pytest.approx(sum((v - m) ** 2 for v in values) / len(values), abs=1e-6)


def test_the_loss_is_equation_2():
    torch.manual_seed(0)
    x, y = torch.randn(5, 3), torch.randn(5, 3) * 2
    target = channel_statistics(y, {})
    wanted = sum(
        abs(float(x[:, c].mean() - y[:, c].mean()))
        + abs(float(x[:, c].var(unbiased=False) - y[:, c].var(unbiased=False)))
        for c in range(3)
    )
    assert float(statistics_loss(x, {}, target)) == pytest.approx(wanted / 3, rel=1e-5)


@pytest.mark.parametrize(("kind", "precision"), [("bert", "w4a4"), ("vit", "w4a16"), ("bert", "w4a16")])
def test_statistics_get_closer(kind: str, precision: str):
    options = {"epochs": 6, "learning_rate": 5e-3, "bound": 0.05}
    found, context, model = tiny.run(kind, precision, [{"norm_tweaking": options}], block_size=8)
    plain, _, _ = tiny.run(kind, precision, [], block_size=8)
    losses = found.plan.info["norm_tweaking"]["loss"]
    assert list(losses) == norm_order(model, next(iter(context.batches())))
    assert all(after <= before for before, after in losses.values())
    assert total(found, context, model)[-1] < total(plain, context, model)[-1]
    # The first norm was tuned with everything before it as it is: what it reports is what is found.
    first, norms = next(iter(losses)), {n for n, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    assert total(found, context, model)[0] == pytest.approx(losses[first][1], rel=1e-3)
    for name, tensor in plain.model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        moved = (found.model.state_dict()[name] - tensor).abs()
        if layer not in norms:
            assert not moved.any(), name
            continue
        gain = plain.model.get_submodule(layer).weight.detach()
        limit = 0.05 * (gain.abs() if leaf == "weight" else gain.square().mean().sqrt())
        assert bool((moved <= limit * (1 + 1e-5) + 1e-7).all()), name


def test_a_step_that_does_not_help_is_taken_back():
    options = {"epochs": 1, "learning_rate": 10.0, "bound": 1.0}
    found, _, _ = tiny.run("bert", "w4a16", [{"norm_tweaking": options}], block_size=8)
    plain, _, _ = tiny.run("bert", "w4a16", [], block_size=8)
    kept = [name for name, (b, a) in found.plan.info["norm_tweaking"]["loss"].items() if b == a]
    assert kept
    for name in kept:
        assert torch.equal(found.model.get_submodule(name).weight, plain.model.get_submodule(name).weight)


def test_it_follows_a_pass_that_chose_codes_and_leaves_them():
    found, _, _ = tiny.run("bert", "w4a4", ["gptq", "norm_tweaking"])
    codes, _, _ = tiny.run("bert", "w4a4", ["gptq"])
    for site in [s for s in found.plan.sites.values() if s.role == "weight"]:
        assert torch.equal(found.model.get_submodule(site.op).weight, codes.model.get_submodule(site.op).weight)


def test_twice_the_same():
    states = [tiny.run("bert", "w4a4", ["norm_tweaking"])[0].model.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_a_model_without_norms():
    with pytest.raises(ModelError, match=r"norm_tweaking found nothing to tune.*take norm_tweaking out"):
        tiny.run("conv", "w4a4", ["norm_tweaking"])
