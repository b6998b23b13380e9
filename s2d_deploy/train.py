"""Train a classifier from scratch: plain AdamW with a one-cycle rate. Only the embedded default needs it.

Deterministic by seed on one machine and thread count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from s2d_deploy.data import Samples
from s2d_deploy.errors import ModelError, message
from s2d_deploy.models import forward
from s2d_deploy.recipe import TrainSection


def train(
    module: nn.Module,
    output: str,
    samples: Samples,
    section: TrainSection,
    progress: Callable[[int, int, str], None],
) -> list[float]:
    """Train `module` in place.

    Args:
        module: called as ``module(**batch)``; its `output` is ``(B, classes)`` logits.
        samples: labelled training split.
        progress: called as ``(epochs done, epochs, note)``.

    Returns:
        Mean cross entropy of each epoch.

    Raises:
        ModelError: the loss became NaN or infinite, or the model does not take these inputs.
        DataError: no labels.
    """
    with torch_threads(section.threads):
        return _fit(module, output, samples, section, progress)


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """torch's intra-op threads within the block; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fit(
    module: nn.Module,
    output: str,
    samples: Samples,
    section: TrainSection,
    progress: Callable[[int, int, str], None],
) -> list[float]:
    torch.manual_seed(section.seed)
    steps = -(-samples.size // section.batch_size) * section.epochs
    optimizer = torch.optim.AdamW(module.parameters(), lr=section.learning_rate, weight_decay=section.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=section.learning_rate, total_steps=steps)
    losses = []
    module.train()
    for epoch in range(section.epochs):
        total = 0.0
        for batch in samples.labelled_batches(section.batch_size, shuffle_seed=section.seed * 10_007 + epoch):
            labels = batch.pop("labels")
            logits = forward(module, batch, output)
            loss = F.cross_entropy(logits, labels)
            if not torch.isfinite(loss):
                raise ModelError(
                    message(
                        f"training: the loss became {float(loss.detach())} in epoch {epoch + 1}",
                        fix="lower train.learning_rate",
                    )
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(labels)
        losses.append(total / samples.size)
        progress(epoch + 1, section.epochs, f"loss {losses[-1]:.4f}")
    module.eval()
    return losses
