"""One-shot conditioning in a recipe: what is refused, what is stored, and that runtimes compute the simulation."""

from __future__ import annotations

import copy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.console import Display
from s2d_deploy.deployment import Deployment
from s2d_deploy.discovery import discover
from s2d_deploy.equalized_linear import EqualizedLinear, layer_name
from s2d_deploy.errors import ModelError, RecipeError
from s2d_deploy.inserted_layers import INSERTED_FILE, apply_inserted, inserted_layers, save_inserted, without_inserted
from s2d_deploy.models import load_model, save_checkpoint
from s2d_deploy.one_shot import ENOUGH, OneShotResult, _finding, apply_variants
from s2d_deploy.one_shot_stage import condition_one_shot
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.recipe import ModelSection, Recipe, parse_recipe
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.s2d import S2DConfig
from s2d_deploy.simulation import simulate
from s2d_deploy.store import RunFolder, read_json
from s2d_deploy.verify import end_to_end_codes, teacher_forced
from s2d_deploy.weight_change import Change

sys.path.insert(0, str(Path(__file__).parent))
import planted
from command_line import TINY

OUT = "last_hidden_state"
# Every variant, in two models: the exporter and the search take the time.
LISTS = (("shrink-next", "centre", "fold", "neurons", "insert"), ("shrink", "bypass"))


def spoiled(kind: str) -> nn.Module:
    """One layer with an outlier channel in a norm and an extreme neuron."""
    model = planted.bert(layers=1) if kind == "bert" else planted.vit(layers=1)
    norm, first = (
        ("encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.intermediate.dense")
        if kind == "bert"
        else ("layers.0.layernorm_after", "layers.0.mlp.fc1")
    )
    with torch.no_grad():
        model.get_submodule(norm).weight[3] = 12.0
        model.get_submodule(first).weight[7] *= 12
        model.get_submodule(first).bias[7] += 20.0
    return model


def data(kind: str) -> list[dict[str, Tensor]]:
    return planted.texts() if kind == "bert" else planted.images()


def conditioned(kind: str, variants: tuple[str, ...]) -> nn.Module:
    return copy.deepcopy(_conditioned(kind, variants))


@cache
def _conditioned(kind: str, variants: tuple[str, ...]) -> nn.Module:
    model = spoiled(kind)
    flagged = {"encoder.layer.0.output.dense" if kind == "bert" else "layers.0.mlp.fc2": 1}
    assert apply_variants(model, data(kind), variants, output=OUT, flagged=flagged)
    return model


@pytest.mark.parametrize("kind", ["vit", "bert"])
@pytest.mark.parametrize("variants", LISTS, ids="+".join)
def test_runtimes_compute_the_simulation(kind: str, variants: tuple[str, ...], tmp_path: Path) -> None:
    model, batches = conditioned(kind, variants), data(kind)
    assert inserted_layers(model)
    ops = discover(model, batches[0], OUT)
    plan = build_plan(model, ops, calibrate(model, ops, batches), "w4a4")
    simulated = simulate(model, plan).eval()
    with torch.no_grad():
        wanted = simulated(**batches[0])[OUT].numpy()
    load_exporter()(model, plan, batches[0], [OUT], tmp_path / "model.onnx")
    for name in ("reference", "ort"):
        target, runtime = load_target(name), load_runtime(name)
        (tmp_path / name).mkdir()
        dialect = target.dialect(tmp_path / "model.onnx", tmp_path / name, precision="w4a4")
        artifact = target.build(dialect, tmp_path / name, precision="w4a4", options={}, progress=lambda _: None)
        with runtime.open(artifact, threads=1) as session:
            found = session.run({key: tensor.numpy() for key, tensor in batches[0].items()})[OUT]
            forced = teacher_forced(session, simulated, plan, batches[0])
            codes = end_to_end_codes(session, simulated, batches[:1])
            audit = session.audit()
        assert forced["accumulators_different"] == 0
        assert forced["ops_checked"] == len(plan.ops)
        assert forced["ops_not_integer"] == []
        assert codes["codes_different"] == 0
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
        # The direct channels are float, they are declared so, and they are counted.
        declared = {op.name: op for op in audit.ops}
        tokens = 10 if kind == "bert" else 17
        direct = {
            f"{layer}.MatMul.1": tokens * m.direct.numel() * m.linear.out_features
            for layer, m in inserted_layers(model).items()
            if m.direct is not None
        }
        floats = {op.name: op.macs for op in audit.ops if op.declared == "float"}
        assert floats == direct
        assert bool(direct) == (variants[-1] == "bypass")
        assert audit.executed["int8"] == pytest.approx(1 - sum(direct.values()) / sum(op.macs for op in audit.ops))
        for layer, m in inserted_layers(model).items():  # the copies are multiplied, too
            assert declared[f"{layer}.linear"].macs == tokens * m.linear.in_features * m.linear.out_features


