"""The command line, used from a shell: help, output, resumption, and every way to get it wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command_line import TINY, Commands, Finished, contents, stages

from s2d_deploy.cli import cli, main

VERBS = (
    "doctor schema diagnose condition quantize export build verify bench gate report run audit compare".split()  # noqa: SIM905
)
STAGE_VERBS = tuple(v for v in VERBS if v not in ("doctor", "schema", "audit", "compare"))
CONSOLE = [sys.executable, "-c", "import sys; from s2d_deploy.cli import main; sys.exit(main())"]
HAS_ORT = importlib.util.find_spec("onnxruntime") is not None


def text(result) -> str:
    """stderr without the name of the run, on one line."""
    return " ".join(line for line in result.stderr.splitlines() if " -> " not in line)


def assert_clean(folder: Path, allowed: tuple[str, ...] = ()) -> None:
    """No finished stage but those allowed, and nothing half-written."""
    assert tuple(stages(folder)) == allowed if folder.exists() else not allowed
    assert not (folder / ".partial").exists() or not list((folder / ".partial").iterdir())
    assert not (folder / "report.json").exists()


# --- help ----------------------------------------------------------------------------------------------------


def test_help_is_fast_and_lists_the_verbs_in_order():
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        result = subprocess.run([*CONSOLE, "--help"], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5, seconds
    listed = re.findall(r"^  ([a-z]+)  +\S", result.stdout.partition("Commands:")[2].partition("Examples:")[0], re.M)
    assert listed == VERBS
    assert "..." not in result.stdout.partition("Commands:")[2]  # no sentence is cut off
    for code in ("0 ", "1 ", "2 ", "3 ", "70 ", "130 "):
        assert re.search(rf"^    {code}", result.stdout, re.M)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from s2d_deploy.cli import main; main(['run', '--help']);"
        "print([m for m in ('torch', 'numpy', 'onnx', 'pydantic', 'yaml', 'rich') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.endswith("[]\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb, capsys):
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    command = cli.commands[verb]
    assert len((command.help or "").split()) > 8
    assert command.short_help
    assert len(command.short_help) <= 60
    for parameter in command.params:
        if parameter.param_type_name == "option" and not parameter.hidden:
            assert parameter.help, parameter.name
            assert parameter.opts[0] in shown


# --- verbs are prefixes of one pipeline -----------------------------------------------------------------------


def test_a_run_says_what_it_did(finished: Finished):
    assert finished.result.code == 0
    assert list(finished.result.done)[:4] == ["train", "condition", "quantize/fp32", "onnx/fp32"]
    assert all(finished.result.done.values())
    for shown in ("reference", "w8a8", "w4a16", "verdict: pass"):
        assert shown in finished.result.stdout
    for name in ("report.json", "report.md", "report.html", "junit.xml"):
        assert str(finished.folder / name) in finished.result.stdout
        assert (finished.folder / name).stat().st_size > 0


@pytest.mark.parametrize("verb", STAGE_VERBS)
def test_a_second_time_does_no_work_and_json_is_one_document(finished: Finished, verb: str):
    before = stages(finished.folder)
    result = finished.commands(verb, "tiny.yaml", "-o", finished.folder, "--json")
    assert result.code == 0, result.stderr
    assert result.stdout.endswith("\n")
    assert result.json
    assert result.done
    assert all(result.done.values()), result.stderr
    assert stages(finished.folder) == before


@pytest.mark.parametrize("verb", ["doctor", "schema"])
def test_json_of_the_others(commands: Commands, verb: str):
    result = commands(verb, "--json")
    assert result.code == 0
    assert result.stderr == ""
    assert isinstance(result.json, dict)


def test_quiet_shows_no_progress(finished: Finished):
    assert finished.commands("quantize", "tiny.yaml", "-o", finished.folder, "--quiet").stderr == ""


def test_each_verb_adds_its_own_stages_and_redoes_none(finished: Finished):
    precisions = ("fp32", "w8a8", "w4a16")
    adds = {
        "diagnose": {"train", "diagnose"},
        "condition": {"condition"},
        "quantize": {
            "calibrate",
            *(f"quantize/{p}" for p in precisions),
            *(f"errors/{p}" for p in precisions if p != "fp32"),
        },
        "export": {*(f"onnx/{p}" for p in precisions), *(f"dialect/reference/{p}" for p in precisions)},
        "build": {f"export/reference/{p}" for p in precisions},
        "verify": {f"verify/reference/{p}" for p in precisions},
        "gate": set(),
    }
    before: dict[str, int] = {}
    for verb, after in finished.steps.items():
        assert set(after) - set(before) == adds[verb], verb
        assert {name: after[name] for name in before} == before
        before = after
    assert stages(finished.folder) == before


def test_a_changed_block_size_redoes_what_depends_on_it(finished: Finished, tmp_path: Path):
    folder = finished.copy(tmp_path / "run")
    flags = ("tiny.yaml", "-o", folder, "--set", "quantize.block_size=16")
    refused = finished.commands("verify", *flags)
    assert refused.code == 2
    assert "quantize.block_size: 32 -> 16" in refused.stderr
    result = finished.commands("verify", *flags, "--update")
    assert result.code == 0
    redone = {name for name, reused in result.done.items() if not reused}
    assert redone == {"quantize/w4a16", "onnx/w4a16", "export/reference/w4a16", "verify/reference/w4a16"}


def test_narrowing_flags_claim_no_other_recipe(finished: Finished):
    commands, where = finished.commands, ("tiny.yaml", "-o", finished.folder)
    narrow = commands("verify", *where, "--precision", "w8a8", "--target", "reference", "--json")
    assert narrow.code == 0, narrow.stderr
    assert [row["precision"] for row in narrow.json] == ["fp32", "w8a8"]
    assert commands("quantize", *where, "--precision", "fp32", "--json").json[0]["stage"] == "quantize/fp32"


def test_a_narrowed_report_leaves_the_whole_one(finished: Finished):
    commands, where = finished.commands, ("tiny.yaml", "-o", finished.folder)
    whole = finished.folder / "report.json"
    before = whole.read_bytes()
    part = commands("report", *where, "--precision", "w8a8", "--target", "reference", "--json")
    assert part.code == 0, part.stderr
    assert {row["precision"] for row in part.json["results"]} == {"fp32", "w8a8"}
    assert whole.read_bytes() == before
    assert (finished.folder / "parts" / "reference-w8a8" / "report.html").is_file()
    other = commands("verify", *where, "--threads", "3")
    assert other.code == 2
    assert "bench.threads: 1 -> 3" in other.stderr


def test_compare(finished: Finished, tmp_path: Path):
    where = finished.folder
    rows = finished.commands("compare", where, where / "report.json", "--json")
    assert rows.code == 0
    assert {row["change"] for row in rows.json} <= {0, None}
    assert "reference" in finished.commands("compare", where, where).stdout
    missing = finished.commands("compare", where, tmp_path)
    assert missing.code == 2
    assert f"{tmp_path / 'report.json'}: no such file" in missing.stderr


# --- kill, interrupt, resume ----------------------------------------------------------------------------------


def test_killed_again_and_again_it_resumes_to_the_same_bytes(finished: Finished, tmp_path: Path):
    """Here by `run`, there verb by verb; here in five processes, there without a kill."""
    folder = tmp_path / "killed"
    command = ("run", "tiny.yaml", "-o", folder)
    moments = [
        lambda: list(folder.glob(".partial/train-*")),
        lambda: (folder / "condition/manifest.json").exists(),
        lambda: list(folder.glob(".partial/onnx%2Fw8a8-*")),
        lambda: list(folder.glob(".partial/verify%2Freference%2Ffp32-*")),
    ]
    kept: dict[str, int] = {}
    for moment in moments:
        assert finished.commands.signalled(signal.SIGKILL, moment, *command).code == -signal.SIGKILL
        found = stages(folder)
        assert {name: found[name] for name in kept} == kept, "a finished stage was redone"
        kept = found
    assert {"train", "condition", "quantize/w4a16", "onnx/fp32"} <= set(kept)
    result = finished.commands(*command)
    assert result.code == 0, result.stderr
    assert {name for name, reused in result.done.items() if reused} == set(kept) & set(result.done)
    assert {name: stages(folder)[name] for name in kept} == kept
    assert not (folder / ".partial").exists() or not list((folder / ".partial").iterdir())
    ours, theirs = contents(folder), contents(finished.folder)
    assert ours == {name: blob for name, blob in theirs.items() if not name.startswith(("diagnose", "dialect"))}


def test_interrupt_is_a_sentence(commands: Commands, tmp_path: Path):
    folder = tmp_path / "interrupted"
    inside = lambda: list(folder.glob(".partial/onnx%2Ffp32-*"))  # noqa: E731
    result = commands.signalled(signal.SIGINT, inside, "export", "tiny.yaml", "-o", folder)
    assert result.code == 130
    assert "interrupted; finished stages are kept, run the same command to go on" in result.stderr
    assert "Traceback" not in result.stderr
    assert_clean(folder, ("condition", "quantize/fp32", "train"))


# --- bad input ------------------------------------------------------------------------------------------------

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, nan=False, scale=1.0, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc1, self.fc2 = nn.Conv2d(1, 8, 2, 2), nn.Linear(128, width), nn.Linear(width, 10)
        self.scale = scale
        if nan:
            self.fc1.weight.data[0] = float("nan")

    def forward(self, pixel_values):
        x = self.conv(pixel_values).flatten(1)
        return self.fc2(torch.relu(self.fc1(x) * self.scale) / self.scale)
"""


