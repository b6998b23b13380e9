"""A small valid report with the outcomes of samples, for the tests of gates, baselines, bundles and the pytest plugin.

No number in it was measured: outcomes and latencies come from a formula with a fixed seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from s2d_deploy.judge import gates
from s2d_deploy.latency import LatencyStats, ratio
from s2d_deploy.recipe import load_recipe
from s2d_deploy.report import assemble

N = 400
RECIPE = {
    "name": "sample",
    "model": {"pretrained": "models/sample", "task": "image-classification"},
    "data": {"kind": "images", "path": "images"},
    "quantize": {"precisions": ["w8a8", "w4a4"]},
    "targets": ["ort"],
    "gates": {"accuracy_drop": {"w8a8": 2.0, "w4a4": 4.0}, "accumulators_different": 0, "latency_ratio": 0.9},
}
LABELS = np.arange(N) % 7


def outputs(lost: int, gained: int = 0) -> np.ndarray[Any, Any]:
    """Logits ``(N, 7)``: right but for every tenth sample; then `lost` more wrong ones, and `gained` fewer."""
    logits = np.zeros((N, 7), np.float32)
    right = np.arange(N) % 10 != 0
    right[np.flatnonzero(right)[:lost]] = False
    right[np.flatnonzero(np.arange(N) % 10 == 0)[:gained]] = True
    logits[np.arange(N), np.where(right, LABELS, (LABELS + 1) % 7)] = 1.0
    return logits


def outcomes(logits: np.ndarray[Any, Any]) -> list[float]:
    return ((logits.argmax(axis=1) == LABELS) * 100.0).tolist()


def sample(
    lost: int = 2, gained: int = 1, *, recipe: dict[str, Any] | None = None, data: str = "a" * 64, speed: float = 2.0
) -> dict[str, Any]:
    """The document; `lost` and `gained` are those of w4a4 (w8a8 loses nothing), `speed` its speed-up."""
    resolved = load_recipe(recipe or RECIPE)
    rng = np.random.default_rng(5)
    run = object()
    base = rng.normal(5.0, 0.05, 60)
    stats = {
        name: LatencyStats(name, tuple((base / by * 1e6 + rng.normal(0, 9e3, 60)).astype(int).tolist()), run=run)
        for name, by in (("fp32", 1.0), ("w8a8", 1.8), ("w4a4", speed))
    }
    float_samples = outcomes(outputs(0))
    rows = []
    for precision, logits in (("fp32", outputs(0)), ("w8a8", outputs(0)), ("w4a4", outputs(lost, gained))):
        values = outcomes(logits)
        row: dict[str, Any] = {
            "target": "ort",
            "precision": precision,
            "status": "measured",
            "runtime": "onnxruntime 0.0",
            "device": "cpu",
            "rung": "float" if precision == "fp32" else "native",
            "metric": {
                "name": "top-1 %",
                "n": N,
                "float": float(np.mean(float_samples)),
                "simulated": float(np.mean(values)),
                "measured": float(np.mean(values)),
                "per_sample_float": float_samples,
                "per_sample_measured": values,
            },
            "parity": {"snr_db": None, "max_error": 0.0, "identical": True, "top1_flips": 0},
            "latency_ms": stats[precision].to_dict(threads=1, batch=1),
        }
        if precision != "fp32":
            row["parity"] |= {"accumulators_checked": 100, "accumulators_different": 0}
            row["audit"] = {
                "ops": [{"name": "fc", "kernel": "k", "precision": "int8", "macs": 10, "declared": precision.upper()}]
            }
            row["executed"] = {"int8": 1.0}
            found = ratio(stats["fp32"], stats[precision])
            row |= {"speedup_over_float": found.median, "speedup_ci": [found.lo, found.hi]}
        rows.append(row)
    return assemble(
        command="s2d-deploy run sample.yaml",
        versions={"s2d-deploy": "0.1.0"},
        host={"cpu": "synthetic"},
        recipe=resolved.document(),
        model={"name": "sample"},
        conditioning=None,
        results=rows,
        gates=[v.to_dict() for v in gates(resolved, rows)],
        created="2026-01-02T03:04:05+00:00",
        data={"samples": N, "sha256": data},
    )
