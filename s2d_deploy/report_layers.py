"""Everything that is known of each layer, for report.html: one sortable row for each, and one card to unfold.

The row is for comparing layers: conditioning, and how one chosen result executes it. The card joins what the document
says of one layer in different places: spectrum, PCDR, ranges, the error at each precision (alone, predicted, seen),
and what each target executes there: precision, kernel, instruction, and the codes that differ from the simulation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from s2d_deploy import plots_layers
from s2d_deploy import report_format as fmt
from s2d_deploy import report_summary as words
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.plots import Labelled
from s2d_deploy.report_schema import ActivationRange, ConditionedLayer, LayerErrorFacts, LayerState, Op, Report, Result
from s2d_deploy.report_tables import Column, cell, chip, num, precision_tag, table

_LARGEST = "largest absolute value"


@dataclass(slots=True)
class _Layer:
    """What the document says of one layer. The lists run parallel to the results that were audited."""

    name: str
    conditioned: ConditionedLayer | None = None
    ranges: list[ActivationRange] = field(default_factory=list)
    errors: dict[str, LayerErrorFacts] = field(default_factory=dict)
    predicted: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    ops: list[Op | None] = field(default_factory=list)
    codes: list[tuple[int, int] | None] = field(default_factory=list)
    findings: list[str | None] = field(default_factory=list)

    @property
    def fallbacks(self) -> int:
        """Results that declared integers here and ran float."""
        return sum(op is not None and fell_back(op) for op in self.ops)


def section(report: Report, labelled: Labelled) -> Markup | None:
    """The section's body: search, table, cards; None where nothing is known of any layer."""
    audited = [(label, r) for label, r in labelled if r.audit and r.audit.ops]
    # The narrowest first: what it executes is what one comes here to see.
    audited.sort(key=lambda pair: -words.width_rank(pair[1].precision))
    layers = _joined(report, audited)
    if not layers:
        return None
    note = None
    fields = [tag("label", "Search", tag("input", type="search", placeholder="layer, kernel, precision", data_key="*"))]
    flags = {"flagged": "flagged", "fallback": "fell back to float", "differs": "with codes that differ"}
    options = [tag("option", "all", value=""), *(tag("option", text, value=key) for key, text in flags.items())]
    fields.append(tag("label", "Show", tag("select", join(options), data_has="marks")))
    if audited:
        choices = (tag("option", label, value=i) for i, (label, _) in enumerate(audited))
        fields.append(tag("label", "Executed as", tag("select", join(choices), data_shows=True)))
        note = tag("p", f"SNR, execution and codes of {audited[0][0]}.", class_="note only-print")
    controls = tag(
        "form",
        *fields,
        tag("output", aria_live="polite"),
        data_for="layers-table",
        class_="controls",
        hidden=True,
        aria_label="Filter the layers",
    )
    cards = [_card(i, layer, audited) for i, layer in enumerate(layers)]
    return join(
        [
            controls,
            note,
            _table(layers, audited),
            tag("h3", "Layer by layer", id="cards"),
            tag(
                "p",
                "Everything known of one layer. The search above filters these, too.",
                class_="note only-screen",
            ),
            tag("div", join(cards), class_="cards"),
            _evidence(audited),
        ]
    )


def fell_back(op: Op) -> bool:
    """Both operands were declared integers, yet a float kernel ran (as `session.Audit.mismatches`)."""
    declared, ran = op.declared, op.precision
    return (
        bool(declared and ran)
        and declared not in ("float", "W4A16", "W8A16")
        and not (ran or "").startswith(("int", "nvfp4"))
    )


# ---- joining


