"""The simulation, forced through the codes that a runtime showed, site by site.

A site then shows only what happened between the sites before it and itself: whatever had gone wrong earlier came in
through codes that both sides share. So one pass over the model finds the first site where simulation and runtime part,
at boundaries that the built graph really has; nothing is added to that graph, and no fusion is touched.

The pass runs in FP64 by default: weights are the codes that FP32 chose, everything else is exact to far below what a
runtime's FP32 could show, so what is left between it and the runtime is the runtime's. One thing cannot be forced: the
float residual stream, which no quantizer cuts. A fault that enters it is seen at every later site that reads it, until
the pass is told of it (`Forced.products`, `Forced.quantizers`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_deploy.attention import multiplying, quantizer_name
from s2d_deploy.data import Batch
from s2d_deploy.fake_quant import FakeQuantizer, token_scale
from s2d_deploy.models import forward
from s2d_deploy.plan import Plan
from s2d_deploy.ptq import input_transform
from s2d_deploy.session import Array
from s2d_deploy.simulation import QuantConv2d, QuantLinear

# product(left, right, plan's product) -> the product as the runtime is thought to compute it
Product = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(slots=True)
class View:
    """One site during a pass.

    Attributes:
        site: its name.
        quantizer: of the simulation.
        x: the float value in front of it.
        u: `x` over the scale: in codes, without the zero point.
        zero: the zero point.
        theirs: the runtime's codes as floats of the shape of `x`; None where it shows none.
        own: the plan's codes, where they were asked for.
    """

    site: str
    quantizer: FakeQuantizer
    x: Tensor
    u: Tensor
    zero: float
    theirs: Tensor | None
    own: Tensor | None = None

    def codes(self, u: Tensor | None = None) -> Tensor:
        """The plan's codes of `u` (of the view's own by default, which are computed once)."""
        grid = self.quantizer.grid
        if u is not None:
            return (torch.round(u) + self.zero).clamp(grid.qmin, grid.qmax)
        if self.own is None:
            self.own = torch.round(self.u).add_(self.zero).clamp_(grid.qmin, grid.qmax)
        return self.own

    @property
    def inside(self) -> Tensor:
        """Where the runtime's code is neither the smallest nor the largest: nothing was clamped."""
        if self.theirs is None:
            raise ValueError(f"{self.site}: the runtime shows no codes")
        grid = self.quantizer.grid
        return (self.theirs > grid.qmin) & (self.theirs < grid.qmax)


class _Reached(Exception):  # noqa: N818 - no error: the pass has seen what it was started for
    pass


class Forced:
    """A simulation whose sites may be given codes and whose products may be replaced.

    Args:
        simulated: from `simulation.simulate`; it is copied.
        plan: its quantization.
        dtype: of the arithmetic; FP32 without codes and changes computes what `simulated` computes, bit for bit.

    Attributes:
        products: op -> how its product is computed instead.
        quantizers: site -> how its codes are computed instead: ``(view) -> codes``.
        passed: sites that are left out: their values go on unquantized.
    """

    def __init__(self, simulated: nn.Module, plan: Plan, dtype: torch.dtype = torch.float64) -> None:
        self.plan, self.dtype = plan, dtype
        self.products: dict[str, Product] = {}
        self.quantizers: dict[str, Callable[[View], Tensor]] = {}
        self.passed: set[str] = set()
        self.float_weights: dict[str, Tensor] = {}
        self._codes: Mapping[str, Tensor] = {}
        self._see: Callable[[View], None] | None = None
        self._until: str | None = None
        self.model = copy.deepcopy(simulated).eval()
        modules = dict(self.model.named_modules())
        self._names = {id(module): name for name, module in modules.items()}
        for name, module in modules.items():
            if isinstance(module, QuantLinear | QuantConv2d):
                layer = _Layer(self, name, module)
                input_transform.carry(module, layer)
                _replace(self.model, name, layer)
            elif not isinstance(module, FakeQuantizer):
                for child, quantizer in list(module.named_children()):
                    if isinstance(quantizer, FakeQuantizer):
                        site = f"{name}.{child.removesuffix('_quantizer')}".lstrip(".")
                        setattr(module, child, _Site(self, site, quantizer))
        self.model.to(dtype)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)

    def run(
        self,
        batch: Batch,
        output: str | None,
        codes: Mapping[str, Array] | None = None,
        see: Callable[[View], None] | None = None,
        until: str | None = None,
    ) -> Tensor | None:
        """One pass.

        Args:
            batch: float inputs are taken to the pass's dtype.
            output: of the model; None where it does not matter.
            codes: the runtime's, by site; a site without any quantizes by itself.
            see: is called at every site, in the order of execution.
            until: stop behind this site.

        Returns:
            the output; None where none was asked for, or the pass was stopped.
        """
        self._codes = {site: torch.from_numpy(np.asarray(c)) for site, c in (codes or {}).items()}
        self._see, self._until = see, until
        inputs = {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in batch.items()}
        try:
            with multiplying(self._attend):
                if output is not None:
                    return forward(self.model, inputs, output)
                self.model(**inputs)
                return None
        except _Reached:
            return None
        finally:
            self._codes, self._see, self._until = {}, None, None

    def _attend(self, module: nn.Module, name: str, left: Tensor, right: Tensor) -> Tensor:
        product = torch.matmul(left, right)
        change = self.products.get(f"{self._names.get(id(module), '')}.{name}".lstrip("."))
        return product if change is None else change(left, right, product)

    def at_site(self, site: str, quantizer: FakeQuantizer, x: Tensor) -> Tensor:
        """What follows the site: values of the runtime's codes, where it has shown them."""
        theirs, change = self._codes.get(site), self.quantizers.get(site)
        if not quantizer.grid.integer:  # in the simulation only: no runtime has codes to compare with
            return quantizer(x)  # type: ignore[no-any-return]
        plain = theirs is None and change is None
        if site in self.passed or (plain and self._see is None):
            result = x if site in self.passed else quantizer(x)
        else:
            scale = token_scale(x, quantizer.grid).to(x.dtype) if quantizer.grid.dynamic else quantizer.scale
            zero = 0.0 if quantizer.grid.dynamic else float(quantizer.zero_point)
            if theirs is not None:
                theirs = theirs.reshape(x.shape).to(x.dtype)
            view = View(site, quantizer, x, x / scale, zero, theirs)
            if self._see is not None:
                self._see(view)
            # In FP32 this is what the quantizer computes, operation by operation.
            codes = theirs if theirs is not None else change(view) if change is not None else view.codes()
            result = (codes - zero) * scale
        if site == self._until:
            raise _Reached
        return result


