"""The smallest recipe that goes through every stage: a few seconds."""

from __future__ import annotations

from typing import Any

RECIPE: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "config": {
            "model_type": "vit",
            "image_size": 8,
            "patch_size": 4,
            "num_channels": 1,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "num_labels": 10,
        }
    },
    "data": {"kind": "digits", "calibration_samples": 16, "test_samples": 16, "batch_size": 16},
    "train": {"epochs": 1},
    # Beyond 50 steps a training that was killed goes on from its own checkpoint.
    "condition": {"steps": 60, "warmup": 1, "batch_size": 4, "tau": 0.5, "refresh_every": 20},
    "quantize": {"precisions": ["w8a8"], "error_samples": 8},
    "targets": ["reference", "ort"],
    "verify": {"samples": 4, "batch_size": 4},
    "bench": {
        "min_samples": 3,
        "min_seconds": 0.01,
        "max_seconds": 1,
        "warmup": 1,
        "threads": 1,
        "footprint": False,
        "roofline": False,
    },
    "gates": {"accuracy_drop": 100.0},
}
