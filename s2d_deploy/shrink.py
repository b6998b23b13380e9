"""Shrink the leading triplets of flagged layers, and compensate in the same layer: the paper's aim in closed form.

What is lost: the float output moves, by as little as calibration data allow, and that is for the caller to measure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import nn

from s2d_deploy.equalized_linear import linear_at
from s2d_deploy.errors import ModelError, RecipeError, message
from s2d_deploy.layer_inputs import input_moments
from s2d_deploy.pcdr import Batch
from s2d_deploy.spectral import top_triplets, weight_matrix
from s2d_deploy.weight_change import Change

Compensation = Literal["none", "layer"]
# As a share of the mean eigenvalue: calibration tokens are fewer than directions.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3)


def shrink_triplets(
    model: nn.Module,
    batches: Iterable[Batch],
    flagged: Mapping[str, int],
    *,
    factor: float = 0.5,
    compensate: Compensation = "layer",
) -> list[Change]:
    """Shrink the leading triplets of `flagged` Linears in place, with the least change in their outputs.

    For each triplet the new weight fulfils ``u^T W' v = factor * s``. With "none", ``W' = W - (1 - factor) s u v^T``.
    With "layer", of all W' that fulfil it, the one with the least ``E |(W' - W)(x - mean)|^2 + ridge |W' - W|^2``: with
    the inputs' covariance C, ``W' = W - (1 - factor) s u d^T``, ``d = (C + ridge)^-1 v / (v^T (C + ridge)^-1 v)``
    (Lagrange); the bias takes the mean. Each token weighs one over the power of its output: unweighted, a few outlier
    tokens rule, and their mean, put into the bias, drowns all others. Without a ridge, d grows along directions that
    the inputs hardly use, and s_max may grow with it; so the least ridge of a grid is taken with which no singular
    value exceeds the largest that plain shrinking leaves by more than 5 %.

    Args:
        model: changed in place.
        batches: calibration data.
        flagged: k_target by layer; layers with 0 and Convs are left alone.
        factor: what is left, 0 to 1.
        compensate: see above.

    Returns:
        For each layer s_max before and after.

    Raises:
        RecipeError: `factor` is out of range.
        ModelError: no such Linear.
    """
    if not 0 <= factor <= 1:
        raise RecipeError(message("factor is out of range", expected="0 to 1", found=str(factor)))
    modules = dict(model.named_modules())
    chosen = {name: k for name, k in flagged.items() if k > 0 and not isinstance(modules.get(name), nn.Conv2d)}
    wrong = [name for name in chosen if name not in modules]
    if wrong:
        raise ModelError(message(f"no layer called {', '.join(map(repr, wrong))}"))
    moments = input_moments(model, batches, list(chosen)) if compensate == "layer" and chosen else {}
    changes = []
    for name, k in chosen.items():
        layer = linear_at(model, name)
        matrix = weight_matrix(layer).double()
        triplets = top_triplets(matrix, k)
        u, s, v = triplets.U.double(), triplets.S.double(), triplets.V.double()
        plain = -(1 - factor) * (u * s) @ v.T
        delta, mean, words = plain, torch.zeros(matrix.shape[1], dtype=torch.float64), "no compensation"
        if name in moments:
            mean, covariance = moments[name]
            bound = 1.05 * float(torch.linalg.matrix_norm(matrix + plain, 2))
            size, identity = float(covariance.diagonal().mean()), torch.eye(len(mean), dtype=torch.float64)
            for ridge in RIDGES:
                solved = torch.linalg.solve(covariance + (ridge * size + 1e-30) * identity, v)  # (K, k)
                # d_r with v_q . d_r = 1 for q = r, else 0: every constraint holds at once.
                d = solved @ torch.linalg.inv(v.T @ solved)
                found = -(1 - factor) * (u * s) @ d.T
                if float(torch.linalg.matrix_norm(matrix + found, 2)) <= bound:
                    delta, words = found, f"compensated, ridge {ridge:g}"
                    break
        with torch.no_grad():
            layer.weight += delta.to(layer.weight)
            if layer.bias is not None:
                layer.bias.sub_((delta @ mean).to(layer.bias))
        after = float(torch.linalg.matrix_norm(weight_matrix(layer), 2))
        detail = f"{k} triplet(s) to {factor:g} of their size, {words}"
        changes.append(Change((name,), "shrunk", float(s[0]), after, detail))
    return changes


__all__ = ["Compensation", "shrink_triplets"]
