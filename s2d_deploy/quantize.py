"""Calibrated statistics -> Plan: round to nearest with the chosen range setting.

Grids by precision stand in docs/architecture.md, section 3. ``nvfp4`` and ``mxfp4`` quantize Linears; convolutions and
attention's products stay float there (a patch embedding and products of activations along a sequence do not divide into
blocks of 16 or 32), and the plan declares them so. This is the baseline recipe; every later pass
(smoothing, rotation, GPTQ, ...) edits the Plan that it makes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from glob import escape
from typing import Literal

import torch
from torch import Tensor, nn

from s2d_deploy.calibrate import Calibration, Padding
from s2d_deploy.equalized_linear import layer_name
from s2d_deploy.errors import DataError, ModelError, PlanError, RecipeError, message
from s2d_deploy.grid import (
    BLOCK_OF_SCALE_FORMAT,
    Granularity,
    Grid,
    PerAxis,
    PerBlock,
    PerTensor,
    PerToken,
    PerTokenBlock,
    ScaleFormat,
)
from s2d_deploy.observers import (
    Histogram,
    Method,
    WeightMethod,
    activation_parameters,
    activation_tensor_scale,
    weight_parameters,
    weight_tensor_scale,
)
from s2d_deploy.plan import Op, Plan, Role, Site
from s2d_deploy.precision import Precision, parse_precision


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """How ranges are set and which ops are quantized.

    Attributes:
        weights, activations: range method of each.
        percentile: for the "percentile" method, in percent.
        padding: whether padding tokens count in activation ranges.
        activation_granularity: one stored scale ("tensor"), or one for each token at run time ("token").
        activation_symmetric: False gives activations a zero point (no TensorRT).
        weight_granularity: "auto" is one scale for each output channel, and for each block of weight-only Linears;
            "channel" and "block" (of Linears) hold for every precision of integers. Blocks beside quantized
            activations have no kernel in ONNX Runtime: its audit says so, and the gate fails.
        block_size: of blocks, along K.
        attention: quantize attention's two products as well.
        skip: op name patterns (fnmatch) that stay float.
        overrides: op name pattern -> precision; the first that matches wins.
        first_last: precision that the first and the last layer with weights keep at least; None: like all others.
    """

    weights: WeightMethod = "mse"
    activations: Method = "mse"
    percentile: float = 99.99
    padding: Padding = "count"
    activation_granularity: Literal["tensor", "token"] = "tensor"
    activation_symmetric: bool = True
    weight_granularity: Literal["auto", "channel", "block"] = "auto"
    block_size: int = 32
    attention: bool = True
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, str] = field(default_factory=dict)
    first_last: str | None = None


def build_plan(
    model: nn.Module,
    ops: Mapping[str, Op],
    calibration: Calibration,
    precision: str,
    config: QuantizeConfig = QuantizeConfig(),
) -> Plan:
    """Quantize every selected op of `model` to `precision`.

    Raises:
        RecipeError: a pattern in skip or overrides matches no op.
        PlanError: block sizes that do not divide (every layer is listed), or a grid that does not fit.
        ModelError: NaN or infinite weights; every such layer is named.
        DataError: a site without calibration statistics.
    """
    wanted = parse_precision(precision)
    plan = Plan(
        wanted.name,
        dict(ops),
        info={
            "weights": config.weights,
            "activations": config.activations,
            "activation_granularity": config.activation_granularity,
            "calibration_samples": calibration.samples,
        },
    )
    chosen = _chosen(model, ops, wanted, config)
    modules = dict(model.named_modules())
    _check_blocks(ops, chosen, modules, config)
    _check_fp4_blocks(ops, chosen)
    _check_weights(ops, chosen, modules)
    for name, op in ops.items():
        p = chosen[name]
        for site, role in op.sites:
            if role == "weight":
                if _stores_codes(op, p):
                    plan.add(_weight_site(site, op, modules[name].weight, p, config))
            elif p.activations < 16:
                plan.add(_activation_site(site, op, role, calibration, p, config))
    return plan


def quantized_ops(
    model: nn.Module, ops: Mapping[str, Op], precision: str, config: QuantizeConfig = QuantizeConfig()
) -> set[str]:
    """Names of the ops that `build_plan` would give sites to: a transform need not touch the others.

    Raises:
        RecipeError: a pattern in skip or overrides matches no op.
    """
    chosen = _chosen(model, ops, parse_precision(precision), config)
    return {name for name, op in ops.items() if _stores_codes(op, chosen[name]) or chosen[name].activations < 16}


def quantizes_activations(
    model: nn.Module, ops: Mapping[str, Op], precision: str, config: QuantizeConfig = QuantizeConfig()
) -> bool:
    """Whether `build_plan` would set any activation site's range: if not, no statistics are needed.

    Raises:
        RecipeError: a pattern in skip or overrides matches no op.
    """
    chosen = _chosen(model, ops, parse_precision(precision), config)
    return any(chosen[name].activations < 16 for name in ops)


def _chosen(model: nn.Module, ops: Mapping[str, Op], wanted: Precision, config: QuantizeConfig) -> dict[str, Precision]:
    """Each op's precision."""
    # A layer that something was inserted into is called by its old name, too: a recipe knows no other.
    called = {name: {name, layer_name(model, name)} for name in ops}
    _check_patterns(called, config)
    config = replace(config, overrides={**config.overrides, **_ends(ops, config), **config.overrides})
    return {name: _precision_of(op, called[name], wanted, config) for name, op in ops.items()}


