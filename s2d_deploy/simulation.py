"""The simulation: the float model with a fake quantizer at every site of a Plan.

What the hardware must compute. Products are taken in FP32 between quantized values, so they equal the
integer product times the scales up to FP32 rounding; the exact integers are `runtimes/reference.py`'s.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_deploy.attention import quantizer_name, use_visible_attention
from s2d_deploy.errors import ModelError, message
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.plan import Plan, Site
from s2d_deploy.ptq import input_transform


class QuantLinear(nn.Module):
    """A Linear whose input and weight pass through fake quantizers: ``(..., K) -> (..., N)``."""

    def __init__(self, linear: nn.Linear, input_site: Site | None, weight_site: Site | None) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.input_quantizer = _quantizer(input_site)
        self.weight_quantizer = _quantizer(weight_site)

    def forward(self, x: Tensor) -> Tensor:
        """The simulated layer."""
        return F.linear(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)


class QuantConv2d(nn.Module):
    """A Conv2d whose input and weight pass through fake quantizers: ``(B, C, H, W) -> (B, O, H', W')``."""

    def __init__(self, conv: nn.Conv2d, input_site: Site | None, weight_site: Site | None) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups
        self.kernel_size = conv.kernel_size
        self.input_quantizer = _quantizer(input_site)
        self.weight_quantizer = _quantizer(weight_site)

    def forward(self, x: Tensor) -> Tensor:
        """The simulated layer."""
        return F.conv2d(
            self.input_quantizer(x),
            self.weight_quantizer(self.weight),
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )


def simulate(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy of `model` that computes what `plan` promises; `model` is left as it was.

    Args:
        model: the float model that the plan was calibrated on (or a fine-tuned version of it).
        plan: its quantization.

    Returns:
        The simulated model, in the same train/eval state. Gradients are straight-through, so it can be trained (QAT).

    Raises:
        ModelError: a site's module does not exist in this model or is of another kind.
        PlanError: a scale does not fit its tensor.
    """
    simulated = copy.deepcopy(model)
    use_visible_attention(simulated)
    modules = dict(simulated.named_modules())
    for op in plan.ops.values():
        left, right = (plan.sites.get(name) for name, _ in op.sites)
        if left is None and right is None:
            continue
        if op.kind in ("scores", "context"):
            owner = modules.get(op.name.rpartition(".")[0])
            if owner is None:
                raise _foreign(op.name, "an attention module", "nothing of that name")
            for site in (left, right):
                if site is not None:
                    setattr(owner, quantizer_name(site.role), _quantizer(site))
            continue
        layer = modules.get(op.name)
        if isinstance(layer, nn.Linear):
            _check_weight(op.name, layer.weight, right)
            quantized: nn.Module = QuantLinear(layer, left, right)
        elif isinstance(layer, nn.Conv2d):
            _check_weight(op.name, layer.weight, right)
            quantized = QuantConv2d(layer, left, right)
        else:
            raise _foreign(op.name, op.kind, type(layer).__name__ if layer is not None else "nothing of that name")
        input_transform.carry(layer, quantized)
        _replace(simulated, op.name, quantized.train(layer.training))
    return simulated.train(model.training)


@contextmanager
def recorded_codes(simulated: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the int32 codes of every activation site during the forward passes of the block.

    The dictionary maps site names to codes of the last forward pass.
    """
    codes: dict[str, Tensor] = {}
    handles = []

    def hook(site: str, quantizer: FakeQuantizer):  # type: ignore[no-untyped-def]
        def record(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            codes[site] = quantizer.codes(args[0].detach())

        return record

    for name, module in simulated.named_modules():
        if isinstance(module, FakeQuantizer) and not name.endswith("weight_quantizer"):
            handles.append(module.register_forward_pre_hook(hook(name.removesuffix("_quantizer"), module)))
    try:
        with torch.no_grad():
            yield codes
    finally:
        for handle in handles:
            handle.remove()


def weight_codes(simulated: nn.Module) -> dict[str, Tensor]:
    """int32 codes of every quantized weight, by site name, in the layer's own layout."""
    result = {}
    for name, module in simulated.named_modules():
        if isinstance(module, QuantLinear | QuantConv2d) and isinstance(module.weight_quantizer, FakeQuantizer):
            result[f"{name}.weight"] = module.weight_quantizer.codes(module.weight.detach())
    return result


def _quantizer(site: Site | None) -> nn.Module:
    return nn.Identity() if site is None else FakeQuantizer.of(site)


def _check_weight(name: str, weight: Tensor, site: Site | None) -> None:
    if site is None:
        return
    expected = site.grid.scale_shape(tuple(weight.shape))
    if tuple(site.scale.shape) != expected:
        raise ModelError(
            message(
                f"layer {name!r}: the plan's weight scale does not fit",
                expected=f"shape {expected} for a weight of {tuple(weight.shape)}",
                found=f"shape {tuple(site.scale.shape)}",
                fix="calibrate this model again; the plan is of another one",
            )
        )


def _foreign(name: str, expected: str, found: str) -> ModelError:
    return ModelError(
        message(
            f"op {name!r} of the plan is not in this model",
            expected=expected,
            found=found,
            fix="use the plan's own model",
        )
    )


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
