"""A baseline: a committed file with what a model was worth, which later runs must not fall below.

    s2d-deploy gate my.yaml --baseline baseline.json --write      # once, and after every change that is meant
    s2d-deploy gate my.yaml --baseline baseline.json              # in CI

Results are compared by their key, ``target/precision``, sample by sample: the drop from the baseline to this run is
judged by the paired rule of `power.py` against the entry's own limit. A result that is gone or was not measured is a
failure, not a gap. Results that the baseline does not know are named. Samples that are not the baseline's are refused:
two accuracies on different data say nothing about a model.

The file is written only on request, in one step, with nothing in it that changes from run to run (no times, no paths),
so that its diff shows what changed. A limit that somebody edited in it is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from s2d_deploy.errors import ArtifactError, RecipeError, message
from s2d_deploy.files import atomic_write, read_json
from s2d_deploy.gate import GateVerdict, paired_finding
from s2d_deploy.outcomes import of_row, pack, unpack
from s2d_deploy.power import smallest_detectable_drop
from s2d_deploy.precision import BASELINE
from s2d_deploy.report_schema import Metric
from s2d_deploy.report_summary import higher_is_better

KIND = "s2d-deploy baseline"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Data(_Strict):
    """The samples: a later run is compared only where it was judged on the same."""

    sha256: str
    samples: int = Field(ge=1)


class Latency(_Strict):
    """Latency over the float model's, both from one process run, so that the machine's speed cancels out.

    `limit` is the largest ratio that a later run may have; the whole interval must respect it.
    """

    ratio: float = Field(gt=0)
    limit: float = Field(gt=0)


class Entry(_Strict):
    """One result. `limit` is the largest drop of the metric from this value, in the metric's unit."""

    metric: str
    higher_is_better: bool
    value: float
    limit: float = Field(ge=0)
    outcomes: dict[str, Any]
    accumulators_different: int | None = Field(None, ge=0)
    rung: str | None = None
    latency: Latency | None = None


