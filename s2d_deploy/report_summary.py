"""What the report's pages say in words: counts, the one-sentence summary, the figures on top.

Both pages (Markdown and HTML) take their sentences from here, so they cannot disagree. Only results
with status "measured" enter a figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from s2d_deploy import report_format as fmt
from s2d_deploy.report_schema import PRECISIONS, ConditionedLayer, Gate, LayerState, Metric, Report, Result

_LOWER_IS_BETTER = ("loss", "error", "perplexity", "ppl", "mse", "mae", "rmse", "wer", "cer")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure for the top of the page."""

    label: str
    value: str
    detail: str


def higher_is_better(metric: Metric) -> bool:
    """Whether a larger value is good: what the document says, else the metric's name decides."""
    if metric.higher_is_better is not None:
        return metric.higher_is_better
    words = (metric.name or "").lower().replace("-", " ").replace("_", " ").split()
    return not any(word in _LOWER_IS_BETTER for word in words)


def where(result: Result) -> str:
    """``tvm w4a4``."""
    return f"{result.target} {result.precision}"


def labels(results: list[Result]) -> list[str]:
    """One short distinct label for each result: ``tvm w4a4``, with device or batch where two would be equal."""
    plain = [where(r) for r in results]
    tried = []
    for result, label in zip(results, plain, strict=True):
        if plain.count(label) > 1:
            batch = result.latency_ms.batch if result.latency_ms else None
            more = [result.device, f"batch {batch}" if batch is not None else None]
            label = " · ".join([label, *(text for text in more if text)])
        tried.append(label)
    return [f"{label} #{i + 1}" if tried.count(label) > 1 else label for i, label in enumerate(tried)]


def in_order(results: Iterable[Result]) -> list[Result]:
    """Results by target (in the order of the document), then by precision, widest first."""
    listed = list(results)
    targets = list(dict.fromkeys(r.target for r in listed))
    return sorted(listed, key=lambda r: (targets.index(r.target), width_rank(r.precision), r.precision))


def width_rank(precision: str) -> int:
    """The place of a precision from wide to narrow; unknown ones come last."""
    return PRECISIONS.index(precision) if precision in PRECISIONS else len(PRECISIONS)


def drop(result: Result) -> float | None:
    """How much worse the measured metric is than float, in the metric's unit; negative when it is better."""
    metric = result.metric
    if metric is None or metric.float_model is None or metric.measured is None:
        return None
    loss = metric.float_model - metric.measured
    return loss if higher_is_better(metric) else -loss


def headline(report: Report) -> str:
    """The verdict in one sentence."""
    if not report.gates:
        return "No gate was asked for, so nothing was decided."
    by = {v: sum(g.verdict == v for g in report.gates) for v in ("pass", "fail", "undecided")}
    total = len(report.gates)
    if by["pass"] == total:
        return f"All {total} gates passed." if total > 1 else "The one gate passed."
    parts = [
        f"{by['fail']} failed" if by["fail"] else None,
        f"{by['undecided']} undecided" if by["undecided"] else None,
    ]
    return f"{by['pass']} of {total} gates passed, {' and '.join(p for p in parts if p)}."


def summary(report: Report) -> str:
    """What was tried and what came of it, in one or two sentences."""
    results = report.results
    if not results:
        return "The document holds no results."
    targets = list(dict.fromkeys(r.target for r in results))
    tally = [
        f"{n} {text}"
        for status, text in (("measured", "measured"), ("built", "built but not run"), ("unavailable", "unavailable"))
        if (n := sum(r.status == status for r in results))
    ]
    model = f"{report.model.name}: " if report.model and report.model.name else ""
    noun = "result" if len(results) == 1 else "results"
    text = f"{model}{len(results)} {noun} on {_listed(targets)}: {_listed(tally)}."
    flagged = [layer for layer in report.conditioning.layers if layer.flagged] if report.conditioning else []
    if report.conditioning:
        text += f" Conditioning flagged {len(flagged)} of {len(report.conditioning.layers)} layers."
    return text


def figures(report: Report) -> list[Figure]:
    """The figures that matter most; those that were not measured are left out."""
    measured = [r for r in report.results if r.status == "measured" and r.precision != "fp32"]
    found: list[Figure | None] = []
    if report.gates:
        passed = sum(g.verdict == "pass" for g in report.gates)
        rest = [f"{n} {v}" for v in ("fail", "undecided") if (n := sum(g.verdict == v for g in report.gates))]
        found.append(Figure("Gates passed", f"{passed} / {len(report.gates)}", ", ".join(rest) or "none open"))
    found.append(
        _best(
            measured,
            "Largest metric drop",
            drop,
            lambda r, v: (
                fmt.signed(-v),
                f"{where(r)}, {r.metric.name or 'metric' if r.metric else 'metric'} against float",
            ),
        )
    )
    checked = sum((r.parity.accumulators_checked or 0) for r in measured if r.parity)
    if checked:
        wrong = sum((r.parity.accumulators_different or 0) for r in measured if r.parity)
        found.append(Figure("Accumulators different", fmt.count(wrong), f"of {checked:,} compared bit for bit"))
    found.append(_best(measured, "Best speed-up", lambda r: r.speedup_over_float, _speedup))
    lightest = [r for r in report.results if r.status != "unavailable" and r.precision != "fp32"]
    found.append(
        _best(
            lightest,
            "Smallest weights",
            lambda r: -r.weight_ratio if r.weight_ratio is not None else None,
            lambda r, v: (fmt.ratio(-v), f"of their FP32 bytes, {where(r)}"),
        )
    )
    return [figure for figure in found if figure is not None]


def pcdr(layer: ConditionedLayer, state: LayerState) -> float | None:
    """PCDR_k of one layer at its target rank k (k = 1 where no target was set)."""
    k = layer.k_target or 1
    return state.pcdr[k - 1] if 0 < k <= len(state.pcdr) else None


def gate_place(gate: Gate) -> str:
    """Where a gate applies, in words."""
    return " ".join(part for part in (gate.target, gate.precision) if part) or "whole run"


def worst_first(gates: Iterable[Gate]) -> list[Gate]:
    """Gates with the failed ones on top, then the undecided; the order of the document otherwise."""
    return sorted(gates, key=lambda g: ("fail", "undecided", "pass").index(g.verdict))


def _best(
    results: list[Result],
    label: str,
    value: Callable[[Result], float | None],
    text: Callable[[Result, float], tuple[str, str]],
) -> Figure | None:
    scored = [(v, i) for i, r in enumerate(results) if (v := value(r)) is not None]
    if not scored:
        return None
    top, index = max(scored, key=lambda pair: (pair[0], -pair[1]))
    return Figure(label, *text(results[index], top))


def _speedup(result: Result, value: float) -> tuple[str, str]:
    stable = result.latency_ms.stable if result.latency_ms else None
    return fmt.ratio(value), f"{where(result)} over its float baseline" + (
        ", timing unstable" if stable is False else ""
    )


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
