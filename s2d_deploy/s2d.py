"""Selective Spectral Decay: shrink the few singular values that make a layer's outliers.

    L_n(W) = lambda / (n + 1) * sum_{r <= k_target} s_r^(n+1)        gradient: lambda * U S^n V^T

A layer is flagged when some k <= k_max has PCDR_k >= tau, and only its top k_target triplets are
pressed; every other layer is left alone, bit for bit. Triplets and selection are refreshed every
`refresh_every` steps, and the cached ones are applied in between (Chavan et al., arXiv 2602.14432).

Two ways to apply it. *Coupled* adds the gradient to the loss gradient, as the paper writes it; AdamW
then divides it by its running magnitude, which was measured to leave the singular values where they
are in a few hundred steps. *Decoupled* subtracts it beside the optimizer, as AdamW does with weight
decay (Loshchilov and Hutter, arXiv 1711.05101): W <- W - lr * factor * U S^n V^T. It is the default.
Its cached S follows its own shrinking, so that a stale S cannot drive a singular value through zero.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, RecipeError, message
from s2d_deploy.pcdr import DEFAULT_TOP, Batch, OutlierCollector, forward_batches, pcdr, smallest_k
from s2d_deploy.spectral import (
    Triplets,
    WeightedLayer,
    require_finite_weights,
    residual,
    top_triplets,
    weight_matrix,
    weighted_layers,
)

log = logging.getLogger(__name__)

Application = Literal["coupled", "decoupled"]
# A decoupled step takes at most this share of a singular value, whatever lr * factor * s^(n-1) says.
MAX_SHRINK = 0.5


@dataclass(frozen=True, slots=True)
class S2DConfig:
    """What to press, how hard, how often to look again. Defaults: the paper's, except `application`.

    Attributes:
        n: exponent of the decay, 1 to 8; 1 is ordinary weight decay on the chosen triplets.
        weight_decay: lambda of the coupled penalty, 0 <= lambda < 1.
        tau: PCDR from which on a layer is flagged, in (0, 1].
        k_max: largest number of triplets that may be pressed, 1 to 64.
        refresh_every: steps between refreshes of triplets and selection.
        application: "coupled" (loss gradient) or "decoupled" (beside the optimizer).
        decoupled_factor: strength of the decoupled decay relative to the learning rate.
        refresh_drift: refresh earlier when the cached triplets' residual exceeds this; None: only by count.
        outliers: how many of a layer's largest activations PCDR is averaged over.

    Raises:
        RecipeError: names every value out of range.
    """

    n: float = 2
    weight_decay: float = 5e-4
    tau: float = 0.95
    k_max: int = 3
    refresh_every: int = 100
    application: Application = "decoupled"
    decoupled_factor: float = 10.0
    refresh_drift: float | None = None
    outliers: int = DEFAULT_TOP

    def __post_init__(self) -> None:
        drift = self.refresh_drift
        checks = [
            ("n", _within(self.n, 1, 8), "a number from 1 to 8"),
            ("weight_decay", _within(self.weight_decay, 0, 1) and self.weight_decay < 1, "a number in [0, 1)"),
            ("tau", _within(self.tau, 0, 1) and self.tau > 0, "a number in (0, 1]"),
            ("k_max", _whole(self.k_max, 1, 64), "a whole number from 1 to 64"),
            ("refresh_every", _whole(self.refresh_every, 1, 10**9), "a whole number of steps, at least 1"),
            ("application", self.application in ("coupled", "decoupled"), "'coupled' or 'decoupled'"),
            ("decoupled_factor", _within(self.decoupled_factor, 0, 1e6), "a number from 0 to 1e6"),
            ("refresh_drift", drift is None or (_within(drift, 0, 1) and drift > 0), "a number in (0, 1], or nothing"),
            ("outliers", _whole(self.outliers, 1, 100_000), "a whole number, at least 1"),
        ]
        wrong = [(name, expected) for name, good, expected in checks if not good]
        if wrong:
            raise RecipeError(
                message(
                    f"S2D: {', '.join(name for name, _ in wrong)} out of range",
                    expected="; ".join(f"{name}: {expected}" for name, expected in wrong),
                    found="; ".join(f"{name}={getattr(self, name)!r}" for name, _ in wrong),
                )
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values by name."""
        return asdict(self)


def penalty(singular: Tensor, n: float, weight_decay: float) -> Tensor:
    """``lambda / (n + 1) * sum s^(n+1)`` of the singular values [k]: a scalar."""
    return weight_decay / (n + 1) * singular.pow(n + 1).sum()


