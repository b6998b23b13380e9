"""Where a plan's error comes from: SNR and cosine of every layer, and what each layer adds to the final output.

Three views of one op, on the same samples:

- **isolated**: the op alone, quantized, on the float model's own operands: what its grid costs it;
- **accumulated**: the op's output inside the whole simulation, against the float model: what has gathered by then;
- **explained**: the final output's error when this op alone is quantized, as a share of the sum over all ops.

The shares are first-order: errors of several layers may cancel or feed each other. `ErrorAnalysis.additivity` (sum of
the single errors over the error of the whole simulation) says how far they can be trusted: near 1, the layers act on
their own. One forward pass of the data for each op, so give few samples; memory holds one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from s2d_deploy.attention import quantizer_name, watching
from s2d_deploy.errors import DataError, message
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.models import forward
from s2d_deploy.plan import Op, Plan
from s2d_deploy.ptq.activations import real_tokens
from s2d_deploy.session import Progress
from s2d_deploy.simulation import simulate

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class LayerError:
    """One quantized op.

    Attributes:
        op: its name.
        declared: e.g. ``"W4A4"``.
        macs: for one sample.
        isolated_snr_db, isolated_cosine: of its output on float operands; SNR is infinite where nothing differs.
        accumulated_snr_db, accumulated_cosine: of its output inside the simulation.
        output_error: relative error power of the final output when only this op is quantized.
        share: `output_error` over the sum of all ops', 0 to 1.
    """

    op: str
    declared: str
    macs: int
    isolated_snr_db: float
    isolated_cosine: float
    accumulated_snr_db: float
    accumulated_cosine: float
    output_error: float
    share: float


@dataclass(frozen=True, slots=True)
class ErrorAnalysis:
    """All layers, worst first (by `share`).

    Attributes:
        layers: the quantized ops.
        output_error: relative error power of the final output of the whole simulation.
        additivity: sum of the ops' own errors over `output_error`.
        samples: how many were run.
    """

    layers: list[LayerError]
    output_error: float
    additivity: float
    samples: int

    @property
    def output_snr_db(self) -> float:
        """SNR of the final output."""
        return decibel(self.output_error)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an infinite SNR is null, as nothing differs."""
        document = asdict(self) | {"output_snr_db": self.output_snr_db}
        for row in (document, *document["layers"]):
            row |= {k: None for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)}
        return document


@dataclass(slots=True)
class _Sums:
    """Running sums of a reference and of a candidate."""

    signal: float = 0.0
    other: float = 0.0
    product: float = 0.0
    noise: float = 0.0

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        a, b = reference.double().flatten(), candidate.double().flatten()
        self.signal += float(a @ a)
        self.other += float(b @ b)
        self.product += float(a @ b)
        self.noise += float((a - b).square().sum())

    @property
    def relative(self) -> float:
        return self.noise / self.signal if self.signal else (0.0 if not self.noise else math.inf)

    @property
    def cosine(self) -> float:
        scale = math.sqrt(self.signal * self.other)
        return self.product / scale if scale else 1.0


@dataclass(slots=True)
class _Found:
    isolated: _Sums = field(default_factory=_Sums)
    accumulated: _Sums = field(default_factory=_Sums)


def decibel(relative_error: float) -> float:
    """SNR in dB of a relative error power; infinite for none."""
    return math.inf if relative_error == 0.0 else -10.0 * math.log10(relative_error)


def analyse_errors(
    model: nn.Module,
    plan: Plan,
    batches: Callable[[], Iterable[Batch]],
    output: str,
    *,
    explain: bool = True,
    progress: Progress | None = None,
) -> ErrorAnalysis:
    """Compare the simulation of `plan` with `model`, layer by layer.

    Args:
        model: the float model behind the plan (after its passes).
        plan: its quantization.
        batches: gives the same samples at every call; padding of an attention mask is left out everywhere.
        output: of the model.
        explain: also quantize each op alone; without it `output_error` and `share` of the layers are 0.
        progress: called with a sentence now and then.

    Raises:
        DataError: no samples.
    """
    ops = {name: op for name, op in plan.ops.items() if any(site in plan.sites for site, _ in op.sites)}
    simulated = simulate(model, plan).eval()
    found = {name: _Found() for name in ops}
    final, samples = _Sums(), 0
    quantizers = _Quantizers(model, plan)
    for batch in batches():
        with torch.no_grad():
            float_ops, reference = _run(model, ops, batch, output, quantizers.isolated(found, batch))
            other_ops, candidate = _run(simulated, ops, batch, output, None)
        for name in ops:
            real = _real(batch, float_ops[name], ops[name].kind)
            found[name].accumulated.add(float_ops[name][real], other_ops[name][real])
        real = _real(batch, reference)
        final.add(reference[real], candidate[real])
        samples += next(iter(batch.values())).shape[0]
    if not samples:
        raise DataError(message("error analysis has no samples", expected="at least one"))
    single = dict.fromkeys(ops, 0.0)
    if explain:
        wanted = float_outputs(model, batches(), output)
        for done, name in enumerate(ops):
            if progress is not None:
                progress(f"error of each layer {done + 1}/{len(ops)}")
            single[name] = output_error(model, subset(plan, [name]), batches, output, wanted)
    total = sum(single.values())
    layers = [
        LayerError(
            name,
            plan.declared(name),
            op.macs,
            decibel(found[name].isolated.relative),
            found[name].isolated.cosine,
            decibel(found[name].accumulated.relative),
            found[name].accumulated.cosine,
            single[name],
            single[name] / total if total else 0.0,
        )
        for name, op in ops.items()
    ]
    layers.sort(key=lambda entry: (-entry.share, entry.accumulated_snr_db, entry.op))
    return ErrorAnalysis(layers, final.relative, total / final.relative if final.relative else math.nan, samples)


