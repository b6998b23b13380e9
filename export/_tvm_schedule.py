"""Loops for everything that has no kernel of its own: outer loops in parallel, the innermost in vectors.

TVM's default lowering leaves such functions on one thread and one lane. Nothing here changes a value: loops are only
reordered where iterations do not depend on each other; reductions keep their order.
"""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)

_SERIAL_BELOW = 1 << 15  # elements; waking another thread takes longer than so many


def schedule_loops(module: Any, lanes: int) -> Any:
    """`module` (an IRModule) with every unscheduled PrimFunc parallelized and vectorized."""
    from tvm import tirx

    updated = {}
    for name, function in module.functions_items():
        attributes = function.attrs or {}
        if isinstance(function, tirx.PrimFunc) and not attributes.get("tirx.is_scheduled", False):
            updated[name] = plain_schedule(function, lanes)
    for name, function in updated.items():
        module.update_func(name, function)
    return module


def plain_schedule(function: Any, lanes: int) -> Any:
    """One PrimFunc: its outer loops in parallel where there is enough work, the innermost in vectors."""
    from tvm import s_tir

    schedule = s_tir.Schedule(function)
    blocks = simple_blocks(schedule)
    if blocks is None:
        logger.debug("not a nest of simple loops, left as it is: %s", function.attrs)
        return function.with_attr("tirx.is_scheduled", True)
    for block, spatial in blocks:
        loops = schedule.get_loops(block)
        _loops(schedule, loops, [int(schedule.get(loop).extent) for loop in loops], spatial, lanes)
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)


def simple_blocks(schedule: Any) -> list[tuple[Any, int]] | None:
    """Blocks that are nests of loops with the reductions innermost, others inlined, and their spatial loops' number.

    None for a function of another form.
    """
    from tvm.s_tir.dlight.analysis import normalize_prim_func
    from tvm.s_tir.dlight.base import try_inline_contiguous_spatial

    blocks = normalize_prim_func(schedule)
    if blocks is None:
        return None
    found = []
    for block in try_inline_contiguous_spatial(schedule, blocks):
        kinds = block.dom_kind()
        if len(schedule.get_loops(block.block_rv)) != len(kinds):
            continue
        spatial = len(kinds) if "R" not in kinds else kinds.index("R")
        if "O" not in kinds and "S" not in kinds[spatial:]:
            found.append((block.block_rv, spatial))
    return found


def _loops(schedule: Any, loops: list[Any], extents: list[int], spatial: int, lanes: int) -> None:
    total = 1
    for extent in extents:
        total *= extent
    outer, inner = loops[:spatial], None
    if spatial == len(loops) and loops:
        outer, inner = loops[:-1], loops[-1]
        if extents[-1] < lanes and len(loops) > 1:  # short rows: two axes make one
            inner = schedule.fuse(loops[-2], loops[-1])
            outer = loops[:-2]
        width = int(schedule.get(inner).extent)
        if width % lanes == 0:
            middle, vector = schedule.split(inner, [width // lanes, lanes])
            schedule.vectorize(vector)
            inner = middle
        if not outer:
            outer = [inner]
    if outer and total >= _SERIAL_BELOW:
        schedule.parallel(schedule.fuse(*outer) if len(outer) > 1 else outer[0])