class Baseline(_Strict):
    """The whole file."""

    schema_version: Literal[1]
    kind: Literal["s2d-deploy baseline"]
    model: str | None = None
    data: Data
    results: dict[str, Entry] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A report against a baseline.

    Attributes:
        verdicts: rows for the report's gates, named ``baseline_*``.
        unknown: measured results that the baseline does not hold; nothing was decided about them.
    """

    verdicts: list[GateVerdict]
    unknown: list[str]


def key_of(row: Mapping[str, Any]) -> str:
    """``ort/w4a4``."""
    return f"{row['target']}/{row['precision']}"


def read_baseline(path: Path) -> Baseline:
    """The baseline in a file.

    Raises:
        ArtifactError: missing, not JSON, unknown or wrong keys (all of them named), outcomes that do not unpack.
    """
    if not path.exists():
        raise ArtifactError(
            message(
                f"{path}: no such file", expected="a committed baseline", fix="write it: add --write to this command"
            )
        )
    document = read_json(path)
    try:
        baseline = Baseline.model_validate(document)
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors(include_url=False)]
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ArtifactError(
            message(
                f"{path}: not a baseline",
                expected=f"what --write makes: kind {KIND!r}, schema_version 1",
                found="; ".join(wrong[:5]) + more,
                fix="write it again with --write",
            )
        ) from error
    for key, entry in baseline.results.items():
        unpack(entry.outcomes, f"{path}: results.{key}.outcomes")
    return baseline


def compare(report: Mapping[str, Any], baseline: Baseline, place: str = "the baseline") -> Comparison:
    """Judge a report's results against a baseline's.

    Raises:
        ArtifactError: the report was made on other samples, or does not say on which.
    """
    _same_data(report, baseline, place)
    rows = {key_of(row): row for row in report["results"]}
    verdicts: list[GateVerdict] = []
    for key, entry in baseline.results.items():
        verdicts += _judge(key, entry, rows.get(key))
    measured = [key for key, row in rows.items() if row["status"] == "measured" and row["precision"] != BASELINE]
    return Comparison(verdicts, [key for key in measured if key not in baseline.results])


def baseline_of(
    report: Mapping[str, Any],
    previous: Baseline | None = None,
    *,
    tolerance: float | None = None,
    slower: float | None = None,
) -> tuple[Baseline, list[str]]:
    """A baseline from a report's measured results.

    Args:
        report: a checked document with per-sample outcomes.
        previous: what the file held; results that this report does not have, and limits, are kept, unless the
            samples are others.
        tolerance: limit of the drop for every result; None: the previous limit, else what `default_limit` gives.
        slower: how many times the latency ratio of now a later one may be, e.g. 1.1; None: latency is not compared,
            unless the previous entry was.

    Returns:
        The baseline, and what changed, in words.

    Raises:
        ArtifactError: nothing was measured, or the report does not say on which samples.
        RecipeError: a tolerance below 0, or a factor not above 0.
    """
    if (tolerance is not None and tolerance < 0) or (slower is not None and slower <= 0):
        raise RecipeError(
            message(
                "--tolerance or --slower is out of range", expected="0 or more; above 0", found=f"{tolerance}, {slower}"
            )
        )
    data = Data.model_validate(_data_of(report))
    said = []
    if previous is not None and previous.data != data:
        said.append("the samples are others: every result of the old baseline is dropped")
        previous = None
    old = dict(previous.results) if previous is not None else {}
    entries: dict[str, Entry] = {}
    for row in report["results"]:
        if row["precision"] == BASELINE:
            continue
        values = of_row(row) if row["status"] == "measured" else None
        key = key_of(row)
        if values is None:
            said.append(f"{key}: left out, {row['status']} without outcomes of samples")
            continue
        entries[key] = _entry(row, values, old.get(key), tolerance, slower)
        said.append(f"{key}: {'added' if key not in old else 'unchanged' if entries[key] == old[key] else 'replaced'}")
    if not entries:
        raise ArtifactError(
            message("the report holds nothing for a baseline", expected="a measured result with outcomes of samples")
        )
    said += [f"{key}: kept, not in this report" for key in old if key not in entries]
    merged = {**old, **entries}
    model = (report.get("model") or {}).get("name")
    return Baseline(schema_version=1, kind=KIND, model=model, data=data, results=dict(sorted(merged.items()))), said


def write_baseline(path: Path, baseline: Baseline) -> None:
    """Write the file in one step.

    Raises:
        StageError: the machine refuses; the old file is untouched.
    """
    document = baseline.model_dump(mode="json", exclude_none=True)
    atomic_write(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _entry(
    row: Mapping[str, Any],
    values: Sequence[float],
    old: Entry | None,
    tolerance: float | None,
    slower: float | None,
) -> Entry:
    metric = Metric.model_validate(row["metric"])
    if tolerance is not None:
        limit = tolerance
    elif old is not None:
        limit = old.limit
    else:
        limit = default_limit(values)
    ratio = 1 / row["speedup_over_float"] if row.get("speedup_over_float") else None
    latency = None
    if ratio is not None and slower is not None:
        latency = Latency(ratio=_short(ratio), limit=_short(ratio * slower))
    elif ratio is not None and old is not None and old.latency is not None:
        latency = Latency(ratio=_short(ratio), limit=old.latency.limit)
    return Entry(
        metric=metric.name or "metric",
        higher_is_better=higher_is_better(metric),
        value=sum(values) / len(values),
        limit=limit,
        outcomes=pack(values),
        accumulators_different=(row.get("parity") or {}).get("accumulators_different"),
        rung=row.get("rung"),
        latency=latency,
    )


def default_limit(values: Sequence[float]) -> float:
    """The limit of an entry that nobody gave one.

    Right/wrong samples: the smallest drop that so many of them find in 80 % of runs when one in fifty changes, so that
    a model as good as the baseline passes. Grades: half a percent of their mean.
    """
    unit = max(values)
    if "right" in pack(values):
        least = smallest_detectable_drop(len(values), 0.02)
        return _short(unit * (least if least is not None else 1.0))
    return _short(0.005 * abs(sum(values) / len(values)))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _judge(key: str, entry: Entry, row: Mapping[str, Any] | None) -> list[GateVerdict]:
    target, precision = key.split("/", 1) if "/" in key else (key, "*")

    def verdict(name: str, value: float | None, limit: float, word: Any, evidence: str) -> GateVerdict:
        return GateVerdict(f"baseline_{name}", target, precision, value, limit, word, evidence)

    if row is None or row["status"] != "measured":
        why = "there is no result" if row is None else f"only {row['status']}: {row.get('reason') or 'no reason given'}"
        return [verdict("measured", 0.0, 1.0, "fail", f"in the baseline, but {why}")]
    rows = [_judge_metric(verdict("accuracy", None, entry.limit, "fail", ""), entry, row)]
    if entry.accumulators_different is not None:
        now = (row.get("parity") or {}).get("accumulators_different")
        was = entry.accumulators_different
        text = f"{was} accumulators differed, now {'none were compared' if now is None else now}"
        word = "fail" if now is None or now > was else "pass"
        rows.append(verdict("accumulators", now, was, word, text))
    if entry.rung is not None and row.get("rung") != entry.rung:
        text = f"ran {entry.rung}, now {row.get('rung') or 'unknown'}"
        rows.append(verdict("rung", None, 0.0, "fail", text))
    if entry.latency is not None:
        rows.append(
            _judge_latency(verdict("latency", None, entry.latency.limit, "undecided", ""), entry.latency, row, rows)
        )
    return rows


def _judge_metric(blank: GateVerdict, entry: Entry, row: Mapping[str, Any]) -> GateVerdict:
    metric = Metric.model_validate(row.get("metric") or {})
    values = of_row(row)
    if values is None:
        return replace(blank, evidence="in the baseline, but this result holds no outcomes of samples")
    if (metric.name or "metric") != entry.metric:
        return replace(blank, evidence=f"the baseline holds {entry.metric!r}, this result {metric.name!r}")
    then = unpack(entry.outcomes, f"results.{row['target']}/{row['precision']}.outcomes")
    if "grades" in entry.outcomes:
        # The baseline holds seven digits: what is beyond them is no change.
        values = [float(f"{v:.7g}") for v in values]
    first, second = (then, values) if entry.higher_is_better else (values, then)
    found = paired_finding(first, second, entry.limit)
    text = f"{entry.metric} {entry.value:.6g} in the baseline, {sum(values) / len(values):.6g} now, n = {len(values)}; "
    return replace(
        blank,
        value=found.value,
        verdict=found.by_interval or found.verdict or "undecided",
        evidence=text + found.evidence,
        interval=None if found.lo is None or found.hi is None else (found.lo, found.hi),
        detectable=found.detectable,
        samples_needed=found.samples_needed,
    )


def _judge_latency(
    blank: GateVerdict, latency: Latency, row: Mapping[str, Any], others: Sequence[GateVerdict]
) -> GateVerdict:
    speedup, ends = row.get("speedup_over_float"), row.get("speedup_ci")
    if not speedup or not isinstance(ends, list | tuple) or len(ends) != 2 or not all(ends):
        return replace(blank, verdict="fail", evidence="in the baseline, but this result holds no latency ratio")
    value, lo, hi = 1 / speedup, 1 / max(ends), 1 / min(ends)
    text = (
        f"{latency.ratio:.3g} of float's latency in the baseline, {value:.3g} now, 95 % interval [{lo:.3f}, {hi:.3f}]"
    )
    parity = row.get("parity") or {}
    broken = [v.name for v in others if v.verdict != "pass"]
    if parity.get("accumulators_checked") and parity.get("accumulators_different") != 0:
        broken.append("parity")
    if broken:
        void = f"void, because {' and '.join(broken)} did not pass: fast and wrong is no speed"
        return replace(blank, value=value, interval=(lo, hi), evidence=f"{void}; {text}")
    if (row.get("latency_ms") or {}).get("stable") is not True:
        return replace(blank, value=value, interval=(lo, hi), evidence=f"{text}; not stable")
    word: Literal["pass", "fail", "undecided"] = (
        "pass" if hi <= latency.limit else "fail" if lo > latency.limit else "undecided"
    )
    return replace(blank, value=value, interval=(lo, hi), verdict=word, evidence=text)


def _data_of(report: Mapping[str, Any]) -> Mapping[str, Any]:
    data = report.get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("sha256"), str) or type(data.get("samples")) is not int:
        raise ArtifactError(
            message(
                "the report does not say on which samples it was made", fix="write it again with `s2d-deploy report`"
            )
        )
    return {"sha256": data["sha256"], "samples": data["samples"]}


def _same_data(report: Mapping[str, Any], baseline: Baseline, place: str) -> None:
    data = _data_of(report)
    if data["sha256"] != baseline.data.sha256:
        raise ArtifactError(
            message(
                f"{place} was made on other samples, so nothing can be compared",
                expected=f"{baseline.data.samples} samples with digest {baseline.data.sha256[:12]}",
                found=f"{data['samples']} samples with digest {data['sha256'][:12]}",
                fix="run on the baseline's data, or make a new baseline with --write",
            )
        )