def test_a_plain_checkpoint_has_the_same_function_and_the_layers_come_back(tmp_path: Path) -> None:
    model, batch = conditioned("bert", LISTS[1]), data("bert")[0]
    save_inserted(model, tmp_path)
    plain = without_inserted(model)
    assert inserted_layers(model)  # a copy was made plain
    assert not inserted_layers(plain)
    assert {n: tuple(p.shape) for n, p in plain.named_parameters()} == {
        n: tuple(p.shape) for n, p in spoiled("bert").named_parameters()
    }
    again = without_inserted(model)
    assert apply_inserted(again, tmp_path)
    with torch.no_grad():
        wanted = model(**batch)[OUT]
        for other in (plain, again):
            torch.testing.assert_close(other(**batch)[OUT], wanted, rtol=1e-4, atol=1e-4)
    for name, layer in inserted_layers(model).items():
        for part, value in inserted_layers(again)[name].parts().items():
            assert torch.equal(value, layer.parts()[part])
    assert "transformers loads it" in (tmp_path / "README.md").read_text()
    assert not apply_inserted(again, tmp_path / "nowhere")


@pytest.mark.parametrize("bias", [False, True])
def test_plain_against_loops(bias: bool) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=bias).double().requires_grad_(False)
    copies = torch.tensor([0, 3, 1, 1, 2, 1])
    layer = EqualizedLinear(linear, torch.randn(6).double(), torch.rand(6).double() + 0.2, copies, [0])
    with torch.no_grad():  # a training step may move copies apart
        layer.linear.weight += 0.1 * torch.randn_like(layer.linear.weight)
    columns: list[int] = [c for c in range(6) for _ in range(int(copies[c]))]
    plain = layer.plain()
    for row in range(4):
        for channel in range(6):
            arriving = [float(layer.linear.weight.detach()[row, j]) for j, c in enumerate(columns) if c == channel]
            wanted = (
                sum(arriving) / len(arriving) / float(layer.scale[channel])
                if arriving
                else float(linear.weight[row, channel])
            )
            assert float(plain.weight.detach()[row, channel]) == pytest.approx(wanted, rel=1e-12)
    assert (plain.bias is not None) == bias


def test_a_foreign_or_damaged_file_is_refused(tmp_path: Path) -> None:
    model = conditioned("bert", LISTS[1])
    save_inserted(model, tmp_path)
    path = tmp_path / INSERTED_FILE
    tensors = load_file(path)
    name = next(iter(inserted_layers(model)))

    def refused(change: dict[str, Tensor], text: str) -> None:
        save_file(tensors | change, path)
        with pytest.raises(ModelError, match="inserted layers of another model") as caught:
            apply_inserted(without_inserted(model), tmp_path)
        assert text in str(caught.value)
        assert str(path) in str(caught.value)

    k = tensors[f"{name}.shift"].numel()
    refused({f"{name}.shift": torch.zeros(k + 1)}, f"{name}: shift has shape ({k + 1},) for {k} input channels")
    refused({f"{name}.scale": torch.zeros(k)}, f"{name}: shift or scale is not finite, or a scale is not positive")
    refused({f"{name}.copies": torch.zeros(k, dtype=torch.int64)}, "a channel neither arrives nor is led past")
    refused({"nowhere.shift": torch.zeros(k)}, "nowhere: expected a Linear, found nothing")
    path.write_bytes(b"not safetensors")
    with pytest.raises(ModelError, match=r"inserted\.safetensors: not readable"):
        apply_inserted(without_inserted(model), tmp_path)


