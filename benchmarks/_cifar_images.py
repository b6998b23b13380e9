"""The images of `cifar_vit.py`: an ImageFolder or a tar of one, decoded once and kept as bytes."""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from s2d_deploy.checkpointing import save
from s2d_deploy.data import IMAGE_SUFFIXES
from s2d_deploy.errors import DataError, message
from s2d_deploy.pixels import read_images


@dataclass(frozen=True, slots=True)
class Images:
    """One split: uint8 pixels ``(n, 3, size, size)``, int64 labels ``(n,)``."""

    pixels: Tensor
    labels: Tensor

    def batch(self, index: Sequence[int] | Tensor, *, flip: Tensor | None = None) -> dict[str, Tensor]:
        """The model's inputs, -1 to 1, and labels; mirrored where `flip`, bool ``(len(index),)``, says so."""
        x = self.pixels[index].float() / 127.5 - 1
        if flip is not None:
            x = torch.where(flip.reshape(-1, 1, 1, 1), x.flip(-1), x)
        return {"pixel_values": x, "labels": self.labels[index]}

    def inputs(self, count: int, size: int) -> list[dict[str, Tensor]]:
        """The first `count` images in batches, without labels."""
        stop = min(count, len(self.labels))
        parts = [self.batch(range(i, min(i + size, stop))) for i in range(0, stop, size)]
        return [{"pixel_values": part["pixel_values"]} for part in parts]


def load_images(data: Path, work: Path, size: int, seed: int) -> dict[str, Images]:
    """Both splits in a shuffled order, decoded once and kept in `work`.

    Raises:
        DataError: no ImageFolder in `data`.
    """
    work.mkdir(parents=True, exist_ok=True)
    kept = work / f"images-{size}.pt"
    if not kept.exists():
        root = data
        if data.is_file():
            root = work / "images"
            if not root.is_dir():
                print(f"unpacking {data.name} ...", flush=True)
                with tarfile.open(data) as archive:
                    archive.extractall(work / "images.partial", filter="data")
                (work / "images.partial").rename(root)
        found = [p for p in (root, *sorted(root.glob("*"))) if (p / "train").is_dir() and (p / "test").is_dir()]
        if not found:
            raise DataError(message(f"{data}: no images", expected="train/CLASS/* and test/CLASS/*"))
        print("decoding ...", flush=True)
        classes = sorted(p.name for p in (found[0] / "train").iterdir() if p.is_dir())
        save(kept, {split: _decoded(found[0] / split, classes, size, seed) for split in ("train", "test")})
    state = torch.load(kept, weights_only=True)
    return {split: Images(*state[split]) for split in ("train", "test")}


def _decoded(folder: Path, classes: list[str], size: int, seed: int) -> tuple[Tensor, Tensor]:
    names = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not names:
        raise DataError(message(f"{folder}: no images", expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}"))
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()
    names = [names[i] for i in order]
    labels = torch.tensor([classes.index(p.relative_to(folder).parts[0]) for p in names])
    zero, one = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    parts = [read_images(names[i : i + 500], (size, size), 3, zero, one) for i in range(0, len(names), 500)]
    return torch.cat([(part * 255).round().to(torch.uint8) for part in parts]), labels
