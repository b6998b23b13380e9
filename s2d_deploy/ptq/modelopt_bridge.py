"""NVIDIA ModelOpt's presets as one source of scales: its quantizers are read into the Plan; from there all is the same.

`modelopt.torch.quantization.quantize` runs on a copy of the model with the recipe's own calibration data. Its weight
quantizers give ``amax`` per output channel or block, its input quantizers ``amax`` per tensor: ``scale = amax / qmax``.
A ``pre_quant_scale`` (SmoothQuant, AWQ) becomes a product in front of the layer, and the layer gets the weight that
modelopt left behind. What modelopt's patterns leave out (attention's products, ``lm_head``, ``*vision_model*``) stays
float here. What it quantizes and a Plan has no site for (inputs of LayerNorms and embeddings, which feed no product) is
not taken over. Both are listed in ``plan.info["modelopt"]``.

What is not promised: modelopt multiplies by ``qmax / amax`` where this project divides by ``amax / qmax``, so a value
within an ULP of a rounding boundary may get the other code.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterable
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, PlanError, UnavailableError, message
from s2d_deploy.grid import Granularity, Grid, PerAxis, PerBlock
from s2d_deploy.plan import Plan, Site
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.input_transform import ChannelScale, attach
from s2d_deploy.ptq.passes import Context, Quantized

logger = logging.getLogger(__name__)
Preset = Literal["int8", "int8_smoothquant", "int4_awq", "int4_blockwise"]
_CONFIGS: dict[Preset, str] = {
    "int8": "INT8_DEFAULT_CFG",
    "int8_smoothquant": "INT8_SMOOTHQUANT_CFG",
    "int4_awq": "INT4_AWQ_CFG",
    "int4_blockwise": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
}
_PRECISIONS: dict[Preset, str] = {
    "int8": "w8a8",
    "int8_smoothquant": "w8a8",
    "int4_awq": "w4a16",
    "int4_blockwise": "w4a16",
}


class Options(passes.Options):
    """Which of modelopt's presets."""

    preset: Preset = Field("int8", description="modelopt's INT8_DEFAULT, INT8_SMOOTHQUANT, INT4_AWQ, INT4_BLOCKWISE")
    block_size: int = Field(128, ge=2, description="of the INT4 presets, along K")


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Run the preset and read its quantizers.

    Raises:
        UnavailableError: modelopt is not installed.
        PlanError: another precision than the preset's was asked for, or a width that the block size does not divide.
        ModelError: modelopt refuses the model, or quantizes nothing of it.
    """
    plan, wanted = quantized.plan, _PRECISIONS[options.preset]
    if plan.precision != wanted:
        raise PlanError(
            message(
                f"quantize.passes.modelopt: preset {options.preset!r} is not {plan.precision}",
                expected=wanted,
                fix=f"set quantize.precisions=[{wanted}], or choose another preset",
            )
        )
    layers = {n: op for n, op in plan.ops.items() if op.kind in ("linear", "conv")}
    if wanted == "w4a16":
        bad = [f"{n} (K = {op.k})" for n, op in layers.items() if op.kind == "linear" and op.k % options.block_size]
        if bad:
            raise PlanError(
                message(
                    f"width not divisible by modelopt's block size in {len(bad)} layer(s): {', '.join(bad)}",
                    expected=f"a multiple of {options.block_size}",
                    fix="set quantize.passes.modelopt.block_size to a common divisor",
                )
            )
    calibrated = _calibrated(quantized.model, context, options)
    made = Plan(plan.precision, dict(plan.ops), {}, dict(plan.info))
    left_out = []
    for name, op in layers.items():
        theirs: Any = calibrated.get_submodule(name)
        ours = quantized.model.get_submodule(name)
        weight = getattr(theirs, "weight_quantizer", None)
        if weight is None or not weight.is_enabled or (op.kind == "conv" and wanted == "w4a16"):
            left_out.append(name)
            continue
        scale = getattr(theirs.input_quantizer, "pre_quant_scale", None)
        if scale is not None:
            _smooth(ours, cast(Tensor, scale).detach().float().flatten())
        with torch.no_grad():
            cast(Tensor, ours.weight).copy_(cast(Tensor, theirs.weight).detach())
        made.add(_weight_site(name, weight, cast(Tensor, ours.weight), options))
        if theirs.input_quantizer.is_enabled:
            made.add(_input_site(name, theirs.input_quantizer, options))
    ignored = _without_product(calibrated, layers)
    for words, names in (("leaves in float", left_out), ("quantizes in front of no product, not taken over", ignored)):
        if names:
            logger.warning("modelopt's preset %s: %s", words, ", ".join(names))
    made.info["modelopt"] = {"preset": _CONFIGS[options.preset], "left_out": left_out, "not_taken": ignored}
    made.info["calibration_samples"] = sum(next(iter(b.values())).shape[0] for b in context.batches())
    return Quantized(quantized.model, made)


def _without_product(calibrated: nn.Module, layers: Iterable[str]) -> list[str]:
    """Modules with a quantizer that is on, and no op."""
    taken = set(layers)
    found = []
    for name, module in calibrated.named_modules():
        quantizers = [getattr(module, f"{which}_quantizer", None) for which in ("input", "weight", "output")]
        if name not in taken and any(getattr(q, "is_enabled", False) for q in quantizers):
            found.append(name)
    return found


def _smooth(layer: nn.Module, factor: Tensor) -> None:
    scale = ChannelScale(factor.numel())
    scale.factor.copy_(factor)
    attach(layer, scale)


def _calibrated(model: nn.Module, context: Context, options: Options) -> nn.Module:
    """A copy of `model` with modelopt's quantizers, calibrated. modelopt prints; a --json document must not hear it."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import modelopt.torch.quantization as mtq
    except ImportError as error:
        raise UnavailableError(
            message("modelopt is not installed", found=str(error), fix="pip install 's2d-deploy[modelopt]'")
        ) from error
    config = copy.deepcopy(getattr(mtq, _CONFIGS[options.preset]))
    for entry in config["quant_cfg"]:
        blocks = (entry.get("cfg") or {}).get("block_sizes") if isinstance(entry, dict) else None
        if blocks:
            blocks[-1] = options.block_size

    def run(candidate: nn.Module) -> None:
        with torch.no_grad():
            for batch in context.batches():
                candidate(**batch)

    try:
        with contextlib.redirect_stdout(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = mtq.quantize(copy.deepcopy(model), config, run)
    except Exception as error:  # whatever its plugins make of a model that they were not written for
        raise ModelError(
            message(
                f"modelopt refuses this model with its preset {_CONFIGS[options.preset]}",
                found=f"{type(error).__name__}: {str(error).strip()[:240]}",
                fix="use this project's own passes",
            )
        ) from error
    logger.debug("modelopt: %s", said.getvalue())
    return cast(nn.Module, made)


def _weight_site(name: str, quantizer: Any, weight: Tensor, options: Options) -> Site:
    bits = quantizer.num_bits
    granularity: Granularity = PerBlock(1, options.block_size) if quantizer.block_sizes else PerAxis(0)
    # amax covers every weight, so that the most negative code never occurs: narrow, as this project's own plans.
    grid = Grid(_integer_bits(name, bits), narrow=bits == 8, granularity=granularity)
    amax = quantizer.amax.detach().float().reshape(grid.scale_shape(tuple(weight.shape)))
    return _site(f"{name}.weight", name, "weight", grid, amax, options)


def _input_site(name: str, quantizer: Any, options: Options) -> Site:
    grid = Grid(_integer_bits(name, quantizer.num_bits))
    return _site(f"{name}.input", name, "input", grid, quantizer.amax.detach().float().reshape(()), options)


def _site(site: str, op: str, role: Literal["input", "weight"], grid: Grid, amax: Tensor, options: Options) -> Site:
    scale = torch.where(amax > 0, amax / grid.qmax, torch.ones_like(amax)).contiguous()
    return Site(site, op, role, grid, scale, torch.zeros_like(scale, dtype=torch.int32), f"modelopt-{options.preset}")


def _integer_bits(name: str, bits: Any) -> int:
    if not isinstance(bits, int):
        raise ModelError(message(f"layer {name!r}: modelopt's grid is not an integer grid", found=f"num_bits {bits}"))
    return bits
