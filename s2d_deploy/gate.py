"""Gates: each compares one figure of one result with one limit, and says pass, fail or undecided.

What the verdicts mean, and what they do not:

- A figure that was not measured never passes. A *required* target without a measured result gives an
  undecided row ``measured``; so does a figure that is missing from a measured, required result. A limit
  that no result offers a figure for gives one undecided row with target ``*``: no limit vanishes silently.
- Results that are not required are judged where they hold the figure and left alone where they do not.
- Artifacts that were built but not run are judged by what can be known of them: size and audit.
- Accuracy and latency are estimates: they pass only when the whole 95 % interval respects the limit, fail only when
  all of it breaks it, and are undecided between, or where no interval can be had (`power.py` states the rule and how
  often it errs). The evidence says which drop so many samples find, and how many the limit needs. Many gates, some
  false alarms: each may err. ``decide_by="point"`` compares the estimate alone: at the limit, a toss of a coin.
- The other figures are counts on the very samples that were looked at: they have no interval.
- A latency that is not stable is undecided. So is one whose result did not pass parity, or where no parity gate was
  judged: fast and wrong is no speed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Any, Literal

from s2d_deploy.errors import EXIT_GATE_FAILED, EXIT_PASS, ArtifactError, RecipeError, message
from s2d_deploy.paired import paired_drop
from s2d_deploy.power import decide, needed, smallest_detectable
from s2d_deploy.precision import FP4

Verdict = Literal["pass", "fail", "undecided"]
FLOAT = "fp32"


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What is demanded. None demands nothing.

    Attributes:
        accuracy_drop: largest drop of the metric from the float model to the runtime, in the metric's unit.
        simulation_gap: largest absolute difference between simulated and measured metric.
        accumulators_different: largest number of teacher-forced accumulators that differ.
        parity_findings: largest number of things that `verify` found wrong: faults with a name, runs that disagree with
            each other, more differences than this network's tolerances allow.
        code_flip_share: largest share of codes that differ end to end.
        top1_flip_share: largest share of samples whose top-1 answer differs from the simulation's.
        executed: smallest share, among the multiply-accumulates that were declared as integer, that ran as such.
        latency_ratio: largest ratio of the latency to that of the float baseline on the same runtime.
        size_ratio: largest ratio of the artifact's size to that of the float artifact.
        weight_ratio: largest ratio of the quantized weights' bytes to their FP32 bytes.
        decide_by: ``"interval"`` or ``"point"``, see the module.
    """

    accuracy_drop: float | None = None
    simulation_gap: float | None = None
    accumulators_different: int | None = 0
    parity_findings: int | None = None
    code_flip_share: float | None = None
    top1_flip_share: float | None = None
    executed: float | None = None
    latency_ratio: float | None = None
    size_ratio: float | None = None
    weight_ratio: float | None = None
    decide_by: Literal["interval", "point"] = "interval"

    def __post_init__(self) -> None:
        wrong = [
            f"gates.{name}: {value!r}"
            for name, value in self.numbers().items()
            if isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
            or (value < 0 and name != "accuracy_drop")
            or (value > 1 and name in ("executed", "code_flip_share", "top1_flip_share"))
        ]
        if self.decide_by not in ("point", "interval"):
            wrong.append(f"gates.decide_by: {self.decide_by!r}")
        if wrong:
            raise RecipeError(
                message(
                    "a gate's limit is out of range",
                    expected="finite numbers, not negative; shares at most 1; decide_by 'interval' or 'point'",
                    found=", ".join(wrong),
                )
            )

    def numbers(self) -> dict[str, float]:
        """The limits that are set, by gate name."""
        return {k: v for k, v in asdict(self).items() if k != "decide_by" and v is not None}

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> GateLimits:
        """Limits from the recipe's section ``gates``.

        Raises:
            RecipeError: an unknown key, or a limit out of range.
        """
        known = [f.name for f in fields(cls)]
        unknown = [key for key in document if key not in known]
        if unknown:
            close = get_close_matches(str(unknown[0]), known, n=1)
            raise RecipeError(
                message(
                    f"unknown key gates.{unknown[0]}",
                    expected=f"one of {', '.join(known)}",
                    fix=f"did you mean {close[0]!r}?" if close else None,
                )
            )
        return cls(**document)


