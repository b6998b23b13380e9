"""Diagnosis: where a model's outliers sit, and whether few singular triplets make them.

One streaming pass over calibration data measures every Linear and Conv: PCDR at its outliers, range,
standard deviation and kurtosis of its input and output, and the place of its largest output. The
moments are merged batch by batch in float64 (Chan, Golub and LeVeque 1979; fourth order: Pebay,
Sandia report SAND2008-6212), so nothing is kept but a few numbers for each layer, and the result does
not depend on how the data is cut into batches (beyond rounding). Padding tokens count as tokens: the
layer computes them, and a per-tensor range has to hold them.

`diagnose_model` adds what `attribution` measures: which of these outliers arrive at quantized sites and what makes
the sites' ranges; on a few samples what each site does to the output (`site_harm`); and whether S2D will help.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.attribution import Forecast, SiteAttribution, attribute, forecast
from s2d_deploy.discovery import discover
from s2d_deploy.errors import DataError, ModelError, message
from s2d_deploy.pcdr import (
    DEFAULT_TOP,
    Batch,
    OutlierCollector,
    channels_last,
    forward_batches,
    is_dead,
    pcdr,
    require_finite_activation,
    smallest_k,
)
from s2d_deploy.session import Progress
from s2d_deploy.site_harm import HARM_SAMPLES, site_harm
from s2d_deploy.spectral import (
    WeightedLayer,
    require_finite_weights,
    singular_values,
    top_triplets,
    weight_matrix,
    weighted_layers,
)

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Moments:
    """Count, mean, central moments, and range of everything seen. Merging equals seeing all at once.

    `m2`, `m3`, `m4` are sums of powers of the deviation from the mean.
    """

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    m3: float = 0.0
    m4: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    def add(self, x: Tensor) -> None:
        """See the elements of `x`, any shape and float dtype."""
        values = x.detach().double().reshape(-1)
        if values.numel() == 0:
            return
        mean = values.mean()
        low, high = values.aminmax()
        deviation = values - mean
        square = deviation * deviation
        sums = torch.stack([mean, square.sum(), (square * deviation).sum(), (square * square).sum(), low, high])
        self._merge(values.numel(), *sums.tolist())

    def _merge(self, nb: int, mean: float, m2: float, m3: float, m4: float, low: float, high: float) -> None:
        na, n = self.count, self.count + nb
        d = mean - self.mean
        # Pebay 2008, equations 2.1 (general merge) for the second, third and fourth order; old ones on the right.
        self.m4 += (
            m4
            + d**4 * na * nb * (na * na - na * nb + nb * nb) / n**3
            + 6 * d * d * (na * na * m2 + nb * nb * self.m2) / n**2
            + 4 * d * (na * m3 - nb * self.m3) / n
        )
        self.m3 += m3 + d**3 * na * nb * (na - nb) / n**2 + 3 * d * (na * m2 - nb * self.m2) / n
        self.m2 += m2 + d * d * na * nb / n
        self.mean += d * nb / n
        self.count = n
        self.low, self.high = min(self.low, low), max(self.high, high)

    @property
    def std(self) -> float:
        """Standard deviation (population)."""
        return math.sqrt(max(self.m2, 0.0) / self.count) if self.count else 0.0

    @property
    def kurtosis(self) -> float:
        """E[(x - mean)^4] / std^4: 3 for a normal distribution; 0 for a constant, which has none."""
        return self.count * self.m4 / (self.m2 * self.m2) if self.m2 > 0 else 0.0

    @property
    def range_over_std(self) -> float:
        """(max - min) / std: how many standard deviations a min-max grid must span; 0 for a constant."""
        return (self.high - self.low) / self.std if self.std > 0 else 0.0

    @property
    def max_abs(self) -> float:
        """Largest magnitude."""
        return max(abs(self.low), abs(self.high)) if self.count else 0.0


@dataclass(frozen=True, slots=True)
class OutlierPlace:
    """Where a layer's largest output was seen.

    Attributes:
        value: the output, bias included.
        channel: output channel.
        sample: index along the first axis, counted over all batches.
        token: flat index over the axes between sample and channel (Conv: over positions); None without such axes.
    """

    value: float
    channel: int
    sample: int
    token: int | None


@dataclass(frozen=True, slots=True)
class LayerDiagnosis:
    """One layer.

    Attributes:
        name: module path.
        shape: the weight's matrix view, [N, K].
        pcdr: PCDR_1 .. PCDR_k_max.
        flagged: whether some PCDR_k >= tau.
        k_target: the smallest such k; 0 when not flagged.
        dead: the output was nothing but the bias.
        singular_values: all, descending.
        sigma_max: the largest.
        max_abs_activation: largest |output|.
        max_abs_input: largest |input|.
        kurtosis: of the output, 3 for a normal distribution.
        kurtosis_input: of the input.
        range_over_std: of the output.
        range_over_std_input: of the input.
        outlier: where the largest output sits.
    """

    name: str
    shape: tuple[int, int]
    pcdr: list[float]
    flagged: bool
    k_target: int
    dead: bool
    singular_values: list[float] = field(repr=False)
    sigma_max: float
    max_abs_activation: float
    max_abs_input: float
    kurtosis: float
    kurtosis_input: float
    range_over_std: float
    range_over_std_input: float
    outlier: OutlierPlace

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values by name."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A whole model: its layers, its quantized sites, and whether S2D will help.

    Attributes:
        layers: every Linear and Conv, in model order.
        sites: every activation site, in execution order; empty where sites cannot be told apart (`forecast` says why).
        forecast: whether S2D will help at 4-bit activations, with the reason.
    """

    layers: list[LayerDiagnosis]
    sites: list[SiteAttribution]
    forecast: Forecast

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "sites": [site.to_dict() for site in self.sites],
            "forecast": self.forecast.to_dict(),
        }


