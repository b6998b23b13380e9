"""S2D at the quantized sites: press what makes the outliers that a quantizer really sees.

The paper's S2D looks at a layer's own output. Between that and the next quantized site often lies a LayerNorm or an
activation function, and there the range is made by something else. Here the attribution of the sites (`attribution`)
says what, and that component is pressed:

- a *triplet* of the Linear in front of the site, with PCDR taken where the *site* is largest (behind a GELU those are
  other entries than the layer's own largest outputs): ``W -= lr * factor * U S^n V^T``, as S2D does;
- a norm's *gain* (a diagonal matrix, whose singular values are its entries) in the few channels that tower over the
  others, with the bias there;
- a single *neuron*: the row of the Linear in front of the activation.

Of gains and neurons, let r be the channel's largest magnitude over that of all other channels together. A step takes
the share ``lr * factor * r^(n-1)`` of it, until r is 1, and the layers that read it take the inverse (`site_moves`):
exact behind a norm, up to what else reads it; approximate behind an activation. Before the first step, norms in front
of such sites are centred, which is exact. Always decoupled. What is lost: the function moves, and only training with
the loss of the model's final outputs brings it back; hidden states in between do not stay what they were.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d_deploy.attribution import SiteAttribution, attribute
from s2d_deploy.discovery import discover
from s2d_deploy.errors import DataError, ModelError, RecipeError, message
from s2d_deploy.pcdr import Batch, Outliers, forward_batches, pcdr, smallest_k
from s2d_deploy.plan import Op
from s2d_deploy.producers import NormInput, Producer, trace_norm_inputs, trace_producers
from s2d_deploy.s2d import MAX_SHRINK, Refresh
from s2d_deploy.s2d_config import S2DConfig
from s2d_deploy.sharding import add_low_rank, bare, processes
from s2d_deploy.site_moves import (
    Neighbours,
    Residual,
    best_residual,
    centre,
    is_free,
    neighbours,
    scale_neuron,
    scale_norm,
)
from s2d_deploy.spectral import Part, Triplets, require_finite_weights, top_triplets, weight_matrix, weighted_layers

log = logging.getLogger(__name__)

ComponentKind = Literal["triplet", "gain", "neuron"]


@dataclass(slots=True)
class Component:
    """Something that is pressed.

    Attributes:
        kind: what it is.
        module: the Linear of a triplet or neuron, the norm of a gain.
        sites: the quantized sites whose excess error it makes.
        channels: of a gain or neuron; empty for triplets.
        excess: for each channel its largest magnitude at the site over all other channels'; follows the pressing.
        k: how many leading triplets; 0 for the others.
        pcdr: of triplets, PCDR_1 .. PCDR_k_max at the site's outliers.
        activation: of a neuron, the activation module behind it.
        residual: of a gain, what is done about a residual sum (see `site_moves`).
    """

    kind: ComponentKind
    module: str
    sites: list[str]
    channels: list[int]
    excess: list[float]
    k: int = 0
    pcdr: tuple[float, ...] = ()
    activation: str = ""
    residual: Residual = "none"

    @property
    def name(self) -> str:
        """E.g. ``"gain of encoder.norm1[62, 99]"``, ``"triplet 1-2 of fc1"``."""
        if self.kind == "triplet":
            return f"triplet 1{f'-{self.k}' if self.k > 1 else ''} of {self.module}"
        return f"{self.kind} of {self.module}[{', '.join(map(str, self.channels))}]"


class SiteDecay:
    """Selective decay of the components that make the outliers at the quantized sites.

    Used as `s2d.S2D` is without an optimizer: ``select(batches)``, then in every step ``backward(); before_step();
    optimizer.step(); after_step(lr)``. `condition` does that with ``S2DConfig(select="sites")``.

    Args:
        model: trained in place; one process.
        config: with ``select="sites"``; read are n, tau, k_max, decoupled_factor, refresh_every,
            refresh_batches and outliers.
        layers: Linears that may be pressed, as triplets or neurons; None: all. Gains of norms may be pressed always.

    Raises:
        RecipeError: the config says "paper", or "coupled"; more than one process.
        ModelError: an unknown layer.
    """

    def __init__(self, model: nn.Module, config: S2DConfig, layers: list[str] | None = None) -> None:
        if config.select != "sites":
            raise RecipeError(
                message("SiteDecay presses at the sites", expected="S2DConfig(select='sites')", found=config.select)
            )
        if processes()[1] > 1:
            raise RecipeError(
                message("select = 'sites' runs on one process", fix="start it without torchrun, or select = 'paper'")
            )
        self.model = bare(model)
        self.config = config
        self._allowed = set(weighted_layers(self.model, layers))
        self.components: list[Component] = []
        self.attributions: list[SiteAttribution] = []
        self.centred: list[str] = []
        self.refreshes: list[Refresh] = []
        self.step = 0
        self._calibration: Sequence[Batch] = []
        self._triplets: dict[str, Triplets] = {}
        self._ops: dict[str, Op] = {}
        self._producers: dict[str, Producer] = {}
        self._inputs: dict[str, NormInput] = {}
        self._around: dict[str, Neighbours] = {}
        coarse = sorted(
            {str(p.dtype) for p in self.model.parameters() if p.is_floating_point()}
            - {"torch.float32", "torch.float64"}
        )
        if coarse:
            log.warning(
                "weights in %s: a step of S2D can be lost in rounding; keep them in float32, and use autocast",
                ", ".join(coarse),
            )

    @property
    def flagged(self) -> dict[str, int]:
        """How many triplets or channels of each component are being pressed, by its name."""
        return {c.name: c.k or len(c.channels) for c in self.components}

    def select(self, batches: Iterable[Batch]) -> list[Component]:
        """Centre the norms, and find what to press, on calibration data, which is kept for the refreshes.

        Raises:
            DataError: no batches, or activations that are not finite.
            ModelError: weights that are not finite.
        """
        self._remember(batches)
        require_finite_weights(weighted_layers(self.model))
        wanted = {p.module for p in self._producers.values() if p.kind == "norm" and p.site.endswith(".input")}
        order = [name for name in self._inputs if name in wanted]
        self.centred = centre(self.model, self._around, order, self._few())
        self._refresh("selected")
        return self.components

    def before_step(self) -> None:
        """Refresh when due.

        Raises:
            ModelError: `select` was not called.
        """
        if not self.refreshes:
            raise ModelError(
                message("S2D has not chosen its components yet", fix="call select(batches) before training")
            )
        if self.step > self.refreshes[-1].step and self.step % self.config.refresh_every == 0:
            self._refresh("count")

    def after_step(self, lr: float) -> None:
        """After the optimizer's step: press every component with this step's learning rate."""
        for component in self.components:
            if component.kind == "triplet":
                self._press_triplets(component, lr)
            else:
                self._press_channels(component, lr)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything but the calibration data, fit for ``torch.save``."""
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "components": [asdict(c) for c in self.components],
            "centred": list(self.centred),
            "triplets": {name: {"U": t.U, "S": t.S.clone(), "V": t.V} for name, t in self._triplets.items()},
            "refreshes": [[r.step, r.reason, r.drift] for r in self.refreshes],
        }

    def load_state_dict(self, state: dict[str, Any], batches: Iterable[Batch]) -> None:
        """Continue from `state`; nothing is centred anew.

        Raises:
            RecipeError: the state was made with another config.
            ModelError: it names modules that this model does not have.
        """
        mine = self.config.to_dict()
        differing = [key for key, value in mine.items() if state["config"].get(key) != value]
        if differing:
            raise RecipeError(message(f"the S2D state was made with another {', '.join(differing)}"))
        known = dict(self.model.named_modules())
        unknown = sorted({c["module"] for c in state["components"]} - set(known))
        if unknown:
            raise ModelError(message(f"the S2D state names modules that the model has not: {', '.join(unknown)}"))
        self._remember(batches)
        self.step = int(state["step"])
        self.components = [Component(**{**c, "pcdr": tuple(c["pcdr"])}) for c in state["components"]]
        self.centred = list(state["centred"])
        self._triplets = {
            name: Triplets(*(t[key].detach().clone() for key in ("U", "S", "V")))
            for name, t in state["triplets"].items()
        }
        self.refreshes = [Refresh(*entry) for entry in state["refreshes"]]

    def _remember(self, batches: Iterable[Batch]) -> None:
        """Keep the data, and trace once who makes and who reads each site: the structure, whatever the weights."""
        self._calibration = batches if isinstance(batches, Sequence) else list(batches)
        if not self._calibration:
            raise DataError(message("the calibration data holds no batch", fix="check the data's path"))
        device = next(self.model.parameters()).device
        sample = {k: v[:1].to(device) if isinstance(v, Tensor) else v for k, v in self._calibration[0].items()}
        sample.pop("labels", None)
        self._ops = discover(self.model, sample)
        self._producers = trace_producers(self.model, self._ops, sample)
        self._inputs = trace_norm_inputs(self.model, sample)
        self._around = neighbours(self._producers, self._inputs)

    def _few(self) -> list[Batch]:
        """At most `refresh_batches` calibration batches, evenly spaced, without labels, on the model's device."""
        limit = self.config.refresh_batches
        chosen = self._calibration if limit is None else self._calibration[:: -(-len(self._calibration) // limit)]
        device = next(self.model.parameters()).device
        return [{k: v.to(device) for k, v in b.items() if k != "labels"} for b in chosen]

    def _refresh(self, reason: str) -> None:
        batches = self._few()
        require_finite_weights(weighted_layers(self.model))
        modes = [(module, module.training) for module in self.model.modules()]
        self.attributions = attribute(
            self.model, self._ops, batches, k_target={}, k_max=self.config.k_max, producers=self._producers
        )
        for module, mode in modes:
            module.training = mode
        self._triplets, self.components = {}, []
        by_source: dict[tuple[ComponentKind, str], list[SiteAttribution]] = {}
        for found in self.attributions:
            if found.verdict == "triplet":
                for linear in found.linears:
                    by_source.setdefault(("triplet", linear), []).append(found)
            elif found.verdict in ("gain", "neuron") and found.kind == "norm":
                by_source.setdefault(("gain", found.module), []).append(found)
            elif found.verdict == "neuron" and found.kind == "activation" and len(found.linears) == 1:
                by_source.setdefault(("neuron", found.linears[0]), []).append(found)
        for (kind, name), sites in by_source.items():
            component = self._component(kind, name, sites, batches)
            if component is not None:
                self.components.append(component)
        self.refreshes.append(Refresh(self.step, reason, 0.0))
        log.info("S2D at the sites, step %d (%s): %d components", self.step, reason, len(self.components))

    def _component(
        self, kind: ComponentKind, module: str, sites: list[SiteAttribution], batches: list[Batch]
    ) -> Component | None:
        names = [s.site for s in sites]
        if kind == "triplet":
            if module not in self._allowed or not is_free(self.model, (module,)):
                return None
            return self._triplet_component(module, sites[0], names, batches)
        if kind == "neuron" and module not in self._allowed:
            return None
        around = self._around.get(sites[0].module)
        if around is None or not is_free(self.model, (module, *around.readers)):
            return None
        if kind == "gain" and around.shared and not around.next_norm:
            return None  # what else reads it is not known: it may be the model's own output
        single = sites[0].single
        rest = sites[0].max_abs * (single.range if single is not None else 1.0)
        tall = [(c.index, c.max_abs / rest) for c in sites[0].channels if rest > 0 and c.max_abs > rest]
        if not tall:
            return None
        component = Component(kind, module, names, [i for i, _ in tall], [r for _, r in tall])
        if kind == "neuron":
            component.activation = sites[0].module
        else:
            channels = torch.tensor(component.channels, device=next(self.model.parameters()).device)
            component.residual = best_residual(self.model, module, around, channels, batches[0])
        return component

    def _triplet_component(
        self, module: str, site: SiteAttribution, names: list[str], batches: list[Batch]
    ) -> Component | None:
        layer = weighted_layers(self.model, [module])[module]
        matrix = weight_matrix(layer)
        k_max = min(self.config.k_max, *matrix.shape)
        triplets = top_triplets(matrix, k_max)
        outliers = _site_outliers(self.model, self._producers[site.site], module, batches, self.config.outliers)
        ratios = pcdr(matrix, triplets, outliers)
        # The attribution has said that the top k_max make the site's range; PCDR says whether fewer are enough.
        k = smallest_k(ratios, self.config.tau, min(matrix.shape)) or k_max
        self._triplets[module] = triplets
        return Component("triplet", module, names, [], [], k=k, pcdr=tuple(ratios))

    def _press_triplets(self, component: Component, lr: float) -> None:
        cached = self._triplets[component.module]
        layer = weighted_layers(self.model, [component.module])[component.module]
        k, singular = component.k, cached.S[: component.k]
        taken = torch.minimum(lr * self.config.decoupled_factor * singular.pow(self.config.n), MAX_SHRINK * singular)
        add_low_rank(layer.weight, layer, Part(component.module), cached.U[:, :k] * taken, cached.V[:, :k], -1.0)
        remaining = cached.S.clone()
        remaining[:k] -= taken
        self._triplets[component.module] = Triplets(cached.U, remaining, cached.V)

    def _press_channels(self, component: Component, lr: float) -> None:
        strength = lr * self.config.decoupled_factor
        factors = []
        for place, r in enumerate(component.excess):
            share = min(strength * r ** (self.config.n - 1), MAX_SHRINK)
            f = max(1 - share, 1 / r) if r > 1 else 1.0  # never below the other channels
            factors.append(f)
            component.excess[place] = r * f
        if all(f == 1.0 for f in factors):
            return
        device = next(self.model.parameters()).device
        channels, f = torch.tensor(component.channels, device=device), torch.tensor(factors, device=device)
        if component.kind == "gain":
            scale_norm(self.model, component.module, self._around[component.module], channels, f, component.residual)
        else:
            readers = self._around[component.activation].readers
            scale_neuron(self.model, component.module, readers, channels, f)


def _site_outliers(model: nn.Module, producer: Producer, linear: str, batches: list[Batch], top: int) -> Outliers:
    """Where the site is largest: the entries (token, channel) of `linear`'s output, without the bias, and its inputs.

    Behind attention, whose context averages over tokens, the layer's own largest outputs.
    """
    site: dict[str, Tensor] = {}
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    kept: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    layer = model.get_submodule(linear)
    reader, _, role = producer.site.rpartition(".")

    def saw(_m: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        pairs["linear"] = (args[0].detach().flatten(0, -2), output.detach().flatten(0, -2))

    def look() -> None:
        nonlocal kept
        x, y = pairs["linear"]
        seen = site["x"].flatten(0, -2) if "x" in site else y
        rank = seen if seen.shape == y.shape else y
        bias = getattr(layer, "bias", None)
        value = y if bias is None else y - bias.detach()
        place = rank.abs().flatten().topk(min(top, rank.numel())).indices
        row, channel = place // y.shape[1], place % y.shape[1]
        now = (rank.flatten()[place].abs(), value[row, channel], channel, x[row])
        if kept is not None:
            now = tuple(torch.cat(both) for both in zip(kept, now, strict=True))  # type: ignore[assignment]
        best = now[0].topk(min(top, len(now[0]))).indices
        kept = (now[0][best], now[1][best], now[2][best], now[3][best])

    handles = [layer.register_forward_hook(saw)]
    if role == "input" and producer.kind != "attention":
        handles.append(
            model.get_submodule(reader).register_forward_pre_hook(lambda _m, args: site.update(x=args[0].detach()))
        )
    each: Callable[[int], None] = lambda _: look()  # noqa: E731 - typed once, for the call below
    try:
        forward_batches(model, batches, each=each)
    finally:
        for handle in handles:
            handle.remove()
    if kept is None:
        raise DataError(message(f"no outlier of {linear!r} was seen", fix="give at least one calibration batch"))
    return Outliers(kept[1].float(), kept[2], kept[3].float())


__all__ = ["Component", "ComponentKind", "SiteDecay"]
