"""A zip file that is the same bytes for the same content, and a reader that believes nothing a stranger's one says.

Written: members sorted by name, one date, one mode, and first a MANIFEST.json with the size and SHA-256 of every
other member. Read: into memory only, never onto the disk, so that no name can lead anywhere; each member as far as the
manifest says and no further, whatever its header claims; within bounds on number and bytes. Compressed or stored
members only: no encryption, no links, no folders, no second member of one name. What is inside is bytes: nothing is
unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from s2d_deploy.errors import ArtifactError, message
from s2d_deploy.files import atomic_write, canonical_json, digest

MANIFEST = "MANIFEST.json"
SCHEMA_VERSION = 1
MOST_MEMBERS = 2000
MOST_BYTES = 1 << 30  # of all members together, and of the file
MOST_MANIFEST_BYTES = 4 << 20
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@-]*(/[A-Za-z0-9_][A-Za-z0-9_.@-]*)*")
_DATE = (1980, 1, 1, 0, 0, 0)


def write_archive(path: Path, kind: str, files: Mapping[str, bytes]) -> str:
    """Write the archive in one step.

    Args:
        path: where.
        kind: what it is; a reader must ask for the same.
        files: member name -> bytes.

    Returns:
        The digest of its content (names, sizes and bytes): equal content has an equal one.

    Raises:
        ArtifactError: a name that the reader would refuse, or more than it reads.
        StageError: the machine refuses.
    """
    wrong = [name for name in files if not _NAME.fullmatch(name) or name == MANIFEST]
    total = sum(map(len, files.values()))
    if wrong or len(files) >= MOST_MEMBERS or total > MOST_BYTES:
        found = ", ".join(wrong[:3]) or f"{len(files)} files, {total} bytes"
        raise ArtifactError(message(f"{path}: cannot be written as a bundle", found=found))
    listed = [
        {"name": name, "size_bytes": len(files[name]), "sha256": hashlib.sha256(files[name]).hexdigest()}
        for name in sorted(files)
    ]
    content = digest(listed)
    manifest = {"schema_version": SCHEMA_VERSION, "kind": kind, "sha256": content, "files": listed}
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in ((MANIFEST, canonical_json(manifest).encode()), *((n, files[n]) for n in sorted(files))):
            info = zipfile.ZipInfo(name, _DATE)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            info.create_system = 3
            archive.writestr(info, data, compresslevel=6)
    atomic_write(path, buffer.getvalue())
    return content


def read_archive(path: Path, kind: str) -> tuple[dict[str, bytes], str]:
    """The members of an archive, each with the bytes that its manifest promises, and the content's digest.

    Raises:
        ArtifactError: missing, not a zip file, another kind, a member that is missing, surplus, changed, too large,
            or whose name leads elsewhere.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise _broken(path, f"more than {MOST_BYTES >> 20} MiB")
        with zipfile.ZipFile(path) as archive:
            return _read(path, archive, kind)
    except OSError as error:
        raise ArtifactError(
            message(f"{path}: cannot be read", expected="a bundle of ours", found=error.strerror or str(error))
        ) from error
    # What zipfile raises for a file that somebody made up; RuntimeError: a password is asked for.
    except (
        zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, OverflowError, MemoryError,
        NotImplementedError, RuntimeError, IndexError, KeyError,
    ) as error:  # fmt: skip
        text = " ".join(str(error).split())[:120] or type(error).__name__
        raise _broken(path, text) from error


def read_document(files: Mapping[str, bytes], name: str, path: Path) -> dict[str, Any]:
    """The JSON object in a member.

    Raises:
        ArtifactError: no such member, or not a JSON object.
    """
    if name not in files:
        raise _broken(path, f"no {name}")
    try:
        document = json.loads(files[name].decode(), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"{name}: not JSON: {str(error)[:80] or type(error).__name__}") from error
    if not isinstance(document, dict):
        raise _broken(path, f"{name}: a {type(document).__name__}, not an object")
    return document


def _read(path: Path, archive: zipfile.ZipFile, kind: str) -> tuple[dict[str, bytes], str]:
    members = archive.infolist()
    if len(members) > MOST_MEMBERS:
        raise _broken(path, f"{len(members)} members")
    table: dict[str, zipfile.ZipInfo] = {}
    for info in members:
        name = info.filename
        if not _NAME.fullmatch(name) or info.orig_filename != name:
            raise _broken(path, f"a member named {name[:60]!r}")
        if name in table:
            raise _broken(path, f"two members named {name!r}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 0x1:
            raise _broken(path, f"{name!r} is encrypted, or compressed by an unknown method")
        table[name] = info
    if MANIFEST not in table:
        raise _broken(path, f"no {MANIFEST}")
    manifest = read_document({MANIFEST: _bytes(path, archive, table[MANIFEST], MOST_MANIFEST_BYTES)}, MANIFEST, path)
    listed = manifest.get("files")
    if manifest.get("kind") != kind or manifest.get("schema_version") != SCHEMA_VERSION or not isinstance(listed, list):
        raise _broken(path, f"kind {manifest.get('kind')!r}, schema {manifest.get('schema_version')!r}"[:100])
    files: dict[str, bytes] = {}
    total = 0
    for entry in listed:
        if not _is_entry(entry):
            raise _broken(path, f"{MANIFEST}: not a file entry: {entry!r}"[:120])
        name, size = entry["name"], entry["size_bytes"]
        total += size
        if total > MOST_BYTES:
            raise _broken(path, f"members of more than {MOST_BYTES >> 20} MiB")
        if name in files or name not in table or name == MANIFEST:
            raise _broken(path, f"{name!r} is listed twice, or is not there")
        data = _bytes(path, archive, table[name], size)
        if len(data) != size or hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise _broken(path, f"{name!r} was changed: it does not have the digest of {MANIFEST}")
        files[name] = data
    surplus = set(table) - set(files) - {MANIFEST}
    if surplus:
        raise _broken(path, f"members that {MANIFEST} does not list: {', '.join(sorted(surplus)[:3])}")
    if manifest.get("sha256") != digest(listed):
        raise _broken(path, f"{MANIFEST} was changed: it does not have its own digest")
    return files, str(manifest["sha256"])


def _bytes(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> bytes:
    with archive.open(info) as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise _broken(path, f"{info.filename!r} holds more than the {most} bytes that it should")
    return data


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and type(entry.get("size_bytes")) is int
        and entry["size_bytes"] >= 0
        and isinstance(entry.get("sha256"), str)
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _broken(path: Path, found: str) -> ArtifactError:
    return ArtifactError(
        message(
            f"{path}: not a bundle of ours, or damaged",
            expected="the file that `s2d-deploy report --bundle` wrote",
            found=found,
            fix="get it again from whoever made it",
        )
    )
