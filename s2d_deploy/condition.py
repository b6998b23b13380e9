"""Conditioning: a short training stage in which S2D presses the outlier-making singular values.

Two objectives. "task" is the model's own loss on labelled batches. "distill" needs no labels: the model
imitates a frozen copy of itself while S2D acts, so the function stays and the spectrum changes; it runs
in eval mode, because dropout would be noise on top of the teacher's answers. AdamW, linear warmup, cosine
decay to 0. The model is changed in place; what is lost in float accuracy is for the caller to measure.

With a checkpoint path, everything that the next step depends on is saved atomically now and then; a run
that was interrupted continues from there and ends with the same weights, bit for bit, on the same machine
with the same number of threads. For that the data factory must give the same batches again.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d_deploy.diagnose import LayerDiagnosis, diagnose
from s2d_deploy.distill import distillation_loss, outputs_to_imitate
from s2d_deploy.errors import ArtifactError, DataError, ModelError, RecipeError, StageError, message
from s2d_deploy.pcdr import Batch, call_model
from s2d_deploy.s2d import S2D, S2DConfig

log = logging.getLogger(__name__)

LossFunction = Callable[[nn.Module, Batch], Tensor]
BatchFactory = Callable[[], Iterable[Batch]]
StepProgress = Callable[[int, int, float], None]
Metric = Callable[[nn.Module], float]
BETAS = (0.9, 0.999)


@dataclass
class ConditioningResult:
    """What conditioning did.

    Attributes:
        method: objective and application, e.g. ``"distill+s2d-decoupled"``; ``"distill"`` without S2D.
        seconds: wall time of all runs that led here, diagnosis included.
        steps: optimizer steps taken (0 when nothing was flagged and there was nothing to imitate).
        layers: for each layer {name, flagged, k_target, before, after}; flagged and k_target as before training,
            `before` and `after` are {pcdr, sigma_max, max_abs_activation, kurtosis, singular_values, ...}.
        losses: one for each step; the penalty is not part of it.
        refreshes: {step, reason, drift} of every refresh of S2D's triplets.
        findings: sentences for the report, e.g. that no layer is flagged.
        float_before: the metric before, where one was given.
        float_after: and after.
    """

    method: str
    seconds: float
    steps: int
    layers: list[dict[str, Any]]
    losses: list[float] = field(default_factory=list)
    refreshes: list[dict[str, Any]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    float_before: float | None = None
    float_after: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def learning_rate(step: int, *, steps: int, lr: float, warmup: int) -> float:
    """The rate of step 0, 1, ...: linear up to `lr` over `warmup` steps, then half a cosine down towards 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def condition(
    model: nn.Module,
    objective: LossFunction | Literal["task", "distill"],
    train_batches: BatchFactory,
    calibration_batches: Iterable[Batch],
    config: S2DConfig | None,
    *,
    steps: int,
    lr: float,
    warmup: int = 0,
    seed: int = 0,
    adam_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    layers: list[str] | None = None,
    metric: Metric | None = None,
    progress: StepProgress | None = None,
    checkpoint_path: str | Path | None = None,
    checkpoint_every: int = 100,
) -> ConditioningResult:
    """Train `model` in place while S2D presses its flagged layers.

    Args:
        model: called as ``model(**batch)``.
        objective: "task" (the output's loss; batches carry labels), "distill" (no labels), or a function
            ``(model, batch) -> scalar loss``.
        train_batches: called once for each epoch, gives that epoch's batches; begun anew when they run out.
            Shuffling is its job; torch's global generator is seeded with `seed` before the first call.
        calibration_batches: for diagnosis and selection. Not the test set.
        config: of S2D; None trains without it (the control).
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: steps of linear warmup.
        seed: of dropout, and of data that draws from torch's global generator.
        adam_decay: AdamW's own weight decay, on all weights.
        clip_norm: limit of the loss gradient's norm; the coupled penalty is added after it. None: no limit.
        layers: module paths that may be flagged; None: all.
        metric: measured before and after on the model, e.g. top-1 on held-out data.
        progress: called as ``(steps done, steps, loss)`` after each step.
        checkpoint_path: where to save, and to resume from if it exists. The file stays after success; a later call
            with the same arguments then returns at once. Remove it when the weights are safe elsewhere.
        checkpoint_every: steps between checkpoints.

    Raises:
        RecipeError: a number out of range.
        DataError: no training data, no labels, activations that are not finite.
        ModelError: weights not finite, or the loss became NaN or infinite: the message says at which step and which
            layer grew most, and the model then holds the weights of the last finite loss.
        ArtifactError: the checkpoint is truncated or belongs to another run.
        StageError: the checkpoint cannot be written.
    """
    _check_numbers(
        steps=steps, lr=lr, warmup=warmup, checkpoint_every=checkpoint_every, adam_decay=adam_decay, clip_norm=clip_norm
    )
    calibration = calibration_batches if isinstance(calibration_batches, Sequence) else list(calibration_batches)
    run = _Run(model, objective, config, steps=steps, lr=lr, warmup=warmup, adam_decay=adam_decay, clip_norm=clip_norm)
    run.fingerprint = _fingerprint(model, run.method, config, steps, lr, warmup, seed, adam_decay, clip_norm, layers)
    s2d = None if config is None else S2D(model, config, layers)
    run.s2d = s2d
    look = config if config is not None else S2DConfig()
    path = None if checkpoint_path is None else _prepared(Path(checkpoint_path))

    devices = list({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[d for d in devices if d is not None]):
        torch.manual_seed(seed)
        started = time.perf_counter()
        state = None if path is None or not path.exists() else _load(path, run.fingerprint)
        try:
            if state is None:
                before = _diagnose(model, calibration, look, layers)
                float_before = None if metric is None else metric(model)
                if s2d is not None:
                    s2d.select(calibration)
            else:
                before, float_before = state["before"], state["float_before"]
                if s2d is not None:
                    s2d.load_state_dict(state["s2d"], calibration)
            nothing = s2d is not None and not any(entry["flagged"] for entry in before)
            findings = _findings(before, look, nothing)
            if nothing and objective == "distill":
                findings.append("Nothing to imitate against: the weights were left as they were, no step was taken.")
            else:
                model.train(objective != "distill")
                extras = {"before": before, "float_before": float_before, "started": started}
                run.train(train_batches, state, progress, path, checkpoint_every, extras)
        finally:
            for module, mode in modes:
                module.training = mode
        after = {entry["name"]: entry for entry in _diagnose(model, calibration, look, layers)}
        float_after = None if metric is None else metric(model)
    return ConditioningResult(
        method=run.method,
        seconds=time.perf_counter() - started + (0.0 if state is None else float(state["seconds"])),
        steps=len(run.losses),
        layers=[_compare(entry, after[entry["name"]]) for entry in before if entry["name"] in after],
        losses=run.losses,
        refreshes=[] if s2d is None else [asdict(entry) for entry in s2d.refreshes],
        findings=findings,
        float_before=float_before,
        float_after=float_after,
    )


class _Run:
    """The training loop's state."""

    s2d: S2D | None
    fingerprint: str

    def __init__(
        self,
        model: nn.Module,
        objective: LossFunction | Literal["task", "distill"],
        config: S2DConfig | None,
        *,
        steps: int,
        lr: float,
        warmup: int,
        adam_decay: float,
        clip_norm: float | None,
    ) -> None:
        self.model = model
        self.steps, self.lr, self.warmup, self.clip_norm = steps, lr, warmup, clip_norm
        self.losses: list[float] = []
        self.loss = _objective(model, objective)
        name = objective if isinstance(objective, str) else "custom"
        self.method = name if config is None else f"{name}+s2d-{config.application}"
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ModelError(message("the model has no trainable weight", fix="set requires_grad"))
        # Everything that a step changes: the weights, and buffers such as a batch norm's running statistics.
        self.state: list[Tensor] = [*self.parameters, *model.buffers()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, betas=BETAS, weight_decay=adam_decay)
        self.start_norms = {name: _norm(p) for name, p in model.named_parameters()}

    def train(
        self,
        factory: BatchFactory,
        state: dict[str, Any] | None,
        progress: StepProgress | None,
        path: Path | None,
        every: int,
        extras: dict[str, Any],
    ) -> None:
        batches = _endless(factory)
        if state is not None:
            # Reading the batches again, rather than jumping, leaves a factory with a state of its own where it was.
            for _ in range(len(state["losses"])):
                next(batches)
            self._restore(state)
        good = [tensor.detach().clone() for tensor in self.state]
        for step in range(len(self.losses), self.steps):
            loss = self._step(step, next(batches), good)
            self.losses.append(loss)
            done = step + 1
            if path is not None and (done % every == 0 or done == self.steps):
                elapsed = time.perf_counter() - extras["started"] + (0.0 if state is None else float(state["seconds"]))
                _save(path, self._state(extras, elapsed))
            if progress is not None:
                progress(done, self.steps, loss)

    def _step(self, step: int, batch: Batch, good: list[Tensor]) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(self.model, batch)
        value = float(loss.detach())
        if not math.isfinite(value):
            self._stop(step, f"the loss is {value}", good)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(
            torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if self.clip_norm is None else self.clip_norm)
        )
        if not math.isfinite(norm):
            self._stop(step, f"the gradient's norm is {norm} at a loss of {value:g}", None)
        rate = learning_rate(step, steps=self.steps, lr=self.lr, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.no_grad():  # these weights gave a finite loss: keep them until the next ones do
            torch._foreach_copy_(good, self.state)
        if self.s2d is not None:
            self.s2d.before_step()
        self.optimizer.step()
        if self.s2d is not None:
            self.s2d.after_step(rate)
        return value

    def _stop(self, step: int, what: str, good: list[Tensor] | None) -> None:
        growth = {
            name: _norm(p) / self.start_norms[name] if self.start_norms[name] > 0 else 1.0
            for name, p in self.model.named_parameters()
        }
        # NaN compares as false everywhere: a weight that is not finite itself comes first.
        worst = max(growth, key=lambda name: growth[name] if math.isfinite(growth[name]) else math.inf)
        if good is not None:
            with torch.no_grad():
                torch._foreach_copy_(self.state, good)
        raise ModelError(
            message(
                f"conditioning stopped at step {step + 1} of {self.steps}: {what}",
                expected="a finite loss",
                found=f"the largest growth since the start is that of {worst!r}, by a factor of {growth[worst]:.3g}; "
                "the model holds the weights of the last finite loss",
                fix="lower the learning rate, lengthen the warmup, or check the batches for NaN",
            )
        )

    def _state(self, extras: dict[str, Any], seconds: float) -> dict[str, Any]:
        cuda = torch.cuda.is_available()
        return {
            "fingerprint": self.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "s2d": None if self.s2d is None else self.s2d.state_dict(),
            "losses": list(self.losses),
            "before": extras["before"],
            "float_before": extras["float_before"],
            "seconds": seconds,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if cuda else [],
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        log.info("resumed after step %d of %d", len(self.losses), self.steps)


def _objective(model: nn.Module, objective: LossFunction | Literal["task", "distill"]) -> LossFunction:
    if callable(objective):
        return objective
    if objective == "task":
        return _task_loss
    if objective != "distill":
        raise RecipeError(message(f"unknown objective {objective!r}", expected="'task', 'distill' or a function"))
    teacher = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)

    def imitate(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = outputs_to_imitate(teacher, batch)
        return distillation_loss(outputs_to_imitate(student, batch), wanted, batch.get("attention_mask"))

    return imitate


def _task_loss(model: nn.Module, batch: Batch) -> Tensor:
    output = call_model(model, batch)
    loss = output.get("loss") if hasattr(output, "get") else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError(
            message(
                "the model gave no loss",
                expected="batches with 'labels', and a model whose output has .loss",
                found=f"inputs {', '.join(batch)}; output {type(output).__name__}",
                fix="add labels, pass a loss function, or use the objective 'distill', which needs no labels",
            )
        )
    return loss


def _endless(factory: BatchFactory) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in factory():
            empty = False
            yield batch
        if empty:
            raise DataError(
                message(
                    "the training data holds no batch",
                    expected="a factory that gives a fresh iterable at each call",
                    fix="check the data's path; a factory must not return the same exhausted generator twice",
                )
            )


def _diagnose(
    model: nn.Module, batches: Iterable[Batch], config: S2DConfig, layers: list[str] | None
) -> list[dict[str, Any]]:
    found = diagnose(model, batches, k_max=config.k_max, tau=config.tau, layers=layers, top=config.outliers)
    return [LayerDiagnosis.to_dict(entry) for entry in found]


def _findings(before: list[dict[str, Any]], config: S2DConfig, nothing: bool) -> list[str]:
    if not nothing:
        return []
    best = max(before, key=lambda entry: max(entry["pcdr"]))
    return [
        f"No layer is flagged: no PCDR_k with k <= {config.k_max} reaches tau = {config.tau:g} (largest: "
        f"{max(best['pcdr']):.2f} in {best['name']}). S2D has nothing to press in this model."
    ]


def _compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    def rest(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key not in ("name", "shape")}

    return {
        "name": before["name"],
        "shape": before["shape"],
        "flagged": before["flagged"],
        "k_target": before["k_target"],
        "before": rest(before),
        "after": rest(after),
    }


def _check_numbers(
    *, steps: int, lr: float, warmup: int, checkpoint_every: int, adam_decay: float, clip_norm: float | None
) -> None:
    checks = [
        ("steps", steps, steps >= 1, "at least 1"),
        ("lr", lr, math.isfinite(lr) and 0 < lr <= 1, "in (0, 1]"),
        ("warmup", warmup, 0 <= warmup < max(steps, 1), "at least 0 and below steps"),
        ("checkpoint_every", checkpoint_every, checkpoint_every >= 1, "at least 1"),
        ("adam_decay", adam_decay, 0 <= adam_decay < 1, "in [0, 1)"),
        ("clip_norm", clip_norm, clip_norm is None or clip_norm > 0, "above 0, or nothing"),
    ]
    wrong = [(name, value, expected) for name, value, good, expected in checks if not good]
    if wrong:
        raise RecipeError(
            message(
                f"conditioning: {', '.join(name for name, _, _ in wrong)} out of range",
                expected="; ".join(f"{name} {expected}" for name, _, expected in wrong),
                found="; ".join(f"{name}={value!r}" for name, value, _ in wrong),
            )
        )


def _norm(p: Tensor) -> float:
    return float(p.detach().float().norm())


def _fingerprint(model: nn.Module, method: str, config: S2DConfig | None, *numbers: object) -> str:
    """SHA-256 over the arguments and the initial weights: only the same run may be resumed."""
    digest = hashlib.sha256(repr((method, config, numbers)).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _prepared(path: Path) -> Path:
    """`path`, its folder made: checked before the first step, not at the first checkpoint."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(
            message(f"the folder of the checkpoint {path} cannot be made: {error}", fix="choose another folder")
        ) from error
    return path


def _save(path: Path, state: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        raise StageError(
            message(f"the checkpoint {path} cannot be written: {error}", fix="free space, or choose another folder")
        ) from error


def _load(path: Path, fingerprint: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["fingerprint"]
    except Exception as error:
        raise ArtifactError(
            message(
                f"{path} is not a readable checkpoint of a conditioning run: {type(error).__name__}",
                fix="remove it to begin anew",
            )
        ) from error
    if found != fingerprint:
        raise ArtifactError(
            message(
                f"the checkpoint {path} belongs to another run",
                expected="the same initial weights, objective, S2D config, steps, lr, warmup and seed",
                fix="remove it to begin anew, or give another checkpoint path",
            )
        )
    result: dict[str, Any] = state
    return result
