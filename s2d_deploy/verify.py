"""Does the runtime compute what the simulation promised?

Teacher-forced: every integer op gets the simulation's own input codes; its int32 accumulators must equal the exact
integer product bit for bit. End to end: the same float inputs; codes that differ at each site, and the outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from s2d_deploy.data import Batch
from s2d_deploy.errors import UnsupportedError
from s2d_deploy.grid import PerBlock, PerToken
from s2d_deploy.integer import integer_conv2d, integer_matmul
from s2d_deploy.parity import compare_accumulators, compare_codes
from s2d_deploy.plan import Op, Plan
from s2d_deploy.session import Array, Session
from s2d_deploy.simulation import QuantConv2d, recorded_codes, weight_codes


def integer_ops(plan: Plan) -> list[Op]:
    """Ops whose two operands are codes with scales that leave the inner sum: those with one int32 accumulator."""
    result = []
    for op in plan.ops.values():
        sites = [plan.sites.get(name) for name, _ in op.sites]
        if all(
            s is not None and s.grid.integer and not isinstance(s.grid.granularity, PerBlock | PerToken) for s in sites
        ):
            result.append(op)
    return result


def expected_accumulators(simulated: nn.Module, plan: Plan, codes: Mapping[str, Tensor]) -> dict[str, Array]:
    """Exact accumulators of every integer op for recorded activation codes.

    Args:
        simulated: from `simulation.simulate`.
        codes: int32 activation codes by site, from `simulation.recorded_codes`.

    Returns:
        int32 arrays by op name, in the op's own output shape.
    """
    weights = {name: c.numpy() for name, c in weight_codes(simulated).items()}
    return {op.name: expected_accumulator(simulated, plan, op, codes, weights) for op in integer_ops(plan)}


def expected_accumulator(
    simulated: nn.Module, plan: Plan, op: Op, codes: Mapping[str, Tensor], weights: Mapping[str, Array]
) -> Array:
    """Exact accumulators of one integer op; `weights` are `simulation.weight_codes` as arrays."""
    (left, _), (right, _) = op.sites
    lhs = codes[left].numpy()
    zero = _zero_point(plan, left)
    if op.kind == "conv":
        conv = simulated.get_submodule(op.name)
        if not isinstance(conv, QuantConv2d):
            raise TypeError(f"{op.name} is a {type(conv).__name__}")
        return integer_conv2d(
            lhs,
            weights[right],
            zero,
            stride=_pair(conv.stride),
            padding=_pair(conv.padding) * 2,  # top, left, bottom, right
            dilation=_pair(conv.dilation),
            groups=conv.groups,
        )
    if op.kind == "linear":
        return integer_matmul(lhs, weights[right].T, zero, 0)
    return integer_matmul(lhs, codes[right].numpy(), zero, _zero_point(plan, right))


def forced_accumulators(
    session: Session,
    simulated: nn.Module,
    plan: Plan,
    codes: Mapping[str, Tensor],
    on_op: Callable[[str], None] | None = None,
) -> Iterator[tuple[Op, Array, Array | None]]:
    """Every integer op with its exact accumulators and the runtime's; None where the runtime has no integers there.

    One op at a time, so that the arrays of a large model need not lie in memory together.
    """
    weights = {name: c.numpy() for name, c in weight_codes(simulated).items()}
    for op in integer_ops(plan):
        (left, _), (right, role) = op.sites
        if on_op is not None:
            on_op(op.name)
        rhs = None if role == "weight" else _codes(plan, right, codes)
        try:
            actual = session.accumulate(op.name, _codes(plan, left, codes), rhs)
        except UnsupportedError:
            yield op, np.zeros(0, np.int32), None
            continue
        yield op, expected_accumulator(simulated, plan, op, codes, weights), actual


def teacher_forced(
    session: Session, simulated: nn.Module, plan: Plan, batch: Batch, on_op: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Compare accumulators op by op.

    Returns:
        ``{accumulators_checked, accumulators_different, ops_checked, ops_not_integer, first_difference}``.
    """
    with recorded_codes(simulated) as codes:
        simulated(**batch)
    checked = different = ops = 0
    refused, first = [], None
    for op, expected, actual in forced_accumulators(session, simulated, plan, codes, on_op):
        if actual is None:
            refused.append(op.name)
            continue
        row = compare_accumulators({op.name: expected}, {op.name: actual}).sites[0]
        checked, different, ops = checked + row.checked, different + row.different, ops + 1
        if row.different and first is None:
            first = op.name
    return {
        "accumulators_checked": checked,
        "accumulators_different": different,
        "ops_checked": ops,
        "ops_not_integer": refused,
        "first_difference": first,
    }


def end_to_end_codes(session: Session, simulated: nn.Module, batches: Iterable[Batch]) -> dict[str, Any]:
    """Compare codes site by site on the same float inputs.

    Returns:
        ``{codes_checked, codes_different, sites: [...]}``; empty where the runtime cannot show its codes.
    """
    totals: dict[str, dict[str, Any]] = {}
    for batch in batches:
        shown = session.codes({name: tensor.numpy() for name, tensor in batch.items()})
        if not shown:
            return {}
        with recorded_codes(simulated) as codes:
            simulated(**batch)
        comparison = compare_codes({name: c.numpy() for name, c in codes.items()}, shown)
        for row in comparison.to_dict():
            total = totals.setdefault(row["site"], row | {"checked": 0, "different": 0, "largest": 0})
            total["checked"] += row["checked"]
            total["different"] += row["different"]
            total["largest"] = max(total["largest"], row["largest"])
    rows = list(totals.values())
    return {
        "codes_checked": sum(r["checked"] for r in rows),
        "codes_different": sum(r["different"] for r in rows),
        "sites": rows,
    }


def _zero_point(plan: Plan, site: str) -> int:
    return int(plan.sites[site].zero_point)


def _codes(plan: Plan, site: str, codes: Mapping[str, Tensor]) -> Array:
    return codes[site].numpy().astype(np.int8 if plan.sites[site].grid.signed else np.uint8)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, str):
        raise TypeError(f"padding {value!r} has no fixed number of pixels")
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
