"""S2D inside transformers' Trainer: one callback.

    Trainer(..., callbacks=[S2DCallback(S2DConfig(), calibration_batches)])

It acts once for each optimizer step, so gradient accumulation needs no thought: the gradient's part in
``on_pre_optimizer_step`` (behind clipping), the weights' part in ``on_optimizer_step`` (with the rate that the step
used). Its state lies as ``s2d.pt`` in the Trainer's own checkpoint folders, written atomically, so a run
resumed by ``trainer.train(resume_from_checkpoint=...)`` ends with the same weights as an uninterrupted one.
Loss and gradients are the Trainer's; a gradient that is not finite stops the run before it reaches a weight.
"""
# ruff: noqa: ARG002 - the events' signatures are transformers'

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from s2d_deploy.checkpointing import load, save
from s2d_deploy.errors import ArtifactError, ModelError, message
from s2d_deploy.pcdr import Batch
from s2d_deploy.s2d import S2D, S2DConfig
from s2d_deploy.sharding import local, processes
from s2d_deploy.spectral import whole

STATE_FILE = "s2d.pt"
_KIND = "s2d-trainer-callback"


class S2DCallback(TrainerCallback):
    """Selective spectral decay for a Trainer.

    Args:
        config: strength and rhythm.
        calibration_batches: dicts of tensors for the selection and the refreshes. Not the test set.
        layers: module paths that may be flagged; None: every Linear and Conv that the optimizer trains.
        resume_from: the checkpoint folder to continue from; None: ``checkpoint-<step>`` in the Trainer's output folder.

    Attributes:
        s2d: the engine, from the beginning of training on: `s2d.flagged`, `s2d.selections`, `s2d.refreshes`.
    """

    def __init__(
        self,
        config: S2DConfig,
        calibration_batches: Iterable[Batch],
        *,
        layers: list[str] | None = None,
        resume_from: str | Path | None = None,
    ) -> None:
        self.config, self.layers = config, layers
        self.calibration: Sequence[Batch] = list(calibration_batches)
        self.resume_from = None if resume_from is None else Path(resume_from)
        self.s2d: S2D | None = None
        self._start: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the layers, or continue from the checkpoint that the Trainer continues from.

        Raises:
            ArtifactError: that checkpoint has no state of S2D, a broken one, or one of another step.
            DataError: calibration data that the model does not take.
        """
        self.s2d = S2D(kwargs["model"], self.config, self.layers, optimizer=kwargs["optimizer"])
        self.s2d.detach()  # the events below come at the same places, and once more see the gradient first
        self._start = {name: float(whole(p.detach()).float().norm()) for name, p in self.s2d.model.named_parameters()}
        if not state.global_step:
            self.s2d.select(self.calibration)
            return
        folder = self.resume_from or Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        path = folder / STATE_FILE
        if not path.exists():
            raise ArtifactError(
                message(
                    f"{path} is missing: the Trainer continues at step {state.global_step}, S2D cannot",
                    fix="pass S2DCallback(resume_from=<the checkpoint's folder>), or train from the beginning",
                )
            )
        kept = load(path, _KIND)["s2d"]
        if kept["step"] != state.global_step:
            raise ArtifactError(
                message(f"{path} is of another run", expected=f"step {state.global_step}", found=f"step {kept['step']}")
            )
        self.s2d.load_state_dict(kept, self.calibration)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the gradient; refresh when due; coupled: add the penalty's gradient.

        Raises:
            ModelError: the gradient is not finite. The weights are those of the step before.
        """
        s2d = self._engine()
        parameters = dict(s2d.model.named_parameters())
        gradients = [local(p.grad) for p in parameters.values() if p.grad is not None]
        if not _all_finite(gradients):
            self._stop(state.global_step, parameters)
        s2d.before_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Behind the optimizer, before the scheduler: decoupled: shrink the flagged triplets."""
        self._engine().after_step()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put S2D's state beside the Trainer's.

        Raises:
            StageError: it cannot be written.
        """
        if processes()[0] == 0:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            save(folder / STATE_FILE, {"fingerprint": _KIND, "s2d": self._engine().state_dict()})

    def _engine(self) -> S2D:
        if self.s2d is None:
            raise ModelError(message("S2D has not chosen its layers yet", fix="add it before trainer.train()"))
        return self.s2d

    def _stop(self, step: int, parameters: dict[str, nn.Parameter]) -> None:
        bad = [name for name, p in parameters.items() if p.grad is not None and not _all_finite([local(p.grad)])]
        growth = {
            name: float(whole(p.detach()).float().norm()) / self._start[name] if self._start[name] else 1.0
            for name, p in parameters.items()
        }
        worst = max(growth, key=lambda name: growth[name] if math.isfinite(growth[name]) else math.inf)
        raise ModelError(
            message(
                f"training stopped before step {step + 1}: the gradient holds NaN or infinity in {len(bad)} weights, "
                f"the first {bad[0] if bad else 'of another process'!r}",
                expected="finite gradients",
                found=f"the largest growth since the start is that of {worst!r}, by a factor of {growth[worst]:.3g}; "
                "the weights are those of the step before, and the Trainer's last checkpoint is untouched",
                fix="lower the learning rate, lengthen the warmup, or check the batches for NaN",
            )
        )


def _all_finite(gradients: list[Tensor]) -> bool:
    """Of all processes; one pass over the gradients and one wait for the device."""
    norms = [norm.float() for norm in torch._foreach_norm(gradients)] if gradients else [torch.zeros(())]
    total = torch.stack(norms).sum()
    if processes()[1] > 1:
        torch.distributed.all_reduce(total)
    return bool(torch.isfinite(total))
