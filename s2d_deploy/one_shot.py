"""One-shot conditioning: change weights by calibration data alone, with no training step.

Two families. *Shrinking* is the paper's aim in closed form: the leading triplets of flagged layers are shrunk, and
the change in the layer's output is made as small as calibration data allow, in the same layer (a constrained least
squares) or in the Linears that follow (ridge regression). It is approximate: the float output moves, and is measured.

*Equalizing* follows from `attribution`: where single channels of a norm or of attention's context make a quantized
site's range, each channel gets a shift and a scale, and the Linear behind takes their inverse. Exact in real
arithmetic. Where the norm feeds nothing but Linears (pre-LN) and for attention's context, the weights alone hold it
("fold"); where a residual sum reads the norm as well (post-LN, BERT) or a GELU stands in front, an elementwise
multiply-add has to be put in front of the Linear ("insert"): then the model is no longer one that transformers can
load, and the runtime pays one elementwise pass. "neurons" instead scales neurons through the GELU, which is not
homogeneous: approximate, weights only, and its error is measured.

What is inserted may also copy channels (outlier channel splitting: Zhao et al., arXiv 1901.09504, section 3): a channel
that arrives twice at half its size needs half the range, and no weight grows, at the price of a wider K. "bypass"
may besides lead up to four channels of a site past the quantizer in float (as LLM.int8 does: Dettmers et al., arXiv
2208.07339, section 3.2): still exact in float, but those products, 4 of K, are no longer integers.

Scales are chosen by search: among SmoothQuant-like families (Xiao et al., arXiv 2211.10438, equation 4), clipping ones
(Wei et al., Outlier Suppression+, arXiv 2304.09145, section 4.2) and copies, the one whose Linear, quantized to W4A4
as it will be, errs least on calibration tokens.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, RecipeError, message
from s2d_deploy.evaluate import outputs, score, torch_run
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Grid, PerAxis
from s2d_deploy.observers import Histogram, Method, activation_parameters, weight_parameters
from s2d_deploy.pcdr import Batch, forward_batches
from s2d_deploy.plan import Op
from s2d_deploy.producers import Producer, trace_producers
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.session import Array, Progress
from s2d_deploy.simulation import simulate
from s2d_deploy.spectral import top_triplets, weight_matrix

log = logging.getLogger(__name__)

Variant = Literal["shrink", "shrink-next", "fold", "neurons", "insert", "bypass"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
Compensation = Literal["none", "layer"]
ROWS = 1024
# Channels that copying may add: multiples of 32, so that block sizes and vector widths still divide K.
EXTRA_CHANNELS = (32, 64)
# How many channels may be led past a quantizer in float, and the share of the error that each must earn.
DIRECT_CHANNELS = (1, 2, 4)
DIRECT_PRICE = 0.02
_SEED = 0
# Scales beyond this would move the problem from the activations into the weights.
MAX_SCALE = 64.0
# Ridge of the closed forms, as a share of the mean eigenvalue: calibration tokens are fewer than directions.
RIDGE = 1e-2
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3)
# A neuron whose scaled activation leaves more of its variance unexplained is left alone.
UNEXPLAINED = 0.01


class EqualizedLinear(nn.Module):
    """A Linear behind a shift, a scale and copies of its input channels, with a few channels led past it in float.

    Computes what the original Linear did; its quantized site is the tensor that the inner Linear reads. A channel
    with m copies arrives m times at 1/m of its size, and meets m copies of its weight column. A direct channel does
    not arrive: its column times its value is added elementwise to the output.

    Args:
        linear: the original; its weights are copied and take the inverse.
        shift: (K,).
        scale: (K,), positive.
        copies: int64 (K,), how often each channel arrives; 0 for the direct ones. None: 1 everywhere.
        direct: the direct channels.
    """

    shift: Tensor
    inverse: Tensor
    index: Tensor | None
    columns: Tensor

    def __init__(
        self,
        linear: nn.Linear,
        shift: Tensor,
        scale: Tensor,
        copies: Tensor | None = None,
        direct: Sequence[int] = (),
    ) -> None:
        super().__init__()
        weight = linear.weight.detach().clone()
        count = torch.ones(len(scale), dtype=torch.int64) if copies is None else copies
        index = torch.repeat_interleave(torch.arange(len(scale)), count)
        bias = weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach().clone()
        self.linear = nn.Linear(len(index), linear.out_features).to(weight)
        with torch.no_grad():
            self.linear.weight.copy_((weight * scale.to(weight))[:, index])
            self.linear.bias.copy_(bias + weight @ shift.to(weight))
        self.direct = tuple(direct)
        self.register_buffer("columns", weight[:, list(direct)].T.contiguous())
        self.register_buffer("shift", shift.to(weight))
        self.register_buffer("inverse", 1 / (scale.to(weight)[index] * count.to(weight)[index]))
        self.register_buffer("index", index if copies is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K) -> (..., N)``."""
        x = x - self.shift
        y: Tensor = self.linear((x if self.index is None else x.index_select(-1, self.index)) * self.inverse)
        for column, channel in zip(self.columns, self.direct, strict=True):
            y = y + x[..., channel : channel + 1] * column
        return y


