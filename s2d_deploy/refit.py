"""Refit the Linears behind changed layers, so that they give the original model's outputs again: ridge regression.

What is lost: what a nonlinearity in between made of the change; the data is read once for every Linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, message
from s2d_deploy.layer_inputs import calibrated_ops, real_rows, token_weights
from s2d_deploy.pcdr import Batch, forward_batches
from s2d_deploy.weight_change import Change

# As a share of the mean eigenvalue: calibration tokens are fewer than directions.
RIDGE = 1e-2


def refit(
    model: nn.Module, original: nn.Module, batches: Sequence[Batch], *, after: Sequence[str], output: str
) -> list[Change]:
    """Least-squares compensation behind changed layers: each later Linear gives the original's outputs again.

    In execution order, for every Linear behind the first of `after`: with its inputs X' in the changed model and the
    outputs Y that the original gave, ``W' = W + (Y - W X') X'^T (X' X'^T + ridge)^-1`` on centred values; the bias
    takes the means, and each token weighs one over the power of its output. Every Linear sees those before it
    refitted, so the data is read once for each.

    Returns:
        For each layer the relative error of its output before and after.
    """
    ops = calibrated_ops(model, batches, output)
    names = [name for name, op in ops.items() if op.kind == "linear"]
    first = min((names.index(n) for n in after if n in names), default=len(names))
    changes = []
    for name in names[first + 1 :]:
        if name in after:
            continue
        changes.append(_refit_layer(model, original, batches, name))
    return changes


def _refit_layer(model: nn.Module, original: nn.Module, batches: Sequence[Batch], name: str) -> Change:
    layer, old = model.get_submodule(name), original.get_submodule(name)
    if not isinstance(layer, nn.Linear) or not isinstance(old, nn.Linear):
        raise ModelError(message(f"layer {name!r} cannot be refitted", expected="a Linear in both models"))
    k, n = layer.in_features, layer.out_features
    sums = {
        key: torch.zeros(shape, dtype=torch.float64)
        for key, shape in {"x": (k,), "e": (n,), "xx": (k, k), "ex": (n, k), "ee": (n,), "y": (n,), "yy": (n,)}.items()
    }
    count, tokens = 0.0, 0
    for batch in batches:
        seen: dict[str, Tensor] = {}
        for which, root, module in (("new", model, layer), ("old", original, old)):
            handle = module.register_forward_hook(_keep(seen, which))
            try:
                forward_batches(root, [batch])
            finally:
                handle.remove()
        keep = real_rows(batch, seen["new x"])
        x, y = seen["new x"][keep].double(), seen["old y"][keep].double()
        e = y - seen["new y"][keep].double()
        w = token_weights(y if old.bias is None else y - old.bias.detach().double()).unsqueeze(1)
        count, tokens = count + float(w.sum()), tokens + x.shape[0]
        for key, value in {
            "x": (w * x).sum(0),
            "e": (w * e).sum(0),
            "xx": x.T @ (w * x),
            "ex": e.T @ (w * x),
            "ee": (w * e.square()).sum(0),
            "y": (w * y).sum(0),
            "yy": (w * y.square()).sum(0),
        }.items():
            sums[key] += value
    mx, me, my = sums["x"] / count, sums["e"] / count, sums["y"] / count
    covariance = sums["xx"] / count - torch.outer(mx, mx)
    cross = sums["ex"] / count - torch.outer(me, mx)
    ridge = RIDGE * float(covariance.diagonal().mean())
    delta = torch.linalg.solve(covariance + ridge * torch.eye(k, dtype=torch.float64), cross.T).T
    with torch.no_grad():
        layer.weight += delta.to(layer.weight)
        if layer.bias is not None:
            layer.bias.add_((me - delta @ mx).to(layer.bias))
    power = float((sums["yy"] / count - my.square()).sum())
    error = float((sums["ee"] / count).sum())
    # E|e - delta (x - mean)|^2 with the mean taken by the bias.
    left = float(
        (sums["ee"] / count - me.square()).sum() - 2 * (delta * cross).sum() + ((delta @ covariance) * delta).sum()
    )
    return Change((name,), "refitted", error / power, max(left, 0.0) / power, f"ridge {RIDGE:g}, {tokens} tokens")


def _keep(seen: dict[str, Tensor], which: str) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        seen[f"{which} x"], seen[f"{which} y"] = args[0].detach(), result.detach()

    return hook


__all__ = ["refit"]
