"""A recipe from a model and its data alone, for ``s2d-deploy diagnose MODEL --data PATH``."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from s2d_deploy.errors import DataError, ModelError, message

_TEXT = (".txt", ".md", ".text")
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


@contextmanager
def as_recipe(source: str, data: str | None, task: str | None, samples: int) -> Iterator[str]:
    """What `recipe.load_recipe` reads: `source` itself without `data`, else a file that is made for the block.

    Args:
        source: a recipe; with `data` a model folder or hub id.
        data: text file or folder, image folder (train/ and test/), or .npz file.
        task: "embedding" or "image-classification"; None: what the model's config says.
        samples: to look at.

    Raises:
        DataError: `data` does not exist, or nothing in it says which kind it is.
        ModelError: the model's config cannot be read.
    """
    if data is None:
        yield source
        return
    document = recipe_document(source, data, task, samples)
    with tempfile.TemporaryDirectory(prefix="s2d-deploy-") as folder:
        path = Path(folder) / f"{document['name']}.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        yield str(path)


def recipe_document(source: str, data: str, task: str | None, samples: int) -> dict[str, Any]:
    """The recipe as a document; arguments and errors as `as_recipe`."""
    folder = Path(source).expanduser()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", (folder.resolve() if folder.is_dir() else folder).name).strip("-._")
    path = Path(data).expanduser()
    return {
        "name": f"{name or 'model'}-diagnosis",
        "model": {"pretrained": str(folder.resolve()) if folder.is_dir() else source, "task": task or _task(source)},
        "data": {
            "kind": _kind(path),
            "path": str(path.resolve()),
            "calibration_samples": samples,
            "test_samples": 1,
            "batch_size": min(samples, 16),
        },
        "condition": {"objective": "distill"},
        "targets": ["reference"],
    }


def _kind(path: Path) -> str:
    if not path.exists():
        raise DataError(message(f"--data {str(path)!r} does not exist", fix="check the path"))
    if path.is_file():
        return "npz" if path.suffix == ".npz" else "text"
    for file in path.rglob("*"):
        if file.suffix.lower() in _IMAGES:
            return "images"
        if file.suffix.lower() in _TEXT:
            return "text"
    raise DataError(
        message(
            f"--data {str(path)!r} holds nothing that can be read",
            expected=f"files ending in {', '.join(_TEXT + _IMAGES)}, or one .npz file",
            found="an empty folder, or other files",
        )
    )


def _task(source: str) -> str:
    from transformers import AutoConfig

    folder = Path(source).expanduser()
    try:
        config = AutoConfig.from_pretrained(str(folder) if folder.is_dir() else source, trust_remote_code=False)
    except Exception as error:  # transformers raises a dozen kinds here, hub clients more
        raise ModelError(
            message(
                f"{source!r} is no model that can be loaded",
                expected="with --data: a folder written by save_pretrained, or a hub id that can be reached",
                found=" ".join(str(error).split())[:240],
                fix="check the path, or leave --data out if it is a recipe",
            )
        ) from error
    kinds = getattr(config, "architectures", None) or []
    return "image-classification" if any("ForImageClassification" in k for k in kinds) else "embedding"
