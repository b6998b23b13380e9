"""report.html: the whole report as one page that needs nothing else, neither network nor server.

Style and script are written into the page; a content security policy lets this one script run and
forbids every connection, so that even a mistake here could not make the page call out. Text from the
document passes through `markup.escape`, always.
"""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import yaml

from s2d_deploy import plots, plots_layers, report_errors, report_gates, report_layers, report_parity, report_reproduce
from s2d_deploy import report_format as fmt
from s2d_deploy import report_speed as speed
from s2d_deploy import report_summary as words
from s2d_deploy import report_tables as tables
from s2d_deploy.markup import Markup, join, tag
from s2d_deploy.report_schema import Conditioning, Report, Result

_VERDICT_SIGNS = {"pass": "✓", "fail": "✕", "undecided": "?"}
_GATES_IN_BANNER = 6


def to_html(report: Report) -> str:
    """The document as one HTML page, ending with a newline."""
    results = words.in_order(report.results)
    labelled = list(zip(words.labels(results), results, strict=True))
    sections = [
        ("results", "Results", _results(results)),
        ("gates", "Gates", report_gates.section(report.gates)),
        ("performance", "Accuracy and speed", _performance(labelled)),
        ("conditioning", "Conditioning", _conditioning(report)),
        ("layers", "Layers", report_layers.section(report, labelled)),
        ("errors", "Where the error comes from", report_errors.section(report.errors)),
        ("parity", "Parity", _parity(labelled)),
        ("environment", "Environment", _environment(report)),
    ]
    shown = [(key, title, body) for key, title, body in sections if body is not None]
    name = report.model.name if report.model and report.model.name else "model"
    by = report_reproduce.commands(report)
    if report.conditioning is None:
        by.pop("conditioning", None)
    if not report.gates:
        by.pop("gates", None)
    page = tag(
        "html",
        _head(f"{report.verdict} · {name} · s2d-deploy"),
        tag(
            "body",
            tag("a", "Skip to the results", href="#results", class_="skip"),
            _header(report, name),
            tag("nav", *(tag("a", title, href=f"#{key}") for key, title, _ in shown), aria_label="Sections"),
            tag("main", _banner(report), _figures(report), *(_section(*entry, by.get(entry[0])) for entry in shown)),
            tag("div", id="tip", role="status", hidden=True),
        ),
        lang="en",
    )
    return f"<!DOCTYPE html>\n{page}\n"


def _resource(name: str) -> str:
    return (files("s2d_deploy") / name).read_text(encoding="utf-8")


def _head(title: str) -> Markup:
    script_hash = base64.b64encode(hashlib.sha256(_resource("report.js").encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{script_hash}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Markup(_resource("report.css"))),
        # Here and not at the end: a theme that the reader chose must hold before anything is drawn.
        tag("script", Markup(_resource("report.js"))),
    )


def _header(report: Report, name: str) -> Markup:
    model = report.model
    facts = [
        f"{fmt.number(model.parameters / 1e6, 3)} M parameters" if model and model.parameters is not None else None,
        _float_metric(report),
        report.created,
    ]
    themes = [tag("option", word, value=word.lower()) for word in ("System", "Light", "Dark")]
    return tag(
        "header",
        tag("div", tag("p", "s2d-deploy report", class_="brand"), tag("h1", name), _facts(facts), class_="title"),
        # The script shows it: without a script it could do nothing.
        tag("label", "Theme", tag("select", join(themes), id="theme"), class_="theme", hidden=True),
    )


def _float_metric(report: Report) -> str | None:
    metric = report.model.float_metric if report.model else None
    if metric is None or metric.value is None:
        return None
    n = f" on {fmt.count(metric.n)} samples" if metric.n is not None else ""
    return f"float {metric.name or 'metric'} {fmt.number(metric.value)}{n}"


def _facts(facts: Sequence[str | None]) -> Markup | None:
    known = [fact for fact in facts if fact]
    return tag("p", join(tag("span", fact) for fact in known), class_="facts") if known else None


def _banner(report: Report) -> Markup:
    open_gates = [g for g in words.worst_first(report.gates) if g.verdict != "pass"]
    items = [
        tag(
            "li",
            tag("strong", g.name),
            f" on {words.gate_place(g)}: {fmt.anything(g.value)}, limit {fmt.anything(g.limit)} ({g.verdict})",
            tag("small", fmt.anything(g.evidence)) if g.evidence else None,
        )
        for g in open_gates[:_GATES_IN_BANNER]
    ]
    if len(open_gates) > _GATES_IN_BANNER:
        items.append(tag("li", tag("a", f"{len(open_gates) - _GATES_IN_BANNER} more", href="#gates")))
    return tag(
        "section",
        tag("div", _VERDICT_SIGNS[report.verdict], class_="sign", aria_hidden="true"),
        tag(
            "div",
            tag("h2", {"pass": "Pass", "fail": "Fail", "undecided": "Undecided"}[report.verdict]),
            tag("p", tag("strong", words.headline(report)), " ", words.summary(report)),
            tag("ul", join(items)) if items else None,
        ),
        class_=f"banner is-{report.verdict}",
        aria_label="Verdict",
    )


