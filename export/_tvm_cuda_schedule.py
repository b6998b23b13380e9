"""Threads for everything that has no kernel of its own: TVM's default schedules for GPUs (dlight)."""

from __future__ import annotations

from typing import Any


def schedule_threads(module: Any) -> Any:
    """`module` (an IRModule) with every unscheduled PrimFunc bound to blocks and threads.

    Reductions keep every element once, in an order of their own; nothing else changes a value. To be called with the
    target in scope.
    """
    from tvm.s_tir import dlight

    rules = (dlight.gpu.Reduction(), dlight.gpu.GeneralReduction(), dlight.gpu.Fallback())
    return dlight.ApplyDefaultSchedule(*rules)(module)
