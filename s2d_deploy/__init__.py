"""s2d-deploy: condition, quantize, export, run, prove, measure and gate low-bit transformers.

Importing this package loads neither torch nor any runtime; names resolve on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2d_deploy.errors import S2DDeployError
    from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor, PerToken
    from s2d_deploy.registry import load_runtime, load_target

__version__ = "0.1.0"

_HOMES = {
    "Grid": "grid",
    "PerAxis": "grid",
    "PerBlock": "grid",
    "PerTensor": "grid",
    "PerToken": "grid",
    "S2DDeployError": "errors",
    "load_runtime": "registry",
    "load_target": "registry",
}

__all__ = [
    "Grid",
    "PerAxis",
    "PerBlock",
    "PerTensor",
    "PerToken",
    "S2DDeployError",
    "__version__",
    "load_runtime",
    "load_target",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"s2d_deploy.{_HOMES[name]}"), name)
    raise AttributeError(f"module 's2d_deploy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
