"""FlatQuant: in front of each Linear an invertible matrix, learned so that both sides of the product round well.

``x W^T = (x T) (W T^-T)^T`` with ``T = diag(c) (P1 (x) P2)``: one scale for each channel and a Kronecker product of two
small matrices (Sun et al., arXiv 2410.09426, equations 3 and 4). Layers that read one tensor share one T. It is trained
on sampled calibration rows, to minimize the squared error of the quantized layer's output against the float one, with
straight-through gradients through both roundings. What a rotation spreads evenly this one puts where it does least.

- **Invertible by construction**: P1 and P2 are ``U diag(e^s) V``, U and V orthogonal (a start times the exponential of
  an antisymmetric matrix), s bounded by `STRETCH`; the inverse is known, and none is ever ill-conditioned.
- **Starts**: identity or Hadamard, each with c of ones or of SmoothQuant; the one with the least error is trained.
- **Chosen by measure**: a group keeps its tensor as it is, or an untrained start, where that has the least error on
  all sampled rows, rounded as `ranges` will round it.
- **Ranges**: the paper learns clipping thresholds with T. Here `ranges` sets them, by the recipe's own method, and
  training follows: every `_EVERY` steps the ranges are found by that method, in between they move with the tensor.

The scales c are folded into the norm or Linear in front where the graph allows it; else they are a product at run time.
P1 and P2 cost ``K (n1 + n2)`` float multiply-accumulates a row at run time. Against the paper: each group of layers by
itself, not whole blocks; attention's own products and the KV cache are not transformed (`rotation` turns heads). Not
guaranteed: that a smaller error of each layer is a smaller error of the model, nor of rows that were not sampled.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, message
from s2d_deploy.grid import Grid
from s2d_deploy.observers import Histogram, activation_parameters, weight_parameters
from s2d_deploy.plan import Site
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.activations import sampled_rows
from s2d_deploy.ptq.folding import Group, Unchanged, first_sample, input_peaks, reader_groups
from s2d_deploy.ptq.input_transform import Kronecker, attach, kronecker
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.ptq.rotation import head_rotation
from s2d_deploy.ptq.smoothquant import fold, insert_scale, quantized_rows, quantized_weight, smoothing_factors
from s2d_deploy.quantize import QuantizeConfig, build_plan

logger = logging.getLogger(__name__)

# |s| of a factor: one factor's condition number is at most e^(2 STRETCH) = 55.
STRETCH = 2.0
ALPHAS = (0.25, 0.5, 0.75)
_LARGEST = 256  # of n1 and n2; a prime width would make one of them the full matrix
_EVERY = 25
_BUDGET_BYTES = 2**28  # of sampled rows held at once
# Float32 products in another order differ by some 1e-6; a transform beyond this would be no transform of a float model.
_TOLERANCE = 1e-4


class Options(passes.Options):
    """How long is trained, on what, and from where."""

    iterations: int = Field(200, ge=0, description="Training steps for each group of layers; 0 keeps the best start.")
    learning_rate: float = Field(
        0.01, gt=0, le=1, description="Of Adam, falling to zero by a cosine; angles and log scales are what it moves."
    )
    rows: int = Field(2048, ge=16, description="Calibration tokens for each group.")
    batch: int = Field(256, ge=1, description="Tokens of one training step.")
    init: Literal["auto", "identity", "hadamard"] = Field(
        "auto", description="The matrices at the start; `auto` takes the one with the smaller error, tensor by tensor."
    )
    scale: bool = Field(True, description="Learn a scale for each channel as well.")
    relative: bool = Field(
        True,
        description="Each token's error relative to its output's power; false counts all alike (a few outlier tokens "
        "of a post-LN model then rule it).",
    )


@dataclass(slots=True)
class _Done:
    """What became of each group, for ``plan.info``; errors are relative and on the sampled rows."""

    transformed: dict[str, dict[str, float | str | bool]] = field(default_factory=dict)
    unchanged: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Part:
    """Layers of a group whose inputs lie on the same grid."""

    group: Group
    names: tuple[str, ...]
    title: str


@dataclass(frozen=True, slots=True)
class Transform:
    """``x -> (x c) (P1 (x) P2)``, all float64: scales ``(K,)``, matrices ``(n1, n1)`` and ``(n2, n2)``."""

    scale: Tensor
    p1: Tensor
    p2: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """Transformed rows, FP32 ``(rows, K)``."""
        return kronecker(x * self.scale.float(), self.p1.float(), self.p2.float())

    def weight(self, w: Tensor) -> Tensor:
        """The weight that multiplies them, FP32 ``(N, K)``; inverse of the matrices as they are stored, in FP32."""
        inverse = [torch.linalg.inv(p.float().double()).T for p in (self.p1, self.p2)]
        return kronecker(w.double() / self.scale.float().double(), *inverse).float()

    @property
    def condition(self) -> float:
        """Condition number of ``P1 (x) P2``."""
        return math.prod(float(torch.linalg.cond(p)) for p in (self.p1, self.p2))


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Transform the input of every quantized Linear where that helps; ``plan.info["flatquant"]`` says what was done.

    Raises:
        ModelError: no layer can be transformed (each is listed with its reason), or grids that are no integers.
    """
    model, plan = quantized.model, quantized.plan
    sample = first_sample(context.batches())
    done = _Done()
    # Grids only: ranges are found for each candidate.
    ranges = replace(context.config, weights="absmax", activations="absmax")
    sites = build_plan(model, plan.ops, context.calibration(model, plan.ops), plan.precision, ranges).sites
    parts = [part for group in reader_groups(model, sample) for part in _parts(model, group, sites, done)]
    if not parts:
        raise ModelError(
            message(
                "flatquant can change none of the model's layers",
                found="; ".join(f"{title}: {reason}" for title, reason in done.left_out.items()) or "no Linear",
                fix="leave the pass out",
            )
        )
    unchanged = Unchanged(model, sample)
    index = 0
    for chunk in _chunks(model, parts, options.rows):
        # A transform leaves what the layers behind it are given, so rows may be sampled beforehand.
        rows = sampled_rows(model, context.batches(), [part.names[0] for part in chunk], options.rows, context.seed)
        peaks = input_peaks(model, context.batches(), [part.names[0] for part in chunk])
        for part in chunk:
            index += 1
            context.progress(f"flatquant {index} of {len(parts)}: {part.title}")
            found = rows.pop(part.names[0])
            if not found.any():
                done.left_out[part.title] = "its input is zero on the calibration data"
                continue
            problem = _Problem(model, part.names, found, peaks[part.names[0]], sites, context, options)
            _serve(model, part, problem, unchanged, done)
    for title, reason in done.left_out.items():
        logger.info("flatquant leaves out %s: %s", title, reason)
    plan.info["flatquant"] = {
        "transformed": done.transformed,
        "unchanged": done.unchanged,
        "left_out": done.left_out,
    }
    return Quantized(model, plan)


