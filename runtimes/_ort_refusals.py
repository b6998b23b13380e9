"""Why ONNX Runtime refuses a model, in a sentence: its texts name C++ functions, these the operator and a way out."""

from __future__ import annotations

import re

from s2d_deploy.errors import UnsupportedError, message

_LOADING: tuple[tuple[str, str, str], ...] = (
    # onnxruntime's wording -> what it means, what to do
    (
        r"No Op registered for (?P<op>\S+) with domain_version of (?P<v>\d+)",
        "operator {op} is not in opset {v}",
        "export with an opset that has it, or replace the operator",
    ),
    (
        r"Fatal error: (?P<domain>[\w.]*):(?P<op>\w+)\(-?\d+\) is not a registered function/op",
        "operator {op} of domain {domain!r} is not known",
        "load the library of custom operators that brings it, or export without it",
    ),
    (
        r"No opset import for domain '(?P<domain>[^']*)'",
        "domain {domain!r} is used, but the model does not import it",
        "export it again; opset_import is incomplete",
    ),
    (
        r"Opset (?P<v>\d+) is under development",
        "opset {v} is newer than this onnxruntime",
        "export with an older opset, or install a newer onnxruntime",
    ),
    (
        r"Unsupported model IR version: (?P<v>\d+), max supported IR version: (?P<most>\d+)",
        "IR version {v} is newer than this onnxruntime, which reads up to {most}",
        "save with an older IR version, or install a newer onnxruntime",
    ),
    (
        r"Could not find an implementation for (?P<op>[\w.]+)\((?P<v>\d+)\) node with name '(?P<node>[^']*)'",
        "node {node!r}: {op} has no kernel for its types here",
        "convert the model to float32, or use a provider that has the kernel",
    ),
)


def refused_model(error: Exception, where: str) -> UnsupportedError | None:
    """What onnxruntime does not have of what a model asks for; None where the refusal has another reason.

    Args:
        error: as onnxruntime raised it.
        where: the model's file, for the message.
    """
    for pattern, meaning, fix in _LOADING:
        if (match := re.search(pattern, str(error))) is not None:
            return UnsupportedError(message(f"{where}: {meaning.format(**match.groupdict())}", fix=fix))
    return None
