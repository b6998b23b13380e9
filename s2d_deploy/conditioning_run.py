"""One command: a model and its data -> a conditioned checkpoint, and what it bought.

    before/diagnose -> condition -> after/diagnose -> {before,after}/{calibrate,quantize/<p>} -> outcome

The model before and the model after go through the same stages of `pipeline`, with the same calibration samples: each
is quantized alike, with the ranges that its own activations need. They are judged on the same held-out samples, which
neither training nor calibration has seen, by paired intervals. The reference is always the original's float output
(or the labels, where there are some). What is lost: simulated precision is not a runtime's; `s2d-deploy run` measures
that. The interval covers the choice of held-out samples, not the choice of training data or seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from s2d_deploy.cache_keys import weights_sha256
from s2d_deploy.calibrate import calibrate
from s2d_deploy.conditioning_view import points, statement, write_outcome_plots
from s2d_deploy.console import Step
from s2d_deploy.data import Dataset
from s2d_deploy.errors import DataError, message
from s2d_deploy.evaluate import score
from s2d_deploy.files import digest
from s2d_deploy.inserted_layers import INSERTED_FILE
from s2d_deploy.models import LoadedModel
from s2d_deploy.paired import paired_drop
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.precision import BASELINE, parse_precision
from s2d_deploy.session import Array
from s2d_deploy.store import Stage, read_json, write_json

# Below this many held-out samples the bootstrap's interval is too narrow to be believed.
MIN_JUDGED = 10
# Points that a float model must not lose.
RUINED = 5.0
# A largest singular value that shrank by less has hardly been pressed.
HARDLY = 0.1
# What to do when a one-shot variant ruins the float model: it has no rate to lower.
_MILDER = "raise condition.shrink_factor, or leave out shrink and neurons, which alone change the float function"
SUBJECTS = {
    "s2d": "S2D",
    "control": "Training without S2D",
    "weight-decay": "Weight decay",
    "muon": "Muon without S2D",
    "none": "Doing nothing",
    "one-shot": "One-shot conditioning",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One measure of one precision, before and after, on the same held-out samples.

    Attributes:
        precision: ``"fp32"``, ``"w8a8"``, ...
        measure: e.g. ``"cosine x 100"``.
        before, after: means over the samples, 0 to 100.
        change: after minus before, in points.
        lo, hi: 95 % interval of the change.
        method: of the interval.
    """

    precision: str
    measure: str
    before: float
    after: float
    change: float
    lo: float
    hi: float
    method: str


class Side(Pipeline):
    """The stages of a pipeline on one model as it is, in a subfolder: the model before conditioning, or after.

    Args:
        pipeline: owns data, folder and display.
        name: the subfolder.
        model: not changed.
    """

    def __init__(self, pipeline: Pipeline, name: str, model: LoadedModel) -> None:
        super().__init__(pipeline.recipe, pipeline.store, pipeline.display)
        self._pipeline, self._name = pipeline, name
        # Where cached properties keep what they found.
        self.__dict__ |= {"data": pipeline.data, "original": model, "model": model}

    @property
    def _reference(self) -> Array:  # read once, where the pipeline keeps it
        return self._pipeline._reference

    def condition(self) -> Stage:
        """Nothing to do: later stages depend on the weights alone."""
        files = [{"name": "weights", "sha256": weights_sha256(self.model.module)}]
        key = self._full_key("condition", {"model": self._model_key(self.model), "weights": files[0]["sha256"]})
        manifest = {"key_sha256": digest(key), "files": files, "info": {}}
        return Stage(self._name, self.store.root, manifest, True, "")

    def calibrate(self) -> Stage:
        """The ranges of this one model."""

        def work(folder: Path, step: Step) -> dict[str, Any]:
            batches = self.data.calibration.batches(self.recipe.data.batch_size)
            calibrate(self.model.module, self.ops, batches, step).save(folder / "calibration.safetensors")
            return {"samples": self.data.calibration.size}

        return self._stage(
            "calibrate",
            {
                "model": self.condition().identity,
                "data": self.data.fingerprint,
                "batch_size": self.recipe.data.batch_size,
            },
            work,
        )

    def _stage(self, name: str, key: dict[str, Any], work: Any) -> Stage:
        return super()._stage(f"{self._name}/{name}", key, work)


