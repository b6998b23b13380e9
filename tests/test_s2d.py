"""The penalty against autograd; selection, caching and application with planted matrices."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from s2d_deploy import s2d as module
from s2d_deploy.errors import ModelError, RecipeError
from s2d_deploy.s2d import S2D, S2DConfig, penalty, penalty_gradient
from s2d_deploy.spectral import refreshed_triplets, top_triplets


def planted(n: int, k: int, strength: list[float], seed: int) -> Tensor:
    """Noise of spectral norm near 0.1, plus dominant triplets."""
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(n, len(strength), generator=g))
    v, _ = torch.linalg.qr(torch.randn(k, len(strength), generator=g))
    noise = torch.randn(n, k, generator=g)
    return 0.1 * noise / torch.linalg.matrix_norm(noise, 2) + (u * torch.tensor(strength)) @ v.T


class Net(nn.Module):
    """`spiked` has one dominant triplet, `pair` two equal ones, `flat` none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spiked = nn.Linear(12, 10)
        self.pair = nn.Linear(12, 10, bias=False)
        self.flat = nn.Linear(12, 10)
        with torch.no_grad():
            self.spiked.weight.copy_(planted(10, 12, [8.0], 1))
            self.pair.weight.copy_(planted(10, 12, [5.0, 4.9], 2))
            nn.init.orthogonal_(self.flat.weight, generator=torch.Generator().manual_seed(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.spiked(x) + self.pair(x) + self.flat(x)


def data(seed: int = 0) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(16, 12, generator=g)} for _ in range(2)]


def config(**changes: object) -> S2DConfig:
    return S2DConfig(**{"tau": 0.9, "refresh_every": 3, "outliers": 16, **changes})  # type: ignore[arg-type]


