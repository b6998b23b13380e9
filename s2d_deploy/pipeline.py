"""The stages that make the model: train, condition, calibrate, quantize, common ONNX. Resumed by their manifests.

    train -> condition -> calibrate -> quantize/<p> -> onnx/<p>   (then `deployment`, for each target)
          -> diagnose

A stage's key holds the recipe section it reads, the digest of the stages before it and the versions that
matter, so a changed recipe redoes exactly what it touches. Each stage is one method and holds no logic of its own.
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from s2d_deploy.cache_keys import code_sha256, library_versions, model_key, weights_sha256
from s2d_deploy.calibrate import Calibration, calibrate
from s2d_deploy.condition import ConditioningResult, condition
from s2d_deploy.console import Display, Step
from s2d_deploy.data import Batch, Dataset, first_samples, load_data
from s2d_deploy.diagnose import diagnose_model
from s2d_deploy.discovery import discover
from s2d_deploy.equalized_linear import layer_name
from s2d_deploy.error_analysis import analyse_errors
from s2d_deploy.errors import DataError, RecipeError, message
from s2d_deploy.evaluate import Score, outputs, score, torch_run
from s2d_deploy.files import digest
from s2d_deploy.follow import tell
from s2d_deploy.models import (
    LoadedModel,
    companion_files,
    config_as_it_was,
    load_model,
    save_checkpoint,
    save_companions,
)
from s2d_deploy.observers import Histogram
from s2d_deploy.one_shot_stage import condition_one_shot
from s2d_deploy.plan import Op, Plan
from s2d_deploy.precision import BASELINE, parse_precision
from s2d_deploy.ptq.input_transform import load_changes, save_changes
from s2d_deploy.ptq.passes import Context, Quantized, parse_steps, run_passes
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.recipe import QuantizeSection, Recipe
from s2d_deploy.registry import load_exporter
from s2d_deploy.s2d import S2DConfig
from s2d_deploy.session import Array
from s2d_deploy.simulation import simulate
from s2d_deploy.site_harm import HARM_SAMPLES
from s2d_deploy.store import RunFolder, Stage, read_json, write_json
from s2d_deploy.train import train

_OUTPUTS = "outputs.npz"
_TRAINING = "training"  # checkpoints of a conditioning that has not ended
_SAVED_EVERY = 50
# Stages that neither exporters nor runtimes take part in.
_MODEL_STAGES = frozenset(
    {"train", "diagnose", "condition", "calibrate", "quantize", "errors", "activations", "outcome"}
)
# Read while this module is imported, which is when the code that runs was read.
_CODE = {deploying: code_sha256(deploying=deploying) for deploying in (False, True)}


class Pipeline:
    """One recipe in one run folder.

    Args:
        recipe: the resolved recipe.
        store: the entered run folder, claimed for the recipe.
        display: where progress is shown.
    """

    def __init__(self, recipe: Recipe, store: RunFolder, display: Display) -> None:
        self.recipe, self.store, self.display = recipe, store, display
        self._stages: dict[str, Stage] = {}
        self.broken: dict[str, Exception] = {}  # precisions that could not be made; the others go on

    # ---- what the stages read -------------------------------------------------------------------------------

    @cached_property
    def data(self) -> Dataset:
        """The recipe's data, checked; the model has run on two samples of each split.

        Raises:
            DataError: missing or broken data, or samples that the model does not take.
        """
        base = self._untrained
        data = load_data(
            self.recipe.data,
            image_size=base.image_size,
            channels=base.channels,
            classes=base.classes,
            model_source=base.source,
        )
        for split in (data.calibration, data.test):
            _require_fit(base, next(split.batches(2)))
        return data

    @cached_property
    def _untrained(self) -> LoadedModel:
        return load_model(self.recipe.model, seed=self.recipe.train.seed if self.recipe.train else 0)

    @cached_property
    def _untrained_weights(self) -> str:
        return weights_sha256(self._untrained.module)

    def _model_key(self, model: LoadedModel) -> dict[str, Any]:
        """What `model` computes, its weights apart. The class of layers that conditioning inserted is part of it."""
        return model_key(self.recipe.model, model.module, model.output, companion_files(model.source))

    @cached_property
    def original(self) -> LoadedModel:
        """The float model before conditioning."""
        if self.recipe.train is None:
            return self._untrained
        return load_model(self.recipe.model, checkpoint=self.train().folder)

    @cached_property
    def model(self) -> LoadedModel:
        """The float model that is deployed: after conditioning."""
        stage = self.condition()
        return load_model(self.recipe.model, checkpoint=stage.folder)

    @cached_property
    def ops(self) -> dict[str, Op]:
        """Its contractions."""
        return discover(self.model.module, next(iter(self.data.test.batches(1))), self.model.output)

    def plan(self, precision: str) -> Plan:
        """The plan of a precision; the baseline's has no sites."""
        return Plan.load(self.quantize(precision).folder)

    def quantized_model(self, precision: str) -> nn.Module:
        """The float model behind a precision's passes: its weights lie where they put them."""
        module = copy.deepcopy(self.model.module)
        load_changes(module, self.quantize(precision).folder)
        return module

    def simulated(self, precision: str) -> nn.Module:
        """The simulation of a precision."""
        return simulate(self.quantized_model(precision), self.plan(precision)).eval()

    def simulated_outputs(self, precision: str) -> Array:
        """The simulation's outputs on the test split."""
        with np.load(self.quantize(precision).folder / _OUTPUTS, allow_pickle=False) as file:
            output: Array = file["output"]
            return output

    @property
    def precisions(self) -> tuple[str, ...]:
        """The baseline, then what the recipe asks for, without what is `broken`."""
        return (BASELINE, *(p for p in self.recipe.quantize.precisions if p not in self.broken))

    def test_batches(self) -> Iterator[Batch]:
        """The test split."""
        return self.data.test.batches(self.recipe.data.batch_size)

    def score(self, output: Array) -> Score:
        """Score outputs on the test split; the reference is the model before conditioning."""
        reference = self._reference if self._scored_by_reference else output
        return score(self.recipe.model.task, output, reference, self.data.test.labels, self._mask)

    def score_first(self, output: Array) -> Score:
        """Score outputs on as many samples of the test split, from the first on."""
        n = len(output)
        reference = self._reference[:n] if self._scored_by_reference else output
        labels, mask = self.data.test.labels, self._mask
        return score(
            self.recipe.model.task,
            output,
            reference,
            None if labels is None else labels[:n],
            None if mask is None else mask[:n],
        )

    @property
    def _scored_by_reference(self) -> bool:
        """Labels judge a classifier; everything else is compared with the float model."""
        return self.recipe.model.task != "image-classification" or self.data.test.labels is None

    @cached_property
    def _reference(self) -> Array:
        model = self.original
        return outputs(torch_run(model.module, model.output), model.output, self.test_batches())

    @cached_property
    def _mask(self) -> Array | None:
        parts = [b["attention_mask"].numpy() for b in self.test_batches() if "attention_mask" in b]
        return np.concatenate(parts) if parts else None

    # ---- stages ---------------------------------------------------------------------------------------------

    def train(self) -> Stage:
        """Train the embedded model from scratch; its checkpoint loads with transformers again."""
        section = self.recipe.train
        if section is None:
            raise RuntimeError("this recipe trains nothing")

        def work(folder: Path, step: Step) -> dict[str, Any]:
            model = self._untrained
            losses = train(model.module, model.output, self.data.train, section, step.advance)
            save_checkpoint(model.module, folder)
            return {"losses": losses}

        key = {
            "model": self._model_key(self._untrained),
            "weights": self._untrained_weights,
            "train": _dump(section),
            "data": self.data.fingerprint,
        }
        return self._stage("train", key, work)

    def diagnose(self) -> Stage:
        """Outliers of the model before conditioning, by layer and by quantized site, in ``diagnosis.json``."""
        section = self.recipe.condition

        def work(folder: Path, step: Step) -> dict[str, Any]:
            found = diagnose_model(
                self.original.module,
                lambda: self.data.calibration.batches(self.recipe.data.batch_size),
                output=self.original.output,
                k_max=section.k_max,
                tau=section.tau,
                progress=step,
            )
            write_json(folder / "diagnosis.json", found.to_dict() | {"tau": section.tau})
            flagged = sum(layer.flagged for layer in found.layers)
            step.note = f"{flagged} of {len(found.layers)} layers flagged at tau {section.tau}"
            return {"layers": len(found.layers), "flagged": flagged, "helps": found.forecast.helps}

        key = {
            "model": self._model_key(self.original),
            "weights": weights_sha256(self.original.module),
            "k_max": section.k_max,
            "tau": section.tau,
            "data": self.data.fingerprint,
            "batch_size": self.recipe.data.batch_size,
            "harm_samples": HARM_SAMPLES,
        }
        return self._stage("diagnose", key, work)

    def condition(self) -> Stage:
        """Condition the weights with S2D (or copy them, for method none)."""
        section = self.recipe.condition
        told: list[bool] = []

        def work(folder: Path, step: Step) -> dict[str, Any]:
            if self._scored_by_reference:
                _ = self._reference  # before the weights are changed in place
            module = self.original.module
            save_companions(self.original.source, folder)
            if section.method == "one-shot":
                tell({"train": False})  # now: the other processes would give up waiting
                told.append(True)
                return self._one_shot(folder, step)
            if section.method == "none" or section.steps == 0:
                save_checkpoint(module, folder)
                return {"method": "none"}
            tell({"train": True, "checkpoint": str(self.train().folder) if self.recipe.train else None})
            told.append(True)
            with config_as_it_was(module):
                result = self._train_conditioned(step, self._resumed_from(key))
            save_checkpoint(module, folder)
            if result.learned_plan is not None:
                result.learned_plan.save(folder)
            document = result.to_dict()
            # Not in the file: equal weights and findings give equal bytes, however long they took.
            seconds = document.pop("seconds")
            write_json(folder / "conditioning.json", document)
            return {"method": result.method, "findings": result.findings, "seconds": seconds}

        key = {
            "model": self._model_key(self.original),
            "weights": weights_sha256(self.original.module),
            "condition": _dump(section),
            "batch_size": self.recipe.data.batch_size,
            "quantize": _quantize_key(self.recipe.quantize, section.qat) if section.qat else None,
            "data": self.data.fingerprint,
        }
        if section.method == "one-shot":
            key |= self._one_shot_key()
        stage = self._stage("condition", key, work)
        shutil.rmtree(self.store.root / _TRAINING, ignore_errors=True)
        if not told:
            tell({"train": False})
        if not stage.cached:
            self.__dict__.pop("original", None)  # it was conditioned in place; load it anew when asked for
            if self.recipe.train is None:
                self.__dict__.pop("_untrained", None)
        return stage

    def _one_shot(self, folder: Path, step: Step) -> dict[str, Any]:
        """Condition a copy of the original by calibration data alone."""
        section, original = self.recipe.condition, self.original
        changed, document = condition_one_shot(
            original.module,
            list(self.data.calibration.batches(self.recipe.data.batch_size)),
            list(self.test_batches()),
            section.one_shot,
            output=original.output,
            task=self.recipe.model.task,
            look=S2DConfig(tau=section.tau, k_max=section.k_max),
            factor=section.shrink_factor,
            precisions=self.recipe.quantize.precisions,
            quantize=self._quantize_config(),
            metric=lambda m: (
                self.score(outputs(torch_run(m, original.output), original.output, self.test_batches())).value
            ),
            progress=step,
        )
        save_checkpoint(changed, folder)
        seconds = document.pop("seconds")
        write_json(folder / "conditioning.json", document)
        return {"method": document["method"], "findings": document["findings"], "seconds": seconds}

    def _one_shot_key(self) -> dict[str, Any]:
        """No training keys; but how the simulations before and after are quantized, and what they are measured on."""
        read = {"method", "one_shot", "shrink_factor", "tau", "k_max"}
        return {
            "condition": {k: v for k, v in _dump(self.recipe.condition).items() if k in read},
            "quantize": asdict(self._quantize_config()),
            "precisions": list(self.recipe.quantize.precisions),
            "test": self.recipe.data.test_samples,
        }

    @classmethod
    def trained_along(cls, recipe: Recipe, model: LoadedModel, display: Display) -> None:
        """What `follow` does: the training steps of `condition` on a process that owns no run folder."""
        pipeline = cls(recipe, None, display)  # type: ignore[arg-type]  # no stage is run here
        pipeline.__dict__["original"] = model
        if pipeline._scored_by_reference:
            _ = pipeline._reference
        with display.step("condition") as step:
            pipeline._train_conditioned(step)

    def _resumed_from(self, key: Mapping[str, Any]) -> Path | None:
        """Where a long training of exactly this stage is kept now and then; None where it is not worth a file."""
        if self.recipe.condition.steps <= _SAVED_EVERY or int(os.environ.get("WORLD_SIZE", "1")) > 1:
            return None
        return self.store.root / _TRAINING / f"{digest(dict(key))[:16]}.pt"

    def _train_conditioned(self, step: Step, checkpoint: Path | None = None) -> ConditioningResult:
        """Train the original in place, from `checkpoint` on where an interrupted run has left one."""
        section = self.recipe.condition
        config = None if section.method != "s2d" else self._s2d_config()
        epochs = iter(range(1_000_000))

        def epoch_batches() -> Iterator[Batch]:
            seed = section.seed * 10_007 + next(epochs)
            if section.objective == "task":
                return self.data.train.labelled_batches(section.batch_size, shuffle_seed=seed)
            return self.data.train.batches(section.batch_size, shuffle_seed=seed)

        return condition(
            self.original.module,
            section.objective,
            epoch_batches,
            list(self.data.calibration.batches(self.recipe.data.batch_size)),
            config,
            steps=section.steps,
            lr=section.learning_rate,
            warmup=section.warmup,
            seed=section.seed,
            adam_decay=section.decay if section.method == "weight-decay" else 0.0,
            optimizer="muon" if section.method == "muon" else "adamw",
            plan=None if section.qat is None else self._qat_plan,
            learned_steps=section.qat_steps == "learned",
            accumulate=section.accumulate,
            autocast=section.autocast,
            checkpoint_path=checkpoint,
            checkpoint_every=_SAVED_EVERY,
            metric=lambda m: (
                self.score(outputs(torch_run(m, self.original.output), self.original.output, self.test_batches())).value
            ),
            progress=lambda done, total, loss: step.advance(done, total, f"loss {loss:.4f}"),
        )

    def _s2d_config(self) -> S2DConfig:
        section = self.recipe.condition
        return S2DConfig(
            n=section.n,
            weight_decay=section.weight_decay,
            tau=section.tau,
            k_max=section.k_max,
            refresh_every=section.refresh_every,
            application=section.application,
            decoupled_factor=section.decoupled_factor if section.application == "decoupled" else 0.0,
            refresh_drift=section.refresh_drift,
            refresh_batches=section.refresh_batches,
            split=section.split,
            select=section.select,
        )

    def _qat_plan(self, model: nn.Module) -> Plan:
        """The plan of condition.qat for the float model as it is now."""
        ops = discover(model, next(iter(self.data.calibration.batches(1))), self.original.output)
        batches = self.data.calibration.batches(self.recipe.data.batch_size)
        statistics = calibrate(model, ops, batches, padding=self.recipe.quantize.padding)
        return build_plan(model, ops, statistics, str(self.recipe.condition.qat), self._quantize_config())

    def _quantize_config(self) -> QuantizeConfig:
        section = self.recipe.quantize
        return QuantizeConfig(
            weights=section.weights,
            activations=section.activations,
            percentile=section.percentile,
            padding=section.padding,
            activation_granularity=section.activation_granularity,
            activation_symmetric=section.activation_symmetric,
            weight_granularity=section.weight_granularity,
            block_size=section.block_size,
            attention=section.attention,
            skip=section.skip,
            overrides=section.overrides,
            first_last=section.first_last,
        )

    def calibrate(self) -> Stage:
        """One pass over the calibration samples, for the conditioned model and for the original."""

        def work(folder: Path, step: Step) -> dict[str, Any]:
            batches = self.data.calibration.batches
            size = self.recipe.data.batch_size
            calibrate(self.model.module, self.ops, batches(size), step).save(folder / "calibration.safetensors")
            # Where layers were inserted, the original calls the op otherwise; both ranges stand under its new name.
            there = dict(self.original.module.named_modules())
            names = {name: name if name in there else layer_name(self.model.module, name) for name in self.ops}
            ops = {names[name]: op for name, op in self.ops.items()}
            before = calibrate(self.original.module, ops, batches(size), step)
            for name, old in names.items():
                if name != old:
                    before.histograms[f"{name}.input"] = before.histograms.pop(f"{old}.input")
            before.save(folder / "before.safetensors")
            return {"samples": self.data.calibration.size}

        key = {
            "condition": self.condition().identity,
            "data": self.data.fingerprint,
            "batch_size": self.recipe.data.batch_size,
            "before": weights_sha256(self.original.module),
        }
        return self._stage("calibrate", key, work)

    def ranges(self) -> list[dict[str, Any]]:
        """Activation ranges of every site before and after conditioning, for the report."""
        folder = self.calibrate().folder
        before = Calibration.load(folder / "before.safetensors").histograms
        after = Calibration.load(folder / "calibration.safetensors").histograms
        return [
            {
                "site": site,
                "layer": site.rpartition(".")[0],
                "before": _spread(before[site]),
                "after": _spread(after[site]),
            }
            for site in after
            if site in before
        ]

    def quantize(self, precision: str) -> Stage:
        """Plan and simulated outputs of one precision; for the baseline an empty plan and the float outputs."""
        section = self.recipe.quantize

        def work(folder: Path, step: Step) -> dict[str, Any]:
            quantized = Quantized(self.model.module, Plan(BASELINE, dict(self.ops)))
            if precision != BASELINE:
                quantized = run_passes(
                    self.model.module, self.ops, precision, parse_steps(section.passes), self._context(step, precision)
                )
            plan = quantized.plan
            plan.save(folder)
            save_changes(self.model.module, quantized.model, folder)
            step("simulating")
            module = simulate(quantized.model, plan).eval()
            total, done = self.data.test.size, 0

            def on_batch(n: int) -> None:
                nonlocal done
                done += n
                step.advance(done, total, "simulating")

            output = outputs(torch_run(module, self.model.output), self.model.output, self.test_batches(), on_batch)
            np.savez(folder / _OUTPUTS, output=output)
            result = self.score(output)
            step.note = f"simulated {result.name.removesuffix(' %')} {result.value:.2f}"
            return {"metric": result.name, "value": result.value, "n": len(output), "plan_sha256": plan.digest()}

        key = {
            "condition": self.condition().identity,
            "calibrate": self.calibrate().identity if precision != BASELINE else None,
            "quantize": _quantize_key(section, precision) if precision != BASELINE else None,
            "precision": precision,
            "data": self.data.fingerprint,
            "batch_size": self.recipe.data.batch_size,
        }
        return self._stage(f"quantize/{precision}", key, work)

    def errors(self, precision: str) -> Stage:
        """Where the simulation's error comes from, layer by layer, on a few samples of the test split."""
        count, size = self.recipe.quantize.error_samples, self.recipe.data.batch_size

        def work(folder: Path, step: Step) -> dict[str, Any]:
            found = analyse_errors(
                self.quantized_model(precision),
                self.plan(precision),
                lambda: first_samples(self.data.test.batches(size), count),
                self.model.output,
                progress=step,
            )
            write_json(folder / "errors.json", found.to_dict())
            worst = found.layers[0] if found.layers else None
            step.note = f"output SNR {found.output_snr_db:.1f} dB" + (
                f", {worst.share:.0%} of it by {worst.op}" if worst is not None else ""
            )
            return {"output_error": found.output_error}

        return self._stage(
            f"errors/{precision}", {"quantize": self.quantize(precision).identity, "samples": count}, work
        )

    def error_analyses(self) -> list[dict[str, Any]]:
        """The error analysis of every precision but the baseline's; empty where the recipe asks for none."""
        if not self.recipe.quantize.error_samples:
            return []
        return [{"precision": p, **read_json(self.errors(p).folder / "errors.json")} for p in self.precisions[1:]]

    def _context(self, step: Step, precision: str) -> Context:
        """What the passes read. Histograms are kept by the model they are of, whichever recipe made it."""
        untouched = weights_sha256(self.model.module)
        stage = self.calibrate().folder / "calibration.safetensors"

        def batches() -> Iterator[Batch]:
            return self.data.calibration.batches(self.recipe.data.batch_size)

        def statistics(module: nn.Module, ops: Mapping[str, Op]) -> Calibration:
            digest = weights_sha256(module)
            padding = self.recipe.quantize.padding
            if digest == untouched and padding == "count":
                return Calibration.load(stage)

            def work(folder: Path) -> dict[str, Any]:
                calibrate(module, ops, batches(), step, padding).save(folder / "calibration.safetensors")
                return {"samples": self.data.calibration.size}

            key = {
                "weights": digest,
                "model": self._model_key(self.model),
                "ops": sorted(ops),
                "data": self.data.fingerprint,
                "batch_size": self.recipe.data.batch_size,
                "padding": padding,
            }
            name = f"activations/{digest[:16]}" + ("-real" if padding == "leave_out" else "")
            kept = self.store.run(name, self._full_key(name, key), work)
            return Calibration.load(kept.folder / "calibration.safetensors")

        section, learned = self.recipe.condition, None
        if (
            section.qat_steps == "learned"
            and section.qat == precision
            and (self.condition().folder / "plan.json").exists()
        ):
            learned = Plan.load(self.condition().folder)
        return Context(
            batches,
            self.model.output,
            self._quantize_config(),
            self.recipe.data.seed,
            step,
            statistics,
            learned=learned,
        )

    def onnx(self, precision: str) -> Stage:
        """The common ONNX file of one precision."""

        def work(folder: Path, _step: Step) -> dict[str, Any]:
            sample = next(iter(self.data.test.batches(2)))
            dynamic = {name: {1: "sequence"} for name in sample} if self.data.max_sequence else {}
            load_exporter()(
                self.quantized_model(precision),
                self.plan(precision),
                sample,
                [self.model.output],
                folder / "model.onnx",
                dynamic=dynamic,
            )
            return {"inputs": {n: [str(t.dtype).removeprefix("torch."), list(t.shape[1:])] for n, t in sample.items()}}

        return self._stage(f"onnx/{precision}", {"quantize": self.quantize(precision).identity}, work)

    @staticmethod
    def _full_key(name: str, key: dict[str, Any]) -> dict[str, Any]:
        code = _CODE[_MODEL_STAGES.isdisjoint(name.split("/"))]
        return key | {"code": code, "versions": library_versions()}

    def _stage(self, name: str, key: dict[str, Any], work: Any) -> Stage:
        """Run a stage once in this process, through the store, with its line on the display."""
        if name not in self._stages:
            with self.display.step(name) as step:
                stage = self.store.run(name, self._full_key(name, key), lambda folder: work(folder, step))
                if stage.cached:
                    step.note = "already done"
            self._stages[name] = stage
        return self._stages[name]


