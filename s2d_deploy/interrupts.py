"""Ctrl-C is not lost. KeyboardInterrupt is raised wherever Python happens to be; inside a callback or a finalizer of a
library it is printed or dropped, and the run would go on. So the signal is remembered, and raised again at the end of a
stage.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_seen = threading.Event()


def remember_interrupts() -> None:
    """Start anew, and let SIGINT be remembered; a handler that someone else has installed is left alone."""
    _seen.clear()
    ours = (signal.default_int_handler, _handle)
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) in ours:
        signal.signal(signal.SIGINT, _handle)


def raise_if_interrupted() -> None:
    """Raise the interrupt that something has swallowed.

    Raises:
        KeyboardInterrupt: SIGINT came since `remember_interrupts`.
    """
    if _seen.is_set():
        raise KeyboardInterrupt


def _handle(number: int, frame: FrameType | None) -> None:
    _seen.set()
    signal.default_int_handler(number, frame)
