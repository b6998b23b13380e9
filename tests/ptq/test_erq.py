"""ERQ: its regressions against NumPy's least squares, its refinement against trying every rounding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tiny_quantized as tiny
import torch
from torch import nn

from s2d_deploy.errors import RecipeError
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Grid, PerAxis, PerBlock
from s2d_deploy.observers import weight_parameters
from s2d_deploy.plan import Site
from s2d_deploy.ptq.erq import RIDGES, _activation_error, activation_regression, refined, rounded_by_halves
from s2d_deploy.ptq.passes import parse_steps
from s2d_deploy.ptq.reconstruction import Statistics
from s2d_deploy.ptq.weight_matrix import WeightMatrix, output_error, weight_matrix


def rows(k: int, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated rows and the same rows on a coarse grid, float64."""
    torch.manual_seed(0)
    x = torch.randn(count, k).double() @ torch.randn(k, k).double()
    return x, torch.round(x / 2) * 2


def matrix_of(k: int, n: int = 5, block: int | None = None) -> WeightMatrix:
    torch.manual_seed(1)
    layer = nn.Linear(k, n)
    grid = Grid(4, granularity=PerAxis(0) if block is None else PerBlock(1, block))
    scale, zero = weight_parameters(layer.weight, grid, "mse")
    return weight_matrix(layer, Site("l.weight", "l", "weight", grid, scale, zero, ""))


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
def test_the_first_regression_is_the_penalized_least_squares(ridge: float):
    k = 9
    x, q = rows(k)
    weight = matrix_of(k).weight
    gram, cross = q.T @ q / len(q), x.T @ q / len(q)
    found = activation_regression(weight, gram, cross, ridge)
    # As one least squares: rows of data, and rows that pull the change towards zero.
    penalty = ridge * float(gram.diagonal().mean())
    system = np.vstack([q.numpy() / len(q) ** 0.5, np.sqrt(penalty) * np.eye(k)])
    for n in range(len(weight)):
        right = np.concatenate([((x - q) @ weight[n]).numpy() / len(q) ** 0.5, np.zeros(k)])
        change = np.linalg.lstsq(system, right, rcond=None)[0]
        assert np.allclose(found[n].numpy(), weight[n].numpy() + change, rtol=1e-8, atol=1e-10)


def test_the_first_regression_leaves_exact_inputs_alone():
    x, _ = rows(9)
    weight, gram = matrix_of(9).weight, x.T @ x
    assert torch.equal(activation_regression(weight, gram, gram, 0.01), weight)


def test_the_halves_are_rounded_and_regressed_in_turn():
    k = 11
    _, q = rows(k)
    matrix, gram = matrix_of(k), q.T @ q / len(q)
    found = rounded_by_halves(matrix, gram, ridge=0.01, refinements=0)
    penalty = 0.01 * float(gram.diagonal().mean())
    weight, start, codes = matrix.weight.numpy().copy(), 0, np.zeros((5, k))
    scale = matrix.scale.numpy()
    for size in (6, 3, 1, 1):
        end = start + size
        part = np.clip(np.round(weight[:, start:end] / scale[:, start:end]), -8, 7)
        codes[:, start:end] = part
        value = (part.astype(np.float32) * scale[:, start:end].astype(np.float32)).astype(np.float64)
        error = q[:, start:end].numpy() @ (value - weight[:, start:end]).T / len(q) ** 0.5
        rest = k - end
        if rest:
            system = np.vstack([q[:, end:].numpy() / len(q) ** 0.5, np.sqrt(penalty) * np.eye(rest)])
            right = np.vstack([-error, np.zeros((rest, 5))])
            weight[:, end:] += np.linalg.lstsq(system, right, rcond=None)[0].T
        start = end
    assert start == k
    assert np.array_equal(found.numpy(), codes)


def test_refinement_only_lowers_the_error_and_ends_where_no_turn_helps():
    k = 7
    _, q = rows(k)
    matrix, gram = matrix_of(k), q.T @ q / len(q)
    every = slice(0, k)
    errors = []
    for steps in range(6):
        codes = refined(matrix, matrix.weight, every, gram, steps)
        errors.append(output_error(matrix.values(codes) - matrix.weight, gram))
        assert float((codes - matrix.nearest_codes).abs().max()) <= 1
        # One more step turns at most one rounding of a row.
        assert int((codes != matrix.nearest_codes).sum(1).max()) <= steps
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before).all())
    assert bool((errors[-1] < errors[0]).any())
    # Brute force over every up or down: refinement is greedy, so it lies between the best and plain rounding.
    down = torch.floor(matrix.weight / matrix.scale).clamp(-8, 7)
    best = torch.full((5,), np.inf, dtype=torch.float64)
    for choice in itertools.product((0.0, 1.0), repeat=k):
        tried = (down + torch.tensor(choice, dtype=torch.float64)).clamp(-8, 7)
        best = torch.minimum(best, output_error(matrix.values(tried) - matrix.weight, gram))
    assert bool((errors[-1] >= best - 1e-12).all())


