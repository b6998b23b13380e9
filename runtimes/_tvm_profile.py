"""Where a run's time goes, kernel by kernel: the virtual machine tells before and after every function that it calls.

Asking costs a few microseconds at every call, so the sum is more than a run takes without. Kernels are run in the
order of the graph, so the n-th call of a function belongs to the n-th product that it computes.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class KernelTime:
    """One call of one compiled function.

    Attributes:
        function: its name.
        op: the contraction whose inner loop it runs, by its name in the plan; "" for everything else.
        samples_us: microseconds, one for each run.
    """

    function: str
    op: str
    samples_us: tuple[float, ...]

    @property
    def p50_us(self) -> float:
        """The median."""
        ordered = sorted(self.samples_us)
        return ordered[len(ordered) // 2]


def profile(vm: Any, call: Any, ops: Sequence[tuple[str, str]], runs: int) -> list[KernelTime]:
    """Time every function that `call` makes `vm` run.

    Args:
        vm: TVM's VirtualMachine.
        call: runs an entry of it once.
        ops: contractions in the order of the graph, and the function that runs each.
        runs: how often; one more before, not counted.
    """
    rows: dict[tuple[str, int], list[float]] = {}
    counted: Counter[str] = Counter()
    began = 0

    def watch(_function: Any, name: str, before: bool, _value: Any, *_arguments: Any) -> None:
        nonlocal began
        if before:
            began = time.perf_counter_ns()
            return
        took = (time.perf_counter_ns() - began) / 1e3
        rows.setdefault((name, counted[name]), []).append(took)
        counted[name] += 1

    call()
    vm.set_instrument(watch)
    try:
        for _ in range(runs):
            counted.clear()
            call()
    finally:
        vm.set_instrument(lambda *_: None)
    named = _owners(ops)
    return [KernelTime(name, named.get((name, i), ""), tuple(samples)) for (name, i), samples in rows.items()]


def _owners(ops: Sequence[tuple[str, str]]) -> Mapping[tuple[str, int], str]:
    counted: Counter[str] = Counter()
    found = {}
    for op, function in ops:
        found[function, counted[function]] = op
        counted[function] += 1
    return found
