"""One-shot conditioning as a stage: apply the variants, look at every layer before and after, and say what it bought.

The document is that of trained conditioning (`condition.ConditioningResult`, no steps, no losses), so that the report
shows both alike; ``changes`` and ``quantized`` come on top. ``quantized`` is measured on the test split by the
simulation, rounded to nearest with the recipe's ranges; the recipe's passes are not part of it. What is lost: layers
that were inserted into are shown under their new name, ``<layer>.linear``, beside the old weight's numbers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from s2d_deploy.condition import ConditioningResult, Metric, compared, diagnosed
from s2d_deploy.equalized_linear import layer_name
from s2d_deploy.inserted_layers import INSERTED_FILE, inserted_layers
from s2d_deploy.one_shot import one_shot
from s2d_deploy.one_shot_variants import SHRINKING, check_variants
from s2d_deploy.pcdr import Batch
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.s2d import S2DConfig
from s2d_deploy.session import Progress


def condition_one_shot(
    model: nn.Module,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    variants: Sequence[str],
    *,
    output: str,
    task: str,
    look: S2DConfig,
    factor: float,
    precisions: Sequence[str],
    quantize: QuantizeConfig,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Condition a copy of `model` by calibration data alone.

    Args:
        model: left as it was.
        calibration: for diagnosis, and for every choice that is made.
        held_out: for the metrics only.
        variants: as `one_shot_variants.check_variants` allows them.
        output, task: as in `one_shot.one_shot`.
        look: tau and k_max flag the layers that are shrunk.
        factor: what is left of a flagged singular value.
        precisions: to simulate, before and after.
        quantize: with these ranges and layers.
        metric: measured before and after on the float model.
        progress: called with one line of text now and then.

    Returns:
        The conditioned model, and the JSON document of the stage.
    """
    started = time.perf_counter()
    checked = check_variants(variants)
    before = diagnosed(model, calibration, look, None)
    flagged = {entry["name"]: int(entry["k_target"]) for entry in before if entry["flagged"]}
    changed, result = one_shot(
        model,
        calibration,
        held_out,
        checked,
        output=output,
        task=task,
        flagged=flagged,
        factor=factor,
        precisions=precisions,
        config=quantize,
        progress=progress,
    )
    findings = [result.finding]
    if not flagged and any(v in SHRINKING for v in checked):
        findings.append(
            f"No layer is flagged: no PCDR_k with k <= {look.k_max} reaches tau = {look.tau:g}, so nothing was shrunk."
        )
    count = len(inserted_layers(changed))
    if count:
        findings.append(
            f"The checkpoint holds plain weights of the same float function; the {count} inserted layer(s) lie beside "
            f"it in {INSERTED_FILE}, and only s2d-deploy applies them."
        )
    names = {entry["name"]: entry for entry in before}
    after = diagnosed(changed, calibration, look, None)
    layers = [
        compared(names[layer_name(changed, entry["name"])], entry) | {"name": entry["name"]}
        for entry in after
        if layer_name(changed, entry["name"]) in names
    ]
    document = ConditioningResult(
        method=f"one-shot: {result.variant}",
        seconds=time.perf_counter() - started,
        steps=0,
        layers=layers,
        findings=findings,
        float_before=None if metric is None else metric(model),
        float_after=None if metric is None else metric(changed),
    ).to_dict()
    document["changes"] = [asdict(change) for change in result.changes]
    document["quantized"] = {"metric": result.metric, "before": result.before, "after": result.after}
    return changed, document


__all__ = ["condition_one_shot"]
