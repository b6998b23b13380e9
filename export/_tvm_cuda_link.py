"""The VM executable of a CUDA target becomes a shared library, with machine code for the GPU inside.

Where TVM finds an NVIDIA driver, it compiles device code itself, through a callback that is ours here. Where it finds
none, it keeps the source in a module of the same serialized form, ``format, kernels, code``, with the format "cuda",
which no runtime can load. There we compile the source, and put "cubin" and the machine code in the place of those two.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from s2d_deploy.errors import RuntimeUnavailable, message
from s2d_deploy.runtimes._tvm_artifact import CODE, LIBRARY, PROGRAM

from ._tvm_cuda_compile import DeviceCode, compile_source
from ._tvm_cuda_isa import CudaIsa
from ._tvm_link import link_with, linker_of

_CALLBACK = "tvm_callback_cuda_compile"
_BLOB = "__tvm_ffi__library_bin"


@contextmanager
def own_compiler(isa: CudaIsa, made: dict[str, DeviceCode]) -> Iterator[None]:
    """Let TVM compile device code by `compile_source`; what it makes is left in `made`, by source."""
    import tvm_ffi

    before = tvm_ffi.get_global_func(_CALLBACK, allow_missing=True)

    def compiled(source: str) -> bytes:
        made[source] = compile_source(source, isa)
        return made[source].binary

    tvm_ffi.register_global_func(_CALLBACK, compiled, override=True)
    try:
        yield
    finally:
        if before is not None:
            tvm_ffi.register_global_func(_CALLBACK, before, override=True)


def device_code(executable: Any, isa: CudaIsa, made: dict[str, DeviceCode]) -> DeviceCode:
    """Machine code of the executable's GPU module."""
    if made:
        (code,) = made.values()
        return code
    return compile_source(device_module(executable.mod).inspect_source("cuda"), isa)


def device_module(module: Any) -> Any:
    """The CUDA module among those that `module` imports, however deep."""
    for imported in module.imports:
        if imported.kind == "cuda":
            return imported
        found = device_module(imported)
        if found is not None:
            return found
    return None


def link_cuda(executable: Any, folder: Path, target: Any, code: DeviceCode) -> dict[str, str]:
    """Write ``model.so`` into `folder`; returns the files by role.

    Raises:
        RuntimeUnavailable: no C compiler, or it refuses.
    """
    for name in (LIBRARY, PROGRAM, CODE):
        (folder / name).unlink(missing_ok=True)
    command = linker_of(target)
    if command is None:
        raise RuntimeUnavailable(
            message("no C compiler on PATH to link with", expected="g++ or clang++", fix="install one, or set CXX")
        )

    import tvm

    packed = tvm.get_global_func("runtime.ModulePackImportsToTensor")(executable.mod).numpy().tobytes()
    replaced = replace_source(packed, code.binary)

    def shared(output: str, objects: Sequence[str], **_: Any) -> None:
        given = [_with_modules(Path(name), packed, replaced) for name in objects]
        if packed != replaced and given == list(objects):
            raise _unknown()
        link_with(command, target, output, given)

    executable.export_library(str(folder / LIBRARY), fcompile=shared)
    return {"library": LIBRARY}


def _with_modules(path: Path, packed: bytes, replaced: bytes) -> str:
    """An object file; in place of the one that holds the serialized modules `packed`, one with `replaced`."""
    if packed == replaced or packed not in path.read_bytes():
        return str(path)
    blob, assembly = path.with_suffix(".bin"), path.with_suffix(".machine.S")
    blob.write_bytes(replaced)
    assembly.write_text(
        f'.section .rodata\n.globl {_BLOB}\n.balign 64\n{_BLOB}:\n.incbin "{blob}"\n'
        '.section .note.GNU-stack,"",%progbits\n'
    )
    return str(assembly)


def replace_source(packed: bytes, binary: bytes) -> bytes:
    """Serialized modules, with `binary` where a CUDA module holds its source.

    The form, with every count as 64 bits: size of the rest, import tree (two lists of counts), then each module's kind
    and, but for ``"_lib"``, its bytes; those of a CUDA module are a format, kernels with their signatures, the code.

    Raises:
        RuntimeUnavailable: TVM has written another form.
    """
    at = 8
    for _ in range(2):
        (length,) = struct.unpack_from("<Q", packed, at)
        at += 8 + 8 * length
    pieces, replaced = [packed[8:at]], 0
    while at < len(packed):
        kind, at = _read(packed, at)
        pieces.append(_string(kind))
        if kind == b"_lib":
            continue
        content, at = _read(packed, at)
        if kind == b"cuda" and content.startswith(_string(b"cuda")):
            content, replaced = _as_cubin(content, binary), replaced + 1
        elif kind == b"cuda":
            replaced += 1
        pieces.append(_string(content))
    if replaced != 1 or at != len(packed):
        raise _unknown()
    body = b"".join(pieces)
    return struct.pack("<Q", len(body)) + body


def _as_cubin(content: bytes, binary: bytes) -> bytes:
    """A CUDA module of format "cuda" as one of format "cubin"; the code is the last of its strings."""
    begin = len(_string(b"cuda"))
    source = content.find(b"\n#ifdef __CUDACC_RTC__", begin)
    if source < 8 or struct.unpack_from("<Q", content, source - 8)[0] != len(content) - source:
        raise _unknown()
    return _string(b"cubin") + content[begin : source - 8] + _string(binary)


def _read(packed: bytes, at: int) -> tuple[bytes, int]:
    """A string, and where it ends."""
    if at + 8 > len(packed):
        raise _unknown()
    (size,) = struct.unpack_from("<Q", packed, at)
    if size > len(packed) - at - 8:
        raise _unknown()
    return packed[at + 8 : at + 8 + size], at + 8 + size


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _unknown() -> RuntimeUnavailable:
    return RuntimeUnavailable(
        message(
            "TVM has serialized its modules in a form that is not known here",
            expected="the form of TVM 0.27",
            fix="build on a machine with an NVIDIA driver, or with that version",
        )
    )
