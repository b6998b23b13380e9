"""Conditioning: a short training stage in which S2D presses the outlier-making singular values.

Two objectives. "task" is the model's own loss on labelled batches. "distill" needs no labels: the model
imitates a frozen copy of itself while S2D acts, so the function stays and the spectrum changes; it runs
in eval mode, because dropout would be noise on top of the teacher's answers. AdamW, linear warmup, cosine
decay to 0. With a plan, the forward pass is fake-quantized (QAT) while S2D acts on the float weights. Without
S2D the same steps are the baselines: plain, with weight decay, or with Muon. The model is changed in place; what is
lost in float accuracy is for the caller to measure.

With a checkpoint path, everything that the next step depends on is saved atomically now and then; a run
that was interrupted continues from there and ends with the same weights, bit for bit, on the same machine
with the same number of threads. For that the data factory must give the same batches again. The same call runs
on one CPU, one GPU, or, started by ``torchrun`` or ``accelerate launch``, on many (see `loop`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from s2d_deploy.baselines import OptimizerName
from s2d_deploy.checkpointing import fingerprint, load, prepared
from s2d_deploy.diagnose import LayerDiagnosis, diagnose
from s2d_deploy.loop import Loop, LoopConfig, PlanMaker, Saved, StepProgress, learning_rate, make_accelerator
from s2d_deploy.objectives import BatchFactory, LossFunction, objective_of
from s2d_deploy.pcdr import Batch
from s2d_deploy.plan import Plan
from s2d_deploy.s2d import S2DConfig

Metric = Callable[[nn.Module], float]


@dataclass
class ConditioningResult:
    """What conditioning did.

    Attributes:
        method: objective and application, e.g. ``"distill+s2d-decoupled"``; ``"distill"`` without S2D. Also named:
            ``qat-w4a4``, ``muon``, ``weight-decay``.
        seconds: wall time of all runs that led here, diagnosis included.
        steps: optimizer steps taken (0 when nothing was flagged and there was nothing to imitate).
        layers: for each layer {name, flagged, k_target, before, after}; flagged and k_target as before training,
            `before` and `after` are {pcdr, sigma_max, max_abs_activation, kurtosis, singular_values, ...}.
        losses: one for each step; the penalty is not part of it.
        refreshes: {step, reason, drift} of every refresh of S2D's triplets.
        findings: sentences for the report, e.g. that no layer is flagged.
        float_before: the metric before, where one was given.
        float_after: and after.
        learned_plan: with ``learned_steps``, the plan whose scales were learned: the one to deploy.
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
    learned_plan: Plan | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without the plan."""
        document = asdict(replace(self, learned_plan=None))
        del document["learned_plan"]
        return document


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
    optimizer: OptimizerName = "adamw",
    plan: Plan | PlanMaker | None = None,
    learned_steps: bool = False,
    accumulate: int = 1,
    autocast: Literal["no", "bf16"] = "no",
    sharding: Literal["auto", "ddp", "fsdp2"] = "auto",
    accelerator: Any = None,
) -> ConditioningResult:
    """Train `model` in place while S2D presses its flagged layers.

    Args:
        model: called as ``model(**batch)``. It is trained on the accelerator's device, and given back on its own.
        objective: "task" (the output's loss; batches carry labels), "distill" (no labels), or a function
            ``(model, batch) -> scalar loss``.
        train_batches: called once for each epoch, gives that epoch's batches; begun anew when they run out.
            Shuffling is its job; torch's global generator is seeded with `seed` before the first call. On many
            processes it gives every process the same batches, and each takes its rows.
        calibration_batches: for diagnosis and selection. Not the test set.
        config: of S2D; None trains without it (the control, and with `adam_decay` or `optimizer` the baselines).
        steps: optimizer steps.
        lr: peak learning rate.
        warmup: steps of linear warmup.
        seed: of dropout, and of data that draws from torch's global generator.
        adam_decay: AdamW's (and Muon's) own weight decay, on all weights.
        clip_norm: limit of the loss gradient's norm; the coupled penalty is added after it. None: no limit.
        layers: module paths that may be flagged; None: all.
        metric: measured before and after on the model, e.g. top-1 on held-out data.
        progress: called as ``(steps done, steps, loss)`` after each step.
        checkpoint_path: where to save, and to resume from if it exists. The file stays after success; a later call
            with the same arguments then returns at once. Remove it when the weights are safe elsewhere.
        checkpoint_every: steps between checkpoints.
        optimizer: "adamw", or "muon" for the hidden 2-D weights (see `baselines`).
        plan: QAT: the forward pass is fake-quantized by this plan. A function ``(float model) -> Plan`` makes it from
            the model on the CPU, at the start and anew at every ``config.refresh_every`` steps.
        learned_steps: the plan's stored scales are trained as well (LSQ, see `lsq`); a function makes the plan once.
            One process only.
        accumulate: batches in one optimizer step; their mean loss counts.
        autocast: "bf16" computes in bfloat16 on float32 weights.
        sharding: of many processes: "ddp", "fsdp2", or "auto" (FSDP2 when ``accelerate launch`` was told so).
        accelerator: the caller's own ``accelerate.Accelerator``; None makes one.

    Raises:
        RecipeError: a number out of range, or Muon under FSDP2.
        DataError: no training data, no labels, activations that are not finite.
        ModelError: weights not finite, or the loss became NaN or infinite: the message says at which step and which
            layer grew most, and the model then holds the weights of the last finite loss.
        ArtifactError: the checkpoint is truncated or belongs to another run.
        StageError: the checkpoint cannot be written.
    """
    loop_config = LoopConfig(
        steps=steps,
        lr=lr,
        warmup=warmup,
        adam_decay=adam_decay,
        clip_norm=clip_norm,
        optimizer=optimizer,
        accumulate=accumulate,
        autocast=autocast,
        sharding=sharding,
        checkpoint_every=checkpoint_every,
        learned_steps=learned_steps,
    )
    calibration = calibration_batches if isinstance(calibration_batches, Sequence) else list(calibration_batches)
    look = config if config is not None else S2DConfig()
    path = None if checkpoint_path is None else prepared(Path(checkpoint_path))
    accelerator = make_accelerator() if accelerator is None else accelerator
    home = next((p.device for p in model.parameters()), torch.device("cpu"))
    there = accelerator.device if home.type == "cpu" else home
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=[there] if there.type == "cuda" else []):
        torch.manual_seed(seed)
        started = time.perf_counter()
        sites = config is not None and config.select == "sites"
        # Pressing at the sites changes the streams in between on purpose: only the outputs are to be imitated.
        aim = objective_of(model.to(there), objective, hidden=not sites)
        method = _method(aim.name, config, loop_config, plan)
        learned: Plan | None = None
        numbers = (steps, lr, warmup, adam_decay, clip_norm, optimizer, accumulate, autocast)
        quantized = plan.digest() if isinstance(plan, Plan) else plan is not None
        mark = fingerprint(model, method, config, numbers, seed, layers, quantized)
        state = None if path is None or not path.exists() else load(path, mark)
        try:
            if state is None:
                before = diagnosed(model, calibration, look, layers)
                saved = Saved(before, _measured(metric, model, home), started=started)
            else:
                before = state["before"]
                saved = Saved(before, state["float_before"], float(state["seconds"]), started)
            nothing = config is not None and not sites and not any(entry["flagged"] for entry in before)
            findings = _findings(before, look, nothing)
            loop: Loop | None = None
            if nothing and objective == "distill" and plan is None:
                findings.append("Nothing to imitate against: the weights were left as they were, no step was taken.")
            else:
                model.train(objective != "distill")
                loop = Loop(
                    model.to(there), aim, loop_config, config, layers=layers, plan=plan, accelerator=accelerator
                )
                try:
                    if loop.s2d is not None:
                        if state is None:
                            loop.s2d.select(calibration)
                        else:
                            loop.s2d.load_state_dict(state["s2d"], calibration)
                    loop.train(train_batches, state, progress, path, saved, mark)
                    if learned_steps and loop.quantization is not None:
                        learned = loop.quantization.learned_plan()
                    if sites and loop.s2d is not None:
                        findings += _pressed(loop.s2d.flagged)
                finally:
                    loop.finish()
        finally:
            for module, mode in modes:
                module.training = mode
            model.to(there)
        after = {entry["name"]: entry for entry in diagnosed(model, calibration, look, layers)}
        float_after = _measured(metric, model, home)
        model.to(home)
    return ConditioningResult(
        method=method,
        seconds=time.perf_counter() - started + saved.seconds,
        steps=0 if loop is None else len(loop.losses),
        layers=[compared(entry, after[entry["name"]]) for entry in before if entry["name"] in after],
        losses=[] if loop is None else loop.losses,
        refreshes=[] if loop is None else loop.refreshes(),
        findings=findings,
        float_before=saved.float_before,
        float_after=float_after,
        learned_plan=learned,
    )


def _method(objective: str, config: S2DConfig | None, loop: LoopConfig, plan: Plan | PlanMaker | None) -> str:
    parts = [objective]
    if plan is not None:
        parts.append(f"qat-{plan.precision}" if isinstance(plan, Plan) else "qat")
        parts += ["lsq"] if loop.learned_steps else []
    if config is not None:
        parts.append(f"s2d-{config.application}" if config.select == "paper" else "s2d-sites")
    if loop.optimizer != "adamw":
        parts.append(loop.optimizer)
    if loop.adam_decay:
        parts.append("weight-decay")
    return "+".join(parts)


def _measured(metric: Metric | None, model: nn.Module, home: torch.device) -> float | None:
    """The metric, with the model on the device where its owner keeps it."""
    if metric is None:
        return None
    device = next((p.device for p in model.parameters()), home)
    try:
        return metric(model.to(home))
    finally:
        model.to(device)


def diagnosed(
    model: nn.Module, batches: Iterable[Batch], config: S2DConfig, layers: list[str] | None
) -> list[dict[str, Any]]:
    """`diagnose.diagnose` as JSON documents, with the numbers of `config`."""
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


def compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """One entry of `ConditioningResult.layers` from two documents of `diagnosed`."""

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


def _pressed(components: Mapping[str, int]) -> list[str]:
    if not components:
        return ["No quantized site has an outlier with a single cause that can be pressed: S2D presses nothing there."]
    return [f"Pressed at the quantized sites, as of the last refresh: {'; '.join(components)}."]


__all__ = [
    "BatchFactory",
    "ConditioningResult",
    "LossFunction",
    "Metric",
    "StepProgress",
    "condition",
    "learning_rate",
]
