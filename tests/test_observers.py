"""Histograms and scales against slow references on the raw values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2d_deploy.errors import DataError, PlanError
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerToken
from s2d_deploy.observers import HALF_BINS, Histogram, activation_parameters, entropy_limit, weight_parameters


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def heavy(*shape: int, seed: int = 0) -> torch.Tensor:
    """Values with outliers: a normal, cubed."""
    return normal(*shape, seed=seed) ** 3


def observed(*parts: torch.Tensor) -> Histogram:
    h = Histogram()
    for part in parts:
        h.update(part)
    return h


def fake(x: float, scale: float, zero_point: int, grid: Grid) -> float:
    code = min(max(round(x / scale) + zero_point, grid.qmin), grid.qmax)
    return (code - zero_point) * scale


def squared_error(values: list[float], scale: float, zero_point: int, grid: Grid) -> float:
    return sum((fake(v, scale, zero_point, grid) - v) ** 2 for v in values)


# ---- histogram ----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    st.lists(
        st.floats(-(2.0**60), 2.0**60, width=32).filter(lambda v: v == 0 or abs(v) > 2.0**-90), min_size=1, max_size=40
    ),
    st.integers(1, 7),
)
def test_the_counts_do_not_depend_on_how_the_stream_was_cut(values: list[float], size: int) -> None:
    x = torch.tensor(values)
    whole, cut = observed(x), observed(*x.split(size))
    assert torch.equal(whole.counts, cut.counts)
    assert (whole.limit, whole.low, whole.high, whole.total) == (cut.limit, cut.low, cut.high, cut.total)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_growing_stream_ends_with_the_counts_of_the_whole(size: int) -> None:
    x = heavy(500) * torch.logspace(-3, 4, 500)
    whole, cut = observed(x), observed(*x.split(size))
    assert cut.limit > 1000 * observed(x[:size]).limit
    assert torch.equal(whole.counts, cut.counts)


@settings(max_examples=30)
@given(st.lists(st.floats(-1e6, 1e6, width=32).filter(lambda v: v == 0 or abs(v) > 1e-6), min_size=1, max_size=60))
def test_every_value_lies_in_the_bin_that_a_loop_finds(values: list[float]) -> None:
    h = observed(torch.tensor(values))
    width = (h.limit or 1.0) / HALF_BINS
    expected: dict[int, int] = {}
    for v in values:
        index = math.floor(v / width) + HALF_BINS
        expected[index] = expected.get(index, 0) + 1
    found = {int(i): int(h.counts[i]) for i in h.counts.nonzero().flatten()}
    assert found == expected
    assert (h.low, h.high) == (min(values), max(values))  # exact, not to one bin
    assert h.absmax == max(abs(v) for v in values)


def test_the_limit_grows_by_powers_of_two() -> None:
    h = Histogram()
    limits = []
    for value in (0.0, 0.75, 1.0, -3.0, 4.0, 100.0):
        h.update(torch.tensor([value]))
        limits.append(h.limit)
    assert limits == [0.0, 1.0, 2.0, 4.0, 8.0, 128.0]
    assert int(h.counts.sum()) == h.total == 6


def test_the_bins_are_as_fine_as_promised() -> None:
    """1/16384 to 1/8192 of the largest magnitude."""
    for largest in (1.0, 1.5, 1.999, 37.0, 1e-6):
        h = observed(torch.tensor([largest]))
        share = h.limit / HALF_BINS / largest
        assert share * (1 + 1e-6) >= 1 / 16384
        assert share <= 1 / 8192 * (1 + 1e-6)


def test_memory_does_not_grow_with_the_data() -> None:
    h = Histogram()
    for seed in range(20):
        h.update(heavy(500, seed=seed) * 10.0**seed)
    assert h.counts.numel() * h.counts.element_size() == 256 * 1024
    assert h.total == 10_000


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_named(bad: float) -> None:
    with pytest.raises(
        DataError, match=r"^fc1\.input: 2 of 3 observed values are NaN or infinite\. Expected: finite activations\."
    ):
        Histogram().update(torch.tensor([bad, 1.0, bad]), "fc1.input")


def test_values_far_below_one_are_kept_apart_from_zero_magnitude() -> None:
    """Bins narrower than FP32 can divide by would send every value to the edge."""
    h = observed(torch.tensor([1e-40, -1e-44, 0.0]))
    assert h.percentile(100) == h.absmax == float(torch.tensor(1e-40))
    assert int(h.counts[HALF_BINS - 1 : HALF_BINS + 1].sum()) == 3


def test_moments_match_numpy() -> None:
    x = heavy(3000)
    h = observed(*x.split(70))
    exact = x.double().numpy()
    centred = exact - exact.mean()
    assert h.std == pytest.approx(float(exact.std()), rel=1e-9)
    assert h.kurtosis == pytest.approx(float((centred**4).mean() / (centred**2).mean() ** 2), rel=1e-9)
    assert observed(torch.full((1000,), 0.1)).kurtosis == 0.0
    assert observed(torch.zeros(5)).kurtosis == 0.0
    assert Histogram().absmax == 0.0


@pytest.mark.parametrize("percent", [60.0, 90.0, 99.0, 99.9, 99.99, 100.0])
def test_the_percentile_equals_sorting_to_one_bin(percent: float) -> None:
    x = heavy(10_000)
    h = observed(*x.split(333))
    magnitudes = sorted(abs(v) for v in x.tolist())
    exact = magnitudes[math.ceil(len(magnitudes) * percent / 100 - 1e-9) - 1]
    assert exact <= h.percentile(percent) <= exact + h.limit / HALF_BINS
    assert sum(m <= h.percentile(percent) for m in magnitudes) >= len(magnitudes) * percent / 100 - 1e-6


# ---- activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_absmax_divides_the_exact_extreme(bits: int) -> None:
    x = heavy(500)
    top = float(x.abs().max())
    scale, zero_point = activation_parameters(observed(x), Grid(bits), "absmax")
    assert float(scale) == np.float32(top / (2 ** (bits - 1) - 1))
    assert int(zero_point) == 0
    wider, _ = activation_parameters(observed(x), Grid(bits, scale_rule="qmin"), "absmax")
    assert float(wider) == np.float32(top / 2 ** (bits - 1))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_mse_scale_is_as_good_as_the_best_of_a_brute_force_on_raw_values(bits: int) -> None:
    """The histogram knows a value to one bin, so its choice may lose a little against the raw values: below 1 %."""
    x = heavy(400)
    grid = Grid(bits)
    scale, _ = activation_parameters(observed(x), grid, "mse")
    values, top = x.tolist(), float(x.abs().max())
    errors = [squared_error(values, top * r / grid.qmax, 0, grid) for r in np.linspace(1.0, 0.02, 197)]
    chosen = squared_error(values, float(scale), 0, grid)
    assert chosen <= min(errors) * 1.01
    if bits == 4:  # the search must have found something better than covering everything
        assert chosen < errors[0]


def test_the_affine_zero_point_represents_zero_exactly_and_covers_the_range() -> None:
    grid = Grid(8, signed=True, symmetric=False)
    x = torch.tensor([-0.17, 0.0, 10.0])
    scale, zero_point = activation_parameters(observed(x), grid, "absmax")
    assert float(scale) == np.float32((10.0 - float(x[0])) / 255)
    assert int(zero_point) == round(-128 - float(x[0]) / float(scale))
    assert fake(0.0, float(scale), int(zero_point), grid) == 0.0
    for v in x.tolist():
        assert abs(fake(v, float(scale), int(zero_point), grid) - v) <= float(scale) * 0.5 * (1 + 1e-5)


@pytest.mark.parametrize("low", [3.0, 0.0])
def test_an_affine_range_always_contains_zero(low: float) -> None:
    grid = Grid(8, signed=False, symmetric=False)
    scale, zero_point = activation_parameters(observed(torch.tensor([low, 5.0])), grid, "absmax")
    assert (float(scale), int(zero_point)) == (np.float32(5 / 255), 0)


@pytest.mark.parametrize("method", ["percentile", "mse"])
def test_clipping_a_skewed_range_leaves_its_short_side_whole(method: str) -> None:
    """GELU's range: -0.17 to some outlier. Shrinking both ends alike would clip every negative value."""
    x = torch.cat([torch.full((200,), -0.17), normal(9000).abs(), torch.tensor([60.0])])
    grid = Grid(4, signed=False, symmetric=False)
    scale, zero_point = activation_parameters(observed(x), grid, method, 99.9)  # type: ignore[arg-type]
    assert (grid.qmax - int(zero_point)) * float(scale) < 30
    assert (grid.qmin - int(zero_point)) * float(scale) <= -0.17 + float(scale) / 2