@dataclass(frozen=True, slots=True)
class Change:
    """One place that was changed.

    Attributes:
        where: the layers.
        what: "shrunk", "refitted", "folded", "inserted", or "neurons".
        before: what the change acts on, before: the relative error of the quantized Linear for an
            equalization, s_max for a shrinking, the relative output error that a refit found.
        after: and after.
        detail: a sentence.
    """

    where: tuple[str, ...]
    what: str
    before: float
    after: float
    detail: str


@dataclass(slots=True)
class OneShotResult:
    """What a variant did, and what it bought.

    Attributes:
        variant: its name.
        exact: whether the float function is the same up to rounding.
        loadable: whether transformers loads the result (no module was inserted).
        changes: every place that was changed; empty is a finding.
        cosine: mean cosine of the float output to the original's on held-out samples; for classifiers the share of
            equal decisions. 1 where nothing moved.
        metric: name of the quantized metric.
        before: by ``"w4a4/mse"``: the quantized metric of the original, in points.
        after: of the changed model. The reference is the original float model in both.
        finding: one plain sentence.
    """

    variant: str
    exact: bool
    loadable: bool
    changes: list[Change]
    cosine: float
    metric: str
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    finding: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def one_shot(
    model: nn.Module,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    variants: Sequence[Variant],
    *,
    output: str,
    task: str = "embedding",
    flagged: Mapping[str, int] | None = None,
    factor: float = 0.5,
    precisions: Sequence[str] = ("w8a8", "w4a8", "w4a4"),
    methods: Sequence[Method] = ("mse",),
    before: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, OneShotResult]:
    """Apply `variants` in order to a copy of `model` and measure the copy.

    Args:
        model: the float model; left as it was.
        calibration: for every choice that is made.
        held_out: for the metric only.
        variants: of `VARIANTS`; "insert" after "fold" acts on what could not be folded.
        output: the model's output that is compared.
        task: as in `evaluate.score`.
        flagged: k_target by layer, for the shrinking variants.
        factor: what is left of a flagged singular value, 0 to 1.
        precisions: to simulate.
        methods: range methods, for weights and activations alike.
        before: the original's quantized metrics where they are known (as in `OneShotResult.before`).
        progress: called with one line of text now and then.

    Raises:
        RecipeError: an unknown variant, or shrinking without `flagged`.
    """
    unknown = [v for v in variants if v not in VARIANTS]
    if unknown or not variants:
        raise RecipeError(
            message(
                f"unknown one-shot variant {', '.join(map(repr, unknown)) or 'list: it is empty'}",
                expected=", ".join(VARIANTS),
            )
        )
    if flagged is None and any(v.startswith("shrink") for v in variants):
        raise RecipeError(
            message("shrinking needs the flagged layers", fix="pass {d.name: d.k_target} of diagnose.diagnose")
        )
    changed = copy.deepcopy(model).eval()
    changes: list[Change] = []
    for variant in variants:
        if progress is not None:
            progress(f"one-shot: {variant}")
        if variant in ("shrink", "shrink-next"):
            chosen = {name: k for name, k in (flagged or {}).items() if k}
            changes += shrink_triplets(changed, calibration, chosen, factor=factor)
            if variant == "shrink-next" and chosen:
                changes += refit(changed, model, calibration, after=list(chosen), output=output)
        elif variant == "neurons":
            changes += scale_neurons(changed, calibration, output=output)
        else:
            insert = variant in ("insert", "bypass")
            changes += equalize(changed, calibration, insert=insert, bypass=variant == "bypass", output=output)
    run = torch_run(model, output)
    reference = outputs(run, output, (dict(b) for b in held_out))
    masks = [b["attention_mask"].numpy() for b in held_out if "attention_mask" in b]
    mask = None if not masks or task != "embedding" else torch.cat([b["attention_mask"] for b in held_out]).numpy()

    def points(candidate: nn.Module) -> tuple[str, float]:
        found = outputs(torch_run(candidate, output), output, (dict(b) for b in held_out))
        result = score(task, found, reference, None, mask)
        return result.name, result.value

    name, value = points(changed)
    result = OneShotResult(
        "+".join(variants),
        exact=not any(c.what in ("shrunk", "refitted", "neurons") for c in changes),
        loadable=not any(c.what == "inserted" for c in changes),
        changes=changes,
        cosine=value / 100.0,
        metric=name,
        before=dict(before) if before is not None else {},
    )
    if before is None:
        for key, simulated in _simulated(model, calibration, precisions, methods, output):
            result.before[key] = points(simulated)[1]
    for key, simulated in _simulated(changed, calibration, precisions, methods, output):
        result.after[key] = points(simulated)[1]
        if progress is not None:
            progress(f"one-shot: {result.variant}: {key} {result.after[key]:.1f}")
    result.finding = _finding(result)
    return changed, result