@pytest.fixture(scope="session")
def user(commands: Commands) -> Commands:
    """A user's own module and arrays: ``user.yaml``, some of them broken."""
    (commands.cwd / "usernet.py").write_text(NET)
    rng = np.random.default_rng(0)
    good = {
        "train.pixel_values": rng.normal(size=(32, 1, 8, 8)).astype(np.float32),
        "test.pixel_values": rng.normal(size=(8, 1, 8, 8)).astype(np.float32),
        "train.labels": rng.integers(0, 10, 32),
        "test.labels": rng.integers(0, 10, 8),
    }
    broken = good["train.pixel_values"].copy()
    broken[3] = np.nan
    none = {"train.pixel_values": good["train.pixel_values"][:0], "train.labels": good["train.labels"][:0]}
    for name, change in {
        "good": {},
        "labels": {"train.labels": np.full(32, 10)},
        "fractions": {"train.labels": np.full(32, 0.5)},
        "nan": {"train.pixel_values": broken},
        "empty": none,
        "shape": {"test.pixel_values": np.zeros((8, 3, 8, 8), np.float32)},
    }.items():
        np.savez(commands.cwd / f"{name}.npz", **(good | change))
    np.savez(commands.cwd / "names.npz", **{k.replace("pixel_values", "pixels"): v for k, v in good.items()})
    (commands.cwd / "text.npz").write_text("not a zip")
    commands.recipe(
        {
            "name": "user",
            "model": {"factory": "usernet:Net"},
            "data": {"kind": "npz", "path": "good.npz", "calibration_samples": 16, "batch_size": 8},
            "condition": {"method": "none"},
            "quantize": {"precisions": ["w8a8"]},
            "targets": ["reference"],
        },
        "user.yaml",
    )
    return commands


