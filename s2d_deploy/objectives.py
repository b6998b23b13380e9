"""What conditioning minimizes: the model's own loss, imitation of its frozen copy, or the user's function.

QAT is not another objective but another forward: any of these, computed on the fake-quantized model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from s2d_deploy.distill import distillation_loss, outputs_to_imitate
from s2d_deploy.errors import DataError, RecipeError, message
from s2d_deploy.pcdr import Batch, call_model

LossFunction = Callable[[nn.Module, Batch], Tensor]
BatchFactory = Callable[[], Iterable[Batch]]


@dataclass(frozen=True, slots=True)
class Objective:
    """A loss.

    Attributes:
        name: "task", "distill" or "custom".
        loss: ``(model, batch) -> scalar``.
        global_mean: the loss already accounts for the other processes' samples; else it is a mean over its own batch.
    """

    name: str
    loss: LossFunction
    global_mean: bool = False


def objective_of(
    model: nn.Module, wanted: LossFunction | Literal["task", "distill"], *, hidden: bool = True
) -> Objective:
    """The objective; "distill" copies the model as it is now, and keeps that copy whole on every process.

    `hidden`: it imitates hidden states too, not the outputs alone.

    Raises:
        RecipeError: an unknown name.
    """
    if callable(wanted):
        return Objective("custom", wanted)
    if wanted == "task":
        return Objective("task", task_loss)
    if wanted != "distill":
        raise RecipeError(message(f"unknown objective {wanted!r}", expected="'task', 'distill' or a function"))
    teacher = copy.deepcopy(model).eval().requires_grad_(requires_grad=False)

    def imitate(student: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad():
            answers = outputs_to_imitate(teacher, batch, hidden=hidden)
        return distillation_loss(
            outputs_to_imitate(student, batch, hidden=hidden), answers, batch.get("attention_mask")
        )

    return Objective("distill", imitate, global_mean=True)


def task_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss in the model's output.

    Raises:
        DataError: the output has none.
    """
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


def endless(factory: BatchFactory) -> Iterator[Batch]:
    """Batches of one epoch after the other: data that runs out is begun anew.

    Raises:
        DataError: an epoch without a batch.
    """
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


def share_of(batch: Batch, rank: int, world: int) -> tuple[Batch, float]:
    """This process's rows of a batch, and the weight of their mean among all processes' means (1 when even).

    Raises:
        DataError: fewer rows than processes.
    """
    if world == 1:
        return batch, 1.0
    rows = next((len(v) for v in batch.values() if isinstance(v, Tensor) and v.dim()), 0)
    if rows < world:
        raise DataError(
            message(
                f"a batch of {rows} rows cannot be shared by {world} processes",
                fix="raise the batch size, or drop the last incomplete batch",
            )
        )
    start, stop = rank * rows // world, (rank + 1) * rows // world
    mine = {
        key: value[start:stop] if isinstance(value, Tensor) and value.dim() and len(value) == rows else value
        for key, value in batch.items()
    }
    return mine, (stop - start) * world / rows