def _simulated(
    model: nn.Module, calibration: Sequence[Batch], precisions: Sequence[str], methods: Sequence[Method], output: str
) -> Iterable[tuple[str, nn.Module]]:
    ops = _ops(model, calibration, output)
    statistics = calibrate(model, ops, calibration)
    for precision in precisions:
        for method in methods:
            plan = build_plan(model, ops, statistics, precision, QuantizeConfig(weights=method, activations=method))
            yield f"{precision}/{method}", simulate(model, plan).eval()


def _finding(result: OneShotResult) -> str:
    if not result.changes:
        return f"{result.variant}: nothing to change in this model."
    gains = {key: result.after[key] - result.before[key] for key in result.after if key in result.before}
    words = ", ".join(f"{key} {result.before[key]:.1f} -> {result.after[key]:.1f}" for key in gains)
    kind = "exact in float" if result.exact else f"float cosine {result.cosine:.4f}"
    enough = "" if not gains or max(gains.values()) >= 1.0 else " Not enough by itself: no precision gains a point."
    where = "" if result.loadable else " It adds elementwise layers, so transformers cannot load the result."
    return f"{result.variant}: {len(result.changes)} places, {kind}; {words}.{enough}{where}"


# ---- shrinking ---------------------------------------------------------------------------------------------------


def shrink_triplets(
    model: nn.Module,
    batches: Iterable[Batch],
    flagged: Mapping[str, int],
    *,
    factor: float = 0.5,
    compensate: Compensation = "layer",
) -> list[Change]:
    """Shrink the leading triplets of `flagged` Linears in place, with the least change in their outputs.

    For each triplet the new weight fulfils ``u^T W' v = factor * s``. With "none", ``W' = W - (1 - factor) s u v^T``.
    With "layer", of all W' that fulfil it, the one with the least ``E |(W' - W)(x - mean)|^2 + ridge |W' - W|^2``: with
    the inputs' covariance C, ``W' = W - (1 - factor) s u d^T``, ``d = (C + ridge)^-1 v / (v^T (C + ridge)^-1 v)``
    (Lagrange); the bias takes the mean. Each token weighs one over the power of its output: unweighted, a few outlier
    tokens rule, and their mean, put into the bias, drowns all others. Without a ridge, d grows along directions that
    the inputs hardly use, and s_max may grow with it; so the least ridge of a grid is taken with which no singular
    value exceeds the largest that plain shrinking leaves by more than 5 %.

    Args:
        model: changed in place.
        batches: calibration data.
        flagged: k_target by layer; layers with 0 and Convs are left alone.
        factor: what is left, 0 to 1.
        compensate: see above.

    Returns:
        For each layer s_max before and after.

    Raises:
        RecipeError: `factor` is out of range.
        ModelError: no such Linear.
    """
    if not 0 <= factor <= 1:
        raise RecipeError(message("factor is out of range", expected="0 to 1", found=str(factor)))
    modules = dict(model.named_modules())
    chosen = {name: k for name, k in flagged.items() if k > 0 and not isinstance(modules.get(name), nn.Conv2d)}
    wrong = [name for name in chosen if name not in modules]
    if wrong:
        raise ModelError(message(f"no layer called {', '.join(map(repr, wrong))}"))
    moments = _moments(model, batches, list(chosen)) if compensate == "layer" and chosen else {}
    changes = []
    for name, k in chosen.items():
        layer = _linear(model, name)
        matrix = weight_matrix(layer).double()
        triplets = top_triplets(matrix, k)
        u, s, v = triplets.U.double(), triplets.S.double(), triplets.V.double()
        plain = -(1 - factor) * (u * s) @ v.T
        delta, mean, words = plain, torch.zeros(matrix.shape[1], dtype=torch.float64), "no compensation"
        if name in moments:
            mean, covariance = moments[name]
            bound = 1.05 * float(torch.linalg.matrix_norm(matrix + plain, 2))
            size, identity = float(covariance.diagonal().mean()), torch.eye(len(mean), dtype=torch.float64)
            for ridge in RIDGES:
                solved = torch.linalg.solve(covariance + (ridge * size + 1e-30) * identity, v)  # (K, k)
                # d_r with v_q . d_r = 1 for q = r, else 0: every constraint holds at once.
                d = solved @ torch.linalg.inv(v.T @ solved)
                found = -(1 - factor) * (u * s) @ d.T
                if float(torch.linalg.matrix_norm(matrix + found, 2)) <= bound:
                    delta, words = found, f"compensated, ridge {ridge:g}"
                    break
        with torch.no_grad():
            layer.weight += delta.to(layer.weight)
            if layer.bias is not None:
                layer.bias.sub_((delta @ mean).to(layer.bias))
        after = float(torch.linalg.matrix_norm(weight_matrix(layer), 2))
        detail = f"{k} triplet(s) to {factor:g} of their size, {words}"
        changes.append(Change((name,), "shrunk", float(s[0]), after, detail))
    return changes


