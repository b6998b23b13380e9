"""What one activation site's 4-bit error is made of: the documents of `attribution`.

Errors are at 4 bits with the best clipping range, over the variance of the bulk; shares may overlap.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["triplet", "gain", "neuron", "none", "unknown"]
# Error of a normal distribution on a symmetric 4-bit grid with the best clipping range, over its variance.
NORMAL_ERROR = 0.0115
# Up to this error a site has no outlier worth a cause: about 15 dB.
HARMLESS = 0.03
# A cause is named when taking it out removes at least this share of the excess error.
NAMED_SHARE = 0.25


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
        harm: relative error power of the model's output when this site alone is quantized at 4 bits (`site_harm`); None
            where it was not measured.
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
    harm: float | None = None

    @property
    def excess(self) -> float:
        """Error above that of a normal distribution; 0 for a harmless site."""
        return self.error - NORMAL_ERROR if self.error > HARMLESS else 0.0

    @property
    def reach(self) -> float:
        """Share of the excess error that S2D, as it flags now, can take away."""
        return 0.0 if self.flagged is None else self.flagged.share

    @property
    def excess_share(self) -> float:
        """Share of the error that is excess: what no cause can take away, the grid makes. 0 for a harmless site."""
        return self.excess / self.error if self.error > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"reach": self.reach}


__all__ = ["Channel", "SiteAttribution", "Verdict", "Without"]