@settings(max_examples=12, deadline=None)
@given(n=st.sampled_from([1, 2, 3, 2.5]), k=st.integers(1, 4), seed=st.integers(0, 20))
def test_the_gradient_is_autograds(n: float, k: int, seed: int) -> None:
    w = torch.randn(6, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()
    value = penalty(torch.linalg.svd(w, full_matrices=False).S[:k], n, 0.3)
    value.backward()
    got = penalty_gradient(top_triplets(w, k), n, 0.3)
    assert w.grad is not None
    # FP32 triplets of a random 6 x 5 matrix: gaps of a few hundredths at worst, so 1e-3 of the largest entry.
    assert torch.allclose(got.double(), w.grad, atol=1e-3 * float(w.grad.abs().max()))


def test_n_1_on_all_triplets_is_weight_decay() -> None:
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(penalty_gradient(top_triplets(w, 4), 1, 0.1), 0.1 * w, atol=1e-6)
    assert float(penalty(torch.linalg.svdvals(w), 1, 0.1)) == pytest.approx(0.05 * float((w * w).sum()), rel=1e-5)


def test_selection_finds_the_planted_layers() -> None:
    s2d = S2D(Net(), config())
    found = {s.name: s for s in s2d.select(data())}
    assert found["spiked"].k_target == 1
    assert found["pair"].k_target == 2
    assert not found["flat"].flagged
    assert s2d.flagged == {"spiked": 1, "pair": 2}
    assert found["spiked"].pcdr[0] > 0.95 > found["flat"].pcdr[0]


def test_layers_outside_the_choice_and_frozen_ones_are_not_selected() -> None:
    model = Net()
    model.pair.weight.requires_grad_(False)
    s2d = S2D(model, config(), layers=["pair", "flat"])
    assert [s.name for s in s2d.select(data())] == ["flat"]


def test_decoupled_takes_exactly_its_share_of_the_flagged_triplets() -> None:
    model = Net()
    before = copy.deepcopy(model.state_dict())
    s2d = S2D(model, config(decoupled_factor=2.0))
    s2d.select(data())
    s2d.before_step()
    s2d.after_step(0.01)
    u, s, vh = torch.linalg.svd(before["spiked.weight"], full_matrices=False)
    s[0] -= 0.01 * 2.0 * s[0] ** 2
    assert torch.allclose(model.spiked.weight, (u * s) @ vh, atol=1e-5)
    for name in ("flat.weight", "flat.bias", "spiked.bias"):
        assert torch.equal(model.state_dict()[name], before[name])


def test_coupled_adds_the_gradient_of_the_flagged_triplets_only() -> None:
    model = Net()
    s2d = S2D(model, config(application="coupled", weight_decay=0.1))
    s2d.select(data())
    before = copy.deepcopy(model.state_dict())
    model(**data(1)[0]).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    s2d.before_step()
    expected = penalty_gradient(top_triplets(model.pair.weight, 2), 2, 0.1)
    assert torch.allclose(model.pair.weight.grad - gradients["pair.weight"], expected, atol=1e-5)
    assert torch.equal(model.flat.weight.grad, gradients["flat.weight"])
    s2d.after_step(0.1)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.zero_grad(set_to_none=True)
    s2d.before_step()  # a weight that the loss does not reach gets the penalty's gradient alone
    assert torch.allclose(model.pair.weight.grad, expected, atol=1e-5)


def test_cached_triplets_are_reused_until_the_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def counting(weight: Tensor, k: int, *, warm: Tensor | None = None) -> object:
        calls.append(warm is not None)
        return top_triplets(weight, k, warm=warm)

    def counting_refreshes(weights: Sequence[Tensor], k: int, warm: Sequence[Tensor | None]) -> object:
        calls.extend(start is not None for start in warm)
        return refreshed_triplets(weights, k, warm)

    monkeypatch.setattr(module, "top_triplets", counting)
    monkeypatch.setattr(module, "refreshed_triplets", counting_refreshes)
    model = Net()
    s2d = S2D(model, config(application="coupled"))
    s2d.select(data())
    assert calls == [False] * 3
    cached = s2d.triplets("spiked")
    with torch.no_grad():
        model.spiked.weight.copy_(planted(10, 12, [8.0], 77))  # other triplets: the cache is now stale
    for step in range(3):
        model.zero_grad()
        s2d.before_step()
        assert s2d.triplets("spiked") is cached, step
        assert torch.allclose(model.spiked.weight.grad, penalty_gradient(cached.top(1), 2, 5e-4), rtol=1e-6)
        s2d.after_step(0.1)
    assert s2d.drift() > 0.5
    s2d.before_step()
    assert calls == [False] * 3 + [True] * 3
    assert s2d.triplets("spiked") is not cached
    assert s2d.drift() < 1e-5
    assert [(r.step, r.reason) for r in s2d.refreshes] == [(0, "selected"), (3, "count")]
    assert s2d.refreshes[1].drift > 0.5


def test_drift_can_bring_the_refresh_forward() -> None:
    model = Net()
    s2d = S2D(model, config(refresh_every=1000, refresh_drift=0.1, drift_every=1))
    s2d.select(data())
    s2d.before_step()
    s2d.after_step(0.0)
    with torch.no_grad():
        model.spiked.weight.copy_(planted(10, 12, [8.0], 77))
    s2d.before_step()
    assert [(r.step, r.reason) for r in s2d.refreshes] == [(0, "selected"), (1, "drift")]


def test_own_shrinking_is_no_drift() -> None:
    s2d = S2D(Net(), config(refresh_every=1000, decoupled_factor=1.0))
    s2d.select(data())
    for _ in range(50):
        s2d.before_step()
        s2d.after_step(0.01)
    assert s2d.drift() < 1e-5  # the cached S follows


def test_k_target_is_refreshed_and_a_layer_is_released() -> None:
    model = Net()
    s2d = S2D(model, config(refresh_every=5, decoupled_factor=0.5))
    s2d.select(data())
    shrunk = []
    for _ in range(60):
        s2d.before_step()
        s2d.after_step(0.02)
        shrunk.append(float(torch.linalg.matrix_norm(model.spiked.weight.detach(), 2)))
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(shrunk))
    assert "spiked" in s2d.flagged
    with torch.no_grad():
        model.spiked.weight.copy_(model.flat.weight)
    for _ in range(5):  # step 60 begins with a refresh, which sees that nothing dominates any more
        s2d.before_step()
        s2d.after_step(0.02)
    assert "spiked" not in s2d.flagged
    assert torch.equal(model.spiked.weight, model.flat.weight)