@dataclass(frozen=True, slots=True)
class GateVerdict:
    """One row of the report's ``gates``.

    Attributes:
        name: the gate.
        target: the runtime; ``"*"`` where no result offered the figure.
        precision: of the result.
        value: None where nothing was measured.
        limit: what is demanded.
        verdict: pass, fail or undecided.
        evidence: what was compared, in words.
        interval: 95 % interval of `value`, where it is an estimate.
        detectable: the smallest true drop that this gate fails in 80 % of runs with as many samples.
        samples_needed: with so many samples a model without any drop passes this gate in 80 % of runs.
    """

    name: str
    target: str
    precision: str
    value: float | None
    limit: float
    verdict: Verdict
    evidence: str
    interval: tuple[float, float] | None = None
    detectable: float | None = None
    samples_needed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; what does not apply is left out."""
        document = asdict(self)
        extra = ("interval", "detectable", "samples_needed")
        return {k: v for k, v in document.items() if k not in extra or v is not None}


@dataclass(frozen=True, slots=True)
class _Finding:
    """A figure with what is known about it.

    `verdict` is set where the figure itself already decides, `by_interval` where it does so by its interval.
    An `estimate` without an interval decides nothing unless the recipe asks for the point.
    """

    value: float | None
    evidence: str
    lo: float | None = None
    hi: float | None = None
    verdict: Verdict | None = None
    by_interval: Verdict | None = None
    estimate: bool = False
    detectable: float | None = None
    samples_needed: int | None = None


def evaluate(
    results: Sequence[Mapping[str, Any]],
    limits: GateLimits,
    *,
    required: Iterable[str] | None = None,
    precisions: Iterable[str] | None = None,
) -> list[GateVerdict]:
    """Judge the report's ``results``.

    Args:
        results: entries of the report's ``results``; read only.
        required: targets (``"ort"``) or pairs (``"ort/w4a4"``) that must be measured. None: every target with
            a measured result is required to hold every figure that a limit asks for.
        precisions: what a required target must offer. None: every precision that occurs in `results`,
            the float baseline excepted.

    Raises:
        ArtifactError: an entry lacks its target, precision or status, or occurs twice.
    """
    table = _by_key(results)
    wanted = [p for p in (precisions or dict.fromkeys(p for _, p in table)) if p != FLOAT]
    must = _required_pairs(required, wanted, table)
    rows: list[GateVerdict] = []
    if required is not None:
        rows += [_presence(target, precision, table.get((target, precision))) for target, precision in must]
    seen: set[str] = set()
    for (target, precision), result in table.items():
        needed = (target, precision) in must and precision != FLOAT
        own: list[GateVerdict] = []
        for name, limit in limits.numbers().items():
            if not _applies(name, precision) or (result["status"] != "measured" and name not in _STATIC):
                continue
            finding = _FIGURES[name](result, table, limit)
            if finding is None and needed and result["status"] == "measured":
                finding = _Finding(None, f"not measured: the result holds no {_NEEDS[name]}")
            if finding is not None:
                own.append(_judge(name, target, precision, limit, finding, limits.decide_by))
        rows += _void_latency(own)
        seen |= {row.name for row in own}
    for name, limit in limits.numbers().items():
        if name not in seen and any(_applies(name, p) for p in wanted):
            rows.append(GateVerdict(name, "*", "*", None, limit, "undecided", f"no result holds {_NEEDS[name]}"))
    return rows


def overall(verdicts: Iterable[GateVerdict]) -> Verdict:
    """Fail if any failed; else undecided if any is, or if there is no gate at all; else pass."""
    found = {v.verdict for v in verdicts}
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "undecided"


def exit_code(verdict: Verdict) -> int:
    """0 for pass, 1 for fail and for undecided."""
    return EXIT_PASS if verdict == "pass" else EXIT_GATE_FAILED


def _by_key(results: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], Mapping[str, Any]]:
    table: dict[tuple[str, str], Mapping[str, Any]] = {}
    for i, result in enumerate(results):
        for key in ("target", "precision", "status"):
            if not isinstance(result.get(key), str):
                raise ArtifactError(
                    message(f"results[{i}].{key} is not a text", found=repr(result.get(key)), fix="bench again")
                )
        pair = (result["target"], result["precision"])
        if pair in table:
            raise ArtifactError(message(f"results[{i}]: {pair[0]} {pair[1]} occurs twice", fix="bench again"))
        table[pair] = result
    return table


def _required_pairs(
    required: Iterable[str] | None, wanted: Sequence[str], table: Mapping[tuple[str, str], Mapping[str, Any]]
) -> list[tuple[str, str]]:
    if required is None:
        return [pair for pair, result in table.items() if result["status"] == "measured"]
    pairs: list[tuple[str, str]] = []
    for entry in required:
        target, _, precision = entry.partition("/")
        # A required target without any result must not slip through because no precision is known.
        pairs += [(target, precision)] if precision else [(target, p) for p in wanted or ["*"]]
    return list(dict.fromkeys(pairs))


def _presence(target: str, precision: str, result: Mapping[str, Any] | None) -> GateVerdict:
    if result is None:
        return GateVerdict("measured", target, precision, 0.0, 1.0, "undecided", "required, but there is no result")
    if result["status"] != "measured":
        why = result.get("reason") or "no reason given"
        text = f"required, but only {result['status']}: {why}"
        return GateVerdict("measured", target, precision, 0.0, 1.0, "undecided", text)
    on = result.get("device") or "the device"
    return GateVerdict("measured", target, precision, 1.0, 1.0, "pass", f"ran on {on}")


def _judge(name: str, target: str, precision: str, limit: float, finding: _Finding, decide_by: str) -> GateVerdict:
    value, verdict, evidence = finding.value, finding.verdict, finding.evidence
    interval = None if finding.lo is None or finding.hi is None else (finding.lo, finding.hi)
    if not all(x is None or math.isfinite(x) for x in (value, *(interval or ()))):
        return GateVerdict(name, target, precision, None, limit, "undecided", f"{evidence}: not a finite number")
    if verdict is None:
        if value is None:
            verdict = "undecided"
        elif decide_by == "interval" and finding.by_interval is not None:
            verdict = finding.by_interval
        elif decide_by == "interval" and interval is not None:
            verdict = "pass" if interval[1] <= limit else "fail" if interval[0] > limit else "undecided"
        elif decide_by == "interval" and finding.estimate:
            verdict, evidence = "undecided", f"{evidence}; an estimate without an interval decides nothing"
        elif name == "executed":
            verdict = "pass" if value >= limit - 1e-9 else "fail"  # the share is a sum of floats
        else:
            # 0.9 - 0.895 is 0.005000000000000004: a drop of exactly the limit must pass.
            verdict = "pass" if value <= limit or math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-12) else "fail"
    return GateVerdict(
        name, target, precision, value, limit, verdict, evidence, interval, finding.detectable, finding.samples_needed
    )


def _void_latency(rows: list[GateVerdict]) -> list[GateVerdict]:
    """A latency counts only behind parity: at least one gate of it passed, and none did not."""
    parity = [row for row in rows if row.name in _PARITY]
    failed, open_ = ([row.name for row in parity if row.verdict == v] for v in ("fail", "undecided"))
    if failed:
        void = f"void, because {' and '.join(failed)} failed: what ran is not the declared model"
    elif open_:
        void = f"void, because {' and '.join(open_)} is undecided: what ran may not be the declared model"
    elif not parity:
        void = f"void, because no parity gate was judged: set one of gates.{', gates.'.join(_PARITY)}"
    else:
        return rows
    return [
        replace(r, verdict="undecided", evidence=f"{void}; {r.evidence}") if r.name == "latency_ratio" else r
        for r in rows
    ]


def _applies(name: str, precision: str) -> bool:
    """The float baseline has only its metric to be judged by; float activations have no codes to compare."""
    if precision == FLOAT:
        return name in ("accuracy_drop", "simulation_gap", "top1_flip_share")
    if name in ("accumulators_different", "parity_findings", "code_flip_share", "executed"):
        if precision in FP4 and name != "executed":  # no integer sums, and no integer codes
            return False
        return re.fullmatch(r"w\d+a(16|32)", precision) is None
    return True


def _section(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = result.get(name)
    return section if isinstance(section, Mapping) else {}


def _number(section: Mapping[Any, Any], key: Any, *, finite: bool = True) -> float | None:
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if not finite or math.isfinite(value) else None


def _metric_pair(result: Mapping[str, Any], first: str) -> tuple[float, float, str] | _Finding | None:
    metric = _section(result, "metric")
    a, b = _number(metric, first, finite=False), _number(metric, "measured", finite=False)
    if a is None or b is None:
        return None
    text = f"{metric.get('name', 'metric')} {a:.6g} {first}, {b:.6g} measured"
    if metric.get("n") is not None:
        text += f", n = {metric['n']}"
    if not (math.isfinite(a) and math.isfinite(b)):
        return _Finding(None, f"{text}: not a finite number", verdict="fail")
    return a, b, text


def _accuracy_drop(result: Mapping[str, Any], _: Any, limit: float) -> _Finding | None:
    pair = _metric_pair(result, "float")
    if pair is None or isinstance(pair, _Finding):
        return pair
    a, b, text = pair
    metric = _section(result, "metric")
    falls = metric.get("higher_is_better") is not False
    value = a - b if falls else b - a
    first, second = metric.get("per_sample_float"), metric.get("per_sample_measured")
    if first is None or second is None:
        n = metric.get("n")
        one = f"; one sample is {1 / n:.2g}" if isinstance(n, int) and n > 0 else ""
        return _Finding(value, f"{text}{one}; no per-sample results, so no interval", estimate=True)
    if not falls:
        first, second = second, first
    found = paired_finding(first, second, limit)
    if found.value is not None and not math.isclose(found.value, value, rel_tol=1e-6, abs_tol=1e-6):
        text += f"; the samples' own drop is {found.value:.6g}, not {value:.6g}"
        return _Finding(value, f"{text}: they are not those of these figures", verdict="undecided")
    return replace(found, value=value if found.verdict is None else None, evidence=f"{text}; {found.evidence}")


def paired_finding(first: Any, second: Any, limit: float) -> _Finding:
    """What the same samples, judged twice, say about a drop from `first` to `second` and about `limit`."""
    try:
        drop = paired_drop(first, second)
    except (TypeError, ValueError) as error:
        return _Finding(None, f"per-sample results do not fit: {error}", verdict="undecided")
    text = f"95 % interval of the drop [{drop.lo:.4f}, {drop.hi:.4f}] ({drop.method}"
    text += f", p = {drop.p_value:.3g})" if drop.p_value is not None else ")"
    if drop.lost is not None:
        text += f"; lost {drop.lost}, gained {drop.gained}"
    verdict, least, enough = decide(drop, limit), smallest_detectable(drop, limit), needed(drop, limit)
    if least is None:
        text += f"; no drop fails this gate with {drop.n} samples"
    else:
        text += f"; a true drop of {least:.4g} fails this gate in 80 % of runs"
    if verdict == "undecided" and enough is not None and enough > drop.n:
        text += f"; a model without any drop needs {enough} samples to pass it"
    elif verdict == "undecided" and drop.drop != limit and drop.hi > drop.lo:
        # Half the interval, and what 80 % of runs take, must fit between the drop and the limit.
        about = drop.n * (0.76 * (drop.hi - drop.lo) / abs(limit - drop.drop)) ** 2
        rounded = int(float(f"{about:.2g}")) if about < 1e9 else None
        text += f"; were the true drop the one seen, about {rounded:,} samples would decide" if rounded else ""
    return _Finding(drop.drop, text, drop.lo, drop.hi, None, verdict, True, least, enough)


def _simulation_gap(result: Mapping[str, Any], _: Any, __: float) -> _Finding | None:
    pair = _metric_pair(result, "simulated")
    if pair is None or isinstance(pair, _Finding):
        return pair
    return _Finding(abs(pair[0] - pair[1]), pair[2])


def _accumulators(result: Mapping[str, Any], _: Any, __: float) -> _Finding | None:
    parity = _section(result, "parity")
    checked, different = _number(parity, "accumulators_checked"), _number(parity, "accumulators_different")
    if checked == 0 and _section(result, "placement").get("kept_float") and not _number(parity, "ops_checked"):
        return _Finding(0.0, "no integer product is left: the placement search kept every op in float", verdict="pass")
    if checked is None or checked <= 0 or different is None:
        return None
    return _Finding(different, f"{different:.0f} of {checked:.0f} teacher-forced int32 accumulators differ")


def _parity_findings(result: Mapping[str, Any], _: Any, __: float) -> _Finding | None:
    """What `verification.examine` found; undecided where one of its steps broke."""
    parity = _section(result, "parity")
    verdict = parity.get("verdict")
    if verdict not in ("pass", "fail", "undecided"):
        return None
    explanation = _section(parity, "explanation")
    listed = explanation.get("findings")
    words = [str(f.get("cause")) for f in listed if isinstance(f, Mapping)] if isinstance(listed, list) else []
    if not words and explanation.get("verdict") == "unexplained":
        words.append("differences without a cause")
    if _section(parity, "consistency").get("agrees") is False:
        words.append("runs that disagree with each other")
    if _section(parity, "budget").get("within") is False:
        words.append("more differences than the network's tolerances allow")
    if verdict == "undecided":
        broken = ", ".join(_section(parity, "unexamined")) or "a step of the examination"
        return _Finding(float(len(words)), f"not examined: {broken}", verdict="undecided")
    return _Finding(float(len(words)), "; ".join(words) or "nothing but rounding at boundaries")


def _code_flips(result: Mapping[str, Any], _: Any, __: float) -> _Finding | None:
    parity = _section(result, "parity")
    checked, different = _number(parity, "codes_checked"), _number(parity, "codes_different")
    if checked is None or checked <= 0 or different is None:
        return None
    return _Finding(different / checked, f"{different:.0f} of {checked:.0f} codes differ end to end")


def _top1_flips(result: Mapping[str, Any], _: Any, __: float) -> _Finding | None:
    parity = _section(result, "parity")
    flips = _number(parity, "top1_flips")
    samples = _number(parity, "samples") or _number(_section(result, "metric"), "n")
    if flips is None or samples is None or samples <= 0:
        return None
    return _Finding(flips / samples, f"{flips:.0f} of {samples:.0f} top-1 answers differ from the simulation")


def _executed(result: Mapping[str, Any], _: Any, limit: float) -> _Finding | None:
    ops = _section(result, "audit").get("ops")
    if isinstance(ops, list | tuple) and ops and all(isinstance(op, Mapping) for op in ops):
        declared = [op for op in ops if str(op.get("declared", "float")) not in ("float", "W4A16", "W8A16")]
        # By name, and only where the recipe asked for a placement search: see `placement.placement_row`.
        kept_float = _section(result, "placement").get("kept_float")
        excepted = set(map(str, kept_float)) if isinstance(kept_float, list | tuple) else set()
        floats = [op for op in declared if not str(op.get("precision", "")).startswith(("int", "nvfp4"))]
        missed = [op for op in floats if str(op.get("name")) not in excepted]
        kept = [str(op.get("name")) for op in floats if str(op.get("name")) in excepted]
        total = sum(_number(op, "macs") or 0 for op in declared)
        if not declared:
            return _Finding(0.0, "the audit shows no operation that is declared as integer", verdict="fail")
        if total <= 0:
            return _Finding(None, "the audit counts no multiply-accumulates", verdict="undecided")
        share = 1 - sum(_number(op, "macs") or 0 for op in floats) / total
        # An artifact that was only built ran nothing: what is judged is what the compiler made of it.
        ran = "ran" if result.get("status") == "measured" else "were compiled (not run)"
        names = ", ".join(
            f"{op.get('name')} ({op.get('declared')} {ran} as {op.get('precision')})" for op in missed[:3]
        )
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        text = f"{len(declared) - len(floats)} of {len(declared)} declared operations {ran} as declared"
        if kept:
            listed = ", ".join(kept[:3]) + (f" and {len(kept) - 3} more" if len(kept) > 3 else "")
            text += f"; kept in float by the placement search that the recipe asks for: {listed}"
            judged = 1 - sum(_number(op, "macs") or 0 for op in missed) / total
            text += f"; not: {names}{more}" if missed else ""
            # The share is what ran; the verdict leaves the named exceptions out.
            return _Finding(share, text, verdict="pass" if judged >= limit - 1e-9 else "fail")
        return _Finding(share, f"{text}; not: {names}{more}" if missed else text)
    shares = _section(result, "executed")
    if not shares:
        return None
    share = sum(_number(shares, k) or 0.0 for k in shares if str(k).startswith(("int", "nvfp4")))
    listed = ", ".join(f"{k} {_number(shares, k) or 0:.2%}" for k in shares)
    return _Finding(share, f"share of all multiply-accumulates (no audit by operation): {listed}")


def _latency_ratio(result: Mapping[str, Any], table: Any, _: float) -> _Finding | None:
    latency = _section(result, "latency_ms")
    base = _section(table.get((result["target"], FLOAT), {}), "latency_ms")
    own, reference = _number(latency, "p50"), _number(base, "p50")
    speedup = _number(result, "speedup_over_float")
    if own is None:
        return None
    if speedup is not None and speedup > 0:
        value = 1 / speedup
    elif reference is not None and reference > 0:
        value = own / reference
    else:
        return None
    lo = hi = None
    text = f"p50 {own:.3f} ms" + (f" against {reference:.3f} ms in float" if reference else "")
    ends = result.get("speedup_ci")
    interval = dict(enumerate(ends)) if isinstance(ends, list | tuple) and len(ends) == 2 else {}
    slow, fast = _number(interval, 0), _number(interval, 1)
    if slow is not None and fast is not None and 0 < slow <= fast:
        lo, hi = 1 / fast, 1 / slow
        text += f", 95 % interval of the ratio [{lo:.3f}, {hi:.3f}]"
    text += f", {latency.get('threads', '?')} threads, batch {latency.get('batch', '?')}"
    for who, figures in (("this", latency), ("the float baseline", base)):
        if figures and figures.get("stable") is not True:
            why = figures.get("note") or "no reason given"
            return _Finding(value, f"{text}; {who} is not stable: {why}", lo, hi, verdict="undecided")
    return _Finding(value, text, lo, hi, estimate=True)


def _ratio_of(own: str, reference: str, what: str) -> Callable[[Mapping[str, Any], Any, float], _Finding | None]:
    def figure(result: Mapping[str, Any], _: Any, __: float) -> _Finding | None:
        a, b = _number(result, own), _number(result, reference)
        if a is None or b is None or b <= 0:
            return None
        return _Finding(a / b, f"{what}: {a:.0f} bytes against {b:.0f} in float")

    return figure


_FIGURES: dict[str, Callable[[Mapping[str, Any], Any, float], _Finding | None]] = {
    "accuracy_drop": _accuracy_drop,
    "simulation_gap": _simulation_gap,
    "accumulators_different": _accumulators,
    "parity_findings": _parity_findings,
    "code_flip_share": _code_flips,
    "top1_flip_share": _top1_flips,
    "executed": _executed,
    "latency_ratio": _latency_ratio,
    "size_ratio": _ratio_of("size_bytes", "float_size_bytes", "artifact"),
    "weight_ratio": _ratio_of("weight_size_bytes", "weight_float_size_bytes", "quantized weights"),
}
_NEEDS = {
    "accuracy_drop": "metric.float and metric.measured",
    "simulation_gap": "metric.simulated and metric.measured",
    "accumulators_different": "parity.accumulators_checked above 0",
    "parity_findings": "parity.verdict",
    "code_flip_share": "parity.codes_checked above 0",
    "top1_flip_share": "parity.top1_flips with a number of samples",
    "executed": "audit.ops or executed",
    "latency_ratio": "latency_ms.p50 with a float baseline",
    "size_ratio": "size_bytes and float_size_bytes",
    "weight_ratio": "weight_size_bytes and weight_float_size_bytes",
}
_PARITY = (
    "accumulators_different",
    "parity_findings",
    "code_flip_share",
    "top1_flip_share",
    "simulation_gap",
    "executed",
)
_STATIC = ("executed", "size_ratio", "weight_ratio")
