"""PTQ4ViT: scales that keep each product's output where the model's output feels it (Yuan et al., arXiv 2111.12293).

**Hessian-guided metric** (section 3.3): of a product with output O, those scales are the best that minimize

    E[ sum_j (O^_j - O_j)^2 (dL / dO_j)^2 ]

The squared gradients stand for the diagonal of the Hessian. The paper takes the gradient of its loss; here L is a
second-order measure of the change of the model's output, so that no labels are needed and the gradient does not vanish
at the float model. ``loss: squared`` draws random signs v and backpropagates ``v . y``: the expectation of its square
is the diagonal of J^T J, that of half the squared output error. ``loss: softmax`` draws ``v = softmax(y) - onehot(l)``
with labels l from the model's own distribution (its Fisher information). ``metric: output`` weighs all outputs alike.

Weights and activations take turns (Algorithm 1): `candidates` scales up to 1.2 times the largest magnitude's, a few
`rounds`, each operand given the other as it is now. The search starts from what `ranges` sets, and those scales are
candidates too, so on the sampled data the metric never gets worse. Plain uniform scales are what comes out: every
target runs them.

**Twin uniform quantization** (section 3.2), ``twin: true``: softmax output gets a fine range for its many small values
beside a coarse one up to 1, GELU output a fine one for its short negative side; the coarse step is a power of two times
the fine one. No integer kernel here runs such codes: simulation only, exporters refuse them by name.

Layers that read one tensor (q, k, v) share one input scale, so that a deployed graph quantizes it once: it minimizes
the sum of their metrics. (The paper gives each layer its own.)

Not guaranteed: a better model. Products are looked at alone, with the float model's inputs, on a sample.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from s2d_deploy.attention import watching
from s2d_deploy.errors import ModelError, message
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.grid import Grid, PerAxis, PerTensor
from s2d_deploy.plan import Op, Site
from s2d_deploy.producers import trace_producers
from s2d_deploy.ptq import passes, ranges
from s2d_deploy.ptq.activations import input_rows, real_tokens
from s2d_deploy.ptq.folding import first_sample, reader_groups
from s2d_deploy.ptq.passes import Batch, Context, Quantized

logger = logging.getLogger(__name__)

_BEYOND = 1.2  # the paper's beta: of the largest magnitude
_OPS_AT_ONCE = 12  # whose operands are held in memory together
_SHIFTS = range(11)


class Options(passes.Options):
    """The metric, the search, and the twin grids."""

    metric: Literal["hessian", "output"] = Field(
        "hessian", description="Squared output error weighted by squared gradients, or unweighted."
    )
    loss: Literal["squared", "softmax"] = Field(
        "squared", description="What the gradients are of: squared error of the output, or of a classifier's softmax."
    )
    twin: bool = Field(False, description="Twin uniform grids for softmax and GELU output. No target runs them.")
    candidates: int = Field(32, ge=2, le=1000, description="Scales tried for each operand.")
    rounds: int = Field(2, ge=1, le=20, description="Turns of weights and activations.")
    samples: int = Field(16, ge=1, description="Calibration samples that are read.")
    rows: int = Field(512, ge=16, description="Rows of each Linear's and convolution's input that are kept of them.")


@dataclass(slots=True)
class Product:
    """One contraction as it was seen: ``output = left @ right^T``, batched for attention.

    Attributes:
        left: float32 ``(R, K)``, or ``(B, heads, T, D)`` for attention.
        right: float32 ``(N, K)``: the weight; or ``(B, heads, D, T)``, as attention multiplies it.
        importance: float32 of the output's shape: squared gradients over `unit`.
        unit: mean of the squared gradients; errors times their unit add up over products.
        attention: whether it is one of attention's two.
    """

    left: Tensor
    right: Tensor
    importance: Tensor
    unit: float
    attention: bool

    def multiply(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of two operands in this one's layout."""
        return left @ (right if self.attention else right.T)

    def error(self, left: Tensor, right: Tensor) -> Tensor:
        """Weighted squared error, ``(N,)``: of each output channel (last axis)."""
        wrong = (self.multiply(left, right) - self.multiply(self.left, self.right)).square_().mul_(self.importance)
        return wrong.double().reshape(-1, wrong.shape[-1]).sum(dim=0)


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Set ranges as the pass `ranges` does, then search the scales of every integer site, op by op.

    Raises:
        ModelError: no site can be searched (a precision in FP4, scales made at run time only).
    """
    quantized = ranges.apply(quantized, context, ranges.Options())
    model, plan = quantized.model, quantized.plan
    left_out: dict[str, str] = {}
    ops = [op for op in plan.ops.values() if _searchable(op, plan.sites, model, left_out)]
    if not ops:
        raise ModelError(
            message(
                "ptq4vit finds no scale to search",
                expected="integer sites with stored scales",
                found="; ".join(f"{k}: {v}" for k, v in left_out.items()) or "a plan without sites",
                fix="use a precision such as w4a4, or the pass `ranges`",
            )
        )
    twins = _twin_sites(model, plan.ops, context) if options.twin else {}
    groups = _on_one_tensor(model, ops, plan.sites, first_sample(context.batches()))
    errors, number = {}, 0
    for some in _chunks(groups):
        seen = observe(model, [op for group in some for op in group], context, options)
        for group in some:
            number += 1
            title = ", ".join(op.name for op in group)
            context.progress(f"ptq4vit {number} of {len(groups)}: {title}")
            sites = {name: plan.sites[name] for op in group for name, _ in op.sites if name in plan.sites}
            found, before, after = _search({op.name: seen.pop(op.name) for op in group}, group, sites, twins, options)
            plan.sites.update(found)
            errors[title] = after / before if before > 0 else 1.0
    for name, reason in left_out.items():
        logger.info("ptq4vit leaves out %s: %s", name, reason)
    plan.info["ptq4vit"] = {
        "metric": options.metric,
        "error_ratio": {name: round(ratio, 6) for name, ratio in errors.items()},
        "twin": [name for name in twins if name in plan.sites and plan.sites[name].grid.format == "twin"],
        "left_out": left_out,
    }
    return Quantized(model, plan)


def _searchable(op: Op, sites: Mapping[str, Site], model: nn.Module, left_out: dict[str, str]) -> bool:
    own = [sites[name] for name, _ in op.sites if name in sites]
    other = [s.grid.name for s in own if not s.grid.integer]
    if other:
        left_out[op.name] = f"{other[0]} codes"
    elif op.kind == "conv" and cast(nn.Conv2d, model.get_submodule(op.name)).groups != 1:
        left_out[op.name] = "a grouped convolution"
    elif own and not any(_free(s) for s in own):
        left_out[op.name] = "scales in blocks or made at run time"
    return op.name not in left_out and bool(own)


def _free(site: Site) -> bool:
    """Whether the site's scales are searched: stored, for the tensor or for each output channel."""
    g = site.grid.granularity
    return isinstance(g, PerTensor) or (isinstance(g, PerAxis) and g.axis == 0 and site.role == "weight")


