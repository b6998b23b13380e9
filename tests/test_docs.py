"""What the documents promise exists: links, commands, make targets, extras."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
WORKFLOW = ROOT / "docs" / "ci" / "accuracy-gate.yml"
# What a reader pastes: the front page, the contributors' page, and the workflow to copy.
COMMANDS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", WORKFLOW]

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")
FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`[^`\n]+`")
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)
VERB = re.compile(r"(?<![\w/.'\"-])s2d-deploy +([a-z][a-z-]*)")
TARGET = re.compile(r"(?<![\w-])make +([a-z][a-z-]*)")
EXTRAS = re.compile(r"(?:s2d-deploy|\.)\[([a-z, ]+)\]")


def prose(text: str) -> str:
    return SPAN.sub("", FENCE.sub("", text))


def code(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".md":
        return "\n".join(line.split("#")[0] for line in text.splitlines())
    return "\n".join([*(match[0] for match in FENCE.finditer(text)), *SPAN.findall(FENCE.sub("", text))])


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def broken_links(document: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (document.parent / place) if place else document
        if not target.exists():
            broken.append(link)
        elif anchor and target.suffix == ".md":
            headings = HEADING.findall(FENCE.sub("", target.read_text(encoding="utf-8")))
            if anchor not in {slug(heading) for heading in headings}:
                broken.append(link)
    return broken


@cache
def verb_exists(verb: str) -> bool:
    command = [sys.executable, "-c", "import sys; from s2d_deploy.cli import main; sys.exit(main())", verb, "--help"]
    return subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode == 0


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `heading`, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#a-heading-here) [c](https://example.org/x) `[d](in-code.md)`\n"
        "[e](missing.md) [f](other.md#no-such-heading) [g](#nowhere)\n"
    )
    assert broken_links(page) == ["missing.md", "other.md#no-such-heading", "#nowhere"]


def test_every_command_named_in_the_documents_exists() -> None:
    verbs = {verb for path in COMMANDS for verb in VERB.findall(code(path))}
    assert {"run", "doctor"} <= verbs
    assert sorted(verb for verb in verbs if not verb_exists(verb)) == []


def test_an_unknown_command_is_seen() -> None:
    assert not verb_exists("run-backwards")


def test_every_make_target_named_in_the_documents_exists() -> None:
    named = {target for path in COMMANDS for target in TARGET.findall(code(path))}
    assert {"test", "demo"} <= named
    assert named - make_targets() == set()


def test_every_phony_make_target_is_listed_by_help() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert set(phony[1].split()) == make_targets()


def test_every_extra_named_in_the_documents_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {
        extra.strip()
        for path in [*DOCUMENTS, WORKFLOW]
        for extras in EXTRAS.findall(path.read_text(encoding="utf-8"))
        for extra in extras.split(",")
    }
    assert named, "the workflow installs at least one extra"
    assert named <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    "path", [WORKFLOW, *sorted((ROOT / ".github" / "workflows").glob("*.yml"))], ids=lambda p: p.name
)
def test_workflows_are_whole(path: Path) -> None:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    # YAML 1.1 reads the key `on` as a boolean.
    assert set(document) == {"name", True, "permissions", "jobs"}
    for job in document["jobs"].values():
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])


def test_the_gate_workflow_fails_by_exit_code_and_keeps_the_report() -> None:
    (job,) = yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"].values()
    steps = job["steps"]
    (gate,) = [step for step in steps if "s2d-deploy run" in step.get("run", "")]
    assert "continue-on-error" not in gate
    assert "||" not in gate["run"]
    (upload,) = [step for step in steps if "upload-artifact" in step.get("uses", "")]
    assert upload["if"] == "always()"
    assert {"report.html", "junit.xml"} <= {Path(line).name for line in upload["with"]["path"].split()}
    assert steps.index(upload) > steps.index(gate)