def factors(width: int) -> tuple[int, int]:
    """``(n1, n2)``, n1 n2 = `width`, as near to each other as they can be; n1 is the smaller one."""
    first = math.isqrt(width)
    while width % first:
        first -= 1
    return first, width // first


def _parts(model: nn.Module, group: Group, sites: Mapping[str, Site], done: _Done) -> Iterator[_Part]:
    by_grid: dict[Grid | None, list[str]] = {}
    for name in group.names:
        if f"{name}.input" in sites or f"{name}.weight" in sites:
            by_grid.setdefault(sites[f"{name}.input"].grid if f"{name}.input" in sites else None, []).append(name)
    for names in by_grid.values():
        title = ", ".join(names)
        grids = [sites[s].grid for n in names for s in (f"{n}.input", f"{n}.weight") if s in sites]
        strange = [grid.name for grid in grids if not grid.integer]
        if not all(isinstance(model.get_submodule(name), nn.Linear) for name in names):
            done.left_out[title] = "a convolution reads it"
        elif group.fixed:
            done.left_out[title] = group.fixed
        elif strange:
            done.left_out[title] = f"{strange[0]} is no integer grid"
        elif max(factors(_linear(model, names[0]).in_features)) > _LARGEST:
            width = _linear(model, names[0]).in_features
            n1, n2 = factors(width)
            done.left_out[title] = f"K = {width} splits into {n1} x {n2} only, which costs too much"
        else:
            yield _Part(group, tuple(names), title)


