"""Samples: digits, image folders, text, npz. Deterministic order, checked before the expensive step.

A batch is a dictionary of tensors that the model takes as keyword arguments, first dimension the batch; labels,
where there are some, lie beside it. Everything is read lazily, a batch at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from s2d_deploy.arrays_check import check_promises
from s2d_deploy.cache_keys import content_sha256, tokenizer_sha256
from s2d_deploy.errors import DataError, message
from s2d_deploy.pixels import image_statistics, read_images

if TYPE_CHECKING:
    from s2d_deploy.recipe import DataSection

Batch = dict[str, Tensor]
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
TEXT_SUFFIXES = (".txt", ".md", ".text")


@dataclass(frozen=True, slots=True)
class Samples:
    """One split.

    Attributes:
        load: indices -> batch of inputs.
        labels: int64 ``(n,)``, or None for unlabelled data.
        size: number of samples.
    """

    load: Callable[[Sequence[int]], Batch]
    labels: Tensor | None
    size: int

    def batches(self, batch_size: int, *, shuffle_seed: int | None = None, drop_last: bool = False) -> Iterator[Batch]:
        """Batches without labels, in order, or shuffled by a seed."""
        for index in self._indices(batch_size, shuffle_seed, drop_last):
            yield self.load(index)

    def labelled_batches(
        self, batch_size: int, *, shuffle_seed: int | None = None, drop_last: bool = False
    ) -> Iterator[Batch]:
        """Batches with ``labels`` beside the inputs.

        Raises:
            DataError: the split has no labels.
        """
        if self.labels is None:
            raise DataError(message("this data has no labels", fix="use condition.objective: distill"))
        for index in self._indices(batch_size, shuffle_seed, drop_last):
            yield self.load(index) | {"labels": self.labels[list(index)]}

    def _indices(self, batch_size: int, seed: int | None, drop_last: bool) -> Iterator[list[int]]:
        order = list(range(self.size))
        if seed is not None:
            order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).tolist()
        for start in range(0, self.size, batch_size):
            index = order[start : start + batch_size]
            if len(index) == batch_size or not drop_last:
                yield index


@dataclass(frozen=True, slots=True)
class Dataset:
    """Three splits and the facts a manifest needs.

    Attributes:
        train, calibration, test: the splits; calibration samples come from the training split.
        fingerprint: identifies the data: kind, sizes, how they are read, and a digest of names and bytes.
        max_sequence: padded length of text, else None.
    """

    train: Samples
    calibration: Samples
    test: Samples
    fingerprint: dict[str, Any]
    max_sequence: int | None = None


def first_samples(batches: Iterable[Mapping[str, Tensor]], count: int) -> Iterator[Batch]:
    """Batches cut so that they hold `count` samples in all, or fewer where there are fewer."""
    for batch in batches:
        size = next(iter(batch.values())).shape[0]
        yield {name: tensor[:count] for name, tensor in batch.items()}
        count -= size
        if count <= 0:
            return


def load_data(
    section: DataSection, *, image_size: int | None, channels: int, classes: int | None, model_source: str | None
) -> Dataset:
    """The recipe's data.

    Args:
        section: the recipe's ``data``.
        image_size: side of the square images that the model takes, pixels.
        channels: of those images, 1 or 3.
        classes: number of labels that the model knows, or None.
        model_source: folder or id with the tokenizer and the image statistics.

    Raises:
        DataError: missing, empty or broken data; labels out of range.
    """
    image_size, channels = section.image_size or image_size, section.channels or channels
    loaders = {"digits": _digits, "images": _images, "text": _text, "npz": _npz}
    train, test, facts, length = loaders[section.kind](section, image_size, channels, model_source)
    for name, split in (("training", train), ("test", test)):
        if not split.size:
            raise DataError(message(f"the {name} split is empty", fix=f"put samples into data.path = {section.path}"))
        _check_labels(name, split.labels, classes)
    calibration = _take(train, section.calibration_samples, section.seed)
    test = _take(test, section.test_samples, section.seed)
    fingerprint = {
        "kind": section.kind,
        "train": train.size,
        "test": test.size,
        "calibration": calibration.size,
        "seed": section.seed,
        **facts,
    }
    return Dataset(train, calibration, test, fingerprint, length)


def _check_labels(name: str, labels: Tensor | None, classes: int | None) -> None:
    if labels is None:
        return
    # Below 0 is wrong whatever the model; torch would take -100 for "ignore this sample".
    bad = (labels < 0) | (labels >= classes) if classes is not None else labels < 0
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise DataError(
            message(
                f"{int(bad.sum())} {name} label(s) are out of range, the first at sample {index}",
                expected="0 or more" if classes is None else f"0 to {classes - 1}, for the model's {classes} classes",
                found=str(int(labels[index])),
                fix="use the model that these labels belong to, or set model.config.num_labels",
            )
        )


def _take(samples: Samples, count: int, seed: int) -> Samples:
    """At most `count` samples, drawn without replacement by `seed`, in ascending order."""
    if count >= samples.size:
        return samples
    picked = torch.randperm(samples.size, generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
    labels = None if samples.labels is None else samples.labels[picked]
    return Samples(lambda index: samples.load([picked[i] for i in index]), labels, count)


_Loaded = tuple[Samples, Samples, dict[str, Any], int | None]


def _digits(section: DataSection, image_size: int | None, channels: int, _source: str | None) -> _Loaded:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, scaled to [-1, 1]; 1,200 for training, 597 for the test."""
    from sklearn.datasets import load_digits

    if (image_size, channels) != (8, 1):
        raise DataError(
            message(
                "digits are 8 x 8 pixels with one channel",
                found=f"a model for {image_size} pixels, {channels} channel(s)",
            )
        )
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images.astype(np.float32) / 8.0 - 1.0).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels.astype(np.int64))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(section.seed))
    parts = [_in_memory({"pixel_values": pixels[i]}, targets[i]) for i in (order[:1200], order[1200:])]
    return parts[0], parts[1], {}, None