def _ends(ops: Mapping[str, Op], config: QuantizeConfig) -> dict[str, str]:
    """`first_last` as overrides; the user's own come before them."""
    layers = [op.name for op in ops.values() if op.kind in ("linear", "conv")]
    if config.first_last is None or not layers:
        return {}
    return {escape(name): config.first_last for name in (layers[0], layers[-1])}


def _matches(names: Iterable[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _precision_of(op: Op, names: Iterable[str], wanted: Precision, config: QuantizeConfig) -> Precision:
    if wanted.name == "fp32" or any(_matches(names, pattern) for pattern in config.skip):
        return Precision("fp32", 16, 16)
    if op.kind in ("scores", "context") and not config.attention:
        return Precision("fp32", 16, 16)
    chosen = _overridden(names, wanted, config)
    return Precision("fp32", 16, 16) if chosen.format != "int" and op.kind != "linear" else chosen


def _overridden(names: Iterable[str], wanted: Precision, config: QuantizeConfig) -> Precision:
    for pattern, name in config.overrides.items():
        if _matches(names, pattern):
            override = parse_precision(name, f"quantize.overrides[{pattern!r}]")
            # "at least": an override that keeps a layer at 8 bits must not quantize activations that
            # a weight-only precision leaves in float.
            bits = max(override.weights, wanted.weights), max(override.activations, wanted.activations)
            same = [p.format for p in (override, wanted) if (p.weights, p.activations) == bits]
            return Precision(override.name, *bits, same[0] if same else "int")
    return wanted


def _check_patterns(ops: Mapping[str, Iterable[str]], config: QuantizeConfig) -> None:
    given = [("skip", p) for p in config.skip] + [("overrides", p) for p in config.overrides]
    idle = [(key, p) for key, p in given if not any(_matches(names, p) for names in ops.values())]
    if idle:
        close = get_close_matches(idle[0][1], list(ops), n=1)
        raise RecipeError(
            message(
                "; ".join(f"quantize.{key}: {pattern!r} matches no layer" for key, pattern in idle),
                expected=f"a pattern for one of {len(ops)} ops such as {', '.join(list(ops)[:3])}",
                fix=f"did you mean {close[0]!r}?" if close else "see `s2d-deploy diagnose` for the names",
            )
        )


def _check_blocks(
    ops: Mapping[str, Op], chosen: Mapping[str, Precision], modules: Mapping[str, nn.Module], config: QuantizeConfig
) -> None:
    """Every layer whose width the block size does not divide, at once, before any work."""
    bad = [
        f"{name} (K = {op.k})"
        for name, op in ops.items()
        if name in modules and _blocked(op, chosen[name], config) and op.k % config.block_size
    ]
    if bad:
        raise PlanError(
            message(
                f"width not divisible by the block size in {len(bad)} layer(s): {', '.join(bad)}",
                expected=f"a multiple of quantize.block_size = {config.block_size}",
                fix="set quantize.block_size to a common divisor, or name the layers in quantize.skip",
            )
        )


def _check_fp4_blocks(ops: Mapping[str, Op], chosen: Mapping[str, Precision]) -> None:
    """Every layer whose width FP4's fixed block size does not divide, at once."""
    for scale_format, size in BLOCK_OF_SCALE_FORMAT.items():
        of_format = [n for n, p in chosen.items() if p.format != "int" and _scale_format(p) == scale_format]
        bad = [f"{n} (K = {ops[n].k})" for n in of_format if ops[n].k % size]
        if bad:
            raise PlanError(
                message(
                    f"width not divisible by the block size in {len(bad)} layer(s): {', '.join(bad)}",
                    expected=f"a multiple of {size} for {chosen[of_format[0]].format}",
                    fix="name them in quantize.skip, or give them integers in quantize.overrides",
                )
            )


def _check_weights(ops: Mapping[str, Op], chosen: Mapping[str, Precision], modules: Mapping[str, nn.Module]) -> None:
    """Every layer to be quantized whose weights are not finite, at once."""
    bad = []
    for name, op in ops.items():
        weight = getattr(modules.get(name), "weight", None)
        if _stores_codes(op, chosen[name]) and isinstance(weight, Tensor):
            count = int((~torch.isfinite(weight)).sum())
            bad += [f"{name} ({count} of {weight.numel()})"] if count else []
    if bad:
        raise ModelError(
            message(
                f"NaN or infinite weights in {len(bad)} layer(s): {', '.join(bad)}",
                expected="finite weights",
                fix="use a sound checkpoint",
            )
        )


def _stores_codes(op: Op, precision: Precision) -> bool:
    """Whether the op's weight is quantized. Convolutions have no weight-only kernels, so theirs stay float there."""
    if op.kind not in ("linear", "conv") or precision.weights == 16:
        return False
    return not (op.kind == "conv" and precision.activations == 16)


def _blocked(op: Op, precision: Precision, config: QuantizeConfig) -> bool:
    if op.kind != "linear" or precision.format != "int" or precision.weights == 16:
        return False
    if config.weight_granularity == "auto":
        return precision.weights < 8 and precision.activations == 16
    return config.weight_granularity == "block"


def _weight_site(site: str, op: Op, weight: Tensor, precision: Precision, config: QuantizeConfig) -> Site:
    if precision.format != "int":
        scale_format = _scale_format(precision)
        block = PerBlock(1, BLOCK_OF_SCALE_FORMAT[scale_format])
        grid = Grid(4, format="e2m1", scale_format=scale_format, granularity=block)
        scale, zero_point = weight_parameters(weight, grid, config.weights, config.percentile)
        of_tensor = weight_tensor_scale(weight, grid)
        return Site(site, op.name, "weight", grid, scale, zero_point, f"rtn-{config.weights}", of_tensor)
    granularity: Granularity = PerBlock(1, config.block_size) if _blocked(op, precision, config) else PerAxis(0)
    # Narrow 8-bit codes: negation stays on the grid, and an accumulator is at most K * 127 * 128.
    grid = Grid(precision.weights, narrow=precision.weights == 8, granularity=granularity)
    scale, zero_point = weight_parameters(weight, grid, config.weights, config.percentile)
    return Site(site, op.name, "weight", grid, scale, zero_point, f"rtn-{config.weights}")


def _activation_site(
    site: str, op: Op, role: Role, calibration: Calibration, precision: Precision, config: QuantizeConfig
) -> Site:
    if precision.format != "int":
        return _fp4_activation_site(site, op, role, calibration, precision)
    if config.activation_granularity == "token" and op.kind == "linear":
        return Site(
            site,
            op.name,
            role,
            Grid(precision.activations, granularity=PerToken()),
            torch.empty(0),
            torch.empty(0, dtype=torch.int32),
            "per-token",
        )
    histogram = _histogram(site, calibration)
    grid = Grid(
        precision.activations,
        signed=role != "probs",
        symmetric=role == "probs" or config.activation_symmetric,
        granularity=PerTensor(),
    )
    scale, zero_point = activation_parameters(histogram, grid, config.activations, config.percentile)
    return Site(site, op.name, role, grid, scale, zero_point, f"rtn-{config.activations}")


def _fp4_activation_site(site: str, op: Op, role: Role, calibration: Calibration, precision: Precision) -> Site:
    """Block scales are computed at run time; NVFP4's tensor scale is calibrated (from the largest magnitude)."""
    scale_format = _scale_format(precision)
    block = PerTokenBlock(BLOCK_OF_SCALE_FORMAT[scale_format])
    grid = Grid(4, format="e2m1", scale_format=scale_format, granularity=block)
    of_tensor = activation_tensor_scale(_histogram(site, calibration)) if scale_format == "e4m3" else None
    empty = torch.empty(0), torch.empty(0, dtype=torch.int32)
    return Site(site, op.name, role, grid, *empty, "per-block", of_tensor)


def _scale_format(precision: Precision) -> ScaleFormat:
    return "e4m3" if precision.format == "nvfp4" else "e8m0"


def _histogram(site: str, calibration: Calibration) -> Histogram:
    histogram = calibration.histograms.get(site)
    if histogram is None:
        raise DataError(
            message(
                f"site {site!r} has no calibration statistics",
                fix="calibrate this model again; the statistics are older",
            )
        )
    return histogram
