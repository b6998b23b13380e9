"""Mixed precision: a precision for each op, chosen by measured sensitivity within a budget (`sensitivity`).

The idea is HAWQ's (Dong et al., arXiv 1905.03696; the integer program is HAWQ-V3's, arXiv 2011.10680, eq. 6), with the
output's measured error in place of a Hessian estimate. Every candidate's ranges are set as usual; an op then takes its
sites from the candidate that was chosen for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from s2d_deploy.data import first_samples
from s2d_deploy.errors import PlanError, RecipeError, message
from s2d_deploy.plan import Plan
from s2d_deploy.precision import parse_precision
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Batch, Context, Quantized
from s2d_deploy.quantize import build_plan
from s2d_deploy.sensitivity import PARTS, Unit, assign, costs_of, measure_sensitivity


class Options(passes.Options):
    """What may be chosen, and what it may cost."""

    budget: float = Field(gt=0, description="mean bits (see unit), or the sum of the costs file's figures")
    candidates: tuple[str, ...] = Field(("w4a4", "w8a8"), min_length=2, description="precisions to choose from")
    unit: Unit = Field("mac_bits", description="mean bits over all weights, or over all multiply-accumulates")
    costs: str | None = Field(None, description="JSON file {op: {precision: cost}}, e.g. measured milliseconds")
    samples: int = Field(8, ge=1, description="calibration samples that sensitivity is measured on")

    @field_validator("candidates")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(parse_precision(n, "quantize.passes.mixed.candidates").name for n in names))


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Set the ranges of every candidate, measure, solve, and merge.

    The plan's ``info["mixed"]`` holds the budget, what is used of it, every op's precision, and all sensitivities.

    Raises:
        PlanError: the budget is below the cheapest assignment.
        RecipeError: a costs file that cannot be read, or that lacks an op or a candidate (all are named).
    """
    model, ops = quantized.model, quantized.plan.ops
    given = _read_costs(options, list(ops)) if options.costs is not None else None
    statistics = context.calibration(model, ops)
    plans = {p: build_plan(model, ops, statistics, p, context.config) for p in options.candidates}

    def batches() -> Iterator[Batch]:
        return first_samples(context.batches(), options.samples)

    rows = measure_sensitivity(model, plans, batches, context.output, parts=PARTS, progress=context.progress)
    errors: dict[str, dict[str, float]] = {name: dict.fromkeys(plans, 0.0) for name in ops}
    for row in rows:
        if row.part == "both":
            errors[row.op][row.precision] = row.error
    weights = {n: w for n in ops if isinstance(w := _weight(model, n), Tensor)}
    costs = given if given is not None else costs_of(plans, weights, options.unit)
    chosen = assign(errors, costs, options.budget)
    merged = Plan(quantized.plan.precision, dict(ops), {}, dict(next(iter(plans.values())).info))
    for name, op in ops.items():
        for site, _ in op.sites:
            found = plans[chosen.precisions[name]].sites.get(site)
            if found is not None:
                merged.add(found)
    merged.info |= quantized.plan.info
    merged.info["mixed"] = {
        "budget": options.budget,
        "used": chosen.cost,
        "unit": "costs file" if given is not None else options.unit,
        "error": chosen.error,
        "assignment": chosen.precisions,
        "sensitivity": [row.to_dict() for row in rows],
    }
    counts = {p: list(chosen.precisions.values()).count(p) for p in options.candidates}
    context.progress(", ".join(f"{n} ops at {p}" for p, n in counts.items()))
    return Quantized(model, merged)


def _weight(model: Any, name: str) -> Any:
    try:
        return getattr(model.get_submodule(name), "weight", None)
    except AttributeError:  # an attention product's name is not a module's
        return None


def _read_costs(options: Options, ops: list[str]) -> dict[str, dict[str, float]]:
    path = Path(str(options.costs)).expanduser()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        costs = {str(op): {str(p): float(c) for p, c in row.items()} for op, row in document.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(
            message(f"{path}: not a costs file", expected="JSON {op: {precision: cost}}", found=str(error))
        ) from error
    missing = [f"{op} at {p}" for op in ops for p in options.candidates if p not in costs.get(op, {})]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise RecipeError(message(f"{path}: no cost for {', '.join(missing[:4])}{more}"))
    wrong = [op for op, row in costs.items() if any(not 0 <= c < float("inf") for c in row.values())]
    if wrong:
        raise PlanError(message(f"{path}: costs must be finite and not negative", found=wrong[0]))
    return costs
