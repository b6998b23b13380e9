"""What is wrong with one product, told from the codes (or the output) behind it.

The product is changed as a hypothesis says, everything else stays, and the simulation runs to the site in question
again, forced through the runtime's codes. A hypothesis is accepted where the wrong codes vanish. A common factor is
enclosed by the codes as a quantizer's scale is; factors and offsets of single channels are least-squares fits, so they
are judged a tenth of a code less strictly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from s2d_deploy.data import Batch
from s2d_deploy.forced import Forced, Product, View, multiply_by
from s2d_deploy.quantizer_faults import wrong_codes
from s2d_deploy.session import Array

OUTPUT = "output"
_LOOSE = 0.12  # codes: how far a fitted value may be off
_LEFT = 0.02  # of the wrong codes, that may stay wrong


@dataclass(frozen=True, slots=True)
class OpFault:
    """A cause.

    Attributes:
        cause: ``"wrong-scale"``, ``"saturation"``, ``"swapped-axis"``, ``"fallback"``, ``"wrong-bias"``.
        op: its name.
        detail: in words.
        product: the product with this fault.
        fitted: whether numbers in it were fitted, so that what follows is off by a little.
    """

    cause: str
    op: str
    detail: str
    product: Product
    fitted: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What the simulation has at a site, beside what the runtime has there: both in codes (the output: in its own
    standard deviations times 127).

    Attributes:
        u: the simulation's values.
        v: the runtime's.
        inside: where nothing was clamped.
        low, high: where the runtime's code is the smallest or the largest one.
        wrong: where they differ, no boundary excusing it, at a looser tolerance too.
    """

    u: Tensor
    v: Tensor
    inside: Tensor
    low: Tensor
    high: Tensor
    wrong: Callable[[float], Tensor]


class Segment:
    """The way from given codes to one site.

    Args:
        forced: the simulation, with the corrections found so far.
        batch: what was fed.
        codes: the runtime's.
        output: name of the model's output.
        shown: the runtime's output.
        site: where to look; `OUTPUT` for the model's output.
        tolerance: float noise there, in codes.
    """

    def __init__(
        self,
        forced: Forced,
        batch: Batch,
        codes: Mapping[str, Array],
        output: str,
        shown: Tensor,
        site: str,
        tolerance: float,
    ) -> None:
        self.forced, self.batch, self.codes, self.output = forced, batch, codes, output
        self.shown, self.site, self.tolerance = shown, site, tolerance

    def target(self, changes: Mapping[str, Product] | None = None, batch: Batch | None = None) -> Target:
        """Run to the site with `changes` of products (behind those that are there already)."""
        kept = dict(self.forced.products)
        views: list[View] = []
        try:
            for op, change in (changes or {}).items():
                self.forced.products[op] = chained(kept.get(op), change)
            result = self.forced.run(
                self.batch if batch is None else batch,
                self.output,
                self.codes,
                lambda view: views.append(view) if view.site == self.site else None,
                None if self.site == OUTPUT else self.site,
            )
        finally:
            self.forced.products = kept
        if self.site == OUTPUT:
            if result is None:
                raise ValueError("the pass ended before the output")
            return output_target(result, self.shown, self.tolerance)
        view = views[0]
        if view.theirs is None:
            raise ValueError(f"{self.site}: the runtime shows no codes")
        return Target(
            view.u,
            view.theirs - view.zero,
            view.inside,
            view.theirs <= view.quantizer.grid.qmin,
            view.theirs >= view.quantizer.grid.qmax,
            lambda extra: wrong_codes(view, self.tolerance + extra),
        )


def output_target(result: Tensor, shown: Tensor, tolerance: float) -> Target:
    """The model's output as a target."""
    unit = max(float(shown.std()), 1e-12) / 127.0
    u, v = result / unit, shown.to(result.dtype) / unit
    inside = torch.ones_like(u, dtype=torch.bool)
    return Target(u, v, inside, ~inside, ~inside, lambda extra: (u - v).abs() > tolerance + extra)


def classify_op(segment: Segment, op: str, *, refused: bool) -> OpFault | None:
    """The one fault of `op` that explains the codes at the segment's site; None where none does.

    Args:
        segment: ends where the codes are wrong first.
        op: a product that reaches it.
        refused: the runtime has no integers there: a fallback to float is worth a try.
    """
    with torch.no_grad():
        now = segment.target()
        strict, loose = int(now.wrong(0.0).sum()), int(now.wrong(_LOOSE).sum())
        for fault in _hypotheses(segment, op, refused):
            found = segment.target({op: fault.product})
            before, after = (loose, found.wrong(_LOOSE)) if fault.fitted else (strict, found.wrong(1e-6))
            # Few wrong codes are no evidence for a fit: it has to take away at least some that are surely wrong.
            if int(after.sum()) <= _LEFT * before and (before >= 4 or not fault.fitted):
                return fault
    return None


def common_factor(segment: Segment, op: str) -> float | None:
    """The factor of `op`'s product that explains the codes as a quantizer's scale would; None where none does."""
    with torch.no_grad():
        before = int(segment.target().wrong(0.0).sum())
        factor = _factor(segment, op, None)
        if factor is None or int(segment.target({op: _times(factor)}).wrong(1e-6).sum()) > _LEFT * before:
            return None
        return factor


