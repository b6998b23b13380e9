"""Models: every family from a tiny config, checkpoints bit for bit, and no foreign code or pickle ever run."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from s2d_deploy.errors import ModelError, RecipeError
from s2d_deploy.models import LoadedModel, check_finite, forward, load_model, load_state, parameters, save_checkpoint
from s2d_deploy.recipe import ModelSection

TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
PIXELS = {"image_size": 8, "patch_size": 4}
VIT = {"model_type": "vit", **TINY, **PIXELS, "num_channels": 1, "num_labels": 3}
BERT = {"model_type": "bert", **TINY, "vocab_size": 20, "max_position_embeddings": 8}
HIDDEN = ("embedding", "last_hidden_state")
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "vit": (VIT, "image-classification", "logits"),
    "vit-embedding": ({"model_type": "vit", **TINY, **PIXELS}, *HIDDEN),
    "siglip": ({"model_type": "siglip_vision_model", **TINY, **PIXELS}, *HIDDEN),
    "siglip-tower": ({"model_type": "siglip", "vision_config": {**TINY, **PIXELS}}, *HIDDEN),
    "clip": ({"model_type": "clip_vision_model", **TINY, **PIXELS}, *HIDDEN),
    "siglip2": ({"model_type": "siglip2_vision_model", **TINY, "patch_size": 4}, *HIDDEN),
    "bert": (BERT, *HIDDEN),
}


def section(**fields: Any) -> ModelSection:
    return ModelSection(**fields)


def family(name: str) -> ModelSection:
    config, task, _ = FAMILIES[name]
    return section(config=config, task=task)


def feeds(name: str, model: LoadedModel) -> dict[str, torch.Tensor]:
    if name == "bert":
        return {
            "input_ids": torch.tensor([[1, 2, 3], [4, 5, 6]]),
            "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        }
    if name == "siglip2":
        return {
            "pixel_values": torch.rand(2, 4, 48, generator=torch.Generator().manual_seed(0)),
            "pixel_attention_mask": torch.ones(2, 4, dtype=torch.int64),
            "spatial_shapes": torch.tensor([[2, 2], [2, 2]]),
        }
    return {"pixel_values": torch.rand(2, model.channels, 8, 8, generator=torch.Generator().manual_seed(0))}


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


# ---- families -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_builds_runs_and_survives_a_checkpoint_bit_for_bit(name: str, tmp_path: Path) -> None:
    first = load_model(family(name), seed=1)
    assert first.output == FAMILIES[name][2]
    assert not first.module.training
    with torch.no_grad():
        for p in first.module.parameters():  # nothing that an initializer would make again
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.01)
        exact = forward(first.module, feeds(name, first), first.output)
    save_checkpoint(first.module, tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    second = load_model(family(name), checkpoint=tmp_path, seed=2)
    assert type(second.module) is type(first.module)
    assert equal(first.module, second.module)
    with torch.no_grad():
        assert torch.equal(forward(second.module, feeds(name, second), second.output), exact)
    assert (second.image_size, second.channels, second.classes) == (first.image_size, first.channels, first.classes)
    # And once more: what was loaded from a checkpoint is saved as it was.
    again = tmp_path / "again"
    again.mkdir()
    save_checkpoint(second.module, again)
    assert equal(load_model(family(name), checkpoint=again).module, first.module)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pretrained_folder_loads_without_the_config(name: str, tmp_path: Path) -> None:
    first = load_model(family(name))
    save_checkpoint(first.module, tmp_path)
    second = load_model(section(pretrained=str(tmp_path), task=FAMILIES[name][1]))
    assert equal(first.module, second.module)
    assert second.source == str(tmp_path)


def test_the_facts_that_the_pipeline_needs() -> None:
    vit = load_model(family("vit"))
    assert (vit.image_size, vit.channels, vit.classes, vit.source) == (8, 1, 3, None)
    tower = load_model(family("siglip-tower"))
    assert (tower.image_size, tower.channels, tower.classes) == (8, 3, None)
    bert = load_model(family("bert"))
    assert (bert.image_size, bert.classes) == (None, None)
    assert load_model(section(config=FAMILIES["vit"][0], output="hidden")).output == "hidden"
    assert parameters(vit.module) == sum(p.numel() for p in vit.module.parameters())


def test_the_same_seed_builds_the_same_weights() -> None:
    a, b, c = (load_model(family("vit"), seed=s).module for s in (1, 1, 2))
    assert equal(a, b)
    assert not equal(a, c)


@pytest.mark.parametrize("family_name", ["clip", "siglip"])
def test_the_vision_tower_of_a_two_tower_checkpoint_is_what_loads(family_name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    text = {**TINY, "vocab_size": 20, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family_name, vision_config={**TINY, **PIXELS}, text_config=text)
    both = AutoModel.from_config(config)
    both.save_pretrained(tmp_path)
    tower = load_model(section(pretrained=str(tmp_path), task="embedding")).module
    theirs = both.vision_model.state_dict()
    mine = {k.removeprefix("vision_model."): v for k, v in tower.state_dict().items()}
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


# ---- what a config may not say ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"hidden_size": 8}, "model.config has no model_type. Expected: e.g. vit, siglip_vision_model, bert."),
        ({"model_type": "vitt"}, "model.config: unknown model_type 'vitt'."),
        ({"model_type": 3}, "model.config: unknown model_type 3."),
        ({"model_type": "vit", "hiden_size": 8}, "vit has no field 'hiden_size'. Fix: did you mean 'hidden_size'?"),
        ({"model_type": "vit", "hidden_size": "wide"}, "model.config: "),
        ({"model_type": "vit", **PIXELS, **TINY, "patch_size": 0}, "model.config: no model can be built from it"),
        ({"model_type": "vit", **PIXELS, **TINY, "hidden_act": "gello"}, "model.config: no model can be built from it"),
        ({"model_type": "bert", **TINY}, "model.config: no model can be built from it"),
    ],
)
def test_bad_configs_are_explained(config: dict[str, Any], found: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_model(section(config=config))
    assert found in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_misspelt_model_type_has_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"Fix: did you mean 'siglip_vision_model'\?"):
        load_model(section(config={"model_type": "siglip_visoin_model"}))


# ---- what a pretrained folder may not hold ------------------------------------------------------------------


def refused(source: str | Path, task: str = "image-classification") -> str:
    with pytest.raises(ModelError) as caught:
        load_model(section(pretrained=str(source), task=task))
    return str(caught.value)


@pytest.mark.parametrize("source", ["nobody/no-such-model", "no-such-model", "a/b/c", "not a name !"])
def test_an_id_that_cannot_be_reached_is_one_clear_error_at_once(source: str) -> None:
    begin = time.monotonic()
    text = refused(source)
    assert text.startswith(
        f"model.pretrained: {source!r} cannot be loaded. Expected: a folder written by save_pretrained"
    )
    assert text.endswith("Fix: check the path, or download the model first.")
    assert time.monotonic() - begin < 20  # seconds; HF_HUB_OFFLINE is set, so nothing waits for a network


@pytest.mark.parametrize("source", ["/no/such/folder", "./nothing", "~/nothing-here"])
def test_a_path_that_is_no_folder_is_not_taken_for_an_id(source: str) -> None:
    assert refused(source) == f"model.pretrained: {source!r} is not a folder. Fix: check the path."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_checkpoint(load_model(family("vit")).module, path)
    return path


def test_damaged_checkpoints_are_refused(folder: Path) -> None:
    weights = folder / "model.safetensors"
    raw = weights.read_bytes()
    weights.write_bytes(raw[: len(raw) // 2])
    assert "cannot be loaded" in refused(folder)
    weights.write_bytes(raw)
    (folder / "config.json").write_text("{")
    assert "cannot be loaded" in refused(folder)
    (folder / "config.json").unlink()
    assert "cannot be loaded" in refused(folder)


class Bomb:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def test_a_checkpoint_that_exists_only_as_a_pickle_is_refused_and_never_unpickled(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (folder / "model.safetensors").unlink()
    torch.save({"x": Bomb(str(marker))}, folder / "pytorch_model.bin")
    text = refused(folder)
    assert "cannot be loaded. Expected: a folder written by save_pretrained (safetensors)" in text
    assert not marker.exists()
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(family("vit"), checkpoint=folder)
    assert not marker.exists()


def test_even_a_harmless_pickle_is_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert "cannot be loaded. Expected: a folder written by save_pretrained (safetensors)" in refused(folder)


def test_code_in_a_checkpoint_is_never_run(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\nclass Model: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    begin = time.monotonic()
    assert "cannot be loaded" in refused(folder)
    assert time.monotonic() - begin < 10  # seconds; transformers would wait 15 for an answer at a terminal
    assert not marker.exists()


def test_nan_weights_are_named(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        state[name].view(-1)[0] = math.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert refused(folder) == (
        "NaN or infinite weights in 2 tensor(s): classifier.weight, classifier.bias. "
        "Expected: finite weights. Fix: use a sound checkpoint."
    )


def test_nan_in_a_buffer_is_found_too() -> None:
    norm = nn.BatchNorm1d(2)
    norm.running_mean[0] = math.inf  # type: ignore[index]
    with pytest.raises(ModelError, match=r"1 tensor\(s\): running_mean"):
        check_finite(norm)


def test_a_checkpoint_without_a_head_is_not_filled_with_random_numbers(tmp_path: Path) -> None:
    save_checkpoint(load_model(family("vit-embedding")).module, tmp_path)
    text = refused(tmp_path)
    assert "lacks 2 weight(s) of ViTForImageClassification: classifier.bias, classifier.weight." in text
    assert "Expected: a checkpoint for the task image-classification." in text


def test_a_missing_pooler_is_left_out_and_not_made_up(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="s2d_deploy.models"):
        model = load_model(section(pretrained=str(folder), task="embedding"))
    assert "no weights for pooler.dense.bias, pooler.dense.weight" in caplog.text
    assert model.output == "last_hidden_state"
    assert not [name for name in model.module.state_dict() if "pooler" in name]
    save_checkpoint(model.module, tmp_path / "again")
    assert not [name for name in load_file(tmp_path / "again" / "model.safetensors") if "pooler" in name]


def test_weights_of_another_size_are_refused(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    state["classifier.weight"] = torch.zeros(5, 16)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert "cannot be loaded" in refused(folder)


# ---- factories ----------------------------------------------------------------------------------------------

SOURCE = """
import torch
from torch import nn

