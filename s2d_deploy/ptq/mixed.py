"""Mixed precision: a precision for each op, chosen by measured sensitivity within a budget (`sensitivity`).

The idea is HAWQ's (Dong et al., arXiv 1905.03696; the integer program is HAWQ-V3's, arXiv 2011.10680, eq. 6), with the
output's measured error in place of a Hessian estimate. Every candidate's ranges are set as usual; an op then takes its
sites from the candidate that was chosen for it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator
from torch import Tensor

from s2d_deploy.data import first_samples
from s2d_deploy.errors import PlanError, RecipeError, message
from s2d_deploy.host import cpu_model
from s2d_deploy.op_costs import KIND, VERSION, ops_digest
from s2d_deploy.plan import Op, Plan
from s2d_deploy.precision import parse_precision
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Batch, Context, Quantized
from s2d_deploy.quantize import build_plan
from s2d_deploy.sensitivity import PARTS, Unit, assign, check_budget, costs_of, measure_sensitivity


class Options(passes.Options):
    """What may be chosen, and what it may cost."""

    budget: float = Field(gt=0, description="mean bits (see unit), or the sum of the costs file's figures")
    candidates: tuple[str, ...] = Field(("w4a4", "w8a8"), min_length=2, description="precisions to choose from")
    unit: Unit = Field("mac_bits", description="mean bits over all weights, or over all multiply-accumulates")
    costs: str | None = Field(
        None, description="JSON file: of `s2d-deploy bench --per-op`, or plainly {op: {precision: cost}}"
    )
    costs_target: str | None = Field(None, description="target that the costs must be measured on")
    other_host: bool = Field(False, description="allow costs that were measured on another machine")
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
    given, facts = _read_costs(options, ops) if options.costs is not None else (None, {})
    statistics = context.calibration(model, ops)
    plans = {p: build_plan(model, ops, statistics, p, context.config) for p in options.candidates}

    weights = {n: w for n in ops if isinstance(w := _weight(model, n), Tensor)}
    costs = given if given is not None else costs_of(plans, weights, options.unit)
    check_budget(costs, options.budget)  # before the work

    def batches() -> Iterator[Batch]:
        return first_samples(context.batches(), options.samples)

    rows = measure_sensitivity(model, plans, batches, context.output, parts=PARTS, progress=context.progress)
    errors: dict[str, dict[str, float]] = {name: dict.fromkeys(plans, 0.0) for name in ops}
    for row in rows:
        if row.part == "both":
            errors[row.op][row.precision] = row.error
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
        "unit": facts.get("unit", "costs file") if given is not None else options.unit,
        "costs": facts,
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


def _read_costs(options: Options, ops: Mapping[str, Op]) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Costs, and where they were measured (empty for a plain mapping)."""
    path = Path(str(options.costs)).expanduser()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        facts = _facts(document) if document.get("kind") == KIND else {}
        table = document["costs"] if facts else document
        costs = {str(op): {str(p): float(c) for p, c in row.items()} for op, row in table.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise RecipeError(
            message(
                f"{path}: not a costs file",
                expected="JSON {op: {precision: cost}}",
                found=f"{type(error).__name__}: {error}",
                fix="write one with `s2d-deploy bench RECIPE --per-op FILE --target ort --precision ...`",
            )
        ) from error
    if facts:
        _check_facts(path, facts, options, ops)
    if options.costs_target is not None and not facts:
        raise RecipeError(
            message(
                f"{path}: does not say where its costs were measured",
                expected=f"target {options.costs_target!r}",
                fix="write it with `s2d-deploy bench --per-op`, or leave costs_target out",
            )
        )
    missing = [f"{op} at {p}" for op in ops for p in options.candidates if p not in costs.get(op, {})]
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        raise RecipeError(
            message(
                f"{path}: no cost for {', '.join(missing[:4])}{more}",
                fix="measure every candidate: s2d-deploy bench RECIPE --per-op FILE "
                + " ".join(f"--precision {p}" for p in options.candidates),
            )
        )
    wrong = [op for op, row in costs.items() if any(not 0 <= c < float("inf") for c in row.values())]
    if wrong:
        raise PlanError(message(f"{path}: costs must be finite and not negative", found=wrong[0]))
    return costs, facts


def _facts(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of which model, and where, costs were measured."""
    keys = ("version", "model", "unit", "target", "runtime", "device", "batch", "threads")
    return {k: document[k] for k in keys} | {"cpu": document["host"]["cpu"]}


def _check_facts(path: Path, facts: Mapping[str, Any], options: Options, ops: Mapping[str, Op]) -> None:
    """Refuse costs of another version, model, target or machine (RecipeError)."""
    wanted = {
        "version": (VERSION, "measure again"),
        "model": (ops_digest(ops), "measure this model's ops: theirs have other names or sizes"),
        "target": (options.costs_target or facts["target"], "measure on that target"),
        "cpu": (facts["cpu"] if options.other_host else cpu_model(), "measure here, or set mixed.other_host: true"),
    }
    for what, (expected, fix) in wanted.items():
        if expected != facts[what]:
            found = str(facts[what])[:60]
            raise RecipeError(
                message(f"{path}: costs of another {what}", expected=str(expected)[:60], found=found, fix=fix)
            )
