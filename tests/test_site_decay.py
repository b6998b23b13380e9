"""Pressing at the quantized sites: planted outliers are found and pressed, nothing else moves, runs resume."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
import torch
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertPooler

from s2d_deploy.condition import condition
from s2d_deploy.errors import DataError, ModelError, RecipeError
from s2d_deploy.recipe import parse_recipe
from s2d_deploy.s2d import S2D
from s2d_deploy.s2d_config import S2DConfig
from s2d_deploy.site_decay import Component, SiteDecay

CONFIG = S2DConfig(select="sites", decoupled_factor=10.0, refresh_every=4, refresh_batches=None)
CHANNEL, NEURON = 5, 7


class Block(nn.Module):
    """Pre-LN perceptron with a residual: norm -> fc1 -> GELU -> fc2."""

    def __init__(self, width: int = 32, hidden: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(self.norm(x))))


def batches(seed: int = 0, count: int = 3) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(16, 8, 32, generator=g)} for _ in range(count)]


def with_gain() -> Block:
    model = Block()
    with torch.no_grad():
        model.norm.weight[CHANNEL] = 30.0
        model.fc1.weight[:, CHANNEL] /= 30.0
    return model


def with_neuron() -> Block:
    model = Block()
    with torch.no_grad():
        model.fc1.bias[NEURON] = 20.0  # no triplet makes it
        model.fc2.weight[:, NEURON] /= 20.0
    return model


def with_triplet() -> Block:
    """Few tokens carry a direction that one triplet of fc1 spreads over all neurons."""
    model = Block()
    planted.rank_one(model.fc1, torch.linspace(-1, 1, 32), 40.0)
    return model


def triplet_batches() -> list[dict[str, Tensor]]:
    found = batches()
    direction = torch.linspace(-1, 1, 32)
    direction = direction / direction.norm()
    for batch in found:
        x = batch["x"]
        x -= (x @ direction)[..., None] * direction  # the bulk does not use it
        x[0, 0] += 12 * direction
    return found


def names(decay: SiteDecay) -> dict[str, Component]:
    return {f"{c.kind} {c.module}": c for c in decay.components}


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    old = before.state_dict()
    return {name for name, value in after.state_dict().items() if not torch.equal(value, old[name])}


def selected(model: nn.Module, data: list[dict[str, Tensor]] | None = None) -> SiteDecay:
    decay = SiteDecay(model, CONFIG)
    decay.select(data or batches())
    return decay


def pressed(decay: SiteDecay, steps: int, lr: float = 1e-3) -> None:
    for _ in range(steps):
        decay.before_step()
        decay.after_step(lr)


def test_a_gain_is_pressed_and_taken_back_exactly() -> None:
    model = with_gain()
    decay = selected(model)
    found = names(decay)["gain norm"]
    assert found.channels[0] == CHANNEL
    assert found.excess[0] > 5
    assert decay.flagged[found.name] == len(found.channels)
    start = copy.deepcopy(model)
    site = planted.captured_input(model, "fc1", batches()[0]).abs().max()
    pressed(decay, 3)
    # No other parameter moves: the gain, its bias, and the reader's column.
    assert changed(start, model) <= {"norm.weight", "norm.bias", "fc1.weight"}
    rest = [i for i in range(32) if i not in found.channels]
    assert torch.equal(model.norm.weight[rest], start.norm.weight[rest])
    assert torch.equal(model.fc1.weight[:, rest], start.fc1.weight[:, rest])
    assert abs(float(model.norm.weight.detach()[CHANNEL])) < 0.8 * 30
    assert planted.captured_input(model, "fc1", batches()[0]).abs().max() < 0.8 * site
    x = batches(9)[0]["x"]
    torch.testing.assert_close(model(x), start(x), rtol=1e-4, atol=1e-4)


def test_a_gain_is_pressed_to_the_height_of_the_others_and_no_further() -> None:
    model = with_gain()
    decay = selected(model)
    found = names(decay)["gain norm"]
    for _ in range(200):
        decay.after_step(1e-2)
    assert found.excess == pytest.approx([1.0] * len(found.excess), abs=1e-5)
    site = planted.captured_input(model, "fc1", batches()[0]).abs().flatten(0, 1).amax(0)
    assert 0.5 < float(site[CHANNEL] / site.max()) <= 1.0 + 1e-5


def test_a_step_takes_the_share_of_the_rule() -> None:
    model = with_gain()
    decay = selected(model)
    found = names(decay)["gain norm"]
    r, gain = found.excess[0], model.norm.weight.detach()[CHANNEL].clone()
    decay.after_step(1e-3)
    assert float(model.norm.weight.detach()[CHANNEL] / gain) == pytest.approx(1 - 1e-3 * 10 * r, rel=1e-5)
    assert found.excess[0] == pytest.approx(r * (1 - 1e-3 * 10 * r))


def test_a_neuron_behind_gelu_is_pressed_alone() -> None:
    model = with_neuron()
    decay = selected(model)
    found = names(decay)["neuron fc1"]
    assert found.channels[0] == NEURON
    assert found.activation == "act"
    start = copy.deepcopy(model)
    site = planted.captured_input(model, "fc2", batches()[0]).abs().max()
    pressed(decay, 3)
    assert changed(start, model) == {"fc1.weight", "fc1.bias", "fc2.weight"}
    rest = [i for i in range(64) if i not in found.channels]
    assert torch.equal(model.fc1.weight[rest], start.fc1.weight[rest])
    assert torch.equal(model.fc2.weight[:, rest], start.fc2.weight[:, rest])
    assert planted.captured_input(model, "fc2", batches()[0]).abs().max() < 0.9 * site


def test_a_triplet_is_found_at_the_site_behind_gelu() -> None:
    model = with_triplet()
    decay = selected(model, triplet_batches())
    found = names(decay)["triplet fc1"]
    assert (found.k, found.sites) == (1, ["fc2.input"])
    assert found.pcdr[0] > 0.95
    start = copy.deepcopy(model)
    before = torch.linalg.svdvals(start.fc1.weight.detach())
    for _ in range(3):
        decay.after_step(1e-3)
    assert changed(start, model) == {"fc1.weight"}
    after = torch.linalg.svdvals(model.fc1.weight.detach())
    expected = float(before[0])
    for _ in range(3):
        expected -= min(1e-2 * expected**2, 0.5 * expected)
    assert float(after[0]) == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(after[1:], before[1:], rtol=1e-4, atol=1e-5)


def test_centring_is_exact_in_post_norm_models() -> None:
    model = planted.bert()
    layer = model.get_submodule("encoder.layer.0.attention.output.LayerNorm")
    with torch.no_grad():
        layer.bias[3] += 25.0
        layer.bias[4] -= 10.0
    start = copy.deepcopy(model)
    decay = selected(model, planted.texts())
    assert "encoder.layer.0.attention.output.LayerNorm" in decay.centred
    assert abs(float(layer.bias.detach()[3])) < 5
    for batch in planted.texts(seed=8):
        kept = batch["attention_mask"].bool()
        wanted, got = start(**batch).last_hidden_state[kept], model(**batch).last_hidden_state[kept]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_a_gain_of_a_post_norm_model_is_pressed() -> None:
    model = planted.bert()
    norm = "encoder.layer.0.output.LayerNorm"
    with torch.no_grad():
        model.get_submodule(norm).weight[CHANNEL] = 25.0
    decay = selected(model, planted.texts())
    found = names(decay)[f"gain {norm}"]
    assert CHANNEL in found.channels
    assert found.residual in ("stream", "readers")
    before = planted.captured_input(model, "encoder.layer.1.attention.self.key", planted.texts()[0]).abs().max()
    pressed(decay, 3)
    after = planted.captured_input(model, "encoder.layer.1.attention.self.key", planted.texts()[0]).abs().max()
    assert after < 0.8 * before


def test_the_gain_of_the_model_s_output_is_left_alone() -> None:
    model = planted.bert(layers=1)
    model.pooler = BertPooler(model.config)  # reads it as a Linear, beside the output itself
    norm = "encoder.layer.0.output.LayerNorm"
    with torch.no_grad():
        model.get_submodule(norm).weight[CHANNEL] = 25.0
    decay = selected(model, planted.texts())
    assert f"gain {norm}" not in names(decay)
    assert norm not in decay.centred


def test_what_is_frozen_or_shared_stays() -> None:
    frozen = with_gain()
    frozen.norm.weight.requires_grad_(False)
    assert "gain norm" not in names(selected(frozen))
    shared = with_neuron()
    shared.twin = shared.fc1  # the same module under a second name is one module
    other = nn.Linear(32, 64)
    other.weight = shared.fc1.weight
    shared.other = other
    start = copy.deepcopy(shared)
    decay = selected(shared)
    assert "neuron fc1" not in names(decay)
    pressed(decay, 2)
    assert torch.equal(start.fc1.weight, shared.fc1.weight)


def test_no_outlier_no_component() -> None:
    model = Block()
    start = copy.deepcopy(model)
    decay = selected(model)
    assert decay.components == []
    pressed(decay, 5)
    assert changed(start, model) <= {"norm.bias", "fc1.bias"}  # centred


class Killed(Exception):
    """A stand-in for SIGKILL between two steps."""


@pytest.mark.parametrize("make", [with_gain, with_neuron, with_triplet])
def test_a_resumed_run_ends_with_the_same_weights(make: Callable[[], Block], tmp_path: Path) -> None:
    data = triplet_batches() if make is with_triplet else batches()

    def run(model: nn.Module, path: Path | None, stop: int | None = None) -> list[float]:
        def progress(done: int, _total: int, _loss: float) -> None:
            if done == stop:
                raise Killed

        result = condition(
            model, "distill", lambda: data, data, CONFIG, steps=10, lr=1e-3, seed=1,
            checkpoint_path=path, checkpoint_every=3, progress=progress,
        )  # fmt: skip
        assert result.method == "distill+s2d-sites"
        assert result.findings[-1].startswith("Pressed at the quantized sites")
        return result.losses

    straight, resumed = make(), make()
    wanted = run(straight, None)
    with pytest.raises(Killed):
        run(resumed, tmp_path / "c.pt", stop=7)
    resumed = make()
    assert run(resumed, tmp_path / "c.pt") == wanted
    assert changed(straight, resumed) == set()


def test_training_brings_the_function_back() -> None:
    model, data = with_neuron(), batches()
    start = copy.deepcopy(model)
    result = condition(model, "distill", lambda: data, data, CONFIG, steps=60, lr=2e-3)
    x = batches(9)[0]["x"]
    with torch.no_grad():
        error = float((model(x) - start(x)).square().mean() / start(x).var())
    assert error < 0.01
    assert result.steps == 60
    site = [float(planted.captured_input(m, "fc2", data[0]).abs().max()) for m in (start, model)]
    assert site[1] < 0.6 * site[0]


def test_refusals() -> None:
    with pytest.raises(RecipeError, match="SiteDecay presses at the sites"):
        SiteDecay(Block(), S2DConfig())
    with pytest.raises(RecipeError, match="S2D presses by the paper's rule"):
        S2D(Block(), CONFIG)
    with pytest.raises(RecipeError, match="application out of range"):
        S2DConfig(select="sites", application="coupled")
    with pytest.raises(RecipeError, match="split out of range"):
        S2DConfig(select="sites", split={"*": 2})
    with pytest.raises(RecipeError, match="'paper' or 'sites'"):
        S2DConfig(select="site")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="has not chosen its components yet"):
        SiteDecay(Block(), CONFIG).before_step()
    with pytest.raises(DataError, match="holds no batch"):
        SiteDecay(Block(), CONFIG).select([])
    with pytest.raises(ModelError, match="no Linear or Conv layer called 'fc9'"):
        SiteDecay(Block(), CONFIG, ["fc9"])
    broken = Block()
    with torch.no_grad():
        broken.fc2.weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match="fc2"):
        SiteDecay(broken, CONFIG).select(batches())


def test_a_state_of_another_run_is_refused() -> None:
    state = selected(with_gain()).state_dict()
    with pytest.raises(RecipeError, match="made with another n"):
        SiteDecay(Block(), S2DConfig(**{**CONFIG.to_dict(), "n": 3})).load_state_dict(state, batches())
    state["components"][0]["module"] = "elsewhere"
    with pytest.raises(ModelError, match="modules that the model has not: elsewhere"):
        SiteDecay(Block(), CONFIG).load_state_dict(state, batches())


def test_bfloat16_weights_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        SiteDecay(Block().bfloat16(), CONFIG)
    assert "keep them in float32" in caplog.text


def test_the_recipe_key() -> None:
    document = {
        "name": "x",
        "model": {"pretrained": "p", "task": "embedding"},
        "data": {"kind": "text", "path": "t.txt"},
        "condition": {"objective": "distill", "select": "sites"},
        "targets": ["ort"],
    }
    assert parse_recipe(document).condition.select == "sites"
    document["condition"] = {"objective": "distill", "select": "sites", "application": "coupled"}
    with pytest.raises(RecipeError, match="sites is always decoupled"):
        parse_recipe(document)
