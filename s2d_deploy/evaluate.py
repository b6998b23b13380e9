"""What a model is worth: top-1 for classifiers, cosine to the float model for encoders.

Works on output arrays, so that the float model, the simulation and every runtime are measured by the same lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from s2d_deploy.data import Batch
from s2d_deploy.errors import ModelError, message
from s2d_deploy.models import forward
from s2d_deploy.session import Array

Run = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True, slots=True)
class Score:
    """One number for a model, and one for each sample.

    Attributes:
        name: ``"top-1 %"`` or ``"cosine x 100"``.
        value: mean, in points (0 to 100).
        per_sample: float64 ``(n,)``: 100 or 0 for a classifier, cosine times 100 for an encoder.
    """

    name: str
    value: float
    per_sample: npt.NDArray[np.float64]


def torch_run(module: nn.Module, output: str) -> Run:
    """Makes a torch model callable like a `Session.run`."""

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        with torch.no_grad():
            batch = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in feeds.items()}
            tensor = forward(module, batch, output)
        return {output: tensor.numpy()}

    return run


def outputs(run: Run, output: str, batches: Iterable[Batch], on_batch: Callable[[int], None] | None = None) -> Array:
    """Outputs of all batches, concatenated along the batch: float32 ``(n, ...)``.

    Raises:
        ModelError: NaN or infinite outputs.
    """
    parts = []
    for batch in batches:
        parts.append(run({name: tensor.numpy() for name, tensor in batch.items()})[output])
        if on_batch is not None:
            on_batch(len(parts[-1]))
    result = np.concatenate(parts).astype(np.float32)
    if not np.isfinite(result).all():
        bad = int((~np.isfinite(result.reshape(len(result), -1))).any(axis=1).sum())
        raise ModelError(message(f"output {output!r} is NaN or infinite for {bad} of {len(result)} samples"))
    return result


def score(task: str, output: Array, reference: Array, labels: torch.Tensor | None, mask: Array | None) -> Score:
    """Score `output`.

    Args:
        task: ``"image-classification"`` or ``"embedding"``.
        output: ``(n, classes)``, or ``(n, T, D)`` / ``(n, D)`` for an encoder.
        reference: the float model's output, same shape.
        labels: int64 ``(n,)``; None compares a classifier's decision with the float model's.
        mask: ``(n, T)``, 1 for real tokens; None pools over all.

    Raises:
        ModelError: the output has another shape than the task or the reference.
    """
    wanted = (2,) if task == "image-classification" else (2, 3)
    if output.ndim not in wanted or output.shape != reference.shape:
        raise ModelError(
            message(
                f"the output does not fit the task {task}",
                expected=f"{' or '.join(map(str, wanted))} dimensions, and the float model's shape {reference.shape}",
                found=f"shape {output.shape}",
                fix="set model.output and model.task",
            )
        )
    if task == "image-classification":
        expected = reference.argmax(axis=-1) if labels is None else labels.numpy()
        correct = (output.argmax(axis=-1) == expected).astype(np.float64) * 100.0
        return Score("top-1 %" if labels is not None else "top-1 agreement %", float(correct.mean()), correct)
    a, b = embed(output, mask), embed(reference, mask)
    cosine = (a * b).sum(axis=-1).astype(np.float64) * 100.0
    return Score("cosine x 100", float(cosine.mean()), cosine)


def embed(output: Array, mask: Array | None) -> npt.NDArray[np.float64]:
    """Unit embeddings ``(n, D)``: masked mean over tokens where there are tokens."""
    x = output.astype(np.float64)
    if x.ndim == 3:
        weight = np.ones(x.shape[:2]) if mask is None else mask.astype(np.float64)
        x = (x * weight[..., None]).sum(axis=1) / np.maximum(weight.sum(axis=1, keepdims=True), 1.0)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return x / np.where(norm > 0, norm, 1.0)
