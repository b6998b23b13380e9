"""SmoothQuant: divide activation channels by a factor that the weights behind them take (arXiv 2211.10438).

``y = (x / s) (s W)``: a channel with an outlier shares its range with its column of the weight. The division is folded
into the LayerNorm or Linear that makes x where the model's graph allows it (pre-LN q, k, v and fc1; attention's value
in front of the output projection; ReLU). Where a residual sum reads the norm too (post-LN, BERT) or a GELU stands in
front it cannot be folded: ``insert: true`` puts it there as one product at run time, otherwise the layer is left out
and listed.

What is lost: nothing in real arithmetic; in float32 the last bits. Not guaranteed: a lower error with a fixed
`alpha`, which moves range from activations into weights whether that helps or not. ``alpha: auto`` measures, and
keeps a tensor as it is where no alpha helps on the calibration tokens. It looks at real tokens; where ranges are set
from padding as well, and padding is larger than they are once they are smoothed (all-MiniLM-L6-v2 behind its GELUs: 24
against 1), what is executed is worse than what it measured.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from s2d_deploy import formats
from s2d_deploy.errors import ModelError, message
from s2d_deploy.fake_quant import dequantize, quantize, token_scale
from s2d_deploy.observers import Histogram, activation_parameters, weight_parameters
from s2d_deploy.plan import Plan, Site
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.activations import sampled_rows
from s2d_deploy.ptq.folding import Group, Unchanged, absorb, first_sample, input_peaks, multiply, reader_groups
from s2d_deploy.ptq.input_transform import ChannelScale, attach
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.quantize import QuantizeConfig, build_plan, quantized_ops

logger = logging.getLogger(__name__)

ALPHAS = tuple(round(0.1 * i, 1) for i in range(11))
# Factors beyond these would only move the problem to the other side.
_LEAST, _MOST = 1e-4, 1e4


class Options(passes.Options):
    """How strongly, and where."""

    alpha: Literal["auto"] | Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.5, description="Share of the range that moves into the weights; `auto` tries a grid for each tensor."
    )
    insert: bool = Field(
        False, description="Put a product in front of layers whose factors no weight can hold (post-LN, GELU)."
    )
    rows: int = Field(512, ge=16, description="Calibration tokens that `alpha: auto` measures on.")


@dataclass(slots=True)
class Scaled:
    """What became of each group, for ``plan.info``."""

    folded: dict[str, float | None] = field(default_factory=dict)
    inserted: dict[str, float | None] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def smoothing_factors(peaks: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``, Xiao et al., arXiv 2211.10438, equation 4.

    Args:
        peaks: largest magnitude of each input channel, (K,).
        weight: all rows that read it, (N, K).
        alpha: 0 to 1.

    Returns:
        float64 (K,), positive; 1 for a channel that is zero on either side.
    """
    x, w = peaks.double(), weight.double().abs().amax(0)
    s = x**alpha / w.clamp_min(1e-30) ** (1 - alpha)
    return torch.where((x > 0) & (w > 0), s.clamp(_LEAST, _MOST), torch.ones_like(s))


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Smooth every Linear's input that can be; what was left out stands in ``plan.info["smoothquant"]``.

    Raises:
        ModelError: nothing could be smoothed.
    """
    model, plan = quantized.model, quantized.plan
    sample = first_sample(context.batches())
    done = Scaled()
    wanted = quantized_ops(model, plan.ops, plan.precision, context.config)
    groups = [g for g in reader_groups(model, sample) if may_scale(model, g, options.insert, done, wanted)]
    if not groups:
        raise nothing_scaled("smoothquant", done)
    peaks = input_peaks(model, context.batches(), [name for g in groups for name in g.names])
    chooser = _Chooser(model, plan, context, options, groups) if options.alpha == "auto" else None
    unchanged = Unchanged(model, sample)
    for index, group in enumerate(groups):
        title = ", ".join(group.names)
        context.progress(f"smoothquant {index + 1} of {len(groups)}: {title}")
        served = [name for name in group.names if name in wanted]
        peak = torch.stack([peaks[name] for name in served]).amax(0)
        weight = torch.cat([_linear(model, name).weight.detach() for name in served])
        alpha = chooser.alpha(group, peak, weight) if chooser is not None else cast(float, options.alpha)
        if alpha is None:
            done.unchanged.append(title)
            continue
        factor = 1 / smoothing_factors(peak, weight, alpha)
        place(model, group, factor, alpha, options.insert, unchanged, done, wanted)
    if not done.folded and not done.inserted and not done.unchanged:
        raise nothing_scaled("smoothquant", done)
    for title, reason in done.left_out.items():
        logger.info("smoothquant leaves out %s: %s", title, reason)
    plan.info["smoothquant"] = {
        "folded": done.folded,
        "inserted": done.inserted,
        "unchanged": done.unchanged,
        "left_out": done.left_out,
    }
    return Quantized(model, plan)


def place(
    model: nn.Module,
    group: Group,
    factor: Tensor,
    alpha: float,
    insert: bool,
    unchanged: Unchanged,
    done: Scaled,
    quantized: Collection[str],
) -> None:
    """Put `factor` in front of the group: into its maker where the model stays the same, else as a product.

    What is folded reaches every layer of the group; a product is put in front of those that are `quantized`.
    """
    title = ", ".join(group.names)
    if group.maker and unchanged.after(
        [model.get_submodule(name) for name in (group.maker, *group.names)], lambda: fold(model, group, factor)
    ):
        done.folded[title] = alpha
    elif insert:
        group = replace(group, names=tuple(name for name in group.names if name in quantized))
        title = ", ".join(group.names)
        insert_scale(model, group, factor)
        unchanged.check(f"a scale in front of {title}")
        done.inserted[title] = alpha
    else:
        done.left_out[title] = f"the model reads the output of {group.maker} elsewhere"


def may_scale(model: nn.Module, group: Group, insert: bool, done: Scaled, quantized: Collection[str]) -> bool:
    """Whether a scale of the group's input has a place and a use; the reason why not goes into `done`."""
    title = ", ".join(group.names)
    if not any(name in quantized for name in group.names):
        done.left_out[title] = "stays float"
    elif not all(isinstance(model.get_submodule(name), nn.Linear) for name in group.names):
        done.left_out[title] = "a convolution reads it"
    elif group.fixed:
        done.left_out[title] = group.fixed
    elif not group.maker and not insert:
        done.left_out[title] = group.reason
    else:
        return True
    return False


