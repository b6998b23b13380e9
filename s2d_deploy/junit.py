"""junit.xml: gates as test cases, for any CI that already shows test results.

A failed gate is a failure; an undecided one is a failure of type "undecided", because CI must not pass on
it; a result that was unavailable is a skipped case with the reason. Times are 0: a gate takes none.
"""

from __future__ import annotations

from datetime import UTC, datetime
from xml.etree import ElementTree as ET

from s2d_deploy import report_format as fmt
from s2d_deploy.markup import plain
from s2d_deploy.report_schema import Gate, Report, Result
from s2d_deploy.report_summary import gate_place


def to_junit(report: Report) -> str:
    """The document as JUnit XML (the dialect that Jenkins, GitLab and GitHub actions read), ending with a newline."""
    suites = [
        ("gates", [_gate_case(gate) for gate in report.gates]),
        ("results", [_result_case(r) for r in report.results if r.status == "unavailable"]),
    ]
    totals = _totals([case for _, cases in suites for case in cases])
    del totals["skipped"]  # the schema that Jenkins validates with has it for single suites only
    root = ET.Element("testsuites", {"name": "s2d-deploy", **totals})
    for name, cases in suites:
        suite = ET.SubElement(root, "testsuite", {"name": f"s2d-deploy {name}", **_totals(cases)})
        if timestamp := _timestamp(report.created):
            suite.set("timestamp", timestamp)
        suite.extend(cases)
    ET.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _gate_case(gate: Gate) -> ET.Element:
    case = _case(f"gates.{_place(gate.target, gate.precision)}", f"{gate.name} [{gate_place(gate)}]")
    if gate.verdict == "pass":
        return case
    value, limit = fmt.anything(gate.value), fmt.anything(gate.limit)
    failure = ET.SubElement(case, "failure")
    failure.set("type", "undecided" if gate.verdict == "undecided" else "gate")
    failure.set("message", plain(f"{gate.name} on {gate_place(gate)}: {gate.verdict}, value {value}, limit {limit}"))
    failure.text = plain(f"value: {value}\nlimit: {limit}\nevidence: {fmt.anything(gate.evidence)}")
    return case


def _result_case(result: Result) -> ET.Element:
    place = _place(result.target, result.precision)
    case = _case(f"results.{place}", f"available [{result.target} {result.precision}]")
    ET.SubElement(case, "skipped", {"message": plain(result.reason or "no reason given")})
    return case


def _case(group: str, name: str) -> ET.Element:
    return ET.Element("testcase", {"classname": plain(f"s2d_deploy.{group}"), "name": plain(name), "time": "0"})


def _place(target: str | None, precision: str | None) -> str:
    # Consumers split class names at dots, so that a name with one would land in a package of its own.
    return ".".join(part.replace(".", "_") for part in (target, precision) if part) or "run"


def _timestamp(created: str | None) -> str | None:
    """UTC without offset or fraction, the one form that strict consumers take; None when there is none."""
    try:
        moment = datetime.fromisoformat(created or "")
        return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        return None


def _totals(cases: list[ET.Element]) -> dict[str, str]:
    found = {kind: sum(case.find(kind) is not None for case in cases) for kind in ("failure", "skipped")}
    return {
        "tests": str(len(cases)),
        "failures": str(found["failure"]),
        "errors": "0",
        "skipped": str(found["skipped"]),
        "time": "0",
    }