def test_a_huge_factor_is_limited_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    s2d = S2D(model, config(decoupled_factor=1e5, refresh_every=1000))
    s2d.select(data())
    s2d.before_step()
    s2d.after_step(1.0)
    assert s2d.triplets("spiked").S[0] == pytest.approx(4.0, rel=1e-2)
    assert float(torch.linalg.matrix_norm(model.spiked.weight.detach(), 2)) == pytest.approx(4.0, rel=1e-2)
    assert "layer 'spiked'" in caplog.text
    assert "choose a smaller decoupled_factor" in caplog.text


def test_tied_weights_are_pressed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(12, 12, bias=False)
            self.b = nn.Linear(12, 12, bias=False)
            with torch.no_grad():
                self.a.weight.copy_(planted(12, 12, [8.0], 3))
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = Tied()
    s2d = S2D(model, config(decoupled_factor=1.0))
    assert [s.k_target for s in s2d.select(data())] == [1, 1]
    before = float(torch.linalg.matrix_norm(model.a.weight.detach(), 2))
    s2d.before_step()
    s2d.after_step(0.01)
    assert s2d.flagged == {"a": 1}
    assert float(torch.linalg.matrix_norm(model.b.weight.detach(), 2)) == pytest.approx(
        before - 0.01 * before**2, rel=1e-4
    )


def test_a_conv_is_pressed_through_its_matrix_view() -> None:
    conv = nn.Conv2d(3, 10, 2)
    with torch.no_grad():
        conv.weight.copy_(planted(10, 12, [8.0], 4).reshape(10, 3, 2, 2))

    class Wrap(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv.to(memory_format=torch.channels_last)  # flattening such a weight copies it

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)

    s2d = S2D(Wrap(), config(decoupled_factor=1.0))
    s2d.select([{"x": torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))}])
    before = float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2))
    s2d.before_step()
    s2d.after_step(0.01)
    after = float(torch.linalg.matrix_norm(conv.weight.detach().flatten(1), 2))
    assert after == pytest.approx(before - 0.01 * before**2, rel=1e-4)


def train(model: nn.Module, s2d: S2D, steps: range) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in steps:
        optimizer.zero_grad()
        model(**data(step)[0]).square().mean().backward()
        s2d.before_step()
        optimizer.step()
        s2d.after_step(0.01)


@pytest.mark.parametrize("application", ["coupled", "decoupled"])
def test_resuming_gives_the_same_weights(application: str, tmp_path: object) -> None:
    whole, halves = Net(), Net()
    s2d = S2D(whole, config(application=application, decoupled_factor=1.0))
    s2d.select(data())
    train(whole, s2d, range(8))

    first = S2D(halves, config(application=application, decoupled_factor=1.0))
    first.select(data())
    train(halves, first, range(4))
    file = f"{tmp_path}/state.pt"
    torch.save(first.state_dict(), file)
    second = S2D(halves, config(application=application, decoupled_factor=1.0))
    second.load_state_dict(torch.load(file, weights_only=True), data())
    train(halves, second, range(4, 8))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), halves.parameters(), strict=True))
    assert second.refreshes == s2d.refreshes
    assert second.selections == s2d.selections


def test_attached_to_an_optimizer_it_acts_by_itself_and_detaches() -> None:
    by_hand, by_itself = Net(), Net()
    train(by_hand, first := selected(by_hand), range(5))
    optimizer = torch.optim.SGD(by_itself.parameters(), lr=0.01)
    s2d = selected(by_itself, optimizer=optimizer)
    for step in range(5):
        optimizer.zero_grad()
        by_itself(**data(step)[0]).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(by_hand.parameters(), by_itself.parameters(), strict=True))
    assert first.refreshes == s2d.refreshes
    s2d.detach()
    optimizer.step()
    assert s2d.step == 5