def _chunks(model: nn.Module, parts: Sequence[_Part], rows: int) -> Iterator[list[_Part]]:
    """As many parts as `_BUDGET_BYTES` of sampled rows allow (sampling holds them twice), at least one."""
    chunk: list[_Part] = []
    used = 0
    for part in parts:
        size = 2 * 4 * rows * _linear(model, part.names[0]).in_features
        if chunk and used + size > _BUDGET_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(part)
        used += size
    yield chunk


def _serve(model: nn.Module, part: _Part, problem: _Problem, unchanged: Unchanged, done: _Done) -> None:
    plain = problem.error(None)
    starts = {name: (problem.error(start), start) for name, start in problem.starts()}
    name, (error, chosen) = min(starts.items(), key=lambda item: item[1][0])
    trained = problem.trained(chosen)
    after = problem.error(trained)
    learned = after < error
    if learned:
        error, chosen = after, trained
    if error >= plain:
        done.unchanged[part.title] = plain
        return
    _put(model, part, chosen, unchanged)
    done.transformed[part.title] = {
        "start": name,
        "learned": learned,
        "factors": f"{chosen.p1.shape[0]} x {chosen.p2.shape[0]}",
        "condition": round(chosen.condition, 3),
        "error_before": plain,
        "error": error,
    }


def _put(model: nn.Module, part: _Part, chosen: Transform, unchanged: Unchanged) -> None:
    """Put `chosen` in front of the layers of `part`, which undo it; its scales into the layer in front if possible."""
    group = replace(part.group, names=part.names)
    layers = [_linear(model, name) for name in part.names]
    scale = chosen.scale.float()
    if bool((scale != 1).any()):
        folded = bool(part.group.maker) and part.names == part.group.names
        if folded:
            maker = model.get_submodule(part.group.maker)
            folded = unchanged.after([maker, *layers], lambda: fold(model, group, scale))
        if not folded:
            insert_scale(model, group, scale)
    shared = Kronecker(chosen.p1.shape[0], chosen.p2.shape[0])
    shared.p1.copy_(chosen.p1)
    shared.p2.copy_(chosen.p2)
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(shared.absorb(layer.weight))
            attach(layer, shared)
    unchanged.check(f"a transform in front of {part.title}")


