"""Which TensorRT is installed, and its log: `tensorrt` where it imports, else `tensorrt_rtx`. Both have one Python API.

The package ``tensorrt`` on PyPI is a stub that fetches its libraries elsewhere, so a found name may still fail to
import; that counts as not installed, with the reason kept.
"""

from __future__ import annotations

import ctypes
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from s2d_deploy.errors import RuntimeUnavailable, message

NAMES = ("tensorrt", "tensorrt_rtx")
INSTALL = "pip install 's2d-deploy[tensorrt]'"
_KEPT_ERRORS = 20


def installed() -> bool:
    """Whether one of the packages is there; imports neither."""
    return any(find_spec(name) is not None for name in NAMES)


def load() -> Any:
    """The module, imported.

    Raises:
        RuntimeUnavailable: neither package imports; the message gives the pip line.
    """
    failures = []
    for name in NAMES:
        if find_spec(name) is None:
            continue
        try:
            module = import_module(name)
        except Exception as error:  # a missing library surfaces as ImportError, OSError or RuntimeError
            failures.append(f"{name}: {type(error).__name__}: {error}")
            continue
        if hasattr(module, "Builder"):
            return module
        failures.append(f"{name}: imports, but holds no Builder (the stub without its libraries)")
    raise RuntimeUnavailable(
        message(
            "TensorRT is not installed",
            found="; ".join(failures) or None,
            expected=f"the Python package {' or '.join(reversed(NAMES))}",
            fix=INSTALL,
        )
    )


def load_plugin(trt: Any, path: str) -> str | None:
    """Load a plugin library into TensorRT's registry; None, or why it does not load.

    The system's loader is asked first: TensorRT-RTX 1.7 crashes the process over a library that does not load.
    """
    if not Path(path).is_file():
        return "no such file"
    try:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return str(error)
    known = len(trt.get_plugin_registry().all_creators)
    trt.get_plugin_registry().load_library(path)
    return None if len(trt.get_plugin_registry().all_creators) > known else "it registers no plugin"


def new_log(trt: Any) -> Any:
    """An ILogger that keeps errors and the engine's layer list, and prints nothing.

    Attributes of the result: ``errors`` (list of str, the last 20), ``layers`` (str, "" until a build has printed it).
    """

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.layers = ""

        def log(self, severity: Any, text: str) -> None:
            if severity <= trt.ILogger.ERROR:  # INTERNAL_ERROR is the lower number
                self.errors = [*self.errors, text][-_KEPT_ERRORS:]
            elif text.startswith("Layers:"):
                self.layers = text

    return Log()
