"""A recipe from a model and its data alone, for ``s2d-deploy diagnose`` and ``condition MODEL --data PATH``.

Nothing is guessed that would change what is measured: a tokenizer or an image processor that is missing is an error,
and class folders count as labels only where their names are the model's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_deploy.errors import DataError, ModelError, message

_TEXT = (".txt", ".md", ".text")
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


def as_recipe(
    source: str,
    data: str | None,
    task: str | None,
    samples: int,
    *,
    purpose: str = "diagnosis",
    sections: Mapping[str, Mapping[str, Any]] | None = None,
) -> str | dict[str, Any]:
    """What `recipe.load_recipe` reads: `source` itself without `data`, else a document.

    Args:
        source: a recipe; with `data` a model folder or hub id.
        data: text file or folder, folder of images, or .npz file.
        task: "embedding" or "image-classification"; None: what the model's config says.
        samples: to calibrate on (for a diagnosis: to look at).
        purpose: the last part of the recipe's name.
        sections: keys by section that stand instead of, or beside, those made here.

    Raises:
        DataError: `data` does not exist, cannot be read, or nothing in it says which kind it is; or the model has no
            image processor.
        ModelError: the model's config cannot be read.
    """
    if data is None:
        return source
    document = recipe_document(source, data, task, samples, purpose)
    for section, keys in (sections or {}).items():
        document[section] = {**document.get(section, {}), **keys}
    if document["data"]["kind"] == "images":
        _require_image_processor(document["model"]["pretrained"])
        _require_images(Path(document["data"]["path"]))
    return document


def conditioning_sections(steps: int | None) -> dict[str, dict[str, Any]]:
    """What conditioning needs beyond a diagnosis: held-out samples, steps, and precisions to be judged at."""
    steps = 300 if steps is None else steps
    return {
        "data": {"test_samples": 500},
        "condition": {"steps": steps, "warmup": min(20, steps // 10)},
        "quantize": {"precisions": ["w8a8", "w4a4"]},
    }


def recipe_document(
    source: str, data: str, task: str | None, samples: int, purpose: str = "diagnosis"
) -> dict[str, Any]:
    """The recipe as a document; arguments and errors as `as_recipe`."""
    folder = Path(source).expanduser()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", (folder.resolve() if folder.is_dir() else folder).name).strip("-._")
    path = Path(data).expanduser()
    names: Sequence[str] | None = None
    if task != "embedding":
        found, names = _task(source)
        task = task or found
    kind = _kind(path)
    section: dict[str, Any] = {
        "kind": kind,
        "path": str(path.resolve()),
        "calibration_samples": samples,
        "test_samples": 1,
        "batch_size": min(samples, 16),
    }
    if kind == "images":
        section["labels"] = names is not None and names == _classes(path)
    return {
        "name": f"{name or 'model'}-{purpose}",
        "model": {"pretrained": str(folder.resolve()) if folder.is_dir() else source, "task": task},
        "data": section,
        "condition": {"objective": "distill"},
        "targets": ["reference"],
    }


def _kind(path: Path) -> str:
    if not path.exists():
        raise DataError(message(f"--data {str(path)!r} does not exist", fix="check the path"))
    if path.is_file():
        if path.suffix.lower() in _IMAGES:
            raise DataError(message(f"--data {str(path)!r} is one image", expected="a folder of images"))
        return "npz" if path.suffix == ".npz" else "text"
    suffixes = [file.suffix.lower() for file in path.rglob("*") if file.is_file()]
    images, texts = (sum(s in known for s in suffixes) for known in (_IMAGES, _TEXT))
    if images or texts:
        return "images" if images >= texts else "text"  # a README beside images does not make them texts
    raise DataError(
        message(
            f"--data {str(path)!r} holds nothing that can be read",
            expected=f"files ending in {', '.join(_TEXT + _IMAGES)}, or one .npz file",
            found="an empty folder" if not suffixes else f"{len(suffixes)} other file(s)",
        )
    )


def _classes(path: Path) -> list[str]:
    """The class folders of a folder of images, sorted."""
    root = path / "train" if (path / "train").is_dir() else path
    return sorted({p.relative_to(root).parts[0] for p in root.glob("*/**/*") if p.suffix.lower() in _IMAGES})


def _require_image_processor(source: str) -> None:
    from s2d_deploy.pixels import has_image_processor

    if not has_image_processor(source):
        raise DataError(
            message(
                f"{source!r} has no preprocessor_config.json, so nothing says how its images are normalized",
                expected="the image processor beside the model, as save_pretrained writes it",
                fix="save it into the model's folder (AutoImageProcessor.from_pretrained(...).save_pretrained(folder))",
            )
        )


def _require_images(root: Path) -> None:
    """Open every image's header now: a file that is none must not stop the run after an hour."""
    from PIL import Image

    def reason(path: Path) -> str | None:
        try:
            with Image.open(path):
                return None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return str(error)

    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file())
    bad = {path: why for path in files if (why := reason(path)) is not None}
    if bad:
        first, why = next(iter(bad.items()))
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DataError(message(f"{first}{more}: not a readable image", found=why, fix="remove or replace the file"))


def _task(source: str) -> tuple[str, Sequence[str] | None]:
    """The task of a checkpoint, and its labels in order where it is a classifier."""
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
    if not any("ForImageClassification" in k for k in kinds):
        return "embedding", None
    labels = getattr(config, "id2label", None) or {}
    return "image-classification", [str(labels[i]) for i in sorted(labels)]
