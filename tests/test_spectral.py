"""Triplets against the full SVD, the certificate against planted misses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from s2d_deploy import spectral
from s2d_deploy.errors import ModelError
from s2d_deploy.spectral import Triplets, is_leading, residual, singular_values, top_triplets, weighted_layers


def with_spectrum(n: int, k: int, singular: list[float], seed: int = 0) -> torch.Tensor:
    """[n, k] with these leading singular values; the rest are 0."""
    g = torch.Generator().manual_seed(seed)
    u, _ = torch.linalg.qr(torch.randn(n, len(singular), generator=g, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(k, len(singular), generator=g, dtype=torch.float64))
    return ((u * torch.tensor(singular, dtype=torch.float64)) @ v.T).float()


def assert_triplets(w: torch.Tensor, found: Triplets, k: int) -> None:
    exact = torch.linalg.svdvals(w.double())
    # FP32: a product of length K errs by about eps * sqrt(K) * s_1 < 1e-5 * s_1 for K <= 4096.
    tolerance = 1e-5 * float(exact[0])
    assert torch.allclose(found.S.double(), exact[:k], atol=tolerance, rtol=0)
    assert float((w @ found.V - found.U * found.S).norm(dim=0).max()) <= 2 * tolerance
    assert float((w.T @ found.U - found.V * found.S).norm(dim=0).max()) <= 2 * tolerance
    eye = torch.eye(k)
    assert torch.allclose(found.U.T @ found.U, eye, atol=1e-4)
    assert torch.allclose(found.V.T @ found.V, eye, atol=1e-4)


@pytest.mark.parametrize(("n", "k"), [(300, 700), (700, 300), (512, 512)])
@pytest.mark.parametrize("kind", ["noise", "spiked", "decaying"])
def test_large_matrices_match_the_svd(n: int, k: int, kind: str) -> None:
    g = torch.Generator().manual_seed(n + k)
    w = torch.randn(n, k, generator=g)
    if kind == "spiked":
        w = w + with_spectrum(n, k, [300.0, 200.0, 100.0])
    if kind == "decaying":
        w = with_spectrum(n, k, [0.9**r for r in range(200)])
    assert_triplets(w, top_triplets(w, 3), 3)


def test_the_iteration_itself_answers_and_agrees_with_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(400, 600, generator=torch.Generator().manual_seed(3)) + with_spectrum(400, 600, [200.0, 150.0])
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    found = spectral._block_krylov(w[None], 2, None, spectral.RESIDUAL, spectral.DEPTH)[0]
    assert found is not None
    assert_triplets(w, found, 2)
    exact = (u[:, :2] * s[:2] ** 2) @ vh[:2]
    assert float((found.product(2) - exact).norm()) < 1e-3 * float(exact.norm())  # residual 1e-5 over a gap of 0.2


def test_a_misleading_warm_start_does_not_hide_a_triplet() -> None:
    w = with_spectrum(400, 600, [10.0, 9.0, 8.0, 7.0, 6.0, *[1.0] * 300])
    exact = top_triplets(w, 5)
    wrong = exact.V[:, 1:4]  # an exact invariant subspace that leaves the first triplet out
    assert_triplets(w, top_triplets(w, 3, warm=wrong), 3)


def test_the_certificate_finds_a_missing_triplet() -> None:
    w = with_spectrum(60, 90, [5.0, 4.0, 3.9, 2.0, 1.0])
    exact = top_triplets(w, 3)
    assert is_leading(w, exact)
    missing = Triplets(exact.U[:, [0, 2]], exact.S[[0, 2]], exact.V[:, [0, 2]])
    assert not is_leading(w, missing)
    assert is_leading(w.T, Triplets(exact.V, exact.S, exact.U))


def test_no_convergence_falls_back_to_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral, "MAX_RESTARTS", 0)
    w = torch.randn(300, 310, generator=torch.Generator().manual_seed(1))
    assert spectral._block_krylov(w[None], 3, None, spectral.RESIDUAL, spectral.DEPTH) == [None]
    assert_triplets(w, top_triplets(w, 3), 3)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 12), k=st.integers(1, 12), want=st.integers(1, 15), seed=st.integers(0, 100))
def test_small_matrices(n: int, k: int, want: int, seed: int) -> None:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    found = top_triplets(w, want)
    assert found.S.shape == (min(want, n, k),)
    assert_triplets(w, found, min(want, n, k))


def test_zero_and_rank_one() -> None:
    zero = top_triplets(torch.zeros(300, 400), 2)
    assert zero.S.tolist() == [0.0, 0.0]
    assert torch.isfinite(zero.product(2)).all()
    one = with_spectrum(300, 400, [3.0])
    assert top_triplets(one, 3).S.tolist() == pytest.approx([3.0, 0.0, 0.0], abs=1e-5)


def test_refreshes_of_many_matrices_match_the_svd() -> None:
    """Two shapes, one of them thrice, dominant triplets over noise, after a small step of training."""
    g = torch.Generator().manual_seed(0)
    before, after = [], []
    for seed, (n, k) in enumerate([(300, 400), (300, 400), (500, 290), (300, 400), (20, 30)]):
        w = torch.randn(n, k, generator=g) + with_spectrum(n, k, [300.0, 200.0, 100.0], seed)
        before.append(w)
        after.append(w + 0.01 * torch.randn(n, k, generator=g))
    warm = [top_triplets(w, 3).V for w in before]
    for w, found in zip(after, spectral.refreshed_triplets(after, 3, warm), strict=True):
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        assert torch.allclose(found.S, s[:3], rtol=1e-5)
        exact = (u[:, :3] * s[:3] ** 2) @ vh[:3]
        # The residual over the smallest gap, 100 - the noise's 40: REFRESH_RESIDUAL * 300 / 60, and it is far less.
        assert float((found.product(2) - exact).norm()) < 5e-3 * float(exact.norm())


def test_a_refresh_finds_what_its_warm_start_leaves_out() -> None:
    w = with_spectrum(400, 600, [10.0, 9.0, 8.0, 7.0, 6.0, *[1.0] * 300])
    exact = top_triplets(w, 5)
    (found,) = spectral.refreshed_triplets([w], 3, [exact.V[:, 1:4]])
    assert found.S.tolist() == pytest.approx([10, 9, 8], rel=1e-5)


def test_a_refresh_in_small_stacks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    weights = [torch.randn(300, 310, generator=g) for _ in range(3)]
    warm = [torch.randn(310, 3, generator=g) for _ in range(3)]
    at_once = spectral.refreshed_triplets(weights, 3, warm)
    monkeypatch.setattr(spectral, "BATCH_BYTES", 1)
    for one, other in zip(at_once, spectral.refreshed_triplets(weights, 3, warm), strict=True):
        assert torch.allclose(one.S, other.S, rtol=1e-5)


def test_a_refresh_of_a_broken_or_stubborn_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    good, bad = torch.randn(300, 310, generator=g), torch.full((300, 310), float("nan"))
    with pytest.raises(ModelError, match="NaN or infinity"):
        spectral.refreshed_triplets([good, bad], 3, [torch.randn(310, 3)] * 2)
    monkeypatch.setattr(spectral, "MAX_RESTARTS", 0)
    assert_triplets(good, spectral.refreshed_triplets([good], 3, [torch.randn(310, 3)])[0], 3)


def test_deterministic() -> None:
    w = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    first, second = top_triplets(w, 3), top_triplets(w, 3)
    assert torch.equal(first.product(), second.product())


def test_residual_measures_drift() -> None:
    w = with_spectrum(30, 40, [4.0, 2.0, 1.0])
    found = top_triplets(w, 2)
    assert residual(w, found) < 1e-6
    assert residual(2 * w, found) == pytest.approx(1.0, rel=1e-4)
    assert residual(torch.zeros(30, 40), found) == pytest.approx(1.0)


def test_a_conv_is_the_matrix_of_its_unfolded_patches() -> None:
    conv = nn.Conv2d(4, 6, 3, groups=2, bias=False)
    matrix = spectral.weight_matrix(conv)
    assert matrix.shape == (6, 2 * 9)
    x = torch.randn(1, 4, 3, 3)
    assert torch.allclose(conv(x)[0, :3, 0, 0], matrix[:3] @ x[0, :2].reshape(-1), atol=1e-6)


def test_singular_values_are_all_of_them() -> None:
    assert singular_values(with_spectrum(5, 9, [3.0, 2.0])).tolist() == pytest.approx([3, 2, 0, 0, 0], abs=1e-5)


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ModelError, match=r"not a weight matrix.*shape \[3\]"):
        top_triplets(torch.zeros(3), 1)
    with pytest.raises(ModelError, match="NaN or infinity"):
        top_triplets(torch.full((3, 3), float("nan")), 1)
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(ModelError, match=r"'7', 'x'.*2 such layers, e.g. 0, 2"):
        weighted_layers(model, ["0", "7", "x"])
    with torch.no_grad():
        model[2].weight[0, 0] = float("inf")
    with pytest.raises(ModelError, match="in the weight of '2'"):
        spectral.require_finite_weights(weighted_layers(model))
