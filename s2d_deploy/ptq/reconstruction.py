"""Layer after layer: the frame that every weight reconstruction pass works in.

Layers are served in execution order. Those that read the same tensor (query, key and value projections) form a group
and share one set of statistics. A layer's rows are those of the *simulated* model, in which every earlier layer already
has its chosen weights and every activation is quantized where the plan says so; beside them stand, where a pass asks,
the same rows of the float model. Nothing is kept of a group once it is done, so memory is bounded by one group (K x K
floats), never by the data; the price is that the model runs again, up to the group, for every group.

A layer that no single matrix describes (a convolution with groups) is left as it was rounded: a warning and
``plan.info["left_out"]`` say so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from s2d_deploy.attention import use_visible_attention
from s2d_deploy.errors import DataError, ModelError, message
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.plan import Plan, Site
from s2d_deploy.ptq.activations import input_rows
from s2d_deploy.ptq.passes import Batch, Context, Quantized, put_on_grid
from s2d_deploy.simulation import QuantConv2d, QuantLinear, simulate

logger = logging.getLogger(__name__)
Beside = Literal["float", "simulated"]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Second moments of one group's input rows, float64.

    Attributes:
        count: rows seen.
        gram: ``(K, K)``, mean of ``q q^T``, q being what the integer product multiplies.
        cross: ``(K, K)``, mean of ``x q^T``, x being the rows beside them; None where none were asked for.
        mean: ``(K,)`` of q.
        float_mean: ``(K,)`` of x; None as `cross`.
    """

    count: int
    gram: Tensor
    cross: Tensor | None
    mean: Tensor
    float_mean: Tensor | None

    def pooled(self, other: Statistics) -> Statistics:
        """Of the rows of both."""

        def mean(a: Tensor, b: Tensor) -> Tensor:
            return (a * self.count + b * other.count) / (self.count + other.count)

        cross = None if self.cross is None or other.cross is None else mean(self.cross, other.cross)
        floats = (
            None if self.float_mean is None or other.float_mean is None else mean(self.float_mean, other.float_mean)
        )
        count = self.count + other.count
        return Statistics(count, mean(self.gram, other.gram), cross, mean(self.mean, other.mean), floats)