def test_percentile_scales_cover_the_promised_share() -> None:
    x = heavy(10_000)
    scale, _ = activation_parameters(observed(x), Grid(8), "percentile", 99.0)
    assert 0.99 <= float((x.abs() <= float(scale) * 127).float().mean()) < 0.992


def test_an_unsigned_symmetric_grid_serves_probabilities_only() -> None:
    grid = Grid(4, signed=False)
    scale, zero_point = activation_parameters(observed(torch.tensor([0.0, 0.9])), grid, "absmax")
    assert float(scale) == np.float32(float(torch.tensor(0.9)) / 15)
    assert int(zero_point) == 0
    with pytest.raises(PlanError, match=r"an unsigned symmetric grid needs non-negative values\. Found: minimum -0\.5"):
        activation_parameters(observed(torch.tensor([-0.5, 0.9])), grid, "absmax")


@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
@pytest.mark.parametrize("grid", [Grid(8), Grid(8, signed=False), Grid(8, symmetric=False)])
@pytest.mark.parametrize("value", [0.0, 1e-44])
def test_a_site_of_zeros_has_scale_one(method: str, grid: Grid, value: float) -> None:
    scale, zero_point = activation_parameters(observed(torch.full((9,), value)), grid, method)  # type: ignore[arg-type]
    assert (float(scale), int(zero_point)) == (1.0, 0)
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32