def _on_one_tensor(
    model: nn.Module, ops: Sequence[Op], sites: Mapping[str, Site], sample: Batch
) -> list[tuple[Op, ...]]:
    """`ops` in their order; Linears that read one tensor through equal quantizers are together."""
    tensors = {name: i for i, group in enumerate(reader_groups(model, sample)) for name in group.names}
    found: dict[object, list[Op]] = {}
    for op in ops:
        site = sites.get(f"{op.name}.input")
        shared = op.kind == "linear" and op.name in tensors and site is not None and _free(site)
        key = (tensors[op.name], site.grid, float(site.scale), int(site.zero_point)) if shared and site else op.name
        found.setdefault(key, []).append(op)
    return [tuple(group) for group in found.values()]


def _chunks(groups: Sequence[tuple[Op, ...]]) -> Iterator[list[tuple[Op, ...]]]:
    """Whole groups, as many as `_OPS_AT_ONCE` allows."""
    some: list[tuple[Op, ...]] = []
    for group in groups:
        if some and sum(map(len, some)) + len(group) > _OPS_AT_ONCE:
            yield some
            some = []
        some.append(group)
    if some:
        yield some


def _twin_sites(model: nn.Module, ops: Mapping[str, Op], context: Context) -> dict[str, bool]:
    """Sites that get twin grids: True for a signed one (behind an activation function), False for probabilities."""
    producers = trace_producers(model, ops, first_sample(context.batches()))
    found = {f"{op.name.removesuffix('.context')}.probs": False for op in ops.values() if op.kind == "context"}
    return found | {site: True for site, p in producers.items() if p.kind == "activation"}