class _Site(nn.Module):
    def __init__(self, owner: Forced, name: str, quantizer: FakeQuantizer) -> None:
        super().__init__()
        self.owner, self.name, self.quantizer = [owner], name, quantizer  # a list: not a submodule, no cycle in copies

    def forward(self, x: Tensor) -> Tensor:
        return self.owner[0].at_site(self.name, self.quantizer, x)


class _Layer(nn.Module):
    """A quantized Linear or Conv2d with its weight quantized once."""

    def __init__(self, owner: Forced, name: str, layer: QuantLinear | QuantConv2d) -> None:
        super().__init__()
        self.owner, self.name = [owner], name
        with torch.no_grad():
            weight = layer.weight_quantizer(layer.weight.detach())
        owner.float_weights[name] = layer.weight.detach()
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        quantizer = layer.input_quantizer
        self.input_quantizer = (
            _Site(owner, f"{name}.input", quantizer) if isinstance(quantizer, FakeQuantizer) else nn.Identity()
        )
        self.conv: dict[str, Any] | None = None
        if isinstance(layer, QuantConv2d):
            names = ("stride", "padding", "dilation", "groups")
            self.conv = {name: getattr(layer, name) for name in names}

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias) if self.conv is None else F.conv2d(x, weight, bias, **self.conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)
        change = self.owner[0].products.get(self.name)
        if change is None:
            return self.multiply(x, self.weight, self.bias)
        y = change(x, self.weight, self.multiply(x, self.weight))
        if self.bias is None:
            return y
        return y + (self.bias if self.conv is None else self.bias.reshape(1, -1, 1, 1))


def multiply_by(forced: Forced, op: str, weight: Tensor) -> Product:
    """A product with another weight, in the layer's own layout."""
    layer = forced.model.get_submodule(op)
    if not isinstance(layer, _Layer):
        raise TypeError(f"{op} has no stored weight")
    return lambda left, _right, product: layer.multiply(left, weight.to(product.dtype))


def reached_by(forced: Forced, batch: Batch, output: str, codes: Mapping[str, Array]) -> dict[str, set[str]]:
    """Site -> ops whose products reach it in float, past no other site. ``"output"`` stands for the model's output.

    Read from autograd: forced sites are constants, so gradients flow along float paths only.
    """
    one = {name: tensor[:1] for name, tensor in batch.items()}
    first = {site: np.asarray(array)[: len(array) // len(next(iter(batch.values())))] for site, array in codes.items()}
    leaves = {op: torch.zeros((), dtype=forced.dtype, requires_grad=True) for op in forced.plan.ops}
    kept = dict(forced.products)
    found: dict[str, set[str]] = {}

    def tagged(op: str) -> Product:
        before = kept.get(op)

        def change(left: Tensor, right: Tensor, product: Tensor) -> Tensor:
            return (product if before is None else before(left, right, product)) + leaves[op]

        return change

    def see(view: View) -> None:
        found[view.site] = _tags(view.x, leaves)

    try:
        forced.products = {op: tagged(op) for op in leaves}
        with torch.enable_grad():
            result = forced.run(one, output, first, see)
        if result is not None:
            found["output"] = _tags(result, leaves)
    finally:
        forced.products = kept
    return found


def _tags(x: Tensor, leaves: Mapping[str, Tensor]) -> set[str]:
    names = {id(leaf): op for op, leaf in leaves.items()}
    found, seen, stack = set(), set(), [x.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None and id(leaf) in names:
            found.add(names[id(leaf)])
        stack.extend(following for following, _ in node.next_functions)
    return found


def operand_site(op: str, role: str) -> str:
    """The site of an attention operand."""
    return f"{op.rpartition('.')[0]}.{role}"


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


__all__ = ["Forced", "Product", "View", "multiply_by", "quantizer_name", "reached_by"]
