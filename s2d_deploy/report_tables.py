"""The tables of report.html: results, latency, parity. Gates and layers have modules of their own.

A cell carries its sort value in `data-v`; a missing value has none and sorts last, whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2d_deploy import report_format as fmt
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.plots import Labelled, colour
from s2d_deploy.report_schema import Latency, Parity, Result, SiteParity

_LONG_REASON = 90  # characters; a longer one makes a row of the table tall, and stands below it
_CHIP_SIGNS = {"pass": "✓", "fail": "✕", "undecided": "?", "measured": "●", "built": "◐", "unavailable": "○"}


@dataclass(frozen=True, slots=True)
class Column:
    """A column: its heading, whether it holds numbers, and what the heading means."""

    title: str
    numeric: bool = False
    hint: str | None = None


def table(
    name: str, caption: str, columns: Sequence[Column], rows: Iterable[Markup], *, sortable: bool = True
) -> Markup:
    """A table inside a box that scrolls sideways; the script makes its headings sort."""
    head = join(tag("th", c.title, scope="col", class_="num" if c.numeric else None, title=c.hint) for c in columns)
    inner = [
        tag("caption", caption, class_="unseen"),
        tag("thead", tag("tr", head)),
        tag("tbody", join(rows)),
    ]
    body = tag("table", *inner, id=f"{name}-table", data_sortable=sortable)
    # A landmark for each of the large tables; the small ones of the cards would be hundreds.
    role = "region" if sortable else "group"
    return tag("div", body, class_="scroll", tabindex=0, role=role, aria_label=caption)


def chip(word: str) -> Markup:
    """A status or a verdict; the word says it, colour and sign repeat it."""
    kind = word if word in _CHIP_SIGNS else "other"
    return tag("span", tag("span", _CHIP_SIGNS.get(word, ""), aria_hidden="true"), f" {word}", class_=f"chip is-{kind}")


def num(shown: str, value: float | None = None, *, below: str | None = None, title: str | None = None) -> Markup:
    """A right-aligned cell."""
    small = tag("small", below) if below else None
    return tag("td", shown, small, class_="num", data_v=None if value is None else repr(value), title=title)


def cell(shown: str | None, *, value: str | None = None, head: bool = False, class_: str | None = None) -> Markup:
    """A text cell; `head` makes it the heading of its row."""
    content = shown or fmt.MISSING
    key = value if value is not None else (None if isinstance(content, Markup) or not shown else content)
    if head:
        return tag("th", content, scope="row", data_v=key, class_=class_)
    return tag("td", content, data_v=key, class_=class_)


def precision_tag(precision: str) -> Markup:
    """A precision with its colour in the plots."""
    return tag(
        "span", tag("i", class_=f"swatch {colour(precision)}", aria_hidden="true"), precision, class_="precision"
    )


def results_table(results: Sequence[Result]) -> Markup:
    """Target by precision."""
    columns = [
        Column("Target"),
        Column("Precision"),
        Column("Status"),
        Column("Rung", hint="native, emulated, weight-only or dequantized: how the hardware computes it"),
        Column("Float", True, "metric of the float model"),
        Column("Simulated", True, "metric of the fake-quantized model"),
        Column("Measured", True, "metric of the runtime"),
        Column("Change", True, "measured minus float"),
        Column("Accum. ≠", True, "accumulators that differ from the integer reference, teacher-forced"),
        Column("Codes ≠", True, "activation codes that differ from the simulation, end to end"),
        Column("p50", True, "median latency"),
        Column("Speed-up", True, "over the float baseline of the same target, with its confidence interval"),
        Column("Weights", True, "bytes of the quantized weights over their FP32 bytes"),
        Column("Size", True, "bytes on disk of the artifact"),
    ]
    one = len(metrics(results)) <= 1
    return table(
        "results", "Results by target and precision", columns, (_result_row(r, one_metric=one) for r in results)
    )


def _result_row(r: Result, *, one_metric: bool) -> Markup:
    m, p, t = r.metric, r.parity, r.latency_ms
    change = m.measured - m.float_model if m and m.measured is not None and m.float_model is not None else None
    about = r.device if r.status == "measured" else _first_sentence(r.reason or "no reason given")
    interval = None
    if r.speedup_ci and len(r.speedup_ci) == 2:
        interval = f"{fmt.number(r.speedup_ci[0], 3)}\N{EN DASH}{fmt.number(r.speedup_ci[1], 3)}"
    capabilities = ", ".join(str(c) for c in r.compute_capabilities or [])
    cells = [
        cell(join([r.target, tag("small", r.runtime) if r.runtime else None]), value=r.target, head=True),
        cell(precision_tag(r.precision), value=r.precision),
        cell(join([chip(r.status), tag("small", about) if about else None]), value=r.status, class_="status"),
        cell(
            join([r.rung or fmt.MISSING, tag("small", f"for {capabilities}") if capabilities else None]), value=r.rung
        ),
        num(fmt.number(m.float_model if m else None), m.float_model if m else None),
        num(fmt.number(m.simulated if m else None), m.simulated if m else None),
        num(
            fmt.number(m.measured if m else None),
            m.measured if m else None,
            below=None if one_metric else _metric_note(r),
        ),
        num(fmt.signed(change), change),
        _share_cell(p.accumulators_different, p.accumulators_checked) if p else num(fmt.MISSING),
        _share_cell(p.codes_different, p.codes_checked) if p else num(fmt.MISSING),
        num(
            fmt.milliseconds(t.p50 if t else None),
            t.p50 if t else None,
            below="unstable" if t and t.stable is False else None,
        ),
        num(fmt.ratio(r.speedup_over_float), r.speedup_over_float, below=interval),
        num(fmt.ratio(r.weight_ratio), r.weight_ratio),
        num(
            fmt.size(r.size_bytes),
            r.size_bytes,
            below=f"float {fmt.size(r.float_size_bytes)}" if r.float_size_bytes else None,
        ),
    ]
    return tag("tr", *cells, data_target=r.target, data_precision=r.precision, data_status=r.status)


def long_reasons(results: Sequence[Result]) -> dict[str, list[str]]:
    """Reasons that the table cuts after their first sentence, each with the results that gave it."""
    found: dict[str, list[str]] = {}
    for r in results:
        if r.status != "measured" and r.reason and _first_sentence(r.reason) != r.reason:
            found.setdefault(r.reason, []).append(f"{r.target} {r.precision}")
    return found


def _first_sentence(reason: str) -> str:
    if len(reason) <= _LONG_REASON:
        return reason
    first = reason.partition(". ")[0]
    return f"{first}." if len(first) <= _LONG_REASON else f"{first[:_LONG_REASON]}…"


def metrics(results: Sequence[Result]) -> list[str]:
    """The metrics that the results name, each with its number of samples."""
    return list(dict.fromkeys(note for r in results if (note := _metric_note(r))))


def _metric_note(r: Result) -> str | None:
    if r.metric is None or r.metric.measured is None:
        return None
    n = f"n = {fmt.count(r.metric.n)}" if r.metric.n is not None else None
    return ", ".join(part for part in (r.metric.name, n) if part) or None


def _share_cell(different: int | None, checked: int | None) -> Markup:
    if different is None or not checked:
        return num(fmt.MISSING)
    shown = "0" if different == 0 else fmt.percent(different / checked, 2)
    return num(shown, different / checked, below=f"of {fmt.short_count(checked)}", title=fmt.of(different, checked))


def latency_table(results: Labelled) -> Markup | None:
    """Percentiles and the conditions of each latency measurement."""
    timed = [(label, r, r.latency_ms) for label, r in results if r.latency_ms and r.latency_ms.p50 is not None]
    if not timed:
        return None
    titles = ("min", "p50", "p90", "p99", "max", "Samples", "Warm-up", "Threads", "Batch")
    columns = [
        Column("Result"),
        *(Column(t, True) for t in titles),
        Column("Outliers", True, "samples far from the rest; they are kept"),
        Column("Stable"),
        Column("Clock, load", False, "clock of the cores, and load average, before → after the measurement"),
        Column("Note"),
    ]
    rows = (
        tag(
            "tr",
            cell(label, head=True),
            *(num(fmt.milliseconds(v), v) for v in (t.min, t.p50, t.p90, t.p99, t.max)),
            *(num(fmt.count(v), v) for v in (len(t.samples) or None, t.warmup, t.threads, t.batch)),
            num(*_outliers(t)),
            cell({True: "yes", False: "no", None: None}[t.stable]),
            cell(_conditions(t), class_="wraps"),
            cell(t.note, class_="prose"),
        )
        for label, _, t in timed
    )
    return table("latency", "Latency measurements", columns, rows)


def _outliers(t: Latency) -> tuple[str, float | None]:
    found = (t.model_extra or {}).get("outliers")
    return (fmt.count(len(found)), float(len(found))) if isinstance(found, list) else (fmt.MISSING, None)


def _conditions(t: Latency) -> str | None:
    """``2596 MHz, load 7.05 → 7.12``."""
    found = (t.model_extra or {}).get("conditions")
    sides = [found.get(side) for side in ("before", "after")] if isinstance(found, Mapping) else []
    known: list[Mapping[str, Any]] = [side for side in sides if isinstance(side, Mapping)]
    clocks = [v for side in known for v in side.get("clock_mhz") or [] if isinstance(v, int | float)]
    loads = [v for side in known if isinstance(v := side.get("load_average"), int | float)]
    shown = (
        [f"{min(clocks):.0f}" + (f" to {max(clocks):.0f}" if max(clocks) > min(clocks) else "") + " MHz"]
        if clocks
        else []
    )
    if loads:
        shown.append(f"load {' → '.join(f'{v:.2f}' for v in loads)}")
    return ", ".join(shown) or None


def parity_table(results: Labelled) -> Markup | None:
    """Simulation against runtime; one row for each result that was compared."""
    compared = [(label, r.parity) for label, r in results if r.parity]
    if not compared:
        return None
    columns = [
        Column("Result"),
        Column("Verdict", False, "of the explanation: whether every difference is accounted for"),
        Column("Accumulators checked", True),
        Column("different", True, "teacher-forced: the simulation's codes go in, int32 accumulators come out"),
        Column("Codes checked", True),
        Column("different", True, "end to end: the same float input goes in"),
        Column("Top-1 flips", True),
        Column("SNR", True, "of the output against the simulation's"),
        Column("Max error", True),
        Column("With itself", False, "the same input in other batches, run again, and from a second build"),
        Column("Most different site"),
    ]
    rows = (
        tag(
            "tr",
            cell(label, head=True),
            cell(chip(p.verdict) if p.verdict else None, value=p.verdict),
            num(fmt.count(p.accumulators_checked), p.accumulators_checked),
            num(fmt.count(p.accumulators_different), p.accumulators_different),
            num(fmt.count(p.codes_checked), p.codes_checked),
            num(fmt.count(p.codes_different), p.codes_different),
            num(fmt.count(p.top1_flips), p.top1_flips),
            num(fmt.MISSING if p.snr_db is None else f"{p.snr_db:.1f} dB", p.snr_db),
            num(fmt.number(p.max_error, 3), p.max_error),
            cell(_consistent(p), class_="wraps"),
            cell(_worst_site(p.sites), class_="prose"),
        )
        for label, p in compared
    )
    return table("parity", "Parity of simulation and runtime", columns, rows)


def _consistent(p: Parity) -> str | None:
    runs = (p.consistency or {}).get("runs")
    known = [run for run in runs if isinstance(run, Mapping)] if isinstance(runs, list) else []
    if not known:
        return None
    same = sum(bool(run.get("identical")) for run in known)
    if same == len(known):
        return f"identical in {same} runs"
    what = "rounding" if (p.consistency or {}).get("agrees") else "differs"
    return f"{what} in {len(known) - same} of {len(known)} runs"


def _worst_site(sites: Sequence[SiteParity]) -> str | None:
    counted = [(s.different / s.checked, s) for s in sites if s.checked and s.different is not None]
    if not counted:
        return None
    share, site = max(counted, key=lambda pair: pair[0])
    if share == 0:
        return f"none of {len(counted)}"
    return f"{site.site} ({fmt.percent(share, 2)})"