def nothing_scaled(name: str, done: Scaled) -> ModelError:
    """The error of a pass that found no tensor to scale."""
    return ModelError(
        message(
            f"{name} can change none of the model's layers",
            found="; ".join(f"{title}: {reason}" for title, reason in done.left_out.items()) or "no Linear",
            fix=f"set {name}.insert: true, or leave the pass out",
        )
    )


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


def fold(model: nn.Module, group: Group, factor: Tensor) -> None:
    """The maker gives ``x * factor`` and the group's layers undo it."""
    multiply(model.get_submodule(group.maker), factor)
    for name in group.names:
        absorb(model.get_submodule(name), factor)


def insert_scale(model: nn.Module, group: Group, factor: Tensor) -> None:
    """One product by `factor` in front of the group's layers, which undo it."""
    shared = ChannelScale(factor.numel())
    shared.factor.copy_(factor)
    for name in group.names:
        absorb(model.get_submodule(name), shared.factor)  # as stored, in float32
        attach(model.get_submodule(name), shared)


class _Chooser:
    """The alpha with the least error of a group's quantized outputs on sampled tokens; None where none helps."""

    def __init__(self, model: nn.Module, plan: Plan, context: Context, options: Options, groups: list[Group]) -> None:
        self.model, self.config = model, context.config
        self.rows = sampled_rows(model, context.batches(), [g.names[0] for g in groups], options.rows, context.seed)
        # Grids only: ranges are found for each candidate.
        ranges = replace(context.config, weights="absmax", activations="absmax")
        self.sites = build_plan(model, plan.ops, context.calibration(model, plan.ops), plan.precision, ranges).sites

    def alpha(self, group: Group, peaks: Tensor, weight: Tensor) -> float | None:
        rows = self.rows[group.names[0]]
        one = torch.ones(rows.shape[1], dtype=torch.float64)
        plain = self._error(group, rows, one)
        best, least = None, sum(plain)
        for alpha in ALPHAS:
            error = self._error(group, rows, smoothing_factors(peaks, weight, alpha))
            if sum(error) < least and error[0] <= plain[0] and error[1] <= plain[1]:
                best, least = alpha, sum(error)
        return best

    def _error(self, group: Group, rows: Tensor, factors: Tensor) -> tuple[float, float]:
        """The layers' squared output error, relative to each token's power in the mean, and relative to all power.

        The total alone sees only the few tokens with large outputs (and chose worse than no smoothing at all on a
        real post-LN model), the mean over tokens forgets them: neither may grow.
        """
        by_token = total = 0.0
        moved = (rows.double() / factors).float()
        for name in group.names:
            weight = _linear(self.model, name).weight.detach()
            left = quantized_rows(moved, self.sites.get(f"{name}.input"), self.config)
            right = quantized_weight((weight.double() * factors).float(), self.sites.get(f"{name}.weight"), self.config)
            wanted = rows @ weight.T
            error = (left @ right.T - wanted).square().sum(1)
            power = (wanted - wanted.mean(0)).square().sum(1)  # what all tokens share carries nothing
            each = power.clamp_min(0.1 * float(power.median()) + 1e-30)
            by_token += float((error / each).mean())
            total += float(error.sum() / (power.sum() + 1e-30))
        return by_token, total


def quantized_rows(x: Tensor, site: Site | None, config: QuantizeConfig) -> Tensor:
    """`x` (rows, K) through a range found on itself, on the grid of `site`; as it is where there is none."""
    if site is None:
        return x
    if site.grid.dynamic:
        # NVFP4's tensor scale is a range, too: found on `x`, not taken from a site whose tensor had another one.
        of_tensor = formats.tensor_scale(x.abs().max()) if site.grid.scale_format == "e4m3" else None
        scale = token_scale(x, site.grid, of_tensor)
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    else:
        histogram = Histogram()
        histogram.update(x, site.name)
        scale, zero_point = activation_parameters(histogram, site.grid, config.activations, config.percentile)
    return dequantize(quantize(x, scale, zero_point, site.grid), scale, zero_point, site.grid)


def quantized_weight(weight: Tensor, site: Site | None, config: QuantizeConfig) -> Tensor:
    """`weight` (N, K) with a range found on itself, on the grid of `site`; as it is where there is none."""
    if site is None:
        return weight
    scale, zero_point = weight_parameters(weight, site.grid, config.weights, config.percentile)
    return dequantize(quantize(weight, scale, zero_point, site.grid), scale, zero_point, site.grid)


__all__ = ["ALPHAS", "Options", "apply", "smoothing_factors"]
