"""Doctor: every runtime is asked, and none can break the answer."""

from __future__ import annotations

import io
import json
import sys
import types
from importlib import import_module
from importlib.util import find_spec

import pytest
from rich.console import Console

from s2d_deploy import doctor, registry


class Adapter:
    """A runtime as a third party might write it; `broken` names the questions that raise."""

    name = "toy"

    def __init__(self, broken: tuple[str, ...] = (), reason: str | None = None, version: str = "1.0") -> None:
        self.broken, self.reason, self.installed = broken, reason, version

    def _answer(self, what: str, value):
        if what in self.broken:
            raise OSError(f"lib{what}.so: cannot open shared object file")
        return value

    def available(self) -> str | None:
        return self._answer("available", self.reason)

    def version(self) -> str:
        return self._answer("version", self.installed)

    def device(self) -> str:
        return self._answer("device", "cpu [2 threads]")

    def rung(self, precision: str) -> str | None:
        return self._answer("rung", {"w8a8": "native", "w4a4": "emulated"}.get(precision))


@pytest.fixture
def plug(monkeypatch):
    def plug(adapter: object) -> None:
        module = types.ModuleType("toy_runtime_module")
        if adapter is not None:
            module.RUNTIME = adapter
        monkeypatch.setitem(sys.modules, "toy_runtime_module", module)
        monkeypatch.setitem(registry.RUNTIMES, "toy", "toy_runtime_module")

    return plug


def shown(report: dict, width: int = 200) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(doctor.render(report))
    return console.export_text()


def test_the_real_machine():
    report = doctor.examine()
    assert [entry["name"] for entry in report["runtimes"]] == list(registry.RUNTIMES)
    json.dumps(report, allow_nan=False)
    text = shown(report)
    for entry in report["runtimes"]:
        assert entry["name"] in text
        assert set(entry["rungs"]) == set(doctor.PRECISIONS)
        assert entry["available"] == (entry["reason"] is None)
        if find_spec(registry.RUNTIMES[entry["name"]]) is not None:
            adapter = import_module(registry.RUNTIMES[entry["name"]]).RUNTIME
            assert entry["problems"] == []
            assert entry["version"] == (adapter.version() or None)
            assert entry["rungs"] == {p: adapter.rung(p) for p in doctor.PRECISIONS}
    for package in doctor.OPTIONAL:
        assert package in text


def test_a_working_adapter(plug):
    plug(Adapter())
    entry = doctor.examine_runtime("toy")
    assert entry == {
        "name": "toy",
        "available": True,
        "reason": None,
        "version": "1.0",
        "device": "cpu [2 threads]",
        "rungs": {"w8a8": "native", "w4a16": None, "w4a8": None, "w4a4": "emulated"},
        "install": None,
        "problems": [],
    }
    text = shown(doctor.examine())
    row = next(line for line in text.splitlines() if "toy" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "toy",
        "1.0",
        "native",
        "-",
        "-",
        "emulated",
    ]
    assert "  toy: cpu [2 threads]" in text  # brackets are no markup


@pytest.mark.parametrize("question", ["available", "version", "device", "rung"])
def test_a_broken_answer_is_reported_beside_the_others(plug, question):
    plug(Adapter(broken=(question,)))
    report = doctor.examine()
    entry = report["runtimes"][-1]
    assert not entry["available"]
    assert f"lib{question}.so: cannot open shared object file" in entry["reason"]
    assert entry["reason"].startswith("the adapter is broken: ")
    assert (entry["version"] == "1.0") == (question != "version")
    assert (entry["rungs"]["w8a8"] == "native") == (question != "rung")
    assert f"lib{question}.so" in shown(report, width=400)


def test_an_adapter_that_does_not_import(plug, monkeypatch):
    plug(None)  # the module is there, its RUNTIME is not
    assert "load: AttributeError" in doctor.examine_runtime("toy")["reason"]
    monkeypatch.setitem(registry.RUNTIMES, "toy", "no_such_module_of_ours")
    assert (
        "load: ModuleNotFoundError: No module named 'no_such_module_of_ours'"
        in doctor.examine()["runtimes"][-1]["reason"]
    )


def test_what_is_missing_comes_with_its_pip_line(plug, monkeypatch):
    plug(Adapter(reason="onnxruntime is not installed", version=""))
    monkeypatch.setitem(doctor.INSTALL, "toy", "pip install 's2d-deploy[toy]'")
    report = doctor.examine()
    entry = report["runtimes"][-1]
    assert (entry["available"], entry["version"], entry["install"]) == (False, None, "pip install 's2d-deploy[toy]'")
    text = shown(report)
    assert "onnxruntime is not installed" in text
    assert "pip install 's2d-deploy[toy]'" in text


def test_installed_without_its_device_needs_no_pip_line(plug, monkeypatch):
    plug(Adapter(reason="no NVIDIA driver: engines can be built, not run"))
    monkeypatch.setitem(doctor.INSTALL, "toy", "pip install 's2d-deploy[toy]'")
    entry = doctor.examine_runtime("toy")
    assert (entry["available"], entry["version"], entry["install"]) == (False, "1.0", None)
    assert entry["rungs"]["w8a8"] == "native"


def test_optional_packages(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL, "no-such-package-of-ours", ("nothing", "pip install nothing"))
    entries = {entry["name"]: entry for entry in doctor.examine()["optional"]}
    assert entries["no-such-package-of-ours"] == {
        "name": "no-such-package-of-ours",
        "version": None,
        "purpose": "nothing",
        "install": "pip install nothing",
    }
    assert all((entry["version"] is None) == (entry["install"] is not None) for entry in entries.values())


def test_gpus_are_shown():
    report = doctor.examine()
    report["host"]["gpu"] = [
        {"name": "NVIDIA H200", "compute_capability": "9.0", "driver": "570.1", "memory_bytes": None},
        {"name": None, "compute_capability": None, "driver": None, "memory_bytes": None},
    ]
    text = shown(report)
    assert "NVIDIA H200 (SM90, driver 570.1)" in text
    assert "unknown (SM?, driver ?)" in text
