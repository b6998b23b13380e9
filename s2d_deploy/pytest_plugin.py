"""pytest plugin: gates of a model as tests of whatever suite a project has already. Off unless it is asked for.

    pytest --s2d-report runs/mine                     one test for each gate of a finished run
    pytest --s2d-recipe my.yaml                       runs the recipe (or resumes it), then judges it, as one test
    pytest --s2d-report runs/mine --s2d-baseline baseline.json

The same as ini options: ``s2d_report``, ``s2d_recipe``, ``s2d_baseline``, ``s2d_output``. And in a test of one's own,
for any two models judged on the same samples, ours or not:

    def test_int8_is_no_worse(s2d_gate):
        s2d_gate.paired(float_correct, int8_correct, limit=0.01)

A gate that failed fails, and so does one that is undecided (the message says how many samples it needs); a runtime that
was not there skips. Loading this module imports pytest and nothing of ours beyond names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from s2d_deploy.paired import PairedDrop

_OPTIONS = {
    "report": "judge this finished run: its folder, or a report.json",
    "recipe": "run this recipe, or resume it, and judge it",
    "baseline": "compare with this committed baseline, too",
    "output": "run folder of the recipe (default: runs/<recipe name>)",
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options and ini keys: ``--s2d-report`` and ``s2d_report``, and so on."""
    group = parser.getgroup("s2d-deploy", "gates of low-bit models")
    for name, text in _OPTIONS.items():
        group.addoption(f"--s2d-{name}", metavar="PATH", default=None, help=text)
        parser.addini(f"s2d_{name}", text, default="")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    """Add one test for each gate, where a report or a recipe is named."""
    report, recipe, baseline = (_option(config, name) for name in ("report", "recipe", "baseline"))
    if not report and not recipe:
        if baseline:
            raise pytest.UsageError("--s2d-baseline belongs to --s2d-report or --s2d-recipe")
        return
    if report:
        for name, gate in _gates_of(_judged(report, baseline)):
            items.append(GateItem.from_parent(session, name=name, nodeid=name, place=report, gate=gate))
    if recipe:
        name = f"s2d-deploy::run[{recipe}]"
        items.append(
            RunItem.from_parent(
                session, name=name, nodeid=name, place=recipe, output=_option(config, "output"), baseline=baseline
            )
        )


class _Item(pytest.Item):
    def __init__(self, *, place: str, **more: Any) -> None:
        super().__init__(**more)
        self.place = place

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The sentence alone for what is ours, a traceback for a bug."""
        from s2d_deploy.errors import S2DDeployError

        if isinstance(excinfo.value, S2DDeployError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """The report or the recipe, and the gate."""
        return Path(self.place).absolute(), None, self.name


class GateItem(_Item):
    """One gate of a report."""

    def __init__(self, *, gate: Mapping[str, Any], **more: Any) -> None:
        super().__init__(**more)
        self.gate = gate

    def runtest(self) -> None:
        """Fail where it did not pass; skip a result that was not there."""
        if self.gate["name"] == "available":
            pytest.skip(str(self.gate["evidence"]))
        if self.gate["verdict"] != "pass":
            pytest.fail(_sentence(self.gate), pytrace=False)


class RunItem(_Item):
    """A whole recipe: run, then judged."""

    def __init__(self, *, output: str, baseline: str, **more: Any) -> None:
        super().__init__(**more)
        self.output, self.baseline = output, baseline

    def runtest(self) -> None:
        """Run, and fail with every gate that did not pass."""
        outcome = _run(self.place, Path(self.output) if self.output else None, self.baseline)
        self.add_report_section("call", "s2d-deploy", "\n".join(str(path) for path in outcome.files))
        _require(outcome.report, [str(error) for error in outcome.errors])


class S2DGate:
    """What the fixture `s2d_gate` gives."""

    def paired(self, first: Sequence[float], second: Sequence[float], *, limit: float) -> PairedDrop:
        """Fail unless the second model loses at most `limit` against the first, on the same samples.

        The whole 95 % interval must lie within the limit, so too few samples fail; the message says how many it takes.

        Args:
            first: outcomes of the reference, one for each sample: 1 and 0 (or True, False) for right and wrong, or
                grades of which more is better.
            second: outcomes of the model on trial, of the same samples in the same order.
            limit: largest drop of the mean that is accepted.

        Returns:
            The drop with its 95 % interval.
        """
        from s2d_deploy.gate import paired_finding
        from s2d_deploy.paired import paired_drop

        a, b = ([float(v) for v in values] for values in (first, second))
        finding = paired_finding(a, b, limit)
        verdict = finding.verdict or finding.by_interval
        if verdict != "pass":
            pytest.fail(f"{verdict}: drop {finding.value}, limit {limit}; {finding.evidence}", pytrace=False)
        return paired_drop(a, b)

    def report(self, path: str | Path, *, baseline: str | Path | None = None) -> dict[str, Any]:
        """Fail unless every gate of a finished run passes. Returns the report."""
        judged = _judged(str(path), str(baseline or ""))
        _require(judged, [])
        return judged

    def recipe(
        self, recipe: str | Path, *, output: str | Path | None = None, baseline: str | Path | None = None
    ) -> dict[str, Any]:
        """Run a recipe, or resume it; fail unless no target broke and every gate passes. Returns the report."""
        outcome = _run(str(recipe), Path(output) if output else None, str(baseline or ""))
        _require(outcome.report, [str(error) for error in outcome.errors])
        return dict(outcome.report)


@pytest.fixture
def s2d_gate() -> S2DGate:
    """Gates in a test of one's own: ``paired``, ``report``, ``recipe``."""
    return S2DGate()


