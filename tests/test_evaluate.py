"""Scores and neighbours against loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from s2d_deploy import evaluate
from s2d_deploy.errors import DataError, ModelError
from s2d_deploy.evaluate import embed, nearest, neighbour_agreement, outputs, score, torch_run

RNG = np.random.default_rng(0)


def test_top_1_equals_a_loop() -> None:
    logits = RNG.normal(size=(50, 7)).astype(np.float32)
    labels = torch.from_numpy(RNG.integers(0, 7, 50))
    result = score("image-classification", logits, logits, labels, None)
    right = [
        100.0 if max(range(7), key=lambda c: row[c]) == int(y) else 0.0 for row, y in zip(logits, labels, strict=True)
    ]
    assert result.name == "top-1 %"
    assert result.per_sample.tolist() == right
    assert result.value == pytest.approx(sum(right) / 50, rel=1e-12)
    assert 0 < result.value < 100


def test_without_labels_the_float_model_decides() -> None:
    reference = np.eye(4, dtype=np.float32)
    output = reference[[0, 1, 3, 3]]
    result = score("image-classification", output, reference, None, None)
    assert (result.name, result.value) == ("top-1 agreement %", 75.0)


@pytest.mark.parametrize("masked", [True, False])
def test_cosine_of_masked_means_equals_loops(masked: bool) -> None:
    a, b = (RNG.normal(size=(6, 5, 8)).astype(np.float32) for _ in range(2))
    lengths = [5, 3, 1, 4, 2, 5]
    mask = np.array([[int(t < n) for t in range(5)] for n in lengths]) if masked else None
    result = score("embedding", a, b, None, mask)
    expected = []
    for i in range(6):
        tokens = [t for t in range(5) if not masked or t < lengths[i]]
        u, v = ([sum(float(x[i, t, d]) for t in tokens) / len(tokens) for d in range(8)] for x in (a, b))
        dot = sum(p * q for p, q in zip(u, v, strict=True))
        expected.append(100 * dot / math.sqrt(sum(p * p for p in u) * sum(q * q for q in v)))
    assert result.name == "cosine x 100"
    np.testing.assert_allclose(result.per_sample, expected, rtol=1e-12, atol=1e-10)
    assert result.value == pytest.approx(sum(expected) / 6)


def test_padding_does_not_change_an_embedding() -> None:
    x = RNG.normal(size=(2, 4, 3)).astype(np.float32)
    padded = np.concatenate([x, np.full((2, 2, 3), 1e6, np.float32)], axis=1)
    mask = np.array([[1, 1, 1, 1, 0, 0]] * 2)
    assert np.array_equal(embed(padded, mask), embed(x, None))


def test_flat_zero_and_equal_embeddings() -> None:
    x = RNG.normal(size=(3, 4)).astype(np.float32)
    assert score("embedding", x, x, None, None).value == pytest.approx(100.0, abs=1e-12)
    assert score("embedding", np.zeros_like(x), x, None, None).value == 0.0
    assert np.array_equal(embed(np.ones((1, 2, 3), np.float32), np.zeros((1, 2))), np.zeros((1, 3)))


def test_an_output_of_another_shape_is_refused() -> None:
    logits = np.zeros((4, 3), np.float32)
    for task, output, reference in (
        ("image-classification", np.zeros((4, 2, 3), np.float32), np.zeros((4, 2, 3), np.float32)),
        ("image-classification", logits, np.zeros((4, 5), np.float32)),
        ("embedding", np.zeros((4, 3, 2, 2), np.float32), np.zeros((4, 3, 2, 2), np.float32)),
    ):
        with pytest.raises(ModelError, match=rf"the output does not fit the task {task}.*Fix: set model\.output"):
            score(task, output, reference, None, None)


class Two(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"double": x * 2, "half": x / 2}


def batches() -> list[dict[str, Tensor]]:
    return [{"x": torch.arange(6.0).reshape(3, 2)}, {"x": torch.full((1, 2), 9.0)}]


def test_outputs_are_concatenated_and_counted() -> None:
    counted: list[int] = []
    result = outputs(torch_run(Two(), "double"), "double", batches(), counted.append)
    assert result.tolist() == [[0, 2], [4, 6], [8, 10], [18, 18]]
    assert result.dtype == np.float32
    assert counted == [3, 1]
    assert outputs(torch_run(nn.Identity(), "y"), "y", [{"input": torch.ones(2, 2)}]).tolist() == [[1, 1], [1, 1]]


def test_nan_outputs_are_counted_by_sample() -> None:
    bad = [{"x": torch.tensor([[1.0, math.nan], [1.0, 1.0], [math.inf, math.nan]])}]
    with pytest.raises(ModelError, match=r"^output 'half' is NaN or infinite for 2 of 3 samples\.$"):
        outputs(torch_run(Two(), "half"), "half", bad)


def test_an_unknown_output_and_foreign_inputs_are_named() -> None:
    with pytest.raises(
        ModelError, match=r"the model has no output 'logits'\..*Found: double, half\. Fix: set model\.output"
    ):
        outputs(torch_run(Two(), "logits"), "logits", batches())
    with pytest.raises(
        ModelError, match=r"the model cannot run on this data: .*'pixels'.*Found: inputs pixels \(1, 2\) float32"
    ):
        outputs(torch_run(Two(), "half"), "half", [{"pixels": torch.ones(1, 2)}])


# ---- neighbours ---------------------------------------------------------------------------------------------


def slow_nearest(x: np.ndarray, k: int) -> list[list[int]]:
    """By sorting all others of each row; equal similarities in the order of their index."""
    result = []
    for i in range(len(x)):
        similar = [(-round(float(sum(a * b for a, b in zip(x[i], x[j], strict=True))), 12), j) for j in range(len(x))]
        result.append([j for _, j in sorted(entry for entry in similar if entry[1] != i)][:k])
    return result


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.integers(1, 11), st.integers(0, 2**31), st.booleans())
def test_nearest_equals_sorting_all_others(n: int, k: int, seed: int, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    # Coarse vectors repeat and are equally far from each other: most of their neighbours are ties.
    x = rng.integers(-1, 2, (n, 2)).astype(np.float64) if coarse else embed(rng.normal(size=(n, 5)), None)
    k = min(k, n - 1)
    assert nearest(x, k).tolist() == slow_nearest(x, k)


def test_neighbours_do_not_depend_on_the_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = embed(RNG.normal(size=(50, 8)), None)
    x[20:30] = x[:10]  # ten pairs of equal rows
    whole = nearest(x, 4)
    for elements in (1, 50, 7 * 50, 49 * 50):
        monkeypatch.setattr(evaluate, "_CHUNK", elements)
        assert np.array_equal(nearest(x, 4), whole)
    assert whole[20:30, 0].tolist() == list(range(10))
    assert not (whole == np.arange(50)[:, None]).any()


def test_of_equal_rows_the_first_is_nearest() -> None:
    assert nearest(np.ones((4, 2)), 3).tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    assert nearest(np.zeros((3, 2))).tolist() == [[1], [0], [0]]


@pytest.mark.parametrize("k", [1, 5])
def test_agreement_equals_a_loop_over_samples(k: int) -> None:
    reference = RNG.normal(size=(40, 3, 6)).astype(np.float32)
    output = reference + 0.7 * RNG.normal(size=reference.shape).astype(np.float32)
    mask = np.array([[1, t < 2, t < 1] for t in RNG.integers(1, 4, 40)], dtype=np.int64)
    result = neighbour_agreement(output, reference, mask, k)
    a, b = (slow_nearest(embed(x, mask), k) for x in (output, reference))
    expected = [100.0 * len(set(p) & set(q)) / k for p, q in zip(a, b, strict=True)]
    assert result.per_sample.tolist() == pytest.approx(expected)
    assert result.value == pytest.approx(sum(expected) / 40)
    assert 0 < result.value < 100
    assert result.name == ("neighbour agreement %" if k == 1 else "neighbour overlap@5 %")


def test_agreement_sees_directions_only() -> None:
    x = RNG.normal(size=(20, 6)).astype(np.float32)
    turned = np.linalg.qr(RNG.normal(size=(6, 6)))[0].astype(np.float32)
    scaled = x * RNG.uniform(0.1, 10, (20, 1)).astype(np.float32)
    assert neighbour_agreement(x, x).value == 100.0
    assert neighbour_agreement(scaled @ turned, x, k=3).value == pytest.approx(100.0)
    assert neighbour_agreement(-x, x).value == 100.0
    wide = np.concatenate([x, np.zeros((20, 2), np.float32)], axis=1)
    assert neighbour_agreement(wide, x).value == 100.0


def test_what_has_no_neighbours_is_refused() -> None:
    x = RNG.normal(size=(3, 4))
    for k in (0, 3):
        with pytest.raises(DataError, match=rf"3 samples have no {k} nearest others.*Found: k = {k}, 3 samples"):
            nearest(x, k)
    with pytest.raises(ModelError, match=r"do not embed the same samples.*Found: shapes \(3, 4\) and \(2, 4\)"):
        neighbour_agreement(x, x[:2])
    x[1, 2] = np.nan
    with pytest.raises(ModelError, match=r"^the embedding is NaN or infinite for 1 of 3 samples\.$"):
        nearest(x)
