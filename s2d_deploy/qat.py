"""Quantization-aware training: the model's own forward, fake-quantized by a Plan, on its float weights.

`simulation.simulate` answers what the hardware computes, on a copy. Training needs the same arithmetic on the
weights that the optimizer (and S2D) holds, in whatever DDP or FSDP2 made of the model, and needs to switch it off for
S2D's look at the float model. So here nothing is copied: inside ``with FakeQuantization(model, plan).active():``
each planned layer's forward, and each planned attention operand, passes through the plan's quantizers. Gradients are
straight-through (arXiv 1308.3432). Under autocast the quantizers still compute in FP32.

The plan's scales are constants of the backward pass, and age while the weights move: `replace` takes a newer plan. Or
they are learned with the weights (``learned=True``, see `lsq`), and `learned_plan` is what must be deployed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_deploy.attention import quantizer_name, use_visible_attention
from s2d_deploy.errors import ModelError, message
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.grid import Grid
from s2d_deploy.lsq import LearnedQuantizer, learnable
from s2d_deploy.plan import Op, Plan, Site
from s2d_deploy.sharding import bare


class FakeQuantization:
    """A plan laid over a model in place.

    Args:
        model: the float model that the plan was made for; its attention is switched to the visible one.
        plan: which sites, on which grids.
        learned: stored scales are parameters (`steps`), in float32; the caller's optimizer moves them.

    Raises:
        ModelError: an op of the plan is not in this model, or a weight's scale does not fit.
    """

    def __init__(self, model: nn.Module, plan: Plan, *, learned: bool = False) -> None:
        self.model, self.learned = bare(model), learned
        self._attention = getattr(getattr(self.model, "config", None), "_attn_implementation", None)
        use_visible_attention(self.model)
        self.replace(plan)

    def replace(self, plan: Plan) -> None:
        """Use another plan of the same model from now on."""
        self.plan = plan
        self._learned: dict[str, LearnedQuantizer] = {}
        modules = dict(self.model.named_modules())
        self._installed: list[tuple[nn.Module, str, Any]] = []
        for op in plan.ops.values():
            left, right = (plan.sites.get(name) for name, _ in op.sites)
            if left is None and right is None:
                continue
            attention = op.kind in ("scores", "context")
            owner = modules.get(op.name.rpartition(".")[0] if attention else op.name)
            if owner is None or not (attention or isinstance(owner, nn.Linear | nn.Conv2d)):
                raise ModelError(
                    message(
                        f"op {op.name!r} of the plan is not in this model",
                        expected=op.kind,
                        found="nothing of that name" if owner is None else type(owner).__name__,
                        fix="use the plan's own model",
                    )
                )
            device = next(self.model.parameters()).device
            if attention:
                for site in (left, right):
                    if site is not None:
                        self._installed.append((owner, quantizer_name(site.role), self._quantizer(site, device)))
            else:
                _check_scale(op, owner, right)
                forward = _quantized_forward(owner, self._quantizer(left, device), self._quantizer(right, device))
                self._installed.append((owner, "forward", forward))

    def _quantizer(self, site: Site | None, device: torch.device) -> _InFloat:
        if site is None or not (self.learned and learnable(site)):
            return _InFloat(None if site is None else FakeQuantizer.of(site).to(device))
        self._learned[site.name] = LearnedQuantizer(site).to(device)
        return _InFloat(self._learned[site.name])

    @property
    def steps(self) -> list[nn.Parameter]:
        """The learned scales, in the plan's order; none without ``learned``."""
        return [quantizer.scale for quantizer in self._learned.values()]

    def after_step(self) -> None:
        """To be called when an optimizer has moved the steps."""
        for quantizer in self._learned.values():
            quantizer.keep_positive()

    def learned_plan(self) -> Plan:
        """The plan with its scales as they are now."""
        sites = {n: self._learned[n].learned_site() if n in self._learned else s for n, s in self.plan.sites.items()}
        return Plan(self.plan.precision, dict(self.plan.ops), sites, dict(self.plan.info))

    @torch.no_grad()
    def load_steps(self, plan: Plan) -> None:
        """Take the scales of a `learned_plan` of this model; the parameters stay the same objects."""
        for name, quantizer in self._learned.items():
            quantizer.scale.copy_(plan.sites[name].scale)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Forward passes inside are fake-quantized; outside the model is its float self."""
        # Written beside nn.Module's registry: quantizers are no part of the state that is trained and saved.
        for owner, name, value in self._installed:
            owner.__dict__[name] = value
        try:
            yield
        finally:
            for owner, name, _ in self._installed:
                owner.__dict__.pop(name, None)

    def remove(self) -> None:
        """Give the model its own attention back."""
        switch = getattr(self.model, "set_attn_implementation", None)
        if switch is not None and self._attention is not None:
            switch(self._attention)


def plan_state(plan: Plan) -> dict[str, Any]:
    """The plan as tensors and plain values, fit for ``torch.save``."""
    sites = [
        {"name": s.name, "op": s.op, "role": s.role, "grid": s.grid.to_dict(), "source": s.source}
        | {"scale": s.scale, "zero_point": s.zero_point, "tensor_scale": s.tensor_scale}
        for s in plan.sites.values()
    ]
    return {"precision": plan.precision, "ops": [asdict(op) for op in plan.ops.values()], "sites": sites}


def plan_from_state(state: dict[str, Any]) -> Plan:
    """The plan of a `plan_state`."""
    plan = Plan(state["precision"], {op["name"]: Op(**op) for op in state["ops"]})
    for site in state["sites"]:
        plan.add(Site(**{**site, "grid": Grid.from_dict(site["grid"])}))
    return plan


class _InFloat(nn.Module):
    """A site's quantizer in FP32 whatever autocast gives it; the identity without one."""

    def __init__(self, quantizer: nn.Module | None) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        if self.quantizer is None:
            return x
        with torch.autocast(x.device.type, enabled=False):
            quantized: Tensor = self.quantizer(x.float())
        return quantized.to(x.dtype)


def _quantized_forward(layer: nn.Module, inputs: nn.Module, weights: nn.Module) -> Callable[[Tensor], Tensor]:
    def linear(x: Tensor) -> Tensor:
        return F.linear(inputs(x), weights(layer.weight), layer.bias)  # type: ignore[arg-type]

    def conv(x: Tensor) -> Tensor:
        return layer._conv_forward(inputs(x), weights(layer.weight), layer.bias)  # type: ignore[operator, no-any-return]

    return linear if isinstance(layer, nn.Linear) else conv


def _check_scale(op: Op, layer: nn.Module, site: Site | None) -> None:
    shape = tuple(layer.weight.shape)  # type: ignore[arg-type]
    if site is not None and tuple(site.scale.shape) != site.grid.scale_shape(shape):
        raise ModelError(
            message(
                f"layer {op.name!r}: the plan's weight scale does not fit",
                expected=f"shape {site.grid.scale_shape(shape)} for a weight of {shape}",
                found=f"shape {tuple(site.scale.shape)}",
                fix="calibrate this model again; the plan is of another one",
            )
        )