class _Problem:
    """One group: its rows, its layers' weights and grids, and what a transform leaves of the error."""

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        rows: Tensor,
        peaks: Tensor,
        sites: Mapping[str, Site],
        context: Context,
        options: Options,
    ) -> None:
        self.x, self.peaks, self.options = rows, peaks, options
        self.config: QuantizeConfig = context.config
        self.seed = context.seed
        self.weights = [_linear(model, name).weight.detach().float() for name in names]
        self.input = sites.get(f"{names[0]}.input")
        self.sites = [sites.get(f"{name}.weight") for name in names]
        self.wanted = rows @ torch.cat(self.weights).T
        power = self.wanted.square().mean(1, keepdim=True)
        # Outputs next to zero would otherwise count without bound.
        each = power.clamp_min(0.1 * float(power.median())) if options.relative else power.mean().expand(power.shape)
        self.size = each.clamp_min(1e-30).sqrt()

    def error(self, transform: Transform | None) -> float:
        """Mean squared error of the outputs, ranges as `ranges` sets them; infinite for one that is not exact."""
        x, weights = self.x, self.weights
        if transform is not None:
            x, weights = transform.rows(x), [transform.weight(w) for w in weights]
            exact = (x @ torch.cat(weights).T - self.wanted).abs().max() / self.wanted.abs().max().clamp_min(1e-30)
            if not float(exact) < _TOLERANCE:
                return math.inf
        pairs = zip(weights, self.sites, strict=True)
        right = torch.cat([quantized_weight(w, site, self.config) for w, site in pairs])
        left = quantized_rows(x, self.input, self.config)
        return float(((left @ right.T - self.wanted) / self.size).square().mean())

    def starts(self) -> Iterator[tuple[str, Transform]]:
        """Transforms that training may begin with, by name."""
        n1, n2 = factors(self.x.shape[1])
        generator = torch.Generator().manual_seed(self.seed)
        turned = head_rotation(n1, generator), head_rotation(n2, generator)
        straight = torch.eye(n1, dtype=torch.float64), torch.eye(n2, dtype=torch.float64)
        weight = torch.cat(self.weights)
        for name, bases in (("identity", straight), ("hadamard", turned)):
            if self.options.init not in ("auto", name):
                continue
            yield name, Transform(torch.ones(self.x.shape[1], dtype=torch.float64), *bases)
            for alpha in ALPHAS if self.options.scale else ():
                yield (
                    f"{name}, smoothed by {alpha}",
                    Transform(1 / smoothing_factors(self.peaks, weight, alpha), *bases),
                )

    def trained(self, start: Transform) -> Transform:
        """`start` after training: as it was when the error on all rows, looked at as often as ranges, was least."""
        generator = torch.Generator().manual_seed(self.seed)
        first, second = _Matrix(start.p1), _Matrix(start.p2)
        log_scale = torch.zeros_like(start.scale, requires_grad=True)
        parameters = [*first.parameters, *second.parameters, *([log_scale] if self.options.scale else [])]
        optimizer = torch.optim.Adam(parameters, lr=self.options.learning_rate, betas=(0.9, 0.99))
        steps = self.options.iterations
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
        ranges = _Ranges(self.input, self.sites, self.config)
        everything = torch.arange(self.x.shape[0])
        best, least = start, math.inf
        for step in range(steps + 1):
            with torch.enable_grad():
                (p1, q1), (p2, q2) = first.both(), second.both()
                scale = (start.scale * log_scale.exp()).float()
                rows = kronecker(self.x * scale, p1.float(), p2.float())
                weights = [kronecker(w / scale, q1.T.float(), q2.T.float()) for w in self.weights]
            if step % _EVERY == 0 or step == steps:
                with torch.no_grad():
                    ranges.find(rows, weights)
                    error = self._loss(ranges, rows, weights, everything)
                    if float(error) < least:
                        best, least = Transform(start.scale * log_scale.exp(), p1.detach(), p2.detach()), float(error)
            if step == steps:
                break
            chosen = torch.randperm(rows.shape[0], generator=generator)[: self.options.batch]
            with torch.enable_grad():
                loss = self._loss(ranges, rows, weights, chosen)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return best

    def _loss(self, ranges: _Ranges, rows: Tensor, weights: Sequence[Tensor], chosen: Tensor) -> Tensor:
        left, right = ranges.rows(rows, chosen), torch.cat(ranges.weights(weights))
        return ((left @ right.T - self.wanted[chosen]) / self.size[chosen]).square().mean()


class _Matrix:
    """``U diag(e^s) V`` with ``U = exp(A - A^T) start``, ``V = exp(B - B^T)``, ``|s| <= STRETCH``: float64."""

    def __init__(self, start: Tensor) -> None:
        self.start = start.double()
        n = start.shape[0]
        self.a, self.b = (torch.zeros(n, n, dtype=torch.float64, requires_grad=True) for _ in range(2))
        self.s = torch.zeros(n, dtype=torch.float64, requires_grad=True)
        self.parameters = [self.a, self.b, self.s]

    def both(self) -> tuple[Tensor, Tensor]:
        """The matrix and its inverse."""
        u = torch.linalg.matrix_exp(self.a - self.a.T) @ self.start
        v = torch.linalg.matrix_exp(self.b - self.b.T)
        stretch = (STRETCH * torch.tanh(self.s / STRETCH)).exp()
        return (u * stretch) @ v, (v.T / stretch) @ u.T


