"""What `cifar_vit.py` measures of a model: its simulations on the test images, its outliers, its attributed sites."""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _cifar_images import Images
from torch import Tensor, nn

from s2d_deploy.calibrate import Calibration, calibrate
from s2d_deploy.diagnose import LayerDiagnosis, diagnose, diagnose_model
from s2d_deploy.discovery import discover
from s2d_deploy.evaluate import outputs, score, torch_run
from s2d_deploy.observers import Method
from s2d_deploy.plan import Op, Plan
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.simulation import simulate

PRECISIONS = ("w8a8", "w4a8", "w4a4")
METHODS: tuple[Method, ...] = ("absmax", "mse")
OUTPUT = "logits"
GROUPS = {
    "nothing": (),
    "patch embedding": ("*patch_embeddings*",),
    "layer 0": ("*.layers.0.*",),
    "query, key, value": ("*.q_proj", "*.k_proj", "*.v_proj"),
    "scores and context": ("*.scores", "*.context"),
    "o_proj": ("*.o_proj",),
    "fc1": ("*.fc1",),
    "fc2": ("*.fc2",),
}


@dataclass
class Bench:
    """Measures models on one test set with one calibration set."""

    train: Images
    test: Images
    a: argparse.Namespace

    @property
    def calibration(self) -> list[dict[str, Tensor]]:
        return self.train.inputs(self.a.calibration, 64)

    def plan(
        self,
        model: nn.Module,
        precision: str = "w4a4",
        method: Method = "mse",
        known: tuple[dict[str, Op], Calibration] | None = None,
        skip: tuple[str, ...] = (),
    ) -> Plan:
        """A plan of the float model, calibrated on training images."""
        ops, statistics = self.statistics(model) if known is None else known
        config = QuantizeConfig(weights=method, activations=method, skip=skip)
        return build_plan(model, ops, statistics, precision, config)

    def statistics(self, model: nn.Module) -> tuple[dict[str, Op], Calibration]:
        batches = self.calibration
        ops = discover(model, {"pixel_values": batches[0]["pixel_values"][:1]}, OUTPUT)
        return ops, calibrate(model, ops, batches)

    def measured(
        self, model: nn.Module, count: int, precisions: Sequence[str] = PRECISIONS
    ) -> dict[str, dict[str, Any]]:
        """The float model and its simulations on the first `count` test images.

        Returns:
            By precision and range method ("fp32", "w4a4-mse", ...): "correct" and "agree" (with the float decision),
            100 or 0 for each image; "db", power of the logits (without their mean) over that of their error.
        """
        model = copy.deepcopy(model).eval()
        known = self.statistics(model)
        plans = {f"{p}-{m}": self.plan(model, p, m, known) for p in precisions for m in METHODS}
        return self.judged({"fp32": model} | {name: simulate(model, plan) for name, plan in plans.items()}, count)

    def judged(self, models: dict[str, nn.Module], count: int) -> dict[str, dict[str, Any]]:
        """As `measured`, of these models; the first is the reference."""
        batches, labels = self.test.inputs(count, 250), self.test.labels[:count]
        result: dict[str, dict[str, Any]] = {}
        reference = None
        for name, model in models.items():
            found = outputs(torch_run(model, OUTPUT), OUTPUT, batches)
            reference = found if reference is None else reference
            correct = score("image-classification", found, reference, labels, None).per_sample.tolist()
            agree = score("image-classification", found, reference, None, None).per_sample.tolist()
            error = float(np.square(found - reference).sum())
            signal = float(np.square(reference - reference.mean(axis=-1, keepdims=True)).sum())
            db = 10 * math.log10(signal / error) if error else None
            result[name] = {"correct": correct, "agree": agree, "db": db}
        return result

    def left_in_float(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """W4A4 with one group of ops in float at a time: by group and range method, as `brief_scores`."""
        model = copy.deepcopy(model).eval()
        known, count = self.statistics(model), min(2000, self.a.test)
        result = {}
        for group, patterns in GROUPS.items():
            chosen = {f"w4a4-{m}": self.plan(model, "w4a4", m, known, patterns) for m in METHODS}
            scores = self.judged({"fp32": model} | {n: simulate(model, plan) for n, plan in chosen.items()}, count)
            result[group] = brief_scores(scores)
        return result

    def attributed(self, model: nn.Module) -> dict[str, Any]:
        """Forecast and site errors of a fine-tuned model, at the lower tau."""
        batches = self.calibration[:2]
        found = diagnose_model(copy.deepcopy(model).eval(), lambda: batches, output=OUTPUT, tau=self.a.low_tau)
        sites = [{"site": s.site, "error": s.error, "max_abs": s.max_abs, "verdict": s.verdict} for s in found.sites]
        return {"forecast": found.forecast.to_dict(), "sites": sites, "excess": sum(s.excess for s in found.sites)}

    def look(self, model: nn.Module) -> dict[str, Any]:
        """What the trace of pre-training holds."""
        model = copy.deepcopy(model).eval()
        found = diagnose(model, self.calibration[:2], tau=self.a.tau)
        scores = self.measured(model, min(1000, self.a.test), ("w4a4",))
        return {"settings": brief_scores(scores)} | summary(found)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def brief_scores(scores: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means instead of one value for each image."""
    return {n: {"top1": mean(s["correct"]), "agree": mean(s["agree"]), "db": s["db"]} for n, s in scores.items()}


def summary(layers: Sequence[LayerDiagnosis]) -> dict[str, Any]:
    """The largest of each figure over all layers, and how many are flagged."""
    return {
        "pcdr_1": max(d.pcdr[0] for d in layers),
        "flagged": sum(d.flagged for d in layers),
        "s_max": max(d.sigma_max for d in layers),
        "max_abs": max(d.max_abs_activation for d in layers),
        "kurtosis": max(d.kurtosis_input for d in layers),
        "range_over_std": max(d.range_over_std_input for d in layers),
    }
