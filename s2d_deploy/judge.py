"""A run judged by its recipe's limits, and a report judged again: needs neither torch nor a runtime.

The limits stand in the recipe (`gates`), the figures in the report's rows; so whoever has a report can judge it,
today's by tomorrow's limits, and check that its verdicts follow from its figures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_deploy.errors import ArtifactError, RecipeError, message
from s2d_deploy.gate import GateLimits, GateVerdict, evaluate
from s2d_deploy.precision import BASELINE
from s2d_deploy.recipe import Recipe, load_recipe

UNTIMED = ("reference",)


def gates(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> list[GateVerdict]:
    """Judge rows by the recipe's limits, precision by precision (a limit may differ between them)."""
    required = [t.name for t in recipe.targets if t.required]
    verdicts: list[GateVerdict] = []
    for precision in recipe.quantize.precisions:
        limits = recipe.gates.limits_for(precision)
        chosen = [r for r in rows if r["precision"] in (precision, BASELINE)]
        timed = [r for r in chosen if r["target"] not in UNTIMED]
        found: list[GateVerdict] = []
        for part, keep in ((timed, True), ([r for r in chosen if r["target"] in UNTIMED], False)):
            if not part:
                continue
            # The integer reference has no latency to judge.
            mine = limits if keep else limits | {"latency_ratio": None}
            present = {r["target"] for r in part}
            found += evaluate(
                part,
                GateLimits.from_dict(mine),
                # What was measured is held to every limit, whether or not the recipe requires it to be there.
                required=dict.fromkeys([*(name for name in required if name in present), *_measured(part)]),
                precisions=[precision],
            )
        # A limit that one part could not judge was judged by the other: only what neither holds is undecided.
        held = {v.name for v in found if v.target != "*"}
        verdicts += [v for v in found if (v.target != "*" or v.name not in held) and v not in verdicts]
    # The baseline is read beside every precision; it is not itself on trial.
    places = {t.name: i for i, t in enumerate(recipe.targets)}
    order = {p: i for i, p in enumerate(recipe.quantize.precisions)}
    judged = [v for v in verdicts if v.precision != BASELINE]
    return sorted(judged, key=lambda v: (places.get(v.target, len(places)), order.get(v.precision, len(order))))


def judged_again(report: Mapping[str, Any], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The report with the verdicts that its own recipe, or its recipe with other limits, gives its figures.

    Args:
        report: a checked document (`report.read_report`).
        overrides: ``gates.<name>=value`` assignments; nothing else can be changed in what has run already.

    Raises:
        RecipeError: an override of another section.
        ArtifactError: the report holds no recipe, or none that this version knows.
    """
    from s2d_deploy.report import with_gates

    other = [text for text in overrides if not text.strip().startswith("gates.")]
    if other:
        raise RecipeError(
            message(
                f"--set {other[0]}: a report has run already",
                expected="limits, e.g. --set gates.accuracy_drop=1.0",
                fix="give the recipe instead of the report to run it anew",
            )
        )
    recipe = recipe_of(report, overrides)
    return with_gates(report, [v.to_dict() for v in gates(recipe, report["results"])])


def recipe_of(report: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a report was made by.

    Raises:
        ArtifactError: there is none, or this version does not know its keys.
        RecipeError: an override is wrong.
    """
    document = report.get("recipe")
    if not isinstance(document, Mapping):
        raise ArtifactError(message("the report holds no recipe", fix="write it again with `s2d-deploy report`"))
    try:
        known = load_recipe(document)
    except RecipeError as error:
        raise ArtifactError(message("the report's recipe is not one of this version's", found=str(error))) from error
    return load_recipe(known.document(), overrides) if overrides else known


def is_report(argument: str) -> bool:
    """Whether an argument means a finished run (its folder, or a .json file with results), not a recipe."""
    path = Path(argument)
    try:
        if path.suffix == ".json" and path.is_file():  # a recipe may be written as JSON, too
            return b'"results"' in path.read_bytes()
        return (path / "report.json").is_file()
    except (OSError, ValueError):
        return False


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({str(r["target"]) for r in rows if r["status"] == "measured" and r["precision"] != BASELINE})
