"""What a stage is kept by: what must be redone after one change, and what redoes nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from s2d_deploy import cache_keys, pipeline
from s2d_deploy.console import Display
from s2d_deploy.recipe import ModelSection, parse_recipe
from s2d_deploy.store import RunFolder

ALL = {"condition", "calibrate", "quantize/fp32", "quantize/w8a8"}
CONFIG = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": 2,
}


class Place:
    """A checkpoint, images in two classes, a recipe for both, and a run folder."""

    def __init__(self, root: Path) -> None:
        self.model, self.images, self.output = root / "model", root / "images", root / "run"
        self.recipe: dict[str, Any] = {
            "name": "keys",
            "data": {"kind": "images", "calibration_samples": 4, "test_samples": 4, "batch_size": 4},
            "condition": {"method": "none"},
            "quantize": {"precisions": ["w8a8"], "error_samples": 0},
            "targets": ["reference"],
        }

    def run(self) -> set[str]:
        """Do the stages; those that were done now."""
        document = json.loads(json.dumps(self.recipe))
        document["model"] = {"pretrained": str(self.model)}
        document["data"]["path"] = str(self.images)
        recipe = parse_recipe(document)
        with RunFolder(self.output) as store:
            store.claim(recipe.document(), update=True)
            made = pipeline.Pipeline(recipe, store, Display(quiet=True))
            made.quantize("w8a8")
            made.quantize("fp32")
            return {name for name, stage in made._stages.items() if not stage.cached}

    def image(self, name: str = "train/a/0.png") -> Path:
        return self.images / name

    def config(self, **changes: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForImageClassification

    root = tmp_path_factory.mktemp("keys")
    place = Place(root)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**CONFIG)
    AutoModelForImageClassification.from_config(config).save_pretrained(place.model)
    (place.model / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in "ab":
            (place.images / split / label).mkdir(parents=True)
            for i in range(2):
                pixels = draw.integers(0, 255, (8, 8), dtype=np.uint8)
                Image.fromarray(pixels).save(place.images / split / label / f"{i}.png", compress_level=0)
    assert place.run() == ALL
    assert place.run() == set()
    return root


@pytest.fixture
def place(finished_once: Path, tmp_path: Path) -> Place:
    shutil.copytree(finished_once, tmp_path / "copy")
    return Place(tmp_path / "copy")


def one_weight_bit(place: Place) -> None:
    path = place.model / "model.safetensors"
    state = load_file(path)
    weight = state["classifier.weight"]
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    save_file(state, path, metadata={"format": "pt"})


def one_pixel_in_place(place: Place) -> None:
    """Equal name, size and modification time."""
    path = place.image()
    stat, size = path.stat(), path.stat().st_size
    pixels = np.array(Image.open(path))
    pixels[3, 3] ^= 1
    Image.fromarray(pixels).save(path, compress_level=0)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == size


def swapped_labels(place: Place) -> None:
    for split in ("train", "test"):
        a, b = place.images / split / "a", place.images / split / "b"
        a.rename(place.images / "c")
        b.rename(a)
        (place.images / "c").rename(b)


def recipe_key(section: str, **keys: Any) -> Callable[[Place], None]:
    def change(place: Place) -> None:
        place.recipe[section] = place.recipe.get(section, {}) | keys

    return change


MATTERS: dict[str, tuple[Callable[[Place], None], set[str]]] = {
    "one weight bit": (one_weight_bit, ALL),
    "activation function": (lambda place: place.config(hidden_act="relu"), ALL),
    "epsilon of the norms": (lambda place: place.config(layer_norm_eps=1e-6), ALL),
    "one pixel": (one_pixel_in_place, ALL),
    "labels": (swapped_labels, ALL),
    "labels off": (recipe_key("data", labels=False), ALL),
    "image statistics": (
        lambda place: (place.model / "preprocessor_config.json").write_text(
            '{"image_mean": [0.4], "image_std": [0.5]}'
        ),
        ALL,
    ),
    "batch size": (recipe_key("data", batch_size=2), ALL),
    "which samples": (recipe_key("data", seed=1), ALL),
    "percentile": (recipe_key("quantize", activations="percentile", percentile=99.0), {"quantize/w8a8"}),
    "skipped layer": (recipe_key("quantize", skip=["classifier"]), {"quantize/w8a8"}),
}


@pytest.mark.parametrize("what", MATTERS)
def test_one_change_that_matters(place: Place, what: str):
    change, redone = MATTERS[what]
    change(place)
    assert place.run() == redone
    assert place.run() == set()


@pytest.mark.parametrize("name", cache_keys.LIBRARIES)
def test_every_library_version_matters(name: str):
    """Each is in the key by its name; the key holds the whole mapping."""
    assert name in cache_keys.library_versions()
    assert pipeline.Pipeline._full_key("quantize/w8a8", {})["versions"] == cache_keys.library_versions()


@pytest.mark.parametrize("what", ["torch", "code"])
def test_another_version_redoes_everything(place: Place, monkeypatch: pytest.MonkeyPatch, what: str):
    if what == "torch":
        changed = cache_keys.library_versions() | {"torch": "99.0"}
        monkeypatch.setattr(pipeline, "library_versions", lambda: changed)
    else:
        monkeypatch.setattr(pipeline, "_CODE", {False: "another source", True: "another source"})
    assert place.run() == ALL


def moved(place: Place) -> None:
    """All of it lies elsewhere, under other names."""
    for name in ("model", "images", "output"):
        old = getattr(place, name)
        new = old.with_name(f"other-{name}")
        old.rename(new)
        setattr(place, name, new)


def touched(place: Place) -> None:
    for path in (*place.model.rglob("*"), *place.images.rglob("*")):
        os.utime(path, ns=(1, 1))


def loud(place: Place) -> None:
    logging.getLogger("s2d_deploy").setLevel(logging.DEBUG)


IRRELEVANT: dict[str, Callable[[Place], None]] = {
    "paths and names": moved,
    "modification times": touched,
    "log level": loud,
    "the recipe's name": lambda place: place.recipe.update(name="another"),
    "a gate": recipe_key("gates", accuracy_drop=1.0),
    "another target": lambda place: place.recipe.update(targets=["ort"]),
    "benchmark": recipe_key("bench", min_samples=7),
}


@pytest.mark.parametrize("what", IRRELEVANT)
def test_what_does_not_matter_redoes_nothing(place: Place, what: str):
    level = logging.getLogger("s2d_deploy").level
    try:
        IRRELEVANT[what](place)
        assert place.run() == set()
    finally:
        logging.getLogger("s2d_deploy").setLevel(level)


# --- code ---------------------------------------------------------------------------------------------------------


def test_source_is_told_apart_by_content_and_name():
    digest = cache_keys.source_sha256
    assert digest([("a", b"x = 1\n")]) == digest([("a", b"x = 1\r\n")])
    assert len({digest([("a", b"x = 1\n")]), digest([("a", b"x = 2\n")]), digest([("b", b"x = 1\n")]), digest([])}) == 4


def test_all_that_computes_counts_and_what_shows_does_not():
    names = {name for name, _ in cache_keys._own_sources(deploying=False)}
    assert {f"s2d_deploy.{n}" for n in ("grid", "fake_quant", "quantize", "ptq.gptq", "s2d", "data", "models")} <= names
    assert not names & {f"s2d_deploy.{n}" for n in ("cli", "report_html", "report", "console", "svg", "store")}
    deploying = {name for name, _ in cache_keys._own_sources(deploying=True)} - names
    assert {"s2d_deploy.export.to_onnx", "s2d_deploy.runtimes.ort"} <= deploying
    assert cache_keys.code_sha256(deploying=True) != cache_keys.code_sha256(deploying=False)


def test_what_shows_exists():
    """A module that is renamed must not stay exempt under its old name, nor lose its exemption unseen."""
    there = {path.stem for path in Path(cache_keys.__file__).parent.glob("*.py")}
    assert set(cache_keys._SHOWING) <= there


FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(x) * FACTOR

def make():
    return Net()
"""


def test_the_source_of_a_users_model_is_part_of_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Equal weights and structure, and another forward."""
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for name, factor in (("first_net", "1.0"), ("second_net", "1.0"), ("third_net", "2.0")):
        (tmp_path / f"{name}.py").write_text(FACTORY.replace("FACTOR", factor))
        section = ModelSection(factory=f"{name}:make")
        module: nn.Module = __import__(name).make()
        keys.append(cache_keys.model_key(section, module, "logits", {}))
    assert keys[0] == keys[1]  # another file name, the same code
    assert keys[0]["structure"] == keys[2]["structure"]
    assert keys[0] != keys[2]
    assert cache_keys.model_key(section, module, "hidden", {}) != keys[2]


def test_a_tokenizer_is_known_by_what_it_does(tmp_path: Path):
    from transformers import AutoTokenizer, BertTokenizerFast

    def digest(words: str, where: str) -> str:
        folder = tmp_path / where
        folder.mkdir()
        (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
        BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        return cache_keys.tokenizer_sha256(AutoTokenizer.from_pretrained(folder))

    assert digest("abc", "one") == digest("abc", "two") != digest("acb", "three")