# ---- what is seen --------------------------------------------------------------------------------------------


def observe(model: nn.Module, ops: Sequence[Op], context: Context, options: Options) -> dict[str, Product]:
    """Operands and importances of `ops` over the first calibration samples, by op name; the model stays as it was."""
    generator = torch.Generator().manual_seed(context.seed)
    kept: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {op.name: [] for op in ops}
    left = options.samples
    frozen = [p for p in model.parameters() if not p.requires_grad]
    try:
        for p in frozen:
            p.requires_grad_(p.is_floating_point())
        for whole in context.batches():
            if left <= 0:
                break
            batch = {name: tensor[:left] for name, tensor in whole.items()}
            left -= next(iter(batch.values())).shape[0]
            with torch.enable_grad(), _products(model, ops) as seen:
                result = model(**batch)
                y = result if isinstance(result, Tensor) else result[context.output]
                direction = _direction(y.detach(), batch, options.loss, generator)
                outputs = [seen[op.name][2] for op in ops]
                gradients = torch.autograd.grad(y, outputs, direction, allow_unused=True)
            for op, gradient in zip(ops, gradients, strict=True):
                a, b, out = (t.detach() for t in seen[op.name])
                weight = torch.zeros_like(out) if gradient is None else gradient.square()
                if options.metric == "output":
                    weight = torch.ones_like(out)
                kept[op.name].append(_as_rows(model, op, a, b, weight, batch))
    finally:
        for p in frozen:
            p.requires_grad_(False)
    return {op.name: _joined(op, kept[op.name], options.rows, generator) for op in ops}


def _direction(y: Tensor, batch: Batch, loss: str, generator: torch.Generator) -> Tensor:
    """A random vector whose outer product has the loss's Hessian at the output as its expectation."""
    if loss == "softmax":
        p = torch.softmax(y, dim=-1)
        label = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
        return p - torch.zeros_like(p).reshape(-1, p.shape[-1]).scatter_(1, label, 1.0).reshape(p.shape)
    signs = torch.randint(0, 2, y.shape, generator=generator).to(y.dtype) * 2 - 1
    return signs * real_tokens(batch, y).unsqueeze(-1)


@contextmanager
def _products(model: nn.Module, ops: Sequence[Op]) -> Iterator[dict[str, tuple[Tensor, Tensor, Tensor]]]:
    """Left operand, right operand and output of each op in the forward pass of the block."""
    seen: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    names = {module: name for name, module in model.named_modules()}
    wanted = {op.name for op in ops}
    pending: dict[str, Tensor] = {}

    def on_layer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[names[module]] = (args[0], cast(Tensor, module.weight), output)

    def on_operand(module: nn.Module, operand: str, x: Tensor) -> None:
        if operand in ("query", "probs"):
            pending[f"{names[module]}.{'scores' if operand == 'query' else 'context'}"] = x

    def on_matmul(a: Tensor, b: Tensor, output: Tensor) -> None:
        for name in [n for n, x in pending.items() if x is a]:
            del pending[name]
            if name in wanted:
                seen[name] = (a, b, output)

    with ExitStack() as stack:
        for op in ops:
            if op.kind in ("linear", "conv"):
                stack.callback(model.get_submodule(op.name).register_forward_hook(on_layer).remove)
        stack.enter_context(watching(on_operand))
        stack.enter_context(_Matmuls(on_matmul))
        yield seen


