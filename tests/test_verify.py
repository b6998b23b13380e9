"""Verification against slow loops, and planted faults that must be counted exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from s2d_deploy.attention import attention
from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import UnsupportedError
from s2d_deploy.plan import Plan
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.session import Array
from s2d_deploy.simulation import recorded_codes, simulate, weight_codes
from s2d_deploy.verify import end_to_end_codes, expected_accumulators, integer_ops, teacher_forced


class Attention(nn.Module):
    """Two heads of width 4, through the visible attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        heads = [p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v)]
        return attention(self, *heads)[0].flatten(2)


class Net(nn.Module):
    """A strided, padded, grouped convolution; attention; a Linear. No two contractions have equal shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 2), groups=2)
        self.attention = Attention()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.fc(torch.relu(self.attention(x) + 0.3))


@dataclass
class Case:
    simulated: nn.Module
    plan: Plan
    batch: dict[str, torch.Tensor]
    codes: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with recorded_codes(self.simulated) as codes:
            self.simulated(**self.batch)
        self.codes = dict(codes)


def make(precision: str = "w8a8", **config: Any) -> Case:
    torch.manual_seed(0)
    model = Net().eval()
    batch = {"x": torch.randn(2, 4, 5, 3) + 0.5}  # not centred, so that zero points are not 0
    ops = discover(model, batch)
    plan = build_plan(model, ops, calibrate(model, ops, [batch]), precision, QuantizeConfig(**config))
    return Case(simulate(model, plan).eval(), plan, batch)


@pytest.fixture(scope="module", params=["symmetric", "affine", "w4a4"])
def case(request: pytest.FixtureRequest) -> Case:
    return make("w4a4" if request.param == "w4a4" else "w8a8", activation_symmetric=request.param != "affine")


def zero(case: Case, site: str) -> int:
    return int(case.plan.sites[site].zero_point)


def test_the_affine_case_has_zero_points():
    case = make(activation_symmetric=False)
    assert zero(case, "conv.input") != 0
    assert zero(case, "attention.query") != 0
    assert zero(case, "attention.probs") == 0  # softmax starts at 0


def test_linear_accumulators_by_loops(case: Case):
    x, w = case.codes["fc.input"].tolist(), weight_codes(case.simulated)["fc.weight"].tolist()
    z = zero(case, "fc.input")
    wanted = [[[sum((a - z) * b for a, b in zip(row, out, strict=True)) for out in w] for row in rows] for rows in x]
    found = expected_accumulators(case.simulated, case.plan, case.codes)["fc"]
    assert found.dtype == np.int32
    assert found.tolist() == wanted


def test_convolution_accumulators_by_loops(case: Case):
    x, w = case.codes["conv.input"].numpy(), weight_codes(case.simulated)["conv.weight"].numpy()
    z = zero(case, "conv.input")
    (batch, _, height, width), (outputs, per_group, kh, kw) = x.shape, w.shape
    out_h, out_w = (height + 2 - kh) // 2 + 1, (width + 4 - kw) // 1 + 1
    wanted = np.zeros((batch, outputs, out_h, out_w), np.int64)
    for b, o, i, j in np.ndindex(wanted.shape):
        group = o // (outputs // 2)
        for c, di, dj in np.ndindex(per_group, kh, kw):
            row, column = i * 2 + di - 1, j + dj - 2
            if 0 <= row < height and 0 <= column < width:  # outside lies the value zero
                wanted[b, o, i, j] += (int(x[b, group * per_group + c, row, column]) - z) * int(w[o, c, di, dj])
    found = expected_accumulators(case.simulated, case.plan, case.codes)["conv"]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(("op", "left", "right"), [("scores", "query", "key"), ("context", "probs", "value")])
def test_attention_accumulators_by_loops(case: Case, op: str, left: str, right: str):
    lhs, rhs = (case.codes[f"attention.{name}"].numpy().astype(np.int64) for name in (left, right))
    lz, rz = zero(case, f"attention.{left}"), zero(case, f"attention.{right}")
    batch, heads, m, k = lhs.shape
    wanted = np.zeros((batch, heads, m, rhs.shape[-1]), np.int64)
    for b, h, i, j in np.ndindex(wanted.shape):
        wanted[b, h, i, j] = sum((lhs[b, h, i, q] - lz) * (rhs[b, h, q, j] - rz) for q in range(k))
    found = expected_accumulators(case.simulated, case.plan, case.codes)[f"attention.{op}"]
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)


def test_accumulators_rescale_to_the_simulated_layer(case: Case):
    """Accumulators times scales are what the simulated Linear and Conv compute, to FP32 rounding."""
    found = expected_accumulators(case.simulated, case.plan, case.codes)
    sites = case.plan.sites
    seen: dict[str, torch.Tensor] = {}
    layers = {name: case.simulated.get_submodule(name) for name in ("conv", "fc")}
    handles = [m.register_forward_hook(lambda _m, _a, y, n=n: seen.update({n: y})) for n, m in layers.items()]
    with torch.no_grad():
        case.simulated(**case.batch)
    for handle in handles:
        handle.remove()
    for name, shape in (("conv", (1, -1, 1, 1)), ("fc", (-1,))):
        scale = sites[f"{name}.input"].scale * sites[f"{name}.weight"].scale.reshape(shape)
        value = torch.from_numpy(found[name]).double() * scale + layers[name].bias.detach().reshape(shape)
        torch.testing.assert_close(value.float(), seen[name], rtol=1e-5, atol=1e-5)


def test_only_integer_products_have_accumulators():
    assert {op.name for op in integer_ops(make("w8a8").plan)} == {
        *("conv", "fc", "attention.q", "attention.k", "attention.v", "attention.scores", "attention.context")
    }
    assert integer_ops(make("w4a16", block_size=4).plan) == []
    per_token = {op.name for op in integer_ops(make("w8a8", activation_granularity="token").plan)}
    assert per_token == {"conv", "attention.scores", "attention.context"}
    assert "fc" not in {op.name for op in integer_ops(make("w8a8", skip=("fc",)).plan)}


# --- planted faults -------------------------------------------------------------------------------------------


class Faulty:
    """A session that computes what the simulation does, except where a fault is planted."""

    def __init__(self, case: Case, *, refuse: str = "", off: Mapping[str, int] = {}, codes: Any = None) -> None:
        self.case, self.refuse, self.off, self.change = case, refuse, off, codes
        self.fed: dict[str, tuple[np.dtype, np.dtype | None]] = {}

    def accumulate(self, op: str, lhs: Array, rhs: Array | None = None) -> Array:
        if op == self.refuse:
            raise UnsupportedError(f"{op} runs in float")
        self.fed[op] = (lhs.dtype, None if rhs is None else rhs.dtype)
        (left, _), (right, _) = self.case.plan.ops[op].sites
        given = dict(self.case.codes) | {left: torch.from_numpy(lhs.astype(np.int32))}
        if rhs is not None:
            given[right] = torch.from_numpy(rhs.astype(np.int32))
        result = expected_accumulators(self.case.simulated, self.case.plan, given)[op].copy()
        result.reshape(-1)[: self.off.get(op, 0)] += 1
        return result

    def codes(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        with recorded_codes(self.case.simulated) as codes:
            self.case.simulated(**{name: torch.from_numpy(a) for name, a in feeds.items()})
        signed = {name: s.grid.signed for name, s in self.case.plan.sites.items()}
        shown = {name: c.numpy().astype(np.int8 if signed[name] else np.uint8) for name, c in codes.items()}
        return self.change(shown) if self.change else shown


def total(case: Case) -> int:
    return sum(a.size for a in expected_accumulators(case.simulated, case.plan, case.codes).values())


def test_a_sound_session_differs_nowhere(case: Case):
    session = Faulty(case)
    found = teacher_forced(session, case.simulated, case.plan, case.batch)
    assert found == {
        "accumulators_checked": total(case),
        "accumulators_different": 0,
        "ops_checked": 7,
        "ops_not_integer": [],
        "first_difference": None,
    }
    assert session.fed["attention.context"][0] == np.uint8  # probabilities are never negative
    assert session.fed["fc"] == (np.int8, None)
    end = end_to_end_codes(session, case.simulated, [case.batch])
    assert end["codes_checked"] == sum(c.numel() for c in case.codes.values())
    assert end["codes_different"] == 0


def test_accumulators_off_by_one_are_counted(case: Case):
    session = Faulty(case, off={"conv": 3, "fc": 2})
    found = teacher_forced(session, case.simulated, case.plan, case.batch)
    assert found["accumulators_different"] == 5
    assert found["accumulators_checked"] == total(case)
    assert found["first_difference"] == "conv"


def test_a_float_op_is_named_and_not_counted(case: Case):
    found = teacher_forced(Faulty(case, refuse="fc"), case.simulated, case.plan, case.batch)
    missing = expected_accumulators(case.simulated, case.plan, case.codes)["fc"].size
    assert found["ops_not_integer"] == ["fc"]
    assert found["ops_checked"] == 6
    assert found["accumulators_different"] == 0
    assert found["accumulators_checked"] == total(case) - missing


def test_swapped_codes_are_counted(case: Case):
    def swap(codes: dict[str, Array]) -> dict[str, Array]:
        first, second = codes["fc.input"][0].copy(), codes["fc.input"][1].copy()
        codes["fc.input"][0], codes["fc.input"][1] = second, first
        return codes

    found = end_to_end_codes(Faulty(case, codes=swap), case.simulated, [case.batch])
    a, b = case.codes["fc.input"][0], case.codes["fc.input"][1]
    assert found["codes_different"] == 2 * int((a != b).sum()) > 0
    rows = {row["site"]: row for row in found["sites"]}
    assert rows["fc.input"]["different"] == found["codes_different"]
    assert rows["fc.input"]["largest"] == int((a - b).abs().max())
    assert rows["conv.input"]["different"] == 0


def test_a_wrong_scale_is_counted(case: Case):
    """The runtime quantizes the network's input with twice the scale."""
    site = case.plan.sites["conv.input"]

    def rescale(codes: dict[str, Array]) -> dict[str, Array]:
        x = case.batch["x"].numpy() / (2 * float(site.scale))
        wrong = np.clip(np.rint(x) + int(site.zero_point), site.grid.qmin, site.grid.qmax)
        return codes | {"conv.input": wrong.astype(np.int8)}

    found = end_to_end_codes(Faulty(case, codes=rescale), case.simulated, [case.batch])
    wrong = rescale({})["conv.input"].astype(int)
    assert found["codes_different"] == int((wrong != case.codes["conv.input"].numpy()).sum()) > 0


