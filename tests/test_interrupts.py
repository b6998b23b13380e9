"""An interrupt that a library swallows still ends the run, at the end of the stage, and leaves no half stage."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from s2d_deploy.interrupts import raise_if_interrupted, remember_interrupts
from s2d_deploy.store import RunFolder


@pytest.fixture(autouse=True)
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    remember_interrupts()  # forget what the test has seen
    signal.signal(signal.SIGINT, before)


def swallowing(folder: Path) -> dict[str, int]:
    (folder / "half").write_text("made")
    with contextlib.suppress(KeyboardInterrupt):  # as a callback inside a library does
        os.kill(os.getpid(), signal.SIGINT)
    return {}


def test_a_swallowed_interrupt_ends_the_stage(tmp_path: Path):
    remember_interrupts()
    with RunFolder(tmp_path / "run") as store:
        with pytest.raises(KeyboardInterrupt):
            store.run("a", {}, swallowing)
        assert not store.path("a").exists()
    remember_interrupts()
    with RunFolder(tmp_path / "run") as store:
        assert not store.run("a", {}, lambda _folder: {}).cached


def test_without_an_interrupt_nothing_is_raised():
    remember_interrupts()
    raise_if_interrupted()


def test_someone_elses_handler_stays():
    mine = lambda _number, _frame: None  # noqa: E731
    signal.signal(signal.SIGINT, mine)
    remember_interrupts()
    assert signal.getsignal(signal.SIGINT) is mine
