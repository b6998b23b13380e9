"""Grids: which codes exist, which elements share a scale, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest

from s2d_deploy.errors import PlanError
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor, PerToken

# Written out by hand: bits -> (signed range, narrow range, unsigned range).
RANGES = {
    2: ((-2, 1), (-1, 1), (0, 3)),
    3: ((-4, 3), (-3, 3), (0, 7)),
    4: ((-8, 7), (-7, 7), (0, 15)),
    5: ((-16, 15), (-15, 15), (0, 31)),
    6: ((-32, 31), (-31, 31), (0, 63)),
    7: ((-64, 63), (-63, 63), (0, 127)),
    8: ((-128, 127), (-127, 127), (0, 255)),
}


@pytest.mark.parametrize("bits", RANGES)
def test_the_codes_that_exist(bits):
    signed, narrow, unsigned = RANGES[bits]
    assert (Grid(bits).qmin, Grid(bits).qmax) == signed
    assert (Grid(bits, narrow=True).qmin, Grid(bits, narrow=True).qmax) == narrow
    assert (Grid(bits, signed=False).qmin, Grid(bits, signed=False).qmax) == unsigned


@pytest.mark.parametrize("bits", RANGES)
def test_storage_is_the_smallest_container(bits):
    width = 4 if bits <= 4 else 8
    assert Grid(bits).storage == f"INT{width}"
    assert Grid(bits, signed=False).storage == f"UINT{width}"
    assert Grid(bits).bytes_per_code == width / 8


@pytest.mark.parametrize(
    ("granularity", "shape", "expected"),
    [
        (PerTensor(), (3, 5), ()),
        (PerTensor(), (), ()),
        (PerAxis(0), (3, 5), (3,)),
        (PerAxis(-1), (3, 5), (5,)),
        (PerAxis(0), (8, 4, 3, 3), (8,)),
        (PerToken(), (2, 7, 5), (2, 7, 1)),
        (PerBlock(1, 4), (3, 8), (3, 2)),
        (PerBlock(-1, 8), (3, 8), (3, 1)),
        (PerBlock(0, 2), (4, 8), (2, 8)),
    ],
)
def test_scale_shapes(granularity, shape, expected):
    assert Grid(8, granularity=granularity).scale_shape(shape) == expected


def test_only_token_grids_are_dynamic():
    assert Grid(8, granularity=PerToken()).dynamic
    assert not any(Grid(8, granularity=g).dynamic for g in (PerTensor(), PerAxis(0), PerBlock(1, 4)))


@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerToken(), PerBlock(1, 32)])
@pytest.mark.parametrize("signed", [True, False])
def test_a_grid_survives_json(granularity, signed):
    grid = Grid(5, signed=signed, narrow=signed, granularity=granularity, scale_rule="qmin" if signed else "qmax")
    assert Grid.from_dict(json.loads(json.dumps(grid.to_dict()))) == grid


def test_a_grid_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Grid(8).bits = 4
    assert len({Grid(8), Grid(8), Grid(4)}) == 2


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Grid(1), "Grid.bits is out of range. Expected: 2 to 8. Found: 1."),
        (lambda: Grid(9), "Grid.bits is out of range. Expected: 2 to 8. Found: 9."),
        (
            lambda: Grid(8, signed=False, narrow=True),
            "Grid.narrow needs a signed grid. Fix: drop narrow, or set signed.",
        ),
        (lambda: Grid(8, symmetric=False, granularity=PerToken()), "a per-token grid must be symmetric."),
        (lambda: Grid(8, granularity=PerAxis(2)).scale_shape((3, 4)), "axis 2 does not exist. Found: shape (3, 4)."),
        (
            lambda: Grid(4, granularity=PerBlock(1, 32)).scale_shape((8, 50)),
            "width not divisible by the block size. Expected: a multiple of 32 along axis 1. Found: 50 in shape",
        ),
        (lambda: Grid.from_dict({"bits": 4}), "not a Grid. Found: {'bits': 4} ('granularity')."),
        (lambda: Grid.from_dict({"bits": 4, "granularity": {"kind": "spiral"}}), "not a Grid. Found: "),
        (lambda: Grid.from_dict({"bits": 4, "granularity": {"kind": "axis", "axle": 1}}), "not a Grid. Found: "),
    ],
)
def test_what_is_refused(make, text):
    with pytest.raises(PlanError) as caught:
        make()
    assert str(caught.value).startswith(text)