BAD_RECIPES = {
    "section": ("quantise.x=1", "unknown key 'quantise'", "did you mean 'quantize'?"),
    "key": ("quantize.blocksize=1", "unknown key 'quantize.blocksize'", "did you mean 'block_size'?"),
    "value": ("data.batch_size=many", "key 'data.batch_size'", "Found: 'many'"),
    "target": ("targets=[tvn]", "unknown target 'tvn'", "did you mean 'tvm'?"),
    "precision": ("quantize.precisions=[w4b4]", "unknown precision 'w4b4'", "w8a8, w4a16, w4a8, w4a4, nvfp4, mxfp4"),
    "calibration": ("data.calibration_samples=0", "key 'data.calibration_samples'", "Found: 0"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_bad_recipe(commands: Commands, tmp_path: Path, case: str):
    override, what, fix = BAD_RECIPES[case]
    result = commands("run", "tiny.yaml", "-o", tmp_path / "out", "--set", override)
    assert result.code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: tiny.yaml: ")
    assert what in result.stderr
    assert fix in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("run", "tiny.yaml", "--target", "tvn"), "unknown target 'tvn'. Expected: one of "),
        (("run", "tiny.yaml", "--precision", "w9a9"), "quantize.precisions: unknown precision 'w9a9'"),
        (("run", "digits-vitt"), "no recipe 'digits-vitt'. Expected: a YAML file, or one of digits-vit, minilm"),
        (("run", "tiny.yaml", "--set", "nonsense"), "--set 'nonsense'"),
        (("runn", "tiny.yaml"), "No such command 'runn'. Did you mean 'run'?"),
        (("run",), "Missing argument 'RECIPE'"),
        (("run", "tiny.yaml", "--threads", "0"), "Invalid value for '--threads'"),
    ],
)
def test_bad_arguments(commands: Commands, arguments: tuple[str, ...], what: str):
    result = commands(*arguments)
    assert result.code == 2
    assert result.stdout == ""
    assert what in result.stderr
    assert "Traceback" not in result.stderr