def _hypotheses(segment: Segment, op: str, refused: bool) -> Iterator[OpFault]:
    forced, plan = segment.forced, segment.forced.plan
    stored = op in forced.float_weights
    if stored and refused:
        weight = forced.float_weights[op]
        yield OpFault(
            "fallback", op, "runs in float, with the weights before quantization", multiply_by(forced, op, weight)
        )
    factor = _factor(segment, op, None)
    if factor is not None:
        yield OpFault("wrong-scale", op, f"its result is {factor:.6g} times the plan's", _times(factor))
    if stored:
        yield from _axes(forced, op)
        yield from _orders(forced, op)
    if plan.ops[op].kind in ("linear", "conv"):
        channel = -1 if plan.ops[op].kind == "linear" else 1
        yield from _channels(segment, op, channel)
    yield from _saturation(segment, op)


def _times(factor: float | Tensor) -> Product:
    return lambda _left, _right, product: product * factor


def _factor(segment: Segment, op: str, only: Tensor | None, start: float = 1.0) -> float | None:
    """A common factor, of the channels where `only` is 1; None where it is 1."""
    mask: float | Tensor = 1.0 if only is None else only
    found = _parameter(segment, op, lambda f: _times(1.0 + (f - 1.0) * mask), start, 1e-5)
    return found if found is not None and abs(found - 1.0) > 1e-5 else None


def _parameter(segment: Segment, op: str, make: Callable[[float], Product], start: float, small: float) -> float | None:
    """The number that the codes agree on: least squares to come near, then the value that most codes allow."""
    value = start
    for step in range(8):
        target, slope = _with_slope(segment, op, make, value, small)
        error, inner = (target.v - target.u)[target.inside], slope[target.inside]
        norm = float((inner * inner).sum())
        if norm == 0.0:
            return None
        change = float((inner * error).sum()) / norm
        value += max(min(change, abs(start)), -0.6 * value)
        if abs(change) < 1e-7 * abs(start) or (step >= 3 and segment.site != OUTPUT):
            break
    if segment.site == OUTPUT:
        return value
    for _ in range(5):
        target, slope = _with_slope(segment, op, make, value, small)
        change = _most_allow(target, slope, segment.tolerance)
        value += max(min(change, abs(start)), -0.6 * value)
        if abs(change) < 1e-7 * abs(start):
            break
    return value


def _with_slope(
    segment: Segment, op: str, make: Callable[[float], Product], value: float, small: float
) -> tuple[Target, Tensor]:
    target = segment.target({op: make(value)})
    return target, (segment.target({op: make(value + small)}).u - target.u) / small


def _most_allow(target: Target, slope: Tensor, tolerance: float) -> float:
    """The change of the parameter that the largest number of codes allows: each allows an interval."""
    known = slope.abs() > 1e-3 * slope.abs().max()
    u, v, m = target.u[known], target.v[known], slope[known]
    if m.numel() < 2 or not bool(m.abs().max() > 0):
        return 0.0
    endless = torch.full_like(u, torch.inf)
    below = torch.where(target.low[known], -endless, v - 0.5 - tolerance) - u
    above = torch.where(target.high[known], endless, v + 0.5 + tolerance) - u
    a, b = torch.where(m > 0, below, above) / m, torch.where(m > 0, above, below) / m
    places = torch.cat([a, b])
    order = torch.argsort(places)
    steps = torch.cat([torch.ones_like(a), -torch.ones_like(b)])[order].cumsum(0)
    at = int(steps[:-1].argmax())
    low, high = float(places[order[at]]), float(places[order[at + 1]])
    if low == -torch.inf or high == torch.inf:
        return 0.0 if low <= 0 <= high else (low if low > 0 else high)
    return (low + high) / 2


def _axes(forced: Forced, op: str) -> Iterator[OpFault]:
    """The weight transposed; its scales along the other axis."""
    layer = forced.model.get_submodule(op)
    weight = layer.weight
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return
    if weight.shape[0] == weight.shape[1]:
        scale = (
            forced.plan.sites[f"{op}.weight"].scale.to(weight.dtype) if f"{op}.weight" in forced.plan.sites else None
        )
        if scale is not None and scale.numel() == weight.shape[0]:
            turned = weight / scale.reshape(-1, 1) * scale.reshape(1, -1)
            text = "the weight's scales lie along the inner dimension, not along the output channels"
            yield OpFault("swapped-axis", op, text, multiply_by(forced, op, turned))
            swapped = (weight / scale.reshape(-1, 1)).T * scale.reshape(-1, 1)
            yield OpFault("swapped-axis", op, "the weight's codes are transposed", multiply_by(forced, op, swapped))
        yield OpFault("swapped-axis", op, "the weight is transposed", multiply_by(forced, op, weight.T))


