"""Runtimes and targets by name.

The tables are literal, so that a look-up imports one module and nothing else. Entry points serve
third parties: a package that declares one in the groups below is found by the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, cast

from s2d_deploy.errors import RecipeError, message
from s2d_deploy.session import Runtime, Target

RUNTIMES = {
    "reference": "s2d_deploy.runtimes.reference",
    "ort": "s2d_deploy.runtimes.ort",
    "tvm": "s2d_deploy.runtimes.tvm_vm",
    "tensorrt": "s2d_deploy.runtimes.trt",
}
TARGETS = {
    "reference": "s2d_deploy.export.to_reference",
    "ort": "s2d_deploy.export.to_ort",
    "tvm": "s2d_deploy.export.to_tvm",
    "tensorrt": "s2d_deploy.export.to_tensorrt",
}
RUNTIME_GROUP = "s2d_deploy.runtimes"
TARGET_GROUP = "s2d_deploy.targets"


def load_runtime(name: str) -> Runtime:
    """The adapter called `name`. Importing it does not import the runtime's own package.

    Raises:
        RecipeError: no such runtime; the message lists those there are.
    """
    return cast(Runtime, _load("runtime", name, RUNTIMES, RUNTIME_GROUP))


def load_target(name: str) -> Target:
    """The export target called `name`.

    Raises:
        RecipeError: no such target; the message lists those there are.
    """
    return cast(Target, _load("target", name, TARGETS, TARGET_GROUP))


def load_exporter() -> Callable[..., Any]:
    """`export_onnx` of ``export/to_onnx.py``: torch + plan -> the common ONNX file that every target reads."""
    return cast(Callable[..., Any], import_module("s2d_deploy.export.to_onnx").export_onnx)


def load_checkpoint_exporter() -> Callable[..., Any]:
    """`export_checkpoint` of ``export/to_onnx.py``: a quantized checkpoint's folder -> the common ONNX file."""
    return cast(Callable[..., Any], import_module("s2d_deploy.export.to_onnx").export_checkpoint)


def check_target(name: str) -> None:
    """Raise RecipeError unless a target of that name exists; imports nothing."""
    if name not in TARGETS and name not in entry_points(group=TARGET_GROUP).names:
        raise _unknown("target", name, TARGETS, TARGET_GROUP)


def _load(kind: str, name: str, table: dict[str, str], group: str) -> Any:
    if name in table:
        module = import_module(table[name])
        return getattr(module, kind.upper())
    plugins = entry_points(group=group)
    if name in plugins.names:
        return plugins[name].load()
    raise _unknown(kind, name, table, group)


def _unknown(kind: str, name: str, table: dict[str, str], group: str) -> RecipeError:
    known = sorted({*table, *entry_points(group=group).names})
    close = get_close_matches(name, known, n=1)
    return RecipeError(
        message(
            f"unknown {kind} {name!r}",
            expected=f"one of {', '.join(known)}",
            fix=f"did you mean {close[0]!r}?" if close else None,
        )
    )