def _figures(report: Report) -> Markup | None:
    found = words.figures(report)
    tiles = (
        tag("div", tag("dt", f.label), tag("dd", f.value, tag("small", f.detail)), class_="tile card") for f in found
    )
    return tag("dl", join(tiles), class_="tiles") if found else None


def _section(key: str, title: str, body: Markup, command: tuple[str, str] | None) -> Markup:
    again = _command(*command) if command else None
    return tag("section", tag("h2", title, id=f"{key}-title"), body, again, id=key, aria_labelledby=f"{key}-title")


def _results(results: Sequence[Result]) -> Markup | None:
    if not results:
        return tag("p", "The document holds no results.", class_="empty")
    choices = [
        _choice("Target", "target", list(dict.fromkeys(r.target for r in results))),
        _choice("Precision", "precision", list(dict.fromkeys(r.precision for r in results))),
        _choice("Status", "status", list(dict.fromkeys(r.status for r in results))),
    ]
    note = (
        "Measured: it ran on the device named. Built: compiled and inspected, no such device here. "
        f"{fmt.MISSING} stands for a figure that was not measured."
    )
    metrics = tables.metrics(results)
    if len(metrics) == 1:
        note = f"Metric: {metrics[0]}. {note}"
    reasons = [
        tag("li", tag("strong", ", ".join(which)), f": {reason}")
        for reason, which in tables.long_reasons(results).items()
    ]
    return join(
        [
            _controls("results", *choices),
            tables.results_table(results),
            tag("p", note, class_="note"),
            tag("ul", join(reasons), class_="note") if reasons else None,
        ]
    )


def _choice(label: str, key: str, values: Sequence[str]) -> Markup:
    options = [tag("option", "all", value=""), *(tag("option", value, value=value) for value in values)]
    return tag("label", label, tag("select", join(options), data_key=key))


def _controls(name: str, *fields: Markup) -> Markup:
    # Shown by the script, as the button above.
    return tag(
        "form",
        *fields,
        tag("output", aria_live="polite"),
        data_for=f"{name}-table",
        class_="controls",
        hidden=True,
        aria_label=f"Filter the {name}",
    )


def _performance(labelled: plots.Labelled) -> Markup | None:
    drawn = plots.grid(
        [
            *plots.accuracy(labelled),
            *plots.tradeoff(labelled),
            plots.latency(labelled),
            plots.executed(labelled),
            speed.roofline(labelled),
            speed.throughput(labelled),
        ]
    )
    numbers = {
        "Latency in numbers": tables.latency_table(labelled),
        "Cold start, memory and roofline in numbers": speed.resources_table(labelled),
        "Multiply-accumulates by kernel": speed.kernels_table(labelled),
        "What the measured placement left in float": speed.placement_table(labelled),
    }
    details = [tag("details", tag("summary", words), shown) for words, shown in numbers.items() if shown]
    return join([drawn, *details]) if drawn or details else None


def _conditioning(report: Report) -> Markup:
    conditioning = report.conditioning
    seen = plots_layers.ranges(report.ranges or [])
    if conditioning is None:
        return join([tag("p", "The model was not conditioned.", class_="empty"), seen])
    flagged = sum(bool(layer.flagged) for layer in conditioning.layers)
    facts = [
        conditioning.method,
        f"applied {conditioning.application}" if conditioning.application else None,
        f"{conditioning.steps:,} steps" if conditioning.steps is not None else None,
        fmt.seconds(conditioning.seconds) if conditioning.seconds is not None else None,
        f"{flagged} of {len(conditioning.layers)} layers flagged",
        _losses(conditioning),
    ]
    return join(
        [
            _facts(facts),
            tag("p", conditioning.note, class_="note") if conditioning.note else None,
            plots_layers.spectra(conditioning.layers),
            plots.grid([plots_layers.pcdr_by_layer(conditioning.layers, _tau(report)), seen]),
        ]
    )


def _losses(conditioning: Conditioning) -> str | None:
    known = [loss for loss in conditioning.losses if loss is not None]
    return f"loss {fmt.number(known[0], 3)} → {fmt.number(known[-1], 3)}" if len(known) > 1 else None


