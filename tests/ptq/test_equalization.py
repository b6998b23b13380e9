"""Cross-layer equalization against equation 11 written out; queries and keys; what a scale cannot pass."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from planted import bert, vit

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, RecipeError
from s2d_deploy.ptq.equalization import column_ranges, equalizing_scale, output_peaks, row_ranges
from s2d_deploy.ptq.folding import absorb, multiply
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.registry import load_exporter
from s2d_deploy.simulation import simulate

HIDDEN = "last_hidden_state"


class Convolutions(nn.Module):
    """Plain, depthwise, plain; one ReLU and one LeakyReLU, as MobileNets have them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, groups=6)
        self.c, self.d = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
        self.relu, self.leaky, self.last = nn.ReLU(), nn.LeakyReLU(0.1), nn.ReLU()
        with torch.no_grad():
            self.a.weight.mul_(torch.logspace(-2, 1, 6).reshape(-1, 1, 1, 1))
            self.c.weight.mul_(torch.logspace(-1, 1, 4).reshape(-1, 1, 1, 1))

    def forward(self, x):
        return {HIDDEN: self.d(self.last(self.c(self.leaky(self.b(self.relu(self.a(x)))))))}


def images():
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def sentences():
    ids = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(16) < torch.tensor([[16], [9], [12], [5]])).long()}


def equalized(model: nn.Module, batch, **options):
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    return run_passes(model, ops, "w4a4", parse_steps([{"equalization": options}]), Context(lambda: [batch], HIDDEN))


def hidden(model: nn.Module, batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch)[HIDDEN]


def test_one_scale_is_equation_11():
    r1, r2 = torch.tensor([4.0, 1.0, 0.0, 9.0]), torch.tensor([1.0, 16.0, 2.0, 0.0])
    found = equalizing_scale(r1, r2)
    for i in range(4):
        a, b = float(r1[i]), float(r2[i])
        assert float(found[i]) == pytest.approx((a * b) ** 0.5 / b if a and b else 1.0)
    usable = found[:2]
    assert torch.allclose(r1[:2].double() / usable, r2[:2].double() * usable)  # both ranges are sqrt(r1 r2)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_channels_of_a_grouped_convolution(groups: int):
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 12, 3, groups=groups), torch.randn(2, 6, 5, 5)
    factor, wanted = torch.rand(6) + 0.5, conv(x).detach()
    naive = torch.zeros(6)
    for o in range(12):
        for i in range(6 // groups):
            channel = o // (12 // groups) * (6 // groups) + i
            naive[channel] = max(float(naive[channel]), float(conv.weight[o, i].detach().abs().max()))
    assert torch.allclose(column_ranges(conv), naive)
    absorb(conv, factor)
    assert torch.allclose(conv(x * factor.reshape(1, -1, 1, 1)), wanted, atol=1e-5)
    multiply(conv, torch.full((12,), 2.0))
    assert torch.allclose(conv(x * factor.reshape(1, -1, 1, 1)), 2 * wanted, atol=1e-5)


def test_a_chain_of_convolutions_converges_to_equal_ranges():
    model, batch = Convolutions().eval(), {"x": images()["pixel_values"]}
    done = equalized(model, batch, iterations=100)
    before, after = hidden(model, batch), hidden(done.model, batch)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    for first, second in (("a", "b"), ("b", "c"), ("c", "d")):
        rows = row_ranges(done.model.get_submodule(first))
        assert torch.allclose(rows, column_ranges(done.model.get_submodule(second)), rtol=5e-3)
    told = done.plan.info["equalization"]
    assert told["pairs"] == {"b": "a", "c": "b", "d": "c"}
    assert told["left_out"] == {"a": "the model's own input"}
    assert 1 < told["rounds"] < 100


def test_two_layers_against_loops():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.relu, self.b = nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)

        def forward(self, x):
            return {HIDDEN: self.b(self.relu(self.a(x)))}

    model = Net().eval()
    done = equalized(model, {"x": torch.randn(6, 5)}, iterations=1).model
    for i in range(4):
        r1 = max(abs(float(w)) for w in model.a.weight[i].detach())
        r2 = max(abs(float(w)) for w in model.b.weight[:, i].detach())
        s = (r1 * r2) ** 0.5 / r2
        assert torch.allclose(done.a.weight[i], model.a.weight[i] / s, rtol=1e-6)
        assert float(done.a.bias[i].detach()) == pytest.approx(float(model.a.bias[i].detach()) / s, rel=1e-6)
        assert torch.allclose(done.b.weight[:, i], model.b.weight[:, i] * s, rtol=1e-6)


@pytest.mark.parametrize(("make", "batch"), [(vit, images()), (bert, sentences())], ids=["pre-LN", "post-LN"])
def test_transformers_keep_their_function(make, batch, tmp_path: Path):
    ort = pytest.importorskip("onnxruntime")
    model = make()
    done, again = equalized(model, batch), equalized(model, batch)
    before = hidden(model, batch)
    assert (hidden(done.model, batch) - before).abs().max() < 1e-5 * before.abs().max()
    assert done.plan.digest() == again.plan.digest()
    told = done.plan.info["equalization"]
    assert len(told["pairs"]) == len(told["queries"]) == 2  # value -> output projection, and q with k, in two layers
    gelu = [reason for name, reason in told["left_out"].items() if name.endswith(("fc2", "output.dense"))]
    assert gelu
    assert set(gelu) == {"GELUActivation does not commute with a scale"}
    load_exporter()(done.model, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    found = session.run(None, {n: t.numpy() for n, t in batch.items()})[0]
    assert np.abs(found - hidden(simulate(done.model, done.plan).eval(), batch).numpy()).max() < 1e-4


def test_queries_and_keys_get_equal_ranges():
    model, batch = bert(), sentences()
    stem = "encoder.layer.0.attention.self"
    with torch.no_grad():
        model.get_submodule(f"{stem}.key").bias[5] = 50.0  # keys have such channels, queries do not
    names = [f"{stem}.query", f"{stem}.key"]
    before = output_peaks(model, [batch], names)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        raw = model.get_submodule(names[1])(model.embeddings(batch["input_ids"]))[real]
    assert torch.allclose(before[names[1]], raw.abs().amax(0))  # padding left out
    done = equalized(model, batch)
    after = output_peaks(done.model, [batch], names)
    assert torch.allclose(after[names[0]], after[names[1]], rtol=1e-4)
    assert torch.allclose(after[names[0]], (before[names[0]] * before[names[1]]).sqrt(), rtol=1e-4)
    assert done.plan.sites[f"{stem}.key"].scale < 50 / 7
    left = equalized(model, batch, queries=False)
    assert left.plan.info["equalization"]["queries"] == []
    assert torch.equal(left.model.get_submodule(names[1]).weight, model.get_submodule(names[1]).weight)


def test_a_model_that_only_has_a_gelu_is_refused_by_name():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gelu, self.b = nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)

        def forward(self, x):
            return {HIDDEN: self.b(self.gelu(self.a(x)))}

    with pytest.raises(ModelError, match=r"none of the model's layers\..*b: GELU does not commute with a scale\. Fix:"):
        equalized(Net().eval(), {"x": torch.randn(3, 4)})


def test_wrong_options_are_errors():
    with pytest.raises(RecipeError, match=r"quantize\.passes\.equalization\.iterations"):
        parse_steps([{"equalization": {"iterations": 0}}])
