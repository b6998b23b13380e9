"""The stage store: what lets a run resume, and what keeps a half-written file from looking whole.

A stage is a function that fills a folder. It works in ``<root>/.partial/``; its ``manifest.json``
(key, sizes, SHA-256 of every file) is written last, everything is flushed to the disk, and one rename
puts the folder in place. A stage is reused when the manifest's key equals the one asked for and every
file still has its recorded bytes. A kill at any moment therefore leaves the old result or the new one:
never a mixture. Between the two renames of a replacement the place is empty for an instant; the next
run that opens the folder puts the old result back.

The key must hold everything that the result depends on (recipe section, versions, digests of what is
read): the store compares keys, it cannot know what was left out of one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

from s2d_deploy.errors import ArtifactError, RecipeError, S2DDeployError, StageError, message
from s2d_deploy.files import (
    REFUSALS,
    atomic_write,
    canonical_json,
    digest,
    flush,
    flush_folder,
    read_json,
    refused,
    sha256_file,
    write_json,
)
from s2d_deploy.interrupts import raise_if_interrupted
from s2d_deploy.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    check_schema,
    differences,
    own_digest,
    read_manifest,
    regular_files,
    verify_folder,
)

__all__ = [
    "MANIFEST",
    "RunFolder",
    "Stage",
    "atomic_write",
    "canonical_json",
    "differences",
    "digest",
    "read_json",
    "read_manifest",
    "sha256_file",
    "verify_folder",
    "write_json",
]

log = logging.getLogger(__name__)

RUN_KIND = "s2d-deploy run"
_LOCK = ".s2d-deploy.lock"  # its presence says that the folder is ours, even before a recipe is recorded
_PARTIAL = ".partial"
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")


@dataclass(frozen=True, slots=True)
class Stage:
    """A finished stage.

    Attributes:
        name: e.g. ``"export/ort/w4a4"``.
        folder: where its files lie.
        manifest: its whole manifest.
        cached: whether it was reused; otherwise the work was done now.
        why: why the work was done ("" when reused), e.g. ``"not there yet"`` or ``"key changed: bits"``.
    """

    name: str
    folder: Path
    manifest: dict[str, Any]
    cached: bool
    why: str

    @property
    def info(self) -> dict[str, Any]:
        """What the work returned when it ran."""
        return dict(self.manifest["info"])

    @property
    def sha256(self) -> str:
        """Digest of what the stage holds (names and bytes): the part of a later stage's key that depends on it."""
        return digest(self.manifest["files"])

    @property
    def identity(self) -> str:
        """Digest of what it was made from and of what it holds.

        What a stage reads may go beyond the files of the one before (labels, a model's config): a key that holds the
        identity of that stage holds whatever its key held, and so on to the first.
        """
        return digest({"key": self.manifest["key_sha256"], "files": self.manifest["files"]})


