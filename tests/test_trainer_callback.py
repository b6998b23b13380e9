"""The callback in a real Trainer: once for each optimizer step, resumed to the same weights, stopped in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from s2d_deploy.errors import ArtifactError, ModelError
from s2d_deploy.s2d import S2D, S2DConfig
from s2d_deploy.trainer_callback import S2DCallback

CONFIG = S2DConfig(tau=0.9, refresh_every=3, decoupled_factor=2.0, outliers=8)


class Net(nn.Module):
    """`spiked` has a dominant triplet, `flat` has none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat = nn.Linear(6, 8)
        self.spiked = nn.Linear(8, 4)
        with torch.no_grad():
            nn.init.orthogonal_(self.flat.weight)
            u, s, vh = torch.linalg.svd(self.spiked.weight, full_matrices=False)
            s[0] = 9.0
            self.spiked.weight.copy_((u * s) @ vh)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.spiked(torch.tanh(self.flat(x)))
        loss = nn.functional.cross_entropy(logits, labels) if labels is not None else logits.sum()
        return {"loss": loss, "logits": logits}


def samples(*, broken: bool = False) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(1)
    made = [{"x": torch.randn(6, generator=g), "labels": torch.tensor(i % 4)} for i in range(24)]
    if broken:
        made = [{**sample, "x": sample["x"] * float("nan")} for sample in made]
    return made


def calibration() -> list[dict[str, Tensor]]:
    return [{"x": torch.randn(16, 6, generator=torch.Generator().manual_seed(2))}]


def trainer(folder: Path, callback: Any, *, data: Any = None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 8, "per_device_train_batch_size": 3, "learning_rate": 1e-3, "save_steps": 4, "use_cpu": True,
        "report_to": [], "optim": "adamw_torch", "disable_tqdm": True, "seed": 5, "logging_steps": 100, **changes,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(folder), **settings)
    return Trainer(model=Net(), args=arguments, train_dataset=data or samples(), callbacks=[callback])


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("application", ["coupled", "decoupled"])
def test_it_equals_the_plain_loop(tmp_path: Path, application: str) -> None:
    config = S2DConfig(**{**CONFIG.to_dict(), "application": application, "weight_decay": 0.5})
    callback = S2DCallback(config, calibration())
    run = trainer(tmp_path, callback, save_strategy="no", max_grad_norm=0.0, lr_scheduler_type="linear")
    run.train()
    batches = [{k: torch.stack([s[k] for s in part]) for k in ("x", "labels")} for part in _parts(run)]

    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
    s2d = S2D(model, config, optimizer=optimizer)
    s2d.select(calibration())
    for batch in batches:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        schedule.step()
    assert callback.s2d is not None
    assert callback.s2d.flagged == {"spiked": 1}
    assert callback.s2d.refreshes == s2d.refreshes
    for name, value in weights(model).items():
        assert torch.equal(run.model.state_dict()[name], value), name


def _parts(run: Trainer) -> list[list[dict[str, Tensor]]]:
    """The samples of each of the run's 8 steps, in the Trainer's own order."""
    torch.manual_seed(5)
    rows = list(run.get_train_dataloader())
    assert len(rows) == 8
    return [[{k: batch[k][i] for k in ("x", "labels")} for i in range(3)] for batch in rows]


def test_it_acts_once_for_each_optimizer_step(tmp_path: Path) -> None:
    callback = S2DCallback(CONFIG, calibration())
    trainer(tmp_path, callback, max_steps=7, gradient_accumulation_steps=3, save_strategy="no").train()
    assert callback.s2d is not None
    assert callback.s2d.step == 7
    assert [(r.step, r.reason) for r in callback.s2d.refreshes] == [(0, "selected"), (3, "count"), (6, "count")]


def test_a_resumed_run_gives_the_same_weights(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", S2DCallback(CONFIG, calibration()))
    whole.train()
    halves = trainer(tmp_path / "halves", first := S2DCallback(CONFIG, calibration()))
    halves.train()  # its checkpoint of step 4 is the interruption's
    again = S2DCallback(CONFIG, calibration())
    resumed = trainer(tmp_path / "halves", again)
    resumed.train(resume_from_checkpoint=str(tmp_path / "halves" / "checkpoint-4"))
    assert again.s2d is not None
    assert first.s2d is not None
    assert again.s2d.refreshes == first.s2d.refreshes
    for name, value in weights(whole.model).items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert not list((tmp_path / "halves").rglob("*.part"))


def test_a_checkpoint_without_or_with_a_foreign_state_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, S2DCallback(CONFIG, calibration())).train()
    four, eight = tmp_path / "checkpoint-4", tmp_path / "checkpoint-8"
    foreign = S2DCallback(CONFIG, calibration(), resume_from=eight)
    with pytest.raises(ArtifactError, match=r"s2d.pt is of another run. Expected: step 4. Found: step 8"):
        trainer(tmp_path, foreign).train(resume_from_checkpoint=str(four))
    (four / "s2d.pt").write_bytes((four / "s2d.pt").read_bytes()[:50])
    with pytest.raises(ArtifactError, match=r"s2d.pt is not a readable checkpoint"):
        trainer(tmp_path, S2DCallback(CONFIG, calibration())).train(resume_from_checkpoint=str(four))
    (four / "s2d.pt").unlink()
    with pytest.raises(ArtifactError, match=r"s2d.pt is missing: the Trainer continues at step 4.*Fix: pass"):
        trainer(tmp_path, S2DCallback(CONFIG, calibration())).train(resume_from_checkpoint=str(four))


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_a_weight(tmp_path: Path) -> None:
    run = trainer(tmp_path, S2DCallback(CONFIG, calibration()), data=samples(broken=True), max_grad_norm=0.0)
    before = weights(run.model)
    with pytest.raises(ModelError, match=r"stopped before step 1: .* in \d+ weights, the first .*largest growth"):
        run.train()
    assert all(torch.equal(value, before[name]) for name, value in weights(run.model).items())