def refit(
    model: nn.Module, original: nn.Module, batches: Sequence[Batch], *, after: Sequence[str], output: str
) -> list[Change]:
    """Least-squares compensation behind changed layers: each later Linear gives the original's outputs again.

    In execution order, for every Linear behind the first of `after`: with its inputs X' in the changed model and the
    outputs Y that the original gave, ``W' = W + (Y - W X') X'^T (X' X'^T + ridge)^-1`` on centred values; the bias
    takes the means, and each token weighs one over the power of its output. Every Linear sees those before it
    refitted, so the data is read once for each.

    Returns:
        For each layer the relative error of its output before and after.
    """
    ops = _ops(model, batches, output)
    names = [name for name, op in ops.items() if op.kind == "linear"]
    first = min((names.index(n) for n in after if n in names), default=len(names))
    changes = []
    for name in names[first + 1 :]:
        if name in after:
            continue
        changes.append(_refit_layer(model, original, batches, name))
    return changes


def _refit_layer(model: nn.Module, original: nn.Module, batches: Sequence[Batch], name: str) -> Change:
    layer, old = model.get_submodule(name), original.get_submodule(name)
    if not isinstance(layer, nn.Linear) or not isinstance(old, nn.Linear):
        raise ModelError(message(f"layer {name!r} cannot be refitted", expected="a Linear in both models"))
    k, n = layer.in_features, layer.out_features
    sums = {
        key: torch.zeros(shape, dtype=torch.float64)
        for key, shape in {"x": (k,), "e": (n,), "xx": (k, k), "ex": (n, k), "ee": (n,), "y": (n,), "yy": (n,)}.items()
    }
    count, tokens = 0.0, 0
    for batch in batches:
        seen: dict[str, Tensor] = {}
        for which, root, module in (("new", model, layer), ("old", original, old)):
            handle = module.register_forward_hook(_keep(seen, which))
            try:
                forward_batches(root, [batch])
            finally:
                handle.remove()
        keep = _real(batch, seen["new x"])
        x, y = seen["new x"][keep].double(), seen["old y"][keep].double()
        e = y - seen["new y"][keep].double()
        w = _token_weights(y if old.bias is None else y - old.bias.detach().double()).unsqueeze(1)
        count, tokens = count + float(w.sum()), tokens + x.shape[0]
        for key, value in {
            "x": (w * x).sum(0),
            "e": (w * e).sum(0),
            "xx": x.T @ (w * x),
            "ex": e.T @ (w * x),
            "ee": (w * e.square()).sum(0),
            "y": (w * y).sum(0),
            "yy": (w * y.square()).sum(0),
        }.items():
            sums[key] += value
    mx, me, my = sums["x"] / count, sums["e"] / count, sums["y"] / count
    covariance = sums["xx"] / count - torch.outer(mx, mx)
    cross = sums["ex"] / count - torch.outer(me, mx)
    ridge = RIDGE * float(covariance.diagonal().mean())
    delta = torch.linalg.solve(covariance + ridge * torch.eye(k, dtype=torch.float64), cross.T).T
    with torch.no_grad():
        layer.weight += delta.to(layer.weight)
        if layer.bias is not None:
            layer.bias.add_((me - delta @ mx).to(layer.bias))
    power = float((sums["yy"] / count - my.square()).sum())
    error = float((sums["ee"] / count).sum())
    # E|e - delta (x - mean)|^2 with the mean taken by the bias.
    left = float(
        (sums["ee"] / count - me.square()).sum() - 2 * (delta * cross).sum() + ((delta @ covariance) * delta).sum()
    )
    return Change((name,), "refitted", error / power, max(left, 0.0) / power, f"ridge {RIDGE:g}, {tokens} tokens")


