"""Scale extreme neurons down through their activation, in the weights alone.

A GELU is not homogeneous, so this is approximate: what is lost is named for every pair of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2d_deploy.equalized_linear import linear_at
from s2d_deploy.layer_inputs import calibrated_ops, input_tokens
from s2d_deploy.pcdr import Batch
from s2d_deploy.producers import trace_producers
from s2d_deploy.weight_change import Change

# A neuron whose scaled activation leaves more of its variance unexplained is left alone.
UNEXPLAINED = 0.01


def scale_neurons(
    model: nn.Module, batches: Sequence[Batch], *, output: str | None = None, limit: float = 4.0, rows: int = 4096
) -> list[Change]:
    """Scale extreme neurons down through their activation, in place: ``f(z) ~ a * f(z / s) + b`` by least squares.

    A neuron whose peak exceeds `limit` times the median peak gets ``s = peak / (limit * median)`` in its row of the
    Linear before; the Linear behind takes `a` into its column and `b` into its bias. Not exact, because a GELU is
    not homogeneous; a neuron whose fit leaves more
    than `UNEXPLAINED` of its variance is left alone.

    Returns:
        For each pair of Linears the largest peak before and after; the detail names the mean unexplained share.
    """
    ops = calibrated_ops(model, batches, output)
    producers = trace_producers(model, ops, {n: t[:1] for n, t in batches[0].items()})
    pairs = [
        (name, producers[f"{name}.input"])
        for name, op in ops.items()
        if op.kind == "linear" and producers[f"{name}.input"].kind == "activation"
    ]
    pairs = [(name, p) for name, p in pairs if len(p.linears) == 1]
    tokens = input_tokens(model, batches, [p.linears[0] for _, p in pairs], rows)
    changes = []
    for name, producer in pairs:
        first, second = linear_at(model, producer.linears[0]), linear_at(model, name)
        function = model.get_submodule(producer.module)
        if second.bias is None:
            continue
        with torch.no_grad():
            x = tokens[producer.linears[0]].to(first.weight)
            z = first(x)
            y = function(z)
            peak = y.abs().amax(0)
            ceiling = limit * float(peak.median())
            lost = []
            for j in (peak > ceiling).nonzero().flatten().tolist() if ceiling > 0 else []:
                s = float(peak[j]) / ceiling
                a, b, unexplained = _line(function(z[:, j] / s), y[:, j])
                if unexplained > UNEXPLAINED:
                    continue
                lost.append(unexplained)
                first.weight[j] /= s
                if first.bias is not None:
                    first.bias[j] /= s
                second.bias.add_(b * second.weight[:, j])
                second.weight[:, j] *= a
            if lost:
                after = float(function(first(x)).abs().max())
                detail = f"{len(lost)} neuron(s), unexplained {sum(lost) / len(lost):.2%} of their variance"
                changes.append(Change((producer.linears[0], name), "neurons", float(peak.max()), after, detail))
    return changes


def _line(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Least-squares ``y ~ a x + b`` and the share of the variance of y that it does not explain."""
    x, y = x.double(), y.double()
    dx, dy = x - x.mean(), y - y.mean()
    if float(dx.square().sum()) == 0 or float(dy.square().sum()) == 0:
        return 1.0, 0.0, 1.0
    a = float((dx * dy).sum() / dx.square().sum())
    return a, float(y.mean() - a * x.mean()), float((dy - a * dx).square().sum() / dy.square().sum())


__all__ = ["scale_neurons"]
