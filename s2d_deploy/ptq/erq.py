"""ERQ: two ridge regressions, one for the error of quantized activations, one for the error of quantized weights.

Zhong et al., "ERQ: Error Reduction for Post-Training Quantization of Vision Transformers", arXiv 2407.06794. For a
layer with float weight W, float rows x and the rows q that the quantized model multiplies:

1. *Activation error* (section 4.1): the weight, still in float, that reproduces ``W x`` from q,
   ``argmin E|W x - W' q|^2 + lambda |W' - W|^2``, in closed form.
2. *Weight error* (section 4.2): scales are set for W', half of the columns is rounded, the roundings are refined one
   element of each row at a time (where the gradient of the output error points against the rounding error; at most
   `refinements` times), and the other half is regressed on the error that is left. Then that half is halved, until
   nothing is left.

Against the paper: rows are weighed by one over the power of their outputs (`relative`), because in a post-LN encoder a
few tokens with huge outputs otherwise rule both regressions, and the rest of the model is lost; the outputs wanted may
be the float model's own, so that errors of earlier layers are regressed too (`reference: float`); refinement sees exact
second moments instead of a proxy of mean and covariance, so a step is taken only if it lowers the error; the paper's
reparameterization of LayerNorm inputs is another pass; lambda is a share of the mean input power, and each layer takes
the one whose regression, fitted on one half of the calibration data, leaves the least error on the other half: where
there are few rows per input channel, a lambda that is too small fits noise. An output channel keeps its plain rounding
unless the regressions lower its error on the half of the data that they have not seen. Not guaranteed: that the
model's output gets better.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor

from s2d_deploy.grid import PerTensor
from s2d_deploy.observers import weight_parameters
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.ptq.reconstruction import Reconstruction, Statistics
from s2d_deploy.ptq.weight_matrix import WeightMatrix, weight_matrix

Folds = tuple[Statistics, Statistics]
Ridge = Literal["auto"] | Annotated[float, Field(gt=0)]
RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)  # tried by cross-validation


class Options(passes.Options):
    """Strength of the two regressions, and how long roundings are refined."""

    activation_ridge: Ridge = Field(
        "auto",
        description="lambda of the first regression, as a share of the mean input power; auto: each layer's own, by "
        "two-fold cross-validation on the calibration data",
    )
    weight_ridge: Ridge = Field("auto", description="lambda of the second regression, likewise")
    refinements: int = Field(100, ge=0, description="at most so many roundings of a row are turned round in each half")
    reference: Literal["float", "simulated"] = Field(
        "simulated", description="whose rows the wanted outputs are made of: the float model's, or the simulated one's"
    )
    relative: bool = Field(
        True, description="each token's error relative to its output; false counts all alike, as the paper does"
    )


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Choose scales and codes of every quantized weight.

    Raises:
        ModelError: no quantized weight, or weights that another pass has rounded.
        DataError: no calibration data.
    """
    work = Reconstruction(quantized, context, "erq")
    chosen: dict[str, dict[str, float]] = {}
    for group in work.groups:
        folds = work.folds(group, options.reference, relative=options.relative)
        for name in group:
            context.progress(f"erq: {name}")
            chosen[name] = _serve(work, name, folds, options)
    quantized.plan.info["erq"] = chosen
    return quantized


def _serve(work: Reconstruction, name: str, folds: Folds, options: Options) -> dict[str, float]:
    """Choose the codes of one layer; returns what was chosen for it, by name."""
    whole = folds[0].pooled(folds[1])
    layer, site, config = work.float_layer(name), work.site(name), work.context.config
    plain = weight_matrix(layer, site)
    first = _ridge(options.activation_ridge, lambda ridge: _activation_error(plain, folds, ridge))
    regressed = _regressed(plain, whole, first)
    scale, _ = weight_parameters(regressed.float().reshape(plain.shape), site.grid, config.weights, config.percentile)
    new = replace(site, scale=scale)
    matrix = weight_matrix(layer, new, weight=regressed)
    seen = [(weight_matrix(layer, new, weight=_regressed(plain, a, first)), a, b) for a, b in (folds, folds[::-1])]
    second = _ridge(options.weight_ridge, lambda ridge: float(_weight_error(plain, seen, ridge, 0).sum()))
    codes = rounded_by_halves(matrix, whole.gram, ridge=second, refinements=options.refinements)
    unseen = _weight_error(plain, seen, second, options.refinements)
    nearest = _excess(plain.values(plain.nearest_codes), plain, *folds)
    keep = nearest <= unseen
    if isinstance(site.grid.granularity, PerTensor):
        keep = (nearest.sum() <= unseen.sum()).expand(keep.shape)
    rows = keep if scale.dim() == 1 else keep.reshape(-1, *[1] * (scale.dim() - 1))
    scale = torch.where(rows if scale.dim() else keep[0], site.scale, scale)
    codes = torch.where(keep[:, None], plain.nearest_codes, codes)
    work.quantized.plan.sites[site.name] = replace(site, scale=scale)
    work.choose(name, matrix.stored(codes))
    return {"activation_ridge": first, "weight_ridge": second, "rows_kept": int(keep.sum()), "rows": keep.numel()}


