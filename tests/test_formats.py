"""FP4, logarithmic and twin grids against enumerations of their codes, against ml_dtypes, and their refusals."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d_deploy import formats
from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import PlanError, RecipeError, UnsupportedError
from s2d_deploy.fake_quant import FakeQuantizer, dequantize, quantize, token_scale
from s2d_deploy.grid import Grid, PerAxis, PerBlock, PerTensor, PerTokenBlock
from s2d_deploy.observers import weight_parameters, weight_tensor_scale
from s2d_deploy.plan import Op, Plan, Site
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.simulation import simulate

E2M1 = Grid(4, format="e2m1")
NVFP4 = Grid(4, format="e2m1", scale_format="e4m3", granularity=PerBlock(1, 16))
MXFP4 = Grid(4, format="e2m1", scale_format="e8m0", granularity=PerBlock(1, 32))
ONE, ZERO = torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)
# Sign, exponent (bias 1), mantissa of the 16 patterns, by the definition of the format.
VALUES = [
    (-1) ** (c >> 3)
    * (Fraction(c & 1, 2) if (c >> 1) & 3 == 0 else Fraction(2) ** (((c >> 1) & 3) - 1) * (1 + Fraction(c & 1, 2)))
    for c in range(16)
]


def nearest(x: Fraction) -> int:
    """The E2M1 pattern nearest to x by looking at all of them; a tie goes to the even pattern."""
    side = range(8) if x >= 0 else range(8, 16)
    return min(side, key=lambda c: (abs(VALUES[c] - x), c & 1))


def every_e4m3() -> Tensor:
    """All positive finite E4M3 numbers."""
    values = np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert (values[0], values[-1]) == (2.0**-9, 448)
    return torch.from_numpy(values)


# ---- E2M1 ------------------------------------------------------------------------------------------------------


def test_the_sixteen_values_are_those_of_the_format() -> None:
    codes = torch.arange(16, dtype=torch.int32)
    assert formats.decode(codes, E2M1).tolist() == [float(v) for v in VALUES]
    reference = np.arange(16, dtype=np.uint8).astype(np.uint8).view(np.uint8)
    assert formats.decode(codes, E2M1).tolist() == reference.view(ml_dtypes.float4_e2m1fn).astype(np.float32).tolist()
    assert torch.equal(formats.encode(formats.decode(codes, E2M1), E2M1), codes)  # the two zeros too


def test_every_tie_and_its_neighbours_round_to_the_even_pattern() -> None:
    magnitudes = [float(v) for v in VALUES[:8]]
    ties = [(a + b) / 2 for a, b in itertools.pairwise(magnitudes)]
    x = torch.tensor(sorted({*magnitudes, *ties, 7.0, 8.0, 1e30}))
    x = torch.cat([x, torch.nextafter(x, torch.tensor(math.inf)), torch.nextafter(x, torch.tensor(-math.inf))])
    x = torch.cat([x, -x])
    expected = [nearest(Fraction(v)) for v in x.tolist()]
    expected = [c if v != 0 or math.copysign(1, v) > 0 else 8 for c, v in zip(expected, x.tolist(), strict=True)]
    assert formats.encode(x, E2M1).tolist() == expected
    clipped = x.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)  # it does not saturate by itself
    assert formats.encode(x, E2M1).tolist() == clipped.tolist()


@settings(max_examples=100)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=16))
def test_any_float_gets_the_code_of_the_enumeration(values: list[float]) -> None:
    codes = formats.encode(torch.tensor(values), E2M1).tolist()
    assert [VALUES[c] for c in codes] == [VALUES[nearest(Fraction(v))] for v in values]


# ---- scales ----------------------------------------------------------------------------------------------------


def test_every_code_at_every_e4m3_block_scale_is_kept_bit_for_bit() -> None:
    """All 16 codes x all 126 block scales x awkward tensor scales."""
    block = every_e4m3()
    values = formats.decode(torch.arange(16), E2M1)  # with its two zeros
    for absmax in (1.0, 3.14159, 1e-3, 777.7, 6 * 448.0):
        of_tensor = formats.tensor_scale(torch.tensor(absmax))
        scale = block * of_tensor
        # The product is exact, so every order of multiplication gives one result.
        assert scale.double().tolist() == (block.double() * of_tensor.double()).tolist()
        assert formats.representable(scale, NVFP4, of_tensor)
        assert torch.equal((values[:, None] * block) * of_tensor, values[:, None] * scale)
        x = values.repeat(len(block), 1) * scale[:, None]  # (126, 16): one block in each row
        codes = quantize(x, scale[:, None], torch.zeros(len(block), 1, dtype=torch.int32), NVFP4)
        assert torch.equal(codes, torch.arange(16, dtype=torch.int32).expand(len(block), 16))
        assert torch.equal(dequantize(codes, scale[:, None], ZERO, NVFP4), x)


def test_block_scales_are_the_nearest_e4m3_numbers() -> None:
    of_tensor = formats.tensor_scale(torch.tensor(10.0))
    absmax = torch.linspace(1e-6, 10.0, 5001)
    found = formats.block_scale(absmax, NVFP4, of_tensor)
    quotient = (absmax / (6.0 * of_tensor)).numpy()
    expected = np.clip(quotient, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert torch.equal(found, torch.from_numpy(expected) * of_tensor)
    assert float(formats.block_scale(torch.tensor(0.0), NVFP4, of_tensor)) == float(of_tensor)
    # Run-time blocks beyond what was calibrated saturate at 448.
    assert float(formats.block_scale(torch.tensor(1e6), NVFP4, of_tensor)) == 448 * float(of_tensor)


def test_the_tensor_scale_covers_the_tensor_in_twenty_bits() -> None:
    for absmax in (1e-30, 1e-3, 0.1, 1.0, 3.3, 1e6):
        scale = formats.tensor_scale(torch.tensor(absmax))
        exact = Fraction(float(np.float32(absmax))) / 2688
        assert 0 <= Fraction(float(scale)) / max(exact, Fraction(2) ** -100) - 1 <= Fraction(1, 2**19)
        assert (math.frexp(float(scale))[0] * 2**20).is_integer()
    assert float(formats.tensor_scale(torch.tensor(0.0))) == 1.0


@pytest.mark.parametrize(
    ("absmax", "exponent"),
    [
        (1.0, -2), (1.9999, -2), (2.0, -1), (6.0, 0), (7.9, 0), (8.0, 1), (0.75, -3), (3e38, 125),
        (2.0**-125, -127), (2.0**-126, -127), (1e-44, -127), (0.0, 0),
    ],
)  # fmt: skip
def test_mx_scales_follow_the_rule_of_the_standard(absmax: float, exponent: int) -> None:
    scale = formats.block_scale(torch.tensor(absmax), MXFP4)
    assert float(scale) == 2.0**exponent
    assert formats.representable(scale, MXFP4, None)
    assert float(np.float32(2.0**exponent).astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)) == float(scale)


@pytest.mark.parametrize("grid", [NVFP4, MXFP4])
@pytest.mark.parametrize("method", ["absmax", "mse"])
def test_weights_against_a_loop_over_blocks(grid: Grid, method: str) -> None:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(5, 64, generator=g) ** 3
    w[2, 16:48] = 0
    scale, zero_point = weight_parameters(w, grid, method)  # type: ignore[arg-type]
    of_tensor = weight_tensor_scale(w, grid)
    size = grid.granularity.size  # type: ignore[union-attr]
    fake = dequantize(quantize(w, scale, zero_point, grid), scale, zero_point, grid)
    error = 0.0
    for i, b in itertools.product(range(5), range(64 // size)):
        block = w[i, b * size : (b + 1) * size]
        s = float(scale[i, b])
        expected = [
            float(np.float32(VALUES[nearest(Fraction(float(v / np.float32(s))))]) * np.float32(s))
            for v in block.numpy()
        ]
        assert fake[i, b * size : (b + 1) * size].tolist() == expected
        if method == "absmax":
            assert s == float(formats.block_scale(block.abs().max(), grid, of_tensor))
        standard = formats.block_scale(block.abs().max(), grid, of_tensor)
        rounded = formats.decode(formats.encode(block / standard, grid), grid) * standard
        error += float((rounded - block).square().sum() - (torch.tensor(expected) - block).square().sum())
    assert error >= -1e-6 if method == "mse" else error == 0
    again = dequantize(quantize(fake, scale, zero_point, grid), scale, zero_point, grid)
    assert torch.equal(again, fake)


@settings(max_examples=40)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32, allow_subnormal=False), min_size=32, max_size=32),
    st.sampled_from(["e4m3", "e8m0"]),
)
def test_run_time_blocks_are_bounded_by_their_step(values: list[float], scale_format: str) -> None:
    x = torch.tensor(values).reshape(1, 32)
    size = 16 if scale_format == "e4m3" else 32
    grid = Grid(4, format="e2m1", scale_format=scale_format, granularity=PerTokenBlock(size))  # type: ignore[arg-type]
    of_tensor = formats.tensor_scale(x.abs().max()) if scale_format == "e4m3" else None
    quantizer = FakeQuantizer(grid, tensor_scale=of_tensor)
    scale = token_scale(x, grid, of_tensor).repeat_interleave(size, dim=-1)
    error = (quantizer(x) - x).abs()
    # Half of the coarsest step (2) inside, and what saturates beyond 6: a quotient is below 8 (MX), 6 * 17 / 16 (E4M3).
    assert bool((error <= (2.0 if scale_format == "e8m0" else 1.0) * scale * (1 + 1e-6)).all())
    assert torch.equal(quantizer(x), formats.decode(quantizer.codes(x), grid) * scale)
    assert torch.equal(quantizer(-x), -quantizer(x))


# ---- logarithmic and twin ----------------------------------------------------------------------------------------


OTHER = [
    Grid(bits, signed=False, format=name)  # type: ignore[arg-type]
    for bits in (3, 4, 8)
    for name in ("log2", "logsqrt2")
] + [
    Grid(bits, signed=signed, format="twin", shift=shift)
    for bits in (3, 4, 8)
    for signed in (True, False)
    for shift in (0, 1, 3)
]


@pytest.mark.parametrize("grid", OTHER, ids=lambda g: f"{g.name}-{g.signed}-{g.shift}")
def test_grid_points_stay_and_everything_lies_between_the_extremes(grid: Grid) -> None:
    scale = torch.tensor(0.37)
    x = torch.linspace(-40.0 if grid.signed else 0.0, 40.0, 4001)
    quantizer = FakeQuantizer(grid, scale)
    once = quantizer(x)
    assert torch.equal(quantizer(once), once)
    assert float(once.min()) >= float(scale * formats.smallest(grid))
    assert float(once.max()) <= float(scale * formats.largest(grid))
    assert set(quantizer.codes(x).tolist()) <= set(formats.codes_of(grid))
    assert len(formats.codes_of(grid)) == 1 << grid.bits
    if grid.format != "twin" or grid.signed:  # the unsigned twin has its fine range in front of a coarser first step
        assert bool((once.diff() >= 0).all())
    assert FakeQuantizer(grid, scale)(torch.zeros(3)).tolist() == [0.0] * 3


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name", ["log2", "logsqrt2"])
def test_logarithmic_codes_by_their_definition(bits: int, name: str) -> None:
    grid = Grid(bits, signed=False, format=name)  # type: ignore[arg-type]
    base = 2.0 if name == "log2" else math.sqrt(2.0)
    last = 2**bits - 1
    for x in (1.0, 0.9, 0.71, 0.5, 0.33, 0.1, 0.013, 1e-6, 0.0, 3.0):
        code = last if x == 0 else min(max(round(-math.log(x, base)), 0), last)
        assert formats.encode(torch.tensor([x]), grid).tolist() == [code]
        value = 0.0 if code == last else base**-code
        assert float(formats.decode(torch.tensor([code]), grid)) == pytest.approx(value, rel=1e-6)


def test_twin_codes_by_their_definition() -> None:
    # PTQ4ViT eq. 5 on 3 bits: two bits in each range, the coarse step four fine ones.
    grid = Grid(3, signed=False, format="twin", shift=2)
    assert formats.decode(torch.arange(8), grid).tolist() == [0, 1, 2, 3, 0, 4, 8, 12]
    x = torch.tensor([0.0, 0.4, 2.6, 3.9, 4.0, 5.9, 6.1, 11.0, 50.0])
    assert dequantize(formats.encode(x, grid), ONE, ZERO, grid).tolist() == [0, 0, 3, 3, 4, 4, 8, 12, 12]
    signed = Grid(3, format="twin", shift=2)
    assert formats.decode(torch.arange(-4, 4), signed).tolist() == [-4, -3, -2, -1, 0, 4, 8, 12]
    y = torch.tensor([-9.0, -1.4, -0.2, 1.9, 2.1, 13.0])
    assert dequantize(formats.encode(y, signed), ONE, ZERO, signed).tolist() == [-4, -1, 0, 0, 4, 12]


def test_gradients_pass_straight_through_between_the_extremes() -> None:
    x = torch.tensor([-7.0, -0.2, 0.3, 5.5, 9.0], requires_grad=True)
    FakeQuantizer(E2M1, ONE)(x).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


# ---- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: NVFP4.qmax, "a nvfp4 grid has no largest integer code. Expected: a uniform integer grid here."),
        (lambda: Grid(4, signed=False, format="log2").qmin, "a log2-4 grid has no smallest integer code."),
        (lambda: Grid(4, format="twin").storage, "a twin4 grid has no ONNX element type."),
        (lambda: Grid(8, format="e2m1"), "Grid.format 'e2m1' does not exist in this form. Found: Grid(bits=8"),
        (lambda: Grid(4, format="log2"), "Grid.format 'log2' does not exist in this form."),
        (lambda: Grid(4, shift=1), "Grid.format 'int' does not exist in this form."),
        (lambda: Grid(4, granularity=PerTokenBlock(16)), "Grid.format 'int' does not exist in this form."),
        (
            lambda: Grid(4, format="e5m2"),
            "unknown Grid.format. Expected: int, e2m1, log2, logsqrt2, twin. Found: 'e5m2'.",
        ),
        (
            lambda: Grid(4, format="e2m1", scale_format="e4m3", granularity=PerBlock(1, 32)),
            "Grid.scale_format 'e4m3' does not fit. Expected: e2m1 codes in blocks of 16. Found: e2m1 codes,",
        ),
        (lambda: Grid(4, scale_format="e8m0"), "Grid.scale_format 'e8m0' does not fit. Expected: e2m1 codes in blocks"),
        (
            lambda: FakeQuantizer(Grid(4, format="e2m1", scale_format="e4m3", granularity=PerTokenBlock(16))),
            "a run-time nvfp4 quantizer needs a tensor scale.",
        ),
        (
            lambda: Site("fc.weight", "fc", "weight", MXFP4, torch.full((2, 1), 0.3), ZERO, "t"),
            "site 'fc.weight': its block scales are not E8M0 numbers. Fix: make them with formats.block_scale.",
        ),
        (
            lambda: Site("fc.weight", "fc", "weight", NVFP4, torch.full((2, 1), 0.3), ZERO, "t", torch.tensor(0.11)),
            "site 'fc.weight': its block scales are not E4M3 numbers times its tensor scale.",
        ),
    ],
)
def test_what_is_refused(make, text: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(PlanError) as caught:
        make()
    assert str(caught.value).startswith(text)


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(width, 96), nn.Linear(96, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.nn.functional.gelu(self.fc1(x)))  # type: ignore[no-any-return]


def planned(precision: str, width: int = 64, **changes: object) -> tuple[nn.Module, Plan, Tensor]:
    model = Net(width).eval()
    x = torch.randn(12, width, generator=torch.Generator().manual_seed(1))
    ops = discover(model, {"x": x[:1]})
    plan = build_plan(model, ops, calibrate(model, ops, [{"x": x}]), precision, QuantizeConfig(**changes))  # type: ignore[arg-type]
    return model, plan, x


@pytest.mark.parametrize("precision", ["nvfp4", "mxfp4"])
def test_a_plan_in_fp4_declares_simulates_and_survives_the_disk(precision: str, tmp_path: Path) -> None:
    model, plan, x = planned(precision)
    assert {plan.declared(op) for op in plan.ops} == {precision.upper()}
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert again.digest() == plan.digest()
    expected = simulate(model, plan)(x=x)
    assert torch.equal(simulate(model, again)(x=x), expected)
    reference = model(x=x)
    assert 0 < float(((expected - reference).norm() / reference.norm()).detach()) < 0.3
    plan.sites["fc1.weight"].scale[0, 0] *= 2
    assert plan.digest() != again.digest()


def test_the_exporter_refuses_mxfp4_by_name(tmp_path: Path) -> None:
    precision = "mxfp4"
    model, plan, x = planned(precision)
    with pytest.raises(UnsupportedError) as caught:
        load_exporter()(model, plan, {"x": x[:2]}, ["y"], tmp_path / "model.onnx")
    assert str(caught.value).startswith(
        "the common ONNX file holds uniform integer codes and NVFP4 only. Expected: int, uint and nvfp4 grids. "
        f"Found: {precision}: fc1.input, fc1.weight, fc2.input, fc2.weight."
    )
    assert not (tmp_path / "model.onnx").exists()


def test_widths_that_do_not_divide_are_all_named() -> None:
    with pytest.raises(PlanError, match=r"1 layer\(s\): fc1 \(K = 60\). Expected: a multiple of 16 for nvfp4"):
        planned("nvfp4", width=60)


def test_overrides_between_integers_and_fp4() -> None:
    def declared(precision: str, override: str) -> str:
        _, plan, _ = planned(precision, overrides={"fc2": override})
        return plan.declared("fc2")

    assert declared("nvfp4", "w8a8") == "W8A8"
    assert declared("w4a4", "nvfp4") == "NVFP4"
    assert declared("w4a8", "nvfp4") == "W4A8"
    assert declared("nvfp4", "w4a16") == "W4A16"
    assert declared("nvfp4", "w2a8") == "W4A8"


def test_other_formats_are_named_in_what_is_declared() -> None:
    op = Op("a.context", "context", 8, 8, 64)
    log, integers = Grid(4, signed=False, format="logsqrt2"), Grid(4)
    sites = {
        "a.probs": Site("a.probs", op.name, "probs", log, ONE, ZERO, "t"),
        "a.value": Site("a.value", op.name, "value", integers, ONE, ZERO, "t"),
    }
    assert Plan("w4a4", {op.name: op}, sites).declared(op.name) == "W4A4 (logsqrt2-4)"


def test_grids_of_every_format_survive_json() -> None:
    for grid in [
        NVFP4,
        MXFP4,
        E2M1,
        *OTHER,
        Grid(4, format="e2m1", scale_format="e8m0", granularity=PerTokenBlock(32)),
    ]:
        assert Grid.from_dict(grid.to_dict()) == grid
    assert Grid(4, format="e2m1", granularity=PerAxis(0)).storage == "FLOAT4E2M1"
    assert Grid(8, granularity=PerTensor()).name == "int8"


def test_an_unknown_fp4_name_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"unknown precision 'nvfp8'. Expected: .*nvfp4, mxfp4"):
        planned("nvfp8")


@pytest.mark.parametrize("runtime", ["reference", "ort", "tvm", "tensorrt"])
def test_no_runtime_claims_a_rung_for_what_is_only_simulated(runtime: str) -> None:
    assert load_runtime(runtime).rung("mxfp4") is None


@pytest.mark.parametrize("precision", ["w8a8", "w4a8", "w4a16"])
@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_weights_by_channel_and_by_block_at_every_precision(granularity: str, precision: str, tmp_path: Path) -> None:
    model, plan, x = planned(precision, weight_granularity=granularity, block_size=16)
    kinds = {s.grid.granularity.kind for s in plan.sites.values() if s.role == "weight"}
    assert kinds == {"axis" if granularity == "channel" else "block"}
    if precision == "w8a8":
        return
    load_exporter()(model, plan, {"x": x[:2]}, ["y"], tmp_path / "model.onnx")
    target, runtime = load_target("reference"), load_runtime("reference")
    (tmp_path / "built").mkdir()
    dialect = target.dialect(tmp_path / "model.onnx", tmp_path / "built", precision=precision)
    artifact = target.build(dialect, tmp_path / "built", precision=precision, options={}, progress=lambda _text: None)
    with runtime.open(artifact, threads=1) as session:
        found = next(iter(session.run({"x": x.numpy()}).values()))
    assert np.abs(found - simulate(model, plan)(x=x).detach().numpy()).max() < 1e-5
