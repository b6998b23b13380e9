"""The code blocks of docs/conditioning.md run, each as a script of its own namespace."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "conditioning.md"
BLOCKS = dict(re.findall(r"<!-- test: (\w+) -->\n```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))


def test_every_block_is_named() -> None:
    assert PAGE.read_text().count("```python") == len(BLOCKS) == 3


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_the_block_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {"__name__": "example"}
    exec(compile(BLOCKS[name], f"{PAGE.name}: {name}", "exec"), space)  # noqa: S102 - the page's own code
    if name == "plain":
        assert space["s2d"].step == 20  # type: ignore[attr-defined]
        assert space["s2d"].selections  # type: ignore[attr-defined]
    if name == "trainer":
        state = space["trainer"].callback_handler.callbacks  # type: ignore[attr-defined]
        assert next(c for c in state if type(c).__name__ == "S2DCallback").s2d.step == 6
    if name == "own":
        assert space["result"].method == "distill+s2d-decoupled"  # type: ignore[attr-defined]