class RunFolder:
    """One output folder, locked for one process. Use it as a context manager.

    Entering takes the lock, cleans what a killed run left behind, and puts back a result that was
    being replaced when the kill came. The lock dies with the process, however that ends.

    Args:
        root: the folder; made when missing.
        versions: package -> version, recorded in every manifest.

    Raises:
        RecipeError: (on entering) the folder holds files that are not ours.
        StageError: (on entering) another process holds the lock, or the machine refuses.
    """

    def __init__(self, root: Path | str, versions: Mapping[str, str] | None = None) -> None:
        self.root = Path(root).absolute()
        self.versions = dict(versions or {})
        self._lock: int | None = None

    def __enter__(self) -> RunFolder:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            self._take_lock()
            self._recover()
        except OSError as error:
            self._release()
            raise refused(error, self.root) from error
        except BaseException:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    def claim(self, recipe_document: dict[str, Any], update: bool = False) -> None:
        """Tie the folder to a resolved recipe, or check that it already is.

        With `update`, or while no stage is finished, another recipe replaces the recorded one; stages whose keys
        change are redone.

        Raises:
            RecipeError: the folder holds another recipe; the differing keys are listed.
            ArtifactError: the folder's manifest is damaged.
        """
        self._need_lock()
        path = self.root / MANIFEST
        recipe = json.loads(canonical_json(recipe_document))
        if path.exists():
            recorded = self._root_manifest()["recipe"]
            changes = differences(recorded, recipe)
            if not changes:
                return
            if not update and self._has_stages():
                shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
                raise RecipeError(
                    message(
                        f"{self.root} holds the results of another recipe",
                        expected="the recipe that the folder was made with",
                        found=f"differing keys: {shown}",
                        fix="choose another --output, or pass --update to redo what changed",
                    )
                )
        write_json(
            path,
            {
                "schema_version": SCHEMA_VERSION,
                "kind": RUN_KIND,
                "created": _now(),
                "versions": self.versions,
                "recipe": recipe,
            },
        )

    def _has_stages(self) -> bool:
        """Whether any stage was finished; a folder without one may be claimed anew."""
        return any(path.parent != self.root for path in self.root.glob(f"*/**/{MANIFEST}"))

    def path(self, name: str) -> Path:
        """The folder of stage `name`.

        Raises:
            StageError: the name leaves the run folder: absolute, a parent, a hidden part, or through a link.
        """
        parts = name.split("/")
        if not all(_SEGMENT.fullmatch(part) and part != MANIFEST for part in parts):
            raise StageError(
                message(
                    f"{name!r} is not a stage name",
                    expected="letters, digits, '.', '_' and '-', parts separated by '/', such as 'export/ort/w4a4'",
                )
            )
        folder = self.root
        for part in parts:
            folder = folder / part
            if folder.is_symlink():
                raise StageError(
                    message(f"stage {name!r}: {folder} is a symbolic link", fix="remove the link, and run again")
                )
        return folder

    def run(self, name: str, key: Mapping[str, Any], work: Callable[[Path], Mapping[str, Any]]) -> Stage:
        """Reuse stage `name`, or do its work and put it in place.

        Args:
            name: ``"condition"``, ``"export/ort/w4a4"``, ... One stage may not lie inside another.
            key: everything that the result depends on; JSON only.
            work: fills the empty folder it is given; returns JSON facts for the manifest's ``info``.

        Raises:
            StageError: the machine refuses, or the stage would lie inside another.
            ArtifactError: the work left a link or a special file, or facts that are not JSON.
            Whatever `work` raises. In all these cases the old result stays as it was.
        """
        self._need_lock()
        final = self.path(name)
        wanted = json.loads(canonical_json(dict(key)))
        manifest, why = self._reusable(name, final, wanted)
        if manifest is not None:
            log.info("stage %s: reused", name)
            return Stage(name, final, manifest, True, "")
        log.info("stage %s: %s", name, why)
        self._refuse_nesting(name, final)
        partial = self.root / _PARTIAL / f"{quote(name, safe='')}-{os.getpid()}"
        try:
            _remove(partial)
            partial.mkdir(parents=True)
            manifest = self._fill(name, wanted, work, partial)
            self._put_in_place(partial, final, name)
        except Exception as error:
            refusal = _machine_refusal(error, final, partial)
            if refusal is None:
                raise
            raise refusal from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Stage(name, final, manifest, False, why)

    def _fill(
        self, name: str, key: dict[str, Any], work: Callable[[Path], Mapping[str, Any]], partial: Path
    ) -> dict[str, Any]:
        start = time.perf_counter()
        info = dict(work(partial))
        raise_if_interrupted()
        seconds = time.perf_counter() - start
        if (partial / MANIFEST).exists():
            raise ArtifactError(message(f"stage {name!r} wrote a {MANIFEST}; the store writes it, last"))
        files = []
        for file, relative in regular_files(partial):
            flush(file)
            files.append({"name": relative, "size_bytes": file.stat().st_size, "sha256": sha256_file(file)})
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "stage": name,
            "key": key,
            "key_sha256": digest(key),
            "created": _now(),
            "seconds": round(seconds, 3),
            "versions": self.versions,
            "files": files,
            "info": info,
        }
        for folder, _, _ in os.walk(partial):
            flush_folder(Path(folder))
        write_json(partial / MANIFEST, sealed(manifest, partial / MANIFEST))
        return read_json(partial / MANIFEST)  # what a later run will see: tuples are lists, keys are strings

    def _put_in_place(self, partial: Path, final: Path, name: str) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        aside = self.root / _PARTIAL / f"{quote(name, safe='')}.old"
        if final.exists():
            final.rename(aside)
        partial.rename(final)
        flush_folder(final.parent)
        _remove(aside)

    def _reusable(self, name: str, final: Path, key: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        if not final.exists():
            return None, "not there yet"
        try:
            manifest = read_manifest(final)
            if manifest["stage"] != name:
                return None, f"the folder is that of stage {manifest['stage']!r}"
            if manifest["key_sha256"] != digest(key):
                return None, f"key changed: {'; '.join(differences(manifest['key'], key))}"
            return verify_folder(final), ""
        except ArtifactError as error:
            log.warning("stage %s is damaged, and is made again: %s", name, error)
            return None, str(error)

    def _refuse_nesting(self, name: str, final: Path) -> None:
        for parent in final.parents:
            if parent == self.root:
                break
            if (parent / MANIFEST).exists():
                raise StageError(message(f"stage {name!r} would lie inside the finished stage {parent}"))
        if final.is_dir() and not (final / MANIFEST).exists():
            # Without a manifest it is no stage: replacing it could destroy stages, or somebody's files, within.
            inside = sorted(str(p.relative_to(final)) for p in final.rglob("*") if not p.is_dir())
            if inside:
                raise StageError(
                    message(
                        f"stage {name!r}: {final} holds files that no stage of this name wrote",
                        found=", ".join(inside[:5]) + (", ..." if len(inside) > 5 else ""),
                        fix="move them away, or choose another --output",
                    )
                )

    def _refuse_foreign(self) -> None:
        if (self.root / MANIFEST).exists():
            self._root_manifest()
            return
        if (self.root / _LOCK).exists():
            return
        foreign = sorted(p.name for p in self.root.iterdir() if not _is_own_litter(p.name))
        if foreign:
            raise RecipeError(
                message(
                    f"{self.root} is not empty and not one of our output folders",
                    expected=f"an empty or new folder, or one with our {MANIFEST}",
                    found=", ".join(foreign[:5]) + (", ..." if len(foreign) > 5 else ""),
                    fix="choose another --output",
                )
            )

    def _root_manifest(self) -> dict[str, Any]:
        path = self.root / MANIFEST
        try:
            document = read_json(path)
        except ArtifactError as error:
            raise ArtifactError(f"{error} If the folder is not one of ours, choose another --output.") from error
        if document.get("kind") != RUN_KIND or not isinstance(document.get("recipe"), dict):
            raise RecipeError(
                message(
                    f"{path} is not the manifest of one of our output folders",
                    expected=f"kind {RUN_KIND!r} and a recipe",
                    found=f"keys {', '.join(sorted(document)) or 'none'}",
                    fix="choose another --output",
                )
            )
        check_schema(path, document)
        return document

    def _take_lock(self) -> None:
        path = self.root / _LOCK
        while True:
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise self._in_use(path, self._lock) from None
            if _same_file(path, self._lock):
                break
            self._release()  # somebody removed the file in between: what is locked is not what others will open
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)

    def _in_use(self, path: Path, lock: int) -> StageError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip()
        known = holder.isascii() and holder.isdigit()
        who = f"process {holder}" if known else "a process that has not yet said its number"
        ended = known and not Path(f"/proc/{holder}").exists() and Path("/proc/self").exists()
        return StageError(
            message(
                f"{self.root} is in use by another run",
                found=f"{who} holds {path}" + (", or one that it has started: it has ended itself" if ended else ""),
                fix=f"wait until {who if known else 'it'} has ended, or stop it, or choose another --output",
            )
        )

    def _recover(self) -> None:
        """Nobody else works here now: whatever lies in .partial is left over from a killed run."""
        for leftover in (*self.root.glob(".*.tmp"), *self.root.glob("parts/*/.*.tmp")):
            if _TEMPORARY.fullmatch(leftover.name) and not leftover.is_dir():
                leftover.unlink()
        partial = self.root / _PARTIAL
        if partial.is_symlink():
            raise StageError(message(f"{partial} is a symbolic link", fix="remove the link, and run again"))
        if not partial.is_dir():
            return
        for aside in partial.glob("*.old"):
            final = self.path(unquote(aside.name.removesuffix(".old")))
            if not final.exists():
                log.warning("%s: a kill came while it was being replaced; the old result is back", final)
                final.parent.mkdir(parents=True, exist_ok=True)
                aside.rename(final)
        _remove(partial)

    def _need_lock(self) -> None:
        if self._lock is None:
            raise StageError(message(f"{self.root} is not locked", fix="use RunFolder as a context manager"))

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sealed(manifest: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """`manifest` as JSON will give it back, with its digest.

    Raises:
        ArtifactError: JSON cannot express it; `path` is named.
    """
    try:
        plain: dict[str, Any] = json.loads(json.dumps(manifest, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            message(f"{path}: cannot be written as JSON", found=str(error), fix="replace NaN and infinities by null")
        ) from error
    return plain | {"sha256": own_digest(plain)}


def _is_own_litter(name: str) -> bool:
    return name in (_LOCK, _PARTIAL) or _TEMPORARY.fullmatch(name) is not None


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _remove(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _machine_refusal(error: Exception, final: Path, partial: Path) -> StageError | None:
    """The StageError for a refusal of the machine; None for any other error.

    Serializers in C++ and Rust raise their own classes when the disk is full, so the text and the free
    space are looked at, too.
    """
    if isinstance(error, S2DDeployError):
        return None
    if isinstance(error, OSError):
        return refused(error, final) if error.errno in REFUSALS else None
    try:
        full = shutil.disk_usage(partial).free < 4096
    except OSError:
        full = False
    for number in REFUSALS:
        reason = os.strerror(number)
        # Rust writes "File too large (os error 27)"; C++ the reason alone.
        if f"(os error {number})" in str(error) or (number == errno.ENOSPC and (full or reason in str(error))):
            return refused(OSError(number, reason), final)
    return None
