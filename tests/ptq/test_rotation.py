"""Rotations: exact on LayerNorm, against loops, on models of every layout, and through every target."""

from __future__ import annotations

import copy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from planted import bert, vit
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
)

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, RecipeError, UnavailableError
from s2d_deploy.plan import Plan
from s2d_deploy.ptq import rotation
from s2d_deploy.ptq.input_transform import hadamard, load_changes, save_changes
from s2d_deploy.ptq.passes import Context, Quantized, parse_steps, run_passes
from s2d_deploy.ptq.presets import preset
from s2d_deploy.ptq.residual import residual_streams
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.simulation import simulate
from s2d_deploy.verify import end_to_end_codes, teacher_forced

HIDDEN = "last_hidden_state"
VISION = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 16, "patch_size": 4}


def images():
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def sentences():
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(16) < torch.tensor([[16], [9], [12], [5]])).long()}


def classifier(layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(num_hidden_layers=layers, num_labels=5, **VISION)).eval()


def siglip() -> nn.Module:
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=1, **VISION)).eval()


def clip() -> nn.Module:
    torch.manual_seed(0)
    return CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=1, **VISION)).eval()


def clip_text() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "num_hidden_layers": 1}
    ids = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, **ids)).eval()


def with_gains(model: nn.Module) -> nn.Module:
    """Norms as trained ones are: with gains, biases and one channel that stands out."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.add_(torch.rand(module.weight.shape, generator=generator) - 0.3)
                module.weight[3] = 12.0
                module.bias.add_(torch.rand(module.bias.shape, generator=generator) - 0.5)
    return model


def rotated(model: nn.Module, batch, output=HIDDEN, precision="w4a4", config=None, seed=0, **options):
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, output)
    context = Context(lambda: [batch], output, config or QuantizeConfig(), seed)
    return run_passes(model, ops, precision, parse_steps([{"rotation": options}]), context)


def turned(model: nn.Module, batch, output=HIDDEN, skip=(), **options):
    """The pass alone: no ranges."""
    plan = Plan("w4a4", discover(model, {n: t[:1] for n, t in batch.items()}, output))
    context = Context(lambda: [batch], output, QuantizeConfig(skip=skip))
    return rotation.apply(Quantized(copy.deepcopy(model), plan), context, rotation.Options(**options))


def value(model: nn.Module, batch, output=HIDDEN) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[output]


class Readers(nn.Module):
    """A norm that a residual reads too (as in post-LN), two Linears on it, and a GELU."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(width), nn.Linear(width, 8), nn.Linear(width, 8)
        self.gelu, self.c = nn.GELU(), nn.Linear(8, width)

    def forward(self, x):
        x = self.norm(x)
        return {HIDDEN: x + self.c(self.gelu(self.a(x) + self.b(x)))}


@pytest.mark.parametrize("size", [1, 2, 7, 48])
def test_random_matrices_are_orthogonal(size: int):
    for make in (rotation.orthogonal, rotation.head_rotation, rotation.stream_rotation):
        r = make(size, torch.Generator().manual_seed(3))
        assert torch.equal(r, make(size, torch.Generator().manual_seed(3)))
        assert torch.allclose(r @ r.T, torch.eye(size, dtype=torch.float64), atol=1e-13)
    ones = torch.ones(size, dtype=torch.float64)
    assert torch.allclose(r @ ones, ones, atol=1e-13)
    assert torch.allclose(ones @ r, ones, atol=1e-13)
    if size > 2:
        assert (r - torch.eye(size, dtype=torch.float64)).abs().max() > 0.1
        assert not torch.equal(r, rotation.stream_rotation(size, torch.Generator().manual_seed(4)))


def test_a_layer_norm_commutes_with_it_exactly():
    r = rotation.stream_rotation(24, torch.Generator().manual_seed(0))
    x = torch.randn(50, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 9 + 4
    found, wanted = F.layer_norm(x @ r, (24,)), F.layer_norm(x, (24,)) @ r
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)  # float64: nothing but rounding
    any_rotation = rotation.orthogonal(24, torch.Generator().manual_seed(0))
    assert (F.layer_norm(x @ any_rotation, (24,)) - F.layer_norm(x, (24,)) @ any_rotation).abs().max() > 0.1