def condition_and_judge(pipeline: Pipeline) -> dict[str, Any]:
    """Condition the recipe's model, and say what it bought.

    Every step is a stage: what is finished is reused, and an interrupted run goes on.

    Returns:
        The document of ``outcome.json``, with the folders of checkpoint and results beside it.

    Raises:
        DataError: too few held-out samples.
        Whatever the stages raise.
    """
    _require_held_out(pipeline.data)
    first = Side(pipeline, "before", pipeline.original).diagnose()
    conditioned = pipeline.condition()
    # Only now: conditioning changes the model that it has loaded in place.
    before, after = Side(pipeline, "before", pipeline.original), Side(pipeline, "after", pipeline.model)
    if before.condition().sha256 == after.condition().sha256:  # nothing was pressed: one model, looked at once
        after = before
    last = after.diagnose()
    quantized = {p: (before.quantize(p), after.quantize(p)) for p in pipeline.precisions}

    def work(folder: Path, step: Step) -> dict[str, Any]:
        documents = [read_json(stage.folder / "diagnosis.json") for stage in (first, last)]
        changes = [change for p in pipeline.precisions for change in _changes(p, before, after)]
        document = outcome(pipeline, conditioned, documents, changes)
        write_json(folder / "outcome.json", document)
        (folder / "statement.txt").write_text(statement(document), encoding="utf-8")
        write_outcome_plots(document, documents[0], documents[1], folder / "plots")
        step.note = ", ".join(f"{c.precision} {c.before:.2f} -> {c.after:.2f}" for c in changes[:: _measures(changes)])
        return {}

    key = {
        "condition": conditioned.identity,
        "diagnosis": [first.identity, last.identity],
        "quantized": {p: [stage.identity for stage in stages] for p, stages in quantized.items()},
        "section": pipeline.recipe.condition.model_dump(mode="json"),
    }
    stage = pipeline._stage("outcome", key, work)
    return {
        **read_json(stage.folder / "outcome.json"),
        "checkpoint": str(conditioned.folder),
        "inserted": (conditioned.folder / INSERTED_FILE).is_file(),
        "results": str(stage.folder),
        "diagnoses": [str(s.folder / "diagnosis.json") for s in (first, last)],
        "plots": [str(path) for path in sorted((stage.folder / "plots").rglob("*.svg"))],
    }


def outcome(
    pipeline: Pipeline, conditioned: Stage, diagnoses: Sequence[Mapping[str, Any]], changes: Sequence[Change]
) -> dict[str, Any]:
    """What conditioning did and bought, as a document.

    Args:
        pipeline: for the recipe and the data.
        conditioned: its stage.
        diagnoses: ``diagnosis.json`` before and after.
        changes: of every precision; the first of each is the task's own measure.
    """
    section = pipeline.recipe.condition
    layers = _layers(*diagnoses)
    forecast = diagnoses[0]["forecast"]
    held_out = pipeline.data.test.size
    return {
        "name": pipeline.recipe.name,
        "method": conditioned.info.get("method", section.method),
        "steps": _steps_taken(conditioned),
        "tau": section.tau,
        "findings": conditioned.info.get("findings", []),
        "samples": {
            "training": pipeline.data.train.size,
            "calibration": pipeline.data.calibration.size,
            "held_out": held_out,
        },
        "layers": layers,
        "flagged": {"before": _flagged(diagnoses[0]), "after": _flagged(diagnoses[1])},
        "dead": [layer["name"] for layer in diagnoses[0]["layers"] if layer["dead"]],
        "forecast": forecast,
        "changes": [asdict(change) for change in changes],
        "verdict": verdict(
            _subject(section.method, section.objective, section.qat), changes, layers, forecast, section.tau, held_out
        ),
    }