def float_outputs(model: nn.Module, batches: Iterable[Batch], output: str) -> list[Tensor]:
    """The float model's output for each batch: held, so that `output_error` need not compute it again and again."""
    with torch.no_grad():
        return [forward(model, batch, output) for batch in batches]


def output_error(
    model: nn.Module,
    plan: Plan,
    batches: Callable[[], Iterable[Batch]],
    output: str,
    reference: Sequence[Tensor] | None = None,
) -> float:
    """Relative error power of `output` under the simulation of `plan`: ``sum |y - y'|^2 / sum |y|^2``.

    Args:
        model: the float model.
        plan: its quantization.
        batches: gives the same samples at every call.
        output: of the model.
        reference: `float_outputs` of the same batches, where they are at hand.
    """
    if reference is None:
        reference = float_outputs(model, batches(), output)
    return simulated_error(simulate(model, plan).eval(), batches(), output, reference)


def simulated_error(simulated: nn.Module, batches: Iterable[Batch], output: str, reference: Sequence[Tensor]) -> float:
    """As `output_error`, of a simulation that is there already (in eval mode).

    Raises:
        ValueError: another number of batches than of references.
    """
    sums = _Sums()
    with torch.no_grad():
        for batch, wanted in zip(batches, reference, strict=True):
            real = _real(batch, wanted)
            sums.add(wanted[real], forward(simulated, batch, output)[real])
    return sums.relative


def subset(plan: Plan, ops: Iterable[str], roles: Iterable[str] | None = None) -> Plan:
    """`plan` with the sites of `ops` only (and, where given, of these roles)."""
    wanted, kinds = set(ops), None if roles is None else set(roles)
    sites = {n: s for n, s in plan.sites.items() if s.op in wanted and (kinds is None or s.role in kinds)}
    return Plan(plan.precision, dict(plan.ops), sites, dict(plan.info))


class _Quantizers:
    """One op on float operands, through the plan's grids."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.made = {n: FakeQuantizer.of(s) for n, s in plan.sites.items()}
        self.weights: dict[str, Tensor] = {}

    def through(self, site: str, x: Tensor) -> Tensor:
        return self.made[site](x) if site in self.made else x

    def isolated(self, found: Mapping[str, _Found], batch: Batch) -> Callable[[Op, Tensor, Tensor, Tensor], None]:
        """Called with an op, its left and right float operands and its output."""

        def compare(op: Op, left: Tensor, right: Tensor, result: Tensor) -> None:
            (left_site, _), (right_site, _) = op.sites
            x = self.through(left_site, left)
            if op.kind in ("scores", "context"):
                other = torch.matmul(x, self.through(right_site, right))
            else:
                layer = self.model.get_submodule(op.name)
                if right_site not in self.weights:
                    self.weights[right_site] = self.through(right_site, right)
                other = product(layer, x, self.weights[right_site])
            real = _real(batch, result, op.kind)
            found[op.name].isolated.add(result[real], other[real])

        return compare


def product(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What a Linear or Conv2d makes of `x` with another weight."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.linear(x, weight, layer.bias)  # type: ignore[arg-type]


def _real(batch: Batch, x: Tensor, kind: str = "linear") -> Tensor:
    """Real tokens of an op's output; attention's are ``(B, heads, T, T)`` scores and ``(B, heads, T, D)`` context."""
    mask = batch.get("attention_mask")
    if mask is None or kind not in ("scores", "context") or mask.shape != (x.shape[0], x.shape[2]):
        return real_tokens(batch, x)
    seen = mask.bool()[:, None, :]
    if kind == "scores" and x.shape[3] == x.shape[2]:
        return (seen.unsqueeze(3) & seen.unsqueeze(2)).expand(x.shape)
    return seen.expand(x.shape[:3])


def _run(
    model: nn.Module,
    ops: Mapping[str, Op],
    batch: Batch,
    output: str,
    compare: Callable[[Op, Tensor, Tensor, Tensor], None] | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Outputs of all ops and of the model for one batch."""
    outputs: dict[str, Tensor] = {}
    names = {module: name for name, module in model.named_modules()}
    left: dict[str, Tensor] = {}

    def on_layer(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        name = names[module]
        outputs[name] = result
        if compare is not None:
            compare(ops[name], args[0], module.weight, result)  # type: ignore[arg-type]

    def on_operand(module: nn.Module, operand: str, x: Tensor) -> None:
        owner = names[module]
        quantizer = getattr(module, quantizer_name(operand), None)  # there in the simulation
        x = x if quantizer is None else quantizer(x)
        if operand in ("query", "probs"):
            left[owner] = x
            return
        name = f"{owner}.{'scores' if operand == 'key' else 'context'}"
        if name in ops:
            outputs[name] = torch.matmul(left[owner], x)
            if compare is not None:
                compare(ops[name], left[owner], x, outputs[name])

    handles = [
        model.get_submodule(name).register_forward_hook(on_layer)
        for name, op in ops.items()
        if op.kind in ("linear", "conv")
    ]
    try:
        with watching(on_operand):
            final = forward(model, batch, output)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, final