# ---- equalizing --------------------------------------------------------------------------------------------------


def equalize(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    insert: bool = False,
    bypass: bool = False,
    output: str | None = None,
    rows: int = ROWS,
) -> list[Change]:
    """Shift and scale the channels of quantized Linear inputs, exactly, in place.

    Args:
        model: changed in place.
        batches: calibration data.
        insert: also put an elementwise layer in front of Linears whose channels cannot be folded into weights.
        bypass: such a layer may lead up to four channels past the quantizer, in float.
        output: as in `discovery.discover`.
        rows: calibration tokens that each choice is made on.

    Returns:
        The changed groups (Linears that read one tensor share one choice), with the relative error at W4A4.
    """
    ops = _ops(model, batches, output)
    producers = trace_producers(model, ops, {n: t[:1] for n, t in batches[0].items()})
    modules = dict(model.named_modules())
    groups = _groups(ops, producers, modules, insert)
    tokens = _tokens(model, batches, [g[0] for g in groups.values()], rows)
    changes = []
    # What folds comes first: a value's Linear can take a scale only as long as it is a plain one.
    for (kind, source), names in sorted(groups.items(), key=lambda group: group[0][0].startswith("insert")):
        linears = [_linear(model, name) for name in names]
        fold = not kind.startswith("insert")
        weight = torch.cat([layer.weight.detach().float() for layer in linears])
        can_shift = not fold or all(layer.bias is not None for layer in linears)
        if fold:
            maker = _linear(model, source) if kind == "attention" else model.get_submodule(source)
            can_shift = can_shift and getattr(maker, "bias", None) is not None
        choice = _choose(
            tokens[names[0]], weight, can_shift=can_shift, can_copy=not fold, can_bypass=bypass and not fold
        )
        if choice.after >= choice.before:
            continue
        if fold:
            for layer in linears:
                _absorb(layer, choice.shift, choice.scale)
            _divide(maker, choice.shift, choice.scale)
        else:
            for name, layer in zip(names, linears, strict=True):
                _replace(model, name, EqualizedLinear(layer, choice.shift, choice.scale, choice.copies, choice.direct))
        what = "folded" if fold else "inserted"
        changes.append(Change(tuple(names), what, choice.before, choice.after, choice.words))
    return changes


def scale_neurons(
    model: nn.Module, batches: Sequence[Batch], *, output: str | None = None, limit: float = 4.0, rows: int = 4096
) -> list[Change]:
    """Scale extreme neurons down through their activation, in place: ``f(z) ~ a * f(z / s) + b`` by least squares.

    A neuron whose peak exceeds `limit` times the median peak gets ``s = peak / (limit * median)`` in its row of the
    Linear before; the Linear behind takes `a` into its column and `b` into its bias. Not exact, because a GELU is
    not homogeneous; a neuron whose fit leaves more
    than `UNEXPLAINED` of its variance is left alone.

    Returns:
        For each pair of Linears the largest peak before and after; the detail names the mean unexplained share.
    """
    ops = _ops(model, batches, output)
    producers = trace_producers(model, ops, {n: t[:1] for n, t in batches[0].items()})
    pairs = [
        (name, producers[f"{name}.input"])
        for name, op in ops.items()
        if op.kind == "linear" and producers[f"{name}.input"].kind == "activation"
    ]
    pairs = [(name, p) for name, p in pairs if len(p.linears) == 1]
    tokens = _tokens(model, batches, [p.linears[0] for _, p in pairs], rows)
    changes = []
    for name, producer in pairs:
        first, second = _linear(model, producer.linears[0]), _linear(model, name)
        function = model.get_submodule(producer.module)
        if second.bias is None:
            continue
        with torch.no_grad():
            x = tokens[producer.linears[0]].to(first.weight)
            z = first(x)
            y = function(z)
            peak = y.abs().amax(0)
            ceiling = limit * float(peak.median())
            lost = []
            for j in (peak > ceiling).nonzero().flatten().tolist() if ceiling > 0 else []:
                s = float(peak[j]) / ceiling
                a, b, unexplained = _line(function(z[:, j] / s), y[:, j])
                if unexplained > UNEXPLAINED:
                    continue
                lost.append(unexplained)
                first.weight[j] /= s
                if first.bias is not None:
                    first.bias[j] /= s
                second.bias.add_(b * second.weight[:, j])
                second.weight[:, j] *= a
            if lost:
                after = float(function(first(x)).abs().max())
                detail = f"{len(lost)} neuron(s), unexplained {sum(lost) / len(lost):.2%} of their variance"
                changes.append(Change((producer.linears[0], name), "neurons", float(peak.max()), after, detail))
    return changes


