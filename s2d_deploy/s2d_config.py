"""How hard S2D presses, what it presses, and how often it looks again. Checked when it is made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from s2d_deploy.errors import RecipeError, message

Application = Literal["coupled", "decoupled"]
Select = Literal["paper", "sites"]
DEFAULT_OUTLIERS = 32


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
        drift_every: steps between two measurements of the drift; read only with `refresh_drift`.
        refresh_batches: at most this many of the calibration batches, evenly spaced, are run at a refresh; None: all.
            The first selection always runs all of them.
        outliers: how many of a layer's largest activations PCDR is averaged over.
        split: pattern of module paths (fnmatch) -> number of equal shares of the output rows that are decomposed and
            judged one by one: ``{"*.qkv": 3}`` for the parts of a fused projection, ``{"*.qkv": 36}`` for the heads.
        select: "paper": layers by PCDR at their own outputs. "sites": the components that make the outliers at the
            quantized sites, norm gains and single neurons included (`site_decay`); always decoupled.

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
    drift_every: int = 10
    refresh_batches: int | None = 2
    outliers: int = DEFAULT_OUTLIERS
    split: Mapping[str, int] = field(default_factory=dict)
    select: Select = "paper"

    def __post_init__(self) -> None:
        drift, batches = self.refresh_drift, self.refresh_batches
        checks = [
            ("n", _within(self.n, 1, 8), "a number from 1 to 8"),
            ("weight_decay", _within(self.weight_decay, 0, 1) and self.weight_decay < 1, "a number in [0, 1)"),
            ("tau", _within(self.tau, 0, 1) and self.tau > 0, "a number in (0, 1]"),
            ("k_max", _whole(self.k_max, 1, 64), "a whole number from 1 to 64"),
            ("refresh_every", _whole(self.refresh_every, 1, 10**9), "a whole number of steps, at least 1"),
            ("application", self.application in ("coupled", "decoupled"), "'coupled' or 'decoupled'"),
            ("decoupled_factor", _within(self.decoupled_factor, 0, 1e6), "a number from 0 to 1e6"),
            ("refresh_drift", drift is None or (_within(drift, 0, 1) and drift > 0), "a number in (0, 1], or nothing"),
            ("drift_every", _whole(self.drift_every, 1, 10**9), "a whole number of steps, at least 1"),
            ("refresh_batches", batches is None or _whole(batches, 1, 10**9), "a whole number, or nothing for all"),
            ("outliers", _whole(self.outliers, 1, 100_000), "a whole number, at least 1"),
            ("split", _is_split(self.split), "patterns with whole numbers from 1 to 4096, e.g. {'*.qkv': 3}"),
            ("select", self.select in ("paper", "sites"), "'paper' or 'sites'"),
            (
                "application",
                self.select != "sites" or self.application != "coupled",
                "'decoupled' with select = 'sites'",
            ),
            ("split", self.select != "sites" or not self.split, "nothing with select = 'sites'"),
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


def _within(value: object, low: float, high: float) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and low <= value <= high


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_split(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and _whole(v, 1, 4096) for k, v in value.items())
