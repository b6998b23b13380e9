"""What `verify` finds out beyond counts: self-consistency, causes, the error budget, the gap in parts, a reproducer.

Everything here looks at a few samples (`FEW`), apart from the split of the gap, which needs a metric and takes up to
`GAP_SAMPLES`. A step that breaks is named in the result and takes no other with it: counts and metric stand anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from s2d_deploy.consistency import agrees, self_consistency, to_dicts
from s2d_deploy.data import Batch
from s2d_deploy.error_budget import ErrorBudget, make_budget
from s2d_deploy.errors import UnsupportedError
from s2d_deploy.explain import IDENTICAL, ROUNDING, Explainer, Explanation
from s2d_deploy.gap import chain, split_gap
from s2d_deploy.plan import Plan
from s2d_deploy.probing import op_values, quantizer_sources
from s2d_deploy.reproducer import write_reproducer
from s2d_deploy.session import Array, Session

log = logging.getLogger(__name__)

FEW = 4
GAP_SAMPLES = 32
_NO_LAYER = ("stale-artifact", "preprocessing")
FOLDER = "reproducer"


def examine(
    session: Session,
    model: nn.Module,
    simulated: nn.Module,
    plan: Plan,
    common: Path,
    load: Callable[[Sequence[int]], Batch],
    outputs: Mapping[str, Array],
    output: str,
    folder: Path,
    *,
    counts: Mapping[str, Any],
    samples: int,
    batch_size: int,
    metric: Callable[[Array], float] | None = None,
    second: Callable[[], AbstractContextManager[Session]] | None = None,
    step: Callable[[str], None] = lambda _text: None,
) -> dict[str, Any]:
    """Everything, as further keys of the report's ``parity``.

    Args:
        session: open.
        model: the float model behind the plan.
        simulated: its simulation.
        plan: its quantization, with sites.
        common: the pristine common ONNX file.
        load: gives the samples of some indices.
        outputs: ``float``, ``simulated``, ``runtime``: of all samples, from the first on.
        output: name of the model's output.
        folder: where a reproducer goes.
        counts: what `verify.end_to_end_codes` and `parity.output_parity` have found, on `samples` samples.
        samples: how many were compared end to end.
        batch_size: for passes over many samples.
        metric: of an output of the first samples, in its points.
        second: opens another build of the same artifact.
        step: is told what is being done.

    Returns:
        ``explanation``, ``consistency``, ``budget``, ``gap``; ``unexamined`` names steps that broke, with the reason.
    """
    found: dict[str, Any] = {}
    broken: dict[str, str] = {}
    few = load(list(range(min(FEW, samples))))

    def attempt(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # an adapter or a model may break in its own way; the counts must not go with it
            log.info("%s broke", name, exc_info=error)
            broken[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            return None

    step("the runtime against itself")
    agreed = attempt("consistency", lambda: _consistent(session, few, output, second))
    if agreed is not None:
        found["consistency"] = agreed
    explainer = Explainer(session, simulated, plan, few, output, quantizer_sources(common), step)
    explanation: Explanation | None = attempt("explanation", explainer.explain)
    step("the error budget")
    budget: ErrorBudget | None = attempt("budget", lambda: make_budget(model, simulated, plan, [few], output))
    if budget is not None:
        found["budget"] = budget.to_dict() | _allowed(budget, counts, samples)
    if explanation is not None:
        found["explanation"] = explanation.to_dict()
        place = attempt("reproducer", lambda: _reproduce(folder, explainer, explanation, common))
        if place is not None:
            found["explanation"]["reproducer"] = place
        step("the gap in parts")
        gap = attempt("gap", lambda: _gap(explainer, explanation, load, outputs, counts, samples, batch_size, metric))
        if gap is not None:
            found["gap"] = gap
    found["verdict"] = verdict(found)
    if broken:
        found["unexamined"] = broken
    return found


def verdict(found: Mapping[str, Any]) -> str:
    """``pass``: nothing but rounding, within the network's tolerances; ``fail``; ``undecided`` where a step broke."""
    explanation = found.get("explanation")
    if explanation is not None and explanation["verdict"] not in (IDENTICAL, ROUNDING):
        return "fail"
    if found.get("consistency", {}).get("agrees") is False or found.get("budget", {}).get("within") is False:
        return "fail"
    return "pass" if explanation is not None and "budget" in found else "undecided"


def _consistent(
    session: Session, batch: Batch, output: str, second: Callable[[], AbstractContextManager[Session]] | None
) -> dict[str, Any]:
    feeds = {name: tensor.numpy() for name, tensor in batch.items()}
    if second is None:
        rows = self_consistency(session, feeds, output)
    else:
        with second() as other:
            rows = self_consistency(session, feeds, output, second=other)
    return {"agrees": agrees(rows), "runs": to_dicts(rows)}


def _allowed(budget: ErrorBudget, counts: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """The tolerances for so many samples, and whether what was seen keeps them."""
    codes, snr = budget.allowed_codes(samples), budget.allowed_output_snr_db(samples)
    different, seen = counts.get("codes_different"), counts.get("snr_db")
    inside = (different is None or different <= codes) and (seen is None or snr is None or seen >= snr)
    return {
        "allowed_codes": codes,
        "allowed_output_snr_db": snr,
        "seen_codes": different,
        "seen_output_snr_db": seen,
        "within": inside if different is not None else None,
        "compared_samples": samples,
    }


def _reproduce(folder: Path, explainer: Explainer, explanation: Explanation, common: Path) -> str | None:
    values = op_values(common)
    for finding in explanation.findings:
        if finding.cause not in _NO_LAYER:
            try:
                write_reproducer(folder / FOLDER, explainer, finding, values)
            except UnsupportedError as error:
                log.info("no reproducer of %s: %s", finding, error)
                continue
            return FOLDER
    return None


def _gap(
    explainer: Explainer,
    explanation: Explanation,
    load: Callable[[Sequence[int]], Batch],
    outputs: Mapping[str, Array],
    counts: Mapping[str, Any],
    samples: int,
    batch_size: int,
    metric: Callable[[Array], float] | None,
) -> dict[str, Any]:
    # Inputs as the runtime sees them are known for the explained samples only.
    replaced: dict[str, Tensor] | None = explanation.batch
    same = not explanation.findings and counts.get("codes_different") == 0
    count = explanation.samples if replaced is not None else samples if same else min(samples, GAP_SAMPLES)
    f, s, h = (np.asarray(outputs[k][:count]) for k in ("float", "simulated", "runtime"))
    if same:  # no code moved, so there is nothing between the simulation and its float operators
        steps = [("", "", f), ("quantization", "", s), ("rounding at boundaries", "", s), ("float operators", "", h)]
    else:
        size = count if replaced is not None else min(batch_size, count)
        batches = [load(list(range(i, min(i + size, count)))) for i in range(0, count, size)]
        steps = chain(explainer, explanation.findings, batches, f, s, h, replaced)
    return split_gap(steps, metric).to_dict()
