"""Object code becomes a shared library: with the compiler that CXX or CC names, or one on PATH that knows the target.

For another architecture that is ``<triple>-g++`` (or -gcc, as Debian's cross compilers are called), or `zig`. Where
nothing can link, the VM's program and the functions' LLVM code are written apart, and a TVM with a compiler makes the
library when it loads: the same code for the same target, a few seconds later.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2d_deploy.errors import RuntimeUnavailable, message
from s2d_deploy.runtimes._tvm_artifact import CODE, LIBRARY, PROGRAM

from ._tvm_isa import is_foreign, triple_of


def link(executable: Any, folder: Path, target: Any) -> tuple[dict[str, str], str]:
    """Write the compiled functions into `folder`.

    Args:
        executable: TVM's VM executable.
        folder: exists.
        target: the TVM target that it was compiled for.

    Returns:
        files by role, and a note for people: "" where there is a library.

    Raises:
        RuntimeUnavailable: the linker refuses, as it does for another architecture's code.
    """
    for name in (LIBRARY, PROGRAM, CODE):
        (folder / name).unlink(missing_ok=True)  # written over, it would change under a session that has it mapped
    command = linker_of(target)
    if command is None:
        executable.mod.write_to_file(str(folder / PROGRAM), "bin")
        (code,) = executable.mod.imports
        code.write_to_file(str(folder / CODE), "ll")
        return {"program": PROGRAM, "code": CODE}, _note(target)

    def shared(output: str, objects: Sequence[str], **_: Any) -> None:
        link_with(command, target, output, objects)

    executable.export_library(str(folder / LIBRARY), fcompile=shared)
    return {"library": LIBRARY}, ""


def link_with(command: Sequence[str], target: Any, output: str, objects: Sequence[str]) -> None:
    """Link `objects` for `target` into the shared library `output`, by the compiler `command`.

    Raises:
        RuntimeUnavailable: it is not there, or refuses.
    """
    # Without symbol tables: they weigh more than the code.
    how = ["-shared", "-fPIC", "-s", *(("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ())]
    try:
        done = subprocess.run([*command, *how, "-o", output, *objects], capture_output=True, text=True, check=False)
    except OSError as error:
        raise _refused(target, command, f"{type(error).__name__}: {error}") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        telling = ("error", "cannot", "incompatible", "unrecognised")
        raise _refused(target, command, next((x for x in lines if any(word in x for word in telling)), lines[-1]))


def linker_of(target: Any) -> list[str] | None:
    """The command that links code for `target`, or None where none is found; CXX and CC come before all others."""
    from tvm.support import cc

    named = os.environ.get("CXX") or os.environ.get("CC")
    if named:
        return shlex.split(named)
    if not is_foreign(target):
        found = cc.get_cc()
        return None if found is None else [found]
    names = _triples(triple_of(target))
    for compiler in ("g++", "gcc"):
        for name in names:
            if shutil.which(f"{name}-{compiler}"):
                return [f"{name}-{compiler}"]
    return ["zig", "c++", "-target", names[-1]] if shutil.which("zig") else None


def _triples(triple: str) -> list[str]:
    """How compilers spell a platform: as given, and without the vendor."""
    parts = triple.split("-")
    return list(dict.fromkeys([triple, "-".join([parts[0], *parts[2:]]) if len(parts) == 4 else triple]))


def _note(target: Any) -> str:
    if not is_foreign(target):
        return "no C compiler on PATH to link with: the code is compiled when the artifact is loaded"
    name = _triples(triple_of(target))[-1]
    return (
        f"no compiler for {name} on PATH ({name}-g++ or zig; or name one by CXX): {CODE} is not linked, "
        "and compiled when a TVM that brings LLVM loads the artifact there"
    )


def _refused(target: Any, command: Sequence[str], reason: str) -> RuntimeUnavailable:
    name = _triples(triple_of(target))[-1]
    fix = f"set CXX to a compiler for that target, e.g. CXX={name}-g++ or CXX='zig c++ -target {name}', or unset it"
    return RuntimeUnavailable(
        message(
            f"{shlex.join(command)} cannot link TVM's code for {target.attrs.get('mtriple') or name}",
            found=reason.strip(),
            fix=fix,
        )
    )
