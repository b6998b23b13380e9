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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, RecipeError, message
from s2d_deploy.pcdr import Batch, OutlierCollector, Outliers, forward_batches, pcdr, smallest_k
from s2d_deploy.s2d_config import Application, S2DConfig
from s2d_deploy.sharding import add_low_rank, bare, gathered, processes, reshard
from s2d_deploy.spectral import (
    BATCH_BYTES,
    Triplets,
    WeightedLayer,
    is_transposed,
    parts_of,
    refreshed_triplets,
    require_finite_weights,
    residual,
    top_triplets,
    weight_matrix,
    weighted_layers,
)

log = logging.getLogger(__name__)

# A decoupled step takes at most this share of a singular value, whatever lr * factor * s^(n-1) says.
MAX_SHRINK = 0.5


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

    With the optimizer given, it acts by itself, until `detach`, in every ``optimizer.step()``:

        s2d = S2D(model, S2DConfig(), optimizer=optimizer)
        s2d.select(calibration_batches)

    Without, call in every step ``backward(); before_step(); optimizer.step(); after_step(lr)``.

    With a process group (DDP, FSDP2) every process must make the same calls with the same calibration data. Each
    decomposes its share of the layers and all get the same result; a sharded weight is gathered for it, and changed
    shard by shard. Make it after the model is wrapped.

    Args:
        model: trained in place.
        config: strength and rhythm.
        layers: module paths that may be flagged; None: every Linear and Conv. Frozen weights
            (``requires_grad=False``), and with `optimizer` those that it does not train, are never touched. Layers
            that share one weight are pressed once.
        optimizer: trains the model; the learning rate of each weight's own group is used.

    Raises:
        ModelError: an unknown layer, or rows that `config.split` cannot share out.
        RecipeError: a pattern in `config.split` matches no layer; `config.select` is not "paper".
    """

    def __init__(
        self,
        model: nn.Module,
        config: S2DConfig,
        layers: list[str] | None = None,
        *,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        if config.select != "paper":
            raise RecipeError(
                message("S2D presses by the paper's rule", expected="select = 'paper'", fix="use site_decay.SiteDecay")
            )
        self.model = bare(model)
        self.config = config
        self._optimizer = None if optimizer is None else _innermost(optimizer)
        trained = (
            None if self._optimizer is None else {id(p) for g in self._optimizer.param_groups for p in g["params"]}
        )
        self.layers = {
            name: layer
            for name, layer in weighted_layers(self.model, layers).items()
            if layer.weight.requires_grad and (trained is None or id(layer.weight) in trained)
        }
        self.parts = {part.name: part for part in parts_of(self.layers, config.split)}
        owners: dict[tuple[int, int, int], str] = {}
        # The first layer that holds a weight speaks for all that share it: name -> owner's name.
        self._owner = {
            name: owners.setdefault((id(self.layers[part.layer].weight), part.index, part.count), name)
            for name, part in self.parts.items()
        }
        self._calibration: Sequence[Batch] | None = None
        self._triplets: dict[str, Triplets] = {}
        self._largest: dict[str, float] = {}
        self._k_target: dict[str, int] = {}
        self.selections: dict[str, Selection] = {}
        self.refreshes: list[Refresh] = []
        self.step = 0
        self._warned: set[str] = set()
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        if self._optimizer is not None:
            self._handles = [
                self._optimizer.register_step_pre_hook(lambda *_: self.before_step()),
                self._optimizer.register_step_post_hook(lambda *_: self.after_step()),
            ]
        coarse = sorted({str(m.weight.dtype) for m in self.layers.values()} - {"torch.float32", "torch.float64"})
        if coarse:
            log.warning(
                "weights in %s: a step of S2D can be lost in rounding; keep them in float32, and use autocast",
                ", ".join(coarse),
            )

    @property
    def flagged(self) -> dict[str, int]:
        """k_target of every weight (or part) that is being pressed, by the name of the first layer that holds it."""
        return {name: k for name, k in self._k_target.items() if k > 0}

    def triplets(self, name: str) -> Triplets:
        """The cached top k_max triplets of layer (or part) `name`."""
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
        since = self.step - self.refreshes[-1].step
        if since > 0:
            limit = self.config.refresh_drift
            if self.step % self.config.refresh_every == 0:
                self._refresh("count")
            elif limit is not None and since % self.config.drift_every == 0 and self.drift() > limit:
                self._refresh("drift")
        if self.config.application == "coupled":
            for name, k in self.flagged.items():
                part, kept = self.parts[name], self._triplets[name].top(k)
                layer = self.layers[part.layer]
                if layer.weight.grad is None:
                    layer.weight.grad = torch.zeros_like(layer.weight)
                left = kept.U * kept.S.pow(self.config.n)
                add_low_rank(layer.weight.grad, layer, part, left, kept.V, self.config.weight_decay)

    def after_step(self, lr: float | None = None) -> None:
        """After the optimizer's step. Decoupled: ``W -= lr * factor * U S^n V^T`` on the flagged triplets.

        Args:
            lr: the learning rate of this step; None: of each weight's own group in the optimizer that was given.

        Raises:
            ModelError: no rate, and no optimizer either.
        """
        rates: dict[int, float] = {}
        if lr is None:
            if self._optimizer is None:
                raise ModelError(
                    message("S2D knows no learning rate", fix="call after_step(lr), or give the optimizer")
                )
            groups = self._optimizer.param_groups
            rates = {id(p): float(group["lr"]) for group in groups for p in group["params"]}
        if self.config.application == "decoupled":
            for name, k in self.flagged.items():
                weight = self.layers[self.parts[name].layer].weight
                self._shrink(name, k, rates[id(weight)] if lr is None else lr)
        self.step += 1

    def detach(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def penalty(self) -> float:
        """The penalty's value over the flagged triplets, from the cached singular values."""
        values = [
            float(penalty(self._triplets[name].S[:k], self.config.n, self.config.weight_decay))
            for name, k in self.flagged.items()
        ]
        return sum(values)

    def drift(self) -> float:
        """The largest residual of the cached triplets that are being pressed (see `spectral.residual`)."""
        names, (rank, world) = list(self.flagged), processes()
        worst = {"0": 0.0}
        for number, name in enumerate(names):
            matrix = self._matrix(name)
            if number % world == rank:
                worst[str(rank)] = max(
                    worst.get(str(rank), 0.0), residual(matrix, self._triplets[name].top(self._k_target[name]))
                )
        return float(max(gathered(worst).values()))

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
        unknown = sorted(set(state["triplets"]) - set(self.parts))
        if unknown:
            raise ModelError(message(f"the S2D state names layers that the model has not: {', '.join(unknown)}"))
        if batches is not None:
            self._calibration = batches if isinstance(batches, Sequence) else list(batches)
        if self._calibration is None:
            raise ModelError(message("S2D cannot refresh without calibration data", fix="pass batches"))
        misfit = [
            f"{name} {[len(t['U']), len(t['V'])]}"
            for name, t in state["triplets"].items()
            if (len(t["U"]), len(t["V"])) != self._shape(name)
        ]
        if misfit:
            raise ModelError(message(f"the S2D state is of another model: {', '.join(misfit)} does not fit its layer"))
        self.step = int(state["step"])
        self._k_target = dict(state["k_target"])
        self._triplets = {
            name: Triplets(*(t[key].detach().clone().to(self._device(name)) for key in ("U", "S", "V")))
            for name, t in state["triplets"].items()
        }
        self._largest = {name: float(t.S[0]) for name, t in self._triplets.items()}
        self.selections = {name: Selection(name, tuple(r), k) for name, r, k in state["selections"]}
        self.refreshes = [Refresh(*entry) for entry in state["refreshes"]]

    def _refresh(self, reason: str) -> None:
        if self._calibration is None:
            raise ModelError(message("S2D cannot refresh without calibration data", fix="call select(batches)"))
        drift = self.drift()
        require_finite_weights(self.layers)
        limit = self.config.refresh_batches if self.refreshes else None
        batches = self._calibration if limit is None else self._calibration[:: -(-len(self._calibration) // limit)]
        config, names = self.config, list(self.layers)
        with OutlierCollector(self.model, top=config.outliers, layers=names, split=config.split) as collector:
            forward_batches(self.model, batches)
        reshard(self.model)
        fresh, ratios = self._decompose(collector.outliers())
        self._triplets, self._k_target = fresh, {}
        self._largest = {name: float(t.S[0]) for name, t in fresh.items()}
        self.selections = {}
        for name in self.parts:
            if name not in ratios:
                continue
            owner = self._owner[name]
            k = smallest_k(ratios[name], self.config.tau, min(self._shape(owner)))
            self.selections[name] = Selection(name, tuple(ratios[name]), k)
            known = self._k_target.get(owner, 0)
            # Of several layers that share a weight, the one that needs the fewest triplets decides.
            self._k_target[owner] = min(k, known) if k and known else max(k, known)
        self.refreshes.append(Refresh(self.step, reason, drift))
        log.info("S2D step %d (%s): %d of %d matrices flagged", self.step, reason, len(self.flagged), len(self.parts))

    def _decompose(self, outliers: dict[str, Outliers]) -> tuple[dict[str, Triplets], dict[str, list[float]]]:
        """Triplets by owner and PCDR by name. Every process gathers each matrix, and decomposes its share of them."""
        rank, world = processes()
        reached = [name for name in self.parts if name in outliers]
        users: dict[str, list[str]] = {}
        for name in reached:
            users.setdefault(self._owner[name], []).append(name)
        shapes: dict[tuple[int, int], list[str]] = {}
        for owner in users:
            shapes.setdefault(self._shape(owner), []).append(owner)
        mine: dict[str, Any] = {}
        for (n, k), owners in shapes.items():
            room = max(1, BATCH_BYTES // (4 * n * k)) * world
            for start in range(0, len(owners), room):
                matrices = [self._matrix(owner) for owner in owners[start : start + room]]
                share = [i for i in range(len(matrices)) if i % world == rank]
                found = self._triplets_of([matrices[i] for i in share], [owners[start + i] for i in share])
                for i, triplets in zip(share, found, strict=True):
                    owner = owners[start + i]
                    ratios = {name: pcdr(matrices[i], triplets, outliers[name]) for name in users[owner]}
                    sides = (triplets.U, triplets.S, triplets.V)
                    mine[owner] = ([side.cpu() for side in sides] if world > 1 else sides, ratios)
        every = gathered(mine)
        fresh = {owner: Triplets(*(side.to(self._device(owner)) for side in every[owner][0])) for owner in users}
        return fresh, {name: ratios for owner in users for name, ratios in every[owner][1].items()}

    def _triplets_of(self, matrices: list[Tensor], owners: list[str]) -> list[Triplets]:
        k = self.config.k_max
        if not self.refreshes:  # the first time with proof; later ones are corrected by the next
            return [top_triplets(matrix, k) for matrix in matrices]
        old = [self._triplets.get(owner) for owner in owners]
        return refreshed_triplets(matrices, k, [None if t is None else t.V for t in old])

    def _matrix(self, name: str) -> Tensor:
        """The part's matrix, float32 [N, K]. Collective where the weight is sharded."""
        part = self.parts[name]
        matrix = weight_matrix(self.layers[part.layer])
        return matrix[part.rows(matrix.shape[0])]

    def _shape(self, name: str) -> tuple[int, int]:
        part = self.parts[name]
        layer = self.layers[part.layer]
        n, *rest = layer.weight.shape if not is_transposed(layer) else reversed(layer.weight.shape)
        return n // part.count, math.prod(rest)

    def _device(self, name: str) -> torch.device:
        device: torch.device = self.layers[self.parts[name].layer].weight.device
        return device

    def _shrink(self, name: str, k: int, lr: float) -> None:
        part, cached = self.parts[name], self._triplets[name]
        layer, singular = self.layers[part.layer], cached.S[:k]
        strength = lr * self.config.decoupled_factor
        taken = torch.minimum(strength * singular.pow(self.config.n), MAX_SHRINK * singular)
        # Judged by the largest singular value at the last refresh, on the host: asking the device would wait for it.
        if name not in self._warned and strength * self._largest[name] ** (self.config.n - 1) > MAX_SHRINK:
            self._warned.add(name)
            log.warning(
                "layer %r: lr * decoupled_factor * s^(n-1) exceeds %s, the step is limited to that share of s; "
                "choose a smaller decoupled_factor",
                name,
                MAX_SHRINK,
            )
        add_low_rank(layer.weight, layer, part, cached.U[:, :k] * taken, cached.V[:, :k], -1.0)
        remaining = cached.S.clone()
        remaining[:k] -= taken
        self._triplets[name] = Triplets(cached.U, remaining, cached.V)


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside wrappers such as Accelerate's: the one whose step really is taken."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    found: torch.optim.Optimizer = optimizer
    return found


__all__ = [
    "S2D",
    "Application",
    "Refresh",
    "S2DConfig",
    "Selection",
    "WeightedLayer",
    "penalty",
    "penalty_gradient",
]