def test_names_of_layers_before_anything_was_inserted() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"linear": nn.Linear(2, 2)})})
    assert layer_name(model, "a.linear") == "a.linear"
    model["a"] = EqualizedLinear(nn.Linear(2, 2), torch.zeros(2), torch.ones(2))
    assert layer_name(model, "a.linear") == "a"
    assert [layer_name(model, name) for name in ("a", "linear", "b.linear", "a.scores")] == [
        "a",
        "linear",
        "b.linear",
        "a.scores",
    ]


def test_a_pattern_means_a_layer_by_its_old_name() -> None:
    model, batches = conditioned("bert", LISTS[1]), data("bert")
    ops = discover(model, batches[0], OUT)
    statistics = calibrate(model, ops, batches)
    config = QuantizeConfig(skip=("*.intermediate.dense",), overrides={"*.layer.0.output.dense": "w8a8"})
    plan = build_plan(model, ops, statistics, "w4a4", config)
    assert plan.declared("encoder.layer.0.intermediate.dense.linear") == "float"
    assert plan.declared("encoder.layer.0.output.dense.linear") == "W8A8"
    with pytest.raises(RecipeError, match="matches no layer"):
        build_plan(model, ops, statistics, "w4a4", QuantizeConfig(skip=("*.intermediate.dens",)))


def one_shot_recipe(variants: Any, **changes: Any) -> Recipe:
    condition = {"method": "one-shot", "one_shot": variants, "tau": 0.5} | changes
    return parse_recipe(TINY | {"condition": condition, "quantize": {"precisions": ["w4a4"]}})


