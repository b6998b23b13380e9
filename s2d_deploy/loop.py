"""The training loop of conditioning, on Accelerate: one CPU, one GPU, or many processes with DDP or FSDP2.

Every process is given the same batches and takes its rows of each, so that a step means the same on any number of
them, up to the order in which floats are added. Accelerate chooses the device and wraps for DDP. FSDP2 is applied
here (`torch.distributed.fsdp.fully_shard`, each entry of a ModuleList a unit, then the root): Accelerate offers it on
accelerators only. Autocast computes in bfloat16 on float32 master weights. What is lost: nothing but time; with
distillation the frozen teacher lies whole on every process.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d_deploy.baselines import OptimizerName, optimizers
from s2d_deploy.checkpointing import load_optimizer, load_whole, save, whole_state
from s2d_deploy.errors import ModelError, RecipeError, message
from s2d_deploy.objectives import BatchFactory, Objective, endless, share_of
from s2d_deploy.pcdr import Batch
from s2d_deploy.plan import Plan
from s2d_deploy.qat import FakeQuantization, plan_from_state, plan_state
from s2d_deploy.s2d import S2D, S2DConfig
from s2d_deploy.sharding import bare, local, processes
from s2d_deploy.site_decay import SiteDecay
from s2d_deploy.spectral import whole

log = logging.getLogger(__name__)

StepProgress = Callable[[int, int, float], None]
PlanMaker = Callable[[nn.Module], Plan]


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How the loop runs. See `condition.condition` for the meaning of each; checked when made.

    Raises:
        RecipeError: every number out of range.
    """

    steps: int
    lr: float
    warmup: int = 0
    adam_decay: float = 0.0
    clip_norm: float | None = 1.0
    optimizer: OptimizerName = "adamw"
    accumulate: int = 1
    autocast: Literal["no", "bf16"] = "no"
    sharding: Literal["auto", "ddp", "fsdp2"] = "auto"
    checkpoint_every: int = 100
    learned_steps: bool = False

    def __post_init__(self) -> None:
        clip = self.clip_norm
        checks = [
            ("steps", self.steps >= 1, "at least 1"),
            ("lr", math.isfinite(self.lr) and 0 < self.lr <= 1, "in (0, 1]"),
            ("warmup", 0 <= self.warmup < max(self.steps, 1), "at least 0 and below steps"),
            ("checkpoint_every", self.checkpoint_every >= 1, "at least 1"),
            ("adam_decay", 0 <= self.adam_decay < 1, "in [0, 1)"),
            ("clip_norm", clip is None or clip > 0, "above 0, or nothing"),
            ("optimizer", self.optimizer in ("adamw", "muon"), "'adamw' or 'muon'"),
            ("accumulate", self.accumulate >= 1, "at least 1 batch in a step"),
            ("autocast", self.autocast in ("no", "bf16"), "'no' or 'bf16'"),
            ("sharding", self.sharding in ("auto", "ddp", "fsdp2"), "'auto', 'ddp' or 'fsdp2'"),
        ]
        wrong = [(name, expected) for name, good, expected in checks if not good]
        if wrong:
            raise RecipeError(
                message(
                    f"conditioning: {', '.join(name for name, _ in wrong)} out of range",
                    expected="; ".join(f"{name} {expected}" for name, expected in wrong),
                    found="; ".join(f"{name}={getattr(self, name)!r}" for name, _ in wrong),
                )
            )


def learning_rate(step: int, *, steps: int, lr: float, warmup: int) -> float:
    """The rate of step 0, 1, ...: linear up to `lr` over `warmup` steps, then half a cosine down towards 0."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass
class Saved:
    """What a checkpoint carries for `condition` beside the loop's own state."""

    before: list[dict[str, Any]]
    float_before: float | None
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)


