"""How much each op costs the final output at each precision, and the cheapest assignment within a budget.

Sensitivity is measured, not estimated: one op is quantized (its weights, its activations, or both), everything else
stays float, and the model's output is compared with the float model's. The assignment treats these errors as additive,
which is first-order (`error_analysis.ErrorAnalysis.additivity` says how far), and is then exact: a multiple-choice
knapsack, solved to optimality by HiGHS through `scipy.optimize.milp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from s2d_deploy.error_analysis import Batch, float_outputs, output_error, subset
from s2d_deploy.errors import PlanError, message
from s2d_deploy.plan import Op, Plan
from s2d_deploy.session import Progress

Part = Literal["weights", "activations", "both"]
PARTS: tuple[Part, ...] = ("weights", "activations", "both")
Unit = Literal["weight_bits", "mac_bits"]


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The final output's relative error power when one part of one op is quantized.

    Attributes:
        op, precision, part: what is quantized; attention's products have no weights, so only "activations" and "both".
        error: ``sum |y - y'|^2 / sum |y|^2`` over the samples.
    """

    op: str
    precision: str
    part: Part
    error: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Precisions by op.

    Attributes:
        precisions: op -> precision.
        cost: what it costs, in the unit of the budget.
        error: sum of the chosen errors.
    """

    precisions: dict[str, str]
    cost: float
    error: float


def measure_sensitivity(
    model: nn.Module,
    plans: Mapping[str, Plan],
    batches: Callable[[], Iterable[Batch]],
    output: str,
    *,
    parts: Sequence[Part] = PARTS,
    progress: Progress | None = None,
) -> list[Sensitivity]:
    """One row for each op, precision and part that has something to quantize.

    Args:
        model: the float model.
        plans: a plan of the whole model for each candidate precision.
        batches: gives the same samples at every call; few are enough, as every row costs two passes over them.
        output: of the model.
        parts: which of weights, activations, both.
        progress: called with a sentence now and then.
    """
    rows, total = [], sum(len(plan.ops) for plan in plans.values())
    reference, done = float_outputs(model, batches(), output), 0
    for precision, plan in plans.items():
        for op in plan.ops.values():
            done += 1
            if progress is not None:
                progress(f"sensitivity {done}/{total}")
            for part in parts:
                chosen = _part(plan, op, part)
                if chosen.sites:
                    error = output_error(model, chosen, batches, output, reference)
                    rows.append(Sensitivity(op.name, precision, part, error))
    return rows


def costs_of(plans: Mapping[str, Plan], weights: Mapping[str, Tensor], unit: Unit) -> dict[str, dict[str, float]]:
    """Cost of each op at each precision, so that the sum over all ops is the model's mean number of bits.

    Args:
        plans: a plan for each candidate precision.
        weights: by op name.
        unit: ``"weight_bits"``, the mean over all weights; ``"mac_bits"``, the mean over all multiply-accumulates of
            the mean of both operands' bits. Float operands count 16.
    """
    ops = next(iter(plans.values())).ops
    size = {name: float(weights[name].numel()) if name in weights else 0.0 for name in ops}
    share = size if unit == "weight_bits" else {name: float(op.macs) for name, op in ops.items()}
    whole = sum(share.values()) or 1.0
    result: dict[str, dict[str, float]] = {}
    for name, op in ops.items():
        result[name] = {}
        for precision, plan in plans.items():
            left, right = (plan.sites[s].grid.bits if s in plan.sites else 16 for s, _ in op.sites)
            bits = right if unit == "weight_bits" else (left + right) / 2
            result[name][precision] = bits * share[name] / whole
    return result


def assign(
    errors: Mapping[str, Mapping[str, float]], costs: Mapping[str, Mapping[str, float]], budget: float
) -> Assignment:
    """The precision of each op that minimizes the sum of errors while the sum of costs stays within `budget`.

    Args:
        errors: op -> precision -> error.
        costs: op -> precision -> cost, for at least the same ops and precisions.
        budget: in the unit of the costs.

    Raises:
        PlanError: not even the cheapest assignment fits; the message says what it costs.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    pairs = [(op, precision) for op, row in errors.items() for precision in row]
    if not pairs:
        return Assignment({}, 0.0, 0.0)
    slack = check_budget({op: {p: costs[op][p] for p in row} for op, row in errors.items()}, budget)
    names = list(errors)
    value = np.array([errors[op][p] for op, p in pairs])
    rows = np.array([names.index(op) for op, _ in pairs])
    one_each = coo_matrix((np.ones(len(pairs)), (rows, np.arange(len(pairs)))), shape=(len(names), len(pairs)))
    cost = np.array([[costs[op][p] for op, p in pairs]])
    # Errors of 1e-9 and 1e-1 stand side by side: scaled, so that the solver's absolute tolerances do not drown them.
    scale = 1.0 / value.max() if value.max() > 0 else 1.0
    found = milp(
        value * scale,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(cost, -np.inf, budget + slack)],
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise PlanError(message("no assignment was found", found=str(found.message)))
    chosen = {op: p for (op, p), x in zip(pairs, found.x, strict=True) if x > 0.5}
    return Assignment(
        chosen,
        float(sum(costs[op][p] for op, p in chosen.items())),
        float(sum(errors[op][p] for op, p in chosen.items())),
    )


def check_budget(costs: Mapping[str, Mapping[str, float]], budget: float) -> float:
    """What a sum of costs may exceed `budget` by, because it is rounded.

    Raises:
        PlanError: not even the cheapest assignment fits; the message says what it costs.
    """
    cheapest = sum(min(row.values()) for row in costs.values())
    # A budget that equals a possible cost must not fail by the rounding of a sum.
    slack = 1e-9 * max(abs(budget), abs(cheapest), 1.0)
    if cheapest > budget + slack:
        raise PlanError(
            message(
                "the budget is below the cheapest assignment",
                expected=f"at least {_up(cheapest)}, every op at its cheapest candidate",
                found=f"{budget:.6g}",
                fix="raise the budget, or add a cheaper candidate",
            )
        )
    return slack


def _up(cost: float) -> str:
    """`cost` in six digits, not rounded down: what a message names must be enough."""
    text = f"{cost:.6g}"
    return text if float(text) >= cost else f"{cost * (1 + 1e-5):.6g}"


def _part(plan: Plan, op: Op, part: Part) -> Plan:
    if part == "both":
        return subset(plan, [op.name])
    roles = ["weight"] if part == "weights" else ["input", "query", "key", "probs", "value"]
    return subset(plan, [op.name], roles)
