"""What a person sees while a run goes on: one line for each stage, a bar inside the long ones.

On a terminal the line is alive; elsewhere (CI logs, pipes) finished lines are printed plainly. Everything goes to
stderr, so that stdout holds results only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Step:
    """The stage that is running: tell it how far it is."""

    def __init__(self, progress: Progress | None, name: str) -> None:
        self._progress = progress
        self._task = None if progress is None else progress.add_task(name, total=None, note="")
        self.note = ""

    def __call__(self, note: str) -> None:
        """Show a short note, e.g. what is being compiled."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, note=note)

    def advance(self, done: int, total: int, note: str = "") -> None:
        """Show `done` of `total`."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total, note=note)


class Display:
    """Reports stages on `console`; `quiet` shows nothing."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet = quiet

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """A stage. Set ``step.note`` for the finished line, e.g. to ``"cached"``."""
        if self.quiet or not self.console.is_terminal:
            step = Step(None, name)
            started = time.perf_counter()
            yield step
            self._finished(name, time.perf_counter() - started, step.note)
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        started = time.perf_counter()
        with Progress(*columns, console=self.console, transient=True) as progress:
            step = Step(progress, name)
            yield step
        self._finished(name, time.perf_counter() - started, step.note)

    def say(self, text: str) -> None:
        """A line of its own."""
        if not self.quiet:
            self.console.print(text, markup=False, soft_wrap=True)

    def _finished(self, name: str, seconds: float, note: str) -> None:
        if not self.quiet:
            self.console.print(f"  {name:<26} {seconds:7.1f} s   {note}", markup=False, soft_wrap=True)
