"""Committed baselines: what they hold, what they refuse, and what falls below them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from gate_sample import RECIPE, N, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.baseline import baseline_of, compare, default_limit, read_baseline, write_baseline
from s2d_deploy.cli import main
from s2d_deploy.compare import compare_reports, findings
from s2d_deploy.errors import ArtifactError, RecipeError
from s2d_deploy.gate import GateVerdict
from s2d_deploy.gating import BaselineOptions, apply_baseline, write_files
from s2d_deploy.judge import is_report, judged_again
from s2d_deploy.outcomes import pack, unpack


def only(rows: list[GateVerdict], name: str, precision: str = "w4a4") -> GateVerdict:
    (row,) = [r for r in rows if r.name == f"baseline_{name}" and r.precision == precision]
    return row


# --- outcomes as text ----------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.sampled_from([1.0, 100.0]))
@settings(max_examples=40)
def test_right_and_wrong_come_back(right, unit):
    values = [unit * r for r in right]
    packed = json.loads(json.dumps(pack(values)))
    assert unpack(packed, "x") == values


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
@settings(max_examples=40)
def test_grades_come_back_to_seven_digits(values):
    assert unpack(pack(values), "x") == pytest.approx(values, rel=1e-6, abs=1e-300)


@pytest.mark.parametrize(
    ("document", "found"),
    [
        ({}, "n is None"),
        ({"n": 0, "grades": ""}, "n is 0"),
        ({"n": True, "grades": "1"}, "n is True"),
        ({"n": 10**12, "grades": "1"}, "n is 1000000000000"),
        ({"n": 9, "unit": 1.0, "right": "ff"}, "1 bytes of bits for 9 samples"),
        ({"n": 3, "unit": 1.0, "right": "ff"}, "bits behind the last sample"),
        ({"n": 3, "unit": 2.0, "right": "e0"}, "not hexadecimal, or a unit"),
        ({"n": 3, "unit": 1.0, "right": "zz"}, "not hexadecimal"),
        ({"n": 2, "grades": "1 nan"}, "one that is no number"),
        ({"n": 2, "grades": "1 1e999"}, "a grade that is not finite"),
        ({"n": 2, "grades": "1"}, "1 grades for 2 samples"),
        ({"n": 2, "grades": "1 2", "right": "ff"}, "keys grades, n, right"),
    ],
)
def test_broken_outcomes(document, found):
    with pytest.raises(ArtifactError, match="here: not the outcomes of samples") as caught:
        unpack(document, "here")
    assert found in str(caught.value)


def test_what_cannot_be_packed():
    for values in ([], [float("nan")]):
        with pytest.raises(ValueError, match="no samples"):
            pack(values)


# --- the file ------------------------------------------------------------------------------------------------


def test_written_read_and_written_again_it_is_the_same(tmp_path: Path):
    path = tmp_path / "baseline.json"
    made, said = baseline_of(sample(), slower=1.2)
    write_baseline(path, made)
    first = path.read_bytes()
    assert said == ["ort/w8a8: added", "ort/w4a4: added"]
    assert read_baseline(path) == made
    again, said = baseline_of(sample(), read_baseline(path), slower=1.2)
    write_baseline(path, again)
    assert said == ["ort/w8a8: unchanged", "ort/w4a4: unchanged"]
    assert path.read_bytes() == first
    assert b"2026" not in first  # nothing that changes from day to day


def test_an_update_keeps_limits_and_results_that_are_not_in_the_report():
    first, _ = baseline_of(sample(), tolerance=3.0)
    part = sample(lost=9)
    part["results"] = [r for r in part["results"] if r["precision"] != "w8a8"]
    second, said = baseline_of(part, first)
    assert said == ["ort/w4a4: replaced", "ort/w8a8: kept, not in this report"]
    assert second.results["ort/w8a8"] == first.results["ort/w8a8"]
    assert second.results["ort/w4a4"].limit == 3.0
    assert second.results["ort/w4a4"].value < first.results["ort/w4a4"].value
    other, said = baseline_of(sample(data="b" * 64), second)
    assert said[0] == "the samples are others: every result of the old baseline is dropped"
    assert other.results["ort/w4a4"].limit == default_limit([100.0] * N)


def test_default_limits():
    assert 1.5 < default_limit([100.0] * 599 + [0.0]) < 2.0  # 600 samples, one in fifty changes
    assert default_limit([1.0] * 3) == 1.0  # three samples show nothing
    assert default_limit([98.0, 99.0]) == pytest.approx(0.4925)


def test_what_was_not_measured_is_no_baseline():
    report = sample()
    for row in report["results"][1:]:
        row["status"] = "built"
    with pytest.raises(ArtifactError, match="holds nothing for a baseline"):
        baseline_of(report)
    report = sample()
    del report["results"][1]["metric"]["per_sample_measured"]
    assert "ort/w8a8: left out, measured without outcomes of samples" in baseline_of(report)[1]
    with pytest.raises(RecipeError, match=r"out of range.*Found: -1"):
        baseline_of(sample(), tolerance=-1.0)


def spoiled(document: dict[str, Any], change: str) -> Any:
    entry = document["results"]["ort/w4a4"]
    match change:
        case "unknown":
            entry["limt"] = 1.0
        case "kind":
            document["kind"] = "recipe"
        case "limit":
            entry["limit"] = -1
        case "outcomes":
            entry["outcomes"]["right"] = "00"
        case "empty":
            document["results"] = {}
        case "list":
            return [document]
    return document


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("unknown", "results.ort/w4a4.limt: Extra inputs are not permitted"),
        ("kind", "kind: Input should be 's2d-deploy baseline'"),
        ("limit", "results.ort/w4a4.limit: Input should be greater than or equal to 0"),
        ("outcomes", "results.ort/w4a4.outcomes: not the outcomes of samples"),
        ("empty", "results: Dictionary should have at least 1 item"),
        ("list", "Expected: a JSON object. Found: a list"),
    ],
)
def test_damaged_baselines_are_one_sentence(tmp_path: Path, change: str, words: str):
    path = tmp_path / "baseline.json"
    document = baseline_of(sample())[0].model_dump(mode="json")
    path.write_text(json.dumps(spoiled(document, change)))
    with pytest.raises(ArtifactError) as caught:
        read_baseline(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


# --- judging -------------------------------------------------------------------------------------------------


def test_the_same_run_passes():
    found = compare(sample(), baseline_of(sample())[0])
    assert {v.verdict for v in found.verdicts} == {"pass"}
    assert found.unknown == []
    assert [v.name for v in found.verdicts if v.precision == "w4a4"] == ["baseline_accuracy", "baseline_accumulators"]


def test_a_drop_fails_and_a_small_one_is_undecided():
    baseline, _ = baseline_of(sample(), tolerance=2.0)
    row = only(compare(sample(lost=40), baseline).verdicts, "accuracy")
    assert (row.verdict, row.value, row.limit) == ("fail", pytest.approx(9.5), 2.0)
    assert "top-1 % 89.75 in the baseline, 80.25 now, n = 400; 95 % interval of the drop" in row.evidence
    assert row.interval[0] < 9.5 < row.interval[1]
    assert row.detectable > 2.0
    assert only(compare(sample(lost=8), baseline).verdicts, "accuracy").verdict == "undecided"
    assert only(compare(sample(lost=0), baseline).verdicts, "accuracy").verdict == "pass"


def test_grades_are_compared_to_seven_digits():
    report = sample()
    for row in report["results"]:
        values = [0.9 + i / 7000 for i in range(N)]
        row["metric"] |= {"name": "cosine", "per_sample_measured": values, "measured": sum(values) / N}
    baseline, _ = baseline_of(report)
    row = only(compare(report, baseline).verdicts, "accuracy")
    assert (row.verdict, row.value) == ("pass", 0.0)
    worse = copy.deepcopy(report)
    worse["results"][2]["metric"]["per_sample_measured"] = [0.88 + i / 7000 for i in range(N)]
    assert only(compare(worse, baseline).verdicts, "accuracy").verdict == "fail"


def test_a_missing_result_is_a_failure():
    baseline, _ = baseline_of(sample())
    gone = sample()
    del gone["results"][2]
    row = only(compare(gone, baseline).verdicts, "measured")
    assert (row.verdict, row.evidence) == ("fail", "in the baseline, but there is no result")
    away = sample()
    away["results"][2] |= {"status": "unavailable", "reason": "not installed"}
    row = only(compare(away, baseline).verdicts, "measured")
    assert row.evidence == "in the baseline, but only unavailable: not installed"
    bare = sample()
    del bare["results"][2]["metric"]["per_sample_measured"]
    assert only(compare(bare, baseline).verdicts, "accuracy").verdict == "fail"


def test_other_figures_must_not_get_worse():
    baseline, _ = baseline_of(sample())
    report = sample()
    report["results"][2]["parity"]["accumulators_different"] = 3
    report["results"][2]["rung"] = "dequantized"
    rows = compare(report, baseline).verdicts
    assert only(rows, "accumulators").verdict == "fail"
    assert only(rows, "rung").evidence == "ran native, now dequantized"
    report["results"][2]["metric"]["name"] = "top-5 %"
    assert "holds 'top-1 %', this result 'top-5 %'" in only(compare(report, baseline).verdicts, "accuracy").evidence


def test_latency_is_compared_by_its_ratio_and_only_behind_parity():
    baseline, _ = baseline_of(sample(), slower=1.1)
    assert only(compare(sample(), baseline).verdicts, "latency").verdict == "pass"
    assert only(compare(sample(speed=1.5), baseline).verdicts, "latency").verdict == "fail"
    wrong = sample(speed=4.0)
    wrong["results"][2]["parity"]["accumulators_different"] = 1
    row = only(compare(wrong, baseline).verdicts, "latency")
    assert row.verdict == "undecided"
    assert row.evidence.startswith("void, because baseline_accumulators and parity did not pass: fast and wrong")
    noisy = sample()
    noisy["results"][2]["latency_ms"]["stable"] = False
    assert only(compare(noisy, baseline).verdicts, "latency").verdict == "undecided"
    untimed = sample()
    untimed["results"][2]["speedup_over_float"] = None
    assert only(compare(untimed, baseline).verdicts, "latency").verdict == "fail"


def test_other_samples_are_refused():
    baseline, _ = baseline_of(sample())
    with pytest.raises(ArtifactError, match="made on other samples, so nothing can be compared") as caught:
        compare(sample(data="b" * 64), baseline, "b.json")
    assert "Expected: 400 samples with digest aaaaaaaaaaaa. Found: 400 samples with digest bbbbbbbbbbbb" in str(
        caught.value
    )
    silent = sample()
    del silent["data"]
    with pytest.raises(ArtifactError, match="does not say on which samples"):
        compare(silent, baseline)


def test_unknown_results_are_named(tmp_path: Path):
    part = sample()
    part["results"] = part["results"][:2]
    baseline, _ = baseline_of(part)
    write_baseline(tmp_path / "b.json", baseline)
    judged, said = apply_baseline(sample(), BaselineOptions(tmp_path / "b.json"))
    assert said == [f"{tmp_path / 'b.json'} does not hold ort/w4a4: add them with --write"]
    assert judged["verdict"] == "pass"
    assert {g["name"] for g in judged["gates"]} >= {"baseline_accuracy", "accuracy_drop"}


# --- flags, files, reports judged again -----------------------------------------------------------------------


def test_flags_that_do_not_fit(tmp_path: Path):
    for options, words in (
        (BaselineOptions(write=True), "belong to a baseline"),
        (BaselineOptions(tmp_path / "b.json", tolerance=1.0), "are written into the baseline"),
        (BaselineOptions(tmp_path / "no" / "b.json", write=True), "no folder"),
    ):
        with pytest.raises(RecipeError, match=words):
            options.check()
    with pytest.raises(ArtifactError, match=r"no such file.*add --write to this command"):
        BaselineOptions(tmp_path / "b.json").check()


def test_write_replaces_baselines_only(tmp_path: Path):
    path = tmp_path / "package.json"
    path.write_text('{"name": "mine"}')
    with pytest.raises(ArtifactError, match="--write replaces baselines only"):
        apply_baseline(sample(), BaselineOptions(path, write=True))
    assert path.read_text() == '{"name": "mine"}'


def test_a_report_is_judged_again_by_other_limits(tmp_path: Path):
    report = sample(lost=2)
    assert judged_again(report)["gates"] == report["gates"]
    strict = judged_again(report, ["gates.accuracy_drop=0.1"])
    assert strict["verdict"] == "undecided"
    with pytest.raises(RecipeError, match=r"a report has run already.*limits"):
        judged_again(report, ["quantize.precisions=[w8a8]"])
    with pytest.raises(ArtifactError, match="holds no recipe"):
        judged_again({**report, "recipe": None})
    with pytest.raises(ArtifactError, match=r"not one of this version's.*unknown key 'gates.speed'"):
        judged_again({**report, "recipe": RECIPE | {"gates": {"speed": 1}}})
    (tmp_path / "report.json").write_text(json.dumps(report))
    assert is_report(str(tmp_path))
    assert is_report(str(tmp_path / "report.json"))
    assert not is_report("digits-vit")
    (tmp_path / "recipe.json").write_text(json.dumps(RECIPE))
    assert not is_report(str(tmp_path / "recipe.json"))
    assert not is_report(str(tmp_path / "recipe.yaml"))
    written = write_files(strict, junit=tmp_path / "j.xml", summary=tmp_path / "s.md")
    assert [p.name for p in written] == ["j.xml", "s.md"]
    assert "undecided" in (tmp_path / "s.md").read_text()


def test_the_command_judges_finished_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, baseline = tmp_path / "run", tmp_path / "baseline.json"
    run.mkdir()
    (run / "report.json").write_text(json.dumps(sample(lost=2)))
    assert main(["gate", str(run), "--junit", str(tmp_path / "j.xml"), "--summary", str(tmp_path / "s.md")]) == 0
    assert "verdict: pass" in capsys.readouterr().out
    assert main(["gate", str(run), "--set", "gates.accuracy_drop=0.1"]) == 1
    assert main(["gate", str(run), "--baseline", str(baseline)]) == 2
    assert "add --write to this command" in capsys.readouterr().err
    assert main(["gate", str(run), "--baseline", str(baseline), "--write", "--tolerance", "2"]) == 0
    told = capsys.readouterr()
    assert "largest drops that later runs may show: ort/w4a4 2, ort/w8a8 2" in told.err
    assert main(["gate", str(run), "--baseline", str(baseline), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [g["verdict"] for g in document["gates"] if g["name"] == "baseline_accuracy"] == ["pass", "pass"]
    (run / "report.json").write_text(json.dumps(sample(lost=40)))
    assert main(["gate", str(run), "--baseline", str(baseline)]) == 1
    assert "baseline_accuracy ort w4a4: top-1 % 89.75 in the baseline, 80.25 now" in capsys.readouterr().out
    assert main(["gate", str(run), "--target", "ort"]) == 2
    assert "is a finished run: nothing is run. Found: targets" in capsys.readouterr().err
    assert main(["compare", str(run), str(run)]) == 0
    assert "ort w4a4: every sample as before (n = 400)" in capsys.readouterr().out


# --- two runs side by side ------------------------------------------------------------------------------------


def test_two_runs_are_compared_sample_by_sample():
    rows = compare_reports(sample(lost=2), sample(lost=40))
    (row,) = [r for r in rows if r["figure"] == "metric" and r["precision"] == "w4a4"]
    paired = row["paired"]
    assert (paired["finding"], paired["lost"], paired["gained"], paired["n"]) == ("worse", 38, 0, N)
    assert paired["drop"] == pytest.approx(9.5)
    assert row["change"] == pytest.approx(-9.5)
    said = findings(rows)
    assert "ort w8a8: every sample as before (n = 400)" in said
    assert said[-1].startswith("ort w4a4: worse; drop 9.5, 95 % interval [")
    assert "lost 38, gained 0, p = 3.64e-12" in said[-1]
    better = findings(compare_reports(sample(lost=40), sample(lost=2)))
    assert better[-1].startswith("ort w4a4: better; drop -9.5")
    close = findings(compare_reports(sample(lost=2), sample(lost=4)))
    assert "ort w4a4: no difference shown; drop 0.5" in close[-1]
    assert "would be seen in 80 % of runs" in close[-1]


def test_what_cannot_be_paired_says_why():
    other = findings(compare_reports(sample(), sample(data="b" * 64)))
    assert other[0] == "ort fp32: not compared sample by sample: they were made on other samples"
    silent = sample()
    del silent["data"]
    assert "a report does not say on which samples" in findings(compare_reports(silent, sample()))[0]
    bare = sample()
    del bare["results"][0]["metric"]["per_sample_measured"]
    assert "not both reports hold the outcomes" in findings(compare_reports(bare, sample()))[0]
    renamed = sample()
    renamed["results"][0]["metric"]["name"] = "other"
    assert "the metrics are 'other' and 'top-1 %'" in findings(compare_reports(renamed, sample()))[0]
    short = sample()
    short["results"] = short["results"][:1]
    assert len(findings(compare_reports(short, sample()))) == 1  # what only one of them has is not compared


def test_speedups_carry_their_intervals():
    (row,) = [r for r in compare_reports(sample(), sample()) if r["figure"] == "speedup" and r["precision"] == "w8a8"]
    assert row["intervals"][0] == row["intervals"][1]
    assert row["intervals"][0][0] < row["first"] < row["intervals"][0][1]
