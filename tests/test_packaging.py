"""What is installed: every module of the three folders and nothing else, and an import that stays lean."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
import warnings
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import s2d_deploy
from s2d_deploy.registry import RUNTIMES, TARGETS

ROOT = Path(__file__).parent.parent
SOURCES = {"s2d_deploy": "s2d_deploy", "export": "s2d_deploy/export", "runtimes": "s2d_deploy/runtimes"}
HEAVY = ["torch", "transformers", "onnx", "onnxscript", "sklearn", "matplotlib"]
RUNTIME_PACKAGES = ["onnxruntime", "tvm", "tensorrt", "tensorrt_rtx", "modelopt", "openvino", "nncf"]


def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def source_files() -> dict[str, Path]:
    """Path in the wheel -> file in the checkout, for everything that an installed package must have."""
    return {
        f"{place}/{file.relative_to(ROOT / folder).as_posix()}": file
        for folder, place in SOURCES.items()
        for file in (ROOT / folder).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and not file.name.startswith(".")
    }


def loaded_after(statement: str, names: list[str]) -> list[str]:
    """Which of `names` a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*[n for n in {names!r} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_declared_packages_are_the_folders_with_modules() -> None:
    tool = pyproject()["tool"]["setuptools"]
    declared = {ROOT / tool["package-dir"].get(name, name.replace(".", "/")) for name in tool["packages"]}
    present = {module.parent for folder in SOURCES for module in (ROOT / folder).rglob("*.py")}
    assert present == declared
    assert all((folder / "__init__.py").is_file() for folder in present)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, which is built from a copy of the sources: what a release does."""
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    # Without isolation: setuptools comes from the environment, and nothing is fetched.
    command = [sys.executable, "-m", "build", "--no-isolation", str(checkout)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = (checkout / "dist").glob("*.whl")
    return built


def test_wheel_holds_every_file_and_no_generic_top_level_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"s2d_deploy-{s2d_deploy.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"s2d_deploy", info}
    assert {name for name in names if not name.startswith(info)} == set(source_files())
    assert {"s2d_deploy/export/__init__.py", "s2d_deploy/runtimes/__init__.py", "s2d_deploy/py.typed"} <= names
    assert f"{info}/licenses/LICENSE" in names


def test_the_wheel_brings_the_pytest_plugin(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    # Found by its entry point, in a process that knows the unpacked wheel only.
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert "--s2d-report=PATH" in done.stdout, done.stdout + done.stderr


def test_unpacked_wheel_imports_from_itself(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import s2d_deploy.export, s2d_deploy.runtimes; print(s2d_deploy.export.__file__, s2d_deploy.runtimes.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert all(Path(place).is_relative_to(tmp_path) for place in done.stdout.split()), done.stdout


def test_import_loads_neither_torch_nor_a_runtime() -> None:
    assert loaded_after("import s2d_deploy", HEAVY + RUNTIME_PACKAGES) == []


def test_command_line_starts_without_torch_or_a_runtime() -> None:
    assert loaded_after("import s2d_deploy.cli", HEAVY + RUNTIME_PACKAGES) == []


@pytest.mark.parametrize("module", [*RUNTIMES.values(), *TARGETS.values()])
def test_adapters_and_targets_import_their_runtime_only_when_used(module: str) -> None:
    assert loaded_after(f"import {module}", RUNTIME_PACKAGES) == []


def test_probe_sees_what_an_import_loads() -> None:
    assert loaded_after("import json", ["json", "torch"]) == ["json"]


def test_public_names() -> None:
    assert s2d_deploy.__all__ == [
        "Grid",
        "PerAxis",
        "PerBlock",
        "PerTensor",
        "PerToken",
        "S2DDeployError",
        "__version__",
        "load_runtime",
        "load_target",
    ]
    assert dir(s2d_deploy) == sorted(s2d_deploy.__all__)
    assert all(getattr(s2d_deploy, name) is not None for name in s2d_deploy.__all__)
    with pytest.raises(AttributeError, match=r"module 's2d_deploy' has no attribute 'load_everything'"):
        _ = s2d_deploy.load_everything


def test_version_is_the_declared_one() -> None:
    assert s2d_deploy.__version__ == pyproject()["project"]["version"]
    assert f"## {s2d_deploy.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_registry_tables_name_modules_with_the_right_constant() -> None:
    for table, constant in ((RUNTIMES, "RUNTIME"), (TARGETS, "TARGET")):
        for name, module in table.items():
            assert getattr(importlib.import_module(module), constant).name == name


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_.-]", requirement, maxsplit=1)[0] for requirement in requirements}


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_no_file_is_named_after_a_dependency() -> None:
    """Run by its path, such a file would import itself instead of the package."""
    project = pyproject()["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    wanted = {canonical(name) for name in requirement_names(project["dependencies"] + extras)}
    imported = {name for name, owners in packages_distributions().items() if wanted & {canonical(o) for o in owners}}
    assert {"torch", "yaml", "PIL", "onnxruntime", "tvm"} <= imported
    # tensorrt_rtx lives in a sub-distribution; tensorrt, openvino and nncf are not installed by `all`.
    taken = imported - {"s2d_deploy"} | set(RUNTIME_PACKAGES)
    files = [file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]
    assert [file for file in files if file.stem in taken] == []
    scripts = [file for folder in ("export", "runtimes", "benchmarks") for file in (ROOT / folder).glob("*.py")]
    assert [file for file in scripts if file.stem in taken | set(sys.stdlib_module_names)] == []


def test_extra_all_names_only_extras() -> None:
    extras = pyproject()["project"]["optional-dependencies"]
    assert set(extras) == {"ort", "tvm", "tensorrt", "modelopt", "report", "bench", "all", "dev"}
    (everything,) = extras["all"]
    inside = re.fullmatch(r"s2d-deploy\[(.*)\]", everything)
    assert inside is not None
    assert set(inside[1].split(",")) == set(extras) - {"all", "dev", "bench"}


def test_warnings_of_our_own_modules_are_errors() -> None:
    with pytest.raises(UserWarning, match="ours"):
        warnings.warn_explicit("ours", UserWarning, "grid.py", 1, module="s2d_deploy.grid")
    with pytest.warns(UserWarning, match="theirs"):
        warnings.warn_explicit("theirs", UserWarning, "other.py", 1, module="other")
