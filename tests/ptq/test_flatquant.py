"""FlatQuant: the transform against loops, training against the start, and through simulation, disk and export."""

from __future__ import annotations

import copy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from planted import bert, vit

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, RecipeError, UnavailableError
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor, PerToken
from s2d_deploy.plan import Site
from s2d_deploy.ptq import flatquant
from s2d_deploy.ptq.input_transform import Chain, ChannelScale, Kronecker, load_changes, save_changes
from s2d_deploy.ptq.passes import Context, Quantized, parse_steps, run_passes
from s2d_deploy.ptq.smoothquant import quantized_rows, quantized_weight
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.simulation import simulate
from s2d_deploy.verify import end_to_end_codes, teacher_forced

HIDDEN = "last_hidden_state"
QUICK = {"iterations": 30, "rows": 64, "batch": 32}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images():
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def sentences():
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(16) < torch.tensor([[16], [9], [12], [5]])).long()}


class Readers(nn.Module):
    """Two Linears of one norm, whose gain has an outlier, and one behind a GELU."""

    def __init__(self, width: int = 24):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.gelu = nn.LayerNorm(width), nn.GELU()
        self.a, self.b, self.c = nn.Linear(width, 8), nn.Linear(width, 8), nn.Linear(8, 16)
        with torch.no_grad():
            self.norm.weight[5] = 20.0

    def forward(self, x):
        x = self.norm(x)
        return {HIDDEN: self.c(self.gelu(self.a(x) + self.b(x)))}


def readers(width: int = 24):
    return Readers(width).eval(), {"x": torch.randn(64, width, generator=torch.Generator().manual_seed(1))}


def value(model: nn.Module, batch):
    with torch.no_grad():
        return model(**batch)[HIDDEN]


def flat(model, batch, precision: str = "w4a4", *, behind=(), config=None, seed: int = 0, **options) -> Quantized:
    ops = discover(model, batch, HIDDEN)
    context = Context(lambda: [batch], HIDDEN, config or QuantizeConfig(), seed)
    return run_passes(model, ops, precision, parse_steps([{"flatquant": {**QUICK, **options}}, *behind]), context)


def test_the_product_against_loops():
    x = torch.randn(5, 6, dtype=torch.float64)
    made = Kronecker(2, 3).double()
    made.p1.copy_(torch.randn(2, 2))
    made.p2.copy_(torch.randn(3, 3))
    full = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            for a in range(2):
                for b in range(3):  # outputs are stored (n2, n1)
                    full[3 * i + j, 2 * b + a] = made.p1[i, a] * made.p2[j, b]
    assert torch.allclose(made(x), x @ full)
    w = torch.randn(4, 6, dtype=torch.float64)
    assert torch.allclose(made.absorb(w), w @ torch.linalg.inv(full).T)
    assert torch.allclose(made(x.reshape(5, 1, 6)), (x @ full).reshape(5, 1, 6))


@pytest.mark.parametrize(
    ("width", "found"), [(384, (16, 24)), (1536, (32, 48)), (64, (8, 8)), (13, (1, 13)), (1, (1, 1))]
)
def test_the_factors_of_a_width(width: int, found: tuple[int, int]):
    assert flatquant.factors(width) == found