class Reconstruction:
    """One pass at work on one model.

    Args:
        quantized: with ranges set; changed in place.
        context: the calibration data; its `reference` is what outputs are compared with.
        name: of the pass.

    Attributes:
        reference: the float model.
        simulated: the model as the plan says, with the weights chosen so far.
        groups: names of layers that read the same tensor, in execution order.
        left_out: layer -> why it is not served.

    Raises:
        ModelError: no layer has a quantized weight, or (with `rounds`) weights already lie on their grids.
        DataError: no calibration data.
    """

    def __init__(self, quantized: Quantized, context: Context, name: str, *, rounds: bool = True) -> None:
        self.quantized, self.context, self.name = quantized, context, name
        self.reference = quantized.model if context.reference is None else context.reference
        served, self.left_out = _served(quantized, name)
        if rounds:
            _check_unrounded(quantized, served, name)
        use_visible_attention(self.reference)
        self.simulated = simulate(quantized.model, quantized.plan).eval()
        first = next(iter(context.batches()), None)
        if first is None:
            raise DataError(message(f"pass {name!r} needs calibration data", expected="at least one batch"))
        self.groups = layer_groups(self.simulated, quantized.plan, served, first)
        reached = {layer for group in self.groups for layer in group}
        self.left_out |= {layer: "does not run on the calibration data" for layer in served if layer not in reached}
        self.say_left_out()

    def leave_out(self, layer: str, why: str) -> None:
        """Remember that `layer` is not served."""
        self.left_out[layer] = why

    def say_left_out(self) -> None:
        """Write what is left out into ``plan.info["left_out"]`` and warn, unless that has been said."""
        said = self.quantized.plan.info.setdefault("left_out", {}) if self.left_out else {}
        if self.left_out and said.get(self.name) != self.left_out:
            said[self.name] = dict(self.left_out)
            text = "; ".join(f"{layer} ({why})" for layer, why in self.left_out.items())
            logger.warning("%s leaves out %s", self.name, text)

    def site(self, layer: str) -> Site:
        """The weight site of `layer`."""
        return self.quantized.plan.sites[f"{layer}.weight"]

    def float_layer(self, layer: str) -> nn.Linear | nn.Conv2d:
        """The layer of the model that is being quantized."""
        return cast(nn.Linear, self.quantized.model.get_submodule(layer))

    def rows(
        self, group: Sequence[str], beside: Beside | None = None, *, relative: bool = False
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Batch after batch, what the group's weights multiply, and the rows `beside` them: FP32 ``(rows, K)`` each.

        Args:
            group: of `groups`.
            beside: "float", the float model's rows; "simulated", the simulated model's before they are quantized.
            relative: divide each row (and the one beside it) by the root mean square of the outputs that the float
                weights make of it, so that squared errors are relative ones. Else a few tokens with huge outputs, which
                a norm scales down right behind, rule every sum.
        """
        name = group[0]
        layer = self.simulated.get_submodule(name)
        weights = [cast(Tensor, self.reference.get_submodule(n).weight).detach().flatten(1) for n in group]
        for batch in self.context.batches():
            x = layer_input(self.simulated, name, batch)
            q = input_rows(layer, _operand(layer, x), batch)
            other = None
            if beside is not None:
                x = layer_input(self.reference, name, batch) if beside == "float" else x
                other = input_rows(layer, x, batch)
            if relative:
                size = _output_size(q if other is None else other, weights)
                q, other = q / size, None if other is None else other / size
            yield q, other

    def statistics(self, group: Sequence[str], beside: Beside | None = None, *, relative: bool = False) -> Statistics:
        """Moments of the group's rows over the calibration data; arguments as of `rows`."""
        moments = _Moments()
        for q, x in self.rows(group, beside, relative=relative):
            moments.add(q, x)
        return moments.statistics()

    def folds(
        self, group: Sequence[str], beside: Beside | None = None, *, relative: bool = False
    ) -> tuple[Statistics, Statistics]:
        """Moments over either half of the calibration data, for cross-validation; arguments as of `rows`.

        The halves are the even and the odd batches; of a single batch, its first and its last rows.
        """
        folds = _Moments(), _Moments()
        first: tuple[Tensor, Tensor | None] | None = None
        for index, (q, x) in enumerate(self.rows(group, beside, relative=relative)):
            if index == 0:
                first = q, x
                continue
            if first is not None:
                folds[0].add(*first)
                first = None
            folds[index % 2].add(q, x)
        if first is not None:
            q, x = first
            middle = (q.shape[0] + 1) // 2
            for fold, part in zip(folds, (slice(0, middle), slice(q.shape[0] - middle, None)), strict=True):
                fold.add(q[part], None if x is None else x[part])
        return folds[0].statistics(), folds[1].statistics()

    def means(self, group: Sequence[str], *, relative: bool = False) -> tuple[Tensor, Tensor]:
        """Means of the group's rows and of the float model's, float64 ``(K,)`` each.

        Args:
            group: of `groups`.
            relative: weigh each row by one over the power of its float outputs: the mean of an error is what minimizes
                its squares, and this is what minimizes the squares of relative errors.
        """
        layer = group[0]
        weights = [cast(Tensor, self.reference.get_submodule(n).weight).detach().flatten(1) for n in group]
        weight_sum, sums = 0.0, [torch.zeros(1, dtype=torch.float64)] * 2
        for q, x in self.rows(group, "float"):
            real = cast(Tensor, x)
            each = torch.ones(q.shape[0], 1, dtype=torch.float64)
            if relative:
                each = _output_size(real, weights).double().pow(-2)
            weight_sum += float(each.sum())
            sums = [total + (rows.double() * each).sum(0) for total, rows in zip(sums, (q, real), strict=True)]
        if not weight_sum > 0:
            raise DataError(message(f"layer {layer!r} saw no rows to average", expected="a token that is not zero"))
        return sums[0] / weight_sum, sums[1] / weight_sum

    def sampled(
        self, group: Sequence[str], rows: int, beside: Beside, *, relative: bool = False
    ) -> tuple[Tensor, Tensor]:
        """A uniform sample of at most `rows` pairs of `rows`: FP32 ``(<= rows, K)`` each."""
        generator = torch.Generator().manual_seed(self.context.seed)
        kept: tuple[Tensor, Tensor, Tensor] | None = None
        for q, x in self.rows(group, beside, relative=relative):
            found = torch.rand(q.shape[0], generator=generator), q, cast(Tensor, x)
            if kept is not None:
                found = tuple(torch.cat(pair) for pair in zip(kept, found, strict=True))  # type: ignore[assignment]
            chosen = found[0].topk(min(rows, found[0].numel())).indices.sort().values
            kept = found[0][chosen], found[1][chosen].clone(), found[2][chosen].clone()
        if kept is None:
            raise DataError(message("the calibration set is empty", expected="at least one batch"))
        return kept[1], kept[2]

    def choose(self, layer: str, codes: Tensor) -> None:
        """Give `layer` the weights of `codes` (int32, the weight's shape), here and in the simulation."""
        put_on_grid(self.quantized, f"{layer}.weight", codes, self.name)
        with torch.no_grad():
            simulated = cast(Tensor, self.simulated.get_submodule(layer).weight)
            simulated.copy_(self.float_layer(layer).weight)


def float_grams(
    model: nn.Module, context: Context, groups: Sequence[Sequence[str]], budget_bytes: int = 2**30
) -> Iterator[tuple[Sequence[str], Tensor]]:
    """Grams of float input rows, ``(group, (K, K) float64)``; one run of the data for all that `budget_bytes` hold."""
    use_visible_attention(model)
    pending = list(groups)
    while pending:
        taken: list[Sequence[str]] = []
        used = 0
        while pending and (not taken or used + _gram_bytes(model, pending[0]) <= budget_bytes):
            used += _gram_bytes(model, pending[0])
            taken.append(pending.pop(0))
        sums: dict[str, tuple[int, Tensor]] = {}
        with _all_rows(model, [group[0] for group in taken]) as run:
            for batch in context.batches():
                for name, rows in run(batch).items():
                    count, total = sums.get(name, (0, torch.zeros(1, dtype=torch.float64)))
                    x = rows.double()
                    sums[name] = count + x.shape[0], total + x.T @ x
        for group in taken:
            count, total = sums.pop(group[0])
            yield group, total / max(count, 1)


def layer_groups(model: nn.Module, plan: Plan, names: Sequence[str], batch: Batch) -> list[tuple[str, ...]]:
    """`names` in execution order, neighbours that multiply the same values together.

    Args:
        model: the simulated model; run once on `batch`.
        plan: its quantization.
        names: layers.
        batch: one batch; layers whose operands agree on it bit for bit are taken to read the same tensor.
    """
    groups: list[list[str]] = []
    last: list[Tensor] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = _operand(module, args[0].detach())
            same = bool(last) and _alike(module, plan, groups[-1][0], name) and torch.equal(last[0], x)
            if same:
                groups[-1].append(name)
            else:
                groups.append([name])
                last[:] = [x]

        return see

    wanted = set(names)
    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in plan.ops if name in wanted]
    try:
        with torch.no_grad():
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [tuple(group) for group in groups]


