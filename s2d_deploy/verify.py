"""Does the runtime compute what the simulation promised?

Teacher-forced: every integer op gets the simulation's own input codes; its int32 accumulators must equal the exact
integer product bit for bit. End to end: the same float inputs; codes that differ at each site, and the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2d_deploy.data import Batch
from s2d_deploy.errors import UnsupportedError
from s2d_deploy.forced import Forced, View
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
            padding=_padding(conv),
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
        ``{codes_checked, codes_different, sites: [...]}``; empty where the runtime cannot show its codes. A site's row
        has ``snr_db``: of its values, the simulation's against the runtime's; None where none differs.

    Raises:
        DataError: the shapes of a site's codes differ; it is named.
    """
    totals: dict[str, dict[str, Any]] = {}
    powers: dict[str, list[float]] = {}
    simulation = Forced(simulated, Plan("simulation"), torch.float32)
    for batch in batches:
        shown = session.codes({name: tensor.numpy() for name, tensor in batch.items()})
        if not shown:
            return {}

        def see(view: View, shown: Mapping[str, Array] = shown) -> None:
            if view.site in shown:
                _count(totals, powers, view, shown[view.site])

        with torch.no_grad():
            simulation.run(batch, None, None, see)
    for site, (signal, noise) in powers.items():
        totals[site]["snr_db"] = 10.0 * math.log10(signal / noise) if signal and noise else None
    rows = list(totals.values())
    return {
        "codes_checked": sum(r["checked"] for r in rows),
        "codes_different": sum(r["different"] for r in rows),
        "sites": rows,
    }


def _count(totals: dict[str, dict[str, Any]], powers: dict[str, list[float]], view: View, shown: Array) -> None:
    codes = view.codes().numpy().astype(np.int8 if view.quantizer.grid.signed else np.uint8)
    # One byte each: equal arrays, the rule, are compared at the speed of memory.
    row: dict[str, Any] = {"site": view.site, "checked": codes.size, "different": 0, "largest": 0}
    if codes.dtype != shown.dtype or not np.array_equal(codes, shown):
        row = compare_codes({view.site: codes}, {view.site: shown}).to_dict()[0]
    total = totals.setdefault(view.site, row | {"checked": 0, "different": 0, "largest": 0})
    total["checked"] += row["checked"]
    total["different"] += row["different"]
    total["largest"] = max(total["largest"], row["largest"])
    power = powers.setdefault(view.site, [0.0, 0.0])
    values = view.codes() - view.zero
    power[0] += float(values.square().sum())
    if row["different"]:
        power[1] += float((view.codes() - torch.from_numpy(shown.astype(np.float32))).square().sum())


def _zero_point(plan: Plan, site: str) -> int:
    return int(plan.sites[site].zero_point)


def _codes(plan: Plan, site: str, codes: Mapping[str, Tensor]) -> Array:
    return codes[site].numpy().astype(np.int8 if plan.sites[site].grid.signed else np.uint8)


def _padding(conv: nn.Conv2d | QuantConv2d) -> tuple[int, int, int, int]:
    """Pixels at top, left, bottom and right; ``"same"`` puts the odd one last, as torch does."""
    if conv.padding == "valid":
        return 0, 0, 0, 0
    if conv.padding == "same":
        total = [d * (k - 1) for d, k in zip(_pair(conv.dilation), _pair(conv.kernel_size), strict=True)]
        return total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2
    vertical, horizontal = _pair(conv.padding)
    return vertical, horizontal, vertical, horizontal


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
