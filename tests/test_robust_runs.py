"""Runs that meet each other, folders that refuse, locks that outlive their owner: nothing is lost, and one is told."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from command_line import TINY, Commands, stages

from s2d_deploy.errors import ArtifactError, StageError
from s2d_deploy.session import Artifact
from s2d_deploy.store import RunFolder, verify_folder


def start(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


CONTENDS = """
import sys, time
from pathlib import Path
from s2d_deploy.errors import StageError
from s2d_deploy.store import RunFolder, verify_folder

root, me, done, refused = Path(sys.argv[1]), sys.argv[2], 0, 0

def work(folder):
    for i in range(3):
        (folder / f"{i}.txt").write_text(me * 1000)
        time.sleep(0.001)
    return {"by": me}

while done < 8:
    try:
        with RunFolder(root) as folder:
            stage = folder.run("shared/stage", {"by": me, "round": done}, work)
            assert stage.info == {"by": me}
            verify_folder(stage.folder)
            assert {p.read_text() for p in stage.folder.glob("*.txt")} == {me * 1000}
            assert [p.name for p in (root / ".partial").iterdir()] == []
            done += 1
    except StageError as error:
        assert "is in use by another run" in str(error), error
        refused += 1
        time.sleep(0.002)
print(done, refused)
"""


def test_processes_that_want_one_folder_take_turns(tmp_path: Path):
    """Each sees only its own stage, whole; who comes second is told, and may come again."""
    root = tmp_path / "run"
    processes = [start(CONTENDS, root, name) for name in "abc"]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.split()[0] == "8"
    assert verify_folder(root / "shared" / "stage")["info"]["by"] in "abc"


HEIR = """
import os, sys, time
from s2d_deploy.store import RunFolder

folder = RunFolder(sys.argv[1]).__enter__()
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
print(os.getpid(), child, flush=True)
os.close(1)
os.close(2)
os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="whether a process lives is read from /proc")
def test_a_lock_that_a_child_has_inherited(tmp_path: Path):
    process = start(HEIR, tmp_path / "run")
    assert process.stdout is not None
    parent, child = map(int, process.stdout.readline().split())
    process.wait()
    try:
        with pytest.raises(StageError) as caught:
            RunFolder(tmp_path / "run").__enter__()
        assert f"process {parent} holds" in str(caught.value)
        assert "or one that it has started: it has ended itself" in str(caught.value)
    finally:
        os.kill(child, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while True:
        try:
            with RunFolder(tmp_path / "run"):
                return
        except StageError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_file_that_goes_away_between_opening_and_locking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Who locks a file that is no longer there has locked nothing."""
    lock, real, left = tmp_path / ".s2d-deploy.lock", fcntl.flock, [2]

    def flock(descriptor: int, how: int) -> None:
        if left[0]:
            left[0] -= 1
            lock.unlink()
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunFolder(tmp_path) as folder:
        assert left == [0]
        assert folder._lock is not None
        assert os.path.samestat(lock.stat(), os.fstat(folder._lock))
        monkeypatch.undo()
        with pytest.raises(StageError, match="is in use by another run"):
            RunFolder(tmp_path).__enter__()


REFUSED = """
import os, sys
from pathlib import Path
from s2d_deploy.errors import StageError
from s2d_deploy.store import RunFolder, verify_folder, write_json

root = Path(sys.argv[1])
with RunFolder(root) as folder:
    folder.run("kept", {"k": 1}, lambda f: (f / "a.txt").write_text("kept") and {})
for path in (root, root / "kept"):
    path.chmod(0o555)
(root / ".s2d-deploy.lock").chmod(0o666)
if os.getuid() == 0:
    os.chdir("/")
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)

def again():
    with RunFolder(root) as folder:
        folder.run("kept", {"k": 1}, lambda f: {})
        folder.run("new", {"k": 1}, lambda f: {})

def report():
    write_json(root / "report.json", {})

for attempt in (again, report):
    try:
        attempt()
        print("no error")
    except StageError as error:
        print(error)
print(verify_folder(root / "kept")["stage"])
"""


def test_a_folder_that_may_not_be_written(tmp_path: Path):
    """Also as root, which permissions do not stop: the process becomes somebody else first."""
    root = tmp_path / "run"
    for parent in (tmp_path, *tmp_path.parents):
        if os.getuid() == 0 and parent.stat().st_uid == 0 and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o111)
    process = start(REFUSED, root)
    out, err = process.communicate(timeout=60)
    root.chmod(0o755)
    assert process.returncode == 0, err
    stage, report, kept = out.splitlines()
    for text in (stage, report):
        assert "permission denied" in text
        assert "Fix: make the path readable and writable, or choose another --output." in text
    assert kept == "kept"
    with RunFolder(root) as folder:
        assert folder.run("kept", {"k": 1}, lambda _: {}).cached


def test_leftovers_of_a_part_are_removed(tmp_path: Path):
    with RunFolder(tmp_path):
        pass
    part = tmp_path / "parts" / "ort-w8a8"
    part.mkdir(parents=True)
    (part / ".report.json.4711.tmp").write_text("{")
    (part / "report.json").write_text("{}")
    with RunFolder(tmp_path):
        assert [p.name for p in part.iterdir()] == ["report.json"]


@pytest.mark.parametrize(
    "name", ["../other", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\x00", "\ud800", 7, None, ["a"]]
)
def test_an_artifacts_file_stays_in_its_folder(tmp_path: Path, name: object):
    artifact = Artifact(tmp_path, "ort", "w8a8", {"model": name})  # type: ignore[dict-item]
    with pytest.raises(ArtifactError, match=r"leads out of the folder|no file for 'model'"):
        artifact.path("model")
    with pytest.raises(ArtifactError):
        _ = artifact.size_bytes
    with pytest.raises(ArtifactError, match="no file for 'weights'"):
        artifact.path("weights")


def test_a_precision_that_cannot_be_made_leaves_the_others(commands: Commands, tmp_path: Path):
    """The best that there is so far: a report with the other precisions, the reason, and an exit code."""
    model = {k: v for k, v in TINY["model"]["config"].items() if k != "num_hidden_layers"} | {"num_hidden_layers": 1}
    document = TINY | {
        "model": {"config": model | {"intermediate_size": 40}},
        "condition": {"method": "none"},
        "quantize": {"precisions": ["w4a16", "w8a8"], "error_samples": 0},
    }
    path = commands.recipe(document, "narrow.yaml")
    result = commands("run", path, "-o", tmp_path / "run")
    assert result.code == 2
    assert "Traceback" not in result.stderr
    assert "width not divisible by the block size" in result.stderr
    rows = {row["precision"]: row for row in json.loads((tmp_path / "run" / "report.json").read_text())["results"]}
    assert {p: row["status"] for p, row in rows.items()} == {
        "fp32": "measured",
        "w8a8": "measured",
        "w4a16": "unavailable",
    }
    assert "width not divisible by the block size" in rows["w4a16"]["reason"]
    assert {"quantize/w8a8", "verify/reference/w8a8"} <= set(stages(tmp_path / "run"))
    again = commands("run", path, "-o", tmp_path / "run")
    assert again.code == 2
    assert all(again.done.values()), "what was finished is kept"