class _Reached(Exception):  # noqa: N818 - not an error: the rest of the forward pass is not needed
    pass


def layer_input(model: nn.Module, name: str, batch: Batch) -> Tensor:
    """The tensor that layer `name` is given, before its input quantizer; `model` runs no further than that layer.

    Raises:
        ModelError: the layer does not run.
    """
    seen: list[Tensor] = []

    def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].detach())
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(see)
    try:
        with torch.no_grad():
            model(**batch)
    except _Reached:
        return seen[0]
    finally:
        handle.remove()
    raise ModelError(message(f"layer {name!r} did not run on a calibration batch"))


@contextmanager
def _all_rows(model: nn.Module, names: Sequence[str]) -> Iterator[Callable[[Batch], dict[str, Tensor]]]:
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name] = _operand(module, args[0].detach())

        return see

    def run(batch: Batch) -> dict[str, Tensor]:
        seen.clear()
        with torch.no_grad():
            model(**batch)
        return {name: input_rows(model.get_submodule(name), x, batch) for name, x in seen.items()}

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def _operand(layer: nn.Module, x: Tensor) -> Tensor:
    """`x` as the layer's product multiplies it: through the input quantizer where there is one."""
    return cast(Tensor, layer.input_quantizer(x)) if isinstance(layer, QuantLinear | QuantConv2d) else x