class PreLN(nn.Module):
    """A pre-LN stream without attention, whose softmax is FP32 in any model: exact in double precision."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.position, self.table = (
            nn.Linear(5, 12),
            nn.Parameter(torch.randn(1, 3, 12)),
            nn.Embedding(3, 12),
        )
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(12, 20) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(20, 12) for _ in range(2))
        self.head, self.gelu = nn.Linear(12, 4), nn.GELU()

    def forward(self, x):
        x = self.stem(x) + self.position + self.table(torch.arange(3))
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = x + down(self.gelu(up(norm(x))))
        return {HIDDEN: self.head(self.norms[2](x)[:, 0])}


def test_a_stream_is_exact_in_double_precision():
    model = with_gains(PreLN()).double().eval()
    batch = {"x": torch.randn(6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    done = turned(model, batch)
    assert (value(done.model, batch) - value(model, batch)).abs().max() < 1e-12
    told = done.plan.info["rotation"]
    assert told["norms"] == ["norms.0", "norms.1", "norms.2"]
    assert (told["turned_back"], told["online"], told["left_out"]) == ([], {}, {})
    same = {n for n, p in done.model.named_parameters() if torch.equal(p, model.get_parameter(n))}
    assert same == set()  # every parameter writes the stream, reads it, or has moved into one that does


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(
    ("make", "batch", "output"),
    [
        (vit, images(), HIDDEN),
        (classifier, images(), "logits"),
        (siglip, images(), "pooler_output"),
        (clip, images(), "pooler_output"),
        (clip_text, sentences(), HIDDEN),
        (bert, sentences(), HIDDEN),
    ],
    ids=["ViT", "ViT classifier", "SigLIP", "CLIP vision", "CLIP text", "BERT"],
)
def test_the_function_stays(make, batch, output: str, online: bool):
    model = with_gains(make())
    done = turned(model, batch, output, online=online)
    before = value(model, batch, output)
    assert (value(done.model, batch, output) - before).abs().max() < 2e-5 * before.abs().max()


def test_weights_against_the_formula():
    model, batch = with_gains(classifier()), images()
    done = turned(model, batch, "logits", heads=False).model
    r = rotation.stream_rotation(48, torch.Generator().manual_seed(0))
    before, after = model.vit.layers[0], done.vit.layers[0]
    gain, bias = before.layernorm_before.weight.double(), before.layernorm_before.bias.double()
    for name in ("q_proj", "k_proj", "v_proj"):
        old, new = before.attention.get_submodule(name), after.attention.get_submodule(name)
        wanted = (old.weight.double() * gain) @ r
        assert torch.allclose(new.weight.double(), wanted, atol=1e-6)
        assert torch.allclose(new.bias.double(), old.bias.double() + old.weight.double() @ bias, atol=1e-6)
    assert torch.equal(after.layernorm_before.weight, torch.ones(48))
    assert not after.layernorm_before.bias.any()
    old, new = before.mlp.fc2, after.mlp.fc2
    assert torch.allclose(new.weight.double(), r.T @ old.weight.double(), atol=1e-6)
    assert torch.allclose(new.bias.double(), r.T @ old.bias.double(), atol=1e-6)
    for name in ("cls_token", "position_embeddings"):
        old, new = model.vit.embeddings.get_parameter(name), done.vit.embeddings.get_parameter(name)
        assert torch.allclose(new.double(), old.double() @ r, atol=1e-6)
    old = model.vit.embeddings.patch_embeddings.projection.weight
    new = done.vit.embeddings.patch_embeddings.projection.weight
    for c, y, x in ((0, 0, 0), (2, 3, 1)):  # a pixel's column of filters turns like a vector
        assert torch.allclose(new[:, c, y, x].double(), old[:, c, y, x].double() @ r, atol=1e-6)


def test_heads_against_loops():
    model, batch = vit(), images()
    done = turned(model, batch, residual=False)
    generator = torch.Generator().manual_seed(0)
    old, new = model.layers[0].attention, done.model.layers[0].attention
    together = [rotation.head_rotation(8, generator) for _ in range(4)]  # queries and keys come first
    own = [rotation.head_rotation(8, generator) for _ in range(4)]
    for h in range(4):
        rows = slice(8 * h, 8 * h + 8)
        for name, r in (("q_proj", together[h]), ("k_proj", together[h]), ("v_proj", own[h])):
            a, b = old.get_submodule(name), new.get_submodule(name)
            assert torch.allclose(b.weight[rows].double(), r.T @ a.weight[rows].double(), atol=1e-6)
        wanted = old.o_proj.weight[:, rows].double() @ own[h]
        assert torch.allclose(new.o_proj.weight[:, rows].double(), wanted, atol=1e-6)
    assert done.plan.info["rotation"]["heads"][:2] == ["layers.0.attention.scores", "layers.0.attention.context"]


def test_what_is_left_out_is_told():
    told = turned(vit(), images()).plan.info["rotation"]
    assert told["turned_back"] == ["layernorm"]  # its output is the model's, so it needs the stream as it was
    told = turned(clip(), images(), "pooler_output").plan.info["rotation"]
    assert told["left_out"]["residual stream of encoder.layers.0.layer_norm1"] == (
        "the gain of pre_layrnorm acts on the stream"
    )
    told = turned(siglip(), images(), "pooler_output").plan.info["rotation"]
    assert told["left_out"]["residual stream of head.layernorm"] == "the output of Addmm is added, which no layer owns"
    assert told["turned_back"] == ["post_layernorm"]
    told = turned(bert(), sentences()).plan.info["rotation"]
    assert told["norms"] == []
    assert len(told["heads"]) == 4
    assert told["left_out"]["residual stream of encoder.layer.0.output.LayerNorm"] == (
        "the gain of encoder.layer.0.attention.output.LayerNorm acts on the stream"
    )


def test_the_stream_is_found_whole():
    (stream,) = residual_streams(clip_text(), {n: t[:1] for n, t in sentences().items()})
    assert stream.norms == ["encoder.layers.0.layer_norm1", "encoder.layers.0.layer_norm2", "final_layer_norm"]
    assert sorted(stream.layers) == ["encoder.layers.0.mlp.fc2", "encoder.layers.0.self_attn.out_proj"]
    assert sorted(stream.embeddings) == ["embeddings.position_embedding", "embeddings.token_embedding"]
    assert stream.reasons == []

    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b, self.c = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = self.a(x)
            return {HIDDEN: self.b(self.norm(x)) + self.c(x).tanh()}

    (stream,) = residual_streams(Direct(), {"x": torch.randn(1, 4)})
    assert stream.reasons == ["c reads it directly"]


def test_online_transforms_stand_where_nothing_else_rotates():
    batch = sentences()
    model = with_gains(bert())
    done = turned(model, batch, online=True, block=16)
    stem = "encoder.layer.0"
    told = done.plan.info["rotation"]["online"]
    qkv = ", ".join(f"{stem}.attention.self.{n}" for n in ("query", "key", "value"))
    assert {qkv: 16, f"{stem}.intermediate.dense": 16, f"{stem}.output.dense": 16}.items() <= told.items()
    assert f"{stem}.attention.output.dense" not in told  # its heads are rotated
    own = done.model.encoder.layer[0].attention.self
    assert own.query.input_transform is own.key.input_transform is own.value.input_transform
    signs = torch.randint(0, 2, (16, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    block = torch.block_diag(*[signs * hadamard(16)] * 4)
    old, new = model.encoder.layer[0].output.dense, done.model.encoder.layer[0].output.dense
    assert torch.allclose(new.weight, old.weight @ block, atol=1e-5)
    told = turned(model, batch, online=True, heads=False).plan.info["rotation"]["online"]
    assert told[f"{stem}.attention.output.dense"] == 32
    assert told[f"{stem}.output.dense"] == 64  # the largest power of two that divides K
    told = turned(model, batch, online=True, skip=("*intermediate*",)).plan.info["rotation"]["online"]
    assert not any("intermediate" in names for names in told)


def test_an_outlier_channel_costs_less_at_four_bits():
    model = Readers(64).eval()
    with torch.no_grad():
        model.norm.weight[5] = 40.0
    batch = {"x": torch.randn(64, 64, generator=torch.Generator().manual_seed(1))}
    wanted = value(model, batch)

    def error(quantized) -> float:
        return float((value(simulate(quantized.model, quantized.plan).eval(), batch) - wanted).square().mean())

    plain = run_passes(model, discover(model, batch, HIDDEN), "w4a4", parse_steps([]), Context(lambda: [batch], HIDDEN))
    assert error(rotated(model, batch, online=True)) < 0.8 * error(plain)


def test_one_transform_and_one_pair_for_layers_of_one_tensor(tmp_path: Path):
    model, batch = with_gains(bert(layers=1)), sentences()
    done = rotated(model, batch, online=True)
    save_changes(model, done.model, tmp_path)
    again = copy.deepcopy(model)
    load_changes(again, tmp_path)  # no shared instance any more, but equal matrices
    assert torch.equal(value(again, batch), value(done.model, batch))
    for changed in (done.model, again):
        proto = load_exporter()(changed, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
        transforms = [n for n in proto.graph.node if n.op_type == "MatMul" and "input_transform" in n.name]
        assert len(transforms) == 3  # q, k and v together, and two in the MLP
        for node in transforms:
            props = {p.key: p.value for p in node.metadata_props}
            assert props["s2d.declared"] == "float"
            assert int(props["s2d.macs"]) in (16 * 32 * 32, 16 * 64 * 64)
        sites = [p.value for n in proto.graph.node for p in n.metadata_props if p.key == "s2d.site"]
        stem = "encoder.layer.0.attention.self"
        assert f"{stem}.query.input,{stem}.key.input,{stem}.value.input" in sites


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize(("make", "batch"), [(vit, images()), (bert, sentences())], ids=["ViT", "BERT"])
def test_export_computes_what_the_simulation_does(make, batch, granularity: str, tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    config = QuantizeConfig(activation_granularity=granularity)
    done = rotated(with_gains(make(layers=1)), batch, online=True, config=config)
    load_exporter()(done.model, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
    options = ort.SessionOptions()
    # Its full optimization computes other things for per-token INT4 pairs, rotated or not; our ORT target sets its own.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    path = str(tmp_path / "model.onnx")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {n: t.numpy() for n, t in batch.items()})[0]
    wanted = value(simulate(done.model, done.plan).eval(), batch).numpy()
    # Sums in another order may flip a code here and there; a wrong transform would move everything.
    assert np.median(np.abs(found - wanted)) < 1e-5 * np.abs(wanted).max()


@pytest.mark.parametrize("target", ["reference", "ort", "tvm", "tensorrt"])
def test_every_target_builds_it_and_those_that_run_here_agree(target: str, tmp_path: Path):
    package = {"ort": "onnxruntime", "tvm": "tvm", "tensorrt": "tensorrt_rtx"}.get(target)
    if package is not None:
        pytest.importorskip(package)
    model = Readers().eval()
    batch = {"x": torch.randn(4, 16, generator=torch.Generator().manual_seed(1))}
    done = rotated(model, batch, online=True)
    assert done.plan.info["rotation"]["online"] == {"a, b": 16, "c": 8}
    load_exporter()(done.model, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
    made = load_target(target)
    folder = tmp_path / target
    folder.mkdir()
    dialect = made.dialect(tmp_path / "model.onnx", folder, precision="w4a4")
    options = made.shape_options([4], {})
    artifact = made.build(dialect, folder, precision="w4a4", options=options, progress=lambda text: None)
    simulated = simulate(done.model, done.plan).eval()
    try:
        with load_runtime(target).open(artifact, threads=1) as session:
            found = session.run({"x": batch["x"].numpy()})
            executed = session.audit().executed
            forced = teacher_forced(session, simulated, done.plan, batch)
            codes = end_to_end_codes(session, simulated, [batch])
    except UnavailableError as error:
        pytest.skip(f"built; not run here: {error}")
    (array,) = found.values()
    assert np.abs(array - value(simulated, batch).numpy()).max() < 1e-5
    assert (forced["accumulators_checked"], forced["accumulators_different"]) == (4 * (8 + 8 + 16), 0)
    assert codes.get("codes_different", 0) == 0
    floats = Fraction(16 * 16 + 8 * 8, 16 * 16 + 8 * 8 + 16 * 8 * 3)  # the transforms run in float, and are counted
    assert executed["float32"] == pytest.approx(float(floats))


def test_the_seed_decides_and_repeats():
    model, batch = with_gains(vit(layers=1)), images()
    first, again, other = (rotated(model, batch, online=True, seed=seed) for seed in (0, 0, 1))
    assert first.plan.digest() == again.plan.digest() != other.plan.digest()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_odd_widths_and_shared_weights_are_left_out():
    batch = {"x": torch.randn(4, 15)}
    told = turned(Readers(15).eval(), batch, online=True).plan.info["rotation"]
    assert told["left_out"]["a, b"] == "no power of two divides K = 15"
    assert told["online"] == {"c": 8}
    model = Readers().eval()
    model.other = nn.Linear(16, 8)
    model.other.weight = model.a.weight
    told = turned(model, {"x": torch.randn(4, 16)}, online=True).plan.info["rotation"]
    assert told["left_out"]["a, b"] == "the weight of a is shared with another module"


def test_a_model_without_a_place_is_refused():
    with pytest.raises(
        ModelError, match=r"rotation can change none of the model's layers\. .*Fix: set rotation.online"
    ):
        turned(Readers().eval(), {"x": torch.randn(4, 16)})


def test_wrong_options_are_errors():
    with pytest.raises(RecipeError, match=r"quantize\.passes\.rotation\.block: value error, must be a power of two"):
        parse_steps([{"rotation": {"block": 24}}])
    with pytest.raises(RecipeError, match=r"unknown option 'onlin'.*did you mean 'online'\?"):
        parse_steps([{"rotation": {"onlin": True}}])


def test_the_preset():
    assert preset("w4a4_rotated")["precisions"] == ["w4a4"]
    assert "rotation" in [step.name for step in parse_steps(preset("w4a4_rotated")["passes"])]


def test_a_model_whose_norms_cannot_take_a_rotation_is_told_so(caplog):
    with caplog.at_level("WARNING"):
        turned(bert(layers=1), sentences())
    assert "rotation turns no residual stream (residual stream of " in caplog.text
    assert "`online: true` rotates in front of the layers instead" in caplog.text
    caplog.clear()
    turned(vit(layers=1), images())
    turned(bert(layers=1), sentences(), residual=False)
    assert not caplog.text
