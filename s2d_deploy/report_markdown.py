"""report.md: the verdict and the figures behind it, short enough for a pull-request comment.

GitHub-flavoured Markdown. Text from the document is escaped: it can neither open a tag nor a table cell.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from s2d_deploy import report_format as fmt
from s2d_deploy import report_summary as words
from s2d_deploy.markup import plain
from s2d_deploy.report_schema import ConditionedLayer, Conditioning, LayerState, Report, Result

_SIGNS = {"pass": "✅", "fail": "❌", "undecided": "⚠️"}
_SPECIAL = re.compile(r"([\\`*_\[\]|#~$!])")
_LAYERS_SHOWN = 8
_GATES_SHOWN = 20


def to_markdown(report: Report) -> str:
    """The document as Markdown, ending with a newline."""
    model = f" · {cell(report.model.name)}" if report.model and report.model.name else ""
    lines = [
        f"# {_SIGNS[report.verdict]} s2d-deploy: {report.verdict.upper()}{model}",
        "",
        f"**{cell(words.headline(report))}** {cell(words.summary(report))}",
        *_gates(report),
        *_results(report),
        *_conditioning(report.conditioning),
        *_environment(report),
    ]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """`text` as one line of Markdown that renders as itself, also inside a table.

    ``@`` at the start of a word is broken by an invisible joiner, so that a name notifies nobody.
    """
    line = " ".join(plain(text).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(r"(?<!\w)@(?=\w)", "@\u2060", _SPECIAL.sub(r"\\\1", line))
    # A bare address would become a link; nothing in a report should.
    return re.sub(r"(?i)\b(https?|ftp)://", lambda m: f"{m[1]}:\u2060//", line).replace("www.", "www\u2060.")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    rule = ["---:" if i in right else "---" for i in range(len(header))]
    return [f"| {' | '.join(line)} |" for line in (header, rule, *rows)]


def _gates(report: Report) -> list[str]:
    if not report.gates:
        return ["", "## Gates", "", "None were asked for."]
    rows = [
        [
            f"{_SIGNS[g.verdict]} {g.verdict}",
            cell(g.name),
            cell(words.gate_place(g)),
            cell(fmt.anything(g.value)),
            cell(fmt.anything(g.limit)),
            cell(fmt.anything(g.evidence)),
        ]
        for g in words.worst_first(report.gates)
    ]
    header = ["Verdict", "Gate", "Where", "Value", "Limit", "Evidence"]
    lines = ["", "## Gates"]
    passed = sum(g.verdict == "pass" for g in report.gates)
    if len(rows) <= _GATES_SHOWN or not passed:
        return [*lines, "", *_table(header, rows, right=(3, 4))]
    # Those that passed stand last, folded: a reader of a pull request looks for the others.
    if passed < len(rows):
        lines += ["", *_table(header, rows[: len(rows) - passed], right=(3, 4))]
    folded = _table(header, rows[len(rows) - passed :], right=(3, 4))
    return [*lines, "", f"<details><summary>{passed} gates passed</summary>", "", *folded, "", "</details>"]


def _results(report: Report) -> list[str]:
    if not report.results:
        return []
    names = sorted({r.metric.name for r in report.results if r.metric and r.metric.name})
    header = ["Target", "Precision", "Status", "Rung", "Float", "Simulated", "Measured"]
    header += ["Accumulators ≠", "Codes ≠", "p50", "Speed-up", "Size"]
    lines = ["", "## Results", "", *_table(header, [_row(r) for r in words.in_order(report.results)], range(4, 12))]
    if names:
        samples = sorted({r.metric.n for r in report.results if r.metric and r.metric.n})
        on = f" on {', '.join(fmt.count(n) for n in samples)} samples" if samples else ""
        lines += ["", f"Metric: {cell(', '.join(names))}{on}. *built*: compiled and inspected, not run here."]
    missing = [r for r in words.in_order(report.results) if r.status != "measured"]
    if missing:
        alike: dict[tuple[str, str], list[str]] = {}
        for r in missing:
            alike.setdefault((r.status, r.reason or "no reason given"), []).append(words.where(r))
        lines += ["", *(f"- {cell(', '.join(who))}: {status}, {cell(why)}" for (status, why), who in alike.items())]
    return lines


def _row(result: Result) -> list[str]:
    metric, parity, latency = result.metric, result.parity, result.latency_ms
    p50 = fmt.milliseconds(latency.p50) if latency else fmt.MISSING
    unstable = " (unstable)" if latency and latency.stable is False else ""
    return [
        cell(result.target),
        cell(result.precision),
        result.status,
        cell(result.rung or fmt.MISSING),
        *(fmt.number(v) for v in ((metric.float_model, metric.simulated, metric.measured) if metric else (None,) * 3)),
        fmt.of(parity.accumulators_different, parity.accumulators_checked) if parity else fmt.MISSING,
        fmt.of(parity.codes_different, parity.codes_checked) if parity else fmt.MISSING,
        p50 + unstable,
        fmt.ratio(result.speedup_over_float),
        fmt.size(result.size_bytes),
    ]


def _conditioning(conditioning: Conditioning | None) -> list[str]:
    if conditioning is None:
        return ["", "## Conditioning", "", "The model was not conditioned."]
    flagged = [layer for layer in conditioning.layers if layer.flagged]
    facts = [
        conditioning.method,
        f"applied {conditioning.application}" if conditioning.application else None,
        f"{conditioning.steps:,} steps" if conditioning.steps is not None else None,
        fmt.seconds(conditioning.seconds) if conditioning.seconds is not None else None,
        f"{len(flagged)} of {len(conditioning.layers)} layers flagged",
    ]
    lines = ["", "## Conditioning", "", cell(", ".join(fact for fact in facts if fact)) + "."]
    if conditioning.note:
        lines += ["", cell(conditioning.note)]
    if flagged:
        header = ["Layer", "k", "PCDR", "\N{GREEK SMALL LETTER SIGMA} max", "max abs activation", "Kurtosis"]
        rows = [_layer_row(layer) for layer in flagged[:_LAYERS_SHOWN]]
        lines += ["", *_table(header, rows, right=range(1, 6))]
    if len(flagged) > _LAYERS_SHOWN:
        lines += ["", f"{len(flagged) - _LAYERS_SHOWN} more flagged layers are in report.html."]
    return lines


def _layer_row(layer: ConditionedLayer) -> list[str]:
    before, after = layer.before or LayerState(), layer.after or LayerState()
    pairs = [
        (words.pcdr(layer, before), words.pcdr(layer, after)),
        (before.sigma_max, after.sigma_max),
        (before.max_abs_activation, after.max_abs_activation),
        (before.kurtosis, after.kurtosis),
    ]
    changes = [f"{fmt.number(old, 3)} → {fmt.number(new, 3)}" for old, new in pairs]
    return [cell(layer.name), fmt.count(layer.k_target), *changes]


def _environment(report: Report) -> list[str]:
    host = report.host
    lines = ["", "## Environment", ""]
    if host:
        cores = f"{host.cores} cores" if host.cores is not None else None
        threads = f"{host.threads} threads" if host.threads is not None else None
        facts = [host.cpu, cores, threads, fmt.size(host.memory_bytes) if host.memory_bytes else None, host.os]
        lines.append(f"- {cell(', '.join(fact for fact in facts if fact) or fmt.MISSING)}")
        lines.append(f"- GPU: {cell(fmt.anything(host.gpu) if host.gpu else 'none')}")
    if report.versions:
        lines.append(
            "- " + cell(", ".join(f"{name} {version or fmt.MISSING}" for name, version in report.versions.items()))
        )
    if report.created:
        lines.append(f"- created {cell(report.created)}")
    if report.command:
        command = plain(fmt.command_line(report.command)).replace("\n", " ")
        ticks = "`" * (max((len(run) for run in re.findall("`+", command)), default=0) + 1)
        lines.append(f"- reproduce: {ticks} {command} {ticks}" if len(ticks) > 1 else f"- reproduce: `{command}`")
    if report.not_finite:
        lines.append(f"- not a finite number, shown as {fmt.MISSING}: {cell(', '.join(report.not_finite))}")
    return lines
