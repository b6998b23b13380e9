"""Whether S2D will help at 4-bit activations: one sentence from the attributions and the harm of all sites.

Each site is weighed by the harm that it does to the model's output (`site_harm`), because a site may lose its own
numbers without the output noticing. What is lost: harm is taken to shrink in proportion to a site's error, and the
harms of sites to add up; both hold to first order only. Nothing is said about what training does to the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from s2d_deploy.site_attribution import HARMLESS, SiteAttribution

# "Will help" from this share of the harm on. A rule of thumb, held against two measurements: all-MiniLM-L6-v2 and a ViT
# on CIFAR-10 (docs/where-s2d-pays.md). S2D gained nothing on either, and "will not help" is said for both. A "will
# help" has so far come true on planted outliers only.
HELPS_FROM = 0.25
# The reach by harm and the reach by error are both named where they differ by more.
DIFFERS = 0.1
CAUSES = {
    "gain": "gains and biases of norms",
    "neuron": "single channels or neurons",
    "triplet": "leading triplets",
    "none": "no single cause",
    "unknown": "producers that were not recognized",
    "grid": "the 4-bit grid itself, without outliers",
    "unmeasured": "sites that were not measured singly",
}


@dataclass(frozen=True, slots=True)
class Forecast:
    """Whether S2D will help at 4-bit activations.

    Attributes:
        helps: the answer; None where nothing can be said.
        reach: share of the harm at the output that the flagged layers make, 0 to 1; 0 where harm was not measured.
        shares: the harm by cause, summing to 1: the words of `SiteAttribution.verdict`, each with the part of its
            sites' error that goes with it; under "none" what else exceeds a normal distribution; under "grid" what a
            normal distribution would cost as well; under "unmeasured" sites that were not measured singly. Of the
            excess error, and without the last two, where harm was not measured.
        sentence: the answer with its reason.
        reach_by_error: share of all sites' excess error that the flagged layers make, whatever it does to the output.
        harm: sum of the sites' harm, as relative error power of the output; None where it was not measured.
    """

    helps: bool | None
    reach: float
    shares: dict[str, float]
    sentence: str
    reach_by_error: float = 0.0
    harm: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def forecast(sites: Iterable[SiteAttribution], *, flagged: int, unmeasured: float = 0.0) -> Forecast:
    """Whether S2D will help at 4-bit activations, from the sites' attributions.

    Args:
        sites: of `attribute`, with the harm of `site_harm`.
        flagged: how many layers S2D would touch.
        unmeasured: joint harm of the sites that have none of their own (`Harm.rest`).
    """
    known = list(sites)
    bad = [s for s in known if s.excess > 0]
    if not bad:
        sentence = (
            f"S2D will not help at 4-bit activations here, because no site needs it: none of {len(known)} quantized "
            f"sites loses more than {HARMLESS:.0%} of its variance at 4 bits."
        )
        return Forecast(False if known else None, 0.0, {}, sentence)
    excess = sum(s.excess for s in bad)
    by_error = sum(s.reach * s.excess for s in bad) / excess
    if all(s.harm is None for s in known):
        return _by_error(known, flagged, by_error)
    total = sum(s.harm or 0.0 for s in known) + unmeasured
    if total <= 0:
        sentence = (
            "S2D will not help at 4-bit activations here, because no site does harm: the model's output stays as it is "
            "when any of them is quantized."
        )
        return Forecast(False, 0.0, {}, sentence, by_error, 0.0)
    # What of a site's harm an outlier makes; the rest of it is the grid's.
    weights = {s.site: (s.harm or 0.0) / total * s.excess_share for s in known}
    shares = _shares(known, weights)
    shares["grid"] = sum((s.harm or 0.0) / total * (1 - s.excess_share) for s in known)
    shares["unmeasured"] = unmeasured / total
    shares = {cause: share for cause, share in shares.items() if share > 0}
    reach = sum(s.reach * weights[s.site] for s in known)
    triplets = sum(s.triplets.share * weights[s.site] for s in known if s.triplets is not None)
    touched = f"the {flagged} layer(s) that it flags make {reach:.0%} of the harm that the sites do to the output"
    if abs(reach - by_error) > DIFFERS:
        but = f"these sites do {'less' if reach < by_error else 'more'} harm than their error suggests"
        touched += f" (of the error at the {len(bad)} sites that need repair they make {by_error:.0%}, but {but})"
    causes = f"(causes of the harm: {_listed(shares)})"
    helps, sentence = _answer(reach, triplets, shares, flagged, touched, causes)
    return Forecast(helps, reach, shares, sentence, by_error, total)


def _answer(
    reach: float, triplets: float, shares: dict[str, float], flagged: int, touched: str, causes: str
) -> tuple[bool | None, str]:
    unknown = shares.get("unknown", 0.0)
    outliers = sum(share for cause, share in shares.items() if cause not in ("grid", "unmeasured"))
    if reach >= HELPS_FROM:
        return True, (
            f"S2D will help at 4-bit activations here, because {touched}; from {HELPS_FROM:.0%} on this is said, by a "
            f"rule of thumb that is so far proven on planted outliers only {causes}."
        )
    if unknown > 0.5 * outliers and reach + unknown >= HELPS_FROM:
        return None, (
            "Whether S2D helps at 4-bit activations cannot be said here: the producers of the sites whose outliers do "
            f"most harm were not recognized {causes}."
        )
    why = f"because {touched}" if flagged else "because it flags no layer"
    if triplets >= HELPS_FROM:
        that = "that harm" if flagged else "the harm that the sites do to the output"
        return False, (
            f"S2D will not help at 4-bit activations here as it is set, {why}; but leading triplets do make "
            f"{triplets:.0%} of {that}: a lower tau or a higher k_max would reach them {causes}."
        )
    return False, f"S2D will not help at 4-bit activations here, {why} {causes}."


def _by_error(known: list[SiteAttribution], flagged: int, by_error: float) -> Forecast:
    """Without harm: only that S2D reaches no site can be said."""
    excess = {s.site: s.excess for s in known}
    total = sum(excess.values())
    shares = _shares(known, {site: value / total for site, value in excess.items()})
    most = max(s.reach for s in known if s.excess > 0)
    causes = f"(causes of the error: {_listed(shares)})"
    if most < HELPS_FROM and shares.get("unknown", 0.0) < HELPS_FROM:
        why = f"the {flagged} layer(s) that it flags make at most {most:.0%} of the error at any site that needs repair"
        why = why if flagged else "it flags no layer"
        sentence = f"S2D will not help at 4-bit activations here, because {why} {causes}."
        return Forecast(False, 0.0, shares, sentence, by_error)
    sentence = (
        f"Whether S2D helps at 4-bit activations cannot be said here: the {flagged} layer(s) that it flags make "
        f"{by_error:.0%} of the error at the sites that need repair, but what these sites do to the model's output was "
        f"not measured {causes}."
    )
    return Forecast(None, 0.0, shares, sentence, by_error)


def _shares(sites: list[SiteAttribution], weights: dict[str, float]) -> dict[str, float]:
    """By cause, what the verdict of each site makes of its weight; the remainder has no single cause."""
    shares: dict[str, float] = {}
    for s in sites:
        own = {"triplet": s.triplets, "gain": s.gain, "neuron": s.single}.get(s.verdict)
        part = 1.0 if s.verdict == "unknown" else own.share if own is not None else 0.0
        shares[s.verdict] = shares.get(s.verdict, 0.0) + part * weights[s.site]
        shares["none"] = shares.get("none", 0.0) + (1 - part) * weights[s.site]
    return {cause: share for cause, share in shares.items() if share > 0}


def _listed(shares: dict[str, float]) -> str:
    return ", ".join(f"{CAUSES[cause]} {share:.0%}" for cause, share in sorted(shares.items(), key=lambda e: -e[1]))


__all__ = ["DIFFERS", "HELPS_FROM", "Forecast", "forecast"]
