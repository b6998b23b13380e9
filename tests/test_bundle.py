"""The evidence bundle: the same bytes each time, a reader that believes nothing, claims recomputed from raw samples."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import TINY, Commands
from gate_sample import LABELS, outputs, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.archive import MANIFEST, read_archive, read_document, write_archive
from s2d_deploy.bundle_check import EVIDENCE, KIND, RECIPE, REPORT, Claim, check, holds, read_bundle
from s2d_deploy.errors import ArtifactError
from s2d_deploy.files import canonical_json, digest
from s2d_deploy.machine_paths import without_paths

SAMPLE = sample(lost=2)
FILES = {"a.json": b"{}", "b/c.f32": bytes(1000)}


def contradicted(claims: list[Claim]) -> list[str]:
    return [claim.what for claim in claims if claim.holds is False]


# --- the archive ---------------------------------------------------------------------------------------------


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    first, second = tmp_path / "1.zip", tmp_path / "2.zip"
    content = write_archive(first, "kind", FILES)
    assert write_archive(second, "kind", dict(reversed(FILES.items()))) == content
    assert first.read_bytes() == second.read_bytes()
    assert read_archive(first, "kind") == (FILES, content)
    with zipfile.ZipFile(first) as archive:
        assert archive.namelist() == [MANIFEST, "a.json", "b/c.f32"]
        assert archive.testzip() is None
    assert write_archive(second, "kind", FILES | {"a.json": b"[]"}) != content


def test_names_that_the_reader_refuses_are_not_written(tmp_path: Path):
    for name in ("../x", "/x", "a//b", ".hidden", "a/../b", MANIFEST, "a b", ""):
        with pytest.raises(ArtifactError, match="cannot be written as a bundle"):
            write_archive(tmp_path / "x.zip", "kind", {name: b""})
    assert list(tmp_path.iterdir()) == []


def hostile(path: Path, members: list[tuple[str, bytes]], **fields: Any) -> Path:
    """A zip with a manifest that lists `members` truly, changed by `fields`."""
    import hashlib

    listed = [{"name": n, "size_bytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in members]
    manifest = {"schema_version": 1, "kind": "kind", "sha256": digest(listed), "files": listed} | fields
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, canonical_json(manifest))
        for name, data in members:
            archive.writestr(name, data)
    return path


def entry(**more: Any) -> dict[str, Any]:
    return {"name": "a", "size_bytes": 1, "sha256": "0" * 64} | more


@pytest.mark.parametrize(
    ("members", "fields", "words"),
    [
        ([("../../etc/cron.d/x", b"x")], {}, "a member named '../../etc/cron.d/x'"),
        ([("/etc/passwd", b"x")], {}, "a member named '/etc/passwd'"),
        ([("a/", b"")], {}, "a member named 'a/'"),
        ([("C:\\x", b"x")], {}, "a member named 'C:"),
        ([("a", b"x")], {"kind": "other"}, "kind 'other', schema 1"),
        ([("a", b"x")], {"schema_version": 2}, "schema 2"),
        ([("a", b"x")], {"files": "all"}, "kind 'kind'"),
        ([("a", b"x")], {"files": [entry()]}, "'a' was changed: it does not have the digest of MANIFEST.json"),
        ([("a", b"x")], {"files": [entry(size_bytes=-1)]}, "not a file entry"),
        ([("a", b"x")], {"files": [entry(size_bytes=True)]}, "not a file entry"),
        ([("a", b"x")], {"files": [entry(size_bytes=1 << 40)]}, "members of more than 1024 MiB"),
        ([("a", b"x")], {"files": [entry(name="b")]}, "'b' is listed twice, or is not there"),
        ([("a", b"x")], {"files": []}, "members that MANIFEST.json does not list: a"),
        ([("a", b"x")], {"sha256": "0"}, "does not have its own digest"),
    ],
)
def test_hostile_archives_are_one_sentence(tmp_path: Path, members: Any, fields: Any, words: str):
    path = hostile(tmp_path / "x.zip", members, **fields)
    with pytest.raises(ArtifactError, match="not a bundle of ours, or damaged") as caught:
        read_archive(path, "kind")
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["x.zip"]


def test_a_bomb_is_read_no_further_than_promised(tmp_path: Path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        listed = [entry(size_bytes=10)]
        manifest = {"schema_version": 1, "kind": "kind", "sha256": digest(listed), "files": listed}
        archive.writestr(MANIFEST, canonical_json(manifest))
        archive.writestr("a", bytes(50 << 20))
    assert path.stat().st_size < 200_000
    with pytest.raises(ArtifactError, match="'a' holds more than the 10 bytes"):
        read_archive(path, "kind")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr(MANIFEST, bytes(8 << 20))
    with pytest.raises(ArtifactError, match=r"'MANIFEST.json' holds more than the 4194304 bytes"):
        read_archive(path, "kind")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_twins_encryption_and_strange_compression_are_refused(tmp_path: Path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"1")
        archive.writestr("a", b"2")
    with pytest.raises(ArtifactError, match="two members named 'a'"):
        read_archive(path, "kind")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a", b"1")
    with pytest.raises(ArtifactError, match="'a' is encrypted, or compressed by an unknown method"):
        read_archive(path, "kind")
    write_archive(path, "kind", FILES)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"PK\x01\x02") + 8  # flags of the first entry of the directory
    struct.pack_into("<H", raw, at, 1)
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match=f"'{MANIFEST}' is encrypted"):
        read_archive(path, "kind")


@pytest.mark.parametrize("data", [b"", b"PK", b"not a zip", b"PK\x05\x06" + bytes(18), b"{}" * 500])
def test_what_is_no_zip(tmp_path: Path, data: bytes):
    path = tmp_path / "x.zip"
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="not a bundle of ours, or damaged"):
        read_archive(path, "kind")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_archive(tmp_path / "nowhere.zip", "kind")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_archive(tmp_path, "kind")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle") / "x.zip"
    write_archive(path, "kind", FILES)
    return path


@given(st.data())
@settings(max_examples=150)
def test_any_changed_byte_is_an_error_of_ours_or_changes_nothing(whole: Path, data: st.DataObject):
    raw = bytearray(whole.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(raw), len(raw) // 2, len(raw) - 1]))
    changed = whole.with_name("changed.zip")
    changed.write_bytes(raw[:cut])
    try:
        files, _ = read_archive(changed, "kind")
    except ArtifactError:
        return
    assert files == FILES  # times and modes may change, content may not


@pytest.mark.parametrize("text", [b"[1]", b"{", b"\xff", b'{"a": NaN}', b"[" * 100_000])
def test_members_that_are_no_documents(text: bytes):
    with pytest.raises(ArtifactError, match="not a bundle of ours"):
        read_document({"x.json": text}, "x.json", Path("b.zip"))


# --- machine paths -------------------------------------------------------------------------------------------


def test_paths_lose_all_but_their_name():
    document = {
        "command": "s2d-deploy run /home/me/my.yaml -o /data/project/runs/x",
        "list": ["runs/digits", "google/vit-base", "rpc://host:9190/key", "https://example.org/a/b", "3/4"],
        "reason": "'/usr/lib/libcuda.so.1': no such file",
        "/data/project/a": (
            "~/models/x",
            "file:///etc/hosts",
            "x:/tmp/y",
            "C:\\Users\\me\\x.onnx",
            1,
            None,
            "/data/project",
        ),
    }
    assert without_paths(document, Path("/data/project")) == {
        "command": "s2d-deploy run <path>/my.yaml -o ./runs/x",
        "list": ["runs/digits", "google/vit-base", "rpc://host:9190/key", "https://example.org/a/b", "3/4"],
        "reason": "'<path>/libcuda.so.1': no such file",
        "./a": ["<path>/x", "<path>/hosts", "x:<path>/y", "<path>/x.onnx", 1, None, "."],
    }


# --- claims --------------------------------------------------------------------------------------------------


def bundle(
    path: Path, change: Callable[[dict[str, Any], dict[str, Any], dict[str, np.ndarray[Any, Any]]], None] | None = None
) -> Path:
    """A bundle of the sample report; `change` may alter report, evidence and outputs before they are packed."""
    report = copy.deepcopy(SAMPLE)
    arrays = {"simulation/fp32": outputs(0), "simulation/w8a8": outputs(0), "simulation/w4a4": outputs(2, 1)}
    arrays |= {name.replace("simulation", "ort"): array for name, array in arrays.items()}
    codes = {"samples": 4, "weights": {"fc": "1"}, "simulated": {"fc.input": "2"}, "runtime": {"fc.input": "2"}}
    facts: dict[str, Any] = {"codes": {"ort/w4a4": codes}, "stages": [], "commands": [], "left_out": []}
    report["results"][2]["parity"] |= {"codes_checked": 10, "codes_different": 0}
    if change is not None:
        change(report, facts, arrays)
    facts["outputs"] = facts.get("outputs") or [
        {"target": n.split("/")[0], "precision": n.split("/")[1], "file": f"outputs/{n}.f32", "shape": list(a.shape)}
        for n, a in arrays.items()
    ]
    files = {f"outputs/{n}.f32": a.astype("<f4").tobytes() for n, a in arrays.items()}
    for name, document in ((REPORT, report), (RECIPE, report["recipe"]), (EVIDENCE, facts)):
        files[name] = json.dumps(document).encode()
    files["labels.json"] = json.dumps({"labels": LABELS.tolist()}).encode()
    write_archive(path, KIND, files)
    return path


def test_every_claim_of_a_true_bundle_holds(tmp_path: Path):
    claims = check(read_bundle(bundle(tmp_path / "e.zip")))
    assert contradicted(claims) == []
    assert [c.what for c in claims if c.holds is None] == []
    said = "\n".join(c.what for c in claims)
    for words in (
        "every file has the digest of the manifest",
        "ort w4a4: top-1 % measured 89.75 is the mean of its samples",
        "ort w4a4: outputs against the simulation's: snr_db None, max_error 0, identical True, top1_flips 0",
        "ort w4a4: outcomes follow from outputs and labels",
        "ort w4a4: latency of 60 samples, p50 ",
        "ort w4a4: executed int8 1 of 1 audited operations",
        "ort w4a4: codes of 1 sites hashed; 0 differ end to end",
        "gate accuracy_drop ort w4a4: pass, value 0.25",
        "gate latency_ratio ort w8a8: pass",
        "verdict of the run: pass",
    ):
        assert words in said, words


LIES: dict[str, tuple[Callable[..., None], str]] = {
    "a better mean": (
        lambda report, facts, arrays: report["results"][2]["metric"].update(measured=95.0),
        "ort w4a4: top-1 % measured 95 is the mean of its samples",
    ),
    "better outcomes": (
        lambda report, facts, arrays: report["results"][2]["metric"].update(
            per_sample_measured=[100.0] * 400, measured=100.0
        ),
        "ort w4a4: outcomes follow from outputs and labels",
    ),
    "a faster median": (
        lambda report, facts, arrays: report["results"][2]["latency_ms"].update(p50=0.1),
        "ort w4a4: latency of 60 samples, p50 0.1 ms",
    ),
    "a higher ratio": (
        lambda report, facts, arrays: report["results"][2].update(speedup_over_float=3.0),
        "ort w4a4: 3 times as fast as float",
    ),
    "a narrower interval": (
        lambda report, facts, arrays: report["results"][2].update(speedup_ci=[1.99, 2.01]),
        "times as fast as float",
    ),
    "faster samples": (
        lambda report, facts, arrays: report["results"][2]["latency_ms"].update(samples=[0.1] * 60),
        "ort w4a4: latency of 60 samples",
    ),
    "no samples": (
        lambda report, facts, arrays: report["results"][2]["latency_ms"].update(samples=[]),
        "ort w4a4: latency",
    ),
    "integers that were floats": (
        lambda report, facts, arrays: report["results"][2]["audit"]["ops"][0].update(precision="float32"),
        "ort w4a4: executed int8 1",
    ),
    "outputs that differ": (
        lambda report, facts, arrays: arrays.update({"ort/w4a4": outputs(9)}),
        "ort w4a4: outputs against the simulation's",
    ),
    "hashes that differ": (
        lambda report, facts, arrays: facts["codes"]["ort/w4a4"]["runtime"].update({"fc.input": "3"}),
        "ort w4a4: codes of 1 sites hashed",
    ),
    "a gate's value": (
        lambda report, facts, arrays: report["gates"][0].update(value=0.5),
        "gate measured ort w8a8: pass, value 0.5",
    ),
    "a gate left out": (
        lambda report, facts, arrays: report.update(gates=report["gates"][1:]),
        "gate measured ort w8a8",
    ),
    "a gate made up": (
        lambda report, facts, arrays: report["gates"].append(
            {"name": "magic", "target": "ort", "precision": "w4a4", "verdict": "pass", "value": 1, "limit": 1}
        ),
        "gate magic ort w4a4",
    ),
    "nonsense": (
        lambda report, facts, arrays: report["results"][2]["metric"].update(per_sample_measured=["a"]),
        "ort w4a4: metric",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_contradicted(tmp_path: Path, lie: str):
    change, claim = LIES[lie]
    claims = check(read_bundle(bundle(tmp_path / "e.zip", change)))
    assert not holds(claims)
    assert any(claim in what for what in contradicted(claims)), contradicted(claims)


def test_what_is_not_in_the_file_is_not_checked(tmp_path: Path):
    def bare(report: dict[str, Any], facts: dict[str, Any], arrays: dict[str, Any]) -> None:
        del arrays["ort/w4a4"]
        report["gates"].append(
            {
                "name": "baseline_accuracy",
                "target": "ort",
                "precision": "w4a4",
                "verdict": "pass",
                "value": 0,
                "limit": 1,
            }
        )

    claims = check(read_bundle(bundle(tmp_path / "e.zip", bare)))
    assert [(c.what, c.note) for c in claims if c.holds is None] == [
        ("ort w4a4: outputs against the simulation's", "the outputs are not in the file"),
        ("gate baseline_accuracy ort w4a4", "the baseline is not in the file"),
    ]
    assert holds(claims)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r, f, a: r.update(schema_version="9"), "not a valid report"),
        (lambda r, f, a: r.update(recipe={"name": "x"}), "the report's recipe is not one of this version's"),
        (lambda r, f, a: f.update(stages="none"), "stages is not a list of entries"),
        (lambda r, f, a: f.update(codes=[]), "codes is not an object"),
        (lambda r, f, a: f.update(outputs=[{"target": "ort"}]), "outputs: KeyError"),
        (
            lambda r, f, a: f.update(
                outputs=[{"target": "a", "precision": "b", "file": "outputs/ort/w4a4.f32", "shape": [10**12, 10**12]}]
            ),
            "2800 numbers for shape",
        ),
    ],
)
def test_bundles_of_another_form_are_one_sentence(tmp_path: Path, change: Any, words: str):
    with pytest.raises(ArtifactError) as caught:
        read_bundle(bundle(tmp_path / "e.zip", change))
    assert words in str(caught.value)


junk = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=3)
    | st.lists(st.integers())
)


@given(st.data())
@settings(max_examples=30)
def test_junk_anywhere_is_an_error_of_ours_or_a_claim_that_fails(tmp_path_factory: Any, data: st.DataObject):
    def spoil(report: dict[str, Any], facts: dict[str, Any], arrays: Any) -> None:
        node: Any = data.draw(st.sampled_from([report, facts]))
        for _ in range(6):
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            key = data.draw(st.sampled_from(keys))
            child = node[key]
            if not isinstance(child, dict | list) or not child or data.draw(st.booleans()):
                node[key] = data.draw(junk)
                return
            node = child

    path = tmp_path_factory.mktemp("junk") / "e.zip"
    bundle(path, spoil)
    try:
        claims = check(read_bundle(path))
    except ArtifactError:
        return
    assert all(isinstance(c.what, str) and c.holds in (True, False, None) for c in claims)


def test_checking_needs_no_torch():
    code = "import sys, s2d_deploy.bundle_check\nprint(*[n for n in ('torch', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


# --- a real run ----------------------------------------------------------------------------------------------


def test_a_run_packs_checks_and_runs_again(commands: Commands):
    recipe = copy.deepcopy(TINY) | {"name": "packed", "quantize": {"precisions": ["w8a8"]}}
    (commands.cwd / "packed.yaml").write_text(yaml.safe_dump(recipe))
    made = commands("report", "packed.yaml", "--bundle", "e.zip")
    assert made.code == 0, made.stderr
    assert "e.zip: evidence with digest " in made.stderr
    first = (commands.cwd / "e.zip").read_bytes()
    assert commands("report", "packed.yaml", "--bundle", "e.zip").code == 0
    assert (commands.cwd / "e.zip").read_bytes() == first
    assert str(commands.cwd).encode() not in b"".join(read_archive(commands.cwd / "e.zip", KIND)[0].values())
    checked = commands("report", "--check", "e.zip")
    assert checked.code == 0, checked.stdout
    assert checked.stdout.startswith("25 of 25 claims hold") or " 0 do not, 0 cannot be checked" in checked.stdout
    again = commands("report", "--check", "e.zip", "--rerun", "--json")
    assert again.code == 0, again.stdout
    said = {claim["what"]: claim["holds"] for claim in again.json["claims"]}
    assert said["reference w8a8: 24 outcomes as stated"]
    assert said["simulation w8a8: outputs bit for bit"]
    assert any(what.startswith("files of ") and held for what, held in said.items())
    hashed = [what for what in said if "hashes of" in what]
    assert len(hashed) == 3
    assert all(said[what] for what in hashed)
    other = commands("report", "--check", "e.zip", "--rerun", "--set", "data.test_samples=12")
    assert other.code == 1
    assert "DOES NOT HOLD: run on the same 12 samples" in other.stdout
    assert "DOES NOT HOLD: the bundle's own recipe is run (data.test_samples: 24 -> 12)" in other.stdout
    # A baseline of the same run, by the recipe: its verdicts stand in the run's own report.
    made = commands("gate", "packed.yaml", "--baseline", "b.json", "--write")
    assert made.code == 0, made.stderr
    judged = commands("gate", "packed.yaml", "--baseline", "b.json", "--json")
    assert judged.code == 0, judged.stderr
    assert "baseline_accuracy" in {g["name"] for g in judged.json["gates"]}
    assert "baseline_accuracy" in (commands.cwd / "runs" / "packed" / "report.md").read_text().replace("\\", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "report needs a RECIPE, or --check FILE"),
        (("tiny.yaml", "--rerun"), "--rerun belongs to --check"),
        (("tiny.yaml", "--check", "e.zip"), "--check reads a bundle, and nothing else"),
        (("--check", "e.zip", "--set", "a=1"), "--check runs nothing"),
        (("--check", "nowhere.zip"), "nowhere.zip: cannot be read"),
        (("--check", "tiny.yaml"), "tiny.yaml: not a bundle of ours, or damaged"),
        (("tiny.yaml", "--bundle", "no/e.zip"), "--bundle no/e.zip: no folder no"),
    ],
)
def test_flags_that_do_not_fit(commands: Commands, arguments: tuple[str, ...], words: str):
    result = commands("report", *arguments)
    assert result.code == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
