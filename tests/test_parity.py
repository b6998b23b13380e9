"""Comparisons against loops written here."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from s2d_deploy.errors import DataError
from s2d_deploy.parity import (
    SiteDifference,
    compare_accumulators,
    compare_codes,
    max_error,
    output_parity,
    snr_db,
    top1_flips,
)

floats = st.floats(-100, 100, width=32)


@settings(max_examples=60, deadline=None)
@given(arrays(np.float32, array_shapes(max_dims=3, max_side=4), elements=floats), st.integers(0, 2**31))
def test_snr_and_error_against_loops(reference, seed):
    other = (reference + np.random.default_rng(seed).normal(0, 0.1, reference.shape)).astype(np.float32)
    signal = sum(float(x) ** 2 for x in reference.ravel())
    noise = sum((float(x) - float(y)) ** 2 for x, y in zip(reference.ravel(), other.ravel(), strict=True))
    if signal > 1e-300:
        assert snr_db(reference, other) == pytest.approx(10 * math.log10(signal / noise), abs=1e-6)
    largest = max(abs(float(x) - float(y)) for x, y in zip(reference.ravel(), other.ravel(), strict=True))
    assert max_error(reference, other) == largest


def test_known_snr():
    assert snr_db(np.array([3.0, 4.0]), np.array([3.0, 4.5])) == pytest.approx(20.0)
    assert snr_db(np.ones(4), np.full(4, 1.001)) == pytest.approx(60.0)
    nothing = snr_db(np.zeros(2), np.ones(2))
    assert nothing is not None
    assert math.isfinite(nothing)
    assert nothing < -3000


def test_identical_arrays_are_representable_in_json():
    x = np.array([1.0, 2.0], dtype=np.float32)
    assert snr_db(x, x) is None
    document = output_parity(x, x.copy())
    assert document == {"snr_db": None, "max_error": 0.0, "identical": True}
    json.dumps(document, allow_nan=False)
    assert output_parity(x, x + 1)["identical"] is False


def test_float16_is_compared_in_float64():
    big = np.array([60000.0], dtype=np.float16)  # its square overflows float16 and the sum of two does, too
    assert snr_db(big, np.array([59968.0], dtype=np.float16)) == pytest.approx(20 * math.log10(60000 / 32), abs=1e-3)


def test_top1_flips_are_counted_by_row():
    reference = np.array([[0.1, 0.9], [0.8, 0.2], [0.5, 0.5]])
    assert top1_flips(reference, reference) == 0
    assert top1_flips(reference, reference[:, ::-1]) == 2  # a tie keeps its first entry
    assert top1_flips(np.zeros((2, 3, 4)), np.eye(4)[None, :3].repeat(2, 0)) == 4
    with pytest.raises(DataError, match="logits: no classes to compare"):
        top1_flips(np.float32(1), np.float32(1))


def test_codes_are_compared_by_value_and_site():
    expected = {
        "fc1.input": np.array([[-8, 7], [0, 1]], np.int8),
        "probs": np.array([200, 15], np.uint8),
        "unseen": np.zeros(3, np.int8),
    }
    actual = {
        "fc1.input": np.array([[-8, 7], [1, -1]], np.int8),
        "probs": np.array([200, 15], np.int16),
        "extra": np.zeros(1, np.int8),
    }
    result = compare_codes(expected, actual)
    assert result.sites == (SiteDifference("fc1.input", 4, 2, 2), SiteDifference("probs", 2, 0, 0))
    assert (result.checked, result.different) == (6, 2)
    assert result.missing == ("unseen",)
    assert result.unexpected == ("extra",)
    first = result.first_difference()
    assert first is not None
    assert first.name == "fc1.input"
    assert result.to_dict()[0] == {"site": "fc1.input", "checked": 4, "different": 2, "largest": 2}
    assert compare_codes(expected, expected).first_difference() is None


def test_bytes_do_not_wrap():
    result = compare_codes({"a": np.array([-128], np.int8)}, {"a": np.array([127], np.int8)})
    assert result.sites == (SiteDifference("a", 1, 1, 255),)
    extremes = np.array([-(2**31), 2**31 - 1], np.int32)
    assert compare_accumulators({"a": extremes}, {"a": extremes[::-1]}).sites[0].largest == 2**32 - 1


@settings(max_examples=50, deadline=None)
@given(arrays(np.int32, (3, 5)), arrays(np.int32, (3, 5)))
def test_accumulators_against_a_loop(expected, actual):
    result = compare_accumulators({"fc": expected}, {"fc": actual})
    pairs = [(int(x), int(y)) for x, y in zip(expected.ravel(), actual.ravel(), strict=True)]
    different = sum(x != y for x, y in pairs)
    assert result.sites == (SiteDifference("fc", 15, different, max(abs(x - y) for x, y in pairs)),)


def test_nothing_shown_is_nothing_checked():
    result = compare_codes({"a": np.zeros(3, np.int8)}, {})
    assert (result.checked, result.different, result.missing) == (0, 0, ("a",))
    empty = compare_codes({"a": np.zeros((0, 4), np.int8)}, {"a": np.zeros((0, 4), np.int8)})
    assert empty.sites == (SiteDifference("a", 0, 0, 0),)
    assert max_error(np.zeros(0), np.zeros(0)) == 0.0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: snr_db(np.zeros(2), np.zeros(3)), "output: the shapes differ. Expected: (2,). Found: (3,)."),
        (lambda: snr_db(np.zeros((2, 1)), np.zeros((1, 2))), "Expected: (2, 1). Found: (1, 2)."),
        (
            lambda: max_error(np.zeros((2, 2)), np.array([[0, 1], [math.nan, math.inf]]), name="pooled"),
            "pooled: the runtime's values are not all finite. Expected: finite numbers. "
            "Found: 2 of 4 NaN or infinite, first nan at (1, 0).",
        ),
        (lambda: top1_flips(np.array([[math.inf, 0]]), np.zeros((1, 2))), "logits: the reference's values are not all"),
        (
            lambda: compare_codes({"fc.input": np.zeros(2, np.int8)}, {"fc.input": np.zeros(3, np.int8)}),
            "site 'fc.input': the shapes differ. Expected: (2,). Found: (3,).",
        ),
        (
            lambda: compare_accumulators({"fc": np.zeros(2, np.int32)}, {"fc": np.zeros(2, np.float32)}),
            "op 'fc': the runtime's values are not integers. Expected: an integer array (4-bit codes unpacked "
            "to int8 or uint8). Found: float32.",
        ),
    ],
)
def test_messages(call, words):
    with pytest.raises(DataError) as caught:
        call()
    assert words in str(caught.value)