@pytest.mark.parametrize(
    ("variants", "changes", "text"),
    [
        (
            ["flod"],
            {},
            "condition.one_shot: unknown 'flod'. Expected: shrink, shrink-next, centre, fold, neurons, insert, ",
        ),
        (["flod"], {}, "did you mean 'fold'?"),
        ([], {}, "condition.one_shot: the list is empty"),
        ("fold", {}, "key 'condition.one_shot'. Expected: a list"),
        (["fold", "fold"], {}, "condition.one_shot: a variant stands there twice"),
        (
            ["insert", "bypass"],
            {},
            "'insert' must come last. Expected: shrink or shrink-next, then centre, fold and neurons",
        ),
        (["fold", "shrink"], {}, "'shrink' must come first"),
        (["shrink", "shrink-next"], {}, "'shrink-next' must come first"),
        (["fold"], {"method": "s2d", "warmup": 1}, "condition.one_shot is not read by condition.method = s2d"),
        (["fold"], {"qat": "w4a4"}, "condition.qat trains, and one-shot takes no step"),
        (["shrink"], {"shrink_factor": 1.5}, "key 'condition.shrink_factor'"),
    ],
)
def test_bad_recipes_are_explained(variants: Any, changes: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        one_shot_recipe(variants, **changes)
    assert text in str(caught.value)


def test_training_keys_do_not_matter_to_one_shot() -> None:
    text = TINY | {
        "model": {"pretrained": "somewhere", "task": "embedding"},
        "data": {"kind": "text", "path": "texts.txt"},
        "condition": {"method": "one-shot", "one_shot": ["fold"], "steps": 3, "warmup": 20},
        "train": None,
    }
    assert parse_recipe(text).condition.one_shot == ("fold",)  # text has no labels, and none are needed


def test_a_run_conditions_stores_quantizes_and_verifies(tmp_path: Path) -> None:
    recipe = one_shot_recipe(["bypass"])
    with RunFolder(tmp_path) as store:
        p = Pipeline(recipe, store, Display(quiet=True))
        stage = p.condition()
        deployed, original = p.model.module, p.original.module
        inserted = inserted_layers(deployed)
        assert inserted
        assert not inserted_layers(original)
        document = read_json(stage.folder / "conditioning.json")
        assert document["method"] == "one-shot: bypass"
        assert document["steps"] == 0
        assert stage.info["findings"] == document["findings"]
        assert "place(s), exact in float" in document["findings"][0]
        assert f"the {len(inserted)} inserted layer(s) lie beside it" in document["findings"][1]
        assert set(document["quantized"]["before"]) == set(document["quantized"]["after"]) == {"w4a4"}
        assert document["float_before"] == document["float_after"]  # exact, and no decision is a tie
        # Every Linear and Conv, by the names that the plan and the audit use.
        assert {entry["name"] for entry in document["layers"]} == {
            n for n, op in p.ops.items() if op.sites[1][1] == "weight"
        }
        assert all(entry["before"]["pcdr"] and entry["after"]["pcdr"] for entry in document["layers"])
        verified = Deployment(p, recipe.targets[0]).verify("w4a4")
        assert verified.info["parity"]["accumulators_checked"] > 0
        assert verified.info["parity"]["accumulators_different"] == 0
        ranges = {row["site"]: row for row in p.ranges()}
        assert {f"{name}.linear.input" for name in inserted} <= set(ranges)
        # Without the layers it is what transformers loads: the same function, other ranges.
        plain = load_model(ModelSection(pretrained=str(stage.folder))).module
        assert not inserted_layers(plain)
        batch = next(p.test_batches())
        with torch.no_grad():
            torch.testing.assert_close(plain(**batch).logits, deployed(**batch).logits, rtol=1e-4, atol=1e-4)
    with RunFolder(tmp_path) as store:
        store.claim(recipe.document(), update=True)
        assert Pipeline(one_shot_recipe(["bypass"], steps=7), store, Display(quiet=True)).condition().cached


def test_nothing_flagged_is_a_finding() -> None:
    changed, document = condition_one_shot(
        planted.bert(layers=1),
        planted.texts(1),
        planted.texts(1, seed=2),
        ["shrink"],
        output=OUT,
        task="embedding",
        look=S2DConfig(tau=1.0, k_max=1),
        factor=0.5,
        precisions=[],
        quantize=QuantizeConfig(),
    )
    assert document["findings"] == [
        "shrink: nothing to change in this model.",
        "No layer is flagged: no PCDR_k with k <= 1 reaches tau = 1, so nothing was shrunk.",
    ]
    assert document["changes"] == []
    assert all(e["before"]["singular_values"] == e["after"]["singular_values"] for e in document["layers"])
    assert not inserted_layers(changed)


@pytest.mark.parametrize(
    ("before", "after", "text"),
    [
        (
            {"w8a8": 98.0, "w4a4": 60.0},
            {"w8a8": 98.5, "w4a4": 60.9},
            "Not enough by itself: no precision gains a point.",
        ),
        ({"w8a8": 98.0, "w4a4": 60.0}, {"w8a8": 98.0, "w4a4": 80.0}, "w4a4 still lacks 20.0 points of the float "),
        ({"w8a8": 98.0, "w4a4": 90.0}, {"w8a8": 98.0, "w4a4": 100.0 - ENOUGH}, "w4a4 90.0 -> 95.0. It adds"),
    ],
)
def test_a_finding_says_when_it_is_not_enough(before: dict[str, float], after: dict[str, float], text: str) -> None:
    change = Change(("fc",), "inserted", 1.0, 0.5, "shifted")
    assert text in _finding(OneShotResult("insert", True, False, [change], 1.0, "cosine x 100", before, after))


def test_a_model_of_a_factory_is_stored_alike(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

    model = Net()
    x = torch.randn(3, 4)
    wanted = model.a(x).detach()
    model.a = EqualizedLinear(model.a, torch.randn(4), torch.rand(4) + 0.5)  # type: ignore[assignment]
    save_checkpoint(model, tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == {"a.weight", "a.bias"}
    assert set(load_file(tmp_path / INSERTED_FILE)) == {"a.shift", "a.scale"}
    assert isinstance(model.a, EqualizedLinear)  # what was saved is not changed
    again = Net()
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    apply_inserted(again, tmp_path)
    torch.testing.assert_close(again.a(x).detach(), wanted, rtol=1e-5, atol=1e-5)
