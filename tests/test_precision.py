"""Precision names."""

from __future__ import annotations

import pytest

from s2d_deploy.errors import RecipeError
from s2d_deploy.precision import BASELINE, STANDARD, Precision, parse_precision


def test_the_standard_names_say_their_bits() -> None:
    bits = {"w8a8": (8, 8), "w4a16": (4, 16), "w4a8": (4, 8), "w4a4": (4, 4)}
    assert tuple(bits) == STANDARD
    for name, (weights, activations) in bits.items():
        assert parse_precision(name) == Precision(name, weights, activations)


@pytest.mark.parametrize("w", [2, 3, 4, 5, 6, 7, 8, 16])
@pytest.mark.parametrize("a", [2, 3, 4, 5, 6, 7, 8, 16])
def test_every_width_parses_in_any_case(w: int, a: int) -> None:
    if w == a == 16:
        with pytest.raises(RecipeError):
            parse_precision("w16a16")
    else:
        assert parse_precision(f"W{w}A{a}") == Precision(f"w{w}a{a}", w, a)


def test_four_bit_floats_are_precisions_of_their_own() -> None:
    assert parse_precision("NVFP4") == Precision("nvfp4", 4, 4, "nvfp4")
    assert parse_precision("mxfp4") == Precision("mxfp4", 4, 4, "mxfp4")
    assert parse_precision("nvfp4") != parse_precision("w4a4")


def test_names_are_canonical() -> None:
    assert parse_precision("W04a4").name == "w4a4"
    for name in ("fp32", "FP32", "float", "float32"):
        assert parse_precision(name) == Precision(BASELINE, 16, 16)


@pytest.mark.parametrize(
    "name",
    ["", "int8", "w4", "a4w4", "w1a8", "w9a9", "w4a32", "w4a4 ", "w٤a٤", "w-4a4", "w4a4\n", "w" + "4" * 5000 + "a4"],
)
def test_unknown_names_are_refused_with_the_key_and_what_exists(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_precision(name, "quantize.precisions")
    assert str(caught.value) == (
        f"quantize.precisions: unknown precision {name!r}. Expected: w8a8, w4a16, w4a8, w4a4, nvfp4, mxfp4, fp32, "
        "or w<bits>a<bits> with 2 to 8 bits (16: float)."
    )
