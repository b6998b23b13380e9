"""Files that are whole or not there: atomic writing, JSON, digests, and the machine's refusals in words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

from s2d_deploy.errors import ArtifactError, StageError, message

REFUSALS = {
    errno.ENOSPC: ("the disk is full", "free some space, or choose another --output, and run again: it resumes"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or choose another --output, and run again"),
    errno.EFBIG: ("the file would exceed the allowed size", "raise the limit (ulimit -f), and run again: it resumes"),
    errno.EACCES: ("permission denied", "make the path readable and writable, or choose another --output"),
    errno.EPERM: ("operation not permitted", "make the path readable and writable, or choose another --output"),
    errno.EROFS: ("the file system is read-only", "choose another --output"),
    errno.ENOTDIR: ("a part of the path is a file", "choose another --output"),
    errno.EIO: ("the device reports an input/output error", "check the disk, or choose another --output"),
}


def canonical_json(document: Any) -> str:
    """`document` as JSON with sorted keys and no spaces: equal documents give equal text.

    Raises:
        TypeError: it holds something that JSON cannot express.
        ValueError: it holds NaN or an infinity.
    """
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(document: Any) -> str:
    """SHA-256 (hexadecimal) of the canonical JSON of `document`."""
    return hashlib.sha256(canonical_json(document).encode()).hexdigest()


def plain_name(text: str) -> str:
    """`text` with a dash for every run of characters that are no letter, digit or dot: fit for a file's name."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text)


def sha256_file(path: Path) -> str:
    """SHA-256 (hexadecimal) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) so that `path` holds the old bytes or all of the new ones.

    Raises:
        StageError: the machine refuses (disk full, no permission, ...); the old file is untouched.
    """
    raw = data.encode() if isinstance(data, str) else data
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        try:
            with temporary.open("wb") as stream:
                stream.write(raw)
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        flush_folder(path.parent)
    except OSError as error:
        raise refused(error, path) from error


def write_json(path: Path, document: Any) -> None:
    """Write `document` as indented JSON, atomically.

    Raises:
        ArtifactError: JSON cannot express it (NaN and infinities included).
        StageError: the machine refuses.
    """
    try:
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            message(f"{path}: cannot be written as JSON", found=str(error), fix="replace NaN and infinities by null")
        ) from error
    atomic_write(path, text + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ArtifactError: missing, unreadable, not UTF-8, not JSON, truncated, or not an object.
    """
    fix = "run the stage that writes it again"
    try:
        document = json.loads(path.read_bytes().decode(), parse_constant=_no_constant)
    except FileNotFoundError:
        raise ArtifactError(message(f"{path}: no such file", expected="a JSON file of ours", fix=fix)) from None
    except OSError as error:
        raise ArtifactError(message(f"{path}: cannot be read", found=error.strerror or str(error))) from error
    except (ValueError, RecursionError) as error:
        found = str(error) or type(error).__name__
        raise ArtifactError(
            message(f"{path}: truncated, or not JSON", expected="a JSON object", found=found, fix=fix)
        ) from error
    if not isinstance(document, dict):
        raise ArtifactError(
            message(f"{path}: not one of ours", expected="a JSON object", found=f"a {type(document).__name__}", fix=fix)
        )
    return document


def flush(path: Path) -> None:
    """Push a file's bytes to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Push a folder's names to the disk: only then does a rename within survive a power cut."""
    try:
        flush(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):  # file systems that cannot flush a folder say so
            raise


def refused(error: OSError, path: Path) -> StageError:
    """The StageError that tells the user what the machine refused while `path` was written, and what to do."""
    what, fix = REFUSALS.get(error.errno or 0, (error.strerror or str(error), "choose another --output"))
    where = error.filename if isinstance(error.filename, str) else path
    return StageError(message(f"{where}: {what}", found=f"error {error.errno} while writing {path}", fix=fix))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
