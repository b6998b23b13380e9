"""The files of a TVM artifact, read without TVM: description, parameters, and whether all of it is ours and whole.

model.json           what was built: inputs, batch sizes, entries, ops, required processor features, digests
model.so             TVM's VM executable: bytecode and compiled functions
params.safetensors   weights in the kernels' layout (4-bit codes two a byte), scales, biases
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from s2d_deploy.errors import ArtifactError, message
from s2d_deploy.files import sha256_file
from s2d_deploy.session import Array, Artifact

FORMAT = "s2d-deploy tvm artifact"
FORMAT_VERSION = 1
LIBRARY, PARAMETERS, DESCRIPTION = "model.so", "params.safetensors", "model.json"
PROGRAM, CODE = "model.vm", "model.ll"
_AGAIN = "build it again with `s2d-deploy build`"


def write_description(folder: Path, files: dict[str, str], description: dict[str, Any]) -> None:
    """Write ``model.json`` beside the other `files` (by role), with their digests."""
    digests = {name: sha256_file(folder / name) for role, name in sorted(files.items()) if role != "description"}
    sizes = {name: (folder / name).stat().st_size for name in digests}  # for readers that cannot compute digests
    facts = {"sha256": digests, "size_bytes": sizes}
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, **description, **facts}
    (folder / DESCRIPTION).write_text(json.dumps(document, indent=1) + "\n")


def read_description(artifact: Artifact) -> dict[str, Any]:
    """``model.json``, after a check that the other files are those it describes.

    Raises:
        ArtifactError: a file is missing, truncated, foreign or changed; it is named.
    """
    roles = set(artifact.files)
    whole = {"parameters", "description"} <= roles and ("library" in roles or {"program", "code"} <= roles)
    if artifact.target != "tvm" or not whole:
        raise ArtifactError(
            message(
                f"{artifact.folder}: not a TVM artifact",
                expected=f"target tvm with {LIBRARY}, {PARAMETERS}, {DESCRIPTION}",
                found=f"target {artifact.target} with {', '.join(map(str, artifact.files.values())) or 'no files'}",
                fix=_AGAIN,
            )
        )
    path = artifact.path("description")
    try:
        document = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            message(f"{path}: cannot be read", found=f"{type(error).__name__}: {error}", fix=_AGAIN)
        ) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(message(f"{path}: not written by s2d-deploy's TVM target", fix=_AGAIN))
    if document.get("format_version") != FORMAT_VERSION:
        raise ArtifactError(
            message(
                f"{path}: another version of the format",
                expected=str(FORMAT_VERSION),
                found=str(document.get("format_version")),
                fix=_AGAIN,
            )
        )
    digests, functions = document.get("sha256"), document.get("functions")
    if not isinstance(digests, dict) or not isinstance(functions, dict) or not all(map(_is_entry, functions.values())):
        raise ArtifactError(
            message(f"{path}: changed", expected="digests and entries with parameters", found="others", fix=_AGAIN)
        )
    for role, name in sorted(artifact.files.items()):
        if role == "description":
            continue
        file = artifact.path(role)
        found = sha256_file(file) if file.is_file() else "nothing"
        expected = str(digests.get(name, "no such file"))
        if found != expected:
            raise ArtifactError(
                message(
                    f"{file}: truncated or changed" if file.is_file() else f"{file}: missing",
                    expected=f"SHA-256 {expected[:12]}",
                    found=found[:12],
                    fix=_AGAIN,
                )
            )
    return document


def _is_entry(entry: Any) -> bool:
    parameters = entry.get("parameters") if isinstance(entry, dict) else None
    return isinstance(parameters, list) and all(isinstance(name, str) for name in parameters)


def read_parameters(artifact: Artifact, about: dict[str, Any]) -> dict[str, Array]:
    """Parameters by name.

    Args:
        artifact: whole, as `read_description` has found.
        about: its description.

    Raises:
        ArtifactError: not a safetensors file, or without a tensor that an entry takes.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = artifact.path("parameters")
    try:
        stored = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(message(f"{path}: not a safetensors file", found=str(error), fix=_AGAIN)) from error
    wanted = {name for entry in about["functions"].values() for name in entry["parameters"]}
    missing = sorted(wanted - stored.keys())
    if missing:
        raise ArtifactError(
            message(
                f"{path}: parameters are missing",
                expected=f"{len(wanted)} tensors",
                found=f"no {', '.join(missing[:3])}",
                fix=_AGAIN,
            )
        )
    return stored