def _joined(report: Report, audited: Labelled) -> list[_Layer]:
    conditioned = {layer.name: layer for layer in report.conditioning.layers} if report.conditioning else {}
    ops = [{op.name: op for op in r.audit.ops} if r.audit else {} for _, r in audited]
    errors = {e.precision: {layer.op: layer for layer in e.layers} for e in report.errors}
    names = list(dict.fromkeys([*conditioned, *(n for found in ops for n in found)]))
    names += [n for found in errors.values() for n in found if n not in {*names}]
    ranges: dict[str, list[ActivationRange]] = {}
    for entry in report.ranges or []:
        ranges.setdefault(_op_of(entry), []).append(entry)
    counted = [_counts(r) for _, r in audited]
    found = [_findings(r) for _, r in audited]
    budgets: dict[str, dict[str, Mapping[str, Any]]] = {}
    for r in report.results:  # the budget is the model's: the same for every runtime
        for row in (r.parity.budget or {}).get("layers") or [] if r.parity else []:
            if isinstance(row, Mapping):
                budgets.setdefault(r.precision, {}).setdefault(str(row.get("op")), row)
    return [
        _Layer(
            name,
            conditioned.get(name),
            [entry for key in (name, *_attention_sites(name)) for entry in ranges.get(key, [])],
            {p: e[name] for p, e in errors.items() if name in e},
            {p: b[name] for p, b in budgets.items() if name in b},
            [o.get(name) for o in ops],
            [_of_op(name, c) for c in counted],
            [f.get(name) for f in found],
        )
        for name in dict.fromkeys(names)
    ]


def _op_of(entry: ActivationRange) -> str:
    return entry.layer or entry.site.removesuffix(".input")


def _attention_sites(op: str) -> list[str]:
    """Sites of attention's two products, which are named after the attention and not after the op."""
    stem, _, kind = op.rpartition(".")
    return {
        "scores": [f"{stem}.query", f"{stem}.key"],
        "context": [f"{stem}.probs", f"{stem}.value"],
    }.get(kind, [])


def _counts(r: Result) -> dict[str, tuple[int, int]]:
    """(different, checked) codes of each site."""
    sites = r.parity.sites if r.parity else []
    return {s.site: (s.different, s.checked) for s in sites if s.different is not None and s.checked}


