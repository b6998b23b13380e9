"""Options of the target `ort`: what a recipe may say, checked, with defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from s2d_deploy.errors import RecipeError, message

from ._ort_placement import DEFAULT_MARGIN

OPTIONS = ("providers", "graph_optimization_level", "dialect", "placement", "margin", "int8_activations")
DIALECTS = ("kernels", "qdq")
PLACEMENTS = ("default", "search")
LEVELS = ("all", "extended", "basic", "disable")
DEFAULT_PROVIDERS = ("CPUExecutionProvider",)


def checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Checked options with defaults, as they go into the manifest."""
    for name in options:
        if name not in OPTIONS:
            close = get_close_matches(str(name), OPTIONS, n=1)
            raise RecipeError(
                message(
                    f"target 'ort': unknown option {name!r}",
                    expected=f"one of {', '.join(OPTIONS)}",
                    fix=f"did you mean {close[0]!r}?" if close else None,
                )
            )
    level = options.get("graph_optimization_level", "all")
    if level not in LEVELS:
        close = get_close_matches(str(level), LEVELS, n=1)
        raise RecipeError(
            message(
                "target 'ort': graph_optimization_level",
                expected=f"one of {', '.join(LEVELS)}",
                found=repr(level),
                fix=f"did you mean {close[0]!r}?" if close else None,
            )
        )
    checks: tuple[tuple[str, Any, Any], ...] = (
        ("dialect", DIALECTS, options.get("dialect", DIALECTS[0])),
        ("placement", PLACEMENTS, options.get("placement", PLACEMENTS[0])),
    )
    for name, known, found in checks:
        if found not in known:
            close = get_close_matches(str(found), known, n=1)
            raise RecipeError(
                message(
                    f"target 'ort': {name}",
                    expected=f"one of {', '.join(known)}",
                    found=repr(found),
                    fix=f"did you mean {close[0]!r}?" if close else None,
                )
            )
    margin, int8 = options.get("margin", DEFAULT_MARGIN), options.get("int8_activations", False)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
        raise RecipeError(message("target 'ort': margin", expected="0 or more, below 1", found=repr(margin)))
    if not isinstance(int8, bool):
        raise RecipeError(message("target 'ort': int8_activations", expected="true or false", found=repr(int8)))
    providers = options.get("providers", DEFAULT_PROVIDERS)
    if isinstance(providers, str) or not isinstance(providers, Sequence) or not providers:
        raise RecipeError(
            message("target 'ort': providers", expected="a list, as [CPUExecutionProvider]", found=repr(providers))
        )
    for provider in providers:
        pair = isinstance(provider, Sequence) and len(provider) == 2 and isinstance(provider[1], Mapping)
        if not (isinstance(provider, str) or (pair and isinstance(provider[0], str))):
            raise RecipeError(
                message("target 'ort': providers", expected="names, or pairs [name, options]", found=repr(provider))
            )
    first = str(providers[0] if isinstance(providers[0], str) else providers[0][0]).lower()
    # Other providers fuse Q/DQ themselves; the kernels that are written for the CPU are unknown to them.
    dialect = options.get("dialect", "kernels" if first in ("cpu", "cpuexecutionprovider") else "qdq")
    if dialect == "qdq" and options.get("placement") == "search":
        raise RecipeError(
            message(
                "target 'ort': placement: search measures the CPU's kernels",
                found=f"dialect qdq, providers {', '.join(map(str, providers))}",
                fix="leave placement out, or set providers: [cpu]",
            )
        )
    return {
        "providers": [p if isinstance(p, str) else [p[0], dict(p[1])] for p in providers],
        "graph_optimization_level": level,
        "dialect": dialect,
        "placement": options.get("placement", "default"),
        "margin": float(margin),
        "int8_activations": int8,
    }