def _option(config: pytest.Config, name: str) -> str:
    return str(config.getoption(f"--s2d-{name}") or config.getini(f"s2d_{name}") or "")


def _judged(path: str, baseline: str) -> dict[str, Any]:
    """The report, judged again, with the baseline's rows."""
    from s2d_deploy.errors import S2DDeployError
    from s2d_deploy.gating import BaselineOptions, apply_baseline
    from s2d_deploy.judge import judged_again
    from s2d_deploy.report import read_report

    try:
        report = judged_again(read_report(Path(path)))
        return apply_baseline(report, BaselineOptions(Path(baseline) if baseline else None))[0]
    except S2DDeployError as error:
        raise pytest.UsageError(str(error)) from error


def _run(recipe: str, output: Path | None, baseline: str) -> Any:
    from dataclasses import replace

    from s2d_deploy.console import Display
    from s2d_deploy.gating import BaselineOptions, apply_baseline, write_files
    from s2d_deploy.recipe import load_recipe

    options = BaselineOptions(Path(baseline) if baseline else None)
    options.check()
    resolved = load_recipe(recipe)
    # Only now: they take seconds, and a recipe may be wrong at once.
    from s2d_deploy.host import versions
    from s2d_deploy.pipeline import Pipeline
    from s2d_deploy.run import run
    from s2d_deploy.store import RunFolder

    folder = output or Path("runs") / resolved.name
    with RunFolder(folder, {k: v for k, v in versions().items() if v is not None}) as store:
        store.claim(resolved.document())
        outcome = run(Pipeline(resolved, store, Display(quiet=True)), command=["s2d-deploy", "run", recipe])
        report, _ = apply_baseline(outcome.report, options)
        if report["gates"] != outcome.report["gates"]:
            write_files(report, folder=outcome.files[0].parent)
    return replace(outcome, report=report)


def _gates_of(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and gates; results that were not available as skipped ones. No gate at all is a failure, not a pass."""
    for gate in report["gates"]:
        yield f"s2d-deploy::{gate['name']}[{_place(gate)}]", gate
    for row in report["results"]:
        if row["status"] == "unavailable":
            missing = {"name": "available", "evidence": row.get("reason") or "no reason given", **_where(row)}
            yield f"s2d-deploy::available[{_place(row)}]", missing
    if not report["gates"]:
        nothing = {"name": "any gate", "verdict": "undecided", "value": None, "limit": None}
        yield "s2d-deploy::any-gate", {**nothing, "evidence": "the recipe asks for no gate, so nothing was decided"}


def _where(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"target": row["target"], "precision": row["precision"]}


def _place(row: Mapping[str, Any]) -> str:
    return "-".join(str(row[key]) for key in ("target", "precision") if row.get(key)) or "run"


def _require(report: Mapping[str, Any], errors: Sequence[str]) -> None:
    open_ = [_sentence(gate) for gate in report["gates"] if gate["verdict"] != "pass"]
    if not report["gates"]:
        open_.append("undecided: the recipe asks for no gate, so nothing was decided")
    if errors or open_:
        pytest.fail("\n".join([*errors, *open_]), pytrace=False)


def _sentence(gate: Mapping[str, Any]) -> str:
    where = " ".join(str(gate[key]) for key in ("target", "precision") if gate.get(key))
    value, limit = gate.get("value"), gate.get("limit")
    return f"{gate['verdict']}: {gate['name']} {where}: value {value}, limit {limit}; {gate['evidence']}"