def selected(model: nn.Module, **arguments: Any) -> S2D:
    s2d = S2D(model, config(decoupled_factor=1.0), **arguments)
    s2d.select(data())
    return s2d


def test_each_weight_has_the_rate_of_its_own_group_and_untrained_ones_are_left_alone() -> None:
    model = Net()
    groups = [{"params": [model.spiked.weight], "lr": 0.02}, {"params": [model.flat.weight], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups)
    s2d = selected(model, optimizer=optimizer)
    before, pair = float(s2d.triplets("spiked").S[0]), model.pair.weight.detach().clone()
    assert s2d.flagged == {"spiked": 1}  # `pair` would be, but nobody trains it
    optimizer.step()
    assert float(torch.linalg.matrix_norm(model.spiked.weight.detach(), 2)) == pytest.approx(
        before - 0.02 * before**2, rel=1e-4
    )
    assert torch.equal(model.pair.weight, pair)


def test_no_rate_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"knows no learning rate. Fix: call after_step\(lr\)"):
        selected(Net()).after_step()


class Fused(nn.Module):
    """qkv of two heads, 3 x 2 x 4 rows: one head of k has a dominant triplet of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(12, 24, bias=False) if kind == "linear" else Conv1D(24, 12)
        matrix = torch.empty(24, 12)
        for start in range(0, 24, 4):
            nn.init.orthogonal_(matrix[start : start + 4])
        matrix[8:12] = planted(4, 12, [8.0], 3)
        with torch.no_grad():
            self.qkv.weight.copy_(matrix if kind == "linear" else matrix.T)

    def forward(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def matrix(self) -> Tensor:
        weight = self.qkv.weight.detach()
        return weight.clone() if isinstance(self.qkv, nn.Linear) else weight.T.clone()


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("application", ["coupled", "decoupled"])
@pytest.mark.parametrize(
    ("split", "name", "rows"),
    [({}, "qkv", range(24)), ({"*qkv": 3}, "qkv[1/3]", range(8, 16)), ({"qkv": 6}, "qkv[2/6]", range(8, 12))],
)
def test_a_fused_layer_whole_by_part_or_by_head(
    kind: str, application: str, split: dict[str, int], name: str, rows: range
) -> None:
    model = Fused(kind)
    s2d = S2D(model, config(split=split, application=application, decoupled_factor=1.0, weight_decay=0.01))
    found = {s.name: s.k_target for s in s2d.select(data())}
    assert s2d.flagged == {name: 1}
    assert len(found) == split.get("*qkv", split.get("qkv", 1))
    before = model.matrix()
    s2d.before_step()
    if application == "coupled":
        with torch.no_grad():
            model.qkv.weight.sub_(model.qkv.weight.grad)
    s2d.after_step(0.01)
    moved = before - model.matrix()
    part = before[list(rows)]
    u, s, vh = torch.linalg.svd(part, full_matrices=False)
    expected = torch.zeros_like(before)
    expected[list(rows)] = 0.01 * float(s[0]) ** 2 * u[:, :1] @ vh[:1]
    assert torch.allclose(moved, expected, atol=1e-5)
    assert not moved[[r for r in range(24) if r not in rows]].any()


def test_pcdr_of_a_transposed_layer_is_the_linear_ones() -> None:
    ones = [S2D(Fused(kind), config()).select(data())[0].pcdr for kind in ("linear", "conv1d")]
    assert ones[0] == pytest.approx(ones[1], rel=1e-5)


def test_split_errors() -> None:
    with pytest.raises(RecipeError, match=r"split: 'x.\*' matches no layer.*such as spiked, pair, flat"):
        S2D(Net(), config(split={"x.*": 3}))
    with pytest.raises(ModelError, match=r"shared out equally in spiked \(10 rows, 3 parts\).*Fix: 3 for a fused qkv"):
        S2D(Net(), config(split={"spiked": 3}))


def test_a_refresh_runs_only_some_of_the_batches() -> None:
    model = Net()
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(1))
    s2d = S2D(model, config(refresh_batches=3, refresh_every=1))
    s2d.select([batch for seed in range(5) for batch in data(seed)])
    assert len(seen) == 10
    for _ in range(2):
        s2d.before_step()
        s2d.after_step(0.0)
    assert len(seen) == 10 + 3  # of 10 batches every fourth


def test_half_precision_weights_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    model = Net().to(torch.bfloat16)
    s2d = S2D(model, config(decoupled_factor=1.0))
    assert "weights in torch.bfloat16" in caplog.text
    s2d.select([{"x": batch["x"].bfloat16()} for batch in data()])
    before = float(torch.linalg.matrix_norm(model.spiked.weight.detach().float(), 2))
    s2d.before_step()
    s2d.after_step(0.05)
    after = float(torch.linalg.matrix_norm(model.spiked.weight.detach().float(), 2))
    assert after == pytest.approx(before - 0.05 * before**2, rel=2**-7)


def test_a_state_of_another_model_is_refused() -> None:
    s2d = selected(Net())
    other = Net()
    other.spiked = nn.Linear(12, 11)
    with pytest.raises(ModelError, match=r"of another model: spiked \[10, 12\] does not fit"):
        S2D(other, config(decoupled_factor=1.0)).load_state_dict(s2d.state_dict(), data())


def test_nothing_is_kept_but_the_triplets() -> None:
    s2d = selected(Net())
    kept = sum(t.numel() for part in s2d.state_dict()["triplets"].values() for t in part.values())
    assert kept == 3 * 3 * (10 + 12 + 1)  # layers * k_max * (N + K + 1)


def test_state_errors() -> None:
    s2d = S2D(Net(), config())
    with pytest.raises(ModelError, match=r"has not chosen its layers yet.*Fix: call select"):
        s2d.before_step()
    s2d.select(data())
    with pytest.raises(RecipeError, match=r"another tau, k_max.*tau=0.9, k_max=3.*tau=0.5, k_max=2"):
        S2D(Net(), config(tau=0.5, k_max=2)).load_state_dict(s2d.state_dict(), data())
    with pytest.raises(ModelError, match="without calibration data"):
        S2D(Net(), config()).load_state_dict(s2d.state_dict())
    with pytest.raises(ModelError, match="layers that the model has not: flat, pair, spiked"):
        S2D(nn.Sequential(nn.Linear(3, 3)), config()).load_state_dict(s2d.state_dict(), data())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0.5), ("n", float("nan")), ("n", 99), ("weight_decay", -1e-4), ("weight_decay", 1.0), ("tau", 0.0),
        ("tau", 1.01), ("k_max", 0), ("k_max", 2.0), ("k_max", True), ("refresh_every", 0), ("application", "both"),
        ("decoupled_factor", -1), ("decoupled_factor", float("inf")), ("refresh_drift", 0), ("outliers", 0),
        ("drift_every", 0),
        ("refresh_batches", 0), ("split", {"a": 0}), ("split", {"a": 2.0}), ("split", [3]),
    ],
)  # fmt: skip
def test_absurd_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(RecipeError, match=rf"S2D: {name} out of range. Expected: {name}: .* Found: {name}="):
        S2DConfig(**{name: value})  # type: ignore[arg-type]


def test_all_offenders_are_listed_at_once_and_the_defaults_are_the_papers() -> None:
    with pytest.raises(RecipeError, match="S2D: tau, k_max out of range"):
        S2DConfig(tau=2, k_max=-1)
    default = S2DConfig()
    paper = (2, 5e-4, 0.95, 3, 100)
    assert (default.n, default.weight_decay, default.tau, default.k_max, default.refresh_every) == paper
