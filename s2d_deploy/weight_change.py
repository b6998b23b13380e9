"""One place of a model that one-shot conditioning changed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Change:
    """One place that was changed.

    Attributes:
        where: the layers.
        what: "shrunk", "refitted", "centred", "folded", "inserted", or "neurons".
        before: what the change acts on, before: the relative error of the quantized Linear for an
            equalization, s_max for a shrinking, the relative output error that a refit found, the largest magnitude
            at a site that was centred.
        after: and after.
        detail: a sentence.
    """

    where: tuple[str, ...]
    what: str
    before: float
    after: float
    detail: str


__all__ = ["Change"]
