"""SHA-256 of every code that a quantized model computes: what a re-run must reproduce bit for bit.

Of the weights' codes, and of the activations' codes for the first samples of the test split, as the simulation and as
the runtime compute them. Hashed are shape and values as int8 or uint8 (wider ones as int32), in C order, little-endian,
so that the container does not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from s2d_deploy.console import Step
from s2d_deploy.deployment import Deployment
from s2d_deploy.session import Array
from s2d_deploy.simulation import recorded_codes, weight_codes
from s2d_deploy.store import Stage, read_json, write_json

FILE = "codes.json"


def sha256_of(codes: Array) -> str:
    """The digest of one array of integers; equal values in equal shapes have an equal one."""
    narrow = "<i4"
    low, high = (int(codes.min()), int(codes.max())) if codes.size else (0, 0)
    if low >= -128 and high <= 127:
        narrow = "i1"
    elif low >= 0 and high <= 255:
        narrow = "u1"
    head = f"{','.join(map(str, codes.shape))}:".encode()
    return hashlib.sha256(head + np.ascontiguousarray(codes).astype(narrow).tobytes()).hexdigest()


def hash_codes(deployment: Deployment, precision: str) -> Stage:
    """The stage ``codes/<target>/<precision>``: ``codes.json`` with ``{samples, weights, simulated, runtime}``.

    `runtime` is empty where the runtime cannot show its codes.

    Raises:
        UnavailableError: the runtime cannot run here.
    """
    pipeline = deployment.pipeline
    recipe = pipeline.recipe

    def work(folder: Path, step: Step) -> dict[str, Any]:
        simulated = pipeline.simulated(precision)
        samples = min(recipe.verify.samples, recipe.verify.batch_size, pipeline.data.test.size)
        batch = pipeline.data.test.load(list(range(samples)))
        with recorded_codes(simulated) as codes:
            simulated(**batch)
        with deployment.runtime.open(deployment.artifact(precision), threads=recipe.bench.threads) as session:
            shown = session.codes({name: tensor.numpy() for name, tensor in batch.items()})
        weights = _hashes({name: c.numpy() for name, c in weight_codes(simulated).items()})
        document = {
            "samples": samples,
            "weights": weights,
            "simulated": _hashes({name: c.numpy() for name, c in codes.items()}),
            "runtime": _hashes(shown),
        }
        write_json(folder / FILE, document)
        step.note = f"{len(weights)} weights, {len(codes)} sites"
        return {}

    key = {"verify": deployment.verify(precision).sha256, "export": deployment.export(precision).sha256, "form": 1}
    return pipeline._stage(f"codes/{deployment.place}/{precision}", key, work)


def read_hashes(stage: Stage) -> dict[str, Any]:
    """The document of a finished stage."""
    return read_json(stage.folder / FILE)


def _hashes(codes: Mapping[str, Array]) -> dict[str, str]:
    return {name: sha256_of(array) for name, array in sorted(codes.items())}
