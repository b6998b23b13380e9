"""Conditioning of a small transformer with a planted outlier: what it changes, resumes, and refuses."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from s2d_deploy import checkpointing
from s2d_deploy.condition import condition, learning_rate
from s2d_deploy.distill import distillation_loss, gives_hidden_states, output_tensors
from s2d_deploy.errors import ArtifactError, DataError, ModelError, RecipeError, StageError
from s2d_deploy.s2d import S2DConfig

CONFIG = S2DConfig(tau=0.9, refresh_every=4, decoupled_factor=2.0, outliers=16)


def vit(*, planted: bool = True) -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        image_size=8, patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.1,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    if planted:
        layer = dict(model.named_modules())[name_of_planted(model)]
        u, s, vh = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
        s[0] = 12.0
        with torch.no_grad():
            layer.weight.copy_((u * s) @ vh)
    return model.eval()


def name_of_planted(model: nn.Module) -> str:
    """The second MLP layer of block 0, whatever this transformers version calls it: [16, 32]."""
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.shape == (16, 32)]
    return names[0]


def batches(*, labels: bool = False, seed: int = 0) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(5):
        batch = {"pixel_values": torch.randn(4, 1, 8, 8, generator=g)}
        if labels:
            batch["labels"] = torch.randint(0, 3, (4,), generator=g)
        result.append(batch)
    return result


def run(model: nn.Module, objective: Any = "distill", config: S2DConfig | None = CONFIG, **changes: Any) -> Any:
    train = batches(labels=objective == "task", seed=1)
    arguments = {"steps": 12, "lr": 1e-3, "warmup": 2, "seed": 3, **changes}
    return condition(model, objective, lambda: train, batches(), config, **arguments)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_distillation_presses_the_planted_layer_and_keeps_the_function() -> None:
    model, original = vit(), vit()
    name = name_of_planted(model)
    result = run(model, steps=40, lr=2e-3, metric=lambda m: float(m(**batches()[0]).logits.detach().norm()))
    layer = next(entry for entry in result.layers if entry["name"] == name)
    assert (layer["flagged"], layer["k_target"]) == (True, 1)
    assert layer["before"]["sigma_max"] == pytest.approx(12.0, rel=1e-3)
    assert layer["after"]["sigma_max"] < 10
    assert layer["after"]["max_abs_activation"] < layer["before"]["max_abs_activation"]
    with torch.no_grad():
        x = batches(seed=9)[0]
        got, wanted = model(**x).logits, original(**x).logits
    assert float(torch.nn.functional.cosine_similarity(got, wanted).mean()) > 0.98
    assert result.method == "distill+s2d-decoupled"
    assert result.steps == len(result.losses) == 40
    assert [entry["step"] for entry in result.refreshes] == list(range(0, 40, 4))
    assert result.float_before is not None
    assert result.float_after is not None
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    measured = {"pcdr", "sigma_max", "max_abs_activation", "kurtosis", "singular_values"}
    assert all(measured <= set(entry[when]) for entry in document["layers"] for when in ("before", "after"))
    assert {"name", "flagged", "k_target"} <= set(document["layers"][0])


def test_task_objective_trains_and_modes_and_generator_are_left_alone() -> None:
    model = vit()
    state = torch.get_rng_state()
    seen: list[tuple[int, int, float]] = []
    result = run(model, "task", S2DConfig(tau=0.9, application="coupled"), progress=lambda *a: seen.append(a))
    assert result.method == "task+s2d-coupled"
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in model.modules())
    assert [entry[:2] for entry in seen] == [(done, 12) for done in range(1, 13)]
    assert [entry[2] for entry in seen] == result.losses
    assert not equal(model, vit())


def test_the_control_runs_without_s2d_and_a_function_is_an_objective() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).logits.square().mean()

    result = run(vit(), loss, None)
    assert (result.method, result.refreshes, result.findings) == ("custom", [], [])
    assert result.losses[-1] < result.losses[0]


@pytest.mark.parametrize("objective", ["task", "distill"])
def test_deterministic_by_seed(objective: str) -> None:
    first, second, other = vit(), vit(), vit()
    torch.manual_seed(11)
    run(first, objective)
    torch.manual_seed(22)
    run(second, objective)
    assert equal(first, second)
    if objective == "task":  # dropout is active there
        run(other, objective, seed=4)
        assert not equal(first, other)


@pytest.mark.parametrize("objective", ["task", "distill"])
def test_an_interrupted_run_resumes_to_the_same_weights(objective: str, tmp_path: Path) -> None:
    whole, broken, resumed = vit(), vit(), vit()
    expected = run(whole, objective)
    path = tmp_path / "deep" / "state.pt"

    def interrupt(done: int, steps: int, loss: float) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(broken, objective, checkpoint_path=path, checkpoint_every=3, progress=interrupt)
    seen: list[int] = []
    result = run(
        resumed, objective, checkpoint_path=path, checkpoint_every=3, progress=lambda done, *_: seen.append(done)
    )
    assert seen == list(range(7, 13))
    assert equal(whole, resumed)
    assert result.losses == expected.losses
    assert result.layers == expected.layers
    assert result.refreshes == expected.refreshes
    assert list(path.parent.iterdir()) == [path]
    again = vit()
    assert run(again, objective, checkpoint_path=path, progress=lambda *a: pytest.fail("a step was taken")).steps == 12
    assert equal(whole, again)


def test_a_foreign_or_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run(vit(), checkpoint_path=path, steps=3)
    with pytest.raises(ArtifactError, match=r"state.pt belongs to another run.*Fix: remove it"):
        run(vit(), checkpoint_path=path, steps=4)
    with pytest.raises(ArtifactError, match="belongs to another run"):
        run(vit(planted=False), checkpoint_path=path, steps=3)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"state.pt is not a readable checkpoint.*Fix: remove it"):
        run(vit(), checkpoint_path=path, steps=3)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StageError, match=r"folder of the checkpoint .*state.pt cannot be made"):
        run(vit(), checkpoint_path=blocked / "state.pt", progress=lambda *a: pytest.fail("too late"))
    folder = tmp_path / "folder.pt"
    (folder / "inside").mkdir(parents=True)
    with pytest.raises(StageError, match=r"folder.pt cannot be written"):
        checkpointing.save(folder, {"fingerprint": ""})
    assert not (tmp_path / "folder.pt.part").exists()


def test_nothing_flagged_is_a_finding() -> None:
    model = vit(planted=False)
    only = [name_of_planted(model)]
    result = run(model, layers=only)
    assert result.steps == 0
    assert equal(model, vit(planted=False))
    assert result.findings[0].startswith("No layer is flagged: no PCDR_k with k <= 3 reaches tau = 0.9")
    assert "no step was taken" in result.findings[1]
    trained = run(vit(planted=False), "task", layers=only)
    assert trained.steps == 12
    assert len(trained.findings) == 1


def test_data_that_runs_out_is_begun_anew() -> None:
    epochs: list[int] = []

    def factory() -> Iterable[dict[str, Tensor]]:
        epochs.append(len(epochs))
        return iter(batches(seed=len(epochs)))

    condition(vit(), "distill", factory, batches(), CONFIG, steps=11, lr=1e-3)
    assert epochs == [0, 1, 2]


def test_a_loss_that_becomes_nan_stops_and_keeps_the_last_good_weights() -> None:
    model = vit()
    kept: list[dict[str, Tensor]] = []

    def loss(m: nn.Module, batch: Any) -> Tensor:
        kept.append(copy.deepcopy(m.state_dict()))
        value = m(**batch).logits.square().mean()
        return value * float("nan") if len(kept) == 6 else value

    with pytest.raises(ModelError, match=r"stopped at step 6 of 12: the loss is nan.*largest growth.*by a factor of"):
        run(model, loss, steps=12)
    assert all(torch.equal(value, kept[4][name]) for name, value in model.state_dict().items())


def test_an_interrupted_save_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, saves = tmp_path / "state.pt", []
    really = torch.save

    def killed(state: Any, file: Any) -> None:
        saves.append(len(state["losses"]))
        if len(saves) == 2:
            file.write(b"half of a checkpoint")
            raise KeyboardInterrupt
        really(state, file)

    expected = run(whole := vit())
    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        run(vit(), checkpoint_path=path, checkpoint_every=4)
    assert saves == [4, 8]
    assert torch.load(path, weights_only=True)["losses"] == expected.losses[:4]
    run(resumed := vit(), checkpoint_path=path, checkpoint_every=4)
    assert saves == [4, 8, 8, 12]
    assert equal(whole, resumed)
    assert list(tmp_path.iterdir()) == [path]  # the half one was overwritten and renamed


def test_nan_names_the_checkpoint_that_is_left(tmp_path: Path) -> None:
    calls: list[int] = []

    def loss(m: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        return m(**batch).logits.square().mean() * (float("nan") if len(calls) == 6 else 1.0)

    path = tmp_path / "state.pt"
    with pytest.raises(ModelError, match=r"stopped at step 6.*; .*state.pt holds the last checkpoint"):
        run(vit(), loss, checkpoint_path=path, checkpoint_every=2)
    assert len(torch.load(path, weights_only=True)["losses"]) == 4


def test_a_dead_layer_is_left_alone() -> None:
    model = vit()
    dead = next(n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m.weight.shape == (32, 16))
    with torch.no_grad():
        dict(model.named_modules())[dead].weight.zero_()
    result = run(model, steps=4)
    layer = next(entry for entry in result.layers if entry["name"] == dead)
    assert not layer["flagged"]
    assert layer["before"]["pcdr"] == [0.0, 0.0, 0.0]
    assert any(entry["flagged"] for entry in result.layers)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights() -> None:
    model = vit()

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return (0 * m(**batch).logits.sum()).abs().sqrt()  # 0, with a gradient of inf * 0

    with pytest.raises(ModelError, match="stopped at step 1 of 12: the gradient's norm is nan at a loss of 0"):
        run(model, loss)
    assert equal(model, vit())


def test_the_schedule() -> None:
    rates = [learning_rate(s, steps=10, lr=1.0, warmup=4) for s in range(10)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[7] == pytest.approx(0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[9] > 0
    assert learning_rate(0, steps=1, lr=1.0, warmup=0) == 1.0


def test_errors() -> None:
    with pytest.raises(RecipeError, match=r"conditioning: steps, lr out of range.*steps=0; lr=-1"):
        run(vit(), steps=0, lr=-1, warmup=0)
    with pytest.raises(RecipeError, match="warmup at least 0 and below steps"):
        run(vit(), steps=2, warmup=2)
    with pytest.raises(RecipeError, match="unknown objective 'imitate'"):
        run(vit(), "imitate")
    with pytest.raises(DataError, match=r"gave no loss.*use the objective 'distill'"):
        condition(vit(), "task", batches, batches(), CONFIG, steps=2, lr=1e-3)
    with pytest.raises(DataError, match="training data holds no batch"):
        condition(vit(), "distill", list, batches(), CONFIG, steps=2, lr=1e-3)
    exhausted = iter(batches())
    with pytest.raises(DataError, match="must not return the same exhausted generator"):
        condition(vit(), "distill", lambda: exhausted, batches(), CONFIG, steps=9, lr=1e-3)


def test_outputs_to_imitate() -> None:
    model = vit()
    assert gives_hidden_states(model)
    output = model(**batches(labels=True)[0], output_hidden_states=True)
    assert [name for name, _ in output_tensors(output)] == ["logits", *[f"hidden_states.{i}" for i in range(3)]]
    plain = torch.zeros(2)
    assert output_tensors(plain) == [("output", plain)]
    assert [n for n, _ in output_tensors({"a": [plain, plain], "b": torch.ones(2), "c": torch.arange(2)})] == [
        "a.0",
        "b",
    ]
    assert not gives_hidden_states(nn.Linear(2, 2))


def test_distillation_loss_is_relative_and_leaves_padding_out() -> None:
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(2, 5, 3, generator=g)
    student = teacher + 0.1 * torch.randn(2, 5, 3, generator=g)
    slow = float((student - teacher).square().mean() / teacher.var(unbiased=False))
    assert float(distillation_loss([("h", student)], [("h", teacher)])) == pytest.approx(slow)
    scaled = distillation_loss([("h", 100 * student)], [("h", 100 * teacher)])
    assert float(scaled) == pytest.approx(slow, rel=1e-4)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    student[1, 2:] = 1e6
    kept = mask.bool()
    masked = float((student[kept] - teacher[kept]).square().mean() / teacher[kept].var(unbiased=False))
    assert float(distillation_loss([("h", student)], [("h", teacher)], mask)) == pytest.approx(masked)
    with pytest.raises(ModelError, match=r"same floating-point outputs.*Expected: h.*Found: g"):
        distillation_loss([("g", student)], [("h", teacher)])


def test_a_plain_model_with_tensor_output() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)
            with torch.no_grad():
                self.fc.weight.add_(5 * torch.ones(6, 6) / 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)

    torch.manual_seed(0)
    data = [{"x": torch.randn(8, 6) + 1}]
    result = condition(Plain(), "distill", lambda: data, data, CONFIG, steps=5, lr=1e-3)
    assert result.layers[0]["flagged"]
    assert result.layers[0]["after"]["sigma_max"] < result.layers[0]["before"]["sigma_max"]
