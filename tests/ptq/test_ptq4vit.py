"""PTQ4ViT: the metric against autograd, the search against a loop over candidates, twin grids, refusals, export."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from planted import bert, vit

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, RecipeError, UnsupportedError
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.plan import Plan
from s2d_deploy.ptq.passes import Context, Quantized, parse_steps, run_passes
from s2d_deploy.ptq.ptq4vit import Options, observe
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter
from s2d_deploy.simulation import simulate

HIDDEN = "last_hidden_state"
QUICK = {"candidates": 6, "rounds": 1, "rows": 48, "samples": 4}


def images(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))}


def sentences() -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (torch.arange(12) < torch.tensor([[12], [7], [9], [12]])).long()}


def passed(model: nn.Module, batch, options=QUICK, precision: str = "w4a4", **config) -> Quantized:  # type: ignore[no-untyped-def]
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    steps = parse_steps(["ranges"] if options is None else [{"ptq4vit": options}])
    return run_passes(model, ops, precision, steps, Context(lambda: [batch], HIDDEN, QuantizeConfig(**config)))


def hidden(model: nn.Module, batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(**batch)[HIDDEN]


def small(model: nn.Module, batch, keep) -> Quantized:  # type: ignore[no-untyped-def]
    """Only ops whose name ends in one of `keep`."""
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    return run_passes(
        model,
        {n: op for n, op in ops.items() if n.endswith(keep)},
        "w4a4",
        parse_steps([{"ptq4vit": QUICK}]),
        Context(lambda: [batch], HIDDEN),
    )


def test_products_are_seen_whole_and_importance_is_the_squared_gradient() -> None:
    model, batch = vit(layers=1), images()
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, HIDDEN)
    seen = observe(model, list(ops.values()), Context(lambda: [batch], HIDDEN), Options(rows=10_000))
    assert set(seen) == set(ops)
    for name, op in ops.items():
        product = seen[name]
        output = product.multiply(product.left, product.right)
        assert output.shape == product.importance.shape
        assert float(product.importance.mean()) == pytest.approx(1.0, rel=1e-4)
        if op.kind == "linear":
            layer = model.get_submodule(name)
            assert torch.equal(product.right, layer.weight)
            assert product.left.shape[1] == layer.in_features
        assert product.error(product.left, product.right).abs().max() == 0
    # The last layer's Linear by hand: y = norm(h + fc2(x)); the same signs, the gradient by finite differences.
    assert all(p.grad is None for p in model.parameters())
    name = [n for n, op in ops.items() if op.kind == "linear"][-1]
    signs = torch.randint(0, 2, hidden(model, batch).shape, generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    layer, step = model.get_submodule(name).double(), 1e-5
    model.double()
    bent = {n: t.double() for n, t in batch.items()}
    shift = torch.zeros(4, 17, layer.out_features, dtype=torch.float64)
    layer.register_forward_hook(lambda _m, _a, out: out + shift)
    gradient = torch.zeros(6, dtype=torch.float64)
    for j in range(6):
        ends = []
        for sign in (1, -1):
            shift[1, 2, j] = sign * step
            ends.append(float((hidden(model, bent) * signs).sum()))
        shift[1, 2, j] = 0
        gradient[j] = (ends[0] - ends[1]) / (2 * step)
    row = seen[name].importance.reshape(4, 17, -1)[1, 2, :6].double()
    ratio = row / gradient.square()
    assert torch.allclose(ratio, ratio.mean().expand(6), rtol=1e-3)


def test_softmax_importance_is_the_fisher_information_in_expectation() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fc = nn.Linear(4, 3)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return {"y": self.fc(x)}

    model = Head().eval()
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(1)).expand(4000, 4)
    ops = discover(model, {"x": x[:1]}, "y")
    options = Options(loss="softmax", samples=4000, rows=4000)
    seen = observe(model, list(ops.values()), Context(lambda: [{"x": x}], "y"), options)["fc"]
    p = torch.softmax(model(x[:1])["y"][0].detach(), dim=-1)
    exact = p * (1 - p)
    found = seen.importance.mean(0)
    assert torch.allclose(found / found.sum(), exact / exact.sum(), atol=0.03)


def test_the_search_against_a_loop_over_candidates() -> None:
    model, batch = vit(layers=1), images()
    plain = passed(model, batch, None)
    op = next(op for op in plain.plan.ops.values() if op.kind == "linear")
    context = Context(lambda: [batch], HIDDEN)
    product = observe(model, [op], context, Options(**QUICK))[op.name]
    weight, inputs = plain.plan.sites[f"{op.name}.weight"], plain.plan.sites[f"{op.name}.input"]

    def fake(x: torch.Tensor, site, scale: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return dequantize(quantize(x, scale, site.zero_point, site.grid), scale, site.zero_point, site.grid)

    wanted = product.left.double() @ product.right.double().T
    x = fake(product.left, inputs, inputs.scale)
    best = weight.scale.clone()
    for n in range(best.numel()):

        def error(scale: torch.Tensor, n: int = n) -> float:
            row = fake(product.right, weight, torch.where(torch.arange(best.numel()) == n, scale, weight.scale))[n]
            wrong = x.double() @ row.double() - wanted[:, n]
            return float((wrong.square() * product.importance[:, n].double()).sum())

        peak = product.right[n].abs().max()
        tried = [weight.scale[n], *(peak / 7 * 1.2 * (j / 6) for j in range(1, 7))]
        best[n] = min(tried, key=error)
    found = small(model, batch, (op.name,)).plan.sites[f"{op.name}.weight"]
    assert torch.allclose(found.scale, best, rtol=1e-6)
    assert found.source == "ptq4vit"


@pytest.mark.parametrize("make", [vit, bert])
@pytest.mark.parametrize("metric", ["hessian", "output"])
def test_the_metric_never_gets_worse_and_the_float_model_stays(make, metric: str) -> None:  # type: ignore[no-untyped-def]
    model, batch = make(layers=1), images() if make is vit else sentences()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    quantized = passed(model, batch, {**QUICK, "metric": metric}, activations="absmax", weights="absmax")
    info = quantized.plan.info["ptq4vit"]
    assert {name for title in info["error_ratio"] for name in title.split(", ")} == set(quantized.plan.ops)
    assert all(0 < ratio <= 1 for ratio in info["error_ratio"].values())
    assert min(info["error_ratio"].values()) < 0.9
    assert info["twin"] == []
    assert info["left_out"] == {}
    assert all(torch.equal(t, before[n]) for n, t in quantized.model.state_dict().items())
    assert all(s.grid.integer for s in quantized.plan.sites.values())
    assert all(p.grad is None and p.requires_grad for p in quantized.model.parameters())
    again = passed(model, batch, {**QUICK, "metric": metric}, activations="absmax", weights="absmax")
    assert again.plan.digest() == quantized.plan.digest()


def test_it_helps_against_absmax_on_the_output() -> None:
    model, batch = vit(), images()
    wanted = hidden(model, batch)

    def error(q: Quantized) -> float:
        return float((hidden(simulate(q.model, q.plan).eval(), batch) - wanted).square().mean())

    ranges = {"activations": "absmax", "weights": "absmax"}
    assert error(passed(model, batch, QUICK, **ranges)) < error(passed(model, batch, None, **ranges))


def test_twin_grids_are_simulated_declared_and_not_exported(tmp_path: Path) -> None:
    model, batch = vit(layers=1), images()
    quantized = passed(model, batch, {**QUICK, "twin": True})
    twins = {s.name: s for s in quantized.plan.sites.values() if s.grid.format == "twin"}
    assert set(twins) == set(quantized.plan.info["ptq4vit"]["twin"])
    probs, gelu = sorted(twins.values(), key=lambda s: s.grid.signed)
    assert (probs.role, gelu.role) == ("probs", "input")
    # Section 3.2: the coarse range of softmax ends just below 1; the fine range of GELU covers its minimum.
    assert float(probs.scale) * 2**probs.grid.shift == 1 / 8
    seen = []
    handle = quantized.model.get_submodule(gelu.op).register_forward_pre_hook(lambda _m, a: seen.append(a[0]))
    hidden(quantized.model, batch)
    handle.remove()
    assert float(gelu.scale) * 8 == pytest.approx(-float(seen[0].min()), rel=1e-5)
    assert quantized.plan.declared(probs.op) == "W4A4 (twin4)"
    quantized.plan.save(tmp_path)
    assert Plan.load(tmp_path).digest() == quantized.plan.digest()
    assert torch.isfinite(hidden(simulate(quantized.model, quantized.plan).eval(), batch)).all()
    with pytest.raises(UnsupportedError, match=r"Found: twin4: .*ptq4vit: `twin: false`"):
        load_exporter()(quantized.model, quantized.plan, batch, [HIDDEN], tmp_path / "m.onnx")


def test_what_it_cannot_search() -> None:
    model, batch = vit(layers=1), images()
    with pytest.raises(ModelError, match=r"ptq4vit finds no scale to search\..*nvfp4 codes.*or the pass `ranges`"):
        passed(model, batch, QUICK, "nvfp4")
    with pytest.raises(RecipeError, match=r"ranges and ptq4vit both set ranges"):
        parse_steps(["ranges", "ptq4vit"])
    dynamic = passed(model, batch, QUICK, activation_granularity="token")
    linears = [op.name for op in dynamic.plan.ops.values() if op.kind == "linear"]
    assert all(dynamic.plan.sites[f"{n}.input"].source == "per-token" for n in linears)
    assert any(dynamic.plan.sites[f"{n}.weight"].source == "ptq4vit" for n in linears)


def test_the_exported_file_computes_the_simulation(tmp_path: Path) -> None:
    import onnxruntime as ort

    model, batch = vit(layers=1), images()
    quantized = passed(model, batch, QUICK, "w8a8")
    path = tmp_path / "model.onnx"
    load_exporter()(quantized.model, quantized.plan, batch, [HIDDEN], path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(None, {n: t.numpy() for n, t in batch.items()})[0]
    expected = hidden(simulate(quantized.model, quantized.plan).eval(), batch).numpy()
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()
    assert math.isfinite(float(np.abs(found).max()))


def test_layers_of_one_tensor_share_the_scale_that_is_best_for_all(tmp_path: Path) -> None:
    """q, k and v had three input scales, and the exported graph three quantizers of one tensor."""
    model, batch = vit(layers=1), images()
    with torch.no_grad():  # one of the three weighs more, and wants another range
        model.layers[0].attention.v_proj.weight[:, 3] *= 6.0
    names = [f"layers.0.attention.{p}_proj" for p in "qkv"]
    options = {**QUICK, "rounds": 1, "rows": 10_000}
    done = passed(model, batch, options, weights="absmax", activations="absmax")
    sites = [done.plan.sites[f"{name}.input"] for name in names]
    assert [s.name for s in sites] == [f"{name}.input" for name in names]
    assert [s.op for s in sites] == names
    assert len({float(s.scale) for s in sites}) == 1
    assert ", ".join(names) in done.plan.info["ptq4vit"]["error_ratio"]
    proto = load_exporter()(done.model, done.plan, batch, [HIDDEN], tmp_path / "model.onnx", dynamic={})
    told = [p.value for n in proto.graph.node for p in n.metadata_props if p.key == "s2d.site"]
    assert told.count(",".join(s.name for s in sites)) == 2  # one QuantizeLinear and its DequantizeLinear

    # By hand: the candidate with the least sum of squared errors times squared gradients, with the weights found.
    plain = passed(model, batch, None, weights="absmax", activations="absmax").plan
    ops = [plain.ops[name] for name in names]
    seen = observe(model, ops, Context(lambda: [batch], HIDDEN), Options(**options))
    site = plain.sites[f"{names[0]}.input"]
    peak = max(float(seen[name].left.abs().max()) for name in names)
    tried = [float(site.scale), *(peak / 7 * 1.2 * (j / 6) for j in range(1, 7))]

    def metric(scale: float) -> float:
        found = 0.0
        for name in names:
            p, w = seen[name], done.plan.sites[f"{name}.weight"]
            s = torch.tensor(scale)
            x = dequantize(quantize(p.left, s, site.zero_point, site.grid), s, site.zero_point, site.grid).double()
            right = dequantize(quantize(p.right, w.scale, w.zero_point, w.grid), w.scale, w.zero_point, w.grid)
            wrong = x @ right.double().T - p.left.double() @ p.right.double().T
            found += float((wrong.square() * p.importance.double()).sum()) * p.unit
        return found

    best = min(tried, key=metric)
    assert float(sites[0].scale) == pytest.approx(best, rel=1e-6)
    assert metric(best) < metric(float(site.scale))


def test_a_layer_at_another_precision_keeps_a_scale_of_its_own() -> None:
    model, batch = vit(layers=1), images()
    done = passed(model, batch, overrides={"*.v_proj": "w8a8"})
    q, k, v = (done.plan.sites[f"layers.0.attention.{p}_proj.input"] for p in "qkv")
    assert float(q.scale) == float(k.scale)
    assert (q.grid.bits, v.grid.bits) == (4, 8)
    assert float(v.scale) < float(q.scale)
