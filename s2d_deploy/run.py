"""`run`: every stage of a recipe, then gates and the report. The verbs of the command line are prefixes of it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d_deploy.deployment import UNTIMED, Deployment, Row
from s2d_deploy.errors import exit_code_of
from s2d_deploy.gate import GateLimits, GateVerdict, evaluate, exit_code, overall
from s2d_deploy.host import host_facts, versions
from s2d_deploy.models import parameters
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.precision import BASELINE
from s2d_deploy.recipe import Recipe
from s2d_deploy.report import assemble, write_reports
from s2d_deploy.store import read_json


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        report: the report document.
        files: report.json, report.md, report.html, junit.xml.
        exit_code: 0 all gates passed, 1 a gate failed or is undecided; that of the gravest error, where there is one.
        errors: what broke in single targets; they stand in the report as the reason of an "unavailable" result.
    """

    report: dict[str, Any]
    files: list[Path]
    exit_code: int
    errors: tuple[Exception, ...] = ()


def run(
    pipeline: Pipeline, *, bench: bool = True, command: Sequence[str] | None = None, part: str | None = None
) -> Outcome:
    """All stages, gates and reports.

    A target that breaks does not take the others with it: it is reported as unavailable, and the outcome says so.

    Args:
        pipeline: the recipe in its run folder.
        bench: measure latency.
        command: what the report gives as the command; the process's own arguments by default.
        part: name of a part of the run (some targets, some precisions); its reports go to ``parts/<part>/``, so that
            they do not replace those of the whole.

    Raises:
        S2DDeployError: a stage that all targets share failed; what was finished before is kept.
    """
    recipe = pipeline.recipe
    rows: list[Row] = []
    errors: list[Exception] = []
    for precision in pipeline.precisions:
        pipeline.onnx(precision)
    pipeline.error_analyses()
    for section in recipe.targets:
        deployment = Deployment(pipeline, section)
        rows += deployment.rows(bench=bench)
        errors += deployment.errors
    verdicts = gates(recipe, rows)
    document = document_of(pipeline, rows, verdicts, command)
    root = pipeline.store.root
    files = write_reports(document, root / "parts" / part if part else root)
    code = max(map(exit_code_of, errors)) if errors else exit_code(overall(verdicts))
    return Outcome(document, files, code, tuple(errors))


def gates(recipe: Recipe, rows: Sequence[Mapping[str, Any]]) -> list[GateVerdict]:
    """Judge rows by the recipe's limits, precision by precision (a limit may differ between them)."""
    required = [t.name for t in recipe.targets if t.required]
    verdicts: list[GateVerdict] = []
    for precision in recipe.quantize.precisions:
        limits = recipe.gates.limits_for(precision)
        chosen = [r for r in rows if r["precision"] in (precision, BASELINE)]
        timed = [r for r in chosen if r["target"] not in UNTIMED]
        found: list[GateVerdict] = []
        for part, keep in ((timed, True), ([r for r in chosen if r["target"] in UNTIMED], False)):
            if not part:
                continue
            # The integer reference has no latency to judge.
            mine = limits if keep else limits | {"latency_ratio": None}
            present = {r["target"] for r in part}
            found += evaluate(
                part,
                GateLimits.from_dict(mine),
                # What was measured is held to every limit, whether or not the recipe requires it to be there.
                required=dict.fromkeys([*(name for name in required if name in present), *_measured(part)]),
                precisions=[precision],
            )
        # A limit that one part could not judge was judged by the other: only what neither holds is undecided.
        held = {v.name for v in found if v.target != "*"}
        verdicts += [v for v in found if (v.target != "*" or v.name not in held) and v not in verdicts]
    # The baseline is read beside every precision; it is not itself on trial.
    places = {t.name: i for i, t in enumerate(recipe.targets)}
    order = {p: i for i, p in enumerate(recipe.quantize.precisions)}
    judged = [v for v in verdicts if v.precision != BASELINE]
    return sorted(judged, key=lambda v: (places.get(v.target, len(places)), order.get(v.precision, len(order))))


def _measured(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({str(r["target"]) for r in rows if r["status"] == "measured" and r["precision"] != BASELINE})


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
    )