def _orders(forced: Forced, op: str) -> Iterator[OpFault]:
    """The scales of the output channels reversed."""
    site = forced.plan.sites.get(f"{op}.weight")
    if site is None or site.scale.dim() != 1 or site.scale.numel() < 2:
        return
    scale = site.scale.double()
    shape = [1, -1, 1, 1] if forced.plan.ops[op].kind == "conv" else [-1]
    text = "the scales of the output channels stand in reverse order"
    yield OpFault("swapped-axis", op, text, _times((scale.flip(0) / scale).reshape(shape)))


def _channels(segment: Segment, op: str, channel: int) -> Iterator[OpFault]:
    """Factors, then offsets, of single output channels."""
    plan = segment.forced.plan
    count = plan.ops[op].n
    shape = [1, -1, 1, 1] if channel == 1 else [-1]
    for kind in ("factor", "offset"):
        values = _least_squares(segment, op, count, shape, kind)
        if values is None:
            continue
        neutral = 1.0 if kind == "factor" else 0.0
        moved = (values - neutral).abs() > 0.02 * (1.0 if kind == "factor" else max(float(values.abs().max()), 1e-9))
        chosen = torch.where(moved, values, torch.full_like(values, neutral)).reshape(shape)
        k = int(moved.sum())
        if not k:
            continue
        if kind == "offset":
            text = f"the results of {k} of {count} output channels are shifted: another bias"
            yield OpFault("wrong-bias", op, text, lambda _l, _r, p, c=chosen: p + c, fitted=True)  # type: ignore[misc]
            continue
        site = plan.sites.get(f"{op}.weight")
        scale = site.scale.flatten().double() if site is not None else torch.ones(count)
        for i in (values - 1.0).abs().argsort(descending=True)[:2].tolist():
            only = torch.zeros_like(values)
            only[i] = 1.0
            exact = _factor(segment, op, only.reshape(shape), float(values[i]))
            if exact is not None:
                text = f"output channel {i} is {exact:.5g} times the plan's"
                yield OpFault("wrong-scale", op, text, _times(1.0 + (exact - 1.0) * only.reshape(shape)))
        cause, text = "wrong-scale", f"{k} of {count} output channels are scaled by other factors"
        if scale.numel() == count:
            theirs = (scale * values).sort().values
            if bool(((theirs - scale.sort().values).abs() < 0.02 * scale.sort().values).all()):
                cause, text = "swapped-axis", "the scales of the output channels stand in another order"
        yield OpFault(cause, op, text, _times(chosen), fitted=True)


def _least_squares(segment: Segment, op: str, count: int, shape: list[int], kind: str) -> Tensor | None:
    """Factor or offset of every channel, by L-BFGS on the distance to the runtime's codes."""
    neutral = 1.0 if kind == "factor" else 0.0
    theta = torch.full((count,), neutral, dtype=torch.float64, requires_grad=True)
    unit = 1.0

    def change(_left: Tensor, _right: Tensor, product: Tensor) -> Tensor:
        return product * theta.reshape(shape) if kind == "factor" else product + unit * theta.reshape(shape)

    solver = torch.optim.LBFGS([theta], max_iter=60, history_size=20, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        target = segment.target({op: change})
        value = (target.u - target.v)[target.inside].square().mean()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        solver.step(loss)  # type: ignore[no-untyped-call]
    found = theta.detach()
    return found if bool(torch.isfinite(found).all()) else None


def _saturation(segment: Segment, op: str) -> Iterator[OpFault]:
    """Accumulators held below a limit that the runtime did not show when it was asked for them alone."""
    unit = accumulator_unit(segment.forced, op)
    if unit is None:
        return
    largest: list[float] = []

    def look(_left: Tensor, _right: Tensor, product: Tensor) -> Tensor:
        largest.append(float((product / unit).abs().max()))
        return product

    segment.target({op: look})

    def clipped(limit: float) -> Product:
        return lambda _left, _right, product: (product / unit).clamp(-limit, limit) * unit

    def distance(limit: float) -> float:
        target = segment.target({op: clipped(limit)})
        return float((target.u - target.v)[target.inside].square().mean())

    limits = [largest[0] * share for share in (0.9, 0.75, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05)]
    start = min(limits, key=distance)
    limit = _parameter(segment, op, clipped, start, 1e-6 * start)
    if limit is not None and 0 < limit < largest[0]:
        yield OpFault("saturation", op, f"accumulators saturate near +-{limit:,.0f}", clipped(limit), fitted=True)


def accumulator_unit(forced: Forced, op: str) -> Tensor | None:
    """What an accumulator of `op` is multiplied by, broadcastable against the product; None without static scales."""
    plan = forced.plan
    (left, _), (right, role) = plan.ops[op].sites
    sites = [plan.sites.get(name) for name in (left, right)]
    if any(s is None or s.grid.dynamic or s.scale.dim() > 1 for s in sites):
        return None
    one, other = (s.scale.double() for s in sites if s is not None)
    if role == "weight" and other.numel() > 1:
        other = other.reshape(1, -1, 1, 1) if plan.ops[op].kind == "conv" else other.flatten()
    return one * other


def chained(first: Product | None, second: Product) -> Product:
    """Both changes, one behind the other."""
    if first is None:
        return second
    return lambda left, right, product: second(left, right, first(left, right, product))
