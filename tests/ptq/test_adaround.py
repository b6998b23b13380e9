"""AdaRound against the formulas written out, and against trying every rounding."""

from __future__ import annotations

import itertools
import math

import pytest
import tiny_quantized as tiny
import torch
from torch import nn

from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Grid, PerAxis
from s2d_deploy.observers import weight_parameters
from s2d_deploy.plan import Site
from s2d_deploy.ptq.adaround import Options, annealed, learned_rounding, rectified_sigmoid
from s2d_deploy.ptq.weight_matrix import WeightMatrix, weight_matrix


def problem(k: int, n: int, bits: int = 3) -> tuple[WeightMatrix, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    layer = nn.Linear(k, n)
    grid = Grid(bits, granularity=PerAxis(0))
    scale, zero = weight_parameters(layer.weight, grid, "absmax")
    matrix = weight_matrix(layer, Site("l.weight", "l", "weight", grid, scale, zero, ""))
    rows = torch.randn(200, k) @ torch.randn(k, k) + 1
    return matrix, rows, rows @ matrix.weight.float().T


def errors(matrix: WeightMatrix, codes: torch.Tensor, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    return (rows @ matrix.values(codes).float().T - wanted).square().mean(0)


def test_the_rectified_sigmoid_is_equation_23():
    for v in (-9.0, -2.0, -0.1, 0.0, 0.3, 4.0):
        wanted = min(max(1.2 / (1 + math.exp(-v)) - 0.1, 0.0), 1.0)
        assert float(rectified_sigmoid(torch.tensor(v))) == pytest.approx(wanted, abs=1e-6)


def test_beta_falls_from_20_to_2():
    betas = [annealed(step, 50) for step in range(51)]
    assert betas[0] == 20.0
    assert betas[-1] == pytest.approx(2.0)
    assert all(a >= b for a, b in itertools.pairwise(betas))


def test_it_comes_close_to_the_best_of_all_roundings():
    matrix, rows, wanted = problem(k=8, n=12)
    found = learned_rounding(matrix, rows, wanted, Options(iterations=800, batch=64), seed=0)
    down = torch.floor(matrix.weight / matrix.scale)
    best = torch.full((12,), math.inf)
    for choice in itertools.product((0.0, 1.0), repeat=8):
        tried = (down + torch.tensor(choice, dtype=torch.float64)).clamp(matrix.qmin, matrix.qmax)
        best = torch.minimum(best, errors(matrix, tried, rows, wanted))
    nearest = errors(matrix, matrix.nearest_codes, rows, wanted)
    learned = errors(matrix, found, rows, wanted)
    assert bool((learned >= best * (1 - 1e-5)).all())
    # Of what any choice of roundings can gain, at least half: the search is local.
    assert float((nearest - learned).clamp_min(0).sum()) > 0.5 * float((nearest - best).sum())


def test_codes_are_neighbours_of_the_weight():
    matrix, rows, wanted = problem(k=12, n=5)
    found = learned_rounding(matrix, rows, wanted, Options(iterations=30), seed=0)
    exact = matrix.weight / matrix.scale
    inside = (exact > matrix.qmin) & (exact < matrix.qmax)
    assert float((found - exact)[inside].abs().max()) <= 1 + 1e-6
    assert torch.equal(found, found.round())
    assert float(found.min()) >= matrix.qmin
    assert float(found.max()) <= matrix.qmax


def test_the_seed_decides():
    matrix, rows, wanted = problem(k=12, n=5)
    runs = [learned_rounding(matrix, rows, wanted, Options(iterations=60, batch=8), seed=s) for s in (1, 1)]
    assert torch.equal(*runs)


def test_exact_weights_stay():
    matrix, rows, _ = problem(k=8, n=6)
    value = matrix.values(matrix.nearest_codes).float()
    assert torch.equal(
        learned_rounding(matrix, rows, rows @ value.T, Options(iterations=5), seed=0), matrix.nearest_codes
    )


@pytest.mark.parametrize(("kind", "precision"), [("bert", "w4a16"), ("vit", "w4a4"), ("conv", "w4a4")])
def test_on_a_model(kind: str, precision: str):
    found, context, model = tiny.run(kind, precision, [{"adaround": {"iterations": 60}}], block_size=8)
    plain, _, _ = tiny.run(kind, precision, [], block_size=8)
    for site in [s for s in found.plan.sites.values() if s.role == "weight"]:
        assert site.source == "adaround"
        weight = found.model.get_submodule(site.op).weight
        codes = quantize(weight, site.scale, site.zero_point, site.grid)
        assert torch.equal(dequantize(codes, site.scale, site.zero_point, site.grid), weight)
    if precision == "w4a16":
        assert tiny.error(found, context, model) < tiny.error(plain, context, model)