BAD_INPUTS = {
    "missing data": ("data.path=absent.npz", "data.path 'absent.npz' does not exist", "Fix: "),
    "foreign data": ("data.path=text.npz", "text.npz: not a readable .npz file", "Found: "),
    "labels": ("data.path=labels.npz", "32 training label(s) are out of range, the first at sample 0", "Found: 10"),
    "fractions": ("data.path=fractions.npz", "fractions.npz: train.labels", "integers of shape (n,)"),
    "nan data": ("data.path=nan.npz", "train.pixel_values has NaN or infinite values", "Fix: clean the data"),
    "no samples": ("data.path=empty.npz", "the training split is empty", "Fix: put samples into data.path"),
    "shapes": ("data.path=shape.npz", "the model refuses the samples of data", "pixel_values (2, 3, 8, 8)"),
    "names": ("data.path=names.npz", "the model refuses the samples of data", "unexpected keyword argument 'pixels'"),
    "nan weights": ("model.factory_arguments.nan=true", "NaN or infinite weights in 1 tensor(s): fc1.weight", "Fix: "),
    "infinite": ("model.factory_arguments.scale=1.0e+39", "output 'logits' is NaN or infinite", "8 of 8 samples"),
    "no module": ("model.factory=absent:Net", "model.factory 'absent:Net' cannot be imported", "set PYTHONPATH"),
    "arguments": (
        "model.factory_arguments.x=1",
        "model.factory 'usernet:Net' failed",
        "unexpected keyword argument 'x'",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_models_and_data(user: Commands, tmp_path: Path, case: str):
    override, what, more = BAD_INPUTS[case]
    # A model without classes in a config does not know how many labels there are; here they are told.
    recipe = "tiny.yaml" if case == "labels" else "user.yaml"
    extra = ("--set", "data.kind=npz") if case == "labels" else ()
    result = user("quantize", recipe, "-o", tmp_path / "out", "--set", override, *extra)
    assert result.code == 2, result.stderr
    assert result.stdout == ""
    assert f"error: {what}" in result.stderr or what in text(result)
    assert more in result.stderr
    assert "Traceback" not in result.stderr
    assert_clean(tmp_path / "out", ("condition",) if case == "infinite" else ())


def test_an_unknown_model_type(commands: Commands, tmp_path: Path):
    for override, what in {
        "model.config.model_type=vitt": "unknown model_type 'vitt'",
        "model.config.hidden_sizee=8": "vit has no field 'hidden_sizee'",
    }.items():
        result = commands("run", "tiny.yaml", "-o", tmp_path / "out", "--set", override)
        assert result.code == 2
        assert what in result.stderr
        assert_clean(tmp_path / "out")


def test_a_missing_checkpoint(user: Commands, tmp_path: Path):
    document = {**TINY, "model": {"pretrained": "./absent"}}
    del document["train"]
    user.recipe(document, "absent.yaml")
    result = user("condition", "absent.yaml", "-o", tmp_path / "out")
    assert result.code == 2
    assert "model.pretrained: './absent' is not a folder" in result.stderr
    assert "Fix: check the path." in result.stderr
    assert_clean(tmp_path / "out")


def test_a_width_that_blocks_do_not_divide(user: Commands, tmp_path: Path):
    flags = ("--set", "model.factory_arguments.width=24", "--precision", "w4a16")
    result = user("quantize", "user.yaml", "-o", tmp_path / "out", *flags)
    assert result.code == 2
    assert "width not divisible by the block size in 1 layer(s): fc2 (K = 24)" in result.stderr
    assert "Expected: a multiple of quantize.block_size = 32." in result.stderr
    assert_clean(tmp_path / "out", ("calibrate", "condition", "quantize/fp32"))


# --- folders and files ----------------------------------------------------------------------------------------


def test_the_folder_of_another_recipe(finished: Finished):
    before = contents(finished.folder)
    result = finished.commands("run", "tiny.yaml", "-o", finished.folder, "--set", "condition.steps=5")
    assert result.code == 2
    assert "holds the results of another recipe" in result.stderr
    assert "condition.steps: 4 -> 5" in result.stderr
    assert "Fix: choose another --output, or pass --update to redo what changed." in result.stderr
    assert contents(finished.folder) == before


def test_somebody_elses_folder(commands: Commands, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = commands("run", "tiny.yaml", "-o", tmp_path)
    assert result.code == 2
    assert f"{tmp_path} is not empty and not one of our output folders" in result.stderr
    assert "Found: thesis.txt." in result.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_truncated_manifest_of_the_run(finished: Finished, tmp_path: Path):
    folder = finished.copy(tmp_path / "run")
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])
    result = finished.commands("quantize", "tiny.yaml", "-o", folder)
    assert result.code == 2
    assert f"{path}: truncated, or not JSON" in result.stderr
    assert path.stat().st_size == 100


@pytest.mark.parametrize(
    ("verb", "spoilt", "by"),
    [
        ("quantize", "quantize/w8a8/plan.safetensors", None),
        ("condition", "condition/model.safetensors", "train/model.safetensors"),
        ("build", "onnx/w8a8/model.onnx", "onnx/fp32/model.onnx"),
        ("build", "export/reference/w8a8/manifest.json", "export/reference/fp32/manifest.json"),
    ],
)
def test_a_truncated_or_foreign_artifact_is_made_again(
    finished: Finished, tmp_path: Path, verb: str, spoilt: str, by: str | None
):
    folder = finished.copy(tmp_path / "run")
    path = folder / spoilt
    path.write_bytes(path.read_bytes()[:200] if by is None else (folder / by).read_bytes())
    result = finished.commands(verb, "tiny.yaml", "-o", folder)
    assert result.code == 0, result.stderr
    # Only the spoilt stage: what depends on it sees the same bytes as before.
    assert [name for name, reused in result.done.items() if not reused] == [spoilt.rpartition("/")[0]]
    assert contents(folder) == contents(finished.folder)


DISK = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
user, group = os.getuid(), os.getgid()
def skip(what):
    os.write(2, what.encode()); os._exit(77)
if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
    skip("no namespaces here")
try:
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        open(f"/proc/self/{name}", "w").write(line)
except OSError:
    skip("no namespaces here")
if libc.mount(b"none", sys.argv[sys.argv.index("-o") + 1].rpartition("/")[0].encode(), b"tmpfs", FLAGS, OPTIONS):
    skip("cannot mount here")
"""


@pytest.mark.parametrize(
    ("flags", "options", "what", "fix"),
    [
        (0, b"size=150k", "the disk is full", "free some space, or choose another --output, and run again: it resumes"),
        (1, b"size=150k", "the file system is read-only", "choose another --output"),
    ],
)
def test_a_disk_that_refuses(commands: Commands, tmp_path: Path, flags: int, options: bytes, what: str, fix: str):
    before = DISK.replace("FLAGS", str(flags)).replace("OPTIONS", repr(options))
    result = commands("run", "tiny.yaml", "-o", tmp_path / "out", before=before)
    if result.code == 77:
        pytest.skip(result.stderr)
    assert result.code == 2, result.stderr
    assert what in result.stderr
    assert f"Fix: {fix}." in result.stderr
    assert "Traceback" not in result.stderr


def test_a_limit_on_file_sizes_leaves_nothing_half_written(commands: Commands, tmp_path: Path):
    folder = tmp_path / "out"
    before = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, 1 << 15))"
    result = commands("run", "tiny.yaml", "-o", folder, before=before)
    assert result.code == 2
    assert "the file would exceed the allowed size" in result.stderr
    assert "Fix: raise the limit (ulimit -f), and run again: it resumes." in result.stderr
    assert "Traceback" not in result.stderr
    assert_clean(folder)
    assert commands("condition", "tiny.yaml", "-o", folder, "-q").code == 0  # and it resumes


# --- runtimes and targets -------------------------------------------------------------------------------------

WITHOUT_ORT = """
import importlib.machinery, importlib.metadata
finder = importlib.machinery.PathFinder
find = finder.find_spec
finder.find_spec = classmethod(
    lambda cls, name, path=None, target=None: None if name.startswith("onnxruntime") else find(name, path, target))
one = importlib.metadata.Distribution.from_name
def from_name(name):
    if name.startswith("onnxruntime"):
        raise importlib.metadata.PackageNotFoundError(name)
    return one(name)
importlib.metadata.Distribution.from_name = from_name
"""


def with_target(finished: Finished, **target: object) -> str:
    document = {**TINY, "targets": ["reference", target], "quantize": {"precisions": ["w8a8"]}}
    finished.commands.recipe(document, "targets.yaml")
    return "targets.yaml"


@pytest.mark.parametrize("required", [False, True])
def test_a_runtime_that_is_not_installed(finished: Finished, tmp_path: Path, required: bool):
    folder = finished.copy(tmp_path / "run")
    recipe = with_target(finished, name="ort", required=required)
    result = finished.commands("run", recipe, "-o", folder, "--update", "--json", before=WITHOUT_ORT)
    assert result.code == (3 if required else 0), result.stderr
    rows = {(r["target"], r["precision"]): r for r in result.json["results"]}
    assert rows["reference", "w8a8"]["status"] == "measured"
    missing = rows["ort", "w8a8"]
    assert missing["status"] == "unavailable"
    assert "onnxruntime is not installed" in missing["reason"]
    assert "pip install 's2d-deploy[ort]'" in missing["reason"]
    assert ("error: " in result.stderr) == required
    assert "Traceback" not in result.stderr
    assert json.loads((folder / "report.json").read_text())["results"] == result.json["results"]
    for verb in ("build", "verify"):
        asked = finished.commands(verb, recipe, "-o", folder, "--target", "ort", before=WITHOUT_ORT)
        assert asked.code == 3
        assert "pip install 's2d-deploy[ort]'" in asked.stdout + asked.stderr


@pytest.mark.skipif(not HAS_ORT, reason="onnxruntime is not installed")
def test_a_target_that_breaks_does_not_take_the_others_with_it(finished: Finished, tmp_path: Path):
    folder = finished.copy(tmp_path / "run")
    recipe = with_target(finished, name="ort", options={"nonsense": 1})
    result = finished.commands("run", recipe, "-o", folder, "--update", "--json")
    assert result.code == 2
    assert result.stderr.count("error: ") == 1
    assert "nonsense" in result.stderr
    rows = {(r["target"], r["precision"]): r for r in result.json["results"]}
    assert rows["reference", "w8a8"]["status"] == "measured"
    assert rows["ort", "w8a8"]["status"] == "unavailable"
    assert "nonsense" in rows["ort", "w8a8"]["reason"]
    # The same with an error that nobody foresaw.
    fault = "from s2d_deploy.registry import load_runtime\ndef broken(*_, **__): return 1 / 0\n"
    fault += "type(load_runtime('ort')).open = broken"
    recipe = with_target(finished, name="ort")
    result = finished.commands("run", recipe, "-o", folder, "--update", "--json", before=fault)
    assert result.code == 70
    rows = {(r["target"], r["precision"]): r for r in result.json["results"]}
    assert rows["ort", "w8a8"]["reason"] == "ZeroDivisionError: division by zero"
    assert rows["reference", "w8a8"]["status"] == "measured"


def test_a_failed_gate_writes_the_report_and_exits_with_1(finished: Finished, tmp_path: Path):
    folder = finished.copy(tmp_path / "run")
    flags = ("tiny.yaml", "-o", folder, "--set", "gates.size_ratio=0.01", "--update")
    for verb, code in (("run", 1), ("gate", 1), ("report", 0)):
        result = finished.commands(verb, *flags)
        assert result.code == code
        assert "verdict: fail" in result.stdout
        report = json.loads((folder / "report.json").read_text())
        assert report["verdict"] == "fail"
        assert [g["name"] for g in report["gates"] if g["verdict"] == "fail"] == ["size_ratio", "size_ratio"]
        assert "size_ratio" in (folder / "junit.xml").read_text()


# --- what nobody foresaw --------------------------------------------------------------------------------------

FAULT = "import s2d_deploy.pipeline as p\ndef broken(*_, **__): return 1 / 0\np.calibrate = broken"


def test_a_bug_does_not_look_like_anything_else(commands: Commands, tmp_path: Path):
    result = commands("quantize", "tiny.yaml", "-o", tmp_path / "out", before=FAULT)
    assert result.code == 70
    assert "error: unexpected ZeroDivisionError: division by zero" in result.stderr
    assert "Traceback" not in result.stderr
    log = Path(re.search(r"report it with (\S+\.log),", result.stderr)[1])
    assert "ZeroDivisionError: division by zero" in log.read_text()
    assert log.read_text().startswith("Traceback")
    log.unlink()
    assert_clean(tmp_path / "out", ("condition", "quantize/fp32", "train"))
    shown = commands("quantize", "tiny.yaml", "-o", tmp_path / "out", "--debug", before=FAULT)
    assert shown.code == 70
    assert "Traceback (most recent call last)" in shown.stderr
    assert "report it with" not in shown.stderr


def test_debug_shows_where_an_error_of_ours_comes_from(commands: Commands, tmp_path: Path):
    arguments = ("run", "tiny.yaml", "-o", tmp_path / "out", "--set", "quantise.x=1")
    assert "Traceback" not in commands(*arguments).stderr
    shown = commands(*arguments, "--debug")
    assert shown.code == 2
    assert "parse_recipe" in shown.stderr


def test_a_reader_that_stops_early(commands: Commands):
    with subprocess.Popen([*CONSOLE, "schema"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_progress_on_a_terminal(finished: Finished):
    """Alive lines go to the terminal; stdout, when it is a file, stays clean."""
    import pty

    ours, theirs = pty.openpty()
    attach = f"import os; os.dup2(os.open({os.ttyname(theirs)!r}, os.O_RDWR | os.O_NOCTTY), 2)"
    result = finished.commands("condition", "tiny.yaml", "-o", finished.folder, "--json", before=attach)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 4096):
            shown += part
    except OSError:  # the other side is closed
        pass
    os.close(ours)
    assert result.code == 0
    assert result.json["stage"] == "condition"
    assert result.stderr == ""
    assert b"already done" in shown