class _Matmuls(TorchFunctionMode):
    """Shows every `torch.matmul` with its operands and its output."""

    def __init__(self, on_matmul: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self.on_matmul = on_matmul

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is torch.matmul:
            self.on_matmul(args[0], args[1], output)
        return output


def _as_rows(
    model: nn.Module, op: Op, a: Tensor, b: Tensor, weight: Tensor, batch: Batch
) -> tuple[Tensor, Tensor, Tensor]:
    if op.kind not in ("linear", "conv"):
        return a, b, weight
    layer = model.get_submodule(op.name)
    if op.kind == "conv":
        return input_rows(layer, a, batch), b.flatten(1), weight.flatten(2).transpose(1, 2).reshape(-1, op.n)
    mask = real_tokens(batch, a)
    return a[mask].float(), b, weight[mask]


def _joined(op: Op, parts: list[tuple[Tensor, Tensor, Tensor]], rows: int, generator: torch.Generator) -> Product:
    if op.kind in ("scores", "context"):
        if len({p[0].shape[1:] for p in parts}) > 1:  # sentences of different length: the first batch stands for all
            parts = parts[:1]
        a, b, weight = (torch.cat([p[i] for p in parts]) for i in range(3))
        return Product(a, b, *_scaled(weight), attention=True)
    a, weight = torch.cat([p[0] for p in parts]), torch.cat([p[2] for p in parts])
    chosen = torch.randperm(a.shape[0], generator=generator)[:rows].sort().values
    return Product(a[chosen], parts[0][1], *_scaled(weight[chosen]), attention=False)


def _scaled(weight: Tensor) -> tuple[Tensor, float]:
    """Mean 1, so that squares of tiny gradients do not underflow, and the mean that it had.

    Ones and 0 where the output does not depend on the op.
    """
    mean = float(weight.double().mean())
    return ((weight.double() / mean).float() if mean > 0 else torch.ones_like(weight)), mean


# ---- the search ----------------------------------------------------------------------------------------------


def _search(
    seen: Mapping[str, Product],
    ops: Sequence[Op],
    sites: Mapping[str, Site],
    twins: Mapping[str, bool],
    options: Options,
) -> tuple[dict[str, Site], float, float]:
    """Best sites of ops whose left operands share a scale, and the metric with the given ones and with these."""
    given = {op.sites[side][0]: (seen[op.name].left, seen[op.name].right)[side] for op in ops for side in (0, 1)}
    current = dict(sites)
    units = {op.name: seen[op.name].unit for op in ops}
    whole = sum(units.values())
    weights = {name: unit / whole if whole > 0 else 1.0 for name, unit in units.items()}

    def operand(name: str, site: Site | None) -> Tensor:
        if site is None:
            return given[name]
        return cast(Tensor, FakeQuantizer.of(site)(given[name])).detach()

    def error(op: Op, chosen: Mapping[str, Site]) -> Tensor:
        (left, _), (right, _) = op.sites
        wrong = seen[op.name].error(operand(left, chosen.get(left)), operand(right, chosen.get(right)))
        return wrong if len(ops) == 1 else wrong * weights[op.name]

    def total(chosen: Mapping[str, Site]) -> float:
        return sum(float(error(op, chosen).sum()) for op in ops)

    def changed_to(names: tuple[str, ...], involved: list[Op], others: dict[str, Site], candidate: Site) -> Tensor:
        found = [error(op, others | _each(names, candidate, others)) for op in involved]
        return found[0] if len(found) == 1 else torch.stack([f.sum() for f in found]).sum()

    before = total(current)
    shared = tuple(op.sites[0][0] for op in ops)
    # Weights first, as the paper's Algorithm 1.
    slots = [names for names in (*((op.sites[1][0],) for op in ops), shared) if names[0] in current]
    values = {names: torch.cat([given[n] for n in names]) if len(names) > 1 else given[names[0]] for names in slots}
    for names in slots:
        if names[0] in twins:
            start = _twin(current[names[0]], values[names], signed=twins[names[0]])
            current |= _each(names, start, current) if start is not None else {}
    for _ in range(options.rounds):
        for names in slots:
            if not _free(current[names[0]]):
                continue
            involved = [op for op in ops if any(name in names for name, _ in op.sites)]
            errors = partial(changed_to, names, involved, dict(current))
            best = _best(current[names[0]], values[names], errors, options.candidates)
            current |= _each(names, best, current)
    changed = {
        name: replace(site, source="ptq4vit")
        for name, site in current.items()
        if site.grid != sites[name].grid or not torch.equal(site.scale, sites[name].scale)
    }
    return current | changed, before, total(current)


def _each(names: Sequence[str], chosen: Site, current: Mapping[str, Site]) -> dict[str, Site]:
    """`chosen`'s grid and scale for every one of `names`."""
    return {n: replace(current[n], grid=chosen.grid, scale=chosen.scale, zero_point=chosen.zero_point) for n in names}


def _best(site: Site, x: Tensor, error: Callable[[Site], Tensor], candidates: int) -> Site:
    """The candidate with the least error; per channel where the site has a scale for each."""
    if site.grid.format == "twin":
        tried = [replace(site, grid=g, scale=s) for g, s in _twin_candidates(site, x)]
        return min([site, *tried], key=lambda s: float(error(s).sum()))
    by_channel = isinstance(site.grid.granularity, PerAxis)
    peak = x.abs().flatten(1).amax(dim=1) if by_channel else x.abs().max()
    top = peak / site.grid.qmax * _BEYOND
    least = error(site)
    scale = site.scale
    for j in range(1, candidates + 1):
        tried_scale = top * (j / candidates)
        usable = tried_scale > torch.finfo(torch.float32).tiny
        tried_scale = torch.where(usable, tried_scale, site.scale)
        found = error(replace(site, scale=tried_scale))
        if by_channel:
            better = found < least
            scale, least = torch.where(better, tried_scale, scale), torch.where(better, found, least)
        elif float(found.sum()) < float(least.sum()):
            scale, least = tried_scale, found
    return replace(site, scale=scale)


def _twin(site: Site, x: Tensor, *, signed: bool) -> Site | None:
    """The site on a twin grid with no shift yet; None where the tensor has no short negative side to serve."""
    low = float(x.min())
    if signed and low >= 0:
        return None
    grid = Grid(site.grid.bits, signed=signed, format="twin")
    start = replace(site, grid=grid, scale=torch.tensor(1.0), zero_point=torch.tensor(0, dtype=torch.int32))
    grid, scale = next(_twin_candidates(start, x))
    return replace(start, grid=grid, scale=scale)


def _twin_candidates(site: Site, x: Tensor) -> Iterator[tuple[Grid, Tensor]]:
    """Grids with their fine steps (section 3.2): one range is fixed, the power of two between the steps is searched.

    Softmax: the coarse range is fixed at steps of 2^(1 - bits), so that it ends just below 1. GELU: the fine range just
    covers the negative side.
    """
    half = 1 << (site.grid.bits - 1)
    for shift in _SHIFTS:
        step = -float(x.min()) / half if site.grid.signed else 1 / half / (1 << shift)
        yield replace(site.grid, shift=shift), torch.tensor(max(step, math.ldexp(1.0, -100)))


__all__ = ["Options", "Product", "apply", "observe"]
