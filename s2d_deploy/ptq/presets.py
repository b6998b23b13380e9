"""Presets: the names that users of quantization toolkits know, as keys of a recipe's quantize section."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from s2d_deploy.errors import RecipeError, message

PRESETS: dict[str, dict[str, Any]] = {
    "int8": {"precisions": ["w8a8"]},
    "int8_smoothquant": {"precisions": ["w8a8"], "passes": ["smoothquant"]},
    "int4_awq": {"precisions": ["w4a16"], "passes": ["awq", "ranges", "awq_clip"]},
    "int4_gptq": {"precisions": ["w4a16"], "passes": [{"gptq": {"sequential": False}}]},
    "w4a8": {"precisions": ["w4a8"]},
    "w4a4": {"precisions": ["w4a4"]},
    "w4a4_rotated": {"precisions": ["w4a4"], "passes": [{"rotation": {"online": True}}]},
    "w4a4_erq": {"precisions": ["w4a4"], "passes": ["erq"]},
    "w4a4_repq": {"precisions": ["w4a4"], "passes": ["repq"]},
    "w4a4_flatquant": {"precisions": ["w4a4"], "passes": ["flatquant", "erq", "norm_tweaking"]},
    "nvfp4": {"precisions": ["nvfp4"]},
}


def preset(name: str) -> dict[str, Any]:
    """The quantize section's keys of a preset.

    Raises:
        RecipeError: no such preset.
    """
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        raise RecipeError(
            message(
                f"quantize.preset: unknown preset {name!r}",
                expected=f"one of {', '.join(PRESETS)}",
                fix=f"did you mean {close[0]!r}?" if close else None,
            )
        )
    return dict(PRESETS[name])
