"""Data: what is loaded, in which order, and how bad files are named. Images, texts and tokenizers are made here."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2d_deploy.data import Dataset, Samples, load_data
from s2d_deploy.errors import DataError
from s2d_deploy.recipe import DataSection


def load(
    kind: str,
    path: Path | None = None,
    *,
    size: int | None = 8,
    channels: int = 3,
    classes: int | None = None,
    source: str | None = None,
    **fields: Any,
) -> Dataset:
    section = DataSection(kind=kind, path=None if path is None else str(path), **fields)  # type: ignore[arg-type]
    return load_data(section, image_size=size, channels=channels, classes=classes, model_source=source)


def whole(samples: Samples, batch_size: int = 3, **options: Any) -> dict[str, torch.Tensor]:
    parts = list(samples.batches(batch_size, **options))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def refusal(*args: Any, **fields: Any) -> str:
    with pytest.raises(DataError) as caught:
        load(*args, **fields)
    return str(caught.value)


# ---- digits and batches -------------------------------------------------------------------------------------


def digits(**fields: Any) -> Dataset:
    return load("digits", channels=1, classes=10, **fields)


def test_digits_are_split_scaled_and_repeatable() -> None:
    data = digits(test_samples=1000)
    assert (data.train.size, data.test.size, data.calibration.size) == (1200, 597, 256)
    pixels = whole(data.train, 500)["pixel_values"]
    assert pixels.shape == (1200, 1, 8, 8)
    assert (float(pixels.min()), float(pixels.max())) == (-1.0, 1.0)
    again = digits(test_samples=1000)
    assert torch.equal(pixels, whole(again.train, 7)["pixel_values"])
    assert data.fingerprint == again.fingerprint
    other = digits(test_samples=1000, seed=1)
    assert not torch.equal(pixels, whole(other.train, 500)["pixel_values"])
    assert other.fingerprint != data.fingerprint
    # Both splits together are scikit-learn's data, each image once.
    from sklearn.datasets import load_digits

    mine = torch.cat([pixels, whole(data.test, 500)["pixel_values"]]).reshape(-1, 64)
    theirs = torch.from_numpy(load_digits().data.astype(np.float32) / 8 - 1)
    assert sorted(map(tuple, mine.tolist())) == sorted(map(tuple, theirs.tolist()))


def test_calibration_is_drawn_from_training_and_never_from_the_test() -> None:
    data = digits(calibration_samples=100)
    train, test, calibration = (
        {tuple(row) for row in whole(s, 300)["pixel_values"].flatten(1).tolist()}
        for s in (data.train, data.test, data.calibration)
    )
    assert len(calibration) == 100
    assert calibration <= train
    assert not calibration & test


def test_labels_stay_with_their_samples_when_shuffled_or_drawn() -> None:
    data = digits(calibration_samples=50)
    known = {
        tuple(x.flatten().tolist()): int(y)
        for batch in data.train.labelled_batches(200)
        for x, y in zip(batch["pixel_values"], batch["labels"], strict=True)
    }
    for samples, seed in ((data.train, 3), (data.calibration, None), (data.calibration, 4)):
        for batch in samples.labelled_batches(64, shuffle_seed=seed):
            for x, y in zip(batch["pixel_values"], batch["labels"], strict=True):
                assert known[tuple(x.flatten().tolist())] == int(y)


def numbered(n: int) -> Samples:
    return Samples(lambda index: {"x": torch.tensor(list(index))}, None, n)


def test_batches_are_deterministic_and_shuffled_by_seed() -> None:
    samples = numbered(10)
    assert [b["x"].tolist() for b in samples.batches(4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [b["x"].tolist() for b in samples.batches(4, drop_last=True)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    first, second, other = (whole(samples, 4, shuffle_seed=s)["x"].tolist() for s in (1, 1, 2))
    assert first == second != other
    assert sorted(first) == list(range(10))
    torch.manual_seed(5)  # the global generator plays no part
    assert whole(samples, 3, shuffle_seed=1)["x"].tolist() == first
    with pytest.raises(DataError, match=r"this data has no labels\. Fix: use condition\.objective: distill"):
        next(samples.labelled_batches(2))


def test_digits_of_another_shape_or_with_unknown_labels() -> None:
    assert "digits are 8 x 8 pixels with one channel. Found: a model for 16 pixels, 3 channel(s)." in refusal(
        "digits", size=16
    )
    text = refusal("digits", channels=1, classes=7)
    assert "training label(s) are out of range, the first at sample" in text
    assert "Expected: 0 to 6, for the model's 7 classes." in text


# ---- images -------------------------------------------------------------------------------------------------


def picture(path: Path, value: int, mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value, value, value)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(tmp_path / split / name / f"{i}.png", 40 * label + 10 * i)
    return tmp_path


def test_image_folders_give_pixels_and_labels_in_sorted_order(folder: Path) -> None:
    data = load("images", folder, classes=2)
    assert data.train.labels is not None
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = whole(data.train)["pixel_values"]
    assert pixels.shape == (6, 3, 8, 8)
    for i, value in enumerate([0, 10, 20, 40, 50, 60]):  # (x / 255 - 0.5) / 0.5
        assert torch.allclose(pixels[i], torch.full((3, 8, 8), value / 127.5 - 1), atol=1e-6)
    assert data.test.size == 4


def test_images_are_resized_converted_and_normalized_as_the_checkpoint_says(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "train" / "cat")
    for name, mode, size in (("a.png", "L", (20, 5)), ("b.JPG", "RGB", (3, 3)), ("c.bmp", "RGB", (8, 8))):
        picture(folder / "train" / "cat" / name, 51, mode, size)
    (folder / "train" / "cat" / "notes.txt").write_text("not an image")
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 1.0]})
    )
    pixels = whole(load("images", folder, source=str(checkpoint)).train)["pixel_values"][:3]
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 0.25), (0.3, 1.0))):
        assert torch.allclose(
            pixels[:, channel], torch.tensor((51 / 255 - mean) / std), atol=0.02
        )  # JPEG loses a little
    grey = load("images", folder, channels=1).train
    assert whole(grey)["pixel_values"].shape == (6, 1, 8, 8)
    (checkpoint / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False, "image_mean": [9, 9, 9]}))
    assert torch.allclose(
        whole(load("images", folder, source=str(checkpoint)).train)["pixel_values"][2], torch.tensor(0.2), atol=1e-6
    )


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{", "preprocessor_config.json: not readable JSON"),
        ('{"image_mean": [0.5]}', "image statistics do not fit. Expected: 3 means and 3 positive spreads."),
        ('{"image_std": [0.5, 0, 1]}', "image statistics do not fit"),
        ('{"image_mean": "a"}', "image statistics"),
    ],
)
def test_broken_image_statistics_are_named(folder: Path, text: str, found: str) -> None:
    (folder / "preprocessor_config.json").write_text(text)
    assert found in refusal("images", folder, source=str(folder))


def test_images_without_class_folders_have_no_labels(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for i in range(2):
            picture(tmp_path / split / f"{i}.png", i)
    data = load("images", tmp_path, classes=10)
    assert data.train.labels is None
    assert data.train.size == 2


def test_bad_image_folders_are_named(folder: Path) -> None:
    missing = folder / "none"
    assert f"data.path '{missing}' does not exist. Fix: set it with --set data.path=PATH." in refusal("images", missing)
    assert "Expected: a folder of images. Found: a file." in refusal("images", folder / "train/cat/0.png")
    assert "the model's config names no image size. Fix: set data.image_size" in refusal("images", folder, size=None)
    assert load("images", folder, size=None, image_size=4, channels=1).train.size == 6
    picture(folder / "train" / "loose.png", 1)
    text = refusal("images", folder)
    assert "1 image(s) lie outside of the class folders, the first 'loose.png'. Expected: train/CLASS/*" in text
    (folder / "train" / "loose.png").unlink()
    (folder / "test" / "dog").rename(folder / "test" / "dgo")
    assert "train and test have different classes. Found: dgo, dog." in refusal("images", folder)
    for file in (folder / "test").rglob("*.png"):
        file.unlink()
    assert "test: no images. Expected: files ending in .jpg, .jpeg, .png" in refusal("images", folder)


def test_a_folder_without_splits_holds_out_the_last_tenth_of_a_seeded_order(tmp_path: Path) -> None:
    for i in range(30):
        picture(tmp_path / f"{i:02d}.png", 8 * i)
    data = load("images", tmp_path, calibration_samples=9)
    assert (data.train.size, data.test.size, data.train.labels, data.test.labels) == (27, 3, None, None)

    def values(samples: Samples) -> list[int]:
        return [round((float(x.mean()) + 1) * 127.5 / 8) for x in whole(samples)["pixel_values"]]

    train, test = values(data.train), values(data.test)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0)).tolist()
    assert (train, test) == (order[:27], order[27:])
    assert set(values(data.calibration)) <= set(train)
    assert values(load("images", tmp_path, seed=1).test) != test
    # Reading the folder again gives the same split, whatever the order of the directory's entries.
    assert values(load("images", tmp_path).test) == test


def test_class_folders_without_splits_are_labels_unless_told_otherwise(folder: Path) -> None:
    data = load("images", folder / "train", classes=2)
    assert (data.train.size, data.test.size) == (5, 1)
    assert data.train.labels is not None
    assert data.test.labels is not None
    assert sorted([*data.train.labels.tolist(), *data.test.labels.tolist()]) == [0, 0, 0, 1, 1, 1]
    for batch in data.train.labelled_batches(1):  # cats are darker than 40
        value = round((float(batch["pixel_values"].mean()) + 1) * 127.5)
        assert int(batch["labels"][0]) == (value >= 40)
    assert load("images", folder / "train", classes=1, labels=False).train.labels is None
    picture(folder / "train" / "loose.png", 1)
    assert "Expected: CLASS/*, or no class folders at all." in refusal("images", folder / "train")


def test_folders_that_cannot_be_split_are_named(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "test")
    text = refusal("images", folder)
    assert "test: no such folder. Expected: both train/ and test/ inside data.path, or neither." in text
    assert "the last tenth is then held out" in text
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty: no images. Expected: files ending in .jpg" in refusal("images", empty)
    picture(empty / "only.png", 1)
    assert "too few images to hold one out. Expected: at least 2, and 100 or more" in refusal("images", empty)


def test_labels_beyond_the_models_classes_are_counted(folder: Path) -> None:
    text = refusal("images", folder, classes=1)
    assert "3 training label(s) are out of range, the first at sample 3. Expected: 0 to 0" in text
    assert "Found: 1. Fix: use the model that these labels belong to, or set model.config.num_labels." in text


@pytest.mark.parametrize("damage", ["empty", "truncated", "foreign"])
def test_a_broken_image_is_named_when_it_is_read(folder: Path, damage: str) -> None:
    bad = folder / "train" / "dog" / "1.png"
    big = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    big.save(bad)
    content = {"empty": b"", "truncated": bad.read_bytes()[:2000], "foreign": b"hello"}[damage]
    bad.write_bytes(content)
    data = load("images", folder)
    with pytest.raises(DataError, match=rf"{bad}: not a readable image\. Found: .*Fix: remove or replace the file"):
        whole(data.train)


def test_fingerprints_tell_data_apart(folder: Path) -> None:
    first = load("images", folder).fingerprint
    assert load("images", folder).fingerprint == first
    for fields in ({"size": 16}, {"seed": 1}, {"calibration_samples": 2}):
        assert load("images", folder, **fields).fingerprint != first  # type: ignore[arg-type]
    file = folder / "train" / "cat" / "0.png"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert load("images", folder).fingerprint == first  # a copy, or a fresh checkout, is the same data
    moved = folder.rename(folder.with_name("moved"))
    assert load("images", moved).fingerprint == first
    moved.rename(folder)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load("images", folder).fingerprint != first  # equal name, size and time, another byte
    file.write_bytes(content)
    assert load("images", folder).fingerprint == first
    assert load("images", folder, labels=False).fingerprint != first
    file.rename(folder / "train" / "cat" / "9.png")
    assert load("images", folder).fingerprint != first


# ---- text ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    from transformers import BertTokenizerFast

    path = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "line", *map(str, range(100))]
    (path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return str(path)


def numbers(samples: Samples) -> list[int]:
    """The number in each text: token 2, whose id is 6 + the number."""
    return [int(row[2]) - 6 for row in whole(samples)["input_ids"]]


def test_a_text_file_is_split_without_overlap(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(f"  line {i}  " for i in range(40)) + "\n \n")
    data = load("text", path, source=tokenizer, max_length=6, calibration_samples=10)
    assert (data.train.size, data.test.size, data.calibration.size, data.max_sequence) == (36, 4, 10, 6)
    train, test, calibration = (numbers(s) for s in (data.train, data.test, data.calibration))
    assert sorted(train + test) == list(range(40))
    assert set(calibration) <= set(train)
    batch = next(data.test.batches(2))
    assert batch["input_ids"].shape == (2, 6)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0]] * 2
    assert numbers(load("text", path, source=tokenizer, max_length=6).test) == test
    assert load("text", path, source=tokenizer, max_length=6, seed=1).fingerprint != data.fingerprint
    assert load("text", path, source=tokenizer, max_length=8).fingerprint != data.fingerprint


def test_a_text_folder_is_read_whole_in_sorted_order(tmp_path: Path, tokenizer: str) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "2.md").write_text("line 2\nline 3")
    (tmp_path / "a.txt").write_text("line 0\nline 1")
    (tmp_path / "c.json").write_text("line 9")
    data = load("text", tmp_path, tokenizer=tokenizer, max_length=4)
    assert sorted(numbers(data.train) + numbers(data.test)) == [0, 1, 2, 3]
    assert data.test.size == 1


def test_bad_texts_and_tokenizers_are_named(tmp_path: Path, tokenizer: str) -> None:
    path = tmp_path / "corpus.txt"
    assert "does not exist" in refusal("text", path, source=tokenizer)
    path.write_text("\n one line \n")
    assert "corpus.txt: too little text. Expected: at least 2 lines. Found: 1." in refusal(
        "text", path, source=tokenizer
    )
    path.write_bytes(b"\xff\xfe\x00a")
    assert "corpus.txt: not readable text. Expected: UTF-8." in refusal("text", path, source=tokenizer)
    path.write_text("line 1\nline 2\n")
    assert "text needs a tokenizer. Fix: set data.tokenizer to a folder or id." in refusal("text", path)
    (tmp_path / "empty").mkdir()
    for source in (str(tmp_path / "empty"), "nobody/no-such-model"):
        assert f"no tokenizer in {source!r}. Found: " in refusal("text", path, source=source)
    (tmp_path / "texts").mkdir()
    assert "Found: 0." in refusal("text", tmp_path / "texts", source=tokenizer)


def test_a_tokenizers_own_code_is_never_run(tmp_path: Path) -> None:
    marker, folder = tmp_path / "executed", tmp_path / "t"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "evil"}))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    (tmp_path / "c.txt").write_text("line 1\nline 2\n")
    assert "no tokenizer in" in refusal("text", tmp_path / "c.txt", source=str(folder))
    assert not marker.exists()


# ---- npz ----------------------------------------------------------------------------------------------------


def arrays(n: int = 4, **more: Any) -> dict[str, Any]:
    x = np.arange(n * 6, dtype=np.float64).reshape(n, 6)
    return {"train.x": x, "test.x": x + 100, "train.labels": np.arange(n), "test.labels": np.arange(n)[::-1]} | more


def saved(tmp_path: Path, content: dict[str, Any]) -> Path:
    np.savez(tmp_path / "d.npz", **content)
    return tmp_path / "d.npz"


def test_npz_arrays_become_tensors(tmp_path: Path) -> None:
    ids = np.arange(8, dtype=">u2").reshape(4, 2)
    data = load(
        "npz", saved(tmp_path, arrays() | {"train.ids": ids, "test.ids": ids}), classes=4, calibration_samples=2
    )
    batch = next(data.train.labelled_batches(4))
    assert batch["x"].dtype == torch.float32
    assert batch["x"].tolist() == arrays()["train.x"].tolist()
    assert batch["ids"].dtype == torch.int64
    assert batch["ids"].tolist() == ids.tolist()
    assert batch["labels"].tolist() == [0, 1, 2, 3]
    assert data.test.labels is not None
    assert data.test.labels.tolist() == [3, 2, 1, 0]
    assert set(whole(data.calibration)["x"][:, 0].tolist()) <= {0.0, 6.0, 12.0, 18.0}


NAN = np.full((4, 6), np.nan)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (arrays() | {"test.x": NAN}, "test.x has NaN or infinite values. Fix: clean the data."),
        (arrays() | {"train.x": np.full((4, 6), 1e300)}, "train.x has NaN or infinite values"),
        (
            arrays() | {"train.labels": np.array([0, 1, 2, 9])},
            "1 training label(s) are out of range, the first at sample 3",
        ),
        (
            arrays() | {"test.labels": np.array([0, 1, -100, 3])},
            "1 test label(s) are out of range, the first at sample 2",
        ),
        (
            arrays() | {"train.labels": np.arange(3)},
            "train arrays differ in their number of samples. Found: {'x': 4, 'labels': 3}",
        ),
        (
            arrays() | {"train.labels": np.ones(4)},
            "train.labels. Expected: integers of shape (n,). Found: float32 of shape (4,)",
        ),
        (arrays() | {"train.labels": np.ones((4, 2), int)}, "Found: int64 of shape (4, 2)"),
        (arrays() | {"train.x": np.float32(3)}, "train.x. Expected: a first dimension of samples."),
        (
            arrays() | {"train.s": np.array(["a"] * 4)},
            "arrays that a model cannot take. Expected: float, int or bool. Found: train.s (<U1)",
        ),
        (arrays() | {"train.c": np.ones(4, complex)}, "Found: train.c (complex128)"),
        (
            arrays() | {"train.y": np.ones((4, 1))},
            "train and test have different inputs. Expected: ['x', 'y']. Found: ['x'].",
        ),
        ({"train.x": np.ones((2, 2))}, "no arrays for test. Expected: names like test.pixel_values. Found: train.x."),
        ({}, "no arrays for train. Expected: names like train.pixel_values. Found: nothing."),
        (arrays(0), "the training split is empty. Fix: put samples into data.path = "),
        (arrays() | {"test.x": np.ones((0, 6)), "test.labels": np.ones(0, int)}, "the test split is empty"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, content: dict[str, Any], found: str) -> None:
    assert found in refusal("npz", saved(tmp_path, content), classes=4)


def test_negative_labels_are_refused_even_where_the_classes_are_unknown(tmp_path: Path) -> None:
    path = saved(tmp_path, arrays() | {"train.labels": np.array([0, 1, 2, -100])})
    assert "Expected: 0 or more. Found: -100." in refusal("npz", path)


class Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    path = saved(tmp_path, {"train.x": np.array([Bomb(str(marker))], dtype=object)})
    assert "not a readable .npz file. Expected: numeric arrays, never pickled objects." in refusal("npz", path)
    assert not marker.exists()


@pytest.mark.parametrize("damage", ["truncated", "foreign", "npy", "folder", "flipped"])
def test_a_damaged_npz_is_named(tmp_path: Path, damage: str) -> None:
    path = saved(tmp_path, arrays(400))
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(raw[:500])
    elif damage == "foreign":
        path.write_bytes(b"hello")
    elif damage == "flipped":
        raw[1000] ^= 255
        path.write_bytes(raw)
    elif damage == "npy":
        with path.open("wb") as stream:
            np.save(stream, np.ones(3))
    else:
        path.unlink()
        path.mkdir()
    assert "d.npz: not a readable .npz file" in refusal("npz", path)
