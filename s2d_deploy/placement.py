"""Placements that a target measures before it builds, as a stage of a run; and what the report says of them.

A target that can (`session.SearchingTarget`) writes its dialect by options of its own, and may first measure on the
runtime which form of each op is fastest here. The search is a stage (``placement/<target>/<precision>``), so it is made
once for a common file, a machine, a version and a number of threads; the export is keyed by what it found, and so the
placement that was measured is the one that ships.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from s2d_deploy.console import Step
from s2d_deploy.host import cpu_model
from s2d_deploy.session import Runtime, SearchingTarget, Target
from s2d_deploy.store import Stage, read_json, write_json

if TYPE_CHECKING:
    from s2d_deploy.pipeline import Pipeline

_FILE = "placement.json"


def placement_stage(
    pipeline: Pipeline,
    target: Target,
    common: Stage,
    *,
    precision: str,
    options: Mapping[str, Any],
    batches: Sequence[int],
    sizes: Mapping[str, int],
    version: str,
) -> Stage | None:
    """The search that a recipe asks for, or None where it asks for none.

    Args:
        pipeline: of the run.
        target: of the export.
        common: the stage of the common ONNX file.
        precision: of that file.
        options: of the target.
        batches: sizes that will be run.
        sizes: of the other dynamic dimensions.
        version: of the runtime.
    """
    if not isinstance(target, SearchingTarget) or options.get("placement") != "search":
        return None
    threads = pipeline.recipe.bench.threads

    def work(folder: Path, step: Step) -> dict[str, Any]:
        found = target.search(
            common.folder / "model.onnx",
            precision=precision,
            options=options,
            batches=batches,
            sizes=sizes,
            threads=threads,
            progress=step,
        )
        document = found or {}
        write_json(folder / _FILE, document)
        kept = document.get("kept_float", [])
        step.note = f"{len(document.get('forms', {}))} ops in another form" + (
            f", {len(kept)} in float" if kept else ""
        )
        return {"kept_float": kept}

    key = {
        "onnx": common.sha256,
        "options": dict(options),
        "batches": list(batches),
        "sizes": dict(sizes),
        "threads": threads,
        "runtime": version,
        "cpu": cpu_model(),
    }
    return pipeline._stage(f"placement/{target.name}/{precision}", key, work)


def write_dialect(
    target: Target, model: Path, folder: Path, *, precision: str, options: Mapping[str, Any], placement: Stage | None
) -> Path:
    """The target's dialect of a common file, in the placement that a search found."""
    if not isinstance(target, SearchingTarget):
        return target.dialect(model, folder, precision=precision)
    found = None if placement is None else read_json(placement.folder / _FILE)
    return target.dialect_for(model, folder, precision=precision, options=options, placement=found)


def placement_row(options: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """What a report's row says of a placement: only where the recipe asks for a search, and the artifact holds one.

    The gate ``executed`` takes ``kept_float`` as an exception, so nothing else may bring it in.
    """
    placed = info.get("placed")
    if options.get("placement") != "search" or not isinstance(placed, Mapping):
        return {}
    return {
        "placement": {
            "margin": placed["margin"],
            "kept_float": list(placed["kept_float"]),
            "forms": len(placed["forms"]),
            "why": placed["whole"]["why"],
        }
    }


def device_of(runtime: Runtime, options: Mapping[str, Any]) -> str:
    """What artifacts with these options run on: a runtime may choose its device by them (ONNX Runtime's providers)."""
    chosen = getattr(runtime, "device_for", None)
    return str(chosen(options)) if chosen is not None else runtime.device()


def slower_than_float(
    target: str, precision: str, speedup: Mapping[str, Any], options: Mapping[str, Any]
) -> str | None:
    """What to use instead where a quantized artifact is surely slower than float; None where it is not.

    Args:
        target: name of the target.
        precision: of the artifact.
        speedup: ``{"median", "ci"}`` over the float baseline.
        options: of the target.
    """
    if speedup["ci"][1] >= 1:
        return None
    told = f"{precision} takes {1 / speedup['median']:.2f} of the float model's time on {target}"
    if target != "ort":
        return f"{told}: quantized weights save memory here, not time"
    searched = options.get("placement") == "search"
    if precision.endswith("a16"):
        why = "MatMulNBits unpacks each weight for every call, and multiplies in float"
        other = "w8a8 or w4a8, which multiply integers"
    else:
        why, other = "the quantizers cost more than the integer products save at these shapes", "fp32"
    search = (
        "" if searched else "targets: [{name: ort, options: {placement: search}}] (weights dequantized at load), or "
    )
    return f"{told}: {why}. Instead: {search}{other}"


__all__ = ["device_of", "placement_row", "placement_stage", "slower_than_float", "write_dialect"]