class _Anew:
    """Batches that are made anew each time they are read, so that none has to be kept."""

    def __init__(self, factory: Callable[[], Iterable[Batch]]) -> None:
        self._factory = factory

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._factory())


class _Watch:
    """Statistics of one layer, fed by a forward hook."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.input, self.output = Moments(), Moments()
        self.place: OutlierPlace | None = None
        self._samples = 0

    def __call__(self, layer: WeightedLayer, args: tuple[Any, ...], output: Tensor) -> None:
        require_finite_activation(self.name, "input", args[0])
        require_finite_activation(self.name, "output", output)
        self.input.add(args[0])
        self.output.add(output)
        entries = channels_last(layer, output.detach())
        samples, positions, width = entries.shape
        flat = entries.reshape(-1)
        if flat.numel():
            at = int(flat.abs().argmax())
            value = float(flat[at])
            if self.place is None or abs(value) > abs(self.place.value):
                sample, rest = divmod(at, positions * width)
                token = rest // width if output.dim() > 2 else None
                self.place = OutlierPlace(value, rest % width, self._samples + sample, token)
        self._samples += samples


def diagnose(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    k_max: int = 3,
    tau: float = 0.95,
    layers: list[str] | None = None,
    top: int = DEFAULT_TOP,
    progress: Progress | None = None,
) -> list[LayerDiagnosis]:
    """Diagnose every Linear and Conv of `model` in one pass over `batches`.

    Args:
        model: called as ``model(**batch)``, in eval mode, without gradients; it is left as it was.
        batches: dicts of tensors. Not the test set.
        k_max: how many leading triplets PCDR looks at.
        tau: PCDR from which on a layer is flagged.
        layers: module paths; None: all.
        top: how many of a layer's largest activations PCDR is averaged over.
        progress: called with one line of text now and then.

    Returns:
        In model order. A layer that no forward pass reached is left out (and logged): nothing was measured.

    Raises:
        ModelError: no such layer, no layer at all, a weight that is not finite, or a requested layer never reached.
        DataError: no batch, or activations that are not finite. Both name the layer.
    """
    targets = weighted_layers(model, layers)
    if not targets:
        raise ModelError(message("the model has no Linear or Conv layer", found=type(model).__name__))
    require_finite_weights(targets)
    watches = {name: _Watch(name) for name in targets}
    say: Callable[[str], None] = progress if progress is not None else lambda _: None
    # Both look at the same forward pass; the watches are registered first and so report a bad activation first.
    handles = [layer.register_forward_hook(watches[name]) for name, layer in targets.items()]
    try:
        with OutlierCollector(model, top=top, layers=list(targets)) as collector:
            forward_batches(model, batches, each=lambda done: say(f"diagnose: {done} batches"))
    finally:
        for handle in handles:
            handle.remove()
    outliers = collector.outliers()
    unreached = [name for name in targets if watches[name].place is None]
    if unreached and (layers is not None or len(unreached) == len(targets)):
        raise (ModelError if layers is not None else DataError)(
            message(
                f"no calibration batch reached {', '.join(repr(n) for n in unreached)}",
                expected="layers that the model's forward pass runs",
                fix="leave these layers out",
            )
        )
    if unreached:
        log.warning("not diagnosed, because no forward pass reached them: %s", ", ".join(unreached))
    result = []
    for number, name in enumerate(targets, start=1):
        if name not in unreached:
            say(f"diagnose: spectrum of layer {number} of {len(targets)}")
            matrix = weight_matrix(targets[name])
            ratios = pcdr(matrix, top_triplets(matrix, k_max), outliers[name])
            ratios += [ratios[-1]] * (k_max - len(ratios))  # beyond the rank there is nothing to add
            k_target = smallest_k(ratios, tau, min(matrix.shape))
            spectrum = singular_values(matrix).tolist()
            watch = watches[name]
            place = watch.place
            if place is None:  # for the type checker: such layers are in `unreached`
                continue
            result.append(
                LayerDiagnosis(
                    name=name,
                    shape=(matrix.shape[0], matrix.shape[1]),
                    pcdr=ratios,
                    flagged=k_target > 0,
                    k_target=k_target,
                    dead=is_dead(outliers[name]),
                    singular_values=spectrum,
                    sigma_max=spectrum[0],
                    max_abs_activation=watch.output.max_abs,
                    max_abs_input=watch.input.max_abs,
                    kurtosis=watch.output.kurtosis,
                    kurtosis_input=watch.input.kurtosis,
                    range_over_std=watch.output.range_over_std,
                    range_over_std_input=watch.input.range_over_std,
                    outlier=place,
                )
            )
    return result


def diagnose_model(
    model: nn.Module,
    batches: Callable[[], Iterable[Batch]],
    *,
    output: str | None = None,
    k_max: int = 3,
    tau: float = 0.95,
    top: int = DEFAULT_TOP,
    harm_samples: int = HARM_SAMPLES,
    progress: Progress | None = None,
) -> Diagnosis:
    """Diagnose layers and quantized sites in three passes over the data, and one over a few samples for each site.

    Args:
        model: called as ``model(**batch)``; a transformers model is left with the visible attention switched on.
        batches: gives the same batches at each call; memory does not grow with their number.
        output: the output that will be exported; see `discovery.discover`.
        k_max, tau, top, progress: as in `diagnose`.
        harm_samples: on how many of the first samples the harm of each site is measured; its cost: see `site_harm`.

    Raises:
        As `diagnose`.
    """
    layers = diagnose(model, batches(), k_max=k_max, tau=tau, top=top, progress=progress)
    k_target = {layer.name: layer.k_target for layer in layers}
    first = next(iter(batches()))
    try:
        ops = discover(model, {name: tensor[:1] for name, tensor in first.items()}, output)
    except ModelError as error:
        log.warning("quantized sites are not attributed: %s", error)
        return Diagnosis(layers, [], Forecast(None, 0.0, {}, f"Whether S2D helps cannot be said here: {error}"))
    sites = attribute(model, ops, _Anew(batches), k_target=k_target, k_max=k_max, progress=progress)
    # Where not all can be measured singly: what S2D could change first, the worst of it first.
    worst = sorted((s for s in sites if s.flagged or s.triplets), key=lambda s: (-s.reach * s.excess, -s.excess))
    harm = site_harm(
        model, ops, batches(), output, first=[s.site for s in worst], samples=harm_samples, progress=progress
    )
    sites = [replace(s, harm=harm.sites.get(s.site)) for s in sites]
    flagged = sum(layer.flagged for layer in layers)
    return Diagnosis(layers, sites, forecast(sites, flagged=flagged, unmeasured=harm.rest))
