"""What a model is worth: top-1 for classifiers, cosine to the float model and equal neighbours for encoders.

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
from s2d_deploy.errors import DataError, ModelError, message
from s2d_deploy.models import forward
from s2d_deploy.session import Array

Run = Callable[[Mapping[str, Array]], dict[str, Array]]

# Similarities that agree to so many decimals are ties: how a product is cut into chunks changes only later ones.
_DECIMALS = 12
# Similarities held at a time, in elements: 64 MiB of float64.
_CHUNK = 1 << 23


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


def nearest(embeddings: npt.NDArray[np.float64], k: int = 1) -> npt.NDArray[np.int64]:
    """The `k` nearest other rows of each row by dot product, nearest first.

    Args:
        embeddings: ``(n, D)``, of unit length (`embed`), so that the dot product is the cosine.
        k: how many, 1 to ``n - 1``.

    Returns:
        Row indices ``(n, k)``. A row is never its own neighbour. Similarities that agree to 12 decimals are ties,
        and of tied rows the one with the smaller index counts as nearer.

    Raises:
        DataError: fewer than ``k + 1`` rows, or `k` below 1.
        ModelError: NaN or infinite embeddings.
    """
    n = len(embeddings)
    if not 1 <= k < n:
        raise DataError(
            message(
                f"{n} samples have no {k} nearest others",
                expected="k of at least 1, and more samples than k",
                found=f"k = {k}, {n} samples",
            )
        )
    if not np.isfinite(embeddings).all():
        bad = int((~np.isfinite(embeddings)).any(axis=1).sum())
        raise ModelError(message(f"the embedding is NaN or infinite for {bad} of {n} samples"))
    found = np.empty((n, k), np.int64)
    rows = max(1, _CHUNK // n)
    for start in range(0, n, rows):
        similar = np.round(embeddings[start : start + rows] @ embeddings.T, _DECIMALS)
        here = np.arange(len(similar))
        similar[here, start + here] = -np.inf
        for rank in range(k):
            best = similar.argmax(axis=1)  # the first of equal ones
            found[start + here, rank] = best
            similar[here, best] = -np.inf
    return found


def neighbour_agreement(output: Array, reference: Array, mask: Array | None = None, k: int = 1) -> Score:
    """How much of each sample's neighbourhood among the others is the same as in the reference.

    What retrieval needs of an encoder: a mean cosine may stay high while the nearest neighbours change places.

    Args:
        output: ``(n, T, D)`` or ``(n, D)``.
        reference: the float model's output for the same samples; its width may differ.
        mask: ``(n, T)``, 1 for real tokens, of whichever of both has tokens; None pools over all.
        k: neighbours of each sample, 1 to ``n - 1``.

    Returns:
        ``"neighbour agreement %"``, for ``k > 1`` ``"neighbour overlap@k %"``: the share of the reference's `k`
        nearest samples that are among the output's `k` nearest, in any order. Ties as in `nearest`.

    Raises:
        DataError: too few samples for `k`.
        ModelError: another number of samples than the reference, no embeddings, or NaN.
    """
    if output.ndim not in (2, 3) or reference.ndim not in (2, 3) or len(output) != len(reference):
        raise ModelError(
            message(
                "the output and the reference do not embed the same samples",
                expected="shapes (n, D) or (n, T, D) with one n",
                found=f"shapes {output.shape} and {reference.shape}",
                fix="set model.output and model.task",
            )
        )
    mine, theirs = (nearest(embed(x, mask), k) for x in (output, reference))
    shared = (mine[:, :, None] == theirs[:, None, :]).any(axis=2).sum(axis=1)
    per_sample = shared.astype(np.float64) * (100.0 / k)
    name = "neighbour agreement %" if k == 1 else f"neighbour overlap@{k} %"
    return Score(name, float(per_sample.mean()), per_sample)
