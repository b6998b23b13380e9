"""The stages that make the model: what they depend on, and that they make the same bytes again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from command_line import TINY, Finished, contents, stages
from torch import nn

from s2d_deploy.cache_keys import weights_sha256
from s2d_deploy.console import Display
from s2d_deploy.errors import DataError, RecipeError
from s2d_deploy.models import load_model
from s2d_deploy.pipeline import Pipeline, _quantize_key
from s2d_deploy.recipe import QuantizeSection, Recipe, parse_recipe
from s2d_deploy.store import RunFolder, read_json


def pipeline(folder: RunFolder, recipe: Recipe | None = None) -> Pipeline:
    return Pipeline(recipe or parse_recipe(TINY), folder, Display(quiet=True))


def test_the_first_stages_make_the_same_bytes_in_another_process(finished: Finished, tmp_path: Path):
    with RunFolder(tmp_path) as store:
        p = pipeline(store)
        p.diagnose()
        p.quantize("w8a8")
        assert not any(stage.cached for stage in p._stages.values())
    ours, theirs = contents(tmp_path), contents(finished.folder)
    assert {"train/model.safetensors", "condition/conditioning.json", "quantize/w8a8/outputs.npz"} <= set(ours)
    assert ours == {name: theirs[name] for name in ours}


def test_each_stage_is_asked_for_once(finished: Finished, tmp_path: Path):
    with RunFolder(finished.copy(tmp_path / "run")) as store:
        p = pipeline(store)
        first = p.onnx("w8a8")
        assert first.cached
        shutil.rmtree(first.folder)
        assert p.onnx("w8a8") is first  # a process that has seen a stage does not look again


def test_finished_stages_need_no_forward_pass(finished: Finished):
    """A second run reads manifests and weights; the test split is not computed again."""
    with RunFolder(finished.folder) as store:
        p = pipeline(store)
        for precision in p.precisions:
            assert p.onnx(precision).cached
        assert "_reference" not in p.__dict__
        assert "ops" not in p.__dict__


def test_time_is_not_part_of_what_condition_makes(finished: Finished):
    assert "seconds" not in read_json(finished.folder / "condition" / "conditioning.json")
    assert read_json(finished.folder / "condition" / "manifest.json")["info"]["seconds"] > 0


def test_the_conditioned_model_is_another_than_the_original(finished: Finished):
    with RunFolder(finished.folder) as store:
        p = pipeline(store)
        assert weights_sha256(p.model.module) != weights_sha256(p.original.module)
        assert p.model.output == "logits"
        assert [op.kind for op in p.ops.values()].count("scores") == 2
        ranges = {row["site"]: row for row in p.ranges()}
        assert ranges["classifier.input"]["before"] != ranges["classifier.input"]["after"]


def test_recipes_that_make_the_same_model_share_one_activation_pass(finished: Finished, tmp_path: Path):
    """The rotated model is measured once, for whatever precision or weight pass comes behind."""

    def quantized(passes: list[object], precision: str) -> None:
        recipe = parse_recipe(TINY | {"quantize": {"precisions": [precision], "passes": passes}})
        with RunFolder(tmp_path / "run") as store:
            pipeline(store, recipe).quantize(precision)

    finished.copy(tmp_path / "run")
    folder = tmp_path / "run" / "activations"
    quantized(["rotation"], "w8a8")
    [kept] = folder.iterdir()
    statistics = kept / "calibration.safetensors"
    statistics.write_bytes(b"damaged")
    quantized(["rotation"], "w4a4")
    assert statistics.stat().st_size > 100  # measured anew, since the file was damaged
    written = statistics.stat().st_mtime_ns
    quantized(["rotation", "gptq"], "w4a4")
    assert [path.name for path in folder.iterdir()] == [kept.name]
    assert statistics.stat().st_mtime_ns == written


def test_conditioning_in_place_leaves_the_original_as_it_was(tmp_path: Path):
    """Conditioning changes weights in place; who asks for the original later must get the trained one."""
    with RunFolder(tmp_path) as store:
        p = pipeline(store)
        trained = weights_sha256(p.original.module)
        assert not p.condition().cached
        assert weights_sha256(p.original.module) == trained
        assert weights_sha256(p.model.module) != trained


@pytest.mark.parametrize(
    ("precision", "overrides", "depends"),
    [
        ("w8a8", {}, False),
        ("w4a4", {}, False),
        ("w4a16", {}, True),
        ("w4a4", {"*": "w4a16"}, True),
        ("w4a4", {"*": "w8a8"}, False),
    ],
)
def test_only_weight_only_precisions_depend_on_the_block_size(precision: str, overrides: dict[str, str], depends: bool):
    keys = [
        _quantize_key(QuantizeSection(block_size=size, overrides=overrides, precisions=(precision,)), precision)
        for size in (16, 32)
    ]
    assert (keys[0] != keys[1]) == depends
    assert "precisions" not in keys[0]


def test_weights_have_one_digest_each():
    torch.manual_seed(0)
    a = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    digest = weights_sha256(a)
    assert weights_sha256(a) == digest
    with torch.no_grad():
        a[0].weight[0, 0] = torch.nextafter(a[0].weight[0, 0], torch.tensor(9.0))
    changed = weights_sha256(a)
    a[1].num_batches_tracked += 1
    assert len({digest, changed, weights_sha256(a)}) == 3
    # Names count, too: equal tensors in other places are another model.
    assert weights_sha256(nn.ModuleDict({"a": a[0]})) != weights_sha256(nn.ModuleDict({"b": a[0]}))


def test_samples_that_the_model_does_not_take(tmp_path: Path):
    document = TINY | {"model": {"config": TINY["model"]["config"] | {"image_size": 16}}}
    with RunFolder(tmp_path) as store, pytest.raises(DataError, match="digits are 8 x 8 pixels"):
        _ = pipeline(store, parse_recipe(document)).data
    assert stages(tmp_path) == {}


def test_an_output_that_the_model_does_not_have(tmp_path: Path):
    document = TINY | {"model": TINY["model"] | {"output": "embeddings"}}
    with RunFolder(tmp_path) as store, pytest.raises(RecipeError) as caught:
        pipeline(store, parse_recipe(document)).train()
    assert "model.output: the model has no output 'embeddings'" in str(caught.value)
    assert "Found: logits" in str(caught.value)
    assert stages(tmp_path) == {}


def test_the_checkpoint_loads_with_transformers(finished: Finished):
    from transformers import AutoModelForImageClassification

    model = AutoModelForImageClassification.from_pretrained(finished.folder / "condition")
    ours = load_model(parse_recipe(TINY).model, checkpoint=finished.folder / "condition").module
    assert weights_sha256(model) == weights_sha256(ours)