def _ridge(given: Literal["auto"] | float, unseen_error: Callable[[float], float]) -> float:
    return min(RIDGES, key=unseen_error) if given == "auto" else given


def _regressed(plain: WeightMatrix, statistics: Statistics, ridge: float) -> Tensor:
    return activation_regression(plain.weight, statistics.gram, cast(Tensor, statistics.cross), ridge)


def _activation_error(plain: WeightMatrix, folds: Folds, ridge: float) -> float:
    """Of the first regression, on the half that it has not seen."""
    return sum(float(_excess(_regressed(plain, a, ridge), plain, b).sum()) for a, b in (folds, folds[::-1]))


def _weight_error(
    plain: WeightMatrix, seen: Sequence[tuple[WeightMatrix, Statistics, Statistics]], ridge: float, refinements: int
) -> Tensor:
    """Of both regressions and the rounding, on the half that they have not seen: float64 ``(N,)``."""
    total = torch.zeros(plain.weight.shape[0], dtype=torch.float64)
    for matrix, fitted, unseen in seen:
        codes = rounded_by_halves(matrix, fitted.gram, ridge=ridge, refinements=refinements)
        total += _excess(matrix.values(codes), plain, unseen)
    return total


def activation_regression(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The weight that makes the float output from quantized rows (equation 5 of the paper).

    Args:
        weight: float64 ``(N, K)``.
        gram: float64 ``(K, K)``, mean of ``q q^T``.
        cross: float64 ``(K, K)``, mean of ``x q^T``.
        ridge: lambda over the mean of the diagonal of `gram`.

    Returns:
        Float64 ``(N, K)``; `weight` itself where x is q.
    """
    penalty = _penalty(gram, ridge)
    error: Tensor = weight @ (cross - gram)
    return weight + _solve(gram, penalty, error)


def rounded_by_halves(matrix: WeightMatrix, gram: Tensor, *, ridge: float, refinements: int) -> Tensor:
    """Codes of the second step (section 4.2): float64 ``(N, K)``, integers.

    Args:
        matrix: N x K weights and their grid.
        gram: float64 ``(K, K)``, mean of ``q q^T``.
        ridge: lambda over the mean of the diagonal of `gram`.
        refinements: of each row in each half.
    """
    k = gram.shape[0]
    penalty = _penalty(gram, ridge)
    weight = matrix.weight.clone()
    codes = torch.empty_like(weight)
    start = 0
    while start < k:
        half = slice(start, start + max((k - start + 1) // 2, 1))
        rest = slice(half.stop, k)
        codes[:, half] = refined(matrix, weight[:, half], half, gram[half, half], refinements)
        if half.stop < k:
            error = matrix.values(codes[:, half], half) - weight[:, half]
            weight[:, rest] -= _solve(gram[rest, rest], penalty, error @ gram[half, rest])
        start = half.stop
    return codes


def refined(matrix: WeightMatrix, weight: Tensor, columns: slice, gram: Tensor, steps: int) -> Tensor:
    """Round `weight` (float64, `columns` of the matrix) to nearest, then turn single roundings round while that helps.

    In every step each row turns the rounding whose gradient is largest among those that point against their rounding
    error, and stays as it is once that does not lower its output error.
    """
    codes = matrix.nearest(weight, columns)
    delta = matrix.values(codes, columns) - weight
    gradient = delta @ gram
    rows = torch.arange(weight.shape[0])
    power = gram.diagonal()
    for _ in range(steps):
        turned = codes - delta.sign()
        possible = (gradient * delta > 0) & (turned >= matrix.qmin) & (turned <= matrix.qmax)
        column = torch.where(possible, gradient.abs(), -1.0).argmax(1)
        new = turned[rows, column]
        old_delta = delta[rows, column]
        scale = matrix.scale[:, columns][rows, column]
        new_delta = (new.float() * scale.float()).double() - weight[rows, column]
        change = new_delta - old_delta
        # Exact: e(delta + change) - e(delta) with one element changed.
        gain = 2 * change * gradient[rows, column] + change.square() * power[column]
        take = possible[rows, column] & (gain < 0)
        if not bool(take.any()):
            break
        taken, at = rows[take], column[take]
        codes[taken, at] = new[take]
        delta[taken, at] = new_delta[take]
        gradient[taken] += change[take, None] * gram[at]
    return codes


def _penalty(gram: Tensor, ridge: float) -> float:
    mean = float(gram.diagonal().mean())
    return ridge * mean if mean > 0 else 1.0


def _solve(gram: Tensor, penalty: float, right: Tensor) -> Tensor:
    """``right (gram + penalty I)^-1``, float64 ``(N, K)``; `gram` is positive semidefinite."""
    damped = gram.clone()
    damped.diagonal().add_(penalty)
    result: Tensor = torch.cholesky_solve(right.T, torch.linalg.cholesky(damped)).T
    return result


def _excess(weight: Tensor, plain: WeightMatrix, *parts: Statistics) -> Tensor:
    """``E|W x - W' q|^2`` of each row but for a constant, summed over `parts`, float64 ``(N,)``; W is `plain`'s."""
    total = torch.zeros(weight.shape[0], dtype=torch.float64)
    for part in parts:
        total += ((weight @ part.gram - 2 * (plain.weight @ cast(Tensor, part.cross))) * weight).sum(1)
    return total