def test_nothing_observed_and_wrong_granularity_are_refused() -> None:
    with pytest.raises(DataError, match=r"no activations were observed\. Fix: give at least one calibration sample"):
        activation_parameters(Histogram(), Grid(8), "mse")
    with pytest.raises(PlanError, match=r"a stored activation scale is per tensor\. Found: token"):
        activation_parameters(observed(torch.ones(1)), Grid(8, granularity=PerToken()), "mse")


# ---- weights ------------------------------------------------------------------------------------------------


def weight_groups(w: torch.Tensor, grid: Grid) -> list[list[float]]:
    """Members of each scale, in the order of the flattened scale tensor, by loops."""
    if isinstance(grid.granularity, PerAxis):
        return [row.flatten().tolist() for row in w]
    if isinstance(grid.granularity, PerBlock):
        size = grid.granularity.size
        return [row[i : i + size].tolist() for row in w for i in range(0, w.shape[1], size)]
    return [w.flatten().tolist()]


GRIDS = [
    Grid(4),
    Grid(4, granularity=PerAxis(0)),
    Grid(8, narrow=True, granularity=PerAxis(0)),
    Grid(4, granularity=PerBlock(1, 8)),
]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", ["absmax", "percentile", "mse"])
def test_weight_scales_equal_loops_over_their_groups(grid: Grid, method: str) -> None:
    w = heavy(5, 24, seed=3)
    scale, zero_point = weight_parameters(w, grid, method, 80.0)  # type: ignore[arg-type]
    assert scale.shape == zero_point.shape == grid.scale_shape((5, 24))
    assert not zero_point.any()
    for found, group in zip(scale.flatten().tolist(), weight_groups(w, grid), strict=True):
        magnitudes = sorted(abs(v) for v in group)
        if method == "absmax":
            assert found == np.float32(np.float32(magnitudes[-1]) / np.float32(grid.qmax))
        elif method == "percentile":
            exact = magnitudes[math.ceil(len(group) * 0.8 - 1e-9) - 1]
            assert found == np.float32(np.float32(exact) / np.float32(grid.qmax))
        else:
            errors = [squared_error(group, magnitudes[-1] / grid.qmax * r, 0, grid) for r in np.linspace(1, 0.3, 71)]
            assert squared_error(group, found, 0, grid) <= min(errors) * (1 + 1e-4)  # FP32 sums against float64