def _groups(
    ops: Mapping[str, Op], producers: Mapping[str, Producer], modules: Mapping[str, nn.Module], insert: bool
) -> dict[tuple[str, str], list[str]]:
    """Linears by the tensor that they read: (how, source) -> names. Shared weights are left alone."""
    owners: dict[int, int] = {}
    for module in modules.values():
        if isinstance(module, nn.Linear | nn.Embedding):
            owners[id(module.weight)] = owners.get(id(module.weight), 0) + 1
    groups: dict[tuple[str, str], list[str]] = {}
    broken: set[tuple[str, str]] = set()
    for name, op in ops.items():
        if op.kind != "linear" or f"{name}.input" not in producers:
            continue
        p, layer = producers[f"{name}.input"], modules[name]
        if name.endswith(".linear") and isinstance(modules.get(name.removesuffix(".linear")), EqualizedLinear):
            continue
        if p.kind == "norm" and not p.shared:
            key = ("norm", p.module)
        elif p.kind == "attention" and len(p.linears) == 1:
            key = ("attention", p.linears[0])
        elif insert and p.kind in ("norm", "activation"):
            key = (f"insert {p.kind}", p.module)
        else:
            continue
        tied = not isinstance(layer, nn.Linear) or owners[id(layer.weight)] > 1
        if tied or (key[0] == "attention" and owners.get(id(getattr(modules[key[1]], "weight", None)), 2) > 1):
            broken.add(key)
        groups.setdefault(key, []).append(name)
    return {key: names for key, names in groups.items() if key not in broken}


@dataclass(frozen=True, slots=True)
class _Choice:
    """A shift (K,), a scale (K,), copies (K,) and direct channels for one input tensor; errors without and with."""

    shift: Tensor
    scale: Tensor
    copies: Tensor | None
    words: str
    direct: tuple[int, ...] = ()
    before: float = 0.0
    after: float = 0.0


def _choose(x: Tensor, weight: Tensor, *, can_shift: bool, can_copy: bool, can_bypass: bool) -> _Choice:
    """The candidate with the least error of the quantized Linear (see `_quantized_error`).

    Args:
        x: float32 (rows, K).
        weight: float32 (N, K).
        can_shift: whether channels may be shifted.
        can_copy: whether channels may be copied.
        can_bypass: whether channels may be led past the quantizer; each must earn `DIRECT_PRICE`.
    """
    neutral = _Choice(torch.zeros(x.shape[1]), torch.ones(x.shape[1]), None, "as it was")
    before = _quantized_error(x, weight, neutral)
    best, least, after = neutral, before, before
    for candidate in _candidates(x, weight, can_shift, can_copy, can_bypass):
        error = _quantized_error(x, weight, candidate)
        priced = error * (1 + DIRECT_PRICE * len(candidate.direct))
        if priced < least:
            best, least, after = candidate, priced, error
    return replace(best, before=before, after=after)