def _of_op(op: str, counts: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    """(different, checked) codes over the activation sites of one op."""
    found = [counts[s] for s in (*_attention_sites(op), f"{op}.input") if s in counts]
    return (sum(d for d, _ in found), sum(c for _, c in found)) if found else None


def _findings(r: Result) -> dict[str, str]:
    """What the verification found, by layer."""
    found = (r.parity.explanation or {}).get("findings") if r.parity else None
    rows = [f for f in found if isinstance(f, Mapping)] if isinstance(found, list) else []
    return {str(f.get("layer")): f"{f.get('cause')}: {f.get('detail')}" for f in rows}


# ---- the table


def _table(layers: Sequence[_Layer], audited: Labelled) -> Markup:
    arrow = "before → after"
    columns = [
        Column("Layer"),
        Column("Flagged"),
        Column("k", True, "target rank"),
        Column("PCDR", True, f"at the target rank, {arrow}"),
        Column("\N{GREEK SMALL LETTER SIGMA} max", True, f"largest singular value, {arrow}"),
        Column("Max |output|", True, f"largest absolute activation, {arrow}"),
        Column("Input range", True, f"{_LARGEST} at the quantizer, {arrow}"),
        Column("Spectrum", False, "singular values, both axes logarithmic; dashed before, solid after"),
        Column("SNR", True, "of the layer's output inside the whole simulation"),
        Column("Executed"),
        Column("Codes ≠", True, "activation codes of this layer's sites that differ from the simulation, end to end"),
    ]
    precisions = [r.precision for _, r in audited]
    return table("layers", "Layers", columns, (_row(i, layer, precisions) for i, layer in enumerate(layers)))


def _row(index: int, layer: _Layer, precisions: Sequence[str]) -> Markup:
    known = layer.conditioned
    before, after = _states(known)
    flagged, k = (known.flagged, known.k_target) if known else (None, None)
    spread = layer.ranges[0] if layer.ranges else None
    snr = [e.accumulated_snr_db if (e := layer.errors.get(p)) else None for p in precisions]
    return tag(
        "tr",
        cell(
            tag("a", _path(layer.name), href=f"#layer-{index}", data_opens=True),
            value=layer.name,
            head=True,
            class_="path",
        ),
        cell(
            {True: chip("flagged"), False: "no", None: None}[flagged],
            value={True: "1", False: "0", None: None}[flagged],
        ),
        num(fmt.count(k), k),
        _change(*_pcdr(known, before, after)),
        _change(before.sigma_max, after.sigma_max),
        _change(before.max_abs_activation, after.max_abs_activation),
        _change(
            spread.before.absmax if spread and spread.before else None,
            spread.after.absmax if spread and spread.after else None,
        ),
        cell(plots_layers.sparkline(known) if known else None),
        _by_result([fmt.MISSING if v is None else f"{v:.1f} dB" for v in snr], snr, "num"),
        tag("td", join(_execution(i, op) for i, op in enumerate(layer.ops))),
        _by_result([_share(c) for c in layer.codes], [c[0] / c[1] if c else None for c in layer.codes], "num"),
        data_layer=index,
        data_marks=_marks(layer),
    )


def _path(name: str) -> Markup:
    """A module path that may break behind its dots, and first there."""
    return join(name.split("."), Markup(".<wbr>"))


def _marks(layer: _Layer) -> str | None:
    found = {
        "flagged": bool(layer.conditioned and layer.conditioned.flagged),
        "fallback": bool(layer.fallbacks),
        "differs": any(c and c[0] for c in layer.codes),
    }
    return " ".join(name for name, so in found.items() if so) or None


def _states(known: ConditionedLayer | None) -> tuple[LayerState, LayerState]:
    before = known.before if known and known.before else LayerState()
    after = known.after if known and known.after else LayerState()
    return before, after


def _pcdr(known: ConditionedLayer | None, before: LayerState, after: LayerState) -> tuple[float | None, float | None]:
    return (words.pcdr(known, before), words.pcdr(known, after)) if known else (None, None)


def _change(before: float | None, after: float | None) -> Markup:
    if before is None and after is None:
        return num(fmt.MISSING)
    return num(_arrow(before, after), after if after is not None else before)


def _arrow(before: float | None, after: float | None) -> str:
    return f"{fmt.number(before, 3)} → {fmt.number(after, 3)}"


def _by_result(shown: Sequence[str], values: Sequence[float | None], class_: str) -> Markup:
    """A cell that holds the text of each result; the script shows one of them."""
    parts = (
        tag("span", text, data_result=i, data_v=None if value is None else repr(value), hidden=i > 0)
        for i, (text, value) in enumerate(zip(shown, values, strict=True))
    )
    return tag("td", join(parts) or fmt.MISSING, class_=class_)


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


def _share(pair: tuple[int, int] | None) -> str:
    if pair is None:
        return fmt.MISSING
    return "0" if pair[0] == 0 else fmt.percent(pair[0] / pair[1], 2)


# ---- the cards


def _card(index: int, layer: _Layer, audited: Labelled) -> Markup:
    known = layer.conditioned
    differing = [label for (label, _), c in zip(audited, layer.codes, strict=True) if c and c[0]]
    chips = [
        chip("flagged") if known and known.flagged else None,
        chip(f"{layer.fallbacks} fell back to float") if layer.fallbacks else None,
        chip("fault found") if any(layer.findings) else None,
        tag("small", f"codes differ in {len(differing)} of {len(audited)} results") if differing else None,
    ]
    drawn = plots_layers.spectrum(known) if known else None
    facts = _facts(layer)
    top = [
        tag("div", tag("h4", "Singular values"), plots_layers.key(), drawn, class_="spectrum") if drawn else None,
        tag("div", tag("h4", "Before and after conditioning"), facts, class_="facts-of") if facts else None,
    ]
    found = [
        tag("li", tag("strong", label), f": {finding}")
        for (label, _), finding in zip(audited, layer.findings, strict=True)
        if finding
    ]
    executed, errors = _executed_table(index, layer, audited), _errors_table(index, layer)
    body = [
        tag("div", join(top), class_="about") if any(top) else None,
        tag("div", tag("ul", join(found)) if found else None, errors, executed, class_="seen")
        if errors or executed
        else None,
    ]
    if not any(body):
        body = [tag("p", "Nothing more is known of this layer.", class_="empty")]
    return tag(
        "details",
        tag("summary", tag("span", _path(layer.name), class_="path"), join(chips)),
        tag("div", join(body), class_="layer-body"),
        id=f"layer-{index}",
        class_="layer card",
    )


def _facts(layer: _Layer) -> Markup | None:
    known = layer.conditioned
    before, after = _states(known)
    rows: list[tuple[str, float | None, float | None]] = []
    for k in range(max(len(before.pcdr), len(after.pcdr))):
        target = " (target rank)" if known and known.k_target == k + 1 else ""
        old, new = (s.pcdr[k] if k < len(s.pcdr) else None for s in (before, after))
        rows.append((f"PCDR, {k + 1} leading{target}", old, new))
    rows += [
        ("\N{GREEK SMALL LETTER SIGMA} max", before.sigma_max, after.sigma_max),
        ("Max |output|", before.max_abs_activation, after.max_abs_activation),
        ("Kurtosis of the output", before.kurtosis, after.kurtosis),
    ]
    for entry in layer.ranges:
        what = entry.site.rpartition(".")[2]
        for name, attribute in (("absmax", "absmax"), ("p99.9", "p999"), ("std", "std")):
            rows.append(
                (f"{what} {name}", getattr(entry.before, attribute, None), getattr(entry.after, attribute, None))
            )
    shown = [
        tag("div", tag("dt", name), tag("dd", _arrow(a, b))) for name, a, b in rows if a is not None or b is not None
    ]
    return tag("dl", join(shown), class_="pairs") if shown else None


def _errors_table(index: int, layer: _Layer) -> Markup | None:
    precisions = list(dict.fromkeys([*layer.errors, *layer.predicted]))
    if not precisions:
        return None
    columns = [
        Column("Precision"),
        Column("SNR alone", True, "the layer by itself, on float inputs"),
        Column("Predicted", True, "with the errors of all layers before it, first order"),
        Column("Seen", True, "inside the whole simulation"),
        Column("Share of the final error", True, "this layer alone quantized, over the sum of all layers'"),
    ]
    rows = []
    for p in sorted(precisions, key=words.width_rank):
        error, budget = layer.errors.get(p), layer.predicted.get(p, {})
        alone = _first(error.isolated_snr_db if error else None, budget.get("isolated_snr_db"))
        seen = _first(error.accumulated_snr_db if error else None, budget.get("seen_snr_db"))
        values = (alone, _first(budget.get("predicted_snr_db")), seen)
        rows.append(
            tag(
                "tr",
                cell(precision_tag(p), value=p, head=True),
                *(num(fmt.MISSING if v is None else f"{v:.1f} dB", v) for v in values),
                num(fmt.percent(error.share if error else None), error.share if error else None),
            )
        )
    return table(f"layer-{index}-error", f"Error of {layer.name}", columns, rows, sortable=False)


def _first(*values: Any) -> float | None:
    return next((float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)), None)


