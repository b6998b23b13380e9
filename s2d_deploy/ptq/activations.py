"""What weight reconstruction reads of a layer's inputs, streamed: Gram matrices and samples of tokens.

Memory is bounded by the layers that are asked for (K x K floats each, or `rows` x K), never by the data. Padding (an
attention mask of zeros) is left out, so a short sentence does not teach a layer about ``[PAD]``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from s2d_deploy.ptq.passes import Batch


@dataclass(slots=True)
class Moments:
    """Second moments of a layer's input rows.

    Attributes:
        count: rows seen.
        mean: float64 ``(K,)``.
        gram: float64 ``(K, K)``, the mean of ``x x^T`` (not centred).
    """

    count: int
    mean: Tensor
    gram: Tensor


def moments(model: nn.Module, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, Moments]:
    """Moments of each named layer's input rows; a Conv2d's rows are its unfolded patches (one group).

    The model may be float or simulated: a simulated layer's rows are what its input quantizer is given.
    """
    found: dict[str, Moments] = {}

    def see(name: str, x: Tensor) -> None:
        rows = x.double()
        if name not in found:
            k = rows.shape[1]
            found[name] = Moments(0, torch.zeros(k, dtype=torch.float64), torch.zeros(k, k, dtype=torch.float64))
        entry = found[name]
        entry.count += rows.shape[0]
        entry.mean += rows.sum(0)
        entry.gram += rows.T @ rows

    with watched_rows(model, names, see) as remember, torch.no_grad():
        for batch in batches:
            remember(batch)
            model(**batch)
    for entry in found.values():
        entry.mean /= max(entry.count, 1)
        entry.gram /= max(entry.count, 1)
    return found


def sampled_rows(
    model: nn.Module, batches: Iterable[Batch], names: Sequence[str], rows: int, seed: int = 0
) -> dict[str, Tensor]:
    """A uniform sample of at most `rows` input rows of each layer, the same for a seed: float32 ``(<= rows, K)``."""
    generators = {name: torch.Generator().manual_seed(seed) for name in names}
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, x: Tensor) -> None:
        keys = torch.rand(x.shape[0], generator=generators[name])
        if name in kept:
            keys, x = torch.cat([kept[name][0], keys]), torch.cat([kept[name][1], x])
        chosen = keys.topk(min(rows, keys.numel())).indices.sort().values
        kept[name] = keys[chosen], x[chosen].clone()

    with watched_rows(model, names, see) as remember, torch.no_grad():
        for batch in batches:
            remember(batch)
            model(**batch)
    return {name: x for name, (_, x) in kept.items()}


@contextmanager
def watched_rows(
    model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[Callable[[Batch], None]]:
    """Call ``see(name, rows)`` with each named layer's input rows (float32 ``(rows, K)``, padding left out).

    Yields a function that must be called with each batch before the model runs on it.
    """
    current: list[Batch] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def watch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(name, input_rows(module, args[0].detach(), current[-1] if current else {}))

        return watch

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in dict.fromkeys(names)]
    try:
        yield lambda batch: current.__setitem__(slice(None), [batch])
    finally:
        for handle in handles:
            handle.remove()


def input_rows(layer: nn.Module, x: Tensor, batch: Batch) -> Tensor:
    """Rows that the layer's weight matrix multiplies: float32 ``(rows, K)``."""
    if hasattr(layer, "kernel_size"):
        conv = cast(nn.Conv2d, layer)  # or its simulation, which has the same attributes
        columns = nn.functional.unfold(
            x.float(), conv.kernel_size, conv.dilation, cast("tuple[int, int]", conv.padding), conv.stride
        )
        return columns.transpose(1, 2).reshape(-1, columns.shape[1])
    return x[real_tokens(batch, x)].float()


def real_tokens(batch: Batch, x: Tensor) -> Tensor:
    """Which rows of `x` are real tokens: a boolean mask over all axes but the last."""
    mask = batch.get("attention_mask")
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return mask.bool()
    return torch.ones(x.shape[:-1], dtype=torch.bool)