def test_an_all_zero_channel_has_scale_one_and_its_neighbours_do_not_change() -> None:
    w = normal(3, 16)
    w[1] = 0
    for method in ("absmax", "percentile", "mse"):
        scale, _ = weight_parameters(w, Grid(4, granularity=PerAxis(0)), method)  # type: ignore[arg-type]
        alone, _ = weight_parameters(w[2:], Grid(4, granularity=PerAxis(0)), method)  # type: ignore[arg-type]
        assert float(scale[1]) == 1.0
        assert float(scale[2]) == float(alone[0])
        assert float(scale[0]) < 1.0


def test_a_sparse_channel_keeps_its_values_under_percentile() -> None:
    w = torch.zeros(1, 100)
    w[0, 3] = 0.7
    scale, _ = weight_parameters(w, Grid(4, granularity=PerAxis(0)), "percentile", 90.0)
    assert float(scale[0]) == np.float32(np.float32(0.7) / np.float32(7))


def test_conv_weights_have_one_scale_for_each_output_channel() -> None:
    w = heavy(4, 3, 2, 2)
    scale, _ = weight_parameters(w, Grid(8, narrow=True, granularity=PerAxis(0)), "absmax")
    assert scale.tolist() == [float(c.abs().max() / 127) for c in w]


def test_weights_that_cannot_be_quantized_are_refused() -> None:
    w = normal(4, 10)
    with pytest.raises(
        PlanError, match=r"width not divisible by the block size.*a multiple of 4 along axis 1.*Found: 10"
    ):
        weight_parameters(w, Grid(4, granularity=PerBlock(1, 4)), "absmax")
    for grid in (Grid(4, symmetric=False), Grid(4, signed=False), Grid(4, granularity=PerToken())):
        with pytest.raises(PlanError, match="weights are quantized with stored, symmetric, signed scales"):
            weight_parameters(w, grid, "absmax")
    w[0, 0] = math.nan
    with pytest.raises(DataError, match=r"1 weights are NaN or infinite\. Fix: use a sound checkpoint"):
        weight_parameters(w, Grid(4), "absmax")


@settings(max_examples=15)
@given(st.integers(2, 8), st.sampled_from(["absmax", "percentile", "mse"]), st.floats(1e-30, 1e30))
def test_scales_are_positive_finite_and_repeatable(bits: int, method: str, magnitude: float) -> None:
    w = normal(3, 8) * magnitude
    for grid in (Grid(bits), Grid(bits, granularity=PerAxis(0))):
        first, second = (weight_parameters(w, grid, method)[0] for _ in range(2))  # type: ignore[arg-type]
        assert torch.equal(first, second)
        assert bool((torch.isfinite(first) & (first > 0)).all())
    scale, _ = activation_parameters(observed(w), Grid(bits), method)  # type: ignore[arg-type]
    assert 0 < float(scale) < math.inf


# ---- entropy ------------------------------------------------------------------------------------------------


