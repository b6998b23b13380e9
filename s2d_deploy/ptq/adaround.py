"""AdaRound: whether each weight is rounded up or down is learned, layer by layer, on the layer's output.

Nagel et al., arXiv 2004.10568. With ``h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)`` (equation 23; zeta 1.1,
gamma -0.1) the soft-rounded weight is ``s clip(floor(W / s) + h(V), qmin, qmax)`` (equation 22). Adam minimizes the
error of the layer's output on sampled rows plus ``lambda sum(1 - |2 h - 1|^beta)`` (equations 21, 24), whose beta falls
from 20 to 2, so that roundings are free first and are driven to 0 or 1 at the end. Rows are those of the simulated
model, the wanted outputs those of the float model (the asymmetric form, equation 25, without the activation function).

Rows are weighed by one over the power of their outputs (`relative`; not in the paper): otherwise a few tokens with huge
outputs, which a post-LN encoder has, rule the loss.
Both terms are made free of units, so that one lambda serves every layer: the output error is divided by that of round
to nearest, and the sum is a mean. What is lost: only neighbouring codes can be chosen, and a local search in one layer
knows nothing of the layers behind. An output channel whose error on the sampled rows is not below that of round to
nearest keeps round to nearest; on other data nothing is promised.
"""

from __future__ import annotations

import logging
import math

import torch
from pydantic import Field
from torch import Tensor

from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.ptq.reconstruction import Reconstruction
from s2d_deploy.ptq.weight_matrix import WeightMatrix, weight_matrix

logger = logging.getLogger(__name__)

ZETA, GAMMA = 1.1, -0.1


class Options(passes.Options):
    """How long, and on how much."""

    iterations: int = Field(1000, ge=1, description="Adam steps for each layer; the paper takes 10,000")
    rows: int = Field(1024, ge=1, description="calibration rows that are kept of each layer")
    batch: int = Field(128, ge=1, description="rows in one step")
    learning_rate: float = Field(3e-2, gt=0, description="of Adam, on V")
    strength: float = Field(10.0, gt=0, description="lambda: weight of the term that drives roundings to 0 or 1")
    relative: bool = Field(
        True, description="each token's error relative to its output; false counts all alike, as the paper does"
    )
    warm_start: float = Field(0.2, ge=0, lt=1, description="share of the steps before that term sets in")


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Choose the codes of every quantized weight.

    Raises:
        ModelError: no quantized weight, or weights that another pass has rounded.
        DataError: no calibration data.
    """
    work = Reconstruction(quantized, context, "adaround")
    for group in work.groups:
        rows, float_rows = work.sampled(group, options.rows, "float", relative=options.relative)
        for name in group:
            context.progress(f"adaround: {name}")
            matrix = weight_matrix(work.float_layer(name), work.site(name))
            wanted = float_rows @ matrix.weight.float().T
            codes = learned_rounding(matrix, rows, wanted, options, context.seed)
            nearest = _row_errors(matrix, matrix.nearest_codes, rows, wanted)
            keep = nearest <= _row_errors(matrix, codes, rows, wanted)
            logger.debug("adaround: %s: %d of %d rows keep round to nearest", name, int(keep.sum()), keep.numel())
            work.choose(name, matrix.stored(torch.where(keep[:, None], matrix.nearest_codes, codes)))
    return quantized


def learned_rounding(matrix: WeightMatrix, rows: Tensor, wanted: Tensor, options: Options, seed: int) -> Tensor:
    """Codes (float64, integers, ``(N, K)``), each the floor or the ceiling of its weight, or the bound of its range.

    Args:
        matrix: N x K weights and their grid.
        rows: float32 ``(rows, K)`` that the quantized weight multiplies.
        wanted: float32 ``(rows, N)``, the outputs to reproduce, without bias.
        options: how to learn.
        seed: of the order of rows.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = matrix.scale.float()
    down = torch.floor(matrix.weight / matrix.scale)
    rest = (matrix.weight / matrix.scale - down).float()
    down = down.float()
    # h(V) is the weight itself at the start (section 3.2).
    v = torch.logit(((rest - GAMMA) / (ZETA - GAMMA)).clamp(1e-6, 1 - 1e-6)).requires_grad_(True)
    unit = float(_row_errors(matrix, matrix.nearest_codes, rows, wanted).mean())
    if unit == 0.0:
        return matrix.nearest_codes
    optimizer = torch.optim.Adam([v], lr=options.learning_rate)
    warm = int(options.warm_start * options.iterations)
    for step in range(options.iterations):
        at = torch.randint(rows.shape[0], (min(options.batch, rows.shape[0]),), generator=generator)
        h = rectified_sigmoid(v)
        soft = scale * (down + h).clamp(matrix.qmin, matrix.qmax)
        loss = (rows[at] @ soft.T - wanted[at]).square().mean() / unit
        if step >= warm:
            beta = annealed(step - warm, options.iterations - warm)
            loss = loss + options.strength * (1 - (2 * h - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        up = (rectified_sigmoid(v) >= 0.5).float()
        return (down + up).clamp(matrix.qmin, matrix.qmax).double()


def rectified_sigmoid(v: Tensor) -> Tensor:
    """Equation 23: 0 to 1, and exactly 0 or 1 for finite `v`."""
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def annealed(step: int, steps: int, first: float = 20.0, last: float = 2.0) -> float:
    """beta, from `first` to `last` along half a cosine."""
    return last + 0.5 * (first - last) * (1 + math.cos(math.pi * step / max(steps, 1)))


def _row_errors(matrix: WeightMatrix, codes: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """Mean squared output error of each output channel, float32 ``(N,)``."""
    return (rows @ matrix.values(codes).float().T - wanted).square().mean(0)
