"""What a stage's key must hold, so that two models never share an entry and one model in another place does.

Everything is identified by content: weights by their bits, data by their bytes, a tokenizer by what it does, code by
its source, libraries by their versions. Paths, modification times and the verbosity of a run are in no key: a
checkpoint or a data set that was copied or checked out anew is still the same one.

What cannot be seen: code that a user's factory merely calls (the files of the factory and of the model's own classes
are read), and the number of threads, which moves float sums by ULPs.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from s2d_deploy import __version__
from s2d_deploy.errors import DataError, message
from s2d_deploy.files import digest, sha256_file

if TYPE_CHECKING:
    from s2d_deploy.recipe import ModelSection

# Libraries whose arithmetic, file formats or decoding get into a stage's bytes. Runtimes stand in keys of their own.
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "scipy",
    "scikit-learn",
    "pillow",
    "safetensors",
    "onnx",
    "onnx-ir",
    "onnxscript",
)
# Of this package: what shows, words or stores a result, and cannot change it. Everything else is in every key.
_SHOWING = (
    *("cli", "cli_options", "compare", "conditioning_view", "console", "diagnosis_recipe", "diagnosis_view", "doctor"),
    *("errors", "files", "follow", "gate", "host", "interrupts", "junit", "manifest", "markup", "plots"),
    *("plots_layers", "recipe", "run", "store", "svg", "tables", "yaml_text"),
)
_SHOWING_PREFIXES = ("report",)
_DEPLOYING = ("export", "runtimes")
_FRAMEWORKS = ("torch", "transformers", "s2d_deploy")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Keys of a transformers config that say where it came from, not what it computes.
_PROVENANCE = ("_name_or_path", "transformers_version", "name_or_path")


def weights_sha256(module: nn.Module) -> str:
    """Digest of names, shapes, types and bits of all weights and buffers: one changed bit is another digest."""
    h = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        h.update(f"{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode())
        h.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()


def model_key(section: ModelSection, module: nn.Module, output: str, companions: Mapping[str, Path]) -> dict[str, Any]:
    """What a float model computes, its weights apart (`weights_sha256`).

    Args:
        section: the recipe's ``model``.
        module: the model built from it.
        output: name of its exported output.
        companions: files beside the weights, which go into the next checkpoint.

    Returns:
        JSON: structure (names, classes and arguments of all layers), the config without its origin, the source of the
        classes where they are not a library's, task, output, digests of the companions.
    """
    config: Any = getattr(module, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else None
    return {
        "structure": digest(_ADDRESS.sub("", repr(module))),
        "config": None if fields is None else digest(_without_provenance(fields)),
        "source": _sources(section, module),
        "factory_arguments": section.factory_arguments if section.factory is not None else None,
        "task": section.task,
        "output": output,
        "companions": {name: sha256_file(path) for name, path in sorted(companions.items())},
    }


def content_sha256(files: Sequence[Path], root: Path) -> str:
    """sha256 over the names (relative to `root`) and bytes of `files`, in order; several are read at once.

    Raises:
        DataError: a file cannot be read.
    """
    try:
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(sha256_file, files))
    except OSError as error:
        raise DataError(
            message(f"{error.filename or root}: cannot be read", found=error.strerror or str(error))
        ) from error
    h = hashlib.sha256()
    for path, sha256 in zip(files, found, strict=True):
        h.update(f"{path.relative_to(root).as_posix()}\0{sha256}\n".encode("utf-8", "surrogateescape"))
    return h.hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """Digest of what a transformers tokenizer does: its whole program, or the vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    program = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    names = list(tokenizer.model_input_names)
    facts = [type(tokenizer).__name__, program, special, names, tokenizer.padding_side, tokenizer.truncation_side]
    return digest(facts)


@cache
def library_versions() -> dict[str, str | None]:
    """Version of every package of `LIBRARIES`, None where it is not installed; Python's without its last part."""
    found: dict[str, str | None] = {"python": ".".join(platform.python_version_tuple()[:2]), "s2d-deploy": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


@cache
def code_sha256(*, deploying: bool) -> str:
    """Digest of this package's source: an edited checkout has the version of the one before, and other results.

    Args:
        deploying: with exporters and runtimes, which the stages before ``onnx`` do not call.
    """
    return source_sha256(_own_sources(deploying))


def source_sha256(sources: Iterable[tuple[str, bytes]]) -> str:
    """Digest of source texts by name; line ends do not count, since a checkout may change them."""
    h = hashlib.sha256()
    for name, text in sources:
        plain = text.replace(b"\r\n", b"\n")
        h.update(f"{name}\0{len(plain)}\0".encode())
        h.update(plain)
    return h.hexdigest()


def counts(name: str) -> bool:
    """Whether the module `name` of this package (dotted, without the package) may change a result."""
    top = name.split(".")[0]
    return top not in _SHOWING and not top.startswith(_SHOWING_PREFIXES)


def _own_sources(deploying: bool) -> list[tuple[str, bytes]]:
    found = []
    # Two packages may lie elsewhere than their names say (an editable install), so each is asked where it lies.
    for package in ("s2d_deploy", *(f"s2d_deploy.{name}" for name in _DEPLOYING if deploying)):
        for root in map(Path, import_module(package).__path__):
            for path in sorted(root.rglob("*.py")):
                name = ".".join(path.relative_to(root).with_suffix("").parts)
                if package == "s2d_deploy" and (name.split(".")[0] in _DEPLOYING or not counts(name)):
                    continue
                found.append((f"{package}.{name}", path.read_bytes()))
    return sorted(found)


def _without_provenance(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _without_provenance(v) for k, v in value.items() if k not in _PROVENANCE}
    if isinstance(value, list | tuple):
        return [_without_provenance(v) for v in value]
    if isinstance(value, bool | int | float | str) or value is None:
        return value if not isinstance(value, float) or (value == value and abs(value) != float("inf")) else repr(value)
    return _ADDRESS.sub("", repr(value))


def _sources(section: ModelSection, module: nn.Module) -> dict[str, str]:
    """Digests of the files that define the model's classes, and the factory, where no framework does; by class."""
    things: dict[str, Any] = {type(m).__qualname__: type(m) for m in module.modules()}
    if section.factory is not None:
        name, _, function = section.factory.partition(":")
        things[f"factory {function}"] = getattr(import_module(name), function)
    found = {}
    for name, thing in sorted(things.items()):
        if str(getattr(thing, "__module__", "")).split(".")[0] in _FRAMEWORKS:
            continue
        try:
            path = inspect.getsourcefile(inspect.unwrap(thing))
            found[name] = sha256_file(Path(path)) if path else ""
        except (TypeError, OSError):  # built in a shell, or in C
            found[name] = ""
    return found
