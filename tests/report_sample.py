"""A synthetic report document for the tests of the report. No number in it was measured.

24 layers, three targets by five precisions; measured, built and unavailable results; made by a formula
with a fixed seed, so that every call gives the same document.
"""

from __future__ import annotations

import math
import random
from typing import Any

PRECISIONS = ("fp32", "w8a8", "w4a16", "w4a8", "w4a4")
DROP = {"fp32": 0.0, "w8a8": 0.001, "w4a16": 0.003, "w4a8": 0.006, "w4a4": 0.021}
SPEED = {"fp32": 1.0, "w8a8": 1.62, "w4a16": 0.81, "w4a8": 1.44, "w4a4": 1.55}
LAYERS = [f"vit.layers.{b}.{part}" for b in range(6) for part in ("attention.output", "mlp.fc1", "mlp.fc2", "qkv")]
ATTENTION = [f"vit.layers.{b}.attention.{part}" for b in range(6) for part in ("scores", "context")]


def sample_report() -> dict[str, Any]:
    """The document, JSON only."""
    rng = random.Random(7)  # noqa: S311 - repeatable, not secret
    results = [_result(target, precision, rng) for target in ("ort", "tvm", "tensorrt") for precision in PRECISIONS]
    return {
        "schema_version": "1",
        "created": "2026-01-02T03:04:05+00:00",
        "command": ["s2d-deploy", "run", "synthetic recipe.yaml", "--output", "runs/synthetic"],
        "reproduce": [
            {"figure": "Latency", "command": "s2d-deploy bench runs/synthetic --target ort --precision w8a8"}
        ],
        "versions": {"s2d-deploy": "0.1.0", "torch": "0.0.0", "onnxruntime": "0.0.0", "apache-tvm": "0.0.0"},
        "host": {
            "cpu": "Synthetic CPU",
            "cores": 2,
            "threads": 2,
            "features": ["avx2", "avx512_vnni"],
            "memory_bytes": 8_000_000_000,
            "os": "Linux",
            "gpu": None,
        },
        "recipe": {
            "name": "synthetic",
            "model": {"kind": "vit", "width": 128},
            "condition": {"method": "s2d", "tau": 0.6, "lambda": 0.001},
            "precisions": list(PRECISIONS),
        },
        "model": {
            "name": "synthetic-vit",
            "parameters": 1_204_362,
            "float_metric": {"name": "top-1", "n": 1797, "value": 0.9833},
        },
        "conditioning": {
            "method": "s2d",
            "application": "decoupled",
            "seconds": 83.2,
            "steps": 300,
            "note": "label-free self-distillation",
            "losses": [0.8 * math.exp(-i / 60) + 0.05 for i in range(300)],
            "layers": [_layer(name, i, rng) for i, name in enumerate(LAYERS)],
        },
        "ranges": [_range(name, i) for i, name in enumerate(LAYERS)],
        "results": results,
        "gates": _gates(),
        "verdict": "fail",
    }


def _layer(name: str, i: int, rng: random.Random) -> dict[str, Any]:
    flagged = i % 5 == 2
    top = 18.0 if flagged else 4.0 + rng.random()
    before = [top, *(3.5 * (k + 1) ** -0.5 * (1 + 0.02 * rng.random()) for k in range(1, 128))]
    after = [top * (0.4 if flagged else 0.99), *before[1:]]
    ratio = 0.72 + 0.01 * i if flagged else 0.1 + 0.01 * i

    def state(values: list[float], share: float) -> dict[str, Any]:
        return {
            "pcdr": [share, min(1.0, share * 1.1), min(1.0, share * 1.15)],
            "sigma_max": values[0],
            "max_abs_activation": values[0] * 6.5,
            "kurtosis": 3 + values[0] * 4,
            "singular_values": values,
        }

    return {
        "name": name,
        "flagged": flagged,
        "k_target": 1 if flagged else None,
        "before": state(before, ratio),
        "after": state(after, ratio * (0.55 if flagged else 0.99)),
    }


def _range(name: str, i: int) -> dict[str, Any]:
    top = 140.0 if i % 5 == 2 else 6.0 + i * 0.4
    after = top * (0.4 if i % 5 == 2 else 0.98)
    return {
        "site": f"{name}.input",
        "layer": name,
        "before": {"absmax": top, "p999": top / 3, "std": 1.1},
        "after": {"absmax": after, "p999": after / 2.5, "std": 1.0},
    }