def penalty_gradient(triplets: Triplets, n: float, weight_decay: float) -> Tensor:
    """``lambda * U S^n V^T``: the penalty's gradient with respect to W, float32 [N, K]."""
    return weight_decay * triplets.product(n)


@dataclass(frozen=True, slots=True)
class Selection:
    """What the selection saw in one layer: PCDR_1 .. PCDR_k_max, and k_target (0: not flagged)."""

    name: str
    pcdr: tuple[float, ...]
    k_target: int

    @property
    def flagged(self) -> bool:
        """Whether S2D touches this layer."""
        return self.k_target > 0


@dataclass(frozen=True, slots=True)
class Refresh:
    """One refresh: the step before which it ran, why ("selected", "count", "drift"), and the drift it ended."""

    step: int
    reason: str
    drift: float


class S2D:
    """Selective spectral decay of one model during training.

    Call `select` once, then in every step ``backward(); before_step(); optimizer.step(); after_step(lr)``.

    Args:
        model: trained in place.
        config: strength and rhythm.
        layers: module paths that may be flagged; None: every Linear and Conv. Frozen weights
            (``requires_grad=False``) are never touched. Layers that share one weight are pressed once.

    Raises:
        ModelError: an unknown layer.
    """

    def __init__(self, model: nn.Module, config: S2DConfig, layers: list[str] | None = None) -> None:
        self.model = model
        self.config = config
        self.layers = {n: m for n, m in weighted_layers(model, layers).items() if m.weight.requires_grad}
        owners: dict[int, str] = {}
        # The first layer that holds a weight speaks for all that share it: name -> owner's name.
        self._owner = {name: owners.setdefault(id(layer.weight), name) for name, layer in self.layers.items()}
        self._calibration: Sequence[Batch] | None = None
        self._triplets: dict[str, Triplets] = {}
        self._k_target: dict[str, int] = {}
        self.selections: dict[str, Selection] = {}
        self.refreshes: list[Refresh] = []
        self.step = 0
        self._warned: set[str] = set()

    @property
    def flagged(self) -> dict[str, int]:
        """k_target of every weight that is being pressed, by the name of the first layer that holds it."""
        return {name: k for name, k in self._k_target.items() if k > 0}

    def triplets(self, name: str) -> Triplets:
        """The cached top k_max triplets of layer `name`."""
        return self._triplets[self._owner[name]]

    def select(self, batches: Iterable[Batch]) -> list[Selection]:
        """Flag layers by PCDR on calibration data, which is kept for the refreshes.

        Args:
            batches: a list is kept by reference; anything else is read into a list.

        Returns:
            One Selection for each layer that the forward pass reached, in model order.

        Raises:
            DataError: no batches, or activations that are not finite.
            ModelError: weights that are not finite.
        """
        self._calibration = batches if isinstance(batches, Sequence) else list(batches)
        self._refresh("selected")
        return list(self.selections.values())

    def before_step(self) -> None:
        """Between backward and the optimizer's step: refresh when due; coupled: add the penalty's gradient.

        Raises:
            ModelError: `select` was not called.
        """
        if not self.refreshes:
            raise ModelError(message("S2D has not chosen its layers yet", fix="call select(batches) before training"))
        if self.step > self.refreshes[-1].step:
            if self.step % self.config.refresh_every == 0:
                self._refresh("count")
            elif self.config.refresh_drift is not None and self.drift() > self.config.refresh_drift:
                self._refresh("drift")
        if self.config.application == "coupled":
            for name, k in self.flagged.items():
                weight = self.layers[name].weight
                gradient = penalty_gradient(self._triplets[name].top(k), self.config.n, self.config.weight_decay)
                gradient = gradient.reshape(weight.shape).to(weight.dtype)
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)

    def after_step(self, lr: float) -> None:
        """After the optimizer's step. Decoupled: ``W -= lr * factor * U S^n V^T`` on the flagged triplets.

        Args:
            lr: the learning rate of this step.
        """
        if self.config.application == "decoupled":
            for name, k in self.flagged.items():
                self._shrink(name, k, lr)
        self.step += 1

    def penalty(self) -> float:
        """The penalty's value over the flagged triplets, from the cached singular values."""
        values = [
            float(penalty(self._triplets[name].S[:k], self.config.n, self.config.weight_decay))
            for name, k in self.flagged.items()
        ]
        return sum(values)

    def drift(self) -> float:
        """The largest residual of the cached triplets that are being pressed (see `spectral.residual`)."""
        return max(
            (
                residual(weight_matrix(self.layers[name]), self._triplets[name].top(k))
                for name, k in self.flagged.items()
            ),
            default=0.0,
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything but the calibration data: tensors and plain values, fit for ``torch.save``."""
        return {
            "config": self.config.to_dict(),
            "step": self.step,
            "k_target": dict(self._k_target),
            "triplets": {name: {"U": t.U, "S": t.S.clone(), "V": t.V} for name, t in self._triplets.items()},
            "selections": [[s.name, list(s.pcdr), s.k_target] for s in self.selections.values()],
            "refreshes": [[r.step, r.reason, r.drift] for r in self.refreshes],
        }

    def load_state_dict(self, state: dict[str, Any], batches: Iterable[Batch] | None = None) -> None:
        """Continue from `state`.

        Args:
            state: of `state_dict`.
            batches: the calibration data; may be left out where `select` was called before.

        Raises:
            RecipeError: the state was made with another config.
            ModelError: it names layers that this model does not have, or no calibration data is known.
        """
        if state["config"] != self.config.to_dict():
            differing = [key for key, value in self.config.to_dict().items() if state["config"].get(key) != value]
            raise RecipeError(
                message(
                    f"the S2D state was made with another {', '.join(differing)}",
                    expected=", ".join(f"{key}={state['config'].get(key)!r}" for key in differing),
                    found=", ".join(f"{key}={getattr(self.config, key)!r}" for key in differing),
                )
            )
        unknown = sorted(set(state["triplets"]) - set(self.layers))
        if unknown:
            raise ModelError(message(f"the S2D state names layers that the model has not: {', '.join(unknown)}"))
        if batches is not None:
            self._calibration = batches if isinstance(batches, Sequence) else list(batches)
        if self._calibration is None:
            raise ModelError(message("S2D cannot refresh without calibration data", fix="pass batches"))
        device = {name: self.layers[name].weight.device for name in state["triplets"]}
        self.step = int(state["step"])
        self._k_target = dict(state["k_target"])
        self._triplets = {
            name: Triplets(*(t[key].detach().clone().to(device[name]) for key in ("U", "S", "V")))
            for name, t in state["triplets"].items()
        }
        self.selections = {name: Selection(name, tuple(r), k) for name, r, k in state["selections"]}
        self.refreshes = [Refresh(*entry) for entry in state["refreshes"]]

    def _refresh(self, reason: str) -> None:
        if self._calibration is None:
            raise ModelError(message("S2D cannot refresh without calibration data", fix="call select(batches)"))
        drift = self.drift()
        require_finite_weights(self.layers)
        with OutlierCollector(self.model, top=self.config.outliers, layers=list(self.layers)) as collector:
            forward_batches(self.model, self._calibration)
        self.selections, self._k_target = {}, {}
        fresh: dict[str, Triplets] = {}
        for name, outliers in collector.outliers().items():
            owner = self._owner[name]
            matrix = weight_matrix(self.layers[owner])
            if owner not in fresh:
                old = self._triplets.get(owner)
                fresh[owner] = top_triplets(matrix, self.config.k_max, warm=None if old is None else old.V)
            ratios = pcdr(matrix, fresh[owner], outliers)
            k = smallest_k(ratios, self.config.tau, min(matrix.shape))
            self.selections[name] = Selection(name, tuple(ratios), k)
            known = self._k_target.get(owner, 0)
            # Of several layers that share a weight, the one that needs the fewest triplets decides.
            self._k_target[owner] = min(k, known) if k and known else max(k, known)
        self.selections = {name: self.selections[name] for name in self.layers if name in self.selections}
        self._triplets = fresh
        self.refreshes.append(Refresh(self.step, reason, drift))
        log.info("S2D step %d (%s): %d of %d layers flagged", self.step, reason, len(self.flagged), len(self.layers))

    def _shrink(self, name: str, k: int, lr: float) -> None:
        weight, cached = self.layers[name].weight, self._triplets[name]
        singular = cached.S[:k]
        wanted = lr * self.config.decoupled_factor * singular.pow(self.config.n)
        taken = torch.minimum(wanted, MAX_SHRINK * singular)
        if name not in self._warned and bool((taken < wanted).any()):
            self._warned.add(name)
            log.warning(
                "layer %r: lr * decoupled_factor * s^(n-1) exceeds %s, the step is limited to that share of s; "
                "choose a smaller decoupled_factor",
                name,
                MAX_SHRINK,
            )
        with torch.no_grad():
            step = (cached.U[:, :k] * taken) @ cached.V[:, :k].T
            weight.sub_(step.reshape(weight.shape).to(weight.dtype))
        remaining = cached.S.clone()
        remaining[:k] -= taken
        self._triplets[name] = Triplets(cached.U, remaining, cached.V)


def _within(value: object, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and low <= value <= high


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


__all__ = ["S2D", "Refresh", "S2DConfig", "Selection", "WeightedLayer", "penalty", "penalty_gradient"]
