"""junit.xml against the rules of its strictest common consumer.

Jenkins validates with junit-10.xsd; GitLab, Azure and the GitHub actions read a subset of its names. The table says
what that schema allows, in our words: an attribute or child that is not in it makes Jenkins refuse the whole file.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from gate_sample import sample
from report_sample import sample_report

from s2d_deploy.junit import to_junit
from s2d_deploy.report import to_json, validate
from s2d_deploy.report_markdown import to_markdown

# element -> (required attributes, further attributes, children, whether text may stand in it)
RULES: dict[str, tuple[set[str], set[str], set[str], bool]] = {
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}, False),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {"time", "skipped", "timestamp", "hostname", "id", "package", "group", "file", "log", "url"},
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
        False,
    ),
    "testcase": (
        {"name"},
        {"classname", "time", "group"},
        {"skipped", "error", "failure", "system-out", "system-err"},
        False,
    ),
    "failure": (set(), {"type", "message"}, set(), True),
    "skipped": (set(), {"type", "message"}, set(), True),
}


def violations(root: ET.Element) -> list[str]:
    found = []
    for element in root.iter():
        required, further, children, text = RULES[element.tag]
        found += [f"{element.tag} lacks {name}" for name in required - set(element.attrib)]
        found += [f"{element.tag} has {name}" for name in set(element.attrib) - required - further]
        found += [f"{element.tag} holds {child.tag}" for child in element if child.tag not in children]
        if not text and (element.text or "").strip():
            found.append(f"{element.tag} holds text")
        counts = [element.get(name, "0") for name in ("tests", "failures", "errors", "skipped")]
        found += [f"{element.tag}: {count!r} is no count" for count in counts if not count.isdigit()]
        if not re.fullmatch(r"[0-9]*(\.[0-9]*)?", element.get("time", "0")):
            found.append(f"{element.tag}: time {element.get('time')!r}")
        if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", element.get("timestamp", "2026-01-02T03:04:05")):
            found.append(f"{element.tag}: timestamp {element.get('timestamp')!r}")
    return found


def parsed(document: dict[str, Any]) -> ET.Element:
    return ET.fromstring(to_junit(validate(to_json(document))).encode())  # noqa: S314 - our own text


@pytest.mark.parametrize("document", [sample_report(), sample(), sample(lost=40), sample(lost=14)])
def test_a_strict_consumer_takes_it(document: dict[str, Any]) -> None:
    assert violations(parsed(document)) == []


def test_the_rules_see_what_breaks_them() -> None:
    root = parsed(sample_report())
    root.set("skipped", "1")
    root[0].attrib.pop("errors")
    root[0][0].text = "words"
    ET.SubElement(root[0], "failure")
    assert sorted(violations(root)) == [
        "testcase holds text",
        "testsuite holds failure",
        "testsuite lacks errors",
        "testsuites has skipped",
    ]


def test_every_gate_is_a_case_and_the_undecided_fail() -> None:
    document = sample(lost=14)
    root = parsed(document)
    cases = list(root[0])
    assert len(cases) == len(document["gates"])
    (failure,) = root.iter("failure")
    assert failure.get("type") == "undecided"
    assert "95 % interval of the drop" in str(failure.text)


def test_many_gates_are_folded_in_a_pull_request_and_the_others_stand_first() -> None:
    document = sample(lost=40)
    few = to_markdown(validate(document))
    assert "<details>" not in few
    document["gates"] += [{**document["gates"][0], "target": f"t{i}"} for i in range(20)]
    many = to_markdown(validate(document))
    shown, _, folded = many.partition("<details><summary>27 gates passed</summary>\n\n|")
    assert "accuracy\\_drop | ort w4a4" in shown
    assert "t19 w8a8" in folded.partition("</details>")[0]
    assert "pass |" not in shown
