"""GPTQ: columns are rounded one after the other, and what rounding one of them spoils the others make good.

Frantar et al., arXiv 2210.17323, algorithm 1: with ``H = E[x x^T]`` of the layer's input rows and U the upper Cholesky
factor of its damped inverse, column j is rounded to its grid, and its error over ``U_jj`` times row j of U is taken
from the columns not yet rounded; a block of columns at a time, so that most of the work is matrix products.

The grid is the plan's own: scales are not searched again, and stay where they are stored when columns are taken in
another order ("static groups"), so codes stay expressible in ONNX. Input rows are those of the simulated model, that is
with quantized activations where the plan has them. What is lost against the paper: nothing is learned from the float
model's own rows (`erq` does that). Not guaranteed: that a smaller error of each layer is a smaller error of the model.
An output channel for which rounding to nearest has the smaller calibration error keeps it (not in the paper).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from s2d_deploy.errors import DataError, message
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.ptq.reconstruction import Reconstruction, float_grams
from s2d_deploy.ptq.weight_matrix import WeightMatrix, better_rows, weight_matrix

logger = logging.getLogger(__name__)

_MOST = 10.0  # beyond, H is hardly looked at


class Options(passes.Options):
    """How columns are taken, and which rows are looked at."""

    act_order: bool = Field(True, description="take columns by falling input power instead of as they are stored")
    damp: float = Field(0.01, gt=0, le=1, description="added to H's diagonal, as a share of the diagonal's mean")
    block: int = Field(128, ge=1, description="columns between two updates of all the others; speed, not result")
    sequential: bool = Field(
        True, description="see inputs with every earlier layer quantized; false reads the float model, once"
    )
    relative: bool = Field(
        False, description="each token's error relative to its output, not all alike as in the paper; sequential only"
    )


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Choose the codes of every quantized weight.

    ``plan.info["gptq"]`` holds the damping: what was asked for, and the layers whose H needed more.

    Raises:
        ModelError: no quantized weight, or weights that another pass has rounded.
        DataError: no calibration data, or a layer that it drives to NaN or infinity.
    """
    work = Reconstruction(quantized, context, "gptq")
    raised: dict[str, float] = {}
    for group, gram in _grams(work, context, options):
        damp = needed_damp(gram, options.damp, ", ".join(group))
        if damp > options.damp:
            raised |= dict.fromkeys(group, damp)
            logger.warning(
                "gptq: %s: H is not positive definite with damp %g; %g is used", ", ".join(group), options.damp, damp
            )
        for name in group:
            context.progress(f"gptq: {name}")
            matrix = weight_matrix(work.float_layer(name), work.site(name))
            codes = gptq_codes(matrix, gram, damp=damp, block=options.block, act_order=options.act_order)
            codes, before, after = better_rows(matrix, codes, gram)
            logger.debug("gptq: %s: output error %.3g, rounded to nearest %.3g", name, after, before)
            work.choose(name, matrix.stored(codes))
    quantized.plan.info["gptq"] = {"damp": options.damp, "damp_raised": raised}
    return quantized


def _grams(work: Reconstruction, context: Context, options: Options) -> Iterator[tuple[Sequence[str], Tensor]]:
    if not options.sequential:
        yield from float_grams(work.reference, context, work.groups)
        return
    for group in work.groups:
        yield group, work.statistics(group, relative=options.relative).gram


def gptq_codes(
    matrix: WeightMatrix, gram: Tensor, *, damp: float = 0.01, block: int = 128, act_order: bool = False
) -> Tensor:
    """Codes of algorithm 1.

    Args:
        matrix: N x K weights and their grid.
        gram: float64 ``(K, K)``, positive semidefinite; its scale does not matter.
        damp: share of the mean of its diagonal that is added to the diagonal.
        block: columns in one lazy batch.
        act_order: take columns by falling diagonal.

    Returns:
        Float64 ``(N, K)``, integers. An input that is always zero is rounded to nearest.
    """
    k = gram.shape[0]
    diagonal = gram.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(k)
    upper = inverse_factor(gram[order][:, order], damp)
    left = matrix.weight[:, order].clone()
    codes = torch.empty_like(left)
    for start in range(0, k, block):
        end = min(start + block, k)
        errors = torch.empty_like(left[:, start:end])
        for j in range(start, end):
            column = order[j : j + 1]
            code = matrix.nearest(left[:, j : j + 1], column)
            codes[:, j : j + 1] = code
            error = (left[:, j : j + 1] - matrix.values(code, column)) / upper[j, j]
            errors[:, j - start : j - start + 1] = error
            left[:, j:end] -= error * upper[j, j:end]
        left[:, end:] -= errors @ upper[start:end, end:]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result


def needed_damp(gram: Tensor, damp: float, title: str = "a layer") -> float:
    """The smallest of `damp`, 10 `damp`, 100 `damp`, ... at which float64 can factor the damped matrix.

    Few or collinear calibration rows make H singular; a share of the diagonal's mean below the rounding of its largest
    eigenvalue does not repair that.

    Raises:
        DataError: H is not finite, or indefinite whatever is added to its diagonal.
    """
    if not bool(torch.isfinite(gram).all()):
        raise DataError(
            message(
                f"gptq: the inputs of {title} are not finite on the calibration data",
                expected="finite activations",
                fix="look for NaN in the data; `s2d-deploy diagnose` names layers with huge activations",
            )
        )
    tried = damp
    while tried <= _MOST:
        try:
            if bool(torch.isfinite(inverse_factor(gram, tried)).all()):
                return tried
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            logger.debug("gptq: %s: damp %g is not enough", title, tried)
        tried *= 10
    raise DataError(
        message(
            f"gptq: H of {title} is not positive definite",
            found=f"damping up to {_MOST:g} of its mean diagonal does not help",
            fix="use more calibration samples",
        )
    )


def inverse_factor(gram: Tensor, damp: float) -> Tensor:
    """Upper Cholesky factor U of the damped inverse: ``(G + damp mean(diag G) I)^-1 = U^T U``, float64 ``(K, K)``."""
    mean = float(gram.diagonal().mean())
    damped = gram.clone()
    # An input that was always zero would only be damped; a one keeps the system well scaled and decouples it.
    dead = gram.diagonal() == 0
    damped.diagonal().add_(damp * mean).masked_fill_(dead, mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor
