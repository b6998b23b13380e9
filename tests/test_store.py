"""The stage store: resume, locks, kills, full disks, and files that are not what they should be."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.errors import ArtifactError, RecipeError, StageError
from s2d_deploy.manifest import own_digest
from s2d_deploy.store import (
    RunFolder,
    atomic_write,
    canonical_json,
    differences,
    digest,
    read_json,
    sha256_file,
    verify_folder,
    write_json,
)

RECIPE = {"model": {"name": "vit"}, "quantize": {"bits": 4, "targets": ["ort"]}}


def writer(text: str = "hello", info: dict | None = None, calls: list | None = None):
    def work(folder: Path) -> dict:
        if calls is not None:
            calls.append(folder)
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bin").write_bytes(bytes(range(256)))
        return info or {"n": 1}

    return work


def python(code: str, *args: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


# --- stages ------------------------------------------------------------------------------------------


def test_a_stage_runs_once_and_is_reused(tmp_path):
    calls: list = []
    with RunFolder(tmp_path / "out", {"numpy": "2"}) as folder:
        first = folder.run("export/ort/w4a4", {"bits": 4}, writer(calls=calls))
        second = folder.run("export/ort/w4a4", {"bits": 4}, writer(calls=calls))
    assert not first.cached
    assert first.why == "not there yet"
    assert second.cached
    assert len(calls) == 1
    assert first.manifest == second.manifest
    assert second.info == {"n": 1}
    assert first.sha256 == second.sha256
    files = {entry["name"]: entry for entry in first.manifest["files"]}
    assert sorted(files) == ["a.txt", "sub/b.bin"]
    assert files["a.txt"] == {
        "name": "a.txt",
        "size_bytes": 5,
        "sha256": hashlib.sha256(b"hello").hexdigest(),
    }
    assert first.manifest["versions"] == {"numpy": "2"}
    assert first.manifest["key"] == {"bits": 4}
    assert not list((tmp_path / "out" / ".partial").iterdir())


def test_another_key_redoes_the_stage_and_says_which_key(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.run("s", {"quantize": {"bits": 4}}, writer("old"))
        stage = folder.run("s", {"quantize": {"bits": 8}}, writer("new"))
    assert not stage.cached
    assert stage.why == "key changed: quantize.bits: 4 -> 8"
    assert (stage.folder / "a.txt").read_text() == "new"


def test_the_digest_of_a_stage_depends_on_bytes_only(tmp_path):
    with RunFolder(tmp_path) as folder:
        one = folder.run("one", {"k": 1}, writer())
        two = folder.run("two", {"k": 2}, writer(info={"other": True}))
        three = folder.run("three", {"k": 1}, writer("hellO"))
    assert one.sha256 == two.sha256 != three.sha256


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "a.txt").write_text("hell"), "a.txt: truncated. Expected: 5 bytes. Found: 4 bytes."),
        (lambda f: (f / "a.txt").write_text("hullo"), "a.txt: changed. Expected: SHA-256"),
        (lambda f: (f / "a.txt").unlink(), "a.txt: missing"),
        (lambda f: (f / "zzz").write_text("?"), "zzz: foreign"),
        (lambda f: (f / "link").symlink_to("/etc/passwd"), "link: a link or a special file"),
        (lambda f: (f / "manifest.json").write_text('{"stage": "s"'), "manifest.json: truncated, or not JSON"),
        (lambda f: (f / "manifest.json").write_text("{}"), "not a stage manifest of ours"),
        (lambda f: (f / "manifest.json").write_text("[1]"), "Expected: a JSON object. Found: a list."),
        (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "truncated, or not JSON"),
        (lambda f: (f / "manifest.json").write_text("[" * 100_000), "truncated, or not JSON"),
    ],
)
def test_damage_is_named_and_the_stage_redone(tmp_path, damage, words, caplog):
    with RunFolder(tmp_path) as folder:
        stage = folder.run("s", {"k": 1}, writer())
        damage(stage.folder)
        with pytest.raises(ArtifactError) as caught:
            verify_folder(stage.folder)
        assert words in str(caught.value)
        again = folder.run("s", {"k": 1}, writer())
        assert not again.cached
        assert words in again.why
        assert "WARNING  s2d_deploy.store:store.py" in caplog.text
        assert "stage s is damaged, and is made again" in caplog.text
        assert verify_folder(again.folder)["files"] == stage.manifest["files"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": {"k": 2}}, "the key does not have its recorded digest"),
        ({"schema_version": 99}, "schema_version 1. Found: 99."),
        ({"files": [{"name": "../../etc/passwd", "size_bytes": 1, "sha256": ""}]}, "leaves the folder"),
        ({"files": [{"name": "/etc/passwd", "size_bytes": 1, "sha256": ""}]}, "leaves the folder"),
        ({"files": ["a.txt"]}, "not a file entry"),
        ({"files": {}}, "missing or wrong: files"),
        ({"sha256": None}, "missing or wrong: sha256"),
    ],
)
def test_a_forged_manifest_is_refused(tmp_path, change, words):
    with RunFolder(tmp_path) as folder:
        stage = folder.run("s", {"k": 1}, writer())
    forged = {**stage.manifest, **change}
    write_json(stage.folder / "manifest.json", {**forged, "sha256": own_digest(forged), **change})
    with pytest.raises(ArtifactError, match=words.replace(".", r"\.")):
        verify_folder(stage.folder)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 0.999999), st.integers(1, 255))
def test_a_mutated_manifest_never_passes_and_never_tracebacks(tmp_path_factory, where, flip):
    root = tmp_path_factory.mktemp("m")
    with RunFolder(root) as folder:
        stage = folder.run("s", {"k": 1}, writer())
    path = stage.folder / "manifest.json"
    raw = bytearray(path.read_bytes())
    raw[int(where * len(raw))] ^= flip
    path.write_bytes(bytes(raw))
    try:
        manifest = verify_folder(stage.folder)
    except ArtifactError:
        return
    assert manifest == stage.manifest  # nothing but white space differs
    shutil.rmtree(root)


@pytest.mark.parametrize("change", [{"info": {"n": 2}}, {"seconds": 7.0}, {"versions": {"torch": "3"}}, {"more": 1}])
def test_facts_are_kept_as_safely_as_files(tmp_path, change):
    """A metric that a bad sector has changed is no metric."""
    with RunFolder(tmp_path) as folder:
        stage = folder.run("s", {"k": 1}, writer())
        write_json(stage.folder / "manifest.json", {**stage.manifest, **change})
        with pytest.raises(ArtifactError, match="changed: it does not have its recorded digest"):
            verify_folder(stage.folder)
        assert folder.run("s", {"k": 1}, writer()).info == {"n": 1}


@pytest.mark.parametrize(
    "name", ["..", "../x", "a/../b", "/etc", "", "a//b", ".partial", "a/", "a b", "é", "manifest.json", "a\x00"]
)
def test_names_that_escape_are_refused(tmp_path, name):
    with RunFolder(tmp_path / "out") as folder, pytest.raises(StageError, match="is not a stage name"):
        folder.run(name, {}, writer())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_linked_stage_folder_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    with RunFolder(tmp_path / "out") as folder:
        (tmp_path / "out" / "export").symlink_to(outside)
        with pytest.raises(StageError, match=r"is a symbolic link\. Fix: remove the link"):
            folder.run("export/ort", {}, writer())
    assert not list(outside.iterdir())


def test_stages_do_not_nest(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.run("export/ort", {}, writer())
        with pytest.raises(StageError, match="would lie inside the finished stage"):
            folder.run("export/ort/w4a4", {}, writer())
        with pytest.raises(StageError, match="holds files that no stage of this name wrote"):
            folder.run("export", {}, writer())
    assert verify_folder(tmp_path / "export" / "ort")


def test_a_failing_stage_leaves_the_old_result(tmp_path):
    def broken(folder: Path) -> dict:
        (folder / "half").write_text("half")
        raise ArithmeticError("no convergence")

    with RunFolder(tmp_path) as folder:
        old = folder.run("s", {"k": 1}, writer("old"))
        with pytest.raises(ArithmeticError, match="no convergence"):
            folder.run("s", {"k": 2}, broken)
        with pytest.raises(ArtifactError, match=r"cannot be written as JSON\. Found: Out of range float"):
            folder.run("s", {"k": 2}, writer(info={"loss": float("nan")}))
        assert verify_folder(old.folder) == old.manifest
        assert folder.run("s", {"k": 1}, writer()).cached
    assert not list((tmp_path / ".partial").iterdir())


def test_links_and_own_manifests_are_refused(tmp_path):
    def linking(folder: Path) -> dict:
        (folder / "link").symlink_to("/etc/passwd")
        return {}

    def forging(folder: Path) -> dict:
        (folder / "manifest.json").write_text("{}")
        return {}

    with RunFolder(tmp_path) as folder:
        with pytest.raises(ArtifactError, match="link: a link or a special file"):
            folder.run("s", {}, linking)
        with pytest.raises(ArtifactError, match=r"wrote a manifest\.json"):
            folder.run("s", {}, forging)
    assert not (tmp_path / "s").exists()


# --- the folder --------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_recipe(tmp_path):
    other = {"model": {"name": "bert"}, "quantize": {"bits": 4, "targets": ["ort"], "method": "mse"}}
    with RunFolder(tmp_path) as folder:
        folder.claim(other)
        folder.claim(RECIPE)  # nothing was finished for the other one yet: no need to ask
        folder.run("condition", {}, lambda _: {})
        folder.claim(json.loads(json.dumps(RECIPE)))
        with pytest.raises(RecipeError) as caught:
            folder.claim(other)
        text = str(caught.value)
        assert 'model.name: "vit" -> "bert"; quantize.method: absent -> "mse"' in text
        assert "choose another --output, or pass --update" in text
        assert read_json(tmp_path / "manifest.json")["recipe"] == RECIPE
        folder.claim(other, update=True)
        assert read_json(tmp_path / "manifest.json")["recipe"] == other


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("thesis.txt", "years of work", RecipeError, "is not empty and not one of our output folders"),
        ("manifest.json", '{"name": "web app"}', RecipeError, "is not the manifest of one of our output folders"),
        ("manifest.json", '{"kind": "s2d-de', ArtifactError, "truncated, or not JSON"),
    ],
)
def test_a_foreign_folder_is_refused_and_left_as_it_is(tmp_path, name, content, error, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(error, match=words) as caught, RunFolder(tmp_path):
        pass
    assert "choose another --output" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


def test_the_second_run_is_told_who_holds_the_folder(tmp_path):
    with RunFolder(tmp_path):
        result = python(
            """
            import sys
            from s2d_deploy.store import RunFolder
            from s2d_deploy.errors import StageError
            try:
                RunFolder(sys.argv[1]).__enter__()
            except StageError as error:
                print(error)
            """,
            tmp_path,
        )
        assert f"process {os.getpid()} holds" in result.stdout
        assert f"wait until process {os.getpid()} has ended, or stop it, or choose another --output" in result.stdout
        with pytest.raises(StageError, match="is in use by another run"):
            RunFolder(tmp_path).__enter__()
    with RunFolder(tmp_path):
        pass


def test_work_needs_the_lock(tmp_path):
    with pytest.raises(StageError, match="use RunFolder as a context manager"):
        RunFolder(tmp_path).run("s", {}, writer())


# --- kills -------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from s2d_deploy.store import RunFolder

def slow(folder):
    (folder / "a.txt").write_text("new")
    print("inside", flush=True)
    sys.stdin.read()
    return {}

with RunFolder(sys.argv[1]) as folder:
    folder.run("s/t", {"k": 2}, slow)
"""


def test_kill_9_in_a_stage_then_resume(tmp_path):
    with RunFolder(tmp_path) as folder:
        old = folder.run("s/t", {"k": 1}, writer("old"))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    with pytest.raises(StageError, match=f"process {process.pid} holds"):
        RunFolder(tmp_path).__enter__()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert list((tmp_path / ".partial").iterdir())
    assert verify_folder(tmp_path / "s" / "t") == old.manifest
    with RunFolder(tmp_path) as folder:  # the lock died with its process
        assert not (tmp_path / ".partial").exists()
        assert folder.run("s/t", {"k": 1}, writer("old")).cached
        assert not folder.run("s/t", {"k": 2}, writer("new")).cached


# Dies by its own SIGKILL at the n-th system call of interest: every point of the replacement is hit.
DIES_AT = """
import os, signal, sys
from pathlib import Path
import s2d_deploy.store
from s2d_deploy.store import RunFolder

left = int(sys.argv[2])

def audit(event, args):
    global left
    interesting = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")
    if interesting or (event == "open" and isinstance(args[0], str) and sys.argv[1] in args[0]):
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def work(folder):
    (folder / "a.txt").write_text("new")
    (folder / "b.txt").write_text("new too")
    return {}

with RunFolder(sys.argv[1]) as folder:
    sys.addaudithook(audit)
    folder.run("s/t", {"k": 2}, work)
print("survived")
"""


def test_kill_9_at_every_step_leaves_old_or_new_whole(tmp_path):
    seen = set()
    for step in range(100):
        root = tmp_path / str(step)
        with RunFolder(root) as folder:
            old = folder.run("s/t", {"k": 1}, writer("old"))
        result = python(DIES_AT, root, step)
        with RunFolder(root):
            manifest = verify_folder(root / "s" / "t")
        text = (root / "s" / "t" / "a.txt").read_text()
        assert text == {1: "old", 2: "new"}[manifest["key"]["k"]]
        if text == "old":
            assert manifest == old.manifest
        seen.add(text)
        assert not (root / ".partial").exists()
        if result.stdout == "survived\n":
            break
        assert result.returncode == -signal.SIGKILL, result.stderr
    else:
        pytest.fail("the stage never survived")
    assert step > 10
    assert seen == {"old", "new"}


# --- the machine refuses -----------------------------------------------------------------------------

FILLS = """
import sys
from pathlib import Path
from s2d_deploy.errors import StageError
from s2d_deploy.store import RunFolder, verify_folder, atomic_write

def big(folder):
    (folder / "weights.bin").write_bytes(bytes(1 << 20))
    return {}

def small(folder):
    (folder / "weights.bin").write_bytes(bytes(100))
    return {}

root = Path(sys.argv[1]) / "out"
with RunFolder(root) as folder:
    folder.run("s", {"k": 1}, small)
    for attempt in (lambda: folder.run("s", {"k": 2}, big), lambda: atomic_write(root / "report.json", bytes(1 << 20))):
        try:
            attempt()
        except StageError as error:
            print(error)
    verify_folder(root / "s")
    assert folder.run("s", {"k": 1}, big).cached
    assert not folder.run("s", {"k": 3}, small).cached
    print(sorted(p.name for p in root.iterdir()))
"""


