"""Statistics against NumPy-like formulas on everything at once; places; errors."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d_deploy.diagnose import Moments, diagnose
from s2d_deploy.errors import DataError, ModelError


class Net(nn.Module):
    """A patch convolution, tokens, a Linear on tokens, a head on the first token, and a layer never used."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 6, 2, stride=2)
        self.mlp = nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.mlp(tokens)[:, 0])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images(n: int = 6) -> Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    offset=st.sampled_from([0.0, 5.0, -1000.0]),
    seed=st.integers(0, 50),
)
def test_merged_moments_equal_those_of_everything(sizes: list[int], offset: float, seed: int) -> None:
    parts = [torch.randn(n, generator=torch.Generator().manual_seed(seed + n)) ** 3 + offset for n in sizes]
    moments = Moments()
    for part in parts:
        moments.add(part)
    x = torch.cat(parts).double()
    d = x - x.mean()
    assert moments.count == x.numel()
    assert moments.std == pytest.approx(float(d.square().mean().sqrt()), rel=1e-9, abs=1e-9)
    if x.numel() > 1:
        assert moments.kurtosis == pytest.approx(float(d.pow(4).mean() / d.square().mean() ** 2), rel=1e-6)
        assert moments.range_over_std == pytest.approx(float((x.max() - x.min()) / d.square().mean().sqrt()), rel=1e-9)
    assert moments.max_abs == float(x.abs().max())


def test_a_normal_sample_has_kurtosis_3_and_a_constant_none() -> None:
    moments = Moments()
    moments.add(torch.randn(200_000, generator=torch.Generator().manual_seed(0)))
    assert moments.kurtosis == pytest.approx(3, abs=0.05)  # standard error sqrt(24 / n) = 0.011
    constant = Moments()
    constant.add(torch.full((5,), 2.0))
    constant.add(torch.empty(0))
    assert (constant.kurtosis, constant.range_over_std, constant.max_abs) == (0.0, 0.0, 2.0)
    assert Moments().max_abs == 0.0


def test_statistics_and_place_of_each_layer() -> None:
    model, x = net(), images()
    found = {d.name: d for d in diagnose(model, [{"x": x[:4]}, {"x": x[4:]}])}
    assert list(found) == ["patch", "mlp", "head"]
    with torch.no_grad():
        patch = model.patch(x)
        tokens = patch.flatten(2).transpose(1, 2)
        mlp = model.mlp(tokens)
        head = model.head(mlp[:, 0])
    for name, into, out in (("patch", x, patch), ("mlp", tokens, mlp), ("head", mlp[:, 0], head)):
        d, deviation = found[name], out.double() - out.double().mean()
        assert d.max_abs_activation == pytest.approx(float(out.abs().max()), rel=1e-6)
        assert d.max_abs_input == pytest.approx(float(into.abs().max()), rel=1e-6)
        assert d.kurtosis == pytest.approx(float(deviation.pow(4).mean() / deviation.square().mean() ** 2), rel=1e-4)
    assert (found["patch"].shape, found["mlp"].shape) == ((6, 4), (8, 6))
    assert found["mlp"].singular_values == pytest.approx(torch.linalg.svdvals(model.mlp.weight.detach()).tolist())
    assert found["mlp"].sigma_max == found["mlp"].singular_values[0]
    place = found["mlp"].outlier
    assert float(mlp[place.sample, place.token, place.channel]) == pytest.approx(place.value, rel=1e-5)
    assert abs(place.value) == found["mlp"].max_abs_activation
    place = found["patch"].outlier
    assert float(patch.flatten(2)[place.sample, place.channel, place.token]) == pytest.approx(place.value, rel=1e-5)
    place = found["head"].outlier
    assert place.token is None
    assert float(head[place.sample, place.channel]) == pytest.approx(place.value, rel=1e-5)


def test_batching_does_not_matter() -> None:
    model, x = net(), images(8)
    whole = diagnose(model, [{"x": x}])
    parts = diagnose(model, [{"x": part} for part in x.split(3)])
    for a, b in zip(whole, parts, strict=True):
        assert a.outlier.sample == b.outlier.sample
        assert a.pcdr == pytest.approx(b.pcdr, rel=1e-4)
        assert a.kurtosis == pytest.approx(b.kurtosis, rel=1e-5)


def test_a_planted_triplet_is_flagged_and_a_dead_layer_named() -> None:
    model = net()
    with torch.no_grad():
        model.mlp.weight.copy_(0.01 * model.mlp.weight + 9 * torch.ones(8, 1) @ torch.ones(1, 6))
        nn.init.zeros_(model.head.weight)
    found = {d.name: d for d in diagnose(model, [{"x": images()}], tau=0.9)}
    assert (found["mlp"].flagged, found["mlp"].k_target, found["mlp"].dead) == (True, 1, False)
    assert (found["head"].flagged, found["head"].k_target, found["head"].dead) == (False, 0, True)
    assert found["head"].pcdr == [0.0, 0.0, 0.0]


def test_a_layer_of_low_rank_is_not_flagged_by_construction() -> None:
    model = nn.Sequential(nn.Linear(6, 1))

    class Wrap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    (found,) = diagnose(Wrap(), [{"x": torch.randn(4, 6, generator=torch.Generator().manual_seed(0))}])
    assert found.pcdr == pytest.approx([1.0, 1.0, 1.0])
    assert not found.flagged


def test_json_ready_with_the_documented_keys() -> None:
    lines: list[str] = []
    (entry, *_) = diagnose(net(), [{"x": images()}], progress=lines.append)
    document = json.loads(json.dumps(entry.to_dict(), allow_nan=False))
    keys = {"name", "flagged", "k_target", "pcdr", "sigma_max", "max_abs_activation", "kurtosis", "singular_values"}
    assert keys <= set(document)
    assert document["shape"] == [6, 4]
    assert set(document["outlier"]) == {"value", "channel", "sample", "token"}
    assert lines[0] == "diagnose: 1 batches"


def test_a_layer_that_is_never_reached_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert "unused" not in [d.name for d in diagnose(net(), [{"x": images()}])]
    assert "no forward pass reached them: unused" in caplog.text
    with pytest.raises(ModelError, match="no calibration batch reached 'unused'"):
        diagnose(net(), [{"x": images()}], layers=["unused", "mlp"])


def test_errors_name_the_layer() -> None:
    model = net()
    with torch.no_grad():
        model.mlp.weight[0, 0] = float("nan")
        model.head.weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match="in the weight of 'mlp', 'head'"):
        diagnose(model, [{"x": images()}])
    bad = images()
    bad[2, 0, 0, 0] = float("nan")
    model = net()
    with pytest.raises(DataError, match="in the input of layer 'patch'"):
        diagnose(model, [{"x": bad}])
    assert not any(module._forward_hooks for module in model.modules())
    with torch.no_grad():
        model.patch.weight.fill_(1e3)
    with pytest.raises(DataError, match="in the output of layer 'patch'"):
        diagnose(model, [{"x": torch.full((1, 1, 4, 4), 3e38)}])
    with pytest.raises(DataError, match="holds no batch"):
        diagnose(model, [])
    with pytest.raises(ModelError, match="no Linear or Conv layer"):
        diagnose(nn.Sequential(nn.ReLU()), [{"x": images()}])
