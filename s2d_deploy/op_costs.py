"""What each op costs on a target at each precision, measured: milliseconds for ``mixed: {costs: FILE}``.

Every op is cut out of the common ONNX file of a plainly rounded plan (`one_op`), built and run by the target's own
means, so that the kernel that is timed is the one that a deployed model runs; ops that do the same work are measured
once. The precisions of one op take turns in one process (`latency.measure`).

What a sum of these figures is not: the model's latency. Operators between contractions are left out, tensors that
several layers share are quantized once for each, an op alone finds its weights in the cache, and what a runtime fuses
across ops is not seen, and each figure holds one call of the runtime (some 8 us in ONNX Runtime, 35 in TVM, where a
whole model pays it once). Differences between precisions of one op are what the assignment needs; those are measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from s2d_deploy.attention import use_visible_attention, watching
from s2d_deploy.calibrate import Calibration
from s2d_deploy.errors import RecipeError, UnsupportedError, message
from s2d_deploy.host import host_facts
from s2d_deploy.latency import measure
from s2d_deploy.plan import Op
from s2d_deploy.precision import BASELINE, parse_precision
from s2d_deploy.quantize import build_plan
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.session import Progress

if TYPE_CHECKING:
    import onnx

    from s2d_deploy.pipeline import Pipeline
    from s2d_deploy.recipe import BenchSection, TargetSection

KIND, VERSION = "s2d-deploy op costs", 1


def ops_digest(ops: Mapping[str, Op]) -> str:
    """sha256 of names, kinds and sizes of `ops`: costs belong to a model of this form, whatever its weights."""
    rows = [[op.name, op.kind, op.k, op.n, op.macs] for op in ops.values()]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def measure_op_costs(pipeline: Pipeline, section: TargetSection, precisions: Sequence[str]) -> dict[str, Any]:
    """Time every op of the pipeline's model at each of `precisions` on one target.

    Returns:
        The costs file's document: ``costs`` is ``{op: {precision: milliseconds}}`` (medians), ``measured`` has a row
        for each distinct work and precision with count, median, spread and what was executed; beside them model,
        target, runtime, device, host, batch, threads.

    Raises:
        RecipeError: no precision but the baseline.
        UnsupportedError, UnavailableError: the target cannot express a precision, or cannot run here.
    """
    wanted = list(dict.fromkeys(parse_precision(p).name for p in precisions))
    if wanted in ([], [BASELINE]):
        raise RecipeError(message("no precision to measure ops at", fix="name some: --precision w8a8 --precision w4a4"))
    if section.device is not None:
        raise UnsupportedError(message("ops alone are measured on this machine only", fix="leave the device out"))
    if section.name == "reference":
        raise UnsupportedError(
            message(
                "latency is not measured on the target 'reference': the integer reference is slow on purpose",
                fix="name another: --target ort",
            )
        )
    bench, model, ops = pipeline.recipe.bench, pipeline.model, pipeline.ops
    # Before anything is exported: which inputs each op gets for one batch of the benchmark.
    size = min(bench.batch_size, pipeline.data.test.size)
    shapes = operand_shapes(model.module, ops, pipeline.data.test.load(list(range(size))))
    calibration = Calibration.load(pipeline.calibrate().folder / "calibration.safetensors")
    sample = next(iter(pipeline.data.test.batches(2)))
    with TemporaryDirectory(prefix="s2d-op-costs-") as scratch, pipeline.display.step("op costs") as step:
        files: dict[str, onnx.ModelProto] = {}
        for precision in wanted:
            step(f"exporting {precision}")
            plan = build_plan(model.module, ops, calibration, precision, pipeline._quantize_config())
            files[precision] = load_exporter()(
                model.module, plan, sample, [model.output], Path(scratch, f"{precision}.onnx"), dynamic={}
            )
        rows = _measured(files, ops, shapes, section, bench, Path(scratch), step)
        step.note = f"{len(rows)} measurements of {len(ops)} ops"
    costs = {name: {r["precision"]: r["median_ms"] for r in rows if name in r["ops"]} for name in ops}
    runtime = load_runtime(section.name)
    return {
        "kind": KIND,
        "version": VERSION,
        "unit": "ms",
        "model": ops_digest(ops),
        "target": section.name,
        "runtime": runtime.version(),
        "device": runtime.device(),
        "host": host_facts(bench.threads),
        "batch": size,
        "threads": bench.threads,
        "costs": costs,
        "measured": rows,
    }


def operand_shapes(
    model: nn.Module, ops: Mapping[str, Op], batch: Mapping[str, Tensor]
) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of each op's float inputs for `batch`, left before right, as the exported product takes them."""
    use_visible_attention(model)
    names = {module: name for name, module in model.named_modules()}
    found: dict[str, list[tuple[int, ...]]] = {}
    operands: dict[str, tuple[int, ...]] = {}

    def on_layer(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found[names[module]] = [tuple(args[0].shape)]

    def on_operand(module: nn.Module, operand: str, x: Tensor) -> None:
        operands[f"{names[module]}.{operand}"] = tuple(x.shape)

    handles = [
        model.get_submodule(op.name).register_forward_pre_hook(on_layer)
        for op in ops.values()
        if op.kind in ("linear", "conv")
    ]
    try:
        with torch.no_grad(), watching(on_operand):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    for op in ops.values():
        if op.kind in ("scores", "context"):
            found[op.name] = [operands[site] for site, _ in op.sites]  # keys come transposed
    return found


def _measured(
    files: Mapping[str, onnx.ModelProto],
    ops: Mapping[str, Op],
    shapes: Mapping[str, list[tuple[int, ...]]],
    section: TargetSection,
    bench: BenchSection,
    scratch: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row for each distinct work and precision."""
    from s2d_deploy.one_op import one_op, signature

    parts = {name: {p: one_op(file, name, shapes[name]) for p, file in files.items()} for name in ops}
    alike: dict[Any, list[str]] = {}
    for name, models in parts.items():
        alike.setdefault((tuple(shapes[name]), *map(signature, models.values())), []).append(name)
    rows = []
    for number, members in enumerate(alike.values(), 1):
        op = ops[members[0]]
        progress(f"{number} of {len(alike)}: {op.name}")
        feeds = _feeds(shapes[op.name])
        with ExitStack() as stack:
            sessions = {}
            for precision, model in parts[op.name].items():
                folder = scratch / f"{number}-{precision}"
                folder.mkdir()
                sessions[precision] = stack.enter_context(_opened(model, folder, precision, section, bench, feeds))
            executed = {p: [e.precision for e in s.audit().ops if e.name == op.name] for p, s in sessions.items()}
            stats = measure(
                {p: partial(s.run, feeds) for p, s in sessions.items()},
                warmup=bench.warmup,
                min_samples=bench.min_samples,
                min_seconds=bench.min_seconds,
                max_seconds=bench.max_seconds,
            )
        for precision, found in stats.items():
            rows.append(
                {
                    "ops": members,
                    "op_kind": op.kind,
                    "inputs": {name: list(x.shape) for name, x in feeds.items()},
                    "k": op.k,
                    "n": op.n,
                    "precision": precision,
                    "executed": executed[precision][0] if executed[precision] else None,
                    "median_ms": found.p50_ms,
                    "count": len(found.samples_ns),
                    "spread": found.spread,
                    "stable": found.stable,
                    "note": found.note,
                }
            )
    return rows


def _feeds(shapes: Sequence[tuple[int, ...]]) -> dict[str, np.ndarray[Any, Any]]:
    generator = np.random.default_rng(0)
    return {
        name: generator.standard_normal(shape, dtype=np.float32)
        for name, shape in zip(("left", "right"), shapes, strict=False)
    }


def _opened(
    model: onnx.ModelProto,
    folder: Path,
    precision: str,
    section: TargetSection,
    bench: BenchSection,
    feeds: Mapping[str, np.ndarray[Any, Any]],
) -> Any:
    """A session of the target for one op."""
    import onnx

    common, made = folder / "common", folder / "made"
    common.mkdir()
    made.mkdir()
    onnx.save_model(model, common / "model.onnx")
    target = load_target(section.name)
    options = target.shape_options([len(next(iter(feeds.values())))], {}) | section.options
    dialect = target.dialect(common / "model.onnx", made, precision=precision)
    artifact = target.build(dialect, made, precision=precision, options=options, progress=lambda _text: None)
    return load_runtime(section.name).open(artifact, threads=bench.threads)


__all__ = ["KIND", "VERSION", "measure_op_costs", "operand_shapes", "ops_digest"]
