"""The pytest plugin as a project meets it: its own suite, in a process of its own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from command_line import TINY
from gate_sample import sample

from s2d_deploy.baseline import baseline_of, write_baseline

pytest_plugins = ["pytester"]
Run = Callable[..., pytest.RunResult]
# pytester puts sys.modules back after each test, and NumPy cannot be loaded twice: so load what these lines need now.
PASSING = sample(lost=2)
HEAVY = ["torch", "transformers", "onnx", "numpy", "scipy", "pydantic"]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    # Named by hand, whether or not this checkout's metadata name the entry point already.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def pytest_with(*arguments: str | Path) -> pytest.RunResult:
        return pytester.runpytest_subprocess("-p", "s2d_deploy.pytest_plugin", *map(str, arguments))

    return pytest_with


def write(path: Path, document: dict[str, Any]) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_each_gate_is_a_test(run: Run, pytester: pytest.Pytester) -> None:
    report = copy.deepcopy(PASSING)
    report["results"].append({"target": "tvm", "precision": "w8a8", "status": "unavailable", "reason": "not installed"})
    write(pytester.path / "report.json", report)
    pytester.makepyfile("def test_mine(): pass")
    result = run("--s2d-report", "report.json", "-v", "--junitxml", "junit.xml", "-rs")
    assert result.ret == 0
    result.assert_outcomes(passed=1 + len(report["gates"]), skipped=1)
    result.stdout.fnmatch_lines(["*s2d-deploy::accuracy_drop[[]ort-w4a4[]]*PASSED*", "*not installed*"])
    cases = ET.parse(pytester.path / "junit.xml").getroot().iter("testcase")  # noqa: S314 - pytest's own file
    assert {case.get("name") for case in cases} >= {"test_mine", "available[tvm-w8a8]", "latency_ratio[ort-w8a8]"}


def test_a_gate_that_does_not_pass_fails_with_its_evidence(run: Run, pytester: pytest.Pytester) -> None:
    write(pytester.path / "report.json", sample(lost=40))
    pytester.makeini("[pytest]\ns2d_report = .")
    result = run("-k", "accuracy_drop")
    assert result.ret == 1
    result.assert_outcomes(passed=1, failed=1, deselected=6)
    result.stdout.fnmatch_lines(["fail: accuracy_drop ort w4a4: value *, limit 4.0; *lost 40, gained 1*"])
    result.stdout.fnmatch_lines(["FAILED s2d-deploy::accuracy_drop[[]ort-w4a4[]]*"])
    assert "Traceback" not in result.stdout.str()
    assert "pytest_plugin.py" not in result.stdout.str()


def test_undecided_is_not_passed(run: Run, pytester: pytest.Pytester) -> None:
    write(pytester.path / "report.json", sample(lost=14))
    result = run("--s2d-report", ".")
    result.assert_outcomes(passed=7, failed=1)
    result.stdout.fnmatch_lines(
        ["undecided: accuracy_drop ort w4a4*were the true drop the one seen, about * samples would decide"]
    )


def test_no_gate_is_no_pass(run: Run, pytester: pytest.Pytester) -> None:
    report = sample()
    write(pytester.path / "report.json", report | {"results": [], "gates": [], "verdict": "undecided"})
    result = run("--s2d-report", ".")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*asks for no gate, so nothing was decided*"])


def test_a_baseline(run: Run, pytester: pytest.Pytester) -> None:
    write_baseline(pytester.path / "baseline.json", baseline_of(sample(lost=2), tolerance=3.0)[0])
    write(pytester.path / "report.json", sample(lost=60))
    result = run("--s2d-report", ".", "--s2d-baseline", "baseline.json", "-k", "baseline_accuracy")
    result.assert_outcomes(passed=1, failed=1, deselected=10)
    result.stdout.fnmatch_lines(["fail: baseline_accuracy ort w4a4*in the baseline*lost 58, gained 0*"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--s2d-report", "nowhere.json"), "nowhere.json: no such file"),
        (("--s2d-report", "broken.json"), "broken.json: truncated, or not JSON"),
        (("--s2d-baseline", "b.json"), "--s2d-baseline belongs to --s2d-report or --s2d-recipe"),
        (("--s2d-report", ".", "--s2d-baseline", "b.json"), "b.json: no such file"),
    ],
)
def test_what_is_wrong_is_one_sentence(run: Run, pytester: pytest.Pytester, arguments: Any, words: str) -> None:
    write(pytester.path / "report.json", sample())
    (pytester.path / "broken.json").write_text("{")
    result = run(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {words}" in result.stderr.str()
    assert "Traceback" not in result.stderr.str()


def test_the_fixture_judges_any_two_models(run: Run, pytester: pytest.Pytester) -> None:
    write(pytester.path / "report.json", sample(lost=40))
    pytester.makepyfile(
        """
        def test_equal(s2d_gate):
            drop = s2d_gate.paired([1] * 500, [1] * 499 + [0], limit=0.02)
            assert drop.lost == 1

        def test_too_few(s2d_gate):
            s2d_gate.paired([True] * 30, [True] * 30, limit=0.02)

        def test_worse(s2d_gate):
            s2d_gate.paired([0.9 + i / 1e4 for i in range(50)], [0.8] * 50, limit=0.05)

        def test_report(s2d_gate):
            s2d_gate.report("report.json")
        """
    )
    result = run()
    result.assert_outcomes(passed=1, failed=3)
    result.stdout.fnmatch_lines(["undecided: drop 0.0, limit 0.02;*needs * samples to pass it*"])
    result.stdout.fnmatch_lines(["fail: drop 0.1*limit 0.05;*"])
    result.stdout.fnmatch_lines(["fail: accuracy_drop ort w4a4*"])


def test_a_recipe_is_run_and_judged(run: Run, pytester: pytest.Pytester) -> None:
    recipe = TINY | {"quantize": {"precisions": ["w8a8"]}, "gates": {"accuracy_drop": 50.0}}
    (pytester.path / "tiny.yaml").write_text(yaml.safe_dump(recipe))
    result = run("--s2d-recipe", "tiny.yaml", "--s2d-output", "out")
    result.assert_outcomes(passed=1)
    assert (pytester.path / "out" / "report.html").is_file()
    broken = run("--s2d-recipe", "nowhere.yaml")
    broken.assert_outcomes(failed=1)
    broken.stdout.fnmatch_lines(["no recipe 'nowhere.yaml'*"])
    assert "Traceback" not in broken.stdout.str()


def test_unused_it_loads_nothing() -> None:
    code = f"import sys, s2d_deploy.pytest_plugin\nprint(*[n for n in {HEAVY!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
