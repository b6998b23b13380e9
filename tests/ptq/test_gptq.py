"""GPTQ against the update it abbreviates, and what it promises on tiny models."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import tiny_quantized as tiny
import torch
from torch import nn

from s2d_deploy.errors import DataError, ModelError, RecipeError
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.grid import Granularity, Grid, PerAxis, PerBlock, PerTensor
from s2d_deploy.observers import weight_parameters
from s2d_deploy.plan import Site
from s2d_deploy.ptq.gptq import gptq_codes, inverse_factor, needed_damp
from s2d_deploy.ptq.passes import parse_steps, run_passes
from s2d_deploy.ptq.weight_matrix import WeightMatrix, better_rows, output_error, weight_matrix


def problem(granularity: Granularity, k: int = 24, bits: int = 4) -> tuple[WeightMatrix, torch.Tensor]:
    """A Linear on its grid and the Gram matrix of correlated rows with an outlier column."""
    torch.manual_seed(0)
    layer = nn.Linear(k, 7)
    grid = Grid(bits, granularity=granularity)
    scale, zero = weight_parameters(layer.weight, grid, "mse")
    rows = torch.randn(100, k).double() @ torch.randn(k, k).double()
    rows[:, 3] *= 8
    return weight_matrix(layer, Site("l.weight", "l", "weight", grid, scale, zero, "")), rows.T @ rows / 100


def brain_surgeon(matrix: WeightMatrix, gram: torch.Tensor, damp: float, order: list[int]) -> torch.Tensor:
    """Optimal brain quantization, column by column with an explicit inverse that shrinks: the slow reference."""
    left = matrix.weight.clone()
    codes = torch.zeros_like(left)
    inverse = torch.linalg.inv(gram + damp * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64))
    for j in order:
        for n in range(left.shape[0]):
            s = float(matrix.scale[n, j])
            codes[n, j] = min(max(round(float(left[n, j]) / s), matrix.qmin), matrix.qmax)
            error = float(left[n, j]) - float((codes[n, j].float() * torch.tensor(s).float()).double())
            left[n] -= error / inverse[j, j] * inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    return codes


@pytest.mark.parametrize("granularity", [PerAxis(0), PerBlock(1, 8), PerTensor()], ids=lambda g: g.kind)
@pytest.mark.parametrize("act_order", [False, True])
def test_the_blocked_form_is_optimal_brain_quantization(granularity: Granularity, act_order: bool):
    matrix, gram = problem(granularity)
    order = torch.argsort(gram.diagonal(), descending=True, stable=True).tolist() if act_order else list(range(24))
    wanted = brain_surgeon(matrix, gram, 0.01, order)
    for block in (1, 5, 64):
        found = gptq_codes(matrix, gram, damp=0.01, block=block, act_order=act_order)
        # Codes are integers and the arithmetic float64: a different one would be another algorithm.
        assert torch.equal(found, wanted)
    assert not torch.equal(wanted, matrix.nearest_codes)


def test_it_beats_rounding_on_correlated_inputs():
    matrix, gram = problem(PerAxis(0))
    codes = gptq_codes(matrix, gram, act_order=True)
    chosen = output_error(matrix.values(codes) - matrix.weight, gram).mean()
    nearest = output_error(matrix.values(matrix.nearest_codes) - matrix.weight, gram).mean()
    assert chosen < 0.5 * nearest


def test_white_inputs_leave_nothing_to_gain():
    matrix, _ = problem(PerAxis(0))
    codes = gptq_codes(matrix, torch.eye(24, dtype=torch.float64))
    assert torch.equal(codes, matrix.nearest_codes)


def test_an_input_that_is_always_zero_is_rounded_to_nearest():
    matrix, gram = problem(PerAxis(0))
    gram[5], gram[:, 5] = 0, 0
    codes = gptq_codes(matrix, gram, act_order=True)
    assert torch.equal(codes[:, 5], matrix.nearest_codes[:, 5])
    assert torch.equal(gptq_codes(matrix, torch.zeros_like(gram)), matrix.nearest_codes)


def test_the_factor_is_that_of_the_damped_inverse():
    _, gram = problem(PerAxis(0))
    factor = inverse_factor(gram, 0.1)
    damped = gram + 0.1 * gram.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(24, dtype=torch.float64), atol=1e-9)
    assert torch.equal(factor, factor.triu())


def test_rows_that_rounding_serves_better_keep_it():
    matrix, gram = problem(PerAxis(0))
    codes = matrix.nearest_codes.clone()
    codes[2] = matrix.qmax  # far from the weight
    better = gptq_codes(matrix, gram)
    codes[4] = better[4]
    kept, before, after = better_rows(matrix, codes, gram)
    assert torch.equal(kept[2], matrix.nearest_codes[2])
    assert torch.equal(kept[4], better[4])
    assert after < before


@pytest.mark.parametrize(
    ("kind", "precision", "sequential"),
    [
        ("bert", "w4a4", True),
        ("bert", "w4a16", True),
        ("bert", "w4a16", False),
        ("vit", "w4a4", False),
        ("vit", "w4a16", True),
        ("conv", "w4a4", True),
    ],
)
def test_on_a_model(kind: str, precision: str, sequential: bool):
    steps = [{"gptq": {"sequential": sequential}}]
    found, context, model = tiny.run(kind, precision, steps, block_size=8)
    weights = [s for s in found.plan.sites.values() if s.role == "weight"]
    assert weights
    assert {s.source for s in weights} == {"gptq"}
    for site in weights:
        weight = found.model.get_submodule(site.op).weight
        codes = quantize(weight, site.scale, site.zero_point, site.grid)
        assert torch.equal(dequantize(codes, site.scale, site.zero_point, site.grid), weight)
    plain, _, _ = tiny.run(kind, precision, [], block_size=8)
    if precision == "w4a16":
        # Nothing else is quantized, so less error in every layer shows in the output.
        assert tiny.error(found, context, model) < tiny.error(plain, context, model)
    assert all(torch.equal(s.scale, plain.plan.sites[s.name].scale) for s in weights)


def test_twice_the_same():
    runs = [tiny.run("bert", "w4a4", ["gptq"])[0] for _ in range(2)]
    assert runs[0].plan.digest() == runs[1].plan.digest()
    states = [r.model.state_dict() for r in runs]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_layers_that_read_one_tensor_are_a_group():
    from s2d_deploy.ptq.reconstruction import Reconstruction

    quantized, context, _ = tiny.run("bert", "w4a4", [])
    work = Reconstruction(quantized, context, "gptq")
    assert [len(g) for g in work.groups] == [3, 1, 1, 1] * 2
    assert [name.rpartition(".")[2] for name in work.groups[0]] == ["query", "key", "value"]


def test_a_convolution_with_groups_is_left_out_and_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        found, _, _ = tiny.run("grouped", "w4a4", ["gptq"])
    assert found.plan.info["left_out"] == {"gptq": {"second": "a convolution with 2 groups"}}
    assert "gptq leaves out second (a convolution with 2 groups)" in caplog.text
    assert found.plan.sites["second.weight"].source == "rtn-mse"
    assert found.plan.sites["first.weight"].source == "gptq"


def test_nothing_to_serve():
    with pytest.raises(ModelError, match=r"pass 'gptq' can serve no layer.*no quantized weight.*take the pass out"):
        tiny.run("bert", "w4a4", ["gptq"], skip=("*",))


def test_rounded_weights_are_refused():
    from s2d_deploy.ptq import gptq

    found, context, _ = tiny.run("bert", "w4a4", ["gptq"])
    with pytest.raises(ModelError, match=r"weights already lie on their grids in 12 layer.*list one pass that chooses"):
        gptq.apply(found, context, gptq.Options())


@pytest.mark.parametrize(
    ("given", "text"),
    [({"damp": 0.0}, "gptq.damp: input should be greater than 0"), ({"actorder": True}, "did you mean 'act_order'")],
)
def test_wrong_options(given: dict, text: str):
    with pytest.raises(RecipeError, match=text):
        parse_steps([{"gptq": given}])


def singular(k: int = 16) -> torch.Tensor:
    """Rank one, and so large that a tiny share of its mean is lost in rounding."""
    row = torch.ones(k, dtype=torch.float64) * 1e8
    row[0] = 1e-3
    gram = torch.outer(row, row)
    gram[1:, 1:] -= 1e-1 * torch.eye(k - 1, dtype=torch.float64)  # as the rounding of large sums leaves it
    return gram


def test_a_matrix_that_is_not_positive_definite_gets_the_damping_that_it_needs():
    gram = singular()
    with pytest.raises(torch.linalg.LinAlgError):
        inverse_factor(gram, 1e-18)
    used = needed_damp(gram, 1e-18)
    assert used > 1e-18
    assert torch.isfinite(inverse_factor(gram, used)).all()
    assert needed_damp(problem(PerAxis(0))[1], 0.01) == 0.01
    with pytest.raises(DataError, match=r"gptq: the inputs of fc1 are not finite on the calibration data"):
        needed_damp(gram * float("nan"), 0.01, "fc1")
    with pytest.raises(DataError, match=r"gptq: H of fc1 is not positive definite\. Found: damping up to 10 "):
        needed_damp(-torch.eye(4, dtype=torch.float64), 0.01, "fc1")


def test_the_damping_stands_in_the_plan(caplog: pytest.LogCaptureFixture):
    done, context, _ = tiny.run("vit", "w4a4", ["gptq"])
    assert done.plan.info["gptq"] == {"damp": 0.01, "damp_raised": {}}
    model, batches, _ = tiny.case("vit")
    few = [{n: x[:1] for n, x in batches[0].items()}]  # fewer rows than channels: singular without damping
    steps = parse_steps([{"gptq": {"damp": 1e-30, "sequential": False}}])
    with caplog.at_level(logging.WARNING):
        done = run_passes(model, done.plan.ops, "w4a8", steps, replace(context, batches=lambda: few))
    told = done.plan.info["gptq"]
    assert told["damp_raised"]
    assert all(used > told["damp"] for used in told["damp_raised"].values())
    assert "H is not positive definite with damp 1e-30; " in caplog.text
