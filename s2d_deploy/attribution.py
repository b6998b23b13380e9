"""Attribution: what makes the range of each quantized site, and which share of it S2D can reach.

A layer's dominant triplets matter to quantization only where their outliers arrive at a quantized site. Two passes
over the data measure that. The first sees every activation site as it is. The second computes, from the same
inputs, what the site would be without one cause at a time:

- *triplets*: the leading triplets of the layers that make the site are taken out of their outputs, and the norm,
  the activation or the attention product between is computed again. Direct effect: a layer's input stays as it was.
- *gain*: the norm without its gain and bias (the noise is weighted with the gains, which the next Linear would hold).
- *channels*: the site without its few most extreme channels (of an activation: single neurons of the Linear before).

What a cause costs is measured in the quantizer's own currency: the error at 4 bits with the best clipping range, over
the variance of the bulk (within channels, because what is constant in a channel carries no information; without the
largest 5 %, because outliers would count as the signal that they drown). The maximum alone would overstate outliers
that a clipping range simply cuts. What is lost: second-order effects of one layer on the next,
and the correlation of the error between channels. Memory is bounded by the number of sites, not by the data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d_deploy.attention import watching
from s2d_deploy.errors import DataError, message
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Grid
from s2d_deploy.observers import Histogram, activation_parameters
from s2d_deploy.pcdr import Batch, forward_batches, require_finite_activation
from s2d_deploy.plan import Op
from s2d_deploy.producers import Producer, trace_producers
from s2d_deploy.session import Progress
from s2d_deploy.spectral import Triplets, top_triplets, weight_matrix

log = logging.getLogger(__name__)

Verdict = Literal["triplet", "gain", "neuron", "none", "unknown"]
# Error of a normal distribution on a symmetric 4-bit grid with the best clipping range, over its variance.
NORMAL_ERROR = 0.0115
# Up to this error a site has no outlier worth a cause: about 15 dB.
HARMLESS = 0.03
# A cause is named when taking it out removes at least this share of the excess error.
NAMED_SHARE = 0.25
# The largest deviations that are no part of the signal's bulk, and the variance of a normal without them.
TRIMMED = 0.05
NORMAL_BULK = 0.7588
# The share of channels that counts as "single".
EXTREME_CHANNELS = 0.01


@dataclass(frozen=True, slots=True)
class Channel:
    """An extreme channel of a site.

    Attributes:
        index: along the last axis of the producing layer's output.
        max_abs: its largest magnitude.
        mean: its mean.
        gain: of the norm in front; None elsewhere.
        bias: of the norm or the producing Linear; None where there is none.
        row_norm: of the producing Linear's weight row over the median row's; None without one single Linear.
    """

    index: int
    max_abs: float
    mean: float
    gain: float | None = None
    bias: float | None = None
    row_norm: float | None = None


@dataclass(frozen=True, slots=True)
class Without:
    """A site without one cause.

    Attributes:
        range: share of the largest magnitude that remains, e.g. 0.4; above 1 where a cancellation is lost.
        error: as `SiteAttribution.error`.
        share: share of the site's excess error that the cause makes, 0 to 1.
    """

    range: float
    error: float
    share: float


@dataclass(frozen=True, slots=True)
class SiteAttribution:
    """One activation site.

    Attributes:
        site: its name.
        kind: of its producer (see `producers.Producer`).
        module: the producing module.
        linears: layers whose triplets reach the site.
        max_abs: largest magnitude.
        error: error at 4 bits with the best clipping range, over the variance of the bulk.
        channels: the most extreme channels, at most three, most extreme first.
        flagged: without the k_target triplets of the producing layers that S2D flags; None where there are none.
        triplets: without the top k_max triplets of all producing layers: the most that S2D could reach.
        gain: without the norm's gain and bias; None where there is no norm.
        single: without the most extreme channels.
        verdict: the cause: "triplet", "gain", "neuron" (single channels), "none" (no outlier to repair, or no
            single cause), or "unknown" (the producer was not recognized; `note` says why).
        note: a sentence for "unknown" and for sites that no weight makes.
    """

    site: str
    kind: str
    module: str
    linears: tuple[str, ...]
    max_abs: float
    error: float
    channels: tuple[Channel, ...] = ()
    flagged: Without | None = None
    triplets: Without | None = None
    gain: Without | None = None
    single: Without | None = None
    verdict: Verdict = "none"
    note: str = ""

    @property
    def excess(self) -> float:
        """Error above that of a normal distribution; 0 for a harmless site."""
        return self.error - NORMAL_ERROR if self.error > HARMLESS else 0.0

    @property
    def reach(self) -> float:
        """Share of the excess error that S2D, as it flags now, can take away."""
        return 0.0 if self.flagged is None else self.flagged.share

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"reach": self.reach}


@dataclass(frozen=True, slots=True)
class Forecast:
    """Whether S2D will help at 4-bit activations.

    Attributes:
        helps: the answer; None where nothing can be said.
        reach: share of all sites' excess error that the flagged layers reach.
        shares: by verdict, the share of the excess error at sites with that verdict.
        sentence: the answer with its reason.
    """

    helps: bool | None
    reach: float
    shares: dict[str, float]
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(slots=True)
class _Stream:
    """One tensor over all batches: channel means in the first pass, histograms in the second."""

    name: str
    count: int = 0
    total: Tensor | None = None
    peak: Tensor | None = None
    histogram: Histogram = field(default_factory=Histogram)
    centred: Histogram = field(default_factory=Histogram)

    def look(self, x: Tensor) -> None:
        """First pass over `x`, channels last."""
        rows = x.detach().reshape(-1, x.shape[-1])
        total, peak = rows.double().sum(0), rows.abs().amax(0).double()
        self.total = total if self.total is None else self.total + total
        self.peak = peak if self.peak is None else torch.maximum(self.peak, peak)
        self.count += rows.shape[0]

    def add(self, x: Tensor) -> None:
        """Second pass."""
        self.histogram.update(x, self.name)
        self.centred.update(x - self.mean.to(x), self.name)

    @property
    def mean(self) -> Tensor:
        """Of each channel, float64."""
        return torch.zeros(1, dtype=torch.float64) if self.total is None else self.total / self.count

    @property
    def bulk(self) -> float:
        """Variance within channels of all but the `TRIMMED` largest deviations, corrected to that of a normal."""
        counts, centers = self.centred.counts.double(), self.centred.centers()
        kept = centers.abs() <= self.centred.percentile(100.0 * (1 - TRIMMED))
        return float((counts * centers.square())[kept].sum() / counts[kept].sum().clamp_min(1)) / NORMAL_BULK

    def noise(self, bits: int = 4) -> float:
        """Mean squared error on a symmetric grid of `bits` with the best clipping range."""
        grid = Grid(bits)
        scale, zero_point = activation_parameters(self.histogram, grid, "mse")
        filled = self.histogram.counts > 0
        centers = self.histogram.centers()[filled].float()
        error = dequantize(quantize(centers, scale, zero_point, grid), scale, zero_point, grid) - centers
        weight = self.histogram.counts[filled].double()
        return float((weight * error.double().square()).sum() / weight.sum())


def attribute(
    model: nn.Module,
    ops: Mapping[str, Op],
    batches: Iterable[Batch],
    *,
    k_target: Mapping[str, int],
    k_max: int = 3,
    producers: Mapping[str, Producer] | None = None,
    progress: Progress | None = None,
) -> list[SiteAttribution]:
    """Attribute every activation site of `ops`.

    Args:
        model: the float model, called as ``model(**batch)``.
        ops: from `discovery.discover`.
        batches: read twice, so not a generator.
        k_target: by layer, how many triplets S2D presses (`LayerDiagnosis.k_target`); absent or 0: not flagged.
        k_max: how many triplets of any layer S2D could press.
        producers: of `trace_producers`; traced on the first batch when None.
        progress: called with one line of text now and then.

    Returns:
        In the order of `ops`.

    Raises:
        DataError: a generator, no batch, or activations that are not finite (the site is named).
    """
    if iter(batches) is batches:
        raise DataError(
            message("the batches can be read only once", expected="a list, or anything read anew each time")
        )
    first = next(iter(batches), None)
    if first is None:
        raise DataError(message("the calibration data holds no batch", fix="check the data's path"))
    if producers is None:
        producers = trace_producers(model, ops, {name: tensor[:1] for name, tensor in first.items()})
    measurement = _Measurement(model, producers, k_target, k_max)
    say: Progress = progress if progress is not None else (lambda _: None)
    measurement.run(batches, lambda n: say(f"attribute: {n} batches, means"))
    measurement.choose_channels()
    measurement.run(batches, lambda n: say(f"attribute: {n} batches, errors"))
    return [measurement.result(producer) for producer in producers.values()]


def forecast(sites: Iterable[SiteAttribution], *, flagged: int) -> Forecast:
    """Whether S2D will help at 4-bit activations, from the sites' attributions.

    Args:
        sites: of `attribute`.
        flagged: how many layers S2D would touch.
    """
    known = list(sites)
    excess = {s.site: s.excess for s in known}
    total = sum(excess.values())
    if not known or total <= 0:
        sentence = (
            f"S2D will not help at 4-bit activations here, because no site needs it: none of {len(known)} quantized "
            f"sites loses more than {HARMLESS:.0%} of its variance at 4 bits."
        )
        return Forecast(False if known else None, 0.0, {}, sentence)
    shares: dict[str, float] = {}
    for s in known:
        shares[s.verdict] = shares.get(s.verdict, 0.0) + excess[s.site] / total
    reach = sum(s.reach * excess[s.site] for s in known) / total
    bad = sum(value > 0 for value in excess.values())
    touched = f"the {flagged} layer(s) that it flags make {reach:.0%} of the error at the {bad} sites that need repair"
    words = {
        "gain": "gains and biases of norms",
        "neuron": "single channels or neurons",
        "triplet": "leading triplets",
        "none": "no single cause",
        "unknown": "producers that were not recognized",
    }
    causes = ", ".join(f"{words[v]} {share:.0%}" for v, share in sorted(shares.items(), key=lambda e: -e[1]))
    if shares.get("unknown", 0.0) > 0.5:
        return Forecast(
            None,
            reach,
            shares,
            f"Whether S2D helps at 4-bit activations cannot be said here: the producers of most sites that need repair "
            f"were not recognized ({causes}).",
        )
    if reach >= NAMED_SHARE:
        return Forecast(
            True,
            reach,
            shares,
            f"S2D will help at 4-bit activations here, because {touched} (causes by site: {causes}).",
        )
    why = "because it flags no layer" if not flagged else f"because {touched}"
    if shares.get("triplet", 0.0) >= NAMED_SHARE:
        return Forecast(
            False,
            reach,
            shares,
            f"S2D will not help at 4-bit activations here as it is set, {why}; but leading triplets do make "
            f"{shares['triplet']:.0%} of it: a lower tau or a higher k_max would reach them (causes: {causes}).",
        )
    return Forecast(
        False, reach, shares, f"S2D will not help at 4-bit activations here, {why} (causes by site: {causes})."
    )


class _Measurement:
    """The streams of all sites. Sites that see one tensor (query, key and value inputs) share its streams."""

    def __init__(
        self, model: nn.Module, producers: Mapping[str, Producer], k_target: Mapping[str, int], k_max: int
    ) -> None:
        self.model, self.k_target, self.k_max = model, k_target, k_max
        self.modules = dict(model.named_modules())
        self.names = {module: name for name, module in model.named_modules()}
        # Site streams by source: the producing module, or the site itself.
        self.source = {p.site: _source(p) for p in producers.values()}
        self.by_source = {_source(p): p for p in producers.values()}
        self.producers = dict(producers)
        self.actual: dict[str, _Stream] = {}
        self.without: dict[tuple[str, str], _Stream] = {}
        self.extreme: dict[str, Tensor] = {}
        self._second = False
        wanted = {name for p in producers.values() for name in p.linears}
        self.triplets: dict[str, Triplets] = {
            name: top_triplets(weight_matrix(self.modules[name]), max(k_max, k_target.get(name, 0)))
            for name in self.modules
            if name in wanted and isinstance(self.modules[name], nn.Linear)
        }
        self._removed: dict[str, dict[str, Tensor]] = {}  # layer -> cause -> what it adds, for the current batch
        self._probs: dict[str, Tensor] = {}
        self._contexts: dict[str, dict[str, Tensor]] = {}  # value's Linear -> cause -> attention context

    def run(self, batches: Iterable[Batch], each: Callable[[int], None]) -> None:
        """One pass. Sites as they are, and without one cause at a time."""

        def see(event: str, name: str, x: Tensor, output: Tensor | None) -> None:
            self._see(event, name, x, output)
            self._see_without(event, name, x, output)

        def hook(event: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, args, output: see(event, self.names[module], args[0], output)

        def on_operand(module: nn.Module, operand: str, x: Tensor) -> None:
            see(operand, self.names[module], x, None)

        handles = []
        for name, module in self.modules.items():
            if isinstance(module, nn.Linear | nn.Conv2d):
                handles.append(module.register_forward_hook(hook("layer")))
            elif f"norm:{name}" in self.by_source or f"activation:{name}" in self.by_source:
                handles.append(
                    module.register_forward_hook(hook("norm" if f"norm:{name}" in self.by_source else "activation"))
                )

        def fresh() -> Iterable[Batch]:
            for batch in batches:
                self._forget()
                yield batch

        try:
            with watching(on_operand):
                forward_batches(self.model, fresh(), each=each)
        finally:
            self._forget()
            for handle in handles:
                handle.remove()

    def _forget(self) -> None:
        for held in (self._removed, self._probs, self._contexts):
            held.clear()

    def _see(self, event: str, name: str, x: Tensor, output: Tensor | None) -> None:
        """Every site as it is."""
        sources: tuple[tuple[str, Tensor | None], ...] = (f"linear:{name}", output), (f"site:{name}.input", x)
        if event in ("norm", "activation"):
            sources = ((f"{event}:{name}", output),) * 2
        elif event != "layer":
            sources = ((f"site:{name}.{event}", x),) * 2
        for source, tensor in dict(sources).items():
            if source in self.by_source and tensor is not None and self.by_source[source].kind != "softmax":
                stream = self.actual.setdefault(source, _Stream(source.partition(":")[2]))
                self._feed(stream, _channels_last(event, tensor))

    def choose_channels(self) -> None:
        """Between the passes: the most extreme channels of every stream."""
        self._second = True
        for source, stream in self.actual.items():
            if stream.peak is not None:
                count = max(1, round(EXTREME_CHANNELS * stream.peak.numel()))
                self.extreme[source] = stream.peak.topk(min(count, stream.peak.numel())).indices

    def _see_without(self, event: str, name: str, x: Tensor, output: Tensor | None) -> None:
        """Every site without one cause at a time."""
        if event == "layer" and output is not None:
            self._layer(name, x, output)
        elif event == "norm" and output is not None:
            source, norm = f"norm:{name}", self.modules[name]
            weight, bias, eps = norm.weight, norm.bias, norm.eps
            shape = tuple(norm.normalized_shape)
            for cause, removed in self._sum(source, x.shape).items():
                self._add(source, cause, F.layer_norm(x - removed, shape, weight, bias, eps))
            self._add(source, "gain", F.layer_norm(x, shape, None, None, eps))
            self._single(source, output)
        elif event == "activation" and output is not None:
            source = f"activation:{name}"
            for cause, removed in self._sum(source, x.shape).items():
                self._add(source, cause, self.modules[name].forward(x - removed))
            self._single(source, output)
        elif event == "probs":
            self._probs[name] = x
        elif event in ("query", "key", "value"):
            if event == "value":
                self._values(name, x)
            source = f"site:{name}.{event}"
            if source in self.by_source:
                self._single(source, _channels_last(event, x))

    def _layer(self, name: str, x: Tensor, output: Tensor) -> None:
        if name in self.triplets:
            t = self.triplets[name]
            parts = (x @ t.V.to(x)) * t.S.to(x)
            k = self.k_target.get(name, 0)
            self._removed[name] = {"triplets": parts[..., : self.k_max] @ t.U[:, : self.k_max].T.to(x)}
            if k:
                self._removed[name]["flagged"] = parts[..., :k] @ t.U[:, :k].T.to(x)
        source = f"linear:{name}"
        if source in self.by_source:
            for cause, removed in self._sum(source, output.shape).items():
                self._add(source, cause, output - removed)
            self._single(source, output)
        source = f"site:{name}.input"
        if source in self.by_source:
            self._single(source, _channels_last("layer", x))
            producer = self.by_source[source]
            if producer.kind == "attention":
                for cause, context in self._contexts.get(producer.linears[0], {}).items():
                    self._add(source, cause, context)

    def _values(self, name: str, value: Tensor) -> None:
        """Context without the triplets of the value's Linear, heads merged: ``probs @ (value - removed)``."""
        producer = self.producers.get(f"{name}.value")
        probs = self._probs.get(name)
        if producer is None or producer.kind != "linear" or probs is None:
            return
        samples, heads, tokens, width = value.shape
        contexts = {}
        for cause, removed in self._removed.get(producer.module, {}).items():
            if removed.numel() == value.numel():
                split = removed.reshape(samples, tokens, heads, width).transpose(1, 2)
                contexts[cause] = (probs @ (value - split)).transpose(1, 2).flatten(2)
        self._contexts[producer.module] = contexts

    def _sum(self, source: str, shape: torch.Size) -> dict[str, Tensor]:
        """By cause, what the producing layers add to the stream in front of `source`."""
        total: dict[str, Tensor] = {}
        for name in self.by_source[source].linears:
            for cause, removed in self._removed.get(name, {}).items():
                if removed.shape == shape:
                    total[cause] = total[cause] + removed if cause in total else removed
        return total

    def _single(self, source: str, x: Tensor) -> None:
        if self._second:  # the first pass finds the channels; the others' means are those of the whole
            rest = x.clone()
            rest[..., self.extreme[source]] = 0
            self._add(source, "single", rest)

    def _add(self, source: str, cause: str, x: Tensor) -> None:
        name = f"{source.partition(':')[2]} without {cause}"
        self._feed(self.without.setdefault((source, cause), _Stream(name)), x)

    def _feed(self, stream: _Stream, x: Tensor) -> None:
        if self._second:
            stream.add(x)
        else:
            require_finite_activation(stream.name, "values", x)
            stream.look(x)

    def result(self, producer: Producer) -> SiteAttribution:
        """The attribution of one site."""
        source = self.source[producer.site]
        common = (producer.site, producer.kind, producer.module, producer.linears)
        if producer.kind == "softmax":
            return SiteAttribution(*common, 1.0, 0.0, note="probabilities: at most 1 whatever the weights")
        actual = self.actual[source]
        bulk = actual.bulk
        if actual.histogram.absmax == 0 or actual.noise() == 0:
            return SiteAttribution(*common, actual.histogram.absmax, 0.0, note="a 4-bit grid holds it exactly")
        error = actual.noise() / max(bulk, 1e-30)
        found = {
            cause: self._compare(source, cause, actual, error)
            for cause in ("flagged", "triplets", "gain", "single")
            if (source, cause) in self.without
        }
        return SiteAttribution(
            *common,
            actual.histogram.absmax,
            error,
            self._channels(producer, actual),
            flagged=found.get("flagged"),
            triplets=found.get("triplets"),
            gain=found.get("gain"),
            single=found.get("single"),
            verdict=_verdict(producer, error, found),
            note=producer.note,
        )

    def _compare(self, source: str, cause: str, actual: _Stream, error: float) -> Without:
        stream = self.without[source, cause]
        noise, bulk, remaining = stream.noise(), actual.bulk, stream.histogram.absmax
        if cause in ("flagged", "triplets"):
            bulk = stream.bulk  # the signal is another one, too
        elif cause == "gain":
            # In the units of the site: the next Linear would hold the gains. The typical one speaks for the bulk.
            gain = float(self.modules[self.by_source[source].module].get_parameter("weight").detach().abs().median())
            noise, remaining = noise * gain**2, remaining * gain
        without = noise / max(bulk, 1e-30)
        share = (error - without) / (error - NORMAL_ERROR) if error > NORMAL_ERROR else 0.0
        return Without(remaining / actual.histogram.absmax, without, min(max(share, 0.0), 1.0))

    def _channels(self, producer: Producer, actual: _Stream) -> tuple[Channel, ...]:
        if actual.peak is None:
            return ()
        module = self.modules[producer.module] if producer.kind == "norm" else None
        layer = self.modules.get(producer.linears[0]) if len(producer.linears) == 1 and module is None else None
        if producer.kind == "attention" or not isinstance(layer, nn.Linear):
            layer = None
        channels = []
        for i in actual.peak.topk(min(3, actual.peak.numel())).indices.tolist():
            gain = bias = row = None
            if module is not None:
                gain = float(module.weight.detach()[i])
                bias = None if module.bias is None else float(module.bias.detach()[i])
            elif layer is not None and layer.out_features == actual.peak.numel():
                norms = layer.weight.detach().norm(dim=1)
                row = float(norms[i] / norms.median().clamp_min(1e-30))
                bias = None if layer.bias is None else float(layer.bias.detach()[i])
            channels.append(Channel(i, float(actual.peak[i]), float(actual.mean[i]), gain, bias, row))
        return tuple(channels)


def _source(producer: Producer) -> str:
    if producer.kind in ("norm", "activation", "linear"):
        return f"{producer.kind}:{producer.module}"
    return f"site:{producer.site}"


def _channels_last(event: str, x: Tensor) -> Tensor:
    """Attention's key lies transposed; an image's channels come second."""
    if event == "key":
        return x.transpose(-1, -2)
    if event == "layer" and x.dim() == 4:
        return x.flatten(2).transpose(1, 2)
    return x


def _verdict(producer: Producer, error: float, found: Mapping[str, Without]) -> Verdict:
    if producer.kind == "unknown":
        return "unknown"
    if producer.kind == "input" or error <= HARMLESS:
        return "none"
    words: dict[str, Verdict] = {"triplets": "triplet", "gain": "gain", "single": "neuron"}
    # To one decimal: of causes that explain it equally, the one that is named first can be acted on more cheaply.
    best = max((c for c in words if c in found), key=lambda c: round(found[c].share, 1), default=None)
    return words[best] if best is not None and found[best].share >= NAMED_SHARE else "none"