def _candidates(x: Tensor, weight: Tensor, can_shift: bool, can_copy: bool, can_bypass: bool) -> Iterable[_Choice]:
    column = weight.square().mean(0).sqrt().clamp_min(1e-12)
    zero, one = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    for title, shift in [("no shift", zero), ("shifted by the mean", x.mean(0))][: 2 if can_shift else 1]:
        moved = x - shift
        least = 1e-6 * float(moved.abs().max()) + 1e-30
        peak = moved.abs().amax(0).clamp_min(least)
        spread = moved.square().mean(0).sqrt().clamp_min(least)
        scales = {"no scale": one}
        for p in (0.5, 0.65, 0.8, 1.0):
            scales[f"peak^{p:g}"] = peak**p / column ** (1 - p)
        for p in (0.5, 0.8, 1.0):
            scales[f"rms^{p:g}"] = spread**p / column ** (1 - p)
        for times in (1.0, 2.0, 4.0):
            scales[f"peaks above {times:g} medians"] = (peak / (times * peak.median())).clamp_min(1)
        for name, raw in scales.items():
            yield _Choice(shift, _centred(raw, one > 0), None, f"{title}, {name}")
        for extra in EXTRA_CHANNELS if can_copy else ():
            yield _Choice(shift, one, _copies(peak, one > 0, extra), f"{title}, {extra} copied channels")
        for count in DIRECT_CHANNELS if can_bypass else ():
            direct = peak.topk(min(count, len(peak))).indices
            kept = one > 0
            kept[direct] = False
            # The places of the direct channels go to copies of others, so that K stays what it was.
            copies, chosen = _copies(peak, kept, count), tuple(sorted(direct.tolist()))
            for name in ("no scale", "peak^0.5", "peak^0.8", "rms^1"):
                scale = _centred(scales[name], kept)
                reduced = _copies(peak / scale, kept, count) if name != "no scale" else copies
                yield _Choice(shift, scale, reduced, f"{title}, {name}, {count} direct", chosen)


def _centred(raw: Tensor, kept: Tensor) -> Tensor:
    """Scales with geometric mean 1 over the kept channels, limited, and 1 at the others."""
    scale = (raw / raw[kept].log().mean().exp()).clamp(1 / MAX_SCALE, MAX_SCALE)
    return torch.where(kept, scale, torch.ones_like(scale))


def _copies(peak: Tensor, kept: Tensor, extra: int) -> Tensor:
    """How often each kept channel is there, so that with `extra` more channels the largest peak is least."""
    copies = kept.long()
    for _ in range(extra):
        copies[torch.where(kept, peak / copies.clamp_min(1), -torch.ones_like(peak)).argmax()] += 1
    return copies


def _quantized_error(x: Tensor, weight: Tensor, choice: _Choice) -> float:
    """Error of the Linear with both operands at 4 bits and MSE ranges: relative to each token, plus to all.

    A mean over tokens of each token's relative error forgets the few tokens whose outputs are a hundred times
    larger; the total error over the total power sees nothing else. A model needs both kinds of tokens.
    """
    copies = torch.ones(x.shape[1], dtype=torch.int64) if choice.copies is None else choice.copies
    index = torch.repeat_interleave(torch.arange(x.shape[1]), copies)
    centred = x - choice.shift
    moved = (centred / (choice.scale * copies.clamp_min(1)))[:, index]
    scaled = (weight * choice.scale)[:, index]
    histogram, grid, rows = Histogram(), Grid(4), Grid(4, granularity=PerAxis(0))
    histogram.update(moved)
    a = activation_parameters(histogram, grid, "mse")
    w = weight_parameters(scaled, rows, "mse")
    left = dequantize(quantize(moved, *a, grid), *a, grid)
    right = dequantize(quantize(scaled, *w, rows), *w, rows)
    y = x @ weight.T
    direct = list(choice.direct)
    found = left @ right.T + weight @ choice.shift + centred[:, direct] @ weight[:, direct].T
    error = (found - y).square().sum(1)
    power = (y - y.mean(0)).square().sum(1)
    each = power.clamp_min(0.1 * float(power.median()) + 1e-30)
    return float((error / each).mean() + error.sum() / (power.sum() + 1e-30))


def _linear(model: nn.Module, name: str) -> nn.Linear:
    """The Linear at `name`, which may lie inside an `EqualizedLinear` by now."""
    module = model.get_submodule(name)
    if isinstance(module, EqualizedLinear):
        module = module.linear
    if not isinstance(module, nn.Linear):
        raise ModelError(message(f"layer {name!r} cannot be changed", expected="a Linear", found=type(module).__name__))
    return module


def _absorb(layer: nn.Linear, shift: Tensor, scale: Tensor) -> None:
    """Make `layer` take ``(x - shift) / scale`` instead of x."""
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.add_(layer.weight @ shift.to(layer.weight))
        layer.weight *= scale.to(layer.weight)