def test_batches_add_up(case: Case):
    one = end_to_end_codes(Faulty(case), case.simulated, [case.batch])
    parts = ({"x": case.batch["x"][i : i + 1]} for i in range(2))
    assert end_to_end_codes(Faulty(case), case.simulated, parts)["codes_checked"] == one["codes_checked"]


def test_a_runtime_that_shows_no_codes(case: Case):
    assert end_to_end_codes(Faulty(case, codes=lambda _: {}), case.simulated, [case.batch]) == {}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize(("padding", "kernel"), [("valid", 3), ("same", 3), ("same", (4, 2)), ((1, 2), 3)])
def test_expected_accumulators_of_padded_convolutions(padding, kernel):
    """`padding` in words means what torch makes of it, also where an even window leaves an odd pixel over."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, kernel, padding=padding)).eval()
    batch = {"input": torch.randn(2, 2, 6, 7)}
    ops = discover(model, batch)
    plan = build_plan(model, ops, calibrate(model, ops, [batch]), "w8a8", QuantizeConfig())
    simulated = simulate(model, plan).eval()
    with torch.no_grad(), recorded_codes(simulated) as codes:
        simulated(**batch)
    (found,) = expected_accumulators(simulated, plan, codes).values()
    ((site, _), _) = next(iter(plan.ops.values())).sites
    lhs = codes[site].double() - plan.sites[site].zero_point.double()
    (weights,) = weight_codes(simulated).values()
    expected = torch.nn.functional.conv2d(lhs, weights.double(), padding=padding)
    assert torch.equal(torch.from_numpy(found).double(), expected)