def test_blocks_of_scales_are_kept_apart():
    _, q = rows(16)
    matrix, gram = matrix_of(16, block=4), q.T @ q / len(q)
    codes = rounded_by_halves(matrix, gram, ridge=0.01, refinements=20)
    assert float(codes.min()) >= -8
    assert float(codes.max()) <= 7
    chosen = output_error(matrix.values(codes) - matrix.weight, gram).mean()
    assert chosen < output_error(matrix.values(matrix.nearest_codes) - matrix.weight, gram).mean()


@pytest.mark.parametrize(
    ("kind", "precision", "options"),
    [
        ("bert", "w4a4", {}),
        ("bert", "w4a16", {}),
        ("vit", "w4a4", {"reference": "simulated"}),
        ("conv", "w4a4", {"refinements": 5}),
    ],
)
def test_on_a_model(kind: str, precision: str, options: dict):
    found, context, model = tiny.run(kind, precision, [{"erq": options}], block_size=8)
    plain, _, _ = tiny.run(kind, precision, [], block_size=8)
    for site in [s for s in found.plan.sites.values() if s.role == "weight"]:
        assert site.source == "erq"
        weight = found.model.get_submodule(site.op).weight
        codes = quantize(weight, site.scale, site.zero_point, site.grid)
        assert torch.equal(dequantize(codes, site.scale, site.zero_point, site.grid), weight)
    if kind == "bert":
        assert tiny.error(found, context, model) < tiny.error(plain, context, model)


def test_the_ridge_is_the_one_that_errs_least_on_the_other_half():
    """Fewer rows than columns: a small ridge fits them exactly, and is wrong about the others."""
    k, count = 24, 16
    torch.manual_seed(3)
    x = torch.randn(2 * count, k).double()
    q = x + 0.5 * torch.randn(2 * count, k).double()
    halves = [(x[:count], q[:count]), (x[count:], q[count:])]
    folds = tuple(Statistics(count, b.T @ b / count, a.T @ b / count, b.mean(0), a.mean(0)) for a, b in halves)
    plain = matrix_of(k)

    def unseen(ridge: float) -> float:
        """Mean squared output error on the rows that the regression has not seen, written out."""
        total = 0.0
        for (a, b), (c, d) in (halves, halves[::-1]):
            weight = activation_regression(plain.weight, b.T @ b / count, a.T @ b / count, ridge)
            total += float((c @ plain.weight.T - d @ weight.T).square().sum()) / count
        return total

    errors = {ridge: unseen(ridge) for ridge in RIDGES}
    found = [_activation_error(plain, folds, ridge) for ridge in RIDGES]
    constant = sum(float((a @ plain.weight.T).square().sum()) / count for a, _ in halves)
    assert np.allclose(np.array(found) + constant, list(errors.values()))
    assert min(errors, key=errors.__getitem__) >= 0.1
    assert errors[RIDGES[0]] > 1.5 * min(errors.values())


def test_what_was_chosen_stands_in_the_plan():
    plan = tiny.run("bert", "w4a4", ["erq"])[0].plan
    assert set(plan.info["erq"]) == {s.op for s in plan.sites.values() if s.role == "weight"}
    for chosen in plan.info["erq"].values():
        assert chosen["activation_ridge"] in RIDGES
        assert chosen["weight_ridge"] in RIDGES
        assert 0 <= chosen["rows_kept"] <= chosen["rows"]
    given = tiny.run("bert", "w4a4", [{"erq": {"activation_ridge": 0.2, "weight_ridge": 0.5}}])[0].plan
    ridges = {(c["activation_ridge"], c["weight_ridge"]) for c in given.info["erq"].values()}
    assert ridges == {(0.2, 0.5)}


@pytest.mark.parametrize("ridge", [0, -1, "much"])
def test_a_ridge_that_is_none(ridge: object):
    with pytest.raises(RecipeError, match=r"quantize.passes.erq.activation_ridge"):
        parse_steps([{"erq": {"activation_ridge": ridge}}])


def test_twice_the_same():
    runs = [tiny.run("bert", "w4a4", ["erq"])[0] for _ in range(2)]
    assert runs[0].plan.digest() == runs[1].plan.digest()
    states = [r.model.state_dict() for r in runs]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_rounded_weights_are_refused():
    with pytest.raises(RecipeError, match=r"'erq' behind 'gptq' finds weights that gptq has rounded.*keep one of them"):
        tiny.run("bert", "w4a4", ["gptq", "erq"])
