"""Inputs of a loaded model, checked before they reach a runtime: one wording for every adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from s2d_deploy.errors import DataError, message
from s2d_deploy.session import Feeds


@dataclass(frozen=True, slots=True)
class Input:
    """What a model takes under one name.

    Attributes:
        dtype: NumPy's name of the element type, or None where any is taken.
        dims: sizes; a name (or None) stands for a dynamic dimension. Equal names mean equal sizes.
    """

    dtype: str | None
    dims: tuple[int | str | None, ...]


def require_feeds(feeds: Feeds, names: Sequence[str]) -> None:
    """Check the names of `feeds` against the model's inputs.

    Raises:
        DataError: an input is missing or unknown.
    """
    if set(feeds) != set(names):
        raise DataError(
            message(
                "the fed inputs are not the model's",
                expected=", ".join(sorted(names)),
                found=", ".join(sorted(feeds)) or "nothing",
            )
        )


def check_feeds(feeds: Feeds, inputs: Mapping[str, Input], fix: str | None = None) -> None:
    """Check names, types, ranks and sizes.

    Args:
        feeds: arrays by input name.
        inputs: what the model takes.
        fix: what to do about a wrong shape.

    Raises:
        DataError: the first input that does not fit, with what was expected and found.
    """
    require_feeds(feeds, list(inputs))
    named: dict[str, tuple[int, str]] = {}
    for name, wanted in inputs.items():
        array = feeds[name]
        if not isinstance(array, np.ndarray) or (wanted.dtype is not None and array.dtype.name != wanted.dtype):
            found = array.dtype.name if isinstance(array, np.ndarray) else type(array).__name__
            raise DataError(
                message(f"input {name!r}: wrong dtype", expected=wanted.dtype or "a NumPy array", found=found)
            )
        fits = array.ndim == len(wanted.dims) and all(
            not isinstance(want, int) or want == got for want, got in zip(wanted.dims, array.shape, strict=True)
        )
        if not fits:
            raise DataError(
                message(f"input {name!r}: wrong shape", expected=_text(wanted.dims), found=_text(array.shape), fix=fix)
            )
        for dim, size in zip(wanted.dims, array.shape, strict=True):
            if isinstance(dim, str) and named.setdefault(dim, (size, name))[0] != size:
                raise DataError(
                    message(
                        f"input {name!r}: dimension {dim!r} disagrees with input {named[dim][1]!r}",
                        expected=str(named[dim][0]),
                        found=f"{size} in shape {_text(array.shape)}",
                    )
                )


def _text(dims: Sequence[int | str | None]) -> str:
    return "x".join("?" if d is None else str(d) for d in dims) or "a scalar"
