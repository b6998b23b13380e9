"""A stage's manifest: what a folder should hold, checked against what it holds.

The manifest may come from anywhere, so its form is checked before its words are believed: no name in
it leads out of the folder, and nothing that is read is a link.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from s2d_deploy.errors import ArtifactError, message
from s2d_deploy.files import canonical_json, digest, read_json, sha256_file

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a stage's folder, its form checked (not the files: see `verify_folder`).

    Raises:
        ArtifactError: missing, truncated, foreign, of another schema, or changed in any value.
    """
    path = folder / MANIFEST
    document = read_json(path)
    kinds = {"stage": str, "key": dict, "key_sha256": str, "files": list, "info": dict, "sha256": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(document.get(name), kind)]
    if wrong:
        raise ArtifactError(
            message(f"{path}: not a stage manifest of ours", found=f"missing or wrong: {', '.join(wrong)}")
        )
    check_schema(path, document)
    if document["key_sha256"] != digest(document["key"]):
        raise ArtifactError(message(f"{path}: changed by hand: the key does not have its recorded digest"))
    if document["sha256"] != own_digest(document):
        raise ArtifactError(
            message(f"{path}: changed: it does not have its recorded digest", fix="run the stage that writes it again")
        )
    for entry in document["files"]:
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("name"), str)
            and type(entry.get("size_bytes")) is int
            and isinstance(entry.get("sha256"), str)
        ):
            raise ArtifactError(message(f"{path}: files: not a file entry", found=repr(entry)[:80]))
        parts = entry["name"].split("/")
        if "\x00" in entry["name"] or any(part in ("", ".", "..") for part in parts):
            raise ArtifactError(message(f"{path}: files: {entry['name']!r} leaves the folder"))
    return document


def own_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest without its own ``sha256``: facts and times are kept as safely as files."""
    return digest({name: value for name, value in document.items() if name != "sha256"})


def verify_folder(path: Path) -> dict[str, Any]:
    """The manifest of a stage's folder, after a check of every file against it.

    Raises:
        ArtifactError: a file is missing, truncated, changed, a link, or not in the manifest; it is named.
    """
    manifest = read_manifest(path)
    fix = "run the stage that writes it again"
    expected = {entry["name"]: entry for entry in manifest["files"]}
    try:
        present = {relative: file for file, relative in regular_files(path) if relative != MANIFEST}
        for name, entry in expected.items():
            if name not in present:
                raise ArtifactError(message(f"{path / name}: missing", fix=fix))
            size = present[name].stat().st_size
            if size != entry["size_bytes"]:
                what = "truncated" if size < entry["size_bytes"] else "changed"
                raise ArtifactError(
                    message(
                        f"{path / name}: {what}",
                        expected=f"{entry['size_bytes']} bytes",
                        found=f"{size} bytes",
                        fix=fix,
                    )
                )
            found = sha256_file(present[name])
            if found != entry["sha256"]:
                raise ArtifactError(
                    message(
                        f"{path / name}: changed",
                        expected=f"SHA-256 {entry['sha256'][:12]}",
                        found=found[:12],
                        fix=fix,
                    )
                )
    except OSError as error:
        raise ArtifactError(
            message(f"{error.filename or path}: cannot be read", found=error.strerror or str(error))
        ) from error
    foreign = sorted(present.keys() - expected.keys())
    if foreign:
        raise ArtifactError(
            message(
                f"{path / foreign[0]}: foreign: {MANIFEST} does not list it", fix="remove it, or run the stage again"
            )
        )
    return manifest


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys at which two JSON documents differ, as ``"quantize.bits: 4 -> 8"``, sorted."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: list[str] = []
        for key in sorted(old.keys() | new.keys()):
            dotted = f"{prefix}.{key}" if prefix else str(key)
            if key not in old:
                found.append(f"{dotted}: absent -> {_short(new[key])}")
            elif key not in new:
                found.append(f"{dotted}: {_short(old[key])} -> absent")
            else:
                found.extend(differences(old[key], new[key], dotted))
        return found
    # 1 == 1.0 == True in Python, but a recipe that says one is not the recipe that says another.
    same = canonical_json(old) == canonical_json(new)
    return [] if same else [f"{prefix or 'document'}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = canonical_json(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_schema(path: Path, document: Mapping[str, Any]) -> None:
    """Refuse a manifest of another schema version with an ArtifactError."""
    if document.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            message(
                f"{path}: written by another version of this package",
                expected=f"schema_version {SCHEMA_VERSION}",
                found=repr(document.get("schema_version")),
                fix="choose another --output, or install the version that wrote it",
            )
        )


def regular_files(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file below `folder` with its name relative to it, sorted; links and special files are refused."""
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise ArtifactError(message(f"{path}: a link or a special file", expected="regular files only"))
        if path.is_file():
            yield path, path.relative_to(folder).as_posix()