def _require_fit(model: LoadedModel, batch: Batch) -> None:
    """Run the model once, so that a mistake in names or shapes is found before any work."""
    try:
        with torch.no_grad():
            result = model.module(**batch)
    except Exception as error:  # whatever the model's own code makes of a sample that it was not written for
        shown = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise DataError(
            message(
                "the model refuses the samples of data",
                expected=f"inputs that {type(model.module).__name__}.forward takes",
                found=f"{shown}; {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}",
                fix="change data (names and shapes of the arrays, the image size), or use the model that it is for",
            )
        ) from error
    if not isinstance(result, torch.Tensor) and model.output not in result:
        names = ", ".join(map(str, result)) if isinstance(result, Mapping) else type(result).__name__
        raise RecipeError(
            message(
                f"model.output: the model has no output {model.output!r}",
                expected="a key of what its forward returns, or a tensor",
                found=names,
                fix="set model.output",
            )
        )


def _dump(section: Any) -> dict[str, Any]:
    document: dict[str, Any] = section.model_dump(mode="json")
    return document


def _quantize_key(section: QuantizeSection, precision: str) -> dict[str, Any]:
    """What the plan of one precision depends on. Blocks serve weight-only precisions, which overrides may bring in."""
    names = (precision, *section.overrides.values(), *([section.first_last] if section.first_last else []))
    blocked = section.weight_granularity == "block"
    blocked = blocked or any(parse_precision(name).activations == 16 for name in names)
    unread = {"precisions", "preset", "error_samples"} | (set() if blocked else {"block_size"})
    files = {
        option["costs"]: file_digest(option["costs"])
        for entry in section.passes
        if isinstance(entry, Mapping) and isinstance(option := entry.get("mixed"), Mapping) and option.get("costs")
    }
    return {k: v for k, v in _dump(section).items() if k not in unread} | ({"files": files} if files else {})


def file_digest(path: str) -> str | None:
    """sha256 of a file that a pass reads; None where it cannot be read, which the pass says."""
    try:
        return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
    except OSError:
        return None


def _spread(h: Histogram) -> dict[str, float]:
    return {"absmax": h.absmax, "p999": h.percentile(99.9), "std": h.std, "kurtosis": h.kurtosis}
