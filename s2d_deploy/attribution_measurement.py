"""The two passes of attribution: every activation site as it is, and without one cause at a time.

Everything is computed from the inputs that a layer had in the untouched model, so these are direct effects.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d_deploy.attention import watching
from s2d_deploy.attribution_stream import Stream
from s2d_deploy.pcdr import Batch, forward_batches, require_finite_activation
from s2d_deploy.producers import Producer
from s2d_deploy.site_attribution import (
    HARMLESS,
    NAMED_SHARE,
    NORMAL_ERROR,
    Channel,
    SiteAttribution,
    Verdict,
    Without,
)
from s2d_deploy.spectral import Triplets, top_triplets, weight_matrix

# The share of channels that counts as "single".
EXTREME_CHANNELS = 0.01


class Measurement:
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
        self.actual: dict[str, Stream] = {}
        self.without: dict[tuple[str, str], Stream] = {}
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
                stream = self.actual.setdefault(source, Stream(source.partition(":")[2]))
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
        self._feed(self.without.setdefault((source, cause), Stream(name)), x)

    def _feed(self, stream: Stream, x: Tensor) -> None:
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

    def _compare(self, source: str, cause: str, actual: Stream, error: float) -> Without:
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

    def _channels(self, producer: Producer, actual: Stream) -> tuple[Channel, ...]:
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


__all__ = ["Measurement"]
