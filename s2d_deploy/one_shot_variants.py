"""The names of the one-shot variants, and which may follow which. Loads no torch, because recipes are checked by it."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Literal, get_args

from s2d_deploy.errors import RecipeError, message

Variant = Literal["shrink", "shrink-next", "centre", "fold", "neurons", "insert", "bypass"]
VARIANTS: tuple[Variant, ...] = get_args(Variant)
# They need the layers that S2D flags, and come first.
SHRINKING: tuple[Variant, ...] = ("shrink", "shrink-next")
# They put a module in a Linear's place, and come last.
INSERTING: tuple[Variant, ...] = ("insert", "bypass")


def check_variants(names: Sequence[str], key: str = "one-shot variants") -> tuple[Variant, ...]:
    """`names` as variants that can be applied in this order.

    Args:
        names: in the order of their application.
        key: what the message calls them.

    Raises:
        RecipeError: none, an unknown one (with a suggestion), one twice, or another order.
    """
    unknown = [name for name in names if name not in VARIANTS]
    if unknown:
        close = [m for name in unknown for m in get_close_matches(name, VARIANTS, n=1, cutoff=0.5)]
        raise RecipeError(
            message(
                f"{key}: unknown {', '.join(map(repr, unknown))}",
                expected=", ".join(VARIANTS),
                fix=f"did you mean {', '.join(map(repr, close))}?" if close else "check the spelling",
            )
        )
    if not names:
        raise RecipeError(
            message(f"{key}: the list is empty", expected=", ".join(VARIANTS), fix="name at least one, e.g. [fold]")
        )
    # What is shrunk was flagged in the untouched model, and a refit compares layers with its own.
    late = [name for name in names[1:] if name in SHRINKING]
    early = [name for name in names[:-1] if name in INSERTING]
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if late or early or twice:
        wrong = [f"{name!r} must come first" for name in late] + [f"{name!r} must come last" for name in early]
        raise RecipeError(
            message(
                f"{key}: {'; '.join(dict.fromkeys(wrong)) or 'a variant stands there twice'}",
                expected="shrink or shrink-next, then centre, fold and neurons, then insert or bypass; each once",
                found=", ".join(names),
            )
        )
    order = {str(variant): variant for variant in VARIANTS}
    return tuple(order[name] for name in names)


__all__ = ["INSERTING", "SHRINKING", "VARIANTS", "Variant", "check_variants"]
