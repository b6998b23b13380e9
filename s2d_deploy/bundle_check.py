"""Which claims of an evidence bundle hold: every figure and verdict again, from the raw samples in it.

Three answers: a claim holds, does not hold, or cannot be checked from the file (then the note says what is missing).
Nothing that the bundle says of itself is believed, except the raw samples, outputs and labels: means, quantiles, ratios
with their intervals, shares, parity of the outputs, gates and the verdict are computed anew and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from s2d_deploy.archive import read_archive, read_document
from s2d_deploy.errors import ArtifactError, DataError, S2DDeployError, message
from s2d_deploy.judge import judged_again, recipe_of
from s2d_deploy.latency import LatencyStats, ratio
from s2d_deploy.parity import output_parity, top1_flips
from s2d_deploy.precision import BASELINE
from s2d_deploy.report import validate

KIND = "s2d-deploy evidence"
REPORT, RECIPE, EVIDENCE, LABELS, SIMULATED = "report.json", "recipe.json", "evidence.json", "labels.json", "simulation"
_NS_PER_MS = 1e6

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim and what became of it.

    Attributes:
        what: in words, e.g. ``"ort w4a4: metric 95.3 is the mean of 597 samples"``.
        holds: None where the file does not hold what it takes to say.
        note: what was found instead, or what is missing.
    """

    what: str
    holds: bool | None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a bundle holds, read and checked for form.

    Attributes:
        path: of the file.
        sha256: digest of the content.
        report: the report's document.
        recipe: the resolved recipe's document.
        facts: ``evidence.json``.
        outputs: (target or ``"simulation"``, precision) -> raw outputs.
        labels: of the test split, or None.
    """

    path: Path
    sha256: str
    report: dict[str, Any]
    recipe: dict[str, Any]
    facts: dict[str, Any]
    outputs: dict[tuple[str, str], Floats]
    labels: npt.NDArray[np.int64] | None


def read_bundle(path: Path) -> Evidence:
    """Read a bundle; every file in it has the digest that its manifest promises.

    Raises:
        ArtifactError: not a bundle, damaged, changed, or hostile: one sentence that says where.
    """
    files, digest = read_archive(path, KIND)
    report, recipe, facts = (read_document(files, name, path) for name in (REPORT, RECIPE, EVIDENCE))
    validate(report, f"{path}: {REPORT}")
    if report.get("recipe") != recipe:
        raise _broken(path, f"{RECIPE} is not the recipe of {REPORT}")
    recipe_of(report)
    outputs: dict[tuple[str, str], Floats] = {}
    for entry in _list(facts, "outputs", path):
        try:
            place, shape = (str(entry["target"]), str(entry["precision"])), [int(n) for n in entry["shape"]]
            raw = np.frombuffer(files[str(entry["file"])], dtype="<f4")
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, f"{EVIDENCE}: outputs: {type(error).__name__} {error}"[:120]) from error
        if not shape or min(shape) < 1 or math.prod(shape) != raw.size:
            raise _broken(path, f"{entry['file']}: {raw.size} numbers for shape {shape}"[:120])
        outputs[place] = raw.reshape(shape).astype(np.float32)
    labels = None
    if LABELS in files:
        listed = read_document(files, LABELS, path).get("labels")
        if not isinstance(listed, list) or not all(type(v) is int and abs(v) < 1 << 31 for v in listed):
            raise _broken(path, f"{LABELS}: not a list of labels")
        labels = np.asarray(listed, dtype=np.int64)
    for name in ("stages", "commands", "left_out"):
        _list(facts, name, path)
    if not isinstance(facts.get("codes"), dict):
        raise _broken(path, f"{EVIDENCE}: codes is not an object")
    return Evidence(path, digest, report, recipe, facts, outputs, labels)


def check(evidence: Evidence) -> list[Claim]:
    """Every claim of the report, computed anew."""
    claims = [Claim("every file has the digest of the manifest", True, evidence.sha256)]
    rows = evidence.report["results"]
    baselines = {row["target"]: row for row in rows if row["precision"] == BASELINE}
    with np.errstate(all="ignore"):
        for row in rows:
            for make in (_metric, _outputs, _latency, _speedup, _executed, _codes):
                name = make.__name__.lstrip("_")
                claims += _guarded(f"{_where(row)}: {name}", partial(make, row, evidence, baselines))
        return [*claims, *_guarded("gates", partial(_gates, evidence))]


def _guarded(what: str, make: Callable[[], Iterator[Claim]]) -> list[Claim]:
    """Claims as far as they can be made: the schema leaves forms open, and what does not fit does not hold."""
    made: list[Claim] = []
    try:
        for claim in make():
            made.append(claim)  # noqa: PERF402 - what was made before an error is kept
    except (S2DDeployError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
        made.append(Claim(what, False, f"the raw values do not fit: {' '.join(str(error).split())[:160]}"))
    return made


def holds(claims: Sequence[Claim]) -> bool:
    """Whether no claim is contradicted."""
    return all(claim.holds is not False for claim in claims)


def _metric(row: Mapping[str, Any], _: Evidence, __: Any) -> Iterator[Claim]:
    metric = row.get("metric") or {}
    if row["status"] != "measured" or metric.get("measured") is None:
        return
    for key, samples in (("measured", "per_sample_measured"), ("float", "per_sample_float")):
        values = metric.get(samples)
        what = f"{_where(row)}: {metric.get('name')} {key} {_shown(metric.get(key))} is the mean of its samples"
        if not isinstance(values, list) or not values:
            yield Claim(what, None, "no outcomes of samples in the file")
            continue
        found = float(np.mean(np.asarray(values, dtype=np.float64)))
        fits = len(values) == metric.get("n") and _equal(found, metric.get(key))
        yield Claim(what, fits, f"{_shown(found)} over {len(values)} samples")


def _outputs(row: Mapping[str, Any], evidence: Evidence, _: Any) -> Iterator[Claim]:
    output = evidence.outputs.get((row["target"], row["precision"]))
    simulated = evidence.outputs.get((SIMULATED, row["precision"]))
    parity, metric = row.get("parity") or {}, row.get("metric") or {}
    if row["status"] != "measured":
        return
    if output is None or simulated is None:
        yield Claim(f"{_where(row)}: outputs against the simulation's", None, "the outputs are not in the file")
        return
    found = output_parity(simulated, output) if output.shape == simulated.shape else {}
    if output.ndim == 2 and "top1_flips" in parity:
        found["top1_flips"] = top1_flips(simulated, output)
    stated = {name: parity.get(name) for name in found}
    same = bool(found) and all(_equal(found[name], stated[name]) for name in found)
    yield Claim(f"{_where(row)}: outputs against the simulation's: {_listed(stated)}", same, _listed(found))
    values = metric.get("per_sample_measured")
    if evidence.labels is None or output.ndim != 2 or not isinstance(values, list):
        return
    right = output.argmax(axis=-1) == evidence.labels if len(output) == len(evidence.labels) else None
    agree = right is not None and [v > 0 for v in values] == right.tolist()
    yield Claim(f"{_where(row)}: outcomes follow from outputs and labels", agree)


def _latency(row: Mapping[str, Any], _: Evidence, __: Any) -> Iterator[Claim]:
    latency = row.get("latency_ms")
    if not latency:
        return
    stats = _stats(latency)
    found = {"p50": stats.p50_ms, "p90": stats.p90_ms, "p99": stats.p99_ms, "min": stats.min_ms, "max": stats.max_ms}
    stated = {name: latency.get(name) for name in found}
    same = all(_equal(found[name], stated[name]) for name in found)
    text = f"{_where(row)}: latency of {len(stats.samples_ns)} samples, p50 {_shown(stated['p50'])} ms"
    yield Claim(text, same, _listed(found))


def _speedup(row: Mapping[str, Any], _: Evidence, baselines: Mapping[str, Mapping[str, Any]]) -> Iterator[Claim]:
    stated, ends = row.get("speedup_over_float"), row.get("speedup_ci")
    if stated is None:
        return
    what = f"{_where(row)}: {_shown(stated)} times as fast as float"
    base, own = (baselines.get(row["target"]) or {}).get("latency_ms"), row.get("latency_ms")
    if not base or not own:
        yield Claim(what, False, "no samples of both")
        return
    run = object()
    first, second = _stats(base, run), _stats(own, run)
    if len(first.samples_ns) != len(second.samples_ns):
        yield Claim(what, False, f"{len(first.samples_ns)} and {len(second.samples_ns)} samples do not pair")
        return
    found = ratio(first, second)
    lo, hi = ends if isinstance(ends, list) and len(ends) == 2 else (None, None)
    same = _equal(found.median, stated) and _equal(found.lo, lo, 1e-6) and _equal(found.hi, hi, 1e-6)
    yield Claim(what, same, f"{found.median:.4g}, 95 % interval [{found.lo:.4g}, {found.hi:.4g}]")


def _executed(row: Mapping[str, Any], _: Evidence, __: Any) -> Iterator[Claim]:
    stated, ops = row.get("executed"), (row.get("audit") or {}).get("ops")
    if not stated or not ops:
        return
    total: dict[str, int] = {}
    for op in ops:
        total[op["precision"]] = total.get(op["precision"], 0) + op["macs"]
    whole = sum(total.values())
    found = {name: count / whole if whole else 0.0 for name, count in total.items()}
    same = set(found) == set(stated) and all(_equal(found[name], stated[name]) for name in found)
    yield Claim(f"{_where(row)}: executed {_listed(stated)} of {len(ops)} audited operations", same, _listed(found))


def _codes(row: Mapping[str, Any], evidence: Evidence, _: Any) -> Iterator[Claim]:
    hashes = evidence.facts["codes"].get(f"{row['target']}/{row['precision']}")
    parity = row.get("parity") or {}
    if hashes is None or not hashes["runtime"]:
        return
    shared = [name for name in hashes["simulated"] if name in hashes["runtime"]]
    differ = [name for name in shared if hashes["simulated"][name] != hashes["runtime"][name]]
    stated = parity.get("codes_different")
    what = f"{_where(row)}: codes of {len(shared)} sites hashed; {stated} differ end to end"
    # The hashes are those of the first batch: where no code differs at all, none may differ there.
    yield Claim(what, bool(shared) and not (stated == 0 and differ), f"{len(differ)} sites with other hashes")


def _gates(evidence: Evidence) -> Iterator[Claim]:
    report = evidence.report
    again = judged_again(report)

    def table(gates: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], Mapping[str, Any]]:
        return {(g["name"], g.get("target"), g.get("precision")): g for g in gates}

    stated, found = table(report.get("gates") or []), table(again["gates"])
    for key in dict.fromkeys([*stated, *found]):
        old, new = stated.get(key), found.get(key)
        what = " ".join(str(part) for part in key if part)
        if old is None or new is None:
            if new is None and str(key[0]).startswith("baseline_"):
                yield Claim(f"gate {what}", None, "the baseline is not in the file")
                continue
            yield Claim(f"gate {what}", False, "not among the report's gates" if old is None else "no such gate")
            continue
        same = old["verdict"] == new["verdict"] and old.get("limit") == new["limit"]
        same = same and (_equal(old.get("value"), new["value"]) or old.get("value") == new["value"])
        for name in ("detectable", "samples_needed"):
            same = same and (old.get(name) == new.get(name) or _equal(old.get(name), new.get(name), 1e-6))
        interval = [old.get("interval") or [], new.get("interval") or []]
        same = same and len(interval[0]) == len(interval[1])
        same = same and all(_equal(a, b, 1e-6) for a, b in zip(*interval, strict=True))
        yield Claim(
            f"gate {what}: {old['verdict']}, value {_shown(old.get('value'))}",
            same,
            f"{new['verdict']}: {new['evidence']}",
        )
    if not any(str(key[0]).startswith("baseline_") for key in stated):
        yield Claim(f"verdict of the run: {report['verdict']}", report["verdict"] == again["verdict"], again["verdict"])


def _stats(latency: Mapping[str, Any], run: object = None) -> LatencyStats:
    samples = latency.get("samples")
    if not isinstance(samples, list) or not samples:
        raise DataError(message("no latency samples"))
    # Whole nanoseconds were measured.
    return LatencyStats("", tuple(round(float(s) * _NS_PER_MS) for s in samples), run=run)


def _equal(a: Any, b: Any, tolerance: float = 1e-9) -> bool:
    """Equal numbers up to rounding, or the same truth value or nothing."""
    if isinstance(a, bool) or isinstance(b, bool) or a is None or b is None:
        return a is b
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return False
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-12)


def _where(row: Mapping[str, Any]) -> str:
    return f"{row['target']} {row['precision']}"


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def _listed(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(value)}" for name, value in figures.items())


def _list(facts: Mapping[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    found = facts.get(name)
    if not isinstance(found, list) or (name in ("outputs", "stages") and not all(isinstance(e, dict) for e in found)):
        raise _broken(path, f"{EVIDENCE}: {name} is not a list of entries")
    return found


def _broken(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        message(f"{path}: not an evidence bundle of ours", expected="what `report --bundle` writes", found=found)
    )