def _executed_table(index: int, layer: _Layer, audited: Labelled) -> Markup | None:
    known = [
        (label, r, op, codes)
        for (label, r), op, codes in zip(audited, layer.ops, layer.codes, strict=True)
        if op is not None or codes is not None
    ]
    if not known:
        return None
    columns = [
        Column("Result"),
        Column("Declared"),
        Column("Executed"),
        Column("Kernel"),
        Column("Instruction", False, "read from the compiled code, where it was looked at"),
        Column("MACs", True, "of one sample"),
        Column("Codes ≠", True, "activation codes of this layer's sites that differ from the simulation, end to end"),
    ]
    rows = (
        tag(
            "tr",
            cell(
                join([label, tag("small", "built, not run") if r.status == "built" else None]), value=label, head=True
            ),
            cell(op.declared if op else None),
            cell(
                join([op.precision, chip("fell back")], " ") if op and fell_back(op) else op.precision if op else None
            ),
            cell(op.kernel if op else None),
            cell(op.instruction if op else None),
            num(fmt.short_count(op.macs if op else None)),
            num(_share(codes), title=fmt.of(*codes) if codes else None),
        )
        for label, r, op, codes in known
    )
    return table(f"layer-{index}-runs", f"Execution of {layer.name}", columns, rows, sortable=False)


def _evidence(audited: Labelled) -> Markup | None:
    lines = [
        tag("li", tag("strong", label), f": {'; '.join(part for part in (r.audit.evidence, *r.audit.notes) if part)}")
        for label, r in audited
        if r.audit and (r.audit.evidence or r.audit.notes)
    ]
    return tag("details", tag("summary", "Where the execution was read"), tag("ul", join(lines))) if lines else None
