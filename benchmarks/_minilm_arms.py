"""The arms of `minilm_s2d.py`: what is done to the model before it is quantized.

A new arm is one entry of `ARMS`: a sentence, a function that changes the model in place, and the options it reads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minilm_one_shot import OUTPUT
from torch import nn

from s2d_deploy.condition import condition
from s2d_deploy.diagnose import diagnose
from s2d_deploy.equalize import equalize
from s2d_deploy.pcdr import Batch
from s2d_deploy.s2d import S2DConfig
from s2d_deploy.site_decay import SiteDecay


@dataclass(frozen=True, slots=True)
class Data:
    """One seed's sentences as padded batches."""

    calibration: list[Batch]
    train: list[Batch]
    held_out: list[Batch]


Facts = dict[str, Any]
Apply = Callable[[nn.Module, Data, argparse.Namespace, int], Facts]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of treating the model.

    Attributes:
        about: for the reader of the result file.
        apply: changes the model in place, given the data, the options and the seed. What it finds about the
            flagged layers, before and after, is its fact "layers".
        options: the command-line options that it reads, beside those that all arms read.
    """

    about: str
    apply: Apply
    options: tuple[str, ...] = ()


def flagged(layers: Sequence[dict[str, Any]], tau: float) -> dict[str, Any]:
    """Flagged layers, before and after, rounded so that result files stay readable.

    Args:
        layers: of a `ConditioningResult`. The control's was judged by S2D's default tau, so it is judged here again.
        tau: PCDR from which on a layer is flagged.
    """
    kept = ("pcdr", "k_target", "sigma_max", "max_abs_activation", "kurtosis", "singular_values")
    return {
        layer["name"]: {when: {key: _rounded(layer[when][key]) for key in kept} for when in ("before", "after")}
        for layer in layers
        if max(layer["before"]["pcdr"], default=0.0) >= tau
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _nothing(model: nn.Module, data: Data, chosen: argparse.Namespace, _: int) -> Facts:
    found = [layer.to_dict() for layer in diagnose(model, data.calibration, tau=chosen.tau, k_max=chosen.k_max)]
    return {"layers": flagged([{**layer, "before": layer, "after": layer} for layer in found], chosen.tau)}


def _trained(config: Callable[[argparse.Namespace], S2DConfig | None]) -> Apply:
    """Distillation with this S2D, or without."""

    def apply(model: nn.Module, data: Data, chosen: argparse.Namespace, seed: int) -> Facts:
        result = condition(
            model,
            "distill",
            lambda: data.train,
            data.calibration,
            config(chosen),
            steps=chosen.steps,
            lr=chosen.lr,
            warmup=chosen.warmup,
            seed=seed,
            progress=lambda done, steps, loss: (
                print(f"  step {done}/{steps}, loss {loss:.4f}", file=sys.stderr) if done % 20 == 0 else None
            ),
        )
        return {
            "method": result.method,
            "train_seconds": round(result.seconds, 1),
            "losses": [round(loss, 6) for loss in result.losses],
            "refreshes": len(result.refreshes),
            "layers": flagged(result.layers, chosen.tau),
        }

    return apply


def _config(chosen: argparse.Namespace, **changes: Any) -> S2DConfig:
    given = {"decoupled_factor": chosen.factor, **changes}
    return S2DConfig(tau=chosen.tau, k_max=chosen.k_max, refresh_every=chosen.refresh, **given)


def _centred(model: nn.Module, data: Data, chosen: argparse.Namespace, _: int) -> Facts:
    """What `select: sites` does before its first step, and nothing else."""
    decay = SiteDecay(model, _config(chosen, select="sites"))
    decay.select(data.calibration)
    return {"centred": decay.centred, "components": len(decay.components)}


def _equalized(bypass: bool) -> Apply:
    def apply(model: nn.Module, data: Data, *_: Any) -> Facts:
        changes = equalize(model, data.calibration, insert=True, bypass=bypass, output=OUTPUT)
        return {"changes": len(changes)}

    return apply


_STEPS = ("steps", "batch", "lr", "warmup")
_PRESS = (*_STEPS, "refresh")
ARMS: dict[str, Arm] = {
    "original": Arm("the model as it comes", _nothing),
    "control": Arm("the same distillation steps without S2D", _trained(lambda _: None), _STEPS),
    "s2d": Arm(
        "distillation with S2D on the flagged layers, decoupled", _trained(lambda c: _config(c)), (*_PRESS, "factor")
    ),
    "s2d-coupled": Arm(
        "distillation with S2D as the paper writes it: the penalty's gradient through AdamW",
        _trained(lambda c: _config(c, application="coupled", weight_decay=c.decay)),
        (*_PRESS, "decay"),
    ),
    "s2d-sites": Arm(
        "distillation with S2D at the quantized sites: what makes their outliers, gains and neurons included",
        _trained(lambda c: _config(c, select="sites", decoupled_factor=c.sites_factor)),
        (*_PRESS, "sites_factor"),
    ),
    "centre": Arm("no training: the sites' channels are centred, which is exact in float", _centred),
    "insert": Arm("no training: elementwise layers even out the channels of the sites", _equalized(bypass=False)),
    "bypass": Arm("as insert, and up to 4 channels of a site in float", _equalized(bypass=True)),
}
DEFAULT_ARMS = ("original", "control", "s2d", "s2d-coupled")
