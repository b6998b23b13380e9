"""SmoothQuant against the formula written out, on models whose function must stay, through to the exported file."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from planted import bert, vit

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, RecipeError
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.formats import tensor_scale
from s2d_deploy.ptq.folding import Unchanged, reader_groups
from s2d_deploy.ptq.input_transform import NAME, ChannelScale, load_changes, save_changes
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.ptq.presets import preset
from s2d_deploy.ptq.smoothquant import quantized_rows, smoothing_factors
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter
from s2d_deploy.simulation import simulate

HIDDEN = "last_hidden_state"


def images(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def sentences() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(16) < torch.tensor([[16], [9], [12], [5]])).long()
    return {"input_ids": ids, "attention_mask": mask}


def smoothed(model: nn.Module, batch, precision="w4a4", config=None, **options):
    context = Context(lambda: [batch], HIDDEN) if config is None else Context(lambda: [batch], HIDDEN, config)
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    return run_passes(model, ops, precision, parse_steps([{"smoothquant": options}]), context)


def hidden(model: nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[HIDDEN]


class Chain(nn.Module):
    """Norm, ReLU, and a bilinear tail that no scale passes through."""

    def __init__(self, activation: nn.Module, leak: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 4)
        self.activation, self.leak = activation, leak
        with torch.no_grad():
            self.norm.weight.copy_(torch.tensor([1.0, 30.0, 1.0, 0.1, 1.0, 2.0]))
            self.norm.bias.normal_()

    def forward(self, x):
        hidden = self.activation(self.a(self.norm(x)))
        y = self.b(hidden)
        return {HIDDEN: y + hidden[..., :4] if self.leak else y}


def test_factors_are_equation_4():
    generator = torch.Generator().manual_seed(0)
    peaks, weight = torch.rand(5, generator=generator) * 9, torch.randn(7, 5, generator=generator)
    peaks[2], weight[:, 3] = 0.0, 0.0
    for alpha in (0.0, 0.3, 1.0):
        found = smoothing_factors(peaks, weight, alpha)
        for j in range(5):
            wanted = 1.0
            if j not in (2, 3):
                wanted = float(peaks[j]) ** alpha / max(abs(float(w)) for w in weight[:, j]) ** (1 - alpha)
            assert float(found[j]) == pytest.approx(wanted, rel=1e-6)


def test_a_norm_and_a_relu_take_the_division_exactly():
    model, x = Chain(nn.ReLU()).eval(), torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    done = smoothed(model, {"x": x}, alpha=0.5)
    assert done.plan.info["smoothquant"]["folded"] == {"a": 0.5, "b": 0.5}
    with torch.no_grad():
        first = model.norm(x)
        s = [
            (max(abs(float(v)) for v in first[:, j]) / max(abs(float(w)) for w in model.a.weight[:, j])) ** 0.5
            for j in range(6)
        ]
        assert torch.allclose(done.model.norm(x), first / torch.tensor(s), rtol=1e-5, atol=1e-6)
        hidden_channels = model.activation(model.a(first))
        t = [
            (max(abs(float(v)) for v in hidden_channels[:, j]) / max(abs(float(w)) for w in model.b.weight[:, j]))
            ** 0.5
            for j in range(8)
        ]
        assert torch.allclose(done.model.b.weight, model.b.weight * torch.tensor(t), rtol=1e-5)
        assert torch.allclose(done.model(x)[HIDDEN], model(x)[HIDDEN], atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.85, "auto"])
@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize(("make", "batch"), [(vit, images()), (bert, sentences())], ids=["pre-LN", "post-LN"])
def test_the_function_stays(make, batch, insert: bool, alpha):
    model = make()
    done = smoothed(model, batch, insert=insert, alpha=alpha)
    before = hidden(model, batch)
    assert (hidden(done.model, batch) - before).abs().max() < 1e-5 * before.abs().max()
    for site in done.plan.sites.values():
        assert bool(torch.isfinite(site.scale).all())


def test_what_is_folded_inserted_and_left_out_is_told():
    done = smoothed(vit(), images()).plan.info["smoothquant"]
    qkv = "layers.0.attention.q_proj, layers.0.attention.k_proj, layers.0.attention.v_proj"
    assert {qkv, "layers.0.attention.o_proj", "layers.0.mlp.fc1"} <= set(done["folded"])
    assert done["left_out"] == {
        "embeddings.patch_embeddings.projection": "a convolution reads it",
        "layers.0.mlp.fc2": "GELUActivation does not commute with a scale",
        "layers.1.mlp.fc2": "GELUActivation does not commute with a scale",
    }
    done = smoothed(bert(), sentences()).plan.info["smoothquant"]
    assert set(done["folded"]) == {f"encoder.layer.{i}.attention.output.dense" for i in (0, 1)}
    assert (
        done["left_out"]["encoder.layer.0.intermediate.dense"]
        == "the residual stream reads the output of encoder.layer.0.attention.output.LayerNorm as well"
    )
    done = smoothed(bert(), sentences(), insert=True).plan.info["smoothquant"]
    assert not done["left_out"]
    assert len(done["inserted"]) == 6


def test_a_residual_that_reads_a_relu_is_found_by_running():
    model = Chain(nn.ReLU(), leak=True).eval()
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    done = smoothed(model, {"x": x})
    assert done.plan.info["smoothquant"]["left_out"] == {"b": "the model reads the output of a elsewhere"}
    assert torch.equal(done.model.b.weight, model.b.weight)
    done = smoothed(model, {"x": x}, insert=True)
    assert set(done.plan.info["smoothquant"]["inserted"]) == {"b"}


def test_auto_is_never_worse_than_leaving_it_and_repeats():
    model, batch = vit(), images()
    with torch.no_grad():
        model.layers[0].layernorm_before.weight[3] = 40.0
    first, again = (smoothed(model, batch, alpha="auto", insert=True) for _ in range(2))
    assert first.plan.digest() == again.plan.digest()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    plain = run_passes(model, first.plan.ops, "w4a4", parse_steps([]), Context(lambda: [batch], HIDDEN))

    def error(quantized, name: str) -> float:
        """Of the quantized layer alone, its input being what the float model gives it."""
        layer, seen = quantized.model.get_submodule(name), []
        handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        hidden(quantized.model, batch)
        handle.remove()
        simulated = simulate(quantized.model, quantized.plan).eval().get_submodule(name)
        with torch.no_grad():
            wanted = layer(seen[0])
            return float((simulated(seen[0]) - wanted).square().sum() / (wanted - layer.bias).square().sum())

    names = [f"layers.0.attention.{p}_proj" for p in "qkv"]
    assert sum(error(first, n) for n in names) < sum(error(plain, n) for n in names)


def test_layers_of_one_tensor_share_one_inserted_scale(tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    batch = sentences()
    done = smoothed(bert(), batch, insert=True)
    own = done.model.encoder.layer[0].attention.self
    assert isinstance(own.query.input_transform, ChannelScale)
    assert own.query.input_transform is own.key.input_transform is own.value.input_transform
    proto = load_exporter()(done.model, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
    pairs = [n for n in proto.graph.node if n.op_type == "QuantizeLinear" and "layer.0" in n.name]
    names = [p.value for n in pairs for p in n.metadata_props if p.key == "s2d.site"]
    stem = "encoder.layer.0.attention.self"
    assert f"{stem}.query.input,{stem}.key.input,{stem}.value.input" in names
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {n: t.numpy() for n, t in batch.items()})[0]
    wanted = hidden(simulate(done.model, done.plan).eval(), batch).numpy()
    assert np.abs(found - wanted).max() < 1e-4


def test_changes_come_back_from_disk(tmp_path: Path):
    batch = sentences()
    model = bert()
    done = smoothed(model, batch, insert=True)
    save_changes(model, done.model, tmp_path)
    again = copy.deepcopy(model)
    load_changes(again, tmp_path)
    assert torch.equal(hidden(again, batch), hidden(done.model, batch))


def test_a_shared_weight_is_left_alone():
    model = Chain(nn.ReLU()).eval()
    model.other = nn.Linear(6, 8)
    model.other.weight = model.a.weight
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    done = smoothed(model, {"x": x}, insert=True).plan.info["smoothquant"]
    assert done["left_out"]["a"] == "the weight of a is shared with another module"
    assert "b" not in done["folded"]  # the maker of its input is tied
    assert "b" in done["inserted"]


def test_a_model_without_a_place_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return {HIDDEN: self.a(x)}

    with pytest.raises(
        ModelError, match=r"none of the model's layers\. Found: a: the model's own input\. Fix: set smo"
    ):
        smoothed(Bare().eval(), {"x": torch.randn(3, 4)})


def test_readers_of_one_norm_are_one_group():
    groups = {group.names: group for group in reader_groups(vit(), {n: t[:1] for n, t in images().items()})}
    group = groups[tuple(f"layers.0.attention.{p}_proj" for p in "qkv")]
    assert group.maker == "layers.0.layernorm_before"
    assert groups[("layers.0.attention.o_proj",)].maker == "layers.0.attention.v_proj"


def test_a_change_of_the_function_is_refused_by_name():
    model = vit()
    guard = Unchanged(model, {n: t[:1] for n, t in images().items()})
    assert guard.check("nothing") == 0.0
    with torch.no_grad():
        model.layers[1].mlp.fc2.weight.mul_(1.1)
    with pytest.raises(ModelError, match=r"a scale in front of x changes what the model computes\. Expected: outputs"):
        guard.check("a scale in front of x")


@pytest.mark.parametrize("alpha", [-0.1, 1.5, "best"])
def test_a_wrong_alpha_is_an_error(alpha):
    with pytest.raises(RecipeError, match=r"quantize\.passes\.smoothquant\.alpha"):
        parse_steps([{"smoothquant": {"alpha": alpha}}])


def test_the_preset():
    assert preset("int8_smoothquant") == {"precisions": ["w8a8"], "passes": ["smoothquant"]}
    assert [step.name for step in parse_steps(preset("int8_smoothquant")["passes"])] == ["smoothquant", "ranges"]


@pytest.mark.parametrize("precision", ["nvfp4", "mxfp4"])
@pytest.mark.parametrize(
    "entry", [{"smoothquant": {"alpha": "auto", "insert": True}}, {"awq": {"insert": True}}], ids=["smoothquant", "awq"]
)
def test_a_search_works_with_block_scales_made_at_run_time(precision: str, entry):
    """NVFP4's block scales need the tensor's scale, which the search did not give (a PlanError)."""
    model, batch = vit(layers=1), images()
    with torch.no_grad():
        model.layers[0].layernorm_before.weight[5] = 40.0
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    done = run_passes(model, ops, precision, parse_steps([entry]), Context(lambda: [batch], HIDDEN))
    told = done.plan.info[next(iter(entry))]
    assert told["folded"] or told["inserted"] or told["unchanged"]
    assert torch.allclose(hidden(done.model, batch), hidden(model, batch), atol=1e-4)


def test_rows_on_an_nvfp4_grid_are_what_the_quantizer_of_their_own_site_gives():
    batch = images()
    model = vit(layers=1)
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    plan = run_passes(model, ops, "nvfp4", parse_steps([]), Context(lambda: [batch], HIDDEN)).plan
    site = plan.sites["layers.0.mlp.fc1.input"]
    rows = torch.randn(20, 32, generator=torch.Generator().manual_seed(3)) * 7
    own = replace(site, tensor_scale=tensor_scale(rows.abs().max()))
    assert torch.equal(quantized_rows(rows, site, QuantizeConfig()), FakeQuantizer.of(own)(rows))


@pytest.mark.parametrize("entry", [{"smoothquant": {"insert": True}}, {"awq": {"insert": True}}], ids=["smooth", "awq"])
def test_layers_that_stay_float_get_no_product(entry):
    model, batch = bert(), sentences()
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.output.LayerNorm.weight[5] = 30.0
            layer.attention.output.LayerNorm.weight[7] = 30.0
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    config = QuantizeConfig(skip=("*intermediate*", "*layer.1.attention.self.query"))
    done = run_passes(model, ops, "w4a4", parse_steps([entry]), Context(lambda: [batch], HIDDEN, config))
    found = {n for n, m in done.model.named_modules() if hasattr(m, NAME)}
    assert found  # something was inserted
    assert not [n for n in found if "intermediate" in n or n.endswith("layer.1.attention.self.query")]
    told = done.plan.info[next(iter(entry))]
    assert told["left_out"]["encoder.layer.0.intermediate.dense"] == "stays float"
    assert all(f"{n}.input" in done.plan.sites for title in told["inserted"] for n in title.split(", "))
    before = hidden(model, batch)
    assert (hidden(done.model, batch) - before).abs().max() < 1e-5 * before.abs().max()


def test_a_skip_pattern_that_matches_nothing_is_found_before_any_work():
    model, batch = vit(layers=1), images()
    said: list[str] = []
    context = Context(lambda: [batch], HIDDEN, QuantizeConfig(skip=("*.fc3",)), progress=said.append)
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    with pytest.raises(RecipeError, match=r"quantize.skip: '\*\.fc3' matches no layer"):
        run_passes(model, ops, "w4a4", parse_steps(["smoothquant"]), context)
    assert said == ["smoothquant"]
