"""benchmarks/cifar_vit.py: a small run on made images, its comparison of arms, and that it goes on where it stopped."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from s2d_deploy.attribution import SiteAttribution
from s2d_deploy.errors import DataError

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
cifar_vit, _bench, _images = map(import_module, ("cifar_vit", "_cifar_bench", "_cifar_images"))

SMALL = (
    *("--threads", "1", "--image", "8", "--width", "16", "--depth", "1", "--batch", "8", "--warmup", "2"),
    *("--pretrain-steps", "6", "--looks", "2", "--tune-steps", "4", "--tune-batch", "8", "--refresh", "2"),
    *("--qat-steps", "2", "--calibration", "16", "--test", "12", "--tau", "0.2", "--seeds", "0"),
    *("--arms", "control", "s2d", "--qat-arms", "control", "s2d"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, each with another bright channel."""
    g = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for channel in range(3):
            target = tmp_path / "data" / split / f"class{channel}"
            target.mkdir(parents=True)
            for i in range(count):
                pixels = g.integers(0, 120, (10, 10, 3))
                pixels[..., channel] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(target / f"{i}.png")
    return tmp_path / "data"


def arguments(folder: Path, tmp_path: Path, *more: str) -> Any:
    where = ("--data", str(folder), "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"))
    return cifar_vit.arguments_parser().parse_args([*where, *SMALL, *more])


def test_a_small_run_and_one_that_goes_on(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        assert cifar_vit.run(arguments(folder, tmp_path)) == 0
        first = capsys.readouterr().out
        assert "pre-training: step 6" in first
        assert cifar_vit.run(arguments(folder, tmp_path)) == 0
        assert "pre-training" not in capsys.readouterr().out  # the checkpoint is complete: nothing is trained again
    finally:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(False)
    documents = [json.loads(path.read_text()) for path in sorted((tmp_path / "results").glob("*.json"))]
    assert len(documents) == 2
    data, again = (document["data"] for document in documents)
    assert data["means"] == again["means"]
    assert set(data["means"]) == {"control", "s2d", "control-qat", "s2d-qat"}
    assert set(data["means"]["s2d"]) == {"fp32", *(f"{p}-{m}" for p in _bench.PRECISIONS for m in _bench.METHODS)}
    for run in data["runs"]:
        for name, scores in run["scores"].items():
            right = np.unpackbits(np.frombuffer(bytes.fromhex(scores["correct"]), dtype=np.uint8))
            assert 100 * right.sum() / 12 == pytest.approx(run["brief"][name]["top1"], rel=1e-4)
    assert [entry["step"] for entry in data["pretraining"]["trace"]] == [3, 6]
    assert data["start"]["forecast"]["sentence"].startswith("S2D will")
    assert set(data["start"]["left_in_float"]) == set(_bench.GROUPS)
    assert data["start"]["left_in_float"]["nothing"]["w4a4-mse"]["db"] == data["start"]["scores"]["w4a4-mse"]["db"]
    pages = sorted((tmp_path / "results").glob("*.html"))
    assert len(pages) == 2
    text = pages[0].read_text()
    assert text.count("<svg") > 4
    assert "Accuracy of each arm" in text
    assert "PCDR by layer" in text


def test_images_come_from_a_tar_as_well(folder: Path, tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(tmp_path / "data.tar.xz", "w:xz") as archive:
        archive.add(folder, "some-name")
    plain = _images.load_images(folder, tmp_path / "a", 8, 0)
    packed = _images.load_images(tmp_path / "data.tar.xz", tmp_path / "b", 8, 0)
    for split, count in (("train", 36), ("test", 15)):
        assert plain[split].pixels.shape == (count, 3, 8, 8)
        assert torch.equal(plain[split].pixels, packed[split].pixels)
        assert torch.equal(plain[split].labels, packed[split].labels)
        # The bright channel is the class, also after the shuffle.
        assert torch.equal(plain[split].pixels.float().mean((2, 3)).argmax(1), plain[split].labels)


def test_no_images_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images\. Expected: train/CLASS/\* and test/CLASS/\*"):
        _images.load_images(tmp_path, tmp_path / "work", 8, 0)


def test_a_gain_is_paired_and_signed() -> None:
    def run(arm: str, seed: int, correct: list[float]) -> dict[str, Any]:
        return {"arm": arm, "seed": seed, "scores": {"w4a4-mse": {"correct": correct}}}

    worse, better = [100.0, 0.0, 0.0, 100.0] * 100, [100.0, 100.0, 0.0, 100.0] * 100
    runs = [run("control", 0, worse), run("s2d", 0, better), run("control", 1, worse), run("s2d", 1, worse)]
    gain = cifar_vit.pooled(runs, "s2d", "control", "w4a4-mse")
    assert gain["gain"] == pytest.approx(12.5)
    assert gain["each"] == [25.0, 0.0]
    assert 0 < gain["lo"] < 12.5 < gain["hi"]
    one = cifar_vit.pooled(runs[:2], "s2d", "control", "w4a4-mse")
    assert (one["gain"], one["method"]) == (25.0, "exact McNemar, Tango interval")
    assert cifar_vit.pooled(runs[:1], "s2d", "control", "w4a4-mse") is None


def test_layers_that_diagnose_names() -> None:
    def site(verdict: str, *linears: str) -> Any:
        return SiteAttribution("s", "activation", "m", linears, 1.0, 1.0, verdict=verdict)  # type: ignore[arg-type]

    sites = [site("triplet", "b"), site("triplet", "a"), site("neuron", "c"), site("triplet", "d", "e")]
    assert cifar_vit.named_layers(sites) == ["a", "b"]


def test_arms_of_a_seed_see_the_same_batches(folder: Path, tmp_path: Path) -> None:
    train = _images.load_images(folder, tmp_path / "work", 8, 0)["train"]
    first, second, other = (cifar_vit.epochs(train, 8, seed) for seed in (1, 1, 2))
    for _ in range(2):  # and the second epoch is another one than the first
        for a, b in zip(first(), second(), strict=True):
            assert torch.equal(a["pixel_values"], b["pixel_values"])
            assert torch.equal(a["labels"], b["labels"])
    assert not torch.equal(next(cifar_vit.epochs(train, 8, 1)())["labels"], next(other())["labels"])
