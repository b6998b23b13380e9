"""Every reader of outside files, on spoiled files: read, or refused by an error of ours; never a traceback.

A small, repeatable part of `benchmarks/fuzz_inputs.py`, which goes through 10,000 inputs and more.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from command_line import Finished
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.errors import RecipeError
from s2d_deploy.recipe import Recipe, parse_recipe

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))
_fuzz, _fuzz_readers, _recipes = map(import_module, ("_fuzz", "_fuzz_readers", "_recipes"))
CASES = 14
NAMES = [reader.name for reader in _fuzz_readers.Readers(Path()).all()]
NAMES.remove("bundle")  # made by a pipeline, not by a run; `test_bundle.py` spoils it
NEEDS_ORT = ("ort", "dialect")


@pytest.fixture(scope="session")
def sound(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The readers over one small run."""
    readers = _fuzz_readers.Readers(finished.folder).all()
    return tmp_path_factory.mktemp("fuzz") / "cases", {reader.name: reader for reader in readers}


@pytest.mark.parametrize("name", NAMES)
def test_spoiled_files(sound: Any, name: str):
    if name in NEEDS_ORT and find_spec("onnxruntime") is None:
        pytest.skip("onnxruntime is not installed")
    folder, readers = sound
    folder.mkdir(exist_ok=True)
    _fuzz.prepare(readers[name], folder)
    found = _fuzz.run(readers[name], folder, range(CASES), seed=1)
    assert [case.index for case in found] == list(range(CASES))
    assert [f"{case.index}: {case.text}" for case in found if case.failed] == []


def test_a_failure_is_seen(tmp_path: Path):
    """What the harness must find: a traceback, a crash, a hang, a path that escapes, a pickle, too much memory."""

    def reads(harm: str) -> Any:
        def read(place: Path) -> None:
            if (place / "a.json").read_bytes() != b"{}":
                exec(harm, {"place": place})  # noqa: S102

        return _fuzz.Reader("harm", lambda place: (place / "a.json").write_bytes(b"{}") and None, read, ("a.json",))

    harms = {
        "1 / 0": "ZeroDivisionError",
        "import os; os.abort()": "the process died: signal SIGABRT",
        f"open(place.parent / {_fuzz.OUTSIDE!r})": f"open {tmp_path / _fuzz.OUTSIDE}",
        "import pickle; pickle.loads(b'cbuiltins\\neval\\n.')": "pickle.find_class",
        "import subprocess; subprocess.run(['true'])": "subprocess.Popen",
        "bytearray(1 << 34)": "MemoryError",
    }
    for harm, words in harms.items():
        reader = reads(harm)
        _fuzz.prepare(reader, tmp_path)
        found = _fuzz.run(reader, tmp_path, range(6), seed=0)
        assert any(case.failed and words in case.text for case in found), (harm, found)


def test_a_hang_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_fuzz, "SECONDS", 1)
    reader = _fuzz.Reader(
        "hang",
        lambda place: (place / "a.json").write_bytes(b"{}") and None,
        lambda place: (place / "a.json").read_bytes() == b"{}" or exec("while True: pass"),  # noqa: S102
        ("a.json",),
    )
    _fuzz.prepare(reader, tmp_path)
    assert "no answer within 1 s" in _fuzz.run(reader, tmp_path, [0], seed=0)[0].text


def test_a_case_is_made_again_by_its_number(sound: Any, tmp_path: Path):
    folder, readers = sound
    folder.mkdir(exist_ok=True)
    _fuzz.prepare(readers["plan"], folder)
    made = []
    for name in ("one", "two"):
        what = _fuzz.write_case(readers["plan"], folder / "plan", tmp_path / name, 5, seed=3)
        made.append((what, {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}))
    assert made[0] == made[1]


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["w4a4", "fp32", "s2d", "digits", "../../etc/passwd", "a\x00b", "ort"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SECTIONS = sorted(Recipe.model_fields)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(SECTIONS), st.data())
def test_any_value_at_any_key_of_a_recipe(section: str, data: st.DataObject):
    document = json.loads(json.dumps(_recipes.RECIPE))
    annotation = Recipe.model_fields[section].annotation
    keys = sorted(getattr(annotation, "model_fields", {})) or [""]
    key, value = data.draw(st.sampled_from(keys)), data.draw(json_values)
    if key:
        document[section] = {**(document.get(section) or {}), key: value}
    else:
        document[section] = value
    try:
        recipe = parse_recipe(document)
    except RecipeError:
        return
    assert parse_recipe(recipe.document()) == recipe
    json.dumps(recipe.document(), allow_nan=False)