def _tau(report: Report) -> float | None:
    """The threshold of the selection: from the conditioning stage, else from the recipe."""
    recipe = report.recipe if isinstance(report.recipe, dict) else {}
    section = recipe.get("condition") or recipe.get("conditioning")
    places: list[Any] = [(report.conditioning.model_extra or {}).get("tau") if report.conditioning else None]
    places.append(section.get("tau") if isinstance(section, dict) else None)
    return next((float(v) for v in places if isinstance(v, int | float) and not isinstance(v, bool)), None)


def _parity(labelled: plots.Labelled) -> Markup | None:
    found = tables.parity_table(labelled)
    if found is None:
        return None
    note = (
        "Accumulators are compared bit for bit, each layer fed with the simulation's own codes. Codes are compared end "
        "to end: there float operators may round differently and flip a code at a boundary."
    )
    # Where something differs, the run left a small model that shows it.
    small = [
        (label, str(path))
        for label, r in labelled
        if r.parity and (path := (r.parity.explanation or {}).get("reproducer"))
    ]
    shown = [
        _command(f"The first difference of {label}, alone", f"cd {shlex.quote(path)} && python run.py")
        for label, path in small
    ]
    return join([tag("p", note, class_="note"), found, report_parity.section(labelled), *shown])


def _environment(report: Report) -> Markup:
    host = report.host
    pairs: list[tuple[str, str]] = []
    if host:
        pairs = [
            ("CPU", host.cpu or fmt.MISSING),
            ("Cores, threads", f"{fmt.count(host.cores)}, {fmt.count(host.threads)}"),
            ("Features", ", ".join(host.features) or fmt.MISSING),
            ("Memory", fmt.size(host.memory_bytes)),
            ("System", host.os or fmt.MISSING),
            ("GPU", fmt.anything(host.gpu) if host.gpu else "none"),
        ]
    if data := _data(report):
        pairs.append(("Samples", data))
    pairs += _ceilings(report)
    versions = [(name, version or fmt.MISSING) for name, version in report.versions.items()]
    cards = [
        tag("div", tag("h3", title), _pairs(listed), class_="card")
        for title, listed in (("Machine", pairs), ("Versions", versions))
        if listed
    ]
    commands = [("This run", fmt.command_line(report.command))] if report.command else []
    commands += [(entry.figure, fmt.command_line(entry.command)) for entry in report.reproduce]
    if checking := report_reproduce.bundles(report):
        commands.append(("The evidence", checking))
    note = "In the run's folder a command shows what is stored there; with another --output it measures again."
    lost = f"Not a finite number, shown as {fmt.MISSING}: {', '.join(report.not_finite)}."
    return join(
        [
            tag("div", join(cards), class_="plots") if cards else None,
            tag("h3", "Reproduce") if commands else None,
            tag("p", note, class_="note") if commands else None,
            *(_command(what, command) for what, command in commands),
            _recipe(report.recipe),
            tag("p", lost, class_="note") if report.not_finite else None,
        ]
    )


def _data(report: Report) -> str | None:
    """What the model was judged on: equal digests can be compared sample by sample."""
    data = (report.model_extra or {}).get("data")
    if not isinstance(data, dict):
        return None
    samples = f"{n:,}" if isinstance(n := data.get("samples"), int) else fmt.MISSING
    return f"{samples}, SHA-256 {str(data.get('sha256'))[:12]}"


def _ceilings(report: Report) -> list[tuple[str, str]]:
    """What the machine can do at best, as the roofline measured it."""
    roof = next((r.roofline.model_extra or {} for r in report.results if r.roofline and r.roofline.model_extra), {})
    peaks, memory = roof.get("peaks"), roof.get("gigabytes_per_second")
    found = [
        (f"Peak {kind}", f"{fmt.number(rate, 3)} GMAC/s")
        for kind, peak in (peaks.items() if isinstance(peaks, dict) else ())
        if isinstance(peak, dict) and isinstance(rate := peak.get("gmacs"), int | float)
    ]
    if isinstance(memory, int | float):
        found.append(("Memory reads", f"{fmt.number(memory, 3)} GB/s"))
    return found


def _pairs(pairs: Sequence[tuple[str, str]]) -> Markup:
    return tag("dl", join(tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs), class_="pairs")


def _command(what: str, command: str) -> Markup:
    copy = tag("button", "Copy", type="button", data_copy=True, hidden=True, aria_label=f"Copy the command: {what}")
    return tag("div", tag("span", what), tag("code", command), copy, class_="command")


def _recipe(recipe: Any) -> Markup | None:
    if not recipe:
        return None
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return tag("details", tag("summary", "Resolved recipe"), tag("pre", tag("code", text)))
