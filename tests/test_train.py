"""Training from scratch."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from s2d_deploy.data import Samples
from s2d_deploy.errors import DataError, ModelError
from s2d_deploy.recipe import TrainSection
from s2d_deploy.train import train


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.fc(x)}


def separable(n: int = 60) -> Samples:
    labels = torch.arange(n) % 3
    x = torch.eye(4)[labels] + 0.1 * torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return Samples(lambda index: {"x": x[list(index)]}, labels, n)


def quiet(_done: int, _total: int, _note: str) -> None:
    return


def test_the_loss_falls_and_the_model_ends_in_evaluation_mode() -> None:
    model, seen = Classifier(), []
    section = TrainSection(epochs=5, learning_rate=0.5, batch_size=8)
    losses = train(model, "logits", separable(), section, lambda done, total, note: seen.append((done, total, note)))
    assert len(losses) == 5
    assert losses[0] > 5 * losses[-1]
    assert not model.training
    assert seen == [(i + 1, 5, f"loss {loss:.4f}") for i, loss in enumerate(losses)]


def test_the_first_epochs_loss_is_the_mean_over_samples_not_over_batches() -> None:
    model = Classifier()
    batches = list(separable(5).labelled_batches(5))
    with torch.no_grad():
        expected = float(nn.functional.cross_entropy(model(batches[0]["x"])["logits"], batches[0]["labels"]))
    # A rate so small that the weights stay; 5 samples in batches of 3 and 2.
    losses = train(model, "logits", separable(5), TrainSection(epochs=1, learning_rate=1e-12, batch_size=3), quiet)
    assert losses[0] == pytest.approx(expected, rel=1e-5)


def test_training_repeats_bit_for_bit_by_seed() -> None:
    models = [Classifier() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.rand(seed)  # the state of the global generator before must not matter
        train(model, "logits", separable(), TrainSection(epochs=2, seed=seed, batch_size=16), quiet)
    assert torch.equal(models[0].fc.weight, models[1].fc.weight)
    assert not torch.equal(models[0].fc.weight, models[2].fc.weight)


def test_a_single_step_trains() -> None:
    model = Classifier()
    before = model.fc.weight.detach().clone()
    losses = train(model, "logits", separable(2), TrainSection(epochs=1), quiet)
    assert math.isfinite(losses[0])
    assert not torch.equal(before, model.fc.weight)


def test_a_loss_that_leaves_the_numbers_is_named() -> None:
    model = Classifier()
    with torch.no_grad():
        model.fc.weight.fill_(math.inf)
    with pytest.raises(
        ModelError, match=r"^training: the loss became nan in epoch 1\. Fix: lower train\.learning_rate\.$"
    ):
        train(model, "logits", separable(), TrainSection(epochs=1), quiet)


def test_data_without_labels_and_unknown_outputs_are_refused() -> None:
    unlabelled = Samples(separable().load, None, 60)
    with pytest.raises(DataError, match="this data has no labels"):
        train(Classifier(), "logits", unlabelled, TrainSection(epochs=1), quiet)
    with pytest.raises(ModelError, match=r"the model has no output 'scores'\..*Found: logits"):
        train(Classifier(), "scores", separable(), TrainSection(epochs=1), quiet)