def migacz(counts: list[int], width: float, codes: int, absmax: float, candidates: list[int]) -> float:
    """The slides, bin by bin: P with outliers in its last bin against Q merged and spread again."""
    best, least = len(counts), math.inf
    for i in candidates:
        p = [float(c) for c in counts[:i]]
        q = [0.0] * i
        runs: dict[int, list[int]] = {}
        for j in range(i):
            runs.setdefault(j * codes // i, []).append(j)
        for run in runs.values():
            filled = [j for j in run if counts[j] > 0]
            for j in filled:
                q[j] = sum(counts[k] for k in run) / len(filled)
        total, of_q = float(sum(counts)), sum(q)
        p[-1] += sum(counts[i:])
        divergence = 0.0
        for a, b in zip(p, q, strict=True):
            if a > 0:
                divergence += math.inf if b == 0 else a / total * math.log((a / total) / (b / of_q))
        if divergence < least - 1e-12:
            best, least = i, divergence
    return min((best + 0.5) * width, absmax)


@pytest.mark.parametrize(
    ("signed", "bits", "kind"), [(True, 8, "normal"), (True, 4, "outliers"), (False, 4, "normal"), (True, 6, "gap")]
)
def test_the_entropy_limit_is_that_of_the_slides(signed: bool, bits: int, kind: str) -> None:
    x = {"normal": normal(4000), "outliers": heavy(4000), "gap": torch.cat([normal(900), torch.tensor([30.0] * 40)])}[
        kind
    ]
    x = x if signed else x.abs()
    h = observed(x)
    grid = Grid(bits, signed=signed)
    # At most 2048 bins of equal width that cover the largest magnitude, from the values themselves.
    merge = math.ceil((int(h.absmax / (h.limit / HALF_BINS)) + 1) / 2048)
    width = h.limit / HALF_BINS * merge
    bins = math.ceil((int(h.absmax / (h.limit / HALF_BINS)) + 1) / merge)
    counts = [0] * bins
    for v in x.abs().double().tolist():
        counts[min(int(v / width), bins - 1)] += 1
    codes = grid.qmax + 1
    candidates = sorted({round(c) for c in np.linspace(codes, bins, min(512, bins - codes + 1)).tolist()})
    expected = migacz(counts, width, codes, h.absmax, candidates)
    assert entropy_limit(h, grid) == pytest.approx(expected, rel=1e-9)
    scale, zero_point = activation_parameters(h, grid, "entropy")
    assert float(scale) == pytest.approx(expected / grid.qmax, rel=1e-6)
    assert int(zero_point) == 0


@settings(max_examples=20)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40), st.integers(2, 8))
def test_the_entropy_limit_lies_within_what_was_seen(values: list[float], bits: int) -> None:
    h = observed(torch.tensor(values))
    scale, _ = activation_parameters(h, Grid(bits), "entropy")
    assert 0 < float(scale) <= max(h.absmax / Grid(bits).qmax, 1.0) * (1 + 1e-6)


def test_entropy_is_refused_where_it_has_no_meaning() -> None:
    with pytest.raises(PlanError, match=r"one limit for magnitudes.*Found: int4 with a zero point. Fix: set quantize"):
        activation_parameters(observed(normal(9)), Grid(4, symmetric=False), "entropy")
    with pytest.raises(PlanError, match=r"one limit for magnitudes.*Found: log2-4\."):
        activation_parameters(observed(normal(9).abs()), Grid(4, signed=False, format="log2"), "entropy")
    with pytest.raises(
        PlanError, match=r"unknown weight range method. Expected: absmax, percentile, mse. Found: entropy"
    ):
        weight_parameters(normal(4, 4), Grid(4, granularity=PerAxis(0)), "entropy")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["log2", "logsqrt2"])
def test_a_logarithmic_scale_has_the_least_squared_error_of_its_candidates(name: str) -> None:
    x = torch.softmax(normal(64, 32) * 3, dim=-1)
    h, grid = observed(x), Grid(4, signed=False, format=name)  # type: ignore[arg-type]

    def error(scale: float) -> float:
        base = 2.0 if name == "log2" else math.sqrt(2.0)
        total = 0.0
        for v in x.flatten().double().tolist():
            code = min(max(round(-math.log(v / scale, base)), 0), 15)
            total += ((0.0 if code == 15 else scale * base**-code) - v) ** 2
        return total

    best, _ = activation_parameters(h, grid, "mse")
    plain, _ = activation_parameters(h, grid, "absmax")
    assert float(plain) == h.absmax
    assert error(float(best)) <= error(float(plain)) * 1.001
    assert 0 < float(best) <= float(plain)
