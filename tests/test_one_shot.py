"""One-shot conditioning: exactness in float64, optimality of the closed forms, honest results, errors."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, RecipeError
from s2d_deploy.one_shot import (
    VARIANTS,
    EqualizedLinear,
    centre_norms,
    equalize,
    one_shot,
    refit,
    scale_neurons,
    shrink_triplets,
)

sys.path.insert(0, str(Path(__file__).parent))
import planted

OUT = "last_hidden_state"


def run(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    # Our visible attention takes its softmax in FP32; torch's own stays in the model's type.
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    with torch.no_grad():
        return model(**batch).last_hidden_state


def spoiled_vit() -> nn.Module:
    """Pre-LN, with gains and biases of single channels, and values of single channels, far out."""
    model = planted.vit().double()
    with torch.no_grad():
        for i in range(2):
            model.get_submodule(f"layers.{i}.layernorm_before").weight[3] = 25.0
            model.get_submodule(f"layers.{i}.layernorm_after").bias[9] = 12.0
            model.get_submodule(f"layers.{i}.attention.v_proj").weight[4] *= 30
    return model


def spoiled_bert() -> nn.Module:
    model = planted.bert()
    with torch.no_grad():
        for i in range(2):
            model.get_submodule(f"encoder.layer.{i}.attention.output.LayerNorm").weight[3] = 25.0
            model.get_submodule(f"encoder.layer.{i}.intermediate.dense").weight[7] *= 20
    return model


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), bias=st.booleans(), direct=st.integers(0, 3), copied=st.booleans())
def test_an_equalized_linear_is_the_linear_in_float64(seed: int, bias: bool, direct: int, copied: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(12, 5, bias=bias).double()
    shift = torch.randn(12, generator=generator, dtype=torch.float64)
    scale = torch.rand(12, generator=generator, dtype=torch.float64) * 9 + 0.1
    copies = torch.randint(1, 4, (12,), generator=generator) if copied or direct else None
    if copies is not None:
        copies[:direct] = 0
    x = torch.randn(2, 3, 12, generator=generator, dtype=torch.float64) * 10
    equal = EqualizedLinear(linear, shift, scale, copies, range(direct))
    torch.testing.assert_close(equal(x), linear(x), rtol=1e-12, atol=1e-11)
    assert equal.linear.in_features == (12 if copies is None else int(copies.sum()))


def test_folding_into_a_pre_norm_model_is_exact_in_float64() -> None:
    model, batches = spoiled_vit(), planted.images(dtype=torch.float64)
    before = run(model, batches[0])
    names = [name for name, _ in model.named_modules()]
    changes = equalize(model, batches, output=OUT)
    assert [name for name, _ in model.named_modules()] == names  # weights only
    assert {c.what for c in changes} == {"folded"}
    # Both norms and the attention's context of both layers.
    assert {c.where[-1].rpartition(".")[2] for c in changes} == {"v_proj", "o_proj", "fc1"}
    assert all(c.after < 0.5 * c.before for c in changes if c.where[-1].endswith("fc1"))
    torch.testing.assert_close(run(model, batches[0]), before, rtol=1e-11, atol=1e-11)
    assert float(model.get_submodule("layers.0.layernorm_before").weight.detach()[3]) < 10


@pytest.mark.parametrize("bypass", [False, True])
def test_inserting_into_a_post_norm_model_is_exact_in_float64(bypass: bool) -> None:
    model, batches = spoiled_bert().double(), [{"input_ids": b["input_ids"]} for b in planted.texts()]
    before = run(model, batches[0])
    changes = equalize(model, batches, insert=True, bypass=bypass, output=OUT)
    assert {"inserted", "folded"} >= {c.what for c in changes} >= {"inserted"}
    torch.testing.assert_close(run(model, batches[0]), before, rtol=1e-11, atol=1e-11)
    # Query, key and value read one tensor: they share one choice, so their quantized inputs stay equal.
    layers = [model.get_submodule(f"encoder.layer.1.attention.self.{n}") for n in ("query", "key", "value")]
    if all(isinstance(layer, EqualizedLinear) for layer in layers):
        torch.testing.assert_close(layers[0].inverse, layers[2].inverse)
    assert any(
        isinstance(m, EqualizedLinear) and bool(m.direct) == bypass for m in model.modules() if hasattr(m, "direct")
    )


def test_a_post_norm_model_offers_only_its_context_to_the_weights() -> None:
    model, batches = spoiled_bert(), planted.texts()
    before = run(model, batches[0])
    changes = equalize(model, batches, output=OUT)
    assert all(c.where == (f"encoder.layer.{i}.attention.output.dense",) for c in changes for i in [c.where[0][14]])
    torch.testing.assert_close(run(model, batches[0]), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_centring_is_exact_in_float64_and_takes_the_offsets(kind: str, tmp_path: Path) -> None:
    if kind == "bert":
        model, batches = spoiled_bert().double(), [{"input_ids": b["input_ids"]} for b in planted.texts()]
        norm, reader = "encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.intermediate.dense"
    else:
        model, batches = spoiled_vit(), planted.images(dtype=torch.float64)
        norm, reader = "layers.0.layernorm_after", "layers.0.mlp.fc1"
    with torch.no_grad():
        model.get_submodule(norm).bias[5] = 120.0
    before = [run(model, batch) for batch in batches]
    names = list(model.state_dict())
    changes = {c.where[0]: c for c in centre_norms(model, batches, output=OUT)}
    assert list(model.state_dict()) == names  # no module was added
    for batch, wanted in zip(batches, before, strict=True):
        torch.testing.assert_close(run(model, batch), wanted, rtol=1e-10, atol=1e-10)
    assert changes[norm].what == "centred"
    assert changes[norm].where == (norm, reader)
    assert changes[norm].before > 110
    assert changes[norm].after < 0.8 * changes[norm].before
    # Taken with our visible attention, whose softmax is in FP32.
    seen = torch.cat([planted.captured_input(model, reader, batch).detach().flatten(0, 1) for batch in batches])
    assert float(seen.median(dim=0).values.abs().max()) < 1e-6
    # transformers loads the result as it is.
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path).double()
    torch.testing.assert_close(run(again, batches[0]), before[0], rtol=1e-10, atol=1e-10)


def test_centring_again_changes_nothing_and_needs_biases() -> None:
    model, batches = spoiled_bert(), planted.texts()
    for i in range(2):
        model.get_submodule(f"encoder.layer.{i}.intermediate.dense").bias = None
    done = [c.where[0] for c in centre_norms(model, batches, output=OUT)]
    assert done
    assert not [name for name in done if name.endswith("attention.output.LayerNorm")]  # no bias behind these
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for change in centre_norms(model, batches, output=OUT):
        assert change.after == pytest.approx(change.before, rel=1e-5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-5, atol=1e-4)
    with pytest.raises(RecipeError, match="needs calibration data"):
        centre_norms(model, [], output=OUT)


def test_centring_as_a_variant_is_exact_and_loadable() -> None:
    model, batches = spoiled_bert(), planted.texts()
    with torch.no_grad():
        model.get_submodule("encoder.layer.0.attention.output.LayerNorm").bias[5] = 40.0
    held_out = planted.texts(2, seed=9)
    _, result = one_shot(model, batches, held_out, ["centre", "fold"], output=OUT, precisions=["w4a4"])
    assert result.exact
    assert result.loadable
    assert "centred" in {c.what for c in result.changes}
    assert result.cosine == pytest.approx(1.0, abs=1e-5)
    assert result.after["w4a4/mse"] > result.before["w4a4/mse"]


def test_tied_weights_are_left_alone() -> None:
    model, batches = spoiled_vit(), planted.images(dtype=torch.float64)
    model.get_submodule("layers.1.mlp.fc1").weight = model.get_submodule("layers.0.mlp.fc1").weight
    before = run(model, batches[0])
    changes = equalize(model, batches, output=OUT)
    assert not [c for c in changes if c.where[0].endswith("fc1")]
    torch.testing.assert_close(run(model, batches[0]), before, rtol=1e-11, atol=1e-11)


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(10, 6)
        planted.rank_one(self.layer, torch.arange(10.0) - 3, 9.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def correlated() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(10, 10, generator=generator)
    return [{"x": torch.randn(64, 10, generator=generator) @ mix + 2} for _ in range(4)]


@pytest.mark.parametrize("compensate", ["none", "layer"])
def test_shrinking_reaches_the_size_it_was_told(compensate: str) -> None:
    model, batches = One().double(), [{"x": b["x"].double()} for b in correlated()]
    old = model.layer.weight.detach().clone()
    u, s, vh = torch.linalg.svd(old, full_matrices=False)
    (change,) = shrink_triplets(model, batches, {"layer": 2}, factor=0.3, compensate=compensate)  # type: ignore[arg-type]
    new = model.layer.weight.detach()
    for r in range(2):
        assert float(u[:, r] @ new @ vh[r]) == pytest.approx(0.3 * float(s[r]), rel=1e-5)
    assert change.before == pytest.approx(float(s[0]), rel=1e-5)
    assert change.what == "shrunk"
    if compensate == "none":
        torch.testing.assert_close(new, old - 0.7 * (u[:, :2] * s[:2]) @ vh[:2], rtol=1e-4, atol=1e-4)


def test_compensation_in_the_layer_is_the_constrained_optimum() -> None:
    batches = [{"x": b["x"].double()} for b in correlated()]
    x = torch.cat([b["x"] for b in batches])
    original, errors = One().double(), {}
    # Relative to each token: one over the power of its output without the bias.
    weights = 1 / (original(x) - original.layer.bias).detach().square().sum(1)
    weights /= weights.sum()
    u, s, vh = torch.linalg.svd(original.layer.weight.detach(), full_matrices=False)
    for compensate in ("none", "layer"):
        model = One().double()
        (change,) = shrink_triplets(model, batches, {"layer": 1}, factor=0.5, compensate=compensate)  # type: ignore[arg-type]
        with torch.no_grad():
            errors[compensate] = float((weights * (model(x) - original(x)).square().sum(1)).sum())
    assert errors["layer"] < errors["none"]
    assert change.after <= 1.05 * max(0.5 * float(s[0]), float(s[1])) * (1 + 1e-6)  # s_max does shrink
    # No other change that keeps u^T W' v where it is has a smaller sum of error and ridge (the bias takes the mean).
    centred = x - (weights[:, None] * x).sum(0)
    covariance = centred.T @ (weights[:, None] * centred)
    ridge = float(change.detail.rpartition("ridge ")[2]) * float(covariance.diagonal().mean())

    def objective(delta: Tensor) -> float:
        return float(((delta @ covariance) * delta).sum() + ridge * delta.square().sum())

    delta = model.layer.weight.detach() - original.layer.weight.detach()
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        step = torch.randn(6, 10, generator=generator, dtype=torch.float64) * 0.05
        step -= torch.outer(u[:, 0], vh[0]) * (u[:, 0] @ step @ vh[0])
        assert objective(delta + step) > objective(delta)


def test_refitting_repairs_a_later_layer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(10, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x))

    model, batches = Two(), correlated()
    original = copy.deepcopy(model)
    with torch.no_grad():  # an invertible change: the next layer can take all of it back
        model.first.weight[3] *= 0.2
        model.first.bias += 0.5
        wrong = float((model(batches[0]["x"]) - original(batches[0]["x"])).square().mean())
    (change,) = refit(model, original, batches, after=["first"], output="y")
    with torch.no_grad():
        right = float((model(batches[0]["x"]) - original(batches[0]["x"])).square().mean())
    assert change.where == ("second",)
    assert right < 0.05 * wrong
    assert change.after < 0.05 * change.before


def test_neurons_are_scaled_where_the_fit_holds() -> None:
    model, batches = planted.bert(), planted.texts(6)
    first = model.get_submodule("encoder.layer.0.intermediate.dense")
    with torch.no_grad():
        first.weight[7] *= 12
        first.bias[7] += 30.0  # always far on the linear side of the GELU
    before = run(model, batches[0])
    changes = scale_neurons(model, batches, output=OUT)
    assert [c.where[0] for c in changes][:1] == ["encoder.layer.0.intermediate.dense"]
    assert changes[0].after < 0.7 * changes[0].before
    after = run(model, batches[0])
    assert not torch.equal(after, before)
    assert float(torch.nn.functional.cosine_similarity(after, before, dim=-1).mean()) > 0.999


def test_a_result_says_what_it_bought() -> None:
    model, batches = spoiled_bert(), planted.texts()
    held_out = planted.texts(2, seed=9)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    changed, result = one_shot(model, batches, held_out, ["bypass"], output=OUT, precisions=["w4a8", "w4a4"])
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())  # the original is untouched
    assert result.exact
    assert not result.loadable
    assert result.cosine == pytest.approx(1.0, abs=1e-5)
    assert set(result.before) == set(result.after) == {"w4a8/mse", "w4a4/mse"}
    assert result.after["w4a4/mse"] > result.before["w4a4/mse"] + 1
    assert "which transformers does not load" in result.finding
    json.dumps(result.to_dict(), allow_nan=False)
    again = one_shot(model, batches, held_out, ["bypass"], output=OUT, precisions=["w4a4"], before=result.before)[1]
    assert again.after["w4a4/mse"] == pytest.approx(result.after["w4a4/mse"], abs=1e-4)
    assert discover(changed, batches[0], OUT)  # the pipeline finds its sites again


def test_shrinking_is_reported_as_inexact_and_nothing_flagged_as_nothing() -> None:
    model, batches = planted.bert(), planted.texts()
    name = "encoder.layer.0.output.dense"
    for variant in ("shrink", "shrink-next"):
        _, result = one_shot(model, batches, batches[:1], [variant], output=OUT, flagged={name: 1}, precisions=["w4a4"])
        assert not result.exact
        assert result.loadable
        assert result.cosine < 1
        assert result.changes[0].after < result.changes[0].before
    _, result = one_shot(model, batches, batches[:1], ["shrink"], output=OUT, flagged={}, precisions=["w4a4"])
    assert result.finding == "shrink: nothing to change in this model."
    assert result.after == result.before


def test_errors() -> None:
    model, batches = planted.bert(), planted.texts(1)
    with pytest.raises(RecipeError, match=r"one-shot variants: unknown 'shrnk'\. Expected: shrink, shrink-next"):
        one_shot(model, batches, batches, ["shrnk"], output=OUT)  # type: ignore[list-item]
    with pytest.raises(RecipeError, match="the list is empty"):
        one_shot(model, batches, batches, [], output=OUT)
    with pytest.raises(RecipeError, match="needs the flagged layers"):
        one_shot(model, batches, batches, ["shrink"], output=OUT)
    with pytest.raises(RecipeError, match=r"factor is out of range.*0 to 1.*1\.5"):
        shrink_triplets(model, batches, {}, factor=1.5)
    with pytest.raises(ModelError, match="no layer called 'nowhere'"):
        shrink_triplets(model, batches, {"nowhere": 1})
    with pytest.raises(RecipeError, match="needs calibration data"):
        equalize(model, [], output=OUT)
    assert "bypass" in VARIANTS
