"""`run`: every stage of a recipe, then gates and the report. The verbs of the command line are prefixes of it."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d_deploy.deployment import Deployment, Row
from s2d_deploy.errors import StageError, exit_code_of
from s2d_deploy.files import digest
from s2d_deploy.gate import GateVerdict, exit_code, overall
from s2d_deploy.host import host_facts, versions
from s2d_deploy.judge import gates
from s2d_deploy.models import parameters
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.precision import BASELINE
from s2d_deploy.report import assemble, write_reports
from s2d_deploy.store import read_json

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        report: the report document.
        files: report.json, report.md, report.html, junit.xml.
        exit_code: 0 all gates passed, 1 a gate failed or is undecided; that of the gravest error, where there is one.
        errors: what broke in single targets or precisions; each stands in the report as the reason of an
            "unavailable" result.
    """

    report: dict[str, Any]
    files: list[Path]
    exit_code: int
    errors: tuple[Exception, ...] = ()


def run(
    pipeline: Pipeline, *, bench: bool = True, command: Sequence[str] | None = None, part: str | None = None
) -> Outcome:
    """All stages, gates and reports.

    A target or a precision that breaks does not take the others with it: it is reported as unavailable, and the
    outcome says so.

    Args:
        pipeline: the recipe in its run folder.
        bench: measure latency.
        command: what the report gives as the command; the process's own arguments by default.
        part: name of a part of the run (some targets, some precisions); its reports go to ``parts/<part>/``, so that
            they do not replace those of the whole.

    Raises:
        S2DDeployError: a stage that all precisions share failed; what was finished before is kept.
    """
    recipe = pipeline.recipe
    rows: list[Row] = []
    errors: list[Exception] = []
    _make_models(pipeline)
    pipeline.error_analyses()
    for section in recipe.targets:
        deployment = Deployment(pipeline, section)
        rows += deployment.rows(bench=bench)
        errors += deployment.errors
    errors += pipeline.broken.values()
    verdicts = gates(recipe, rows)
    document = document_of(pipeline, rows, verdicts, command)
    root = pipeline.store.root
    files = write_reports(document, root / "parts" / part if part else root)
    code = max(map(exit_code_of, errors)) if errors else exit_code(overall(verdicts))
    return Outcome(document, files, code, tuple(errors))


def _make_models(pipeline: Pipeline) -> None:
    """The common ONNX file of every precision; one that cannot be made does not take the others with it."""
    for precision in pipeline.precisions:
        try:
            pipeline.onnx(precision)
        except StageError:  # of the machine: nothing after it could be written either
            raise
        except Exception as error:
            if precision == BASELINE:
                raise
            log.info("%s broke", precision, exc_info=error)
            pipeline.broken[precision] = error


def document_of(
    pipeline: Pipeline, rows: Sequence[Row], verdicts: Sequence[GateVerdict], command: Sequence[str] | None
) -> dict[str, Any]:
    """The report document of a run."""
    recipe = pipeline.recipe
    conditioned = pipeline.condition()
    path = conditioned.folder / "conditioning.json"
    conditioning = None
    if path.is_file():
        conditioning = read_json(path)
        conditioning |= {
            "seconds": conditioned.info["seconds"],
            "application": recipe.condition.application if recipe.condition.method == "s2d" else None,
            "note": " ".join(conditioning.get("findings", [])),
        }
    baseline = pipeline.quantize(BASELINE).info
    return assemble(
        command=shlex.join(command if command is not None else ["s2d-deploy", *sys.argv[1:]]),
        versions={k: v for k, v in versions().items() if v is not None},
        host=host_facts(recipe.bench.threads),
        recipe=recipe.document(),
        model={
            "name": recipe.name,
            "parameters": parameters(pipeline.model.module),
            "float_metric": {"name": baseline["metric"], "n": baseline["n"], "value": baseline["value"]},
        },
        conditioning=conditioning,
        results=rows,
        gates=[v.to_dict() for v in verdicts],
        ranges=pipeline.ranges() if len(pipeline.precisions) > 1 else [],
        errors=pipeline.error_analyses(),
        data=data_of(pipeline),
    )


def data_of(pipeline: Pipeline) -> dict[str, Any]:
    """What the samples were judged on: reports with an equal digest can be compared sample by sample."""
    data = pipeline.data
    tested = {k: v for k, v in data.fingerprint.items() if k not in ("train", "calibration")}
    return {"samples": data.test.size, "sha256": digest(tested)}
