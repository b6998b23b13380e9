"""The common ONNX file: names, forms and numbers, over small models of every family and grids of every kind."""

from __future__ import annotations

from collections import Counter
from functools import cache
from importlib import import_module

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError
from s2d_deploy.grid import Grid, PerAxis
from s2d_deploy.plan import Plan, Site
from s2d_deploy.qgraph import contractions, load_model, metadata
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.registry import load_runtime, load_target
from s2d_deploy.simulation import recorded_codes, simulate, weight_codes

export_onnx = import_module("s2d_deploy.export.to_onnx").export_onnx

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IMAGE = {"image_size": 8, "patch_size": 2}
# 30 contractions of K <= 72 after each other, see the contract suite: 30 * 72 * 2**-23.
TOLERANCE = 3e-4


class Mixed(nn.Module):
    """What transformers do not have: grouped, padded and dilated convolutions, 2-D Linears, none or tied parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2)
        self.dilated = nn.Conv2d(8, 8, 3, padding=(2, 1), dilation=(2, 1), bias=False)
        self.first = nn.Linear(8, 32, bias=False)
        self.left = nn.Linear(32, 32)
        self.right = nn.Linear(32, 32, bias=False)
        self.later = nn.Linear(32, 32)
        self.right.weight = self.later.weight = self.left.weight
        self.last = nn.Linear(32, 6)

    def forward(self, x):
        y = self.first(self.dilated(torch.relu(self.grouped(x))).mean((2, 3)))
        return self.last(torch.tanh(self.later(torch.tanh(self.left(y) + self.right(y)))))


def _mixed():
    model = Mixed()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, {"x": torch.randn(3, 4, 9, 8)}, ["y"], {}


def _vit():
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(**SMALL, **IMAGE, num_channels=1, num_labels=10)
    return ViTForImageClassification(config), {"pixel_values": torch.randn(3, 1, 8, 8)}, ["logits"], {}


def _siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(SiglipVisionConfig(**SMALL, **IMAGE))
    return model, {"pixel_values": torch.randn(3, 3, 8, 8)}, ["last_hidden_state", "pooler_output"], {}


def _clip():
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(**SMALL, **IMAGE))
    return model, {"pixel_values": torch.randn(3, 3, 8, 8)}, ["last_hidden_state", "pooler_output"], {}


def _bert():
    from transformers import BertConfig, BertModel

    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    sample = {
        "input_ids": torch.randint(0, 50, (3, 7)),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, (3, 7)),
    }
    model = BertModel(BertConfig(**SMALL, vocab_size=50, max_position_embeddings=32))
    return model, sample, ["last_hidden_state", "pooler_output"], {n: {1: "sequence"} for n in sample}


MODELS = {"mixed": _mixed, "vit": _vit, "siglip": _siglip, "clip": _clip, "bert": _bert}
CONFIGS = {
    "": {},
    "affine": {"activation_symmetric": False},
    "token": {"activation_granularity": "token"},
}
CASES = [
    ("vit", "w4a4", ""),
    ("bert", "w8a8", ""),
    ("siglip", "w8a8", ""),
    ("clip", "w4a8", ""),
    ("mixed", "fp32", ""),
    ("mixed", "w8a8", "affine"),
    ("mixed", "w8a8", "token"),
    ("mixed", "w4a16", ""),
    ("mixed", "w4a4", "affine"),
    ("mixed", "w3a5", ""),
    ("mixed", "w5a3", "token"),
    ("mixed", "w2a6", "affine"),
    ("mixed", "w6a7", ""),
]
every_case = pytest.mark.parametrize("case", CASES, ids=["-".join(filter(None, c)) for c in CASES])


class Exported:
    def __init__(self, case, folder):
        name, precision, config = case
        torch.manual_seed(1)
        self.model, self.sample, self.outputs, dynamic = MODELS[name]()
        self.model.eval()
        self.ops = discover(self.model, self.sample)
        statistics = calibrate(self.model, self.ops, [self.sample])
        chosen = QuantizeConfig(weights="absmax", activations="absmax", block_size=8, **CONFIGS[config])
        self.plan = build_plan(self.model, self.ops, statistics, precision, chosen)
        self.path = folder / "model.onnx"
        before = {n: p.detach().clone() for n, p in self.model.state_dict().items()}
        export_onnx(self.model, self.plan, self.sample, self.outputs, self.path, dynamic=dynamic)
        self.unchanged = all(torch.equal(p, before[n]) for n, p in self.model.state_dict().items())
        self.proto = load_model(self.path)
        self.simulated = simulate(self.model, self.plan)
        with recorded_codes(self.simulated) as codes:
            result = self.simulated(**self.sample)
        self.codes = {n: c.numpy() for n, c in codes.items()}
        self.expected = [result] if isinstance(result, torch.Tensor) else [result[n] for n in self.outputs]
        self.expected = [e.numpy() for e in self.expected]
        self.feeds = {n: t.numpy() for n, t in self.sample.items()}

    @property
    def activations(self):
        return {n for n, s in self.plan.sites.items() if s.role != "weight"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return cache(lambda case: Exported(case, tmp_path_factory.mktemp("-".join(filter(None, case)))))


@every_case
def test_onnx_accepts_it(exported, case):
    x = exported(case)
    assert x.unchanged
    onnx.checker.check_model(x.path, full_check=True)
    onnx.shape_inference.infer_shapes(x.proto, check_type=True, strict_mode=True, data_prop=True)
    assert [(o.domain, o.version) for o in x.proto.opset_import] == [("", 21)]
    assert metadata(x.proto)["s2d.precision"] == case[1]
    assert metadata(x.proto)["s2d.plan_sha256"] == x.plan.digest()
    assert all(i.type.tensor_type.shape.dim[0].dim_param == "batch" for i in x.proto.graph.input)
    names = [n.name for n in x.proto.graph.node]
    assert len(set(names)) == len(names)
    assert "" not in names


@every_case
def test_every_op_is_found_by_its_name(exported, case):
    x = exported(case)
    found = {c.name: c for c in contractions(x.proto)}
    assert len(found) == len(contractions(x.proto))
    assert set(x.ops) <= set(found)
    for name, c in found.items():
        assert c.macs > 0, name
        if name in x.ops:
            assert (c.macs, c.declared) == (x.ops[name].macs, x.plan.declared(name))
            for operand, (site, _) in zip((c.left, c.right), x.ops[name].sites, strict=True):
                if operand is not None:
                    assert site in x.plan.sites
                    assert operand.storage == x.plan.sites[site].grid.storage
        else:  # torch's own attention in SigLIP's pooling head calls no Linear
            assert c.declared == "float"
            assert case[0] == "siglip"
            assert name.startswith("head.attention.MatMul.")


@every_case
def test_every_site_is_found_by_its_name(exported, case):
    x = exported(case)
    named = Counter(s for n in x.proto.graph.node for s in _sites(n, "QuantizeLinear"))
    assert set(named) == x.activations
    assert set(named.values()) <= {1}
    stored = [s for n in x.proto.graph.node for s in _sites(n, "DequantizeLinear")]
    assert sorted(stored) == sorted(x.plan.sites)
    for n in x.proto.graph.node:
        assert {k.split(".")[0] for k in metadata(n)} <= {"s2d"}, "the exporter's own metadata carries paths"


def _sites(node, op_type):
    return metadata(node)["s2d.site"].split(",") if node.op_type == op_type else []


@every_case
def test_weights_are_stored_as_codes(exported, case):
    x = exported(case)
    expected = weight_codes(x.simulated)
    right = {c.name: c.right for c in contractions(x.proto)}
    assert set(expected) == {n for n, s in x.plan.sites.items() if s.role == "weight"}
    for site, codes in expected.items():
        operand = right[x.plan.sites[site].op]
        codes = codes.numpy().T if codes.dim() == 2 else codes.numpy()
        np.testing.assert_array_equal(operand.stored, codes, err_msg=site)
    # Each layer's float weight is gone, in either layout.
    floats = [onnx.numpy_helper.to_array(t) for t in x.proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    for site in expected:
        weight = x.model.get_submodule(x.plan.sites[site].op).weight.detach().numpy()
        assert not any(np.array_equal(f, weight) or np.array_equal(f, weight.T) for f in floats), site


@every_case
def test_the_graph_computes_the_simulation(exported, case, tmp_path):
    ort = pytest.importorskip("onnxruntime")
    x = exported(case)
    artifact = load_target("reference").build(x.path, tmp_path, precision=case[1], options={}, progress=lambda _: None)
    with load_runtime("reference").open(artifact, threads=1) as session:
        reference, codes = session.run(x.feeds), session.codes(x.feeds)
    assert set(codes) == x.activations
    flipped = {s: int(np.sum(codes[s] != x.codes[s])) for s in codes}
    assert sum(flipped.values()) <= 0.01 * sum(c.size for c in codes.values())
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # As written: ONNX Runtime's optimizer approximates some of these patterns, which is its target's business.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(x.path, options, providers=["CPUExecutionProvider"])
    for name, expected, other in zip(x.outputs, x.expected, plain.run(x.outputs, x.feeds), strict=True):
        limit = TOLERANCE * max(1.0, float(np.abs(expected).max()))
        if any(flipped.values()):
            limit = 0.25 * float(np.abs(expected).max())  # whole steps; which codes may flip is bounded above
        np.testing.assert_allclose(reference[name], expected, rtol=0, atol=limit)
        np.testing.assert_allclose(other, expected, rtol=0, atol=limit)


def test_equal_quantizers_of_one_tensor_are_one(exported):
    x = exported(("vit", "w4a4", ""))
    attention = "vit.layers.0.attention"
    shared = ",".join(f"{attention}.{p}_proj.input" for p in "qkv")
    assert shared in [metadata(n).get("s2d.site") for n in x.proto.graph.node if n.op_type == "QuantizeLinear"]
    operands = {c.name: c for c in contractions(x.proto)}
    assert len({operands[f"{attention}.{p}_proj"].left.codes for p in "qkv"}) == 1
    tied = exported(("mixed", "w8a8", "affine"))
    assert "left.input,right.input" in [metadata(n).get("s2d.site") for n in tied.proto.graph.node]


def test_the_forms_of_the_contract(exported):
    x = exported(("vit", "w4a4", ""))
    for c in contractions(x.proto):
        assert c.integer, c.name
        assert c.left.scale.shape == c.left.zero_point.shape == ()
        if c.right.stored is None:
            assert c.right.scale.shape == ()
        else:
            assert c.right.axis == (0 if c.node.op_type == "Conv" else 1)
            assert c.right.scale.shape == c.right.zero_point.shape == (x.ops[c.name].n,)
    probs = next(c for c in contractions(x.proto) if c.name.endswith(".context")).left
    assert probs.storage == "UINT4"
    blocked = exported(("mixed", "w4a16", ""))
    right = {c.name: c.right for c in contractions(blocked.proto)}
    assert right["grouped"] is None  # weight-only leaves convolutions in float
    assert (right["last"].block, right["last"].axis, right["last"].scale.shape) == (8, 0, (4, 6))


@pytest.mark.parametrize(("case", "clips"), [(CASES[0], False), (("mixed", "w3a5", ""), True)])
def test_only_odd_widths_are_clipped(exported, case, clips):
    x = exported(case)
    producers = {o: n for n in x.proto.graph.node for o in n.output}
    clipped = [
        producers[n.input[0]].op_type == "Clip"
        for n in x.proto.graph.node
        if n.op_type == "QuantizeLinear" and n.input[0] in producers
    ]
    assert clipped
    assert set(clipped) == {clips}


def test_exporting_twice_gives_the_same_bytes(exported, tmp_path):
    x = exported(("mixed", "w4a4", "affine"))
    again = tmp_path / "again.onnx"
    export_onnx(x.model, x.plan, x.sample, x.outputs, again)
    assert again.read_bytes() == x.path.read_bytes()


def test_an_op_that_no_output_needs_is_left_out(exported, tmp_path):
    x = exported(("bert", "w8a8", ""))
    proto = export_onnx(x.model, x.plan, x.sample, ["last_hidden_state"], tmp_path / "m.onnx")
    assert set(x.ops) - {c.name for c in contractions(proto)} == {"pooler.dense"}


class _FixesTheBatch(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.layer(row) for row in x.split(1)])


class _LooksAtValues(_FixesTheBatch):
    def forward(self, x):
        return self.layer(x) if float(x.sum()) > 0 else x


def test_a_model_with_control_flow_on_data_is_refused(tmp_path):
    model = _LooksAtValues().eval()
    with pytest.raises(ModelError, match=r"torch cannot export this model to ONNX\. Found: .*Fix: make the forward"):
        export_onnx(model, Plan("fp32"), {"x": torch.ones(2, 4)}, ["y"], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_fixes_its_batch_is_refused(tmp_path):
    model = _FixesTheBatch().eval()
    with pytest.raises(ModelError, match=r"fixes the batch size of x|torch cannot export this model"):
        export_onnx(model, Plan("fp32"), {"x": torch.ones(2, 4)}, ["y"], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("grid", "clips"),
    [
        (Grid(6, granularity=PerAxis(-1)), True),
        (Grid(8, narrow=True, granularity=PerAxis(-1)), True),
        (Grid(8, granularity=PerAxis(-1)), False),
        (Grid(5, False, False, granularity=PerAxis(2)), True),
    ],
)
def test_channels_of_activations_on_an_odd_width_stay_on_their_grid(grid: Grid, clips: bool, tmp_path):
    """A 6-bit code with a scale for each channel lies in INT8, which holds 40 as well: the bounds were dropped."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    batch = {"input": torch.randn(2, 5, 4) * 50}
    op = discover(model, batch, "y")["0"]
    plan = Plan("w8a8", {"0": op})
    zero = torch.arange(4, dtype=torch.int32) * (0 if grid.symmetric else 7)
    plan.add(Site("0.input", "0", "input", grid, torch.tensor([0.1, 1.0, 3.0, 0.5]), zero, "test"))
    proto = export_onnx(model, plan, batch, ["y"], tmp_path / "model.onnx")
    assert {"Min", "Max"}.issubset(n.op_type for n in proto.graph.node) == clips
    quantizer = next(n for n in proto.graph.node if n.op_type == "QuantizeLinear")
    codes = onnx.reference.ReferenceEvaluator(proto).run([quantizer.output[0]], {"input": batch["input"].numpy()})[0]
    simulated = simulate(model, plan).eval()
    with recorded_codes(simulated) as wanted:
        simulated(**batch)
    assert np.array_equal(codes.astype(np.int32), wanted["0.input"].numpy())
    assert len(np.unique(codes)) > 8
