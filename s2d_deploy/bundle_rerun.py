"""An evidence bundle's recipe run again, and compared with what the bundle says: stages, codes, outcomes.

Bit for bit is what the same versions promise on the same kind of machine; another CPU may sum floats in another order,
and then train another model. So the differences of versions and CPU are said beside what differs. Latency is not
compared: it belongs to a machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from s2d_deploy.bundle_check import SIMULATED, Claim, Evidence
from s2d_deploy.code_hashes import hash_codes, read_hashes
from s2d_deploy.deployment import Deployment
from s2d_deploy.host import cpu_model, versions
from s2d_deploy.manifest import differences
from s2d_deploy.paired import paired_drop
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.precision import BASELINE
from s2d_deploy.run import data_of

_PLACES = ("data.path:", "model.pretrained:", "model.weights:")  # where things lie is no part of what they are
# Stages that the machine's speed and the day have no part in.
_STABLE = ("train", "condition", "calibrate", "quantize", "onnx")


def rerun(evidence: Evidence, pipeline: Pipeline) -> list[Claim]:
    """Run the pipeline as far as verification, and compare.

    Args:
        evidence: what was claimed.
        pipeline: of the bundle's recipe, in a run folder; overrides may have told it where the data lie.

    Raises:
        S2DDeployError: the recipe cannot be run here: data missing, a stage failed.
    """
    changed = [
        text for text in differences(evidence.recipe, pipeline.recipe.document()) if not text.startswith(_PLACES)
    ]
    claims = [Claim("the bundle's own recipe is run", not changed, "; ".join(changed))]
    stated = (evidence.report.get("data") or {}).get("sha256")
    found = data_of(pipeline)
    claims.append(Claim(f"run on the same {found['samples']} samples", stated == found["sha256"], found["sha256"][:12]))
    if stated != found["sha256"]:
        return claims
    rows = {(r["target"], r["precision"]): r for r in evidence.report["results"] if r["status"] == "measured"}
    for precision in pipeline.precisions:
        pipeline.onnx(precision)
        claims += _simulation(evidence, pipeline, precision)
    for section in pipeline.recipe.targets:
        deployment = Deployment(pipeline, section)
        for precision in pipeline.precisions:
            row = rows.get((section.name, precision))
            if row is not None:
                claims += _runtime(evidence, deployment, precision, row)
    stages = {entry.get("stage"): entry for entry in evidence.facts["stages"]}
    made = {name: s for name, s in pipeline._stages.items() if name.split("/")[0] in _STABLE and name in stages}
    same = [
        name for name, stage in made.items() if _digests(stages[name]) == _digests({"files": stage.manifest["files"]})
    ]
    other = [name for name in made if name not in same]
    note = f"other bytes: {', '.join(other)}; {_differences(evidence)}" if other else ""
    claims.append(Claim(f"files of {len(made)} stages have the same digests", None if other else True, note))
    return claims


def _simulation(evidence: Evidence, pipeline: Pipeline, precision: str) -> list[Claim]:
    stated = evidence.outputs.get((SIMULATED, precision))
    if stated is None:
        return []
    mine = pipeline.simulated_outputs(precision)
    what = f"simulation {precision}: outputs bit for bit"
    if mine.shape != stated.shape:
        return [Claim(what, False, f"shape {mine.shape}, not {stated.shape}")]
    if np.array_equal(mine, stated):
        return [Claim(what, True)]
    error = float(np.abs(mine.astype(np.float64) - stated).max())
    return [Claim(what, False, f"largest difference {error:.3g}; {_differences(evidence)}")]


def _runtime(evidence: Evidence, deployment: Deployment, precision: str, row: Mapping[str, Any]) -> list[Claim]:
    where = f"{deployment.section.name} {precision}"
    reason = deployment.runtime.available()
    if reason is not None:
        return [Claim(f"{where}: run again", None, reason)]
    info = deployment.verify(precision).info
    then, now = (row.get("metric") or {}).get("per_sample_measured") or [], info["per_sample"]
    changed = sum(a != b for a, b in zip(then, now, strict=True)) if len(then) == len(now) else max(len(then), len(now))
    note = ""
    if changed and len(then) == len(now):
        drop = paired_drop(then, now)
        note = f"{changed} of {len(now)} differ; drop {drop.drop:.4g}, 95 % interval [{drop.lo:.4g}, {drop.hi:.4g}]"
        note += f"; {_differences(evidence)}"
    claims = [Claim(f"{where}: {len(now)} outcomes as stated", not changed, note)]
    hashes = evidence.facts["codes"].get(f"{deployment.section.name}/{precision}")
    if precision == BASELINE or not isinstance(hashes, Mapping):
        return claims
    mine = read_hashes(hash_codes(deployment, precision))
    for kind in ("weights", "simulated", "runtime"):
        table = hashes.get(kind) or {}
        other = [name for name in {**table, **mine[kind]} if table.get(name) != mine[kind].get(name)]
        note = (
            f"other: {', '.join(other[:4])}{', ...' if len(other) > 4 else ''}; {_differences(evidence)}"
            if other
            else ""
        )
        claims.append(Claim(f"{where}: hashes of {len(mine[kind])} {_KINDS[kind]}", not other, note))
    return claims


_KINDS = {
    "weights": "weights' codes",
    "simulated": "sites' codes, simulated",
    "runtime": "sites' codes, on the runtime",
}


def _digests(entry: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    files = entry.get("files")
    return sorted((f.get("name"), f.get("sha256")) for f in files) if isinstance(files, list) else []


def _differences(evidence: Evidence) -> str:
    """What is different about this machine: the first thing to look at where bits differ."""
    then, now = evidence.report.get("versions") or {}, versions()
    found = [f"{name} {now.get(name)}, was {value}" for name, value in then.items() if now.get(name) != value]
    cpu = (evidence.report.get("host") or {}).get("cpu")
    if cpu != cpu_model():
        found.append(f"CPU {cpu_model()}, was {cpu}")
    return "; ".join(found[:6]) or "versions and CPU are the same"
