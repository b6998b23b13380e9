"""Where TVM's time goes: every kernel of one model against the machine's peak, size, compile time and memory.

    python benchmarks/tvm_layers.py --model vit-base

The machine's peak is measured first, on registers, and again at the end: the higher one counts. Weights and inputs
are random. Times are those that TVM's virtual machine sees around each function, in a process that does nothing else.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
from _common import Figure, Record, at_most, table

LINEAR, WHOLE, SIZE, COMPILE_SECONDS = 0.85, 0.60, 0.16, 60.0


def arguments_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = _common.parser(
        "tvm_layers.py",
        str(__doc__),
        "models: vit-tiny, vit-small, vit-base (224 px, patches of 16), minilm-l6 (128 tokens)\n"
        f"figures: each kind of linear layer >= {LINEAR:.0%} of the peak, the whole model >= {WHOLE:.0%},\n"
        f"quantized weights <= {SIZE} of FP32, compile <= {COMPILE_SECONDS:.0f} s",
    )
    made.add_argument("--model", default="vit-base", help="architecture (default: vit-base)")
    made.add_argument("--precision", default="w4a4", help="one precision (default: w4a4)")
    made.add_argument("--batch", type=_common.positive, default=1, help="samples in a call (default: 1)")
    made.add_argument("--threads", type=_common.positive, default=2, help="default: 2")
    made.add_argument("--runs", type=_common.positive, default=40, help="default: 40")
    made.add_argument("--work", type=Path, default=_common.WORK, metavar="DIR", help="kept artifacts")
    return made


def at_least(name: str, value: float, limit: float, note: str = "") -> Figure:
    """A share that must not fall below its goal; `Figure` counts the distance from 1, which must not exceed it."""
    return at_most(name, 1 - value, round(1 - limit, 4), note)


def kinds_of(kernels: Sequence[Any], macs: dict[str, int], linear: set[str], peak: float) -> list[dict[str, Any]]:
    """Kernels by function: calls, time, and for products the rate and its share of the peak.

    Args:
        kernels: `KernelTime`s of one run.
        macs: of the whole batch, by op.
        linear: names of ops with stored weights.
        peak: GMAC/s.
    """
    found: dict[str, dict[str, Any]] = {}
    for k in kernels:
        kind = found.setdefault(
            k.function, {"function": k.function, "calls": 0, "us": 0.0, "macs": 0, "linear": k.op in linear}
        )
        kind["calls"] += 1
        kind["us"] += k.p50_us
        kind["macs"] += macs.get(k.op, 0)
    for kind in found.values():
        kind["gmacs"] = kind["macs"] / kind["us"] / 1e3 if kind["macs"] and kind["us"] else None
        kind["share_of_peak"] = kind["gmacs"] / peak if kind["gmacs"] is not None else None
    return sorted(found.values(), key=lambda kind: -kind["us"])


def run(chosen: argparse.Namespace) -> int:
    """Measure, print, write."""
    _common.limit_threads(chosen.threads)
    from _models import Bench, shape_of
    from _peak import measure_peaks

    from s2d_deploy.footprint import measure_footprint
    from s2d_deploy.latency import measure
    from s2d_deploy.registry import load_runtime

    shape = shape_of(chosen.model, None, None, None)
    record = Record(f"tvm-layers-{shape.name}-{chosen.precision}-b{chosen.batch}", chosen.threads)

    def int8_peak() -> float:
        return max(p.gmacs for p in measure_peaks(chosen.threads) if p.kind == "int8" and p.threads == chosen.threads)

    peak = int8_peak()
    with Bench(shape, chosen.work) as bench:
        artifact, stage = bench.build("tvm", chosen.precision, chosen.batch)
        feeds = bench.feeds(chosen.batch)
        with load_runtime("tvm").open(artifact, threads=chosen.threads) as session:
            name = "run"
            stats = measure(
                {name: lambda: session.run(feeds)}, warmup=5, min_samples=chosen.runs, min_seconds=0, max_seconds=300
            )[name]
            kernels = session.profile(feeds, chosen.runs)  # type: ignore[attr-defined]
        footprint = measure_footprint(artifact, feeds, threads=chosen.threads)
        peak = max(peak, int8_peak())
        macs = {name: op.macs * chosen.batch for name, op in bench.ops.items()}
        sites = bench.plan(chosen.precision).sites
        quantized = {name for name in bench.ops if f"{name}.weight" in sites}
        linear = {name for name in quantized if bench.ops[name].kind == "linear" and macs[name] > 1e6 * chosen.batch}
        float_bytes = sum(4 * bench.ops[name].k * bench.ops[name].n for name in quantized)
        kinds = kinds_of(kernels, macs, linear, peak)
        total = sum(macs.values())
    whole = total / stats.p50_ms / 1e6 / peak
    print(f"peak: {peak:.0f} GMAC/s INT8; {shape.name}, batch {chosen.batch}: {total / 1e9:.2f} GMAC\n")
    rows = [
        (
            kind["function"],
            str(kind["calls"]),
            f"{kind['us']:.0f}",
            "-" if kind["gmacs"] is None else f"{kind['gmacs']:.0f}",
            "-" if kind["share_of_peak"] is None else f"{kind['share_of_peak']:.0%}",
        )
        for kind in kinds
        if kind["us"] >= 1
    ]
    print(table(("function", "calls", "us", "GMAC/s", "share of peak"), rows))
    memory = footprint.memory_bytes if footprint is not None else None
    note = "" if stats.stable else f"not stable: {stats.note}"
    figures = [
        at_least(f"{kind['function']}, distance from the peak", kind["share_of_peak"], LINEAR)
        for kind in kinds
        if kind["linear"] and kind["share_of_peak"] is not None
    ]
    figures += [
        at_least("whole model, distance from the peak", whole, WHOLE, note),
        at_most("quantized weights over FP32", (artifact.info.get("weight_size_bytes") or 0) / float_bytes, SIZE),
        at_most("compile and link, seconds", float(stage.manifest["seconds"]), COMPILE_SECONDS),
        at_most("memory while running, MB", memory / 1e6 if memory else None, None),
    ]
    print(f"\nwhole model: p50 {stats.p50_ms:.2f} ms, {whole:.0%} of the peak\n")
    data = {
        "model": shape.name,
        "precision": chosen.precision,
        "batch": chosen.batch,
        "threads": chosen.threads,
        "peak_gmacs": peak,
        "macs": total,
        "latency_ms": stats.to_dict(threads=chosen.threads, batch=chosen.batch),
        "kernels": kinds,
        "footprint": footprint.to_dict() if footprint is not None else None,
        "float_weight_bytes": float_bytes,
        "weight_bytes": artifact.info.get("weight_size_bytes"),
    }
    return _common.finish(record, chosen.results, figures, data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return _common.guarded(run, arguments_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
