"""What one-shot conditioning reads from calibration data: the inputs of Linears, sampled or summed up.

A sample of tokens serves choices by search, mean and covariance the closed forms. Memory is bounded by the number of
layers, not by the data. What is lost: the order of the tokens, and with the moments everything beyond the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.discovery import discover
from s2d_deploy.errors import RecipeError, message
from s2d_deploy.pcdr import Batch, forward_batches
from s2d_deploy.plan import Op

_SEED = 0


def calibrated_ops(model: nn.Module, batches: Sequence[Batch], output: str | None) -> dict[str, Op]:
    """`discovery.discover` on one sample of the first batch.

    Raises:
        RecipeError: no batch.
    """
    if not batches:
        raise RecipeError(message("one-shot conditioning needs calibration data", expected="at least one batch"))
    return discover(model, {name: tensor[:1] for name, tensor in batches[0].items()}, output)


def input_tokens(model: nn.Module, batches: Iterable[Batch], names: Sequence[str], rows: int) -> dict[str, Tensor]:
    """At most `rows` input tokens of each Linear, float32 (rows, K): a uniform sample, padding left out."""
    generator = torch.Generator().manual_seed(_SEED)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    current: list[Batch] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            x = x[real_rows(current[-1], x)].float()
            keys = torch.rand(x.shape[0], generator=generator)
            if name in kept:
                keys, x = torch.cat([kept[name][0], keys]), torch.cat([kept[name][1], x])
            chosen = keys.topk(min(rows, keys.numel())).indices.sort().values
            kept[name] = keys[chosen], x[chosen]

        return hook

    def remember() -> Iterable[Batch]:
        for batch in batches:
            current[:] = [batch]
            yield batch

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in dict.fromkeys(names)]
    try:
        forward_batches(model, remember())
    finally:
        for handle in handles:
            handle.remove()
    return {name: x for name, (_, x) in kept.items()}


def real_rows(batch: Batch, x: Tensor) -> Tensor:
    """Which rows of `x` are real tokens: a boolean mask over all axes but the last."""
    mask = batch.get("attention_mask")
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return mask.bool()
    return torch.ones(x.shape[:-1], dtype=torch.bool)


def input_moments(model: nn.Module, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean (K,) and covariance (K, K) of each Linear's inputs, float64, tokens weighted as in `token_weights`."""
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Linear, args: tuple[Tensor, ...], result: Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            y = result.detach().reshape(-1, result.shape[-1]).double()
            weights = token_weights(y if layer.bias is None else y - layer.bias.detach().double())
            zero = torch.zeros((), dtype=torch.float64)
            count, total, square = sums.get(name, (zero, zero, zero))
            weighted = x * weights.unsqueeze(1)
            sums[name] = count + weights.sum(), total + weighted.sum(0), square + x.T @ weighted

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        forward_batches(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, (count, total, square) in sums.items():
        mean = total / count
        result[name] = mean, square / count - torch.outer(mean, mean)
    return result


def token_weights(y: Tensor) -> Tensor:
    """One over each row's power: a relative error, because a norm follows. Rows of zeros weigh nothing."""
    power = y.square().sum(1)
    return torch.where(power > 0, 1 / power.clamp_min(1e-30), torch.zeros_like(power))


__all__ = ["calibrated_ops", "input_moments", "input_tokens", "real_rows", "token_weights"]