@pytest.mark.parametrize(("make", "batch"), [(vit, images()), (bert, sentences())], ids=["ViT", "BERT"])
def test_the_function_stays_and_the_error_falls(make, batch, tmp_path: Path):
    model = make(layers=1)
    before = copy.deepcopy(model.state_dict())
    done = flat(model, batch)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    wanted = value(model, batch)
    assert (value(done.model, batch) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    told = done.plan.info["flatquant"]
    assert len(told["transformed"]) >= 3
    for entry in told["transformed"].values():
        assert entry["error"] < entry["error_before"]
        assert 1.0 <= entry["condition"] < np.exp(4 * flatquant.STRETCH)
    save_changes(model, done.model, tmp_path)
    again = copy.deepcopy(model)
    load_changes(again, tmp_path)
    assert torch.equal(value(again, batch), value(done.model, batch))


@pytest.mark.parametrize("granularity", ["tensor", "token"])
@pytest.mark.parametrize("precision", ["w4a4", "w4a8", "w4a16"])
def test_the_told_error_is_that_of_the_simulated_layer(precision: str, granularity: str):
    model, batch = readers(32)
    config = QuantizeConfig(activation_granularity=granularity, block_size=8)
    done = flat(model, batch, precision, config=config, relative=False)
    told = done.plan.info["flatquant"]["transformed"]["a, b"]
    x = model.norm(batch["x"])
    seen = done.model.norm(batch["x"])  # its gain may hold the scales
    simulated = simulate(done.model, done.plan).eval()
    with torch.no_grad():
        pairs = [(simulated.get_submodule(n)(seen), model.get_submodule(n)(x)) for n in ("a", "b")]
        float_power = torch.cat([x @ model.get_submodule(n).weight.T for n in ("a", "b")], 1).square().mean()
    error = torch.cat([(q - y).square() for q, y in pairs], 1).mean() / float_power
    assert float(error) == pytest.approx(told["error"], rel=1e-2)  # all 64 rows were sampled
    assert told["error"] < told["error_before"]


def test_training_is_better_than_its_start_and_never_worse_than_nothing():
    model, batch = readers()
    start = flat(model, batch, iterations=0).plan.info["flatquant"]["transformed"]["a, b"]
    trained = flat(model, batch, iterations=60).plan.info["flatquant"]["transformed"]["a, b"]
    assert not start["learned"]
    assert trained["learned"]
    assert trained["error"] < 0.97 * start["error"] < 0.97 * start["error_before"]
    assert trained["start"] == start["start"]
    # A rate that ruins the matrices: what is kept is the start.
    ruined = flat(model, batch, learning_rate=1.0, iterations=5).plan.info["flatquant"]["transformed"]["a, b"]
    assert ruined["error"] <= start["error"]


def test_a_tensor_that_no_transform_helps_stays_as_it_is():
    class Codes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(16, 4)
            with torch.no_grad():  # weights and inputs lie on 4-bit grids already
                self.a.weight.copy_(torch.randint(-7, 8, (4, 16), generator=torch.Generator().manual_seed(0)))
                self.a.weight[:, 0] = 7.0

        def forward(self, x):
            return {HIDDEN: self.a(x)}

    batch = {"x": torch.randint(-7, 8, (64, 16), generator=torch.Generator().manual_seed(1)).float()}
    model = Codes().eval()
    done = flat(model, batch, config=QuantizeConfig(weights="absmax", activations="absmax"))
    assert list(done.plan.info["flatquant"]["unchanged"]) == ["a"]
    assert done.plan.info["flatquant"]["unchanged"]["a"] < 1e-10
    assert not hasattr(done.model.a, "input_transform")


def test_scales_go_into_the_norm_where_nothing_else_reads_it():
    model, batch = readers()
    done = flat(model, batch)
    assert done.plan.info["flatquant"]["transformed"]["a, b"]["start"] != "identity"
    assert isinstance(done.model.a.input_transform, Kronecker)
    assert done.model.a.input_transform is done.model.b.input_transform
    assert not torch.equal(done.model.norm.weight, model.norm.weight)
    assert isinstance(done.model.c.input_transform, Chain)  # GELU does not commute with a scale
    assert [type(part) for part in done.model.c.input_transform.parts] == [ChannelScale, Kronecker]
    bare = flat(model, batch, scale=False)
    assert torch.equal(bare.model.norm.weight, model.norm.weight)
    assert isinstance(bare.model.c.input_transform, Kronecker)


def test_one_transform_and_one_pair_for_layers_of_one_tensor(tmp_path: Path):
    model, batch = readers()
    done = flat(model, batch, iterations=2)
    save_changes(model, done.model, tmp_path)
    again = copy.deepcopy(model)
    load_changes(again, tmp_path)  # no shared instance any more, but equal matrices
    for changed in (done.model, again):
        proto = load_exporter()(changed, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
        assert sorted(transform_macs(proto)) == [8 * 2, 8 * 4, 24 * 4, 24 * 6]  # K (n1 + n2) each
        assert "a.input,b.input" in written_sites(proto)


def transform_macs(proto) -> list[int]:
    nodes = [n for n in proto.graph.node if n.op_type == "MatMul" and "input_transform" in n.name]
    return [int(p.value) for n in nodes for p in n.metadata_props if p.key == "s2d.macs"]


def written_sites(proto) -> list[str]:
    return [p.value for n in proto.graph.node for p in n.metadata_props if p.key == "s2d.site"]


@pytest.mark.parametrize(
    ("make", "batch", "granularity"),
    [(vit, images(), "token"), (bert, sentences(), "tensor")],
    ids=["ViT per token", "BERT per tensor"],
)
def test_export_computes_what_the_simulation_does(make, batch, granularity: str, tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    config = QuantizeConfig(activation_granularity=granularity)
    done = flat(make(layers=1), batch, config=config, behind=["gptq"], iterations=5)
    proto = load_exporter()(done.model, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
    options = ort.SessionOptions()
    # Its full optimization computes other things for per-token INT4 pairs; our ORT target sets its own.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    path = str(tmp_path / "model.onnx")
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {n: t.numpy() for n, t in batch.items()})[0]
    wanted = value(simulate(done.model, done.plan).eval(), batch).numpy()
    # Sums in another order may flip a code here and there; a wrong transform would move everything.
    assert np.median(np.abs(found - wanted)) < 1e-5 * np.abs(wanted).max()
    told = done.plan.info["flatquant"]["transformed"]
    assert len(transform_macs(proto)) == 2 * len(told)
    if granularity == "tensor":
        stem = "encoder.layer.0.attention.self"
        own = done.model.get_submodule(stem)
        last = [getattr(t, "parts", [t])[-1] for t in (own.query.input_transform, own.key.input_transform)]
        assert last[0] is last[1]
        assert f"{stem}.query.input,{stem}.key.input,{stem}.value.input" in written_sites(proto)


@pytest.mark.parametrize("target", ["reference", "ort", "tvm", "tensorrt"])
def test_every_target_builds_it_and_those_that_run_here_agree(target: str, tmp_path: Path):
    package = {"ort": "onnxruntime", "tvm": "tvm", "tensorrt": "tensorrt_rtx"}.get(target)
    if package is not None:
        pytest.importorskip(package)
    model, batch = readers()
    done = flat(model, batch)
    load_exporter()(done.model, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
    made = load_target(target)
    folder = tmp_path / target
    folder.mkdir()
    dialect = made.dialect(tmp_path / "model.onnx", folder, precision="w4a4")
    options = made.shape_options([64], {})
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
    differences = np.abs(array - value(simulated, batch).numpy())
    assert np.median(differences) < 1e-5
    assert (forced["accumulators_checked"], forced["accumulators_different"]) == (64 * (8 + 8 + 16), 0)
    assert codes.get("codes_different", 0) <= 2  # of 2,048: float products of two orders, at a rounding boundary
    floats = 24 * (4 + 6) + 8 * (2 + 4)  # the transforms run in float, and are counted
    assert executed["float32"] == pytest.approx(float(Fraction(floats, floats + 24 * 16 + 8 * 16)))


def test_the_seed_decides_and_repeats():
    model, batch = readers(32)
    first, again, other = (flat(model, batch, seed=seed) for seed in (0, 0, 1))
    assert first.plan.digest() == again.plan.digest() != other.plan.digest()
    for name, tensor in first.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])


def test_memory_is_bounded_by_chunks_and_chunks_change_nothing(monkeypatch):
    model, batch = bert(layers=1), sentences()
    whole = flat(model, batch, iterations=2)
    monkeypatch.setattr(flatquant, "_BUDGET_BYTES", 1)
    alone = flat(model, batch, iterations=2).plan.info["flatquant"]["transformed"]
    for title, entry in whole.plan.info["flatquant"]["transformed"].items():
        assert alone[title]["start"] == entry["start"]
        # Rows sampled behind layers that are transformed by then differ in their last bits, and a code may flip.
        assert alone[title]["error"] == pytest.approx(entry["error"], rel=1e-2)


def test_grids_of_one_tensor_that_differ_get_transforms_of_their_own():
    model, batch = readers()
    done = flat(model, batch, config=QuantizeConfig(overrides={"b": "w8a8"}), iterations=2)
    told = done.plan.info["flatquant"]
    assert {"a", "b"} <= {*told["transformed"], *told["unchanged"]}
    assert done.model.a.input_transform is not getattr(done.model.b, "input_transform", None)
    done = flat(model, batch, config=QuantizeConfig(skip=("b",)), iterations=2)
    assert "a" in done.plan.info["flatquant"]["transformed"]
    assert not hasattr(done.model.b, "input_transform")  # it stays float, and reads what it read


@pytest.mark.parametrize(
    ("granularity", "symmetric"),
    [(PerTensor(), True), (PerTensor(), False), (PerToken(), True)],
    ids=["tensor", "tensor with a zero point", "token"],
)
@pytest.mark.parametrize("weights", [PerAxis(0), PerBlock(1, 8), PerTensor()], ids=["channel", "block", "tensor"])
def test_training_rounds_as_the_deployed_model_does(granularity, symmetric: bool, weights):
    grid = Grid(4, symmetric=symmetric, granularity=granularity)
    x = (torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) + 0.4).requires_grad_()
    w = torch.randn(6, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    empty = torch.empty(0), torch.empty(0, dtype=torch.int32)
    left = Site("a.input", "a", "input", grid, *empty, "test")
    right = Site("a.weight", "a", "weight", Grid(4, granularity=weights), *empty, "test")
    config = QuantizeConfig()
    ranges = flatquant._Ranges(left, [right], config)
    ranges.find(x.detach(), [w.detach()])
    rows, (weight,) = ranges.rows(x, torch.arange(40)), ranges.weights([w])
    for mine, wanted in (
        (rows, quantized_rows(x.detach(), left, config)),
        (weight, quantized_weight(w.detach(), right, config)),
    ):
        # The scale is made again as a ratio times a magnitude: its last bit may differ, and so may a few codes.
        assert ((mine - wanted).abs() > 1e-5).float().mean() < 2e-3
    (rows @ weight.T).square().mean().backward()
    assert bool(x.grad.any())
    assert bool(w.grad.any())


def test_what_is_left_out_is_told_and_nothing_is_refused():
    told = flat(vit(layers=1), images(), iterations=1).plan.info["flatquant"]
    assert told["left_out"] == {"embeddings.patch_embeddings.projection": "a convolution reads it"}
    model, batch = readers(257)
    told = flat(model, batch, iterations=1).plan.info["flatquant"]
    assert told["left_out"] == {"a, b": "K = 257 splits into 1 x 257 only, which costs too much"}
    assert list(told["transformed"]) == ["c"]
    model, batch = readers(32)
    with pytest.raises(ModelError, match=r"flatquant can change none of the model's layers\. .*mxfp4 is no integer"):
        flat(model, batch, "mxfp4", config=QuantizeConfig(skip=("c",)))


def test_wrong_options_are_errors():
    with pytest.raises(RecipeError, match=r"unknown option 'iteration'.*did you mean 'iterations'\?"):
        parse_steps([{"flatquant": {"iteration": 3}}])
    with pytest.raises(RecipeError, match=r"quantize\.passes\.flatquant\.init"):
        parse_steps([{"flatquant": {"init": "random"}}])
