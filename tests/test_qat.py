"""QAT against the simulation: the same forward bit for bit, straight-through gradients, nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from s2d_deploy.calibrate import calibrate
from s2d_deploy.condition import condition
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError
from s2d_deploy.plan import Plan
from s2d_deploy.qat import FakeQuantization, plan_from_state, plan_state
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.s2d import S2DConfig
from s2d_deploy.simulation import simulate


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=3,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def batches(seed: int = 0) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.randn(6, 1, 8, 8, generator=g), "labels": torch.randint(0, 3, (6,), generator=g)}
        for _ in range(3)
    ]


def pixels(seed: int = 0) -> list[dict[str, Tensor]]:
    return [{"pixel_values": batch["pixel_values"]} for batch in batches(seed)]


def make_plan(model: nn.Module, precision: str = "w4a4", granularity: str = "tensor") -> Plan:
    ops = discover(model, pixels()[0], "logits")
    config = QuantizeConfig(activation_granularity=granularity)  # type: ignore[arg-type]
    return build_plan(model, ops, calibrate(model, ops, pixels()), precision, config)


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a4", "w3a4", "w4a16"])
@pytest.mark.parametrize("granularity", ["tensor", "token"])
def test_the_forward_pass_and_its_gradients_are_the_simulations(precision: str, granularity: str) -> None:
    model = vit()
    if precision == "w4a16":
        plan = build_plan(
            model,
            ops := discover(model, pixels()[0], "logits"),
            calibrate(model, ops, pixels()),
            precision,
            QuantizeConfig(block_size=16),
        )
    else:
        plan = make_plan(model, precision, granularity)
    simulated, quantized = simulate(model, plan), FakeQuantization(model, plan)
    batch = batches(1)[0]
    simulated(**batch).loss.backward()
    with quantized.active():
        result = model(**batch)
        result.loss.backward()
    assert torch.equal(result.logits, simulated(**batch).logits)
    gradients = {name: p.grad for name, p in simulated.named_parameters()}
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    assert not torch.equal(model(**batch).logits, result.logits)  # outside the block it is float


def test_nothing_is_left_behind() -> None:
    model, untouched = vit(), vit()
    names = list(model.state_dict())
    quantized = FakeQuantization(model, make_plan(vit()))
    with pytest.raises(ZeroDivisionError), quantized.active():
        _ = 1 / 0
    quantized.remove()
    assert list(model.state_dict()) == names
    assert torch.equal(model(**pixels()[0]).logits, untouched(**pixels()[0]).logits)
    assert not any("forward" in vars(module) for module in model.modules())


def test_quantizers_compute_in_float32_under_autocast() -> None:
    model = vit()
    quantized = FakeQuantization(model, make_plan(vit(), "w8a8"))
    batch = pixels(1)[0]
    with quantized.active(), torch.no_grad():
        exact = model(**batch).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            coarse = model(**batch).logits
    assert coarse.dtype == torch.bfloat16
    assert float((exact - coarse.float()).norm() / exact.norm()) < 0.1


def test_a_plan_survives_the_checkpoint() -> None:
    plan = make_plan(vit())
    again = plan_from_state(plan_state(plan))
    again.info = plan.info
    assert again.digest() == plan.digest()


def test_errors() -> None:
    plan = make_plan(vit())
    with pytest.raises(ModelError, match=r"of the plan is not in this model.*Fix: use the plan's own model"):
        FakeQuantization(nn.Sequential(nn.Linear(2, 2)), plan)
    other = vit()
    other.classifier = nn.Linear(16, 4)
    with pytest.raises(ModelError, match=r"layer 'classifier': the plan's weight scale does not fit.*calibrate"):
        FakeQuantization(other, plan)


def test_qat_trains_the_float_weights_and_helps_the_quantized_model(tmp_path: object) -> None:
    """Distillation at 3 bits: the simulated model comes nearer to the float original than without training."""
    original = vit()

    def error(model: nn.Module) -> float:
        simulated = simulate(model, make_plan(model, "w3a4"))
        return sum(float((simulated(**b).logits - original(**b).logits).square().sum().detach()) for b in pixels(5))

    model = vit()
    result = condition(
        model,
        "distill",
        lambda: pixels(2),
        pixels(),
        S2DConfig(tau=0.9, refresh_every=10),
        steps=60,
        lr=3e-4,
        plan=lambda twin: make_plan(twin, "w3a4"),
    )
    assert result.method == "distill+qat+s2d-decoupled"
    assert result.losses[-1] < result.losses[0]
    assert error(model) < error(original)
    assert model.config._attn_implementation == original.config._attn_implementation


@pytest.mark.parametrize("remade", [True, False])
def test_an_interrupted_qat_run_resumes_to_the_same_weights(tmp_path: object, remade: bool) -> None:
    path = f"{tmp_path}/state.pt"

    def run(model: nn.Module, **changes: object) -> object:
        plan = make_plan if remade else make_plan(vit())
        config = S2DConfig(tau=0.5, refresh_every=3)
        return condition(model, "task", lambda: batches(2), pixels(), config, steps=8, lr=1e-3, plan=plan, **changes)

    def stop(done: int, *_: object) -> None:
        if done == 5:
            raise KeyboardInterrupt

    whole, broken, resumed = vit(), vit(), vit()
    expected = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(broken, checkpoint_path=path, checkpoint_every=4, progress=stop)
    result = run(resumed, checkpoint_path=path, checkpoint_every=4)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert result.losses == expected.losses  # type: ignore[attr-defined]
