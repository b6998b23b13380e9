"""What this machine offers, before any work: runtimes, versions, features, and the rung of each precision.

Every adapter is asked for itself, and one that breaks is reported as broken with its error: the table is
most needed on the machine where something is wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING, Any

from s2d_deploy import host
from s2d_deploy.registry import RUNTIMES, load_runtime

if TYPE_CHECKING:
    from rich.console import RenderableType

log = logging.getLogger(__name__)

PRECISIONS = ("w8a8", "w4a16", "w4a8", "w4a4")
# Runtime -> the pip line that brings it.
INSTALL = {name: f"pip install 's2d-deploy[{name}]'" for name in ("ort", "tvm", "tensorrt")}
# Package -> (what it is for, the pip line that brings it).
OPTIONAL = {
    "nvidia-modelopt": ("NVIDIA's quantization presets as recipes", "pip install 's2d-deploy[modelopt]'"),
    "openvino": ("the peer in benchmarks", "pip install 's2d-deploy[bench]'"),
    "nncf": ("the peer in benchmarks", "pip install 's2d-deploy[bench]'"),
}


def examine() -> dict[str, Any]:
    """Ask this machine and every runtime. Never raises.

    Returns:
        host: see `host.host_facts`; versions: see `host.versions`;
        runtimes: for each ``{name, available, reason, version, device, rungs, install, problems}``, where
        `rungs` maps each precision to its rung or None, `install` is a pip line where the package is missing,
        and `problems` lists what an adapter failed to answer; and ``details``, further lines, where an adapter
        has any (ONNX Runtime: its execution providers);
        optional: for each ``{name, version, purpose, install}``.
    """
    return {
        "host": host.host_facts(),
        "versions": host.versions(),
        "runtimes": [examine_runtime(name) for name in RUNTIMES],
        "optional": [_optional(name) for name in OPTIONAL],
    }


def examine_runtime(name: str) -> dict[str, Any]:
    """One entry of ``runtimes``. Whatever an adapter raises becomes a text in `problems`."""
    problems: list[str] = []

    def ask(what: str, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception as error:  # an adapter may raise anything, and doctor must still answer
            log.debug("runtime %s: %s failed", name, what, exc_info=True)
            problems.append(f"{what}: {type(error).__name__}: {error}")
            return None

    entry: dict[str, Any] = {
        "name": name,
        "available": False,
        "reason": None,
        "version": None,
        "device": None,
        "rungs": dict.fromkeys(PRECISIONS),
        "install": None,
        "problems": problems,
    }
    runtime = ask("load", lambda: load_runtime(name))
    if runtime is not None:
        entry["reason"] = ask("available", runtime.available)
        entry["version"] = ask("version", runtime.version) or None
        entry["device"] = ask("device", runtime.device) or None
        entry["rungs"] = {p: ask(f"rung({p})", partial(runtime.rung, p)) for p in PRECISIONS}
        if entry["reason"] is None and callable(details := getattr(runtime, "details", None)):
            entry["details"] = ask("details", details) or []  # only where an adapter has some
    if problems:
        entry["reason"] = entry["reason"] or f"the adapter is broken: {problems[0]}"
    entry["available"] = entry["reason"] is None
    if entry["version"] is None and not problems:  # installing cures no broken adapter
        entry["install"] = INSTALL.get(name)
    return entry


def render(report: dict[str, Any]) -> RenderableType:
    """The answer of `examine` as rich tables."""
    from rich.console import Group

    return Group(_machine(report), _runtimes(report), _packages(report))


def _machine(report: dict[str, Any]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    facts = report["host"]
    table = Table(title="machine", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("found")
    memory = facts["memory_bytes"]
    rows = {
        "Python": facts["python"],
        "OS": facts["os"],
        "CPU": f"{facts['cpu'] or 'unknown'} ({facts['architecture']})",
        "cores": f"{facts['cores'] or '?'} physical, {facts['usable_cores']} usable by this process",
        "features": " ".join(facts["features"]) or "none that matter here",
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "GPU": "\n".join(_gpu(gpu) for gpu in facts["gpu"]) or "none",
    }
    for what, found in rows.items():
        table.add_row(what, Text(str(found)))  # Text: a name with brackets is no markup
    return table


def _gpu(gpu: dict[str, Any]) -> str:
    capability = (gpu["compute_capability"] or "?").replace(".", "")
    return f"{gpu['name'] or 'unknown'} (SM{capability}, driver {gpu['driver'] or '?'})"


def _runtimes(report: dict[str, Any]) -> RenderableType:
    """The table, and below it a line for each runtime: its device, or what is missing."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="runtimes, and the rung that each precision gets here", title_justify="left")
    for column in ("runtime", "version", *PRECISIONS):
        table.add_column(column, no_wrap=column != "version")
    below = []
    for entry in report["runtimes"]:
        rungs = [Text(entry["rungs"][p] or "-") for p in PRECISIONS]
        lines = [entry["device"] or "", *entry.get("details", [])] if entry["available"] else [entry["reason"] or ""]
        if entry["install"] and entry["install"] not in lines[0]:
            lines.append(entry["install"])
        lines += [problem for problem in entry["problems"] if problem not in lines[0]]
        state = "green" if entry["available"] else "yellow"
        table.add_row(Text(entry["name"], style=state), Text(entry["version"] or "-"), *rungs)
        below.append(Text(f"  {entry['name']}: ", style=state) + Text("\n    ".join(lines), style="default"))
    return Group(table, *below, "")


def _packages(report: dict[str, Any]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="optional packages", title_justify="left")
    for column in ("package", "version", "for", "to install"):
        table.add_column(column)
    for entry in report["optional"]:
        cells = (entry["name"], entry["version"] or "-", entry["purpose"], entry["install"] or "")
        table.add_row(*map(Text, cells))
    return table


def _optional(name: str) -> dict[str, Any]:
    purpose, line = OPTIONAL[name]
    try:
        version: str | None = metadata.version(name)
    except metadata.PackageNotFoundError:
        version = None
    return {"name": name, "version": version, "purpose": purpose, "install": None if version else line}