def _divide(maker: nn.Module, shift: Tensor, scale: Tensor) -> None:
    """Make a norm, or the Linear of attention's value, give ``(y - shift) / scale`` instead of y.

    Attention's context is a mean of values with weights that sum to 1, so what holds for a value holds for it.
    """
    if not isinstance(maker, nn.LayerNorm | nn.Linear):
        raise ModelError(message("not a LayerNorm or Linear", found=type(maker).__name__))
    with torch.no_grad():
        s = scale.to(maker.weight)
        maker.weight /= s.unsqueeze(1) if maker.weight.dim() == 2 else s
        if maker.bias is not None:
            maker.bias.sub_(shift.to(maker.bias)).div_(s)


def _line(x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Least-squares ``y ~ a x + b`` and the share of the variance of y that it does not explain."""
    x, y = x.double(), y.double()
    dx, dy = x - x.mean(), y - y.mean()
    if float(dx.square().sum()) == 0 or float(dy.square().sum()) == 0:
        return 1.0, 0.0, 1.0
    a = float((dx * dy).sum() / dx.square().sum())
    return a, float(y.mean() - a * x.mean()), float((dy - a * dx).square().sum() / dy.square().sum())


# ---- what is read from calibration data --------------------------------------------------------------------------


def _ops(model: nn.Module, batches: Sequence[Batch], output: str | None) -> dict[str, Op]:
    if not batches:
        raise RecipeError(message("one-shot conditioning needs calibration data", expected="at least one batch"))
    return discover(model, {name: tensor[:1] for name, tensor in batches[0].items()}, output)


def _tokens(model: nn.Module, batches: Iterable[Batch], names: Sequence[str], rows: int) -> dict[str, Tensor]:
    """At most `rows` input tokens of each Linear, float32 (rows, K): a uniform sample, padding left out."""
    generator = torch.Generator().manual_seed(_SEED)
    kept: dict[str, tuple[Tensor, Tensor]] = {}
    current: list[Batch] = []

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            x = x[_real(current[-1], x)].float()
            keys = torch.rand(x.shape[0], generator=generator)
            if name in kept:
                keys, x = torch.cat([kept[name][0], keys]), torch.cat([kept[name][1], x])
            chosen = keys.topk(min(rows, keys.numel())).indices.sort().values
            kept[name] = keys[chosen], x[chosen]

        return hook

    def remember() -> Iterable[Batch]:
        for batch in batches:
            current[:] = [batch]
            yield batch

    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in dict.fromkeys(names)]
    try:
        forward_batches(model, remember())
    finally:
        for handle in handles:
            handle.remove()
    return {name: x for name, (_, x) in kept.items()}


def _real(batch: Batch, x: Tensor) -> Tensor:
    """Which rows of `x` are real tokens: a boolean mask over all axes but the last."""
    mask = batch.get("attention_mask")
    if mask is not None and x.dim() == 3 and mask.shape == x.shape[:2]:
        return mask.bool()
    return torch.ones(x.shape[:-1], dtype=torch.bool)


def _moments(model: nn.Module, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean (K,) and covariance (K, K) of each Linear's inputs, float64, tokens weighted as in `_token_weights`."""
    sums: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(layer: nn.Linear, args: tuple[Tensor, ...], result: Tensor) -> None:
            x = args[0].detach().reshape(-1, args[0].shape[-1]).double()
            y = result.detach().reshape(-1, result.shape[-1]).double()
            weights = _token_weights(y if layer.bias is None else y - layer.bias.detach().double())
            zero = torch.zeros((), dtype=torch.float64)
            count, total, square = sums.get(name, (zero, zero, zero))
            weighted = x * weights.unsqueeze(1)
            sums[name] = count + weights.sum(), total + weighted.sum(0), square + x.T @ weighted

        return hook

    handles = [model.get_submodule(name).register_forward_hook(watch(name)) for name in names]
    try:
        forward_batches(model, batches)
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, (count, total, square) in sums.items():
        mean = total / count
        result[name] = mean, square / count - torch.outer(mean, mean)
    return result


def _token_weights(y: Tensor) -> Tensor:
    """One over each row's power: a relative error, because a norm follows. Rows of zeros weigh nothing."""
    power = y.square().sum(1)
    return torch.where(power > 0, 1 / power.clamp_min(1e-30), torch.zeros_like(power))


def _keep(seen: dict[str, Tensor], which: str) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        seen[f"{which} x"], seen[f"{which} y"] = args[0].detach(), result.detach()

    return hook


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


__all__ = [
    "VARIANTS",
    "Array",
    "Change",
    "EqualizedLinear",
    "OneShotResult",
    "Variant",
    "equalize",
    "one_shot",
    "refit",
    "scale_neurons",
    "shrink_triplets",
]