def _output_size(rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Root mean square of each row's outputs, ``(rows, 1)``; infinite for a row of zeros, which then weighs nothing."""
    power = torch.stack([(rows @ w.T).square().sum(1) for w in weights]).sum(0) / sum(w.shape[0] for w in weights)
    return torch.where(power > 0, power.sqrt(), torch.full_like(power, float("inf"))).unsqueeze(1)


def _alike(layer: nn.Module, plan: Plan, first: str, name: str) -> bool:
    """Whether two layers could share rows: both Linear, or convolutions of one geometry."""
    if plan.ops[first].kind != plan.ops[name].kind or plan.ops[first].k != plan.ops[name].k:
        return False
    return not hasattr(layer, "kernel_size")


class _Moments:
    """Running sums of rows and of their products."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, integer: Tensor, real: Tensor | None) -> None:
        """Rows q (and x beside them): FP32 ``(rows, K)``."""
        q = integer.double()
        self.count += q.shape[0]
        found = {"gram": q.T @ q, "mean": q.sum(0)}
        if real is not None:
            x = real.double()
            found |= {"cross": x.T @ q, "float_mean": x.sum(0)}
        for name, value in found.items():
            self.sums[name] = self.sums[name].add_(value) if name in self.sums else value

    def statistics(self) -> Statistics:
        """Raises DataError where no row was seen."""
        if not self.count:
            raise DataError(message("the calibration set is empty", expected="at least one batch with a token in it"))
        found = {name: total / self.count for name, total in self.sums.items()}
        return Statistics(self.count, found["gram"], found.get("cross"), found["mean"], found.get("float_mean"))


def _served(quantized: Quantized, pass_name: str) -> tuple[list[str], dict[str, str]]:
    """Layers with a quantized weight, in execution order, and those that no matrix describes."""
    served: list[str] = []
    left_out: dict[str, str] = {}
    for name in quantized.plan.ops:
        site = quantized.plan.sites.get(f"{name}.weight")
        if site is None:
            continue
        layer = quantized.model.get_submodule(name)
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            left_out[name] = f"a convolution with {layer.groups} groups"
        elif isinstance(layer, nn.Conv2d) and isinstance(layer.padding, str):
            left_out[name] = f"padding {layer.padding!r}"
        elif not site.grid.integer:
            left_out[name] = f"{site.grid.name} weights"
        elif not (site.grid.symmetric and site.grid.signed):
            left_out[name] = "weights on an asymmetric grid"
        else:
            served.append(name)
    if not served:
        found = "; ".join(f"{name} ({why})" for name, why in left_out.items()) or "no quantized weight"
        raise ModelError(
            message(
                f"pass {pass_name!r} can serve no layer",
                expected=f"a Linear, or a convolution of one group, with integer weights at {quantized.plan.precision}",
                found=found,
                fix="take the pass out of quantize.passes, or check quantize.skip",
            )
        )
    return served, left_out


def _check_unrounded(quantized: Quantized, names: Sequence[str], pass_name: str) -> None:
    """Choosing codes twice would choose the same ones again: the second pass sees no rounding error."""
    on_grid = []
    for name in names:
        site = quantized.plan.sites[f"{name}.weight"]
        weight = cast(Tensor, quantized.model.get_submodule(name).weight).detach()
        codes = quantize(weight, site.scale, site.zero_point, site.grid)
        if weight.any() and torch.equal(dequantize(codes, site.scale, site.zero_point, site.grid), weight):
            on_grid.append(f"{name} ({site.source})")
    if on_grid:
        raise ModelError(
            message(
                f"pass {pass_name!r}: weights already lie on their grids in {len(on_grid)} layer(s): "
                + ", ".join([*on_grid[:4], *(["..."] if len(on_grid) > 4 else [])]),
                expected="weights that have not been rounded",
                fix="list one pass that chooses codes (gptq, adaround or erq)",
            )
        )


def _gram_bytes(model: nn.Module, group: Sequence[str]) -> int:
    return 8 * int(cast(Tensor, model.get_submodule(group[0]).weight).flatten(1).shape[1]) ** 2
