"""Does a runtime agree with itself? The same samples in other batches, again, and from a second build.

A runtime may take another kernel for another batch size, so a float output may move by its last bits; codes that
move, and outputs that move by more, mean that a result depends on who else was in the batch. Nothing here knows the
simulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from s2d_deploy.parity import max_error
from s2d_deploy.session import Array, Session


@dataclass(frozen=True, slots=True)
class Agreement:
    """One comparison of a runtime with itself.

    Attributes:
        what: ``"run again"``, ``"batches of 1"``, ``"reversed"``, ``"second build"``.
        identical: outputs agree bit for bit.
        max_error: largest difference of an output, relative to the output's largest magnitude.
        codes_checked, codes_different: over all sites; 0 and 0 where codes are not shown.
    """

    what: str
    identical: bool
    max_error: float
    codes_checked: int
    codes_different: int


def self_consistency(
    session: Session,
    feeds: Mapping[str, Array],
    output: str,
    sizes: Sequence[int] | None = None,
    second: Session | None = None,
) -> list[Agreement]:
    """Compare a session with itself.

    Args:
        session: open.
        feeds: one batch; every input has the samples along its first axis.
        output: name of the output to compare.
        sizes: batch sizes to cut it into; by default 1, an odd one and a half.
        second: a session of another build of the same artifact.
    """
    count = len(next(iter(feeds.values())))
    if sizes is None:
        sizes = sorted({1, max(1, count // 2), max(1, count - 1)} - {count})
    base, codes = session.run(feeds)[output], session.codes(feeds)
    found = [_compare("run again", base, session.run(feeds)[output], codes, session.codes(feeds))]
    for size in sizes:
        pieces = [{n: a[i : i + size] for n, a in feeds.items()} for i in range(0, count, size)]
        found.append(_pieces(f"batches of {size}", session, pieces, output, base, codes))
    if count > 1:
        turned = {n: np.ascontiguousarray(a[::-1]) for n, a in feeds.items()}
        shown = {site: _turned(c, count) for site, c in session.codes(turned).items()}
        found.append(_compare("in reverse order", base, session.run(turned)[output][::-1], codes, shown))
    if second is not None:
        found.append(_compare("second build", base, second.run(feeds)[output], codes, second.codes(feeds)))
    return found


def to_dicts(found: Sequence[Agreement]) -> list[dict[str, Any]]:
    """For the report: ``parity.consistency``."""
    return [asdict(a) for a in found]


def agrees(found: Sequence[Agreement], tolerance: float = 1e-4, share: float = 1e-4) -> bool:
    """Whether nothing moved by more than float rounding may move it: codes by at most `share`, outputs `tolerance`."""
    return all(a.max_error <= tolerance and a.codes_different <= share * max(a.codes_checked, 1) for a in found)


def _pieces(
    what: str,
    session: Session,
    pieces: Sequence[Mapping[str, Array]],
    output: str,
    base: Array,
    codes: Mapping[str, Array],
) -> Agreement:
    results = np.concatenate([session.run(p)[output] for p in pieces])
    shown = [session.codes(p) for p in pieces] if codes else []
    joined = {site: np.concatenate([s[site] for s in shown]) for site in codes}
    return _compare(what, base, results, codes, joined)


def _compare(what: str, base: Array, other: Array, codes: Mapping[str, Array], shown: Mapping[str, Array]) -> Agreement:
    size = max(float(np.abs(base).max()), 1e-30) if base.size else 1.0
    checked = different = 0
    for site, wanted in codes.items():
        got = shown.get(site)
        checked += wanted.size
        same = got is not None and got.shape == wanted.shape
        different += int(np.count_nonzero(wanted != got)) if same else wanted.size
    return Agreement(what, bool(np.array_equal(base, other)), max_error(base, other) / size, checked, different)


def _turned(codes: Array, count: int) -> Array:
    """Codes of reversed samples in the first order; a first axis may hold several rows of a sample."""
    rows = codes.reshape(count, -1, *codes.shape[1:])[::-1]
    result: Array = rows.reshape(codes.shape)
    return result


__all__ = ["Agreement", "agrees", "self_consistency", "to_dicts"]