def mounted(tmp_path: Path, options: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with a real small file system at tmp_path/disk, in its own mount namespace."""
    disk = tmp_path / "disk"
    disk.mkdir()
    shell = f'mount -t tmpfs -o {options} none "$1" || exit 77; exec "$2" -c "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", shell, "sh", str(disk), sys.executable, code]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare here: cannot mount a small file system")
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if result.returncode == 77 or "unshare failed" in result.stderr:
        pytest.skip(f"cannot mount a file system here: {result.stderr.strip()}")
    return result


def test_a_really_full_disk(tmp_path):
    result = mounted(tmp_path, "size=256k", FILLS)
    assert result.returncode == 0, result.stderr
    stage, report, left = result.stdout.splitlines()
    assert "the disk is full" in stage
    assert "out/s" in stage
    assert "Fix: free some space, or choose another --output, and run again: it resumes." in stage
    assert "the disk is full" in report
    assert "report.json" in report
    assert left == "['.partial', '.s2d-deploy.lock', 's']"


def test_a_read_only_disk(tmp_path):
    result = mounted(
        tmp_path,
        "ro,size=256k",
        """
import sys
from s2d_deploy.errors import StageError
from s2d_deploy.store import RunFolder
try:
    RunFolder(sys.argv[1] + "/out").__enter__()
except StageError as error:
    print(error)
""",
    )
    assert "disk/out: the file system is read-only." in result.stdout, result.stderr
    assert "choose another --output" in result.stdout


def test_a_file_size_limit(tmp_path):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n" + FILLS
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("would exceed the allowed size") == 2


def test_a_serializer_that_words_it_its_own_way(tmp_path):
    def rust(folder: Path) -> dict:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    with RunFolder(tmp_path) as folder, pytest.raises(StageError, match="the disk is full"):
        folder.run("s", {}, rust)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StageError, match=r"a part of the path is a file|File exists") as caught:
        RunFolder(tmp_path / "file" / "out").__enter__()
    assert str(tmp_path / "file" / "out") in str(caught.value)


# --- files -------------------------------------------------------------------------------------------


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "x"
    atomic_write(path, "é")
    assert path.read_bytes() == "é".encode()
    atomic_write(path, b"\x00\x01")
    assert path.read_bytes() == b"\x00\x01"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert sha256_file(path) == hashlib.sha256(b"\x00\x01").hexdigest()
    with pytest.raises(StageError, match="No such file"):
        atomic_write(tmp_path / "absent" / "x", "")


def test_temporary_files_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / ".report.json.12345.tmp").write_text("{")
    with RunFolder(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".s2d-deploy.lock"]


json_documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=5), json_documents, max_size=4))
def test_json_round_trip(tmp_path_factory, document):
    path = tmp_path_factory.mktemp("j") / "d.json"
    write_json(path, document)
    assert read_json(path) == document
    assert digest(read_json(path)) == digest(document)
    assert differences(document, read_json(path)) == []


def test_canonical_json_ignores_order_only():
    assert canonical_json({"b": 1, "a": [1, 2]}) == canonical_json({"a": [1, 2], "b": 1}) == '{"a":[1,2],"b":1}'
    assert digest({"a": [1, 2]}) != digest({"a": [2, 1]})
    assert digest({"a": 1}) != digest({"a": 1.0})
    assert differences({"a": True, "c": {}}, {"a": 1, "b": [3]}) == [
        "a: true -> 1",
        "b: absent -> [3]",
        "c: {} -> absent",
    ]


def test_nan_is_refused_both_ways(tmp_path):
    with pytest.raises(ArtifactError, match="replace NaN and infinities by null"):
        write_json(tmp_path / "x.json", {"a": float("inf")})
    (tmp_path / "y.json").write_text('{"a": NaN}')
    with pytest.raises(ArtifactError, match="NaN is not JSON"):
        read_json(tmp_path / "y.json")
    with pytest.raises(ArtifactError, match="no such file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_json(tmp_path)


def test_importing_the_store_is_cheap():
    start = time.perf_counter()
    result = python("import sys, s2d_deploy.store; print([m for m in ('torch', 'numpy', 'onnx') if m in sys.modules])")
    assert result.stdout == "[]\n"
    assert time.perf_counter() - start < 10
