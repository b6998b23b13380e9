"""The gap from the float model to the hardware, split into parts that add up.

A chain of stand-ins leads from the float model's output F to the runtime's H, one cause more at each step:

    F -> simulation -> with each fault that was found, in the order found -> forced through the runtime's codes -> H

The steps are *quantization* (what the plan costs), one for each fault (wrong scale, saturation, fallback,
preprocessing, ...), *rounding* (codes that float operators flipped at boundaries, and everything that follows from
them) and *float operators* (what the runtime's operators do behind the last quantizer, and whatever no cause was found
for).

The steps d_i of the output add up to H - F exactly. Their powers do not, so the share of a step is its projection on
the whole gap, ``<d_i, H - F> / |H - F|^2``: shares add up to 1, and one that works against the others is negative. The
metric's steps are differences, so they add up to the metric's gap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from s2d_deploy.data import Batch
from s2d_deploy.explain import Explainer, Finding
from s2d_deploy.forced import Forced
from s2d_deploy.session import Array

QUANTIZATION, ROUNDING, REST = "quantization", "rounding at boundaries", "float operators"
_PARTS = {
    "preprocessing": "preprocessing",
    "fallback": "fallback",
    "float-operators": "fusion or placement",
    "stale-artifact": "another artifact",
    "unknown": "unexplained",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One step.

    Attributes:
        name: quantization, rounding at boundaries, wrong scale or saturation, fusion or placement, fallback,
            preprocessing, float operators.
        what: the finding in words, for a fault.
        share: of the gap's power; the shares of all parts add up to 1. None where there is no gap.
        relative_power: power of this step alone over the float output's.
        metric: the step of the metric, in its points; None without a metric.
    """

    name: str
    what: str
    share: float | None
    relative_power: float
    metric: float | None


@dataclass(frozen=True, slots=True)
class Gap:
    """The split.

    Attributes:
        parts: in the order of the chain.
        relative_power: of the whole gap over the float output's.
        metric: the whole gap of the metric; None without one.
        samples: how many.
    """

    parts: tuple[Part, ...]
    relative_power: float
    metric: float | None
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """For the report: ``parity.gap``."""
        return asdict(self)


def split_gap(outputs: Sequence[tuple[str, str, Array]], metric: Callable[[Array], float] | None = None) -> Gap:
    """Split the way along `outputs`.

    Args:
        outputs: ``(name of the step that leads here, what it is, output)``; the first is the float model's.
        metric: of an output; None for none.

    Returns:
        one part for each step; parts of one name and text are not merged.
    """
    arrays = [np.asarray(array, np.float64) for _, _, array in outputs]
    whole = arrays[-1] - arrays[0]
    power, signal = float(np.sum(whole * whole)), max(float(np.sum(arrays[0] * arrays[0])), np.finfo(np.float64).tiny)
    values = [None if metric is None else metric(array.astype(np.float32)) for array in arrays]
    parts = []
    for i in range(1, len(arrays)):
        step = arrays[i] - arrays[i - 1]
        before, after = values[i - 1], values[i]
        parts.append(
            Part(
                outputs[i][0],
                outputs[i][1],
                float(np.sum(step * whole)) / power if power else None,
                float(np.sum(step * step)) / signal,
                None if before is None or after is None else after - before,
            )
        )
    first, last = values[0], values[-1]
    total = None if first is None or last is None else last - first
    return Gap(tuple(parts), power / signal, total, len(arrays[0]))


def part_of(finding: Finding) -> str:
    """Which part of the gap a finding's cause belongs to."""
    return _PARTS.get(finding.cause, "wrong scale or saturation")


def chain(
    explainer: Explainer,
    findings: Sequence[Finding],
    batches: Sequence[Batch],
    float_output: Array,
    simulated_output: Array,
    runtime_output: Array,
    replaced: Batch | None = None,
) -> list[tuple[str, str, Array]]:
    """The stand-ins for `split_gap` on the samples of `batches`.

    Args:
        explainer: has explained; its corrections are run again in FP32.
        findings: in its order.
        batches: the samples.
        float_output, simulated_output, runtime_output: on the same samples.
        replaced: inputs as the runtime sees them, where preprocessing was found at fault (for one batch only).
    """
    steps = [("", "", float_output), (QUANTIZATION, "", simulated_output)]
    forced = Forced(explainer.simulated, explainer.plan, torch.float32)

    def run(codes: bool) -> Array:
        results = []
        for batch in batches:
            given = explainer.session.codes({n: t.numpy() for n, t in batch.items()}) if codes else None
            with torch.no_grad():
                result = forced.run(replaced if replaced is not None else batch, explainer.output, given)
            if result is None:
                raise RuntimeError("the pass has no output")
            results.append(result.numpy())
        array: Array = np.concatenate(results)
        return array

    corrections = explainer.forced
    used: set[str] = set()
    for finding in findings:
        if finding.layer == "*":
            continue
        added = False
        for op in (finding.layer,):
            if op in corrections.products and op not in used and finding.cause != "preprocessing":
                forced.products[op] = corrections.products[op]
                used.add(op)
                added = True
        for site, change in corrections.quantizers.items():
            if (
                site not in used
                and finding.site is not None
                and explainer.quantizers.get(site) is explainer.quantizers.get(finding.site)
            ):
                forced.quantizers[site] = change
                used.add(site)
                added = True
        if finding.site in corrections.passed:
            forced.passed.add(str(finding.site))
            added = True
        if finding.cause == "preprocessing" and replaced is not None:
            added = True
        if added:
            steps.append((part_of(finding), f"{finding.layer}: {finding.detail}", run(codes=False)))
    if explainer.codes:
        steps.append((ROUNDING, "", run(codes=True)))
    steps.append((REST, "", runtime_output))
    return steps


__all__ = ["Gap", "Part", "chain", "part_of", "split_gap"]