def _in_memory(tensors: Mapping[str, Tensor], labels: Tensor | None) -> Samples:
    size = len(next(iter(tensors.values())))
    return Samples(lambda index: {name: t[list(index)] for name, t in tensors.items()}, labels, size)


_Files = tuple[list[Path], Tensor | None, list[str]]


def _images(section: DataSection, image_size: int | None, channels: int, source: str | None) -> _Loaded:
    """Images of ``train/`` and ``test/``, or of the folder itself: the last tenth in a seeded order is its test split.

    Class folders make labels; images without them are unlabelled.
    """
    if image_size is None:
        raise DataError(
            message(
                "the model's config names no image size",
                fix="set data.image_size and data.channels, or use data.kind text or npz",
            )
        )
    root = _existing(section)
    if any((root / name).is_dir() for name in ("train", "test")):
        train, test = (_image_folder(root / name, f"{name}/", section.labels) for name in ("train", "test"))
    else:
        train, test = _cut_images(_image_folder(root, "", section.labels), root, section.seed)
    if train[2] != test[2]:
        odd = sorted(set(train[2]) ^ set(test[2]))
        raise DataError(message(f"{root}: train and test have different classes", found=", ".join(odd[:5])))
    mean, std = image_statistics(source, channels)
    shape = (image_size, image_size)

    def samples(files: list[Path], labels: Tensor | None, _classes: list[str]) -> Samples:
        return Samples(
            lambda index: {"pixel_values": read_images([files[i] for i in index], shape, channels, mean, std)},
            labels,
            len(files),
        )

    facts = {
        "files": content_sha256([*train[0], *test[0]], root),
        "mean": mean.flatten().tolist(),
        "std": std.flatten().tolist(),
        "size": image_size,
        "channels": channels,
        "labels": section.labels,
    }
    return samples(*train), samples(*test), facts, None


def _image_folder(folder: Path, shown: str, labelled: bool) -> _Files:
    """Files of a folder in sorted order, their labels, and the names of the classes."""
    if not folder.is_dir():
        raise DataError(
            message(
                f"{folder}: no such folder",
                expected="both train/ and test/ inside data.path, or neither",
                fix="add it, or give the folder that holds the images: the last tenth is then held out",
            )
        )
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise DataError(message(f"{folder}: no images", expected=f"files ending in {', '.join(IMAGE_SUFFIXES)}"))
    loose = [p for p in files if p.parent == folder]
    if loose and len(loose) < len(files):
        raise DataError(
            message(
                f"{folder}: {len(loose)} image(s) lie outside of the class folders, the first {loose[0].name!r}",
                expected=f"{shown}CLASS/*, or no class folders at all",
                fix="move them into class folders, or all images into one folder",
            )
        )
    if loose or not labelled:
        return files, None, []
    names = [p.relative_to(folder).parts[0] for p in files]
    # Train and test need equal classes, so there an empty class folder counts, too.
    classes = sorted({d.name for d in folder.iterdir() if d.is_dir()} if shown else set(names))
    return files, torch.tensor([classes.index(n) for n in names]), classes


def _cut_images(found: _Files, root: Path, seed: int) -> tuple[_Files, _Files]:
    files, labels, classes = found
    if len(files) < 2:
        raise DataError(
            message(
                f"{root}: too few images to hold one out",
                expected="at least 2, and 100 or more for a result that can be judged",
                found=f"{len(files)}",
            )
        )
    kept, held = _held_out(len(files), seed)

    def part(index: list[int]) -> _Files:
        return [files[i] for i in index], None if labels is None else labels[index], classes

    return part(kept), part(held)