class _Ranges:
    """Ranges that move with the tensor: multiples, found now and then, of its magnitude (so gradients see them)."""

    def __init__(self, site: Site | None, weight_sites: Sequence[Site | None], config: QuantizeConfig) -> None:
        self.site, self.weight_sites, self.config = site, weight_sites, config
        self.row_ratio, self.zero_point = torch.ones(()), torch.zeros(())
        self.weight_ratios: list[Tensor] = []

    def find(self, rows: Tensor, weights: Sequence[Tensor]) -> None:
        """By the recipe's method, on detached tensors."""
        if self.site is not None and not self.site.grid.dynamic:
            histogram = Histogram()
            histogram.update(rows, self.site.name)
            scale, zero_point = activation_parameters(
                histogram, self.site.grid, self.config.activations, self.config.percentile
            )
            self.row_ratio, self.zero_point = scale / _spread(rows), zero_point.float()
        self.weight_ratios = []
        for weight, site in zip(weights, self.weight_sites, strict=True):
            if site is None:
                self.weight_ratios.append(torch.ones(()))
                continue
            scale, _ = weight_parameters(weight, site.grid, self.config.weights, self.config.percentile)
            ratio = scale.reshape(-1, 1) if scale.dim() < 2 else scale.unsqueeze(2)
            self.weight_ratios.append(ratio / _peaks(weight, scale))

    def rows(self, rows: Tensor, chosen: Tensor) -> Tensor:
        """The `chosen` rows, rounded with straight-through gradients."""
        x = rows[chosen]
        if self.site is None:
            return x
        grid = self.site.grid
        if grid.dynamic:
            return _rounded(x, (x.abs().amax(1, keepdim=True) / grid.qmax).clamp_min(1e-30), grid)
        return _rounded(x, self.row_ratio * _spread(rows), grid, self.zero_point)

    def weights(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """All weights, rounded with straight-through gradients."""
        rounded = []
        for weight, site, ratio in zip(weights, self.weight_sites, self.weight_ratios, strict=True):
            if site is None:
                rounded.append(weight)
                continue
            blocks = weight if ratio.dim() < 3 else weight.reshape(*ratio.shape[:2], -1)
            limit = blocks.abs().amax() if ratio.numel() == 1 else blocks.abs().amax(-1, keepdim=True)
            rounded.append(_rounded(blocks, (ratio * limit).clamp_min(1e-30), site.grid).reshape(weight.shape))
        return rounded


def _spread(rows: Tensor) -> Tensor:
    return rows.square().mean().sqrt().clamp_min(1e-30)


def _peaks(weight: Tensor, scale: Tensor) -> Tensor:
    """Largest magnitudes of what shares a scale, in the shape in which `_Ranges` keeps ratios."""
    if scale.dim() == 2:
        return weight.reshape(*scale.shape, -1).abs().amax(-1, keepdim=True).clamp_min(1e-30)
    found = weight.abs().amax() if scale.numel() == 1 else weight.abs().amax(1, keepdim=True)
    return found.clamp_min(1e-30)


def _rounded(x: Tensor, scale: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """Quantized and dequantized; rounding passes gradients through, clamping does not, the scale gets its own."""
    ratio = x / scale
    code = ratio + (ratio.round() - ratio).detach()
    offset = torch.zeros(()) if zero_point is None else zero_point
    return (code.clamp(grid.qmin - float(offset), grid.qmax - float(offset))) * scale


def _linear(model: nn.Module, name: str) -> nn.Linear:
    return cast(nn.Linear, model.get_submodule(name))


__all__ = ["ALPHAS", "STRETCH", "Options", "Transform", "apply", "factors"]
