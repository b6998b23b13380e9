"""PCDR against its definition, written as loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d_deploy.errors import DataError
from s2d_deploy.pcdr import OutlierCollector, Outliers, forward_batches, is_dead, pcdr, smallest_k
from s2d_deploy.spectral import top_triplets, weight_matrix


class Net(nn.Module):
    """One layer under a name, called with x=."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


def by_definition(weight: Tensor, xs: Tensor, pairs: list[tuple[int, int]], k: int) -> float:
    """Mean over (i, j) of |sum_{r<=k} s_r U_ir (V_r . x_j)| / |sum_r s_r U_ir (V_r . x_j)|."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    total = 0.0
    for i, j in pairs:
        terms = [
            float(s[r]) * float(u[i, r]) * sum(float(vh[r, c]) * float(xs[j, c]) for c in range(xs.shape[1]))
            for r in range(len(s))
        ]
        total += abs(sum(terms[:k])) / abs(sum(terms))
    return total / len(pairs)


def test_matches_the_definition_over_several_batches() -> None:
    g = torch.Generator().manual_seed(0)
    layer = nn.Linear(7, 5)
    batches = [{"x": torch.randn(3, 4, 7, generator=g)} for _ in range(3)]
    with OutlierCollector(Net(layer), top=6) as collector:
        forward_batches(Net(layer), batches)
    found = collector.outliers()["layer"]

    xs = torch.cat([b["x"] for b in batches]).reshape(-1, 7)
    weight = layer.weight.detach()
    every = {(i, j): abs(float(weight[i] @ xs[j])) for i in range(5) for j in range(len(xs))}
    largest = sorted(every, key=lambda at: -every[at])[:6]
    assert found.values.abs().tolist() == pytest.approx([every[at] for at in largest], rel=1e-4)
    got = pcdr(weight_matrix(layer), top_triplets(weight, 3), found)
    for k in (1, 2, 3):
        assert got[k - 1] == pytest.approx(by_definition(weight, xs, largest, k), rel=1e-4)


def test_the_bias_is_no_part_of_it() -> None:
    layer = nn.Linear(3, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([5.0, 1.0, 1.0])))
        layer.bias.copy_(torch.tensor([0.0, 1000.0, 0.0]))
    with OutlierCollector(Net(layer), top=1) as collector:
        layer(torch.ones(2, 3))
    found = collector.outliers()["layer"]
    assert found.channels.tolist() == [0]
    assert found.values.tolist() == [5.0]
    assert pcdr(weight_matrix(layer), top_triplets(layer.weight, 2), found) == pytest.approx([1.0, 1.0])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(3, 4, 4, stride=3),
        nn.Conv3d(1, 2, 2, padding=(1, 0, 1)),
    ],
    ids=["groups", "same", "reflect", "conv1d", "conv3d"],
)
def test_a_convs_inputs_are_the_patches_that_made_the_outliers(conv: nn.Module) -> None:
    shape = {1: (5, 3, 13), 2: (5, conv.in_channels, 7, 8), 3: (3, 1, 4, 5, 4)}[len(conv.kernel_size)]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with OutlierCollector(Net(conv), top=20) as collector:
        output = conv(x)
    found = collector.outliers()["layer"]
    matrix = weight_matrix(conv)
    # The kept patch times the channel's row is the kept value, and the values are the output's largest.
    assert torch.allclose((matrix[found.channels] * found.inputs).sum(1), found.values, atol=1e-5)
    bias = conv.bias.detach().reshape(1, -1, *[1] * len(conv.kernel_size))
    largest = (output.detach() - bias).abs().reshape(-1).sort(descending=True).values[:20]
    assert torch.allclose(found.values.abs(), largest, atol=1e-5)


def test_conv_patches_equal_unfold() -> None:
    conv = nn.Conv2d(2, 1, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(2))
    with OutlierCollector(Net(conv), top=18) as collector:
        output = conv(x)
    found = collector.outliers()["layer"]
    patches = F.unfold(x, 3, stride=2, padding=1).transpose(1, 2).reshape(-1, 18)
    order = output.detach().reshape(-1).abs().argsort(descending=True)
    assert torch.equal(found.inputs, patches[order])


def test_a_dead_layer_gives_zero_and_no_nan() -> None:
    layer = nn.Linear(4, 3)
    nn.init.zeros_(layer.weight)
    with OutlierCollector(Net(layer)) as collector:
        layer(torch.randn(5, 4))
    found = collector.outliers()["layer"]
    assert is_dead(found)
    assert pcdr(weight_matrix(layer), top_triplets(layer.weight, 2), found) == [0.0, 0.0]


def test_zero_entries_beside_live_ones_are_left_out() -> None:
    weight = torch.diag(torch.tensor([2.0, 1.0]))
    outliers = Outliers(torch.tensor([2.0, 0.0]), torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert pcdr(weight, top_triplets(weight, 1), outliers) == [1.0]


def test_memory_is_bounded_and_batching_does_not_matter() -> None:
    layer = nn.Linear(6, 4)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(3))
    kept = []
    for size in (40, 7, 1):
        with OutlierCollector(Net(layer), top=5) as collector:
            forward_batches(Net(layer), [{"x": part} for part in x.split(size)])
        kept.append(collector.outliers()["layer"])
        assert kept[-1].inputs.shape == (5, 6)
    for other in kept[1:]:
        assert torch.equal(other.channels, kept[0].channels)
        assert torch.equal(other.inputs, kept[0].inputs)


def test_k_target_is_the_smallest_and_a_full_rank_says_nothing() -> None:
    assert smallest_k([0.5, 0.96, 0.99], 0.95, 10) == 2
    assert smallest_k([0.5, 0.6, 0.7], 0.95, 10) == 0
    assert smallest_k([0.95], 0.95, 10) == 1
    assert smallest_k([0.5, 1.0, 1.0], 0.95, 2) == 0


def test_modes_hooks_and_generator_are_left_alone() -> None:
    model = Net(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5), nn.BatchNorm1d(3).eval()))
    model.train()
    model.layer[2].eval()
    modes = [module.training for module in model.modules()]
    state, statistics = torch.get_rng_state(), model.layer[2].running_mean.clone()
    with OutlierCollector(model):
        assert forward_batches(model, [{"x": torch.randn(4, 3, generator=torch.Generator())}]) == 1
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.layer[2].running_mean, statistics)
    assert not any(module._forward_hooks for module in model.modules())


def test_errors() -> None:
    model = Net(nn.Linear(3, 3))
    with pytest.raises(DataError, match="holds no batch"):
        forward_batches(model, iter([]))
    with pytest.raises(DataError, match=r"Expected: a dict of tensors.*Found: Tensor"):
        forward_batches(model, [torch.zeros(1, 3)])
    with pytest.raises(DataError, match=r"does not take this batch.*'pixels'.*Found: pixels"):
        forward_batches(model, [{"pixels": torch.zeros(1, 3)}])
    with OutlierCollector(model), pytest.raises(DataError, match="in the output of layer 'layer'"):
        forward_batches(model, [{"x": torch.full((1, 3), float("nan"))}])