def verdict(
    subject: str,
    changes: Sequence[Change],
    layers: Sequence[Mapping[str, Any]],
    forecast: Mapping[str, Any],
    tau: float,
    held_out: int,
) -> str:
    """One sentence: what was bought at which precision, or that nothing was and why.

    Args:
        subject: who bought it.
        changes: of every precision; only the first measure of each is judged.
        layers: of `outcome`.
        forecast: of the diagnosis before.
        tau: from which PCDR on a layer is flagged.
        held_out: number of samples judged.
    """
    primary = [c for c in changes if c.measure == changes[0].measure]
    floats = [c for c in primary if c.precision == BASELINE]
    judged = [c for c in primary if c.precision != BASELINE]
    flagged = [layer for layer in layers if layer["flagged_before"]]
    trained = subject != SUBJECTS["one-shot"]
    unchanged = all(c.change == c.lo == c.hi == 0 for c in primary)
    if unchanged and not trained:
        return f"{subject} bought nothing here: every output is as it was. The findings say what it changed."
    if unchanged and not flagged:
        best = max(layers, key=lambda layer: max(layer["before"]["pcdr"]))
        return (
            f"{subject} bought nothing here, because no layer is flagged: the largest PCDR is "
            f"{max(best['before']['pcdr']):.2f} (in {best['name']}), below tau = {tau:g}. The checkpoint holds the "
            "original's weights."
        )
    unit = f"points of {changes[0].measure.removesuffix(' %')}"
    price = f"; the float model changed by {_shown(floats[0])}" if floats else ""
    if floats and floats[0].hi < -RUINED:
        price += f", too much: {'lower condition.learning_rate or condition.decoupled_factor' if trained else _MILDER}"
    if held_out < MIN_JUDGED:
        seen = _listed(judged) or "no precision"
        return (
            f"What {subject} bought cannot be said from {held_out} held-out sample(s); {10 * MIN_JUDGED} samples are "
            f"the least, of which a tenth is held out. Seen were {seen}{price} ({unit})."
        )
    if not judged:
        return f"No quantized precision was asked for{price} ({unit}; in brackets 95 % intervals, paired)."
    gained, lost = [c for c in judged if c.lo > 0], [c for c in judged if c.hi < 0]
    same = [c for c in judged if c.lo <= 0 <= c.hi]
    if gained:
        said = f"{subject} bought {_listed(gained)}"
    else:
        # Flagged layers, steps and the forecast are S2D's; the findings of one-shot say why it was not enough.
        said = f"{subject} bought nothing here{_reason(flagged, forecast, judged) if trained else ''}"
    said += f"; it cost {_listed(lost, -1)}" if lost else ""
    said += f"; no difference shows at {_joined([f'{c.precision.upper()}: {_shown(c)}' for c in same])}" if same else ""
    return f"{said}{price} ({unit}; in brackets 95 % intervals, paired, {held_out} held-out samples)."


def _changes(precision: str, before: Side, after: Side) -> list[Change]:
    """The task's measure, and for a classifier also the cosine of its logits, which a few samples already resolve."""
    task, labels = before.recipe.model.task, before.data.test.labels
    reference = before.simulated_outputs(BASELINE)
    first, second = before.simulated_outputs(precision), after.simulated_outputs(precision)
    scores = [score(task, output, reference, labels, before._mask) for output in (first, second)]
    found = [_change(precision, scores[0].name, *(s.per_sample for s in scores), same=bool((first == second).all()))]
    if task == "image-classification":
        cosines = [score("embedding", output, reference, None, None).per_sample for output in (first, second)]
        found.append(_change(precision, "logit cosine x 100", *cosines, same=bool((first == second).all())))
    return found


def _change(
    precision: str, measure: str, first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], *, same: bool
) -> Change:
    means = (float(first.mean()), float(second.mean()))
    if same:  # bit for bit: nothing is left to chance
        return Change(precision, measure, *means, 0.0, 0.0, 0.0, "equal outputs")
    drop = paired_drop(first.tolist(), second.tolist())
    return Change(precision, measure, *means, -drop.drop, -drop.hi, -drop.lo, drop.method)


def _steps_taken(conditioned: Stage) -> int:
    """0 for a method that takes none, and where nothing was flagged that could be pressed."""
    path = conditioned.folder / "conditioning.json"
    return len(read_json(path).get("losses", [])) if path.exists() else 0


def _measures(changes: Sequence[Change]) -> int:
    return len({change.measure for change in changes})


