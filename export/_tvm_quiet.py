"""TVM and LLVM write notes from C++; this keeps them off the terminal where they are not news to anybody."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


@contextlib.contextmanager
def muted_stderr() -> Iterator[None]:
    """The process's standard error goes nowhere: TVM warns of every Gather that it compiles, LLVM of every guess."""
    saved = os.dup(2)
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
