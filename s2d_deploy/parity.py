"""Comparisons of what the simulation promised with what a runtime computed. Arrays in, figures out.

Codes and accumulators are integers and are compared exactly. Float outputs are compared by
signal-to-noise ratio, largest error and top-1 answers. A NaN is never averaged away: it is named and
refused, because every figure computed over one is meaningless.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from s2d_deploy.errors import DataError, message

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class SiteDifference:
    """One site or op.

    Attributes:
        name: the site (codes) or the op (accumulators).
        checked: elements compared.
        different: elements that are not equal.
        largest: the largest absolute difference: 1 is a flip at a rounding boundary, more is a fault upstream.
    """

    name: str
    checked: int
    different: int
    largest: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """All sites of one run, in the order of `expected`.

    Attributes:
        sites: what was compared.
        missing: expected names that the runtime did not show; they are not counted as checked.
        unexpected: names that only the runtime shows.
    """

    sites: tuple[SiteDifference, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    @property
    def checked(self) -> int:
        """Elements compared over all sites."""
        return sum(site.checked for site in self.sites)

    @property
    def different(self) -> int:
        """Elements that differ over all sites."""
        return sum(site.different for site in self.sites)

    def first_difference(self) -> SiteDifference | None:
        """The first site, in the order of `expected`, that differs at all."""
        return next((site for site in self.sites if site.different), None)

    def to_dict(self) -> list[dict[str, Any]]:
        """The report's ``parity.sites``."""
        return [
            {"site": s.name, "checked": s.checked, "different": s.different, "largest": s.largest} for s in self.sites
        ]


def snr_db(reference: Array, other: Array, *, name: str = "output") -> float | None:
    """Signal-to-noise ratio in dB: ``10 log10(sum reference^2 / sum (reference - other)^2)``, in FP64.

    None where the arrays are identical: the ratio is infinite, which JSON cannot hold. (`output_parity`
    states ``"identical": true`` beside it.) A reference of zeros with an error gives ``-inf`` mathematically;
    the smallest FP64 stands in for the signal, so that the result is finite and very negative.

    Raises:
        DataError: the shapes differ, or an array holds NaN or an infinity.
    """
    a, b = _finite_pair(reference, other, name)
    noise = float(np.sum(np.square(a - b)))
    if noise == 0.0:  # also where the squares underflow, which no other measure could tell from equal
        return None
    signal = max(float(np.sum(np.square(a))), float(np.finfo(np.float64).tiny))
    return 10.0 * float(np.log10(signal) - np.log10(noise))


def max_error(reference: Array, other: Array, *, name: str = "output") -> float:
    """The largest absolute difference, in FP64; 0 for empty arrays.

    Raises:
        DataError: the shapes differ, or an array holds NaN or an infinity.
    """
    a, b = _finite_pair(reference, other, name)
    return float(np.max(np.abs(a - b))) if a.size else 0.0


def top1_flips(reference: Array, other: Array, *, name: str = "logits") -> int:
    """In how many rows the largest entry of the last axis stands elsewhere. Of equals the first one counts.

    Args:
        reference: logits, shape ``(..., classes)``.
        other: the same shape.

    Raises:
        DataError: the shapes differ or have no classes, or an array holds NaN or an infinity.
    """
    a, b = _finite_pair(reference, other, name)
    if not a.ndim or not a.shape[-1]:
        raise DataError(message(f"{name}: no classes to compare", found=f"shape {a.shape}"))
    return int(np.sum(np.argmax(a, axis=-1) != np.argmax(b, axis=-1)))


def output_parity(reference: Array, other: Array, *, name: str = "output") -> dict[str, Any]:
    """``{snr_db, max_error, identical}``; `snr_db` is null where the arrays are identical.

    Raises:
        DataError: the shapes differ, or an array holds NaN or an infinity.
    """
    error = max_error(reference, other, name=name)
    return {"snr_db": snr_db(reference, other, name=name), "max_error": error, "identical": error == 0.0}


def compare_codes(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> Comparison:
    """Codes by site, element by element. Signed and unsigned containers are compared by value.

    Raises:
        DataError: a site's shapes differ, or an array does not hold integers; the site is named.
    """
    return _compare(expected, actual, "site")


def compare_accumulators(expected: Mapping[str, Array], actual: Mapping[str, Array]) -> Comparison:
    """Teacher-forced int32 accumulators by op, element by element.

    Raises:
        DataError: an op's shapes differ, or an array does not hold integers; the op is named.
    """
    return _compare(expected, actual, "op")


def _compare(expected: Mapping[str, Array], actual: Mapping[str, Array], kind: str) -> Comparison:
    sites = []
    for name, want in expected.items():
        if name not in actual:
            continue
        got = actual[name]
        _same_shape(want, got, f"{kind} {name!r}")
        for who, array in (("simulation", want), ("runtime", got)):
            if array.dtype.kind not in "iu":
                raise DataError(
                    message(
                        f"{kind} {name!r}: the {who}'s values are not integers",
                        expected="an integer array (4-bit codes unpacked to int8 or uint8)",
                        found=array.dtype.name,
                    )
                )
        # int64 holds every difference of int32 accumulators and of mixed containers without wrapping.
        distance = np.abs(want.astype(np.int64) - got.astype(np.int64))
        largest = int(distance.max()) if distance.size else 0
        sites.append(SiteDifference(name, int(distance.size), int(np.count_nonzero(distance)), largest))
    missing = tuple(name for name in expected if name not in actual)
    unexpected = tuple(sorted(set(actual) - set(expected)))
    return Comparison(tuple(sites), missing, unexpected)


def _same_shape(a: Array, b: Array, name: str) -> None:
    if a.shape != b.shape:
        raise DataError(message(f"{name}: the shapes differ", expected=f"{a.shape}", found=f"{b.shape}"))


def _finite_pair(reference: Array, other: Array, name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    a, b = np.asarray(reference), np.asarray(other)
    _same_shape(a, b, name)
    pair = a.astype(np.float64), b.astype(np.float64)
    for who, array in zip(("reference", "runtime"), pair, strict=True):
        bad = np.argwhere(~np.isfinite(array))
        if len(bad):
            where = tuple(int(i) for i in bad[0])
            raise DataError(
                message(
                    f"{name}: the {who}'s values are not all finite",
                    expected="finite numbers",
                    found=f"{len(bad)} of {array.size} NaN or infinite, first {array[where]} at {where}",
                )
            )
    return pair