def _layers(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Layers flagged before or after; where none is, the three that came nearest."""
    # A one-shot variant may have put something around a layer; the layer itself is then called `<name>.linear`.
    later = {layer["name"].removesuffix(".linear"): layer for layer in after["layers"]}
    later |= {layer["name"]: layer for layer in after["layers"]}
    pairs = [(layer, later[layer["name"]]) for layer in before["layers"] if layer["name"] in later]
    kept = [pair for pair in pairs if pair[0]["flagged"] or pair[1]["flagged"]]
    kept = kept or sorted(pairs, key=lambda pair: -max(pair[0]["pcdr"]))[:3]
    facts = ("pcdr", "sigma_max", "max_abs_activation", "kurtosis", "dead")
    return [
        {
            "name": first["name"],
            "flagged_before": first["flagged"],
            "flagged_after": second["flagged"],
            "k_target": first["k_target"],
            "before": {fact: first[fact] for fact in facts},
            "after": {fact: second[fact] for fact in facts},
        }
        for first, second in kept
    ]


def _flagged(diagnosis: Mapping[str, Any]) -> int:
    return sum(layer["flagged"] for layer in diagnosis["layers"])


def _subject(method: str, objective: str, qat: str | None) -> str:
    """Who bought it. Distillation from the model's own float self changes nothing by itself; other training does."""
    name = SUBJECTS.get(method, f"The method {method}")
    if method == "s2d" and (qat is not None or objective == "task"):
        return "S2D together with its training (the same steps with --method control tell the two apart)"
    return name


def _reason(flagged: Sequence[Mapping[str, Any]], forecast: Mapping[str, Any], judged: Sequence[Change]) -> str:
    """Why nothing was bought, as far as it was measured."""
    reasons = [] if flagged else ["no layer is flagged"]
    if flagged:
        most = min(flagged, key=lambda d: d["after"]["sigma_max"] / d["before"]["sigma_max"])
        high, low = most["before"]["sigma_max"], most["after"]["sigma_max"]
        if 1 - low / high < HARDLY:
            reasons.append(
                f"the flagged layers were {'hardly' if low <= high else 'not'} pressed (largest singular value of "
                f"{most['name']}: {high:.2f} -> {low:.2f}{'; give more --steps' if low <= high else ''})"
            )
    although = ""
    if any(parse_precision(c.precision).activations == 4 for c in judged):
        if forecast["helps"]:
            although = ", although the forecast said that it will help"
        elif forecast["helps"] is False and not forecast["shares"]:
            reasons.append("no quantized site needs repair at 4 bits")
        elif forecast["helps"] is False and flagged:
            # A stored forecast from before harm was measured knows the error alone.
            by_harm = forecast.get("harm") is not None
            share = forecast["reach"] if by_harm else forecast.get("reach_by_error", forecast["reach"])
            of = (
                "harm that the sites do to the output at 4 bits"
                if by_harm
                else "4-bit error at the sites that need repair"
            )
            reasons.append(f"the flagged layers make {share:.0%} of the {of}")
    return (f", because {' and '.join(reasons)}" if reasons else "") + although


def _listed(changes: Sequence[Change], sign: int = 1) -> str:
    return _joined([f"{_shown(c, sign)} at {c.precision.upper()}" for c in changes])


def _joined(parts: Sequence[str]) -> str:
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _shown(c: Change, sign: int = 1) -> str:
    """The change, or with a sign of -1 the loss, with its interval."""
    if c.change == c.lo == c.hi == 0:
        return "0 (equal outputs)"
    if sign < 0:
        return f"{-c.change:.2f} ({-c.hi:.2f} to {-c.lo:.2f})"
    return f"{points(c.change)} ({points(c.lo)} to {points(c.hi)})"


def _require_held_out(data: Dataset) -> None:
    if data.test.size < 2:
        raise DataError(
            message(
                f"{data.test.size} sample(s) are held out, too few to say what conditioning buys",
                expected=f"at least 2, and {MIN_JUDGED} or more for a verdict; a tenth of the data is held out",
                found=f"{data.train.size + data.test.size} samples",
                fix="give more data, or for images train/ and test/ folders",
            )
        )
