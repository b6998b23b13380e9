"""Kernels that TensorRT-RTX compiled on the device, kept between processes.

An RTX engine holds portable programs; the library compiles them for the GPU when a context is made, and again for the
shapes that are run. Its runtime cache keeps the result. It is stored for each engine and GPU, in the user's cache
folder, never in the artifact: an artifact is the same on every machine. TensorRT checks a stored cache against its own
version, the GPU and the driver, and takes none that does not fit; a cache that cannot be read or written costs time and
nothing else, so it is logged and not raised.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

from s2d_deploy.errors import StageError
from s2d_deploy.files import atomic_write

logger = logging.getLogger(__name__)
VARIABLE = "S2D_DEPLOY_CACHE"  # another folder than ~/.cache/s2d-deploy; "" for no cache


def place(engine: bytes, capability: str) -> Path | None:
    """The file for an engine on a GPU; None where the user wants no cache."""
    root = os.environ.get(VARIABLE)
    if root == "":
        return None
    folder = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "s2d-deploy"
    return folder / "tensorrt" / f"{hashlib.sha256(engine).hexdigest()[:32]}-sm{capability.replace('.', '')}.cache"


def read(path: Path | None) -> bytes:
    """What is stored; empty for nothing."""
    try:
        return path.read_bytes() if path is not None and path.is_file() else b""
    except OSError as error:
        logger.warning("%s: not read: %s", path, error)
        return b""


def write(path: Path | None, data: bytes) -> None:
    """Store, whole or not at all."""
    if path is None or not data:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
    except (OSError, StageError) as error:
        logger.warning("%s: not written: %s", path, error)


__all__ = ["VARIABLE", "place", "read", "write"]
