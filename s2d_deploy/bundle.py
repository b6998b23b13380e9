"""The evidence bundle: one file with everything that a claim of a run rests on, for somebody who does not believe it.

    s2d-deploy report my.yaml --bundle evidence.zip      # made from a finished run; what is missing is run first
    s2d-deploy report --check evidence.zip               # every figure and verdict again, from the raw samples
    s2d-deploy report --check evidence.zip --rerun       # and everything anew, where the data are at hand

Inside (`archive.py`): ``report.json`` with every latency sample and every sample's outcome, the resolved
``recipe.json``, ``evidence.json`` (digests of every stage's files and of every code, commands), the labels, and the raw
outputs of simulation and runtimes as far as they are small. The same run gives the same bytes: no time but that of the
newest stage. No absolute path, no pickle. What it does not prove: that the samples in it were measured and not made up.
For that there is --rerun.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from s2d_deploy.archive import write_archive
from s2d_deploy.bundle_check import EVIDENCE, KIND, LABELS, RECIPE, REPORT, SIMULATED
from s2d_deploy.code_hashes import hash_codes, read_hashes
from s2d_deploy.deployment import Deployment
from s2d_deploy.errors import UnavailableError
from s2d_deploy.machine_paths import without_paths
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.precision import BASELINE
from s2d_deploy.session import Array
from s2d_deploy.store import Stage

_MOST_OUTPUT_BYTES = 16 << 20


def make_bundle(pipeline: Pipeline, report: Mapping[str, Any], path: Path) -> str:
    """Write the bundle of a run that `run.run` has just done.

    Args:
        pipeline: after the run; codes are computed now where they have not been.
        report: the run's document.
        path: of the bundle, usually ``.zip``.

    Returns:
        The digest of its content.

    Raises:
        StageError: the machine refuses.
    """
    files: dict[str, bytes] = {}
    left_out: list[str] = []
    outputs = [_output(files, left_out, SIMULATED, p, pipeline.simulated_outputs(p)) for p in pipeline.precisions]
    codes: dict[str, Any] = {}
    measured = {(r["target"], r["precision"]) for r in report["results"] if r["status"] == "measured"}
    for section in pipeline.recipe.targets:
        deployment = Deployment(pipeline, section)
        for precision in pipeline.precisions:
            if (section.name, precision) not in measured:
                continue
            with np.load(deployment.verify(precision).folder / "outputs.npz", allow_pickle=False) as file:
                outputs.append(_output(files, left_out, section.name, precision, file["output"]))
            if precision == BASELINE:
                continue
            try:
                codes[f"{section.name}/{precision}"] = read_hashes(hash_codes(deployment, precision))
            except UnavailableError as error:
                left_out.append(f"codes of {section.name}/{precision}: {error}")
    labels = pipeline.data.test.labels
    if labels is not None:
        files[LABELS] = _json({"labels": labels.tolist()})
    stages = sorted(pipeline._stages.values(), key=lambda stage: stage.name)
    command = report.get("command")
    evidence = {
        "outputs": [entry for entry in outputs if entry is not None],
        "codes": codes,
        "stages": [_stage(stage) for stage in stages],
        "commands": [
            {"figure": "every figure of report.json", "command": command},
            {"figure": "verdicts and ratios again", "command": f"s2d-deploy report --check {path.name}"},
            {"figure": "everything anew", "command": f"s2d-deploy report --check {path.name} --rerun"},
        ],
        "left_out": left_out,
    }
    here = Path.cwd()
    document = {**report, "created": max((stage.manifest["created"] for stage in stages), default=None)}
    files[REPORT] = _json(without_paths(document, here))
    files[RECIPE] = _json(without_paths(pipeline.recipe.document(), here))
    files[EVIDENCE] = _json(without_paths(evidence, here))
    return write_archive(path, KIND, files)


def _output(
    files: dict[str, bytes], left_out: list[str], place: str, precision: str, output: Array
) -> dict[str, Any] | None:
    if output.nbytes > _MOST_OUTPUT_BYTES:
        left_out.append(f"outputs of {place}/{precision}: {output.nbytes >> 20} MiB")
        return None
    name = f"outputs/{place}/{precision}.f32"
    files[name] = np.ascontiguousarray(output, dtype="<f4").tobytes()
    return {"target": place, "precision": precision, "file": name, "shape": list(output.shape)}


def _stage(stage: Stage) -> dict[str, Any]:
    manifest = stage.manifest
    return {
        "stage": stage.name,
        "key_sha256": manifest["key_sha256"],
        "created": manifest["created"],
        "versions": manifest["versions"],
        "files": manifest["files"],
    }


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