class Net(nn.Module):
    num_classes = 3
    def __init__(self, width=4, tied=False):
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        if tied:
            self.b.weight = self.a.weight
        self.register_buffer("steps", torch.tensor(7))
    def forward(self, x):
        return {"logits": self.b(self.a(x))}

def make(**arguments):
    return Net(**arguments)

def wrong():
    return "a model"

def broken():
    raise KeyError("no file")

value = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    root = tmp_path / "site"
    (root / "user_models").mkdir(parents=True)
    (root / "user_models" / "__init__.py").write_text("")
    (root / "user_models" / "nets.py").write_text(SOURCE)
    (root / "user_models" / "bad_syntax.py").write_text("def (:")
    (root / "user_models" / "bad_import.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(str(root))
    yield root
    for name in [n for n in sys.modules if n.startswith("user_models")]:
        del sys.modules[name]


def net(**fields: Any) -> ModelSection:
    return section(factory="user_models.nets:make", **fields)


@pytest.mark.parametrize("tied", [False, True])
def test_a_factory_with_arguments_weights_and_checkpoints(package: Path, tmp_path: Path, tied: bool) -> None:
    arguments = {"width": 5, "tied": tied}
    first = load_model(net(factory_arguments=arguments))
    assert first.module.a.in_features == 5
    assert (first.output, first.image_size, first.classes, first.source) == ("logits", None, 3, None)
    with torch.no_grad():
        for p in first.module.parameters():
            p.add_(1.0)
    save_checkpoint(first.module, tmp_path)
    for second in (
        load_model(net(factory_arguments=arguments), checkpoint=tmp_path),
        load_model(net(factory_arguments=arguments, weights=str(tmp_path / "model.safetensors"))),
    ):
        assert equal(first.module, second.module)
        assert (second.module.b.weight is second.module.a.weight) == tied


@pytest.mark.parametrize(
    ("factory", "found"),
    [
        ("user_models.nets", "model.factory 'user_models.nets'. Expected: package.module:function."),
        ("user_models.nets:", "Expected: package.module:function."),
        (":make", "Expected: package.module:function."),
        (".nets:make", "Expected: package.module:function."),
        (
            "no_such_package.nets:make",
            "cannot be imported. Found: ModuleNotFoundError: No module named 'no_such_package'.",
        ),
        ("user_models.nets:mak", "cannot be imported. Found: AttributeError: "),
        ("user_models.bad_syntax:make", "cannot be imported. Found: SyntaxError: "),
        ("user_models.bad_import:make", "cannot be imported. Found: RuntimeError: no licence."),
        ("user_models.nets:value", "model.factory 'user_models.nets:value'. Expected: a function. Found: int."),
        ("user_models.nets:wrong", "Expected: a torch.nn.Module. Found: str."),
        ("user_models.nets:broken", "model.factory 'user_models.nets:broken' failed."),
    ],
)
def test_bad_factories_are_explained(package: Path, factory: str, found: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_model(section(factory=factory))
    assert found in str(caught.value)


def test_arguments_that_the_factory_does_not_take(package: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"failed\. Expected: a model for the arguments \{'depth': 2\}\. Found: TypeError: .*'depth'"
    ):
        load_model(net(factory_arguments={"depth": 2}))


def test_weights_of_another_model_name_the_first_offenders(package: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    state = {"a.weight": torch.zeros(4, 9), "a.bias": torch.zeros(4), "b.bias": torch.zeros(4), "c": torch.zeros(1)}
    save_file(state, path)
    with pytest.raises(ModelError) as caught:
        load_model(net(weights=str(path)))
    assert str(caught.value) == (
        f"{path}: weights of another model: steps is missing; b.weight is missing; c is unknown; "
        "a.weight has shape (4, 9) instead of (4, 4). Fix: use the model that wrote them."
    )


@pytest.mark.parametrize("kind", ["missing", "empty", "truncated", "pickle", "folder"])
def test_files_that_are_no_weights(package: Path, tmp_path: Path, kind: str) -> None:
    path, marker = tmp_path / "w.safetensors", tmp_path / "executed"
    model = load_model(net()).module
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        save_checkpoint(model, tmp_path)
        path.write_bytes((tmp_path / "model.safetensors").read_bytes()[:-9])
    elif kind == "pickle":
        torch.save({"x": Bomb(str(marker))}, path)
    elif kind == "folder":
        path.mkdir()
    with pytest.raises(ModelError, match=rf"{path}: not readable weights\. Expected: a \.safetensors file\. Found: "):
        load_state(model, path)
    assert not marker.exists()


def test_nan_in_a_factorys_weights_is_named(package: Path, tmp_path: Path) -> None:
    model = load_model(net()).module
    with torch.no_grad():
        model.a.bias[1] = math.nan
    save_checkpoint(model, tmp_path)
    with pytest.raises(ModelError, match=r"NaN or infinite weights in 1 tensor\(s\): a\.bias"):
        load_model(net(), checkpoint=tmp_path)


# ---- forward ------------------------------------------------------------------------------------------------


def test_forward_names_what_does_not_fit(package: Path) -> None:
    model = load_model(net()).module
    assert forward(model, {"x": torch.ones(2, 4)}, "logits").shape == (2, 4)
    assert forward(nn.Identity(), {"input": torch.ones(2)}, "anything").shape == (2,)
    with pytest.raises(ModelError, match=r"the model cannot run on this data: .*Found: inputs x \(2, 9\) float32"):
        forward(model, {"x": torch.ones(2, 9)}, "logits")
    with pytest.raises(
        ModelError, match=r"the model has no output 'probabilities'.*Found: logits\. Fix: set model\.output"
    ):
        forward(model, {"x": torch.ones(2, 4)}, "probabilities")

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, int]:
            return x, 1

    with pytest.raises(ModelError, match=r"a mapping from names to tensors\. Found: a tuple\."):
        forward(Pair(), {"x": torch.ones(1)}, "logits")
