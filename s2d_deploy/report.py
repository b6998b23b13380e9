"""The report: one document (report.json), and what people and CI read of it (HTML, Markdown, JUnit).

    document = assemble(command=..., results=[...], gates=[...], ...)
    write_reports(document, folder)

All four files are rendered before the first is written, and each is replaced in one step, so that a
failure leaves the previous report whole. JSON has no NaN: a number that is not finite is written as
null, and `not_finite` lists where it stood.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from s2d_deploy.errors import ArtifactError, StageError, message
from s2d_deploy.report_schema import SCHEMA_VERSION, Report, overall_verdict
from s2d_deploy.store import atomic_write, read_json

_log = logging.getLogger(__name__)

FILES = ("report.json", "report.md", "report.html", "junit.xml")


def assemble(
    *,
    command: str | Sequence[str],
    versions: Mapping[str, str],
    host: Mapping[str, Any],
    recipe: Mapping[str, Any],
    model: Mapping[str, Any],
    conditioning: Mapping[str, Any] | None,
    results: Sequence[Mapping[str, Any]],
    gates: Sequence[Mapping[str, Any]],
    ranges: Sequence[Mapping[str, Any]] = (),
    created: str | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The report document, JSON only, with its verdict: the worst of the gates.

    Args:
        command: what the user typed, as text or as an argument list.
        created: ISO 8601; now (UTC) by default.
        more: further top-level keys, kept as they are.

    Raises:
        ArtifactError: a part does not fit the schema; every offending key is named.
    """
    document = {
        "schema_version": SCHEMA_VERSION,
        "created": created or datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": versions,
        "host": host,
        "recipe": recipe,
        "model": model,
        "conditioning": conditioning,
        "ranges": ranges,
        "results": results,
        "gates": gates,
        "verdict": overall_verdict([str(gate.get("verdict")) for gate in gates]),
        **more,
    }
    plain = to_json(document)
    validate(plain)
    return plain


def with_gates(report: Mapping[str, Any], gates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The document with other gates, and the verdict that follows from them."""
    document = to_json({**report, "gates": gates, "verdict": overall_verdict([str(g["verdict"]) for g in gates])})
    validate(document)
    return document


def to_json(document: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `document` with JSON types only: NumPy scalars and arrays, paths and tuples converted.

    Numbers that are not finite become null and are listed under ``not_finite``.

    Raises:
        TypeError: a value has no JSON form; its key is named.
    """
    lost: list[str] = []
    plain = {str(key): _plain(value, str(key), lost) for key, value in document.items()}
    if lost:
        plain["not_finite"] = sorted({*plain.get("not_finite", []), *lost})
        _log.warning("not a finite number, written as null: %s", ", ".join(lost))
    return plain


def validate(document: Mapping[str, Any], source: str = "report") -> Report:
    """The typed view of a document.

    Raises:
        ArtifactError: every key that does not fit, named by its path.
    """
    try:
        return Report.model_validate(document)
    except ValidationError as error:
        wrong = [f"{_path(e['loc'])}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
        raise ArtifactError(
            message(
                f"{source}: not a valid report",
                expected=f"the keys of report.json, schema_version {SCHEMA_VERSION}",
                found="; ".join(wrong),
                fix="write it again with `s2d-deploy report`",
            )
        ) from error


def read_report(path: Path) -> dict[str, Any]:
    """The document in `path` (a report.json, or the folder that holds one), checked.

    Raises:
        ArtifactError: it is missing, truncated, or no report.
    """
    file = path / "report.json" if path.is_dir() else path
    document = read_json(file)
    validate(document, str(file))
    return document


def write_reports(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.json, report.md, report.html and junit.xml into `folder` (created if missing).

    Returns:
        The four paths, in the order of `FILES`.

    Raises:
        ArtifactError: the document does not fit the schema: nothing was written. Or a page cannot be made of a form
            that the schema leaves open: it is named, and the others are written, report.json among them.
        StageError: the folder cannot be written. Files that were there before are whole.
    """
    from s2d_deploy.junit import to_junit
    from s2d_deploy.report_html import to_html
    from s2d_deploy.report_markdown import to_markdown

    document = to_json(report)
    typed = validate(document)
    pages: dict[str, Callable[[Report], str]] = {
        "report.json": lambda _: json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "report.md": to_markdown,
        "report.html": to_html,
        "junit.xml": to_junit,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(
            message(
                f"{folder}: the report's folder cannot be made",
                expected="a folder that can be written",
                found=error.strerror or type(error).__name__,
                fix="correct the permissions, or choose another --output",
            )
        ) from error
    broken: dict[str, Exception] = {}
    for name in FILES:
        try:
            text = pages[name](typed)
        except Exception as error:  # figures are lost least where the document stands without its page
            broken[name] = error
        else:
            atomic_write(folder / name, text)
    for name, cause in broken.items():
        raise ArtifactError(
            message(
                f"{folder / name}: cannot be made from this report",
                expected="the forms that this version writes",
                found=" ".join(f"{type(cause).__name__}: {cause}".split())[:200],
                fix="make the report again; if this version has just made it, report this as a bug, with --debug",
            )
        ) from cause
    return [folder / name for name in FILES]


def _path(location: tuple[int | str, ...]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.lstrip(".") or "document"


def _plain(value: Any, path: str, lost: list[str]) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        # A lone surrogate (from an undecodable file name) has no UTF-8 form.
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        lost.append(path)
        return None
    if isinstance(value, PurePath):
        return _plain(str(value), path, lost)
    if isinstance(value, Mapping):
        return {_plain(str(k), path, lost): _plain(v, f"{path}.{k}", lost) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", lost) for i, item in enumerate(value)]
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return _plain(value.tolist(), path, lost)
    raise TypeError(f"{path}: a {type(value).__name__} has no JSON form")
