"""The report document: assembling, checking, writing; nothing half-written, nothing invented."""

from __future__ import annotations

import copy
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from report_sample import sample_report

from s2d_deploy.errors import ArtifactError, StageError
from s2d_deploy.report import FILES, assemble, read_report, to_json, validate, write_reports
from s2d_deploy.report_schema import overall_verdict

MINIMAL: dict[str, Any] = {"schema_version": "1", "results": [], "verdict": "undecided"}


def parts(**changes: Any) -> dict[str, Any]:
    sample = sample_report()
    keys = ("command", "versions", "host", "recipe", "model", "conditioning", "results", "gates")
    return {**{key: sample[key] for key in keys}, **changes}


def test_assemble_computes_the_verdict_and_keeps_further_keys() -> None:
    document = assemble(**parts(), budget={"predicted_snr_db": 40.0})
    assert document["verdict"] == "fail"
    assert document["schema_version"] == "1"
    assert document["created"].endswith("+00:00")
    assert document["budget"] == {"predicted_snr_db": 40.0}


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([], "undecided"),
        (["pass", "pass"], "pass"),
        (["pass", "undecided"], "undecided"),
        (["undecided", "fail", "pass"], "fail"),
    ],
)
def test_the_verdict_is_the_worst_gate(verdicts: list[str], expected: str) -> None:
    assert overall_verdict(verdicts) == expected


def test_write_reports_writes_four_files_that_read_back(tmp_path: Path) -> None:
    document = sample_report()
    before = copy.deepcopy(document)
    paths = write_reports(document, tmp_path / "new" / "run")
    assert [p.name for p in paths] == list(FILES)
    assert document == before, "the caller's document was changed"
    assert read_report(paths[0]) == read_report(tmp_path / "new" / "run") == document
    assert sorted(p.name for p in paths[0].parent.iterdir()) == sorted(FILES), "temporary files are left"
    assert paths[2].stat().st_size < 1_000_000


def test_writing_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    first = [p.read_bytes() for p in write_reports(sample_report(), tmp_path)]
    assert first == [p.read_bytes() for p in write_reports(sample_report(), tmp_path)]


def test_json_types_only_and_numbers_that_are_not_finite_are_named() -> None:
    plain = to_json(
        {
            "a": np.float32(0.5),
            "b": np.arange(3),
            "c": (Path("x/y"), float("nan")),
            "d": {"e": np.float64("-inf"), 7: True},
            "f": "bad \udcff text",
        }
    )
    assert plain == {
        "a": 0.5,
        "b": [0, 1, 2],
        "c": ["x/y", None],
        "d": {"e": None, "7": True},
        "f": "bad ? text",
        "not_finite": ["c[1]", "d.e"],
    }
    json.dumps(plain, allow_nan=False)
    assert type(plain["a"]) is float


def test_a_value_without_json_form_is_named() -> None:
    with pytest.raises(TypeError, match=r"host\.gpu\[0\]: a set has no JSON form"):
        to_json({"host": {"gpu": [{1}]}})


def test_nan_in_a_result_reaches_every_page_as_missing(tmp_path: Path) -> None:
    document = sample_report()
    document["results"][1]["metric"]["measured"] = float("nan")
    paths = write_reports(document, tmp_path)
    stored = read_report(tmp_path)
    assert stored["results"][1]["metric"]["measured"] is None
    assert stored["not_finite"] == ["results[1].metric.measured"]
    assert "results\\[1\\].metric.measured" in paths[1].read_text()
    assert "results[1].metric.measured" in paths[2].read_text()


def test_every_wrong_key_is_named_at_once() -> None:
    document = {
        **MINIMAL,
        "results": [{"precision": "w8a8", "status": "ran"}],
        "gates": [{"name": "g", "verdict": "ok"}],
    }
    with pytest.raises(ArtifactError) as caught:
        validate(document)
    text = str(caught.value)
    assert text.startswith("report: not a valid report. Expected: the keys of report.json, schema_version 1.")
    for place in ("results[0].target: ", "results[0].status: ", "gates[0].verdict: "):
        assert place in text


def test_another_schema_version_is_refused() -> None:
    with pytest.raises(ArtifactError, match="schema_version: Input should be '1'"):
        validate({**MINIMAL, "schema_version": "2"})


@pytest.mark.parametrize("status", ["built", "unavailable"])
@pytest.mark.parametrize(
    ("claim", "named"),
    [
        ({"metric": {"float": 0.9, "measured": 0.9}}, "metric.measured"),
        ({"latency_ms": {"p50": 1.0}}, "latency_ms"),
        ({"parity": {"codes_checked": 10, "codes_different": 0}}, "parity"),
        ({"speedup_over_float": 2.0}, "speedup_over_float"),
    ],
)
def test_nothing_that_was_not_measured_gets_a_number(status: str, claim: dict[str, Any], named: str) -> None:
    result = {"target": "tensorrt", "precision": "w4a4", "status": status, **claim}
    with pytest.raises(ArtifactError, match=f"tensorrt w4a4 is '{status}', yet it holds {named}"):
        validate({**MINIMAL, "results": [result]})
    validate({**MINIMAL, "results": [{**result, "status": "measured"}]})


def test_a_verdict_that_its_gates_deny_is_refused() -> None:
    document = {**sample_report(), "verdict": "pass"}
    with pytest.raises(ArtifactError, match="verdict is 'pass', but the gates say 'fail'"):
        validate(document)


def test_an_invalid_document_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        write_reports({"results": []}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_truncated_report_is_refused(tmp_path: Path) -> None:
    path = write_reports(sample_report(), tmp_path)[0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"report\.json: truncated, or not JSON"):
        read_report(path)
    with pytest.raises(ArtifactError, match=r"nowhere.*: no such file"):
        read_report(tmp_path / "nowhere" / "report.json")


def test_a_folder_that_cannot_be_made_is_a_stage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(
        StageError, match=r"the report's folder cannot be made\. Expected: a folder that can be written\."
    ):
        write_reports(sample_report(), tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_a_stage_error(tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(StageError, match="permission denied"):
            write_reports(sample_report(), tmp_path)
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_file_that_cannot_be_replaced_leaves_the_old_ones_whole(tmp_path: Path) -> None:
    first = write_reports(sample_report(), tmp_path)
    old = first[0].read_bytes()
    first[0].unlink()
    first[0].mkdir()  # a folder cannot be replaced by a file, also not by root
    with pytest.raises(StageError, match=r"report\.json"):
        write_reports({**sample_report(), "created": "later"}, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(FILES)
    assert all(b"later" not in p.read_bytes() for p in first[1:])
    assert old