def _held_out(n: int, seed: int) -> tuple[list[int], list[int]]:
    """Indices in a seeded order, and the last tenth of it (at least one): never trained or calibrated on."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
    cut = n - max(1, n // 10)
    return order[:cut], order[cut:]


def _text(section: DataSection, _size: int | None, _channels: int, source: str | None) -> _Loaded:
    """One text a line; the last tenth in a seeded order is the test split."""
    root = _existing(section)
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES)
    lines: list[str] = []
    for path in files:
        try:
            lines += [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(message(f"{path}: not readable text", expected="UTF-8", found=str(error))) from error
    if len(lines) < 2:
        raise DataError(message(f"{root}: too little text", expected="at least 2 lines", found=f"{len(lines)}"))
    tokenizer = _tokenizer(section.tokenizer or source)

    def samples(texts: list[str]) -> Samples:
        def load(index: Sequence[int]) -> Batch:
            encoded = tokenizer(
                [texts[i] for i in index],
                padding="max_length",
                truncation=True,
                max_length=section.max_length,
                return_tensors="pt",
            )
            return {
                name: tensor
                for name, tensor in encoded.items()
                if name in ("input_ids", "attention_mask", "token_type_ids")
            }

        return Samples(load, None, len(texts))

    kept, held = _held_out(len(lines), section.seed)
    facts = {
        "files": content_sha256(files, root if root.is_dir() else root.parent),
        "tokenizer": tokenizer_sha256(tokenizer),
        "max_length": section.max_length,
    }
    return samples([lines[i] for i in kept]), samples([lines[i] for i in held]), facts, section.max_length


def _tokenizer(source: str | None) -> Any:
    from transformers import AutoTokenizer

    if source is None:
        raise DataError(message("text needs a tokenizer", fix="set data.tokenizer to a folder or id"))
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and hub clients raise a dozen kinds
        reason = " ".join(str(error).split())[:240]
        raise DataError(
            message(f"no tokenizer in {source!r}", found=reason, fix="set data.tokenizer to a folder or id")
        ) from error
    if tokenizer.pad_token is None:
        raise DataError(message(f"the tokenizer in {source!r} has no padding token", fix="use a BERT-like tokenizer"))
    return tokenizer


def _npz(section: DataSection, _size: int | None, _channels: int, _source: str | None) -> _Loaded:
    """Arrays ``train.<input>`` / ``test.<input>`` (and ``train.labels`` / ``test.labels``) of one .npz file."""
    path = _existing(section)
    try:
        check_promises(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # NumPy, zipfile and the decompressors have a dozen kinds, MemoryError among them
        raise DataError(
            message(
                f"{path}: not a readable .npz file", expected="numeric arrays, never pickled objects", found=str(error)
            )
        ) from error
    odd = [f"{name} ({a.dtype})" for name, a in arrays.items() if a.dtype.kind not in "fiub" or a.dtype.itemsize > 8]
    if odd:
        raise DataError(
            message(f"{path}: arrays that a model cannot take", expected="float, int or bool", found=", ".join(odd))
        )
    splits = []
    for split in ("train", "test"):
        tensors = {n.removeprefix(f"{split}."): _tensor(a) for n, a in arrays.items() if n.startswith(f"{split}.")}
        labels = tensors.pop("labels", None)
        if labels is not None and (labels.is_floating_point() or labels.dim() != 1):
            raise DataError(
                message(
                    f"{path}: {split}.labels",
                    expected="integers of shape (n,)",
                    found=f"{str(labels.dtype).removeprefix('torch.')} of shape {tuple(labels.shape)}",
                )
            )
        if not tensors:
            raise DataError(
                message(
                    f"{path}: no arrays for {split}",
                    expected=f"names like {split}.pixel_values",
                    found=", ".join(arrays) or "nothing",
                )
            )
        scalars = [f"{split}.{name}" for name, t in tensors.items() if not t.dim()]
        if scalars:
            raise DataError(message(f"{path}: {', '.join(scalars)}", expected="a first dimension of samples"))
        sizes = {name: len(t) for name, t in tensors.items()} | ({} if labels is None else {"labels": len(labels)})
        if len(set(sizes.values())) != 1:
            raise DataError(message(f"{path}: {split} arrays differ in their number of samples", found=str(sizes)))
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise DataError(message(f"{path}: {split}.{name} has NaN or infinite values", fix="clean the data"))
        splits.append(_in_memory(tensors, None if labels is None else labels.long()))
    inputs = [sorted(next(iter(s.batches(1)), {})) for s in splits]
    if all(inputs) and inputs[0] != inputs[1]:
        raise DataError(
            message(f"{path}: train and test have different inputs", expected=f"{inputs[0]}", found=f"{inputs[1]}")
        )
    return splits[0], splits[1], {"files": content_sha256([path], path.parent)}, None


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """float32, bool or int64, native byte order: what models take."""
    kind = {"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64)
    with np.errstate(over="ignore"):  # beyond FP32 becomes infinite, which the caller names
        return torch.from_numpy(np.ascontiguousarray(array).astype(kind).reshape(array.shape))


def _existing(section: DataSection) -> Path:
    path = Path(section.path or "").expanduser()
    if not path.exists():
        raise DataError(message(f"data.path {section.path!r} does not exist", fix="set it with --set data.path=PATH"))
    if section.kind == "images" and not path.is_dir():
        raise DataError(message(f"data.path {section.path!r}", expected="a folder of images", found="a file"))
    return path