def _result(target: str, precision: str, rng: random.Random) -> dict[str, Any]:
    metric: dict[str, Any] = {"name": "top-1", "n": 1797, "float": 0.9833, "simulated": 0.9833 - DROP[precision]}
    base: dict[str, Any] = {
        "target": target,
        "runtime": f"{target} 0.0.0",
        "precision": precision,
        "metric": {**metric, "measured": None},
        "size_bytes": {"fp32": 4_900_000, "w8a8": 1_400_000}.get(precision, 800_000),
        "float_size_bytes": 4_900_000,
        "weight_ratio": {"fp32": 1.0, "w8a8": 0.252}.get(precision, 0.128),
    }
    if target == "tensorrt":
        if precision == "w4a8":
            reason = "TensorRT refuses 4-bit weights with 8-bit activations at build time"
            return {"target": target, "precision": precision, "status": "unavailable", "reason": reason}
        return {
            **base,
            "status": "built",
            "reason": "no NVIDIA driver: built for the compute capabilities of the recipe, not run",
            "rung": {"fp32": "float", "w4a16": "weight-only"}.get(precision, "emulated"),
            "executed": {"int8": 1.0} if precision in ("w8a8", "w4a4") else {"float32": 1.0},
            "compute_capabilities": ["8.6", "8.9"],
        }
    share = 0.97 if precision in ("w8a8", "w4a8", "w4a4") else 0.0
    centre = (14.2 if target == "ort" else 19.5) / SPEED[precision]
    samples = [centre * (1 + 0.03 * abs(rng.gauss(0, 1))) for _ in range(150)]
    ordered = sorted(samples)
    return {
        **base,
        "status": "measured",
        "device": "cpu: 2 threads",
        "rung": {"fp32": "float", "w8a8": "native", "w4a16": "weight-only"}.get(precision, "emulated"),
        "executed": {"int8": share, "float32": 1 - share} if share else {"float32": 1.0},
        "metric": {**metric, "measured": metric["simulated"] - (0.0006 if target == "tvm" else 0)},
        "audit": {
            "ops": [_op(name, precision, i) for i, name in enumerate([*LAYERS, *ATTENTION])],
            "evidence": "optimized graph (synthetic)",
            "notes": ["patch embedding runs in float"],
        },
        "parity": None
        if precision in ("fp32", "w4a16")
        else {
            "accumulators_checked": 4_812_800,
            "accumulators_different": 0,
            "codes_checked": 1_500_000,
            "codes_different": 212 if target == "tvm" else 31,
            "top1_flips": 1 if target == "tvm" else 0,
            "snr_db": 46.2,
            "max_error": 0.013,
            "sites": [{"site": f"{n}.input", "checked": 62_500, "different": i % 3} for i, n in enumerate(LAYERS)],
        },
        "latency_ms": {
            "p50": ordered[75],
            "p90": ordered[135],
            "p99": ordered[148],
            "min": ordered[0],
            "max": ordered[-1],
            "samples": samples,
            "warmup": 20,
            "threads": 2,
            "batch": 1,
            "stable": not (target == "tvm" and precision == "w4a8"),
            "note": "interleaved with the float baseline",
        },
        "throughput": [
            {"batch": b, "p50_ms": centre * b * 0.9, "samples_per_second": 1e3 / (centre * 0.9), "stable": True}
            for b in (1, 8, 32)
        ],
        "footprint": {
            "import_ms": 210.0,
            "open_ms": 35.0,
            "first_run_ms": 3 * centre,
            "cold_start_ms": 35.0 + 3 * centre,
            "memory_bytes": 30_000_000,
            "process_bytes": 190_000_000,
        },
        "roofline": {"floor_ms": 0.4 * centre, "share": 0.4, "bound": "compute"},
        "speedup_over_float": SPEED[precision],
        "speedup_ci": [SPEED[precision] * 0.97, SPEED[precision] * 1.03],
    }


def _op(name: str, precision: str, i: int) -> dict[str, Any]:
    declared = "float" if precision == "fp32" else precision.upper()
    integers = precision in ("w8a8", "w4a8", "w4a4") and not (precision == "w4a4" and i == 4)
    return {
        "name": name,
        "kernel": "MatMulIntegerToFloat" if integers else "MatMul",
        "precision": "int8" if integers else "float32",
        "macs": 1_000_000,
        "declared": declared,
    }


def _gates() -> list[dict[str, Any]]:
    def gate(
        name: str, target: str, precision: str, verdict: str, value: Any, limit: Any, evidence: Any
    ) -> dict[str, Any]:
        return {
            "name": name,
            "target": target,
            "precision": precision,
            "value": value,
            "limit": limit,
            "verdict": verdict,
            "evidence": evidence,
        }

    found = [
        gate("accuracy_drop", t, "w8a8", "pass", 0.001, 0.005, "exact McNemar, 95 % CI -0.002 to 0.004, n = 1,797")
        for t in ("ort", "tvm")
    ]
    found.append(gate("accuracy_drop", "ort", "w4a4", "fail", 0.021, 0.01, "95 % CI 0.014 to 0.028, n = 1,797"))
    found.append(gate("accuracy_drop", "tensorrt", "w8a8", "undecided", None, 0.005, "built, not run here"))
    found += [gate("parity", t, "w4a4", "pass", 0, 0, "4,812,800 accumulators compared") for t in ("ort", "tvm")]
    found.append(
        gate("executed_precision", "ort", "w4a4", "fail", 0.97, 1.0, "vit.layers.1.attention.output ran in float32")
    )
    return found
