"""Quantize and dequantize against the definition in Python floats, straight-through gradients, and refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.errors import PlanError
from s2d_deploy.fake_quant import FakeQuantizer, dequantize, quantize, token_scale
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor, PerToken

floats = st.floats(-1e6, 1e6, width=32, allow_subnormal=False)


def by_definition(x, scale, zero_point, grid):
    """One element, in FP32 as the contract says; Python's round is half to even too."""
    steps = round(float(np.float32(x) / np.float32(scale)))
    code = min(max(steps + zero_point, grid.qmin), grid.qmax)
    return code, np.float32(code - zero_point) * np.float32(scale)


@settings(max_examples=60)
@given(
    x=st.lists(floats, min_size=1, max_size=8),
    scale=st.floats(2.0**-10, 64.0, width=32),
    bits=st.integers(2, 8),
    signed=st.booleans(),
    narrow=st.booleans(),
    offset=st.integers(0, 255),
)
def test_it_is_the_definition(x, scale, bits, signed, narrow, offset):
    grid = Grid(bits, signed=signed, symmetric=False, narrow=narrow and signed)
    zero_point = grid.qmin + offset % (grid.qmax - grid.qmin + 1)
    values, s, z = torch.tensor(x), torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32)
    codes = quantize(values, s, z, grid)
    expected = [by_definition(v, scale, zero_point, grid) for v in values.tolist()]
    assert codes.dtype == torch.int32
    assert codes.tolist() == [c for c, _ in expected]
    assert dequantize(codes, s, z, grid).tolist() == [float(v) for _, v in expected]
    fake = FakeQuantizer(grid, s, z)(values)
    assert fake.tolist() == [float(v) for _, v in expected]
    # Grid points stay where they are.
    assert torch.equal(quantize(fake, s, z, grid), codes)


def test_ties_go_to_the_even_code():
    grid, one, zero = Grid(4), torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 7.5, 100.0, -100.0])
    assert quantize(x, one, zero, grid).tolist() == [-2, -2, 0, 0, 2, 2, 7, 7, -8]
    # The zero point is added after rounding: 0.5 + 1 is 1, not 2.
    assert quantize(torch.tensor([0.5]), one, torch.tensor(1, dtype=torch.int32), grid).tolist() == [1]


def test_the_division_is_a_true_one():
    # x is 2.5 scales exactly; times the rounded reciprocal it would lie off the tie for some scales.
    scales = torch.arange(1, 4000, dtype=torch.float32) / 7
    x, zero = scales * 2.5, torch.tensor(0, dtype=torch.int32)
    exact = x / scales == 2.5
    assert exact.sum() > 1000
    for value, scale in zip(x[exact][:500], scales[exact][:500], strict=True):
        assert quantize(value, scale, zero, Grid(8)).item() == 2
    assert ((x * (1 / scales))[exact] != 2.5).any()


@pytest.mark.parametrize(
    ("granularity", "index"),
    [
        (PerTensor(), lambda i, j: ()),
        (PerAxis(0), lambda i, j: (i,)),
        (PerAxis(-1), lambda i, j: (j,)),
        (PerBlock(1, 3), lambda i, j: (i, j // 3)),
        (PerBlock(0, 2), lambda i, j: (i // 2, j)),
    ],
)
def test_every_element_takes_its_own_scale(granularity, index):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 6, generator=generator)
    grid = Grid(5, symmetric=False, granularity=granularity)
    shape = grid.scale_shape((4, 6))
    scale = torch.rand(shape, generator=generator) + 0.05
    zero_point = torch.randint(-5, 5, shape, generator=generator, dtype=torch.int32)
    codes, values = quantize(x, scale, zero_point, grid), FakeQuantizer(grid, scale, zero_point)(x)
    for i, j in itertools.product(range(4), range(6)):
        at = index(i, j)
        code, value = by_definition(x[i, j].item(), scale[at].item(), zero_point[at].item(), grid)
        assert codes[i, j].item() == code
        assert values[i, j].item() == float(value)


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_have_their_own_scales(bits):
    grid = Grid(bits, granularity=PerToken())
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))
    x[1, 2] = 0
    scale = token_scale(x, grid)
    assert scale.shape == (2, 3, 1)
    assert scale[1, 2].item() == 1.0  # defined for a token of zeros
    quantizer = FakeQuantizer(grid)
    codes, values = quantizer.codes(x), quantizer(x)
    for b, t in itertools.product(range(2), range(3)):
        token_codes = codes[b, t].tolist()
        s = float(np.float32(x[b, t].abs().max().item()) / np.float32(grid.qmax)) if (b, t) != (1, 2) else 1.0
        assert token_codes == [by_definition(v, s, 0, grid)[0] for v in x[b, t].tolist()]
        assert values[b, t].tolist() == [float(np.float32(c) * np.float32(s)) for c in token_codes]
        assert max(map(abs, token_codes)) == (grid.qmax if (b, t) != (1, 2) else 0)


def test_gradients_are_straight_through():
    grid = Grid(4)
    x = torch.tensor([-9.0, -8.4, -8.0, 0.3, 7.0, 7.4, 7.6, 20.0], requires_grad=True)
    FakeQuantizer(grid, torch.tensor(1.0))(x).backward(torch.arange(1.0, 9.0))
    # Clamped are those that round outside -8 .. 7.
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 6.0, 0.0, 0.0]
    y = torch.randn(2, 5, requires_grad=True)
    FakeQuantizer(Grid(8, granularity=PerToken()))(y).sum().backward()
    assert y.grad.tolist() == [[1.0] * 5] * 2


def test_torch_accepts_the_operators():
    args = (torch.randn(3, 4), torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), 4, True, False, None, None)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.s2d_deploy.fake_quantize.default, args, test_utils=checks)
    torch.library.opcheck(torch.ops.s2d_deploy.fake_quantize_token.default, (torch.randn(3, 4), 8), test_utils=checks)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_a_bad_scale_is_refused(bad):
    with pytest.raises(PlanError, match=r"a scale must be finite and positive\. Found: "):
        FakeQuantizer(Grid(8, granularity=PerAxis(0)), torch.tensor([1.0, bad]))


def test_a_static_quantizer_needs_a_scale():
    with pytest.raises(PlanError, match=r"a static quantizer needs a scale\. Fix: calibrate the plan first\."):
        FakeQuantizer(Grid(8))


def test_it_prints_its_grid():
    assert repr(FakeQuantizer(Grid(4, signed=False), torch.tensor(1.0))) == "FakeQuantizer(uint4, tensor)"
