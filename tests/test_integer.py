"""Exact integer contractions against loops over Python's own integers."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.errors import PlanError
from s2d_deploy.integer import (
    integer_conv2d,
    integer_matmul,
    integer_matmul_blocks,
    patches,
    rescale,
    rescale_blocks,
)


def codes(rng, shape, dtype="int8", bits=8):
    low, high = (0, 1 << bits) if dtype.startswith("u") else (-(1 << (bits - 1)), 1 << (bits - 1))
    return rng.integers(low, high, size=shape).astype(dtype)


def loop_matmul(lhs, rhs, lhs_zero, rhs_zero):
    """One matrix by one matrix; zero points are a number and a list of one for each column."""
    m, k = lhs.shape
    result = [[0] * rhs.shape[1] for _ in range(m)]
    for i in range(m):
        for j in range(rhs.shape[1]):
            for p in range(k):
                result[i][j] += (int(lhs[i, p]) - lhs_zero) * (int(rhs[p, j]) - rhs_zero[j])
    return result


def loop_conv(x, w, zero, w_zero, stride, padding, dilation, groups):
    batch, _, height, width = x.shape
    out, per_group, kh, kw = w.shape
    top, left, bottom, right = padding
    oh = (height + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (width + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    result = np.zeros((batch, out, oh, ow), dtype=object)
    for b, o, i, j in itertools.product(range(batch), range(out), range(oh), range(ow)):
        group = o // (out // groups)
        for c, p, q in itertools.product(range(per_group), range(kh), range(kw)):
            y, z = i * stride[0] + p * dilation[0] - top, j * stride[1] + q * dilation[1] - left
            if 0 <= y < height and 0 <= z < width:  # outside lies the value zero
                value = int(x[b, group * per_group + c, y, z]) - zero
                result[b, o, i, j] += value * (int(w[o, c, p, q]) - w_zero[o])
    return result


@settings(max_examples=25)
@given(
    m=st.integers(1, 4),
    k=st.integers(1, 9),
    n=st.integers(1, 4),
    zero=st.integers(-128, 127),
    unsigned=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_matmul_is_the_sum(m, k, n, zero, unsigned, seed):
    rng = np.random.default_rng(seed)
    lhs = codes(rng, (m, k), "uint8" if unsigned else "int8")
    rhs, rhs_zero = codes(rng, (k, n)), codes(rng, (n,))
    found = integer_matmul(lhs, rhs, zero, rhs_zero)
    assert found.dtype == np.int32
    assert found.tolist() == loop_matmul(lhs, rhs, zero, rhs_zero.tolist())


def test_matmul_is_batched_like_numpy():
    rng = np.random.default_rng(0)
    lhs, rhs = codes(rng, (2, 3, 4, 5)), codes(rng, (2, 3, 5, 6), "uint8")
    found = integer_matmul(lhs, rhs, 3, 7)
    assert found.shape == (2, 3, 4, 6)
    for b, h in itertools.product(range(2), range(3)):
        assert found[b, h].tolist() == loop_matmul(lhs[b, h], rhs[b, h], 3, [7] * 6)
    shared = integer_matmul(lhs, codes(rng, (5, 6)))
    assert shared.shape == (2, 3, 4, 6)


def test_four_bit_types_and_unsigned_codes_do_not_wrap():
    four = np.array([[-8, 7]]).astype(ml_dtypes.int4)
    assert integer_matmul(four, four.T, 7, -8).tolist() == [[(-8 - 7) * 0 + 0 * 15]]
    low = np.array([[0, 255]], dtype=np.uint8)
    assert integer_matmul(low, low.T, 255, 0).tolist() == [[-255 * 0 + 0 * 255]]
    assert integer_matmul(low, low.T, 255, 255).tolist() == [[255 * 255]]


def test_the_largest_sum_that_fits_and_the_first_that_does_not():
    # 255 * 255 * 33025 = 2147450625 <= 2**31 - 1 < 255 * 255 * 33026
    fits = np.full((1, 33025), 255, dtype=np.uint8)
    assert integer_matmul(fits, fits.T).item() == 255 * 255 * 33025
    over = np.full((1, 33026), 255, dtype=np.uint8)
    with pytest.raises(PlanError) as caught:
        integer_matmul(over, over.T)
    assert str(caught.value) == (
        "an accumulator over 33026 products overflows int32. Expected: sums within -2147483648 .. 2147483647. "
        "Found: 2147515650 .. 2147515650. Fix: use fewer bits for one operand of this layer, or per-block weights, "
        "which have shorter sums."
    )
    # A partial sum may leave int32 as long as the whole comes back.
    halves = np.concatenate([over, np.full((1, 33026), 255, dtype=np.uint8)], axis=1).astype(np.int16)
    signs = np.concatenate([np.full((33026, 1), 255), np.full((33026, 1), -255)]).astype(np.int16)
    assert integer_matmul(halves, signs).item() == 0


def test_sums_beyond_float64_are_taken_in_int64():
    # Codes are never this wide; the guard is what makes the use of BLAS safe. 2**53 + 1 is no float64.
    lhs = np.array([[1 << 27, 1, -(1 << 27)]], dtype=np.int64)
    rhs = np.array([[1 << 27], [1], [1 << 27]], dtype=np.int64)
    assert integer_matmul(lhs, rhs).item() == 1


@settings(max_examples=15)
@given(blocks=st.integers(1, 4), block=st.integers(1, 5), zero=st.integers(-8, 7), seed=st.integers(0, 2**16))
def test_blocks_are_slices_of_k(blocks, block, zero, seed):
    rng = np.random.default_rng(seed)
    k = blocks * block
    lhs, rhs = codes(rng, (2, 3, k)), codes(rng, (k, 4), bits=4)
    zero_points = codes(rng, (blocks, 4), bits=4)
    found = integer_matmul_blocks(lhs, rhs, block, zero, zero_points)
    assert found.shape == (blocks, 2, 3, 4)
    assert found.dtype == np.int32
    for i in range(blocks):
        part = slice(i * block, (i + 1) * block)
        for b in range(2):
            assert found[i, b].tolist() == loop_matmul(lhs[b][:, part], rhs[part], zero, zero_points[i].tolist())


def test_a_block_size_that_does_not_divide():
    with pytest.raises(PlanError, match=r"Expected: a multiple of 4\. Found: 6\."):
        integer_matmul_blocks(np.zeros((1, 6), np.int8), np.zeros((6, 2), np.int8), 4)


CONVOLUTIONS = {
    "plain": ((1, 1), (0, 0, 0, 0), (1, 1), 1),
    "patches": ((2, 2), (0, 0, 0, 0), (1, 1), 1),
    "padded": ((1, 2), (1, 0, 2, 1), (1, 1), 1),
    "dilated": ((1, 1), (2, 2, 2, 2), (2, 3), 1),
    "grouped": ((2, 1), (1, 1, 1, 1), (1, 1), 2),
    "depthwise": ((1, 1), (1, 1, 1, 1), (1, 1), 4),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv_is_the_sum(name):
    stride, padding, dilation, groups = CONVOLUTIONS[name]
    rng = np.random.default_rng(1)
    x, w = codes(rng, (2, 4, 6, 7), "uint8"), codes(rng, (8, 4 // groups, 2, 3))
    w_zero = codes(rng, (8,))
    found = integer_conv2d(x, w, 100, w_zero, stride=stride, padding=padding, dilation=dilation, groups=groups)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, loop_conv(x, w, 100, w_zero.tolist(), stride, padding, dilation, groups))


def test_conv_agrees_with_torch():
    import torch

    rng = np.random.default_rng(2)
    x, w = codes(rng, (2, 4, 9, 8)), codes(rng, (6, 2, 3, 3))
    found = integer_conv2d(x, w, stride=(2, 2), padding=(1, 1, 1, 1), groups=2)
    expected = torch.nn.functional.conv2d(
        torch.from_numpy(x).double(), torch.from_numpy(w).double(), stride=2, padding=1, groups=2
    )
    np.testing.assert_array_equal(found, expected.numpy())


def test_conv_overflow_is_named():
    x, w = np.full((1, 40000, 1, 1), 255, np.uint8), np.full((1, 40000, 1, 1), 255, np.uint8)
    with pytest.raises(PlanError, match="over 40000 products overflows int32"):
        integer_conv2d(x, w)


def test_patches_of_a_small_image():
    x = np.arange(4).reshape(1, 1, 2, 2)
    found = patches(x, (2, 2), (1, 1), (1, 0, 0, 0), (1, 1), 1)
    assert found.shape == (1, 1, 4, 2, 1)
    assert found[0, 0, :, 0, 0].tolist() == [0, 0, 0, 1]
    assert found[0, 0, :, 1, 0].tolist() == [0, 1, 2, 3]


def test_rescale_multiplies_the_scales_first():
    rng = np.random.default_rng(3)
    accumulators = rng.integers(-(2**20), 2**20, size=(64, 8)).astype(np.int32)
    left, right = np.float32(0.0123), rng.uniform(1e-4, 1e-2, 8).astype(np.float32)
    found = rescale(accumulators, left, right)
    assert found.dtype == np.float32
    for i, j in itertools.product(range(64), range(8)):
        assert found[i, j] == np.float32(accumulators[i, j]) * np.float32(left * right[j])
    other = (accumulators.astype(np.float32) * left) * right
    assert (other != found).any()  # so the order matters, and is worth stating
    np.testing.assert_allclose(other, found, rtol=3 * 2.0**-23)  # three roundings each


def test_rescale_of_a_convolution_and_of_tokens():
    accumulators = np.ones((2, 3, 2, 2), dtype=np.int32)
    right = np.array([1, 2, 4], dtype=np.float32)
    assert rescale(accumulators, np.float32(0.5), right, axis=1)[0, :, 0, 0].tolist() == [0.5, 1.0, 2.0]
    tokens = np.array([[[1.0], [3.0]]], dtype=np.float32)
    assert rescale(np.ones((1, 2, 3), np.int32), tokens, right).tolist() == [[[1, 2, 4], [3, 6, 12]]]


def test_rescale_blocks_adds_in_order():
    rng = np.random.default_rng(4)
    accumulators = rng.integers(-5000, 5000, size=(5, 2, 3, 4)).astype(np.int32)
    right = rng.uniform(1e-3, 1e-1, size=(5, 4)).astype(np.float32)
    expected = np.zeros((2, 3, 4), dtype=np.float32)
    for i in range(5):
        expected = expected + accumulators[i].astype(np.float32) * (np.float32(0.3) * right[i])
    assert rescale_blocks(accumulators, np.float32(0.3), right).tobytes() == expected.tobytes()


def test_the_product_equals_that_of_the_dequantized_values():
    rng = np.random.default_rng(5)
    lhs, rhs = codes(rng, (3, 4, 96), bits=4), codes(rng, (96, 8), bits=4)
    left, right = np.float32(0.05), rng.uniform(0.01, 0.1, 8).astype(np.float32)
    exact = (lhs.astype(np.float64) * np.float64(left)) @ (rhs * right.astype(np.float64))
    # Three FP32 roundings after an exact sum.
    np.testing.assert_allclose(rescale(integer_matmul(lhs, rhs), left, right), exact, rtol=3 * 2.0**-24, atol=1e-12)


def test_blas_and_int64_give_the_same_bits():
    rng = np.random.default_rng(6)
    lhs, rhs = codes(rng, (5, 37, 300)), codes(rng, (300, 41))
    expected = np.matmul(lhs.astype(np.int64), rhs.astype(np.int64))
    assert integer_matmul(lhs, rhs).tobytes() == expected.astype(np.int32).tobytes()
