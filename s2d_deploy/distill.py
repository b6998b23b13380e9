"""Label-free objective: a model imitates its own frozen copy.

The loss is the mean over all output and hidden-state tensors of MSE(student, teacher) / Var(teacher):
each tensor counts by its relative error, whatever its scale. 0 means equal; 1 is as bad as answering
with the mean. Where a batch carries an attention mask, padded tokens are left out. Under a process group the
means and the variance are those of all processes' samples together, as if one process had seen them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, message
from s2d_deploy.pcdr import Batch, call_model
from s2d_deploy.sharding import bare, processes

# Not results to imitate: the loss itself, caches, and attention maps.
SKIPPED = frozenset({"loss", "past_key_values", "attentions", "cross_attentions"})


def output_tensors(output: Any) -> list[tuple[str, Tensor]]:
    """The floating-point tensors of a model's output, with their names.

    Args:
        output: a tensor, or a (nested) ModelOutput, mapping, tuple or list.

    Returns:
        E.g. ``[("logits", ...), ("hidden_states.0", ...)]``; a plain tensor is called ``"output"``. A tensor that
        appears twice (last_hidden_state as the last hidden state) is listed once.
    """
    seen: set[int] = set()
    result = []
    for name, tensor in _walk("", output):
        if tensor.is_floating_point() and id(tensor) not in seen:
            seen.add(id(tensor))
            result.append((name or "output", tensor))
    return result


def gives_hidden_states(model: nn.Module) -> bool:
    """Whether ``model(..., output_hidden_states=True)`` is understood."""
    model = bare(model)
    if "output_hidden_states" in inspect.signature(model.forward).parameters:
        return True
    # Recent transformers take it through **kwargs; every pretrained model's config carries the switch.
    return hasattr(getattr(model, "config", None), "output_hidden_states")


def outputs_to_imitate(model: nn.Module, batch: Batch, *, hidden: bool = True) -> list[tuple[str, Tensor]]:
    """`output_tensors` of the model for `batch` (labels left out); `hidden`: with hidden states where it gives them."""
    unlabelled = {key: value for key, value in batch.items() if key != "labels"}
    extra = {"output_hidden_states": True} if hidden and gives_hidden_states(model) else {}
    return output_tensors(call_model(model, unlabelled, **extra))


def distillation_loss(
    student: list[tuple[str, Tensor]], teacher: list[tuple[str, Tensor]], mask: Tensor | None = None
) -> Tensor:
    """Mean over the tensors of MSE / teacher variance: a scalar with gradients to the student.

    Args:
        student: name and tensor, as of `outputs_to_imitate`.
        teacher: the same names and shapes; no gradient goes there.
        mask: attention mask [B, T]; applied to tensors of shape [B, T, ...].

    Returns:
        The loss; of several processes, one whose mean over them is the loss of all samples, as DDP averages gradients.

    Raises:
        ModelError: the two do not match, or there is no floating-point output.
    """
    if not student or [n for n, _ in student] != [n for n, _ in teacher]:
        raise ModelError(
            message(
                "student and teacher do not give the same floating-point outputs",
                expected=", ".join(n for n, _ in teacher) or "at least one tensor",
                found=", ".join(n for n, _ in student) or "none",
            )
        )
    parts = []
    for (_, got), (_, wanted) in zip(student, teacher, strict=True):
        target = wanted.detach().float()
        error = (got.float() - target).square()
        if mask is not None and target.dim() == 3 and target.shape[:2] == mask.shape:
            kept = mask.to(device=target.device, dtype=torch.bool)
            error, target = error[kept], target[kept]
        if processes()[1] > 1:
            parts.append(_share(error, target))
            continue
        # The floor only guards a constant teacher tensor, where there is no scale to compare with.
        parts.append(error.mean() / target.var(unbiased=False).clamp_min(1e-12))
    return torch.stack(parts).mean()


def _share(error: Tensor, target: Tensor) -> Tensor:
    """This process's share of MSE / variance over all processes, times their number."""
    values = target.double()
    count = torch.tensor(float(target.numel()), dtype=torch.float64, device=target.device)
    sums = torch.stack([count, values.sum()])
    torch.distributed.all_reduce(sums)
    mean = sums[1] / sums[0]
    spread = (values - mean).square().sum()
    torch.distributed.all_reduce(spread)
    scale = sums[0] * (spread / sums[0]).clamp_min(1e-12)
    return error.sum() * (processes()[1] / scale).to(error.dtype)


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
        return
    if isinstance(value, Mapping):
        items = [(str(key), child) for key, child in value.items() if key not in SKIPPED]
    elif isinstance(value, tuple | list):
        items = [(str(index), child) for index, child in enumerate(value)]
    else:
        return
    for key, child in items:
        yield from _walk(f"{name}.{key}" if name else key, child)
