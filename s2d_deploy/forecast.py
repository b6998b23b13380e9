"""Whether S2D will help at 4-bit activations: one sentence from the attributions of all sites.

What is lost: how one layer's change acts on the next, and how errors of sites add up to one of the output.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from s2d_deploy.site_attribution import HARMLESS, NAMED_SHARE, SiteAttribution


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


__all__ = ["Forecast", "forecast"]