class Loop:
    """One training run, from wrapping the model to giving its weights back.

    Args:
        model: the float model, on the device it is trained on; trained in place, except that FSDP2 trains a sharded
            copy, whose weights `finish` brings back.
        objective: what is minimized.
        config: how.
        s2d: what S2D does; None: nothing.
        layers: which layers S2D may flag.
        plan: QAT with this plan, or with what this function makes of the float model, anew at each refresh.
        accelerator: an ``accelerate.Accelerator`` of the caller's; None makes one.

    Raises:
        ModelError: no trainable weight.
        RecipeError: Muon under FSDP2, or learned steps on more than one process.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        config: LoopConfig,
        s2d: S2DConfig | None,
        *,
        layers: list[str] | None,
        plan: Plan | PlanMaker | None,
        accelerator: Any,
    ) -> None:
        if not any(p.requires_grad for p in model.parameters()):
            raise ModelError(message("the model has no trainable weight", fix="set requires_grad"))
        self.original, self.objective, self.config = model, objective, config
        self.accelerator = accelerator
        self.rank, self.world = processes()
        self.losses: list[float] = []
        self.wrapped = self._wrap(model)
        self.model = bare(self.wrapped)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = optimizers(self.model, config.optimizer, lr=config.lr, decay=config.adam_decay)
        self.s2d: S2D | SiteDecay | None = None
        if s2d is not None:
            self.s2d = (S2D if s2d.select == "paper" else SiteDecay)(self.model, s2d, layers)
        self._make_plan = plan if callable(plan) else None
        self._plan_every = s2d.refresh_every if s2d is not None else S2DConfig().refresh_every
        self.quantization: FakeQuantization | None = None
        steps: list[nn.Parameter] = []
        if plan is not None:
            if config.learned_steps and self.world > 1:
                raise RecipeError(
                    message(
                        "learned quantization steps train on one process",
                        found=f"{self.world} processes",
                        fix="set condition.qat_steps=calibrated, or start one process",
                    )
                )
            made = plan(self._float_copy()) if callable(plan) else plan
            self.quantization = FakeQuantization(self.model, made, learned=config.learned_steps)
            steps = self.quantization.steps
        if steps:
            self._make_plan = None  # a plan that is made anew would throw away what was learned
            self.optimizers.append(torch.optim.AdamW(steps, lr=config.lr, weight_decay=0.0))
        # Everything that a step changes: the weights, and buffers such as a batch norm's running statistics.
        self.state: list[Tensor] = [local(t.detach()) for t in (*self.parameters, *self.model.buffers(), *steps)]
        self.start_norms = {name: _norm(p) for name, p in self.model.named_parameters()}

    def train(
        self,
        factory: BatchFactory,
        state: dict[str, Any] | None,
        progress: StepProgress | None,
        path: Path | None,
        saved: Saved,
        fingerprint: str,
    ) -> None:
        """Take the steps that are left, saving to `path` now and then.

        Raises:
            ModelError: the loss or the gradient became NaN or infinite; the weights are those of the last good loss.
            DataError: no training data.
            StageError: the checkpoint cannot be written.
        """
        batches = endless(factory)
        if state is not None:
            # Reading the batches again, rather than jumping, leaves a factory with a state of its own where it was.
            for _ in range(len(state["losses"]) * self.config.accumulate):
                next(batches)
            self._restore(state)
        self._path = path
        good = [tensor.clone() for tensor in self.state]
        for step in range(len(self.losses), self.config.steps):
            if self._make_plan is not None and self.quantization is not None and step and step % self._plan_every == 0:
                self.quantization.replace(self._make_plan(self._float_copy()))
            loss = self._step(step, [next(batches) for _ in range(self.config.accumulate)], good)
            self.losses.append(loss)
            done = step + 1
            if path is not None and (done % self.config.checkpoint_every == 0 or done == self.config.steps):
                elapsed = time.perf_counter() - saved.started + saved.seconds
                self._save(path, saved, elapsed, fingerprint)
            if progress is not None:
                progress(done, self.config.steps, loss)

    def finish(self) -> None:
        """Bring the trained weights back into the model that was given, and its own attention."""
        if self.quantization is not None:
            self.quantization.remove()
        if self.model is not self.original:
            load_whole(self.original, whole_state(self.model.state_dict()))

    def _wrap(self, model: nn.Module) -> nn.Module:
        if self.world == 1:
            return model
        sharding = self.config.sharding
        if sharding == "auto":
            sharding = "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "ddp"
        if sharding == "fsdp2":
            return _fully_sharded(copy.deepcopy(model))
        wrapped: nn.Module = self.accelerator.prepare_model(model)
        return wrapped

    def _float_copy(self) -> nn.Module:
        """The float model on the CPU, where plans are made: the same on every process."""
        twin = copy.deepcopy(self.original).cpu()
        load_whole(twin, {name: t.cpu() for name, t in whole_state(self.model.state_dict()).items()})
        return twin.eval()

    def _step(self, step: int, batches: list[Batch], good: list[Tensor]) -> float:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        value = 0.0
        for number, batch in enumerate(batches):
            mine, weight = share_of(batch, self.rank, self.world)
            last = number == len(batches) - 1
            with self._own_randomness(step * len(batches) + number), self._unsynchronized(last):
                with self._autocast(), nullcontext() if self.quantization is None else self.quantization.active():
                    loss = self.objective.loss(self.wrapped, mine)
                if not self.objective.global_mean:
                    loss = loss * weight
                value += self._mean(loss.detach()) / len(batches)
                if not math.isfinite(value):
                    self._stop(step, f"the loss is {value}", good)
                (loss / len(batches) if len(batches) > 1 else loss).backward()  # type: ignore[no-untyped-call]
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        norm = float(whole(torch.nn.utils.clip_grad_norm_(self.parameters, limit)))
        if not math.isfinite(norm):
            self._stop(step, f"the gradient's norm is {norm} at a loss of {value:g}", None)
        rate = learning_rate(step, steps=self.config.steps, lr=self.config.lr, warmup=self.config.warmup)
        with torch.no_grad():  # these weights gave a finite loss: keep them until the next ones do
            torch._foreach_copy_(good, self.state)
        if self.s2d is not None:
            self.s2d.before_step()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        if self.quantization is not None:
            self.quantization.after_step()
        if self.s2d is not None:
            self.s2d.after_step(rate)
        return value

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.config.autocast == "no":
            return nullcontext()
        return torch.autocast(self.parameters[0].device.type, dtype=torch.bfloat16)

    def _unsynchronized(self, last: bool) -> AbstractContextManager[Any]:
        """DDP adds up the gradients of a step's batches by itself, and exchanges them once."""
        if last or not isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.wrapped.no_sync()

    def _own_randomness(self, number: int) -> AbstractContextManager[Any]:
        """Dropout differs between processes, and leaves the generator that the data may draw from alike on all."""
        return nullcontext() if self.world == 1 else _Reseeded(number * self.world + self.rank, self.parameters[0])

    def _mean(self, loss: Tensor) -> float:
        if self.world > 1:
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
            loss /= self.world
        return float(loss)

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
        kept = "the model holds the weights of the last finite loss"
        if self._path is not None and self._path.exists():
            kept += f"; {self._path} holds the last checkpoint"
        raise ModelError(
            message(
                f"conditioning stopped at step {step + 1} of {self.config.steps}: {what}",
                expected="a finite loss",
                found=f"the largest growth since the start is that of {worst!r}, by a factor of {growth[worst]:.3g}; "
                + kept,
                fix="lower the learning rate, lengthen the warmup, or check the batches for NaN",
            )
        )

    def _save(self, path: Path, saved: Saved, seconds: float, fingerprint: str) -> None:
        state = {
            "fingerprint": fingerprint,
            "model": whole_state(dict(self.model.state_dict())),
            "optimizers": [whole_state(optimizer.state_dict()) for optimizer in self.optimizers],
            "s2d": None if self.s2d is None else self.s2d.state_dict(),
            "plan": None if self.quantization is None else plan_state(self.quantization.learned_plan()),
            "losses": list(self.losses),
            "before": saved.before,
            "float_before": saved.float_before,
            "seconds": seconds,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        if self.rank == 0:
            save(path, state)
        if self.world > 1:
            torch.distributed.barrier()

    def _restore(self, state: dict[str, Any]) -> None:
        load_whole(self.model, state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, kept)
        if self.quantization is not None and self.config.learned_steps:
            self.quantization.load_steps(plan_from_state(state["plan"]))
        elif self.quantization is not None:
            self.quantization.replace(plan_from_state(state["plan"]))
        self.losses = list(state["losses"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng_cuda"])
        log.info("resumed after step %d of %d", len(self.losses), self.config.steps)

    def refreshes(self) -> list[dict[str, Any]]:
        """{step, reason, drift} of every refresh of S2D's triplets."""
        return [] if self.s2d is None else [asdict(entry) for entry in self.s2d.refreshes]


class _Reseeded:
    """torch's generators seeded for the block, and as before behind it."""

    def __init__(self, number: int, like: Tensor) -> None:
        devices = [like.device.index] if like.device.type == "cuda" else []
        self._fork = torch.random.fork_rng(devices=devices)
        self._seed = (torch.initial_seed() * 1_000_003 + number) % 2**63

    def __enter__(self) -> None:
        self._fork.__enter__()
        torch.manual_seed(self._seed)

    def __exit__(self, *error: Any) -> None:
        self._fork.__exit__(*error)


def make_accelerator() -> Any:
    """An Accelerator on the GPU, where there is one, else on the CPU; its DDP allows weights without a gradient."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no", kwargs_handlers=handlers)


def _fully_sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (processes()[1],))
    for module in reversed(list(model.modules())):  # children before their parents
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def _norm(p: Tensor) -> float:
    return float(whole(p.detach()).float().norm())
