"""The tables of report.html: results, gates, latency, layers, parity.

A cell carries its sort value in `data-v`; a missing value has none and sorts last, whatever the order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from s2d_deploy import report_format as fmt
from s2d_deploy import report_summary as words
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.plots import Labelled, colour
from s2d_deploy.plots_layers import sparkline
from s2d_deploy.report_schema import ActivationRange, ConditionedLayer, Gate, LayerState, Op, Report, Result, SiteParity

_MANY_GATES = 20  # above it, those that passed are folded away
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
    return tag("div", body, class_="scroll", tabindex=0, role="region", aria_label=caption)


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
    about = r.device if r.status == "measured" else r.reason or "no reason given"
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


def gates_table(gates: Sequence[Gate]) -> Markup:
    """Gates, the failed ones on top."""
    columns = [
        Column("Verdict"),
        Column("Gate"),
        Column("Where"),
        Column("Value", True),
        Column("Limit", True),
        Column("Evidence"),
    ]

    def rows(chosen: Sequence[Gate]) -> Iterator[Markup]:
        for g in words.worst_first(chosen):
            yield tag(
                "tr",
                cell(chip(g.verdict), value=g.verdict),
                cell(g.name, head=True),
                cell(words.gate_place(g)),
                num(fmt.anything(g.value), g.value if isinstance(g.value, int | float) else None),
                num(fmt.anything(g.limit), g.limit if isinstance(g.limit, int | float) else None),
                cell(fmt.anything(g.evidence), class_="prose"),
            )

    if len(gates) <= _MANY_GATES:
        return table("gates", "Gates", columns, rows(gates))
    passed = [g for g in gates if g.verdict == "pass"]
    rest = [g for g in gates if g.verdict != "pass"]
    folded = tag(
        "details",
        tag("summary", f"{len(passed)} gates passed"),
        table("gates-passed", "Gates passed", columns, rows(passed)),
    )
    return join([table("gates", "Gates", columns, rows(rest)), folded] if rest else [folded])


def latency_table(results: Labelled) -> Markup | None:
    """Percentiles and the conditions of each latency measurement."""
    timed = [(label, r, r.latency_ms) for label, r in results if r.latency_ms and r.latency_ms.p50 is not None]
    if not timed:
        return None
    titles = ("min", "p50", "p90", "p99", "max", "Samples", "Warm-up", "Threads", "Batch")
    columns = [Column("Result"), *(Column(t, True) for t in titles), Column("Stable"), Column("Note")]
    rows = (
        tag(
            "tr",
            cell(label, head=True),
            *(num(fmt.milliseconds(v), v) for v in (t.min, t.p50, t.p90, t.p99, t.max)),
            *(num(fmt.count(v), v) for v in (len(t.samples) or None, t.warmup, t.threads, t.batch)),
            cell({True: "yes", False: "no", None: None}[t.stable]),
            cell(t.note, class_="prose"),
        )
        for label, _, t in timed
    )
    return table("latency", "Latency measurements", columns, rows)


def parity_table(results: Labelled) -> Markup | None:
    """Simulation against runtime; one row for each result that was compared."""
    compared = [(label, r.parity) for label, r in results if r.parity]
    if not compared:
        return None
    columns = [
        Column("Result"),
        Column("Accumulators checked", True),
        Column("different", True, "teacher-forced: the simulation's codes go in, int32 accumulators come out"),
        Column("Codes checked", True),
        Column("different", True, "end to end: the same float input goes in"),
        Column("Top-1 flips", True),
        Column("SNR", True, "of the output against the simulation's"),
        Column("Max error", True),
        Column("Most different site"),
    ]
    rows = (
        tag(
            "tr",
            cell(label, head=True),
            num(fmt.count(p.accumulators_checked), p.accumulators_checked),
            num(fmt.count(p.accumulators_different), p.accumulators_different),
            num(fmt.count(p.codes_checked), p.codes_checked),
            num(fmt.count(p.codes_different), p.codes_different),
            num(fmt.count(p.top1_flips), p.top1_flips),
            num(fmt.MISSING if p.snr_db is None else f"{p.snr_db:.1f} dB", p.snr_db),
            num(fmt.number(p.max_error, 3), p.max_error),
            cell(_worst_site(p.sites), class_="prose"),
        )
        for label, p in compared
    )
    return table("parity", "Parity of simulation and runtime", columns, rows)


def _worst_site(sites: Sequence[SiteParity]) -> str | None:
    counted = [(s.different / s.checked, s) for s in sites if s.checked and s.different is not None]
    if not counted:
        return None
    share, site = max(counted, key=lambda pair: pair[0])
    if share == 0:
        return f"none of {len(counted)}"
    return f"{site.site} ({fmt.percent(share, 2)})"


def layers_table(report: Report, audited: Labelled) -> Markup | None:
    """One row for each layer or contraction: conditioning, and how each result executes it.

    The executions of all results are in the page; the script shows one result at a time.
    """
    conditioned = {layer.name: layer for layer in report.conditioning.layers} if report.conditioning else {}
    ops = [{op.name: op for op in r.audit.ops} if r.audit else {} for _, r in audited]
    sites = [r.parity.sites if r.parity else [] for _, r in audited]
    ranges: dict[str, ActivationRange] = {}
    for entry in report.ranges or []:
        ranges.setdefault(_op_of(entry), entry)
    names = list(dict.fromkeys([*conditioned, *(name for found in ops for name in found)]))
    if not names:
        return None
    columns = [
        Column("Layer"),
        Column("Flagged"),
        Column("k", True, "target rank"),
        Column("PCDR", True, "at the target rank, before → after"),
        Column("\N{GREEK SMALL LETTER SIGMA} max", True, "largest singular value, before → after"),
        Column("Max |output|", True, "largest absolute activation, before → after"),
        Column("Kurtosis", True, "before → after"),
        Column("Input range", True, "largest absolute input of the quantizer, before → after"),
        Column("Spectrum"),
        Column("Executed"),
        Column("Codes ≠", True, "activation codes of this layer's sites that differ from the simulation, end to end"),
    ]
    rows = (
        _layer_row(
            name, conditioned.get(name), ranges.get(name), [f.get(name) for f in ops], [_of_op(name, s) for s in sites]
        )
        for name in names
    )
    return table("layers", "Layers", columns, rows)


def _op_of(entry: ActivationRange) -> str:
    return entry.layer or entry.site.removesuffix(".input")


def _of_op(op: str, sites: Sequence[SiteParity]) -> tuple[int, int] | None:
    """(different, checked) codes over the activation sites of one op."""
    stem, _, kind = op.rpartition(".")
    wanted = {"scores": {f"{stem}.query", f"{stem}.key"}, "context": {f"{stem}.probs", f"{stem}.value"}}.get(
        kind, set()
    )
    wanted |= {f"{op}.input"}
    counted = [(s.different, s.checked) for s in sites if s.site in wanted and s.different is not None and s.checked]
    return (sum(d for d, _ in counted), sum(c for _, c in counted)) if counted else None


def _layer_row(
    name: str,
    layer: ConditionedLayer | None,
    spread: ActivationRange | None,
    ops: Sequence[Op | None],
    parity: Sequence[tuple[int, int] | None],
) -> Markup:
    before = layer.before if layer and layer.before else LayerState()
    after = layer.after if layer and layer.after else LayerState()
    flagged = layer.flagged if layer else None
    k = layer.k_target if layer else None
    cells = [
        cell(name, head=True, class_="path"),
        cell(
            {True: chip("flagged"), False: "no", None: None}[flagged],
            value={True: "1", False: "0", None: None}[flagged],
        ),
        num(fmt.count(k), k),
        _change(words.pcdr(layer, before) if layer else None, words.pcdr(layer, after) if layer else None),
        _change(before.sigma_max, after.sigma_max),
        _change(before.max_abs_activation, after.max_abs_activation),
        _change(before.kurtosis, after.kurtosis),
        _change(
            spread.before.absmax if spread and spread.before else None,
            spread.after.absmax if spread and spread.after else None,
        ),
        cell(sparkline(layer) if layer else None),
        tag("td", join(_execution(i, op) for i, op in enumerate(ops))),
        tag("td", join(_differing(i, pair) for i, pair in enumerate(parity)), class_="num"),
    ]
    return tag("tr", *cells)


def _change(before: float | None, after: float | None) -> Markup:
    if before is None and after is None:
        return num(fmt.MISSING)
    value = after if after is not None else before
    return num(f"{fmt.number(before, 3)} → {fmt.number(after, 3)}", value)


def _execution(index: int, op: Op | None) -> Markup:
    if op is None:
        return tag("span", fmt.MISSING, data_result=index, hidden=index > 0)
    ran = op.precision or fmt.MISSING
    content = join(
        [
            ran,
            tag("small", op.kernel) if op.kernel else None,
            chip(f"declared {op.declared}") if fell_back(op) else None,
        ]
    )
    return tag("span", content, data_result=index, data_v=ran, hidden=index > 0)


def fell_back(op: Op) -> bool:
    """Both operands were declared integers, yet a float kernel ran (as `session.Audit.mismatches`)."""
    declared, ran = op.declared, op.precision
    return (
        bool(declared and ran)
        and declared not in ("float", "W4A16", "W8A16")
        and not (ran or "").startswith(("int", "nvfp4"))
    )


def _differing(index: int, pair: tuple[int, int] | None) -> Markup:
    if pair is None:
        return tag("span", fmt.MISSING, data_result=index, hidden=index > 0)
    shown = "0" if pair[0] == 0 else fmt.percent(pair[0] / pair[1], 2)
    value = repr(pair[0] / pair[1])
    return tag("span", shown, data_result=index, data_v=value, hidden=index > 0, title=fmt.of(*pair))
