"""`s2d-deploy audit MODEL.onnx`: what any ONNX model declares and what ONNX Runtime executes, as document and text.

The work is the adapter's (`runtimes/ort.py`, `audit_file`); here are the command's arguments and its table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_deploy.errors import RecipeError, UnsupportedError, message
from s2d_deploy.registry import load_runtime

_LISTED = 20  # layers that differ, in the text; the document has all


def audit_onnx(
    model: Path, shapes: Sequence[str], providers: Sequence[str], level: str, threads: int, runtime: str = "ort"
) -> dict[str, Any]:
    """Audit an ONNX file.

    Args:
        model: the file.
        shapes: ``NAME=1x3x224x224`` for an input, ``NAME=128`` for a named dimension.
        providers: short or full names, most preferred first; none: the CPU.
        level: of graph optimization.
        threads: of the session.
        runtime: name of an adapter that can audit files.

    Raises:
        RecipeError: a shape that cannot be read. Else as the adapter's `audit_file`.
    """
    adapter = load_runtime(runtime)
    audit_file = getattr(adapter, "audit_file", None)
    if audit_file is None:
        raise UnsupportedError(message(f"runtime {runtime!r} audits no foreign files", fix="use ort"))
    options = {"providers": list(providers) or ["cpu"], "graph_optimization_level": level}
    document: dict[str, Any] = audit_file(model, shapes=parse_shapes(shapes), options=options, threads=threads)
    return document


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """``["x=1x3x224x224", "sequence=128"]`` -> ``{"x": (1, 3, 224, 224), "sequence": (128,)}``.

    Raises:
        RecipeError: not of that form, or named twice.
    """
    found: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, separator, sizes = text.rpartition("=")
        parts = sizes.lower().split("x")
        if not separator or not name or not all(part.isdigit() and int(part) > 0 for part in parts):
            raise RecipeError(
                message(f"--shape {text!r}", expected="NAME=1x3x224x224 for an input, NAME=128 for a named dimension")
            )
        if name in found:
            raise RecipeError(message(f"--shape {name}: given twice", fix="give it once"))
        found[name] = tuple(map(int, parts))
    return found


def audit_text(document: Mapping[str, Any], *, every_layer: bool = False) -> str:
    """The audit for a reader: shares, kernels, the layers that differ and why."""
    from s2d_deploy.tables import plain_table

    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in document["shapes"].items())
    text = (
        f"{document['model']} on onnxruntime {document['onnxruntime']} ({', '.join(document['providers'])}), {shapes}\n"
        f"declared: {_shares(document['declared'])}\nexecuted: {_shares(document['executed'])} "
        f"of {document['macs']:,} multiply-accumulates\n"
    )
    rows = [
        (
            k["kernel"],
            k["executed"],
            k["provider"],
            str(k["layers"]),
            f"{k['macs']:,}",
            f"{k['share']:.1%}",
            f"{k['microseconds'] / 1000:.3f}",
        )
        for k in document["kernels"]
    ]
    text += plain_table("kernels", ("kernel", "executed", "on", "layers", "MACs", "share", "ms"), rows, right=4)
    if every_layer:
        layers = [
            (r["name"], r["declared"], r["kernel"], r["executed"], f"{r['macs']:,}", _ms(r["microseconds"]))
            for r in document["layers"]
        ]
        text += plain_table("layers", ("layer", "declared", "kernel", "executed", "MACs", "ms"), layers, right=2)
    differ = [r for r in document["layers"] if r["differs"]]
    for row in differ[:_LISTED]:
        text += f"differs: {row['name']}: {row['differs']}\n"
    if len(differ) > _LISTED:
        text += f"differs: and {len(differ) - _LISTED} more (--json has all)\n"
    for note in document["notes"]:
        text += f"note: {note}\n"
    total = len(document["layers"])
    text += f"{total - len(differ)} of {total} layers run as declared\n"
    return text


def _shares(shares: Mapping[str, float]) -> str:
    listed = sorted(shares.items(), key=lambda item: -item[1])
    return ", ".join(f"{share:.1%} {name}" for name, share in listed) or "no matrix products"


def _ms(microseconds: int | None) -> str:
    return "-" if microseconds is None else f"{microseconds / 1000:.3f}"
