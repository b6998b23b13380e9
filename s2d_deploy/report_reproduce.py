"""The command behind each figure: the run's own command line, cut down to the verb that computes it.

`s2d-deploy run my.yaml --set a=1 -o runs/x` made everything; its latencies alone are `s2d-deploy bench my.yaml
--set a=1 -o runs/x`. In the run's folder a verb shows what is stored, in a fresh one it measures again. Only the
options that every verb knows are taken along. A command that cannot be read (another program's) gives nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import pairwise

from s2d_deploy import report_format as fmt
from s2d_deploy.report_schema import Report

_VERBS = frozenset({"condition", "quantize", "export", "build", "verify", "bench", "gate", "report", "run"})
_TAKEN = frozenset({"--output", "--out", "-o", "--set", "--precision", "--target", "--threads"})
_DROPPED = frozenset({"--bundle", "--check", "--baseline", "--tolerance", "--slower", "--junit", "--summary"})
_FLAGS = frozenset({"--json", "--quiet", "-q", "--debug", "--update", "--write", "--rerun"})

STEPS = {
    "results": ("verify", "Metric, parity and executed precision"),
    "gates": ("gate", "The verdicts"),
    "performance": ("bench", "Latency, beside the float baseline"),
    "conditioning": ("condition", "Conditioning"),
    "layers": ("verify", "Execution and codes of each layer"),
    "errors": ("report", "Error by layer"),
    "parity": ("verify", "Parity, explained"),
}
"""Section of the page -> (verb, what it shows)."""


def commands(report: Report) -> dict[str, tuple[str, str]]:
    """(what it shows, command) by section of the page; empty where the run's command cannot be read."""
    read = _parsed(fmt.command_line(report.command)) if report.command else None
    if read is None:
        return {}
    recipe, options = read
    return {
        section: (what, shlex.join(["s2d-deploy", verb, recipe, *options])) for section, (verb, what) in STEPS.items()
    }


def bundles(report: Report) -> str | None:
    """The command that checks the evidence, where the run packed some."""
    words = _words(fmt.command_line(report.command)) if report.command else []
    for word, following in pairwise(words):
        if word == "--bundle":
            return shlex.join(["s2d-deploy", "report", "--check", following])
        if word.startswith("--bundle="):
            return shlex.join(["s2d-deploy", "report", "--check", word.partition("=")[2]])
    return None


def _words(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an open quote
        return []


def _parsed(command: str) -> tuple[str, list[str]] | None:
    """(recipe, options that every verb knows)."""
    words = _words(command)
    if len(words) < 3 or words[0].rpartition("/")[2] != "s2d-deploy" or words[1] not in _VERBS:
        return None
    recipes: list[str] = []
    options: list[str] = []
    rest = iter(words[2:])
    for word in rest:
        name, equals, _ = word.partition("=")
        if name in _TAKEN | _DROPPED and name.startswith("-"):
            taken = [word] if equals else [word, *_next(rest)]
            options += taken if name in _TAKEN else []
        elif word in _FLAGS:
            continue
        elif word.startswith("-"):
            return None  # an option that this does not know: better no command than a wrong one
        else:
            recipes.append(word)
    return (recipes[0], options) if len(recipes) == 1 else None


def _next(words: Iterator[str]) -> list[str]:
    return [word for word in (next(words, None),) if word is not None]
