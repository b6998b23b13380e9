"""Streams of a layer's input rows against the same rows held at once."""

from __future__ import annotations

import torch
from torch import nn

from s2d_deploy.ptq.activations import moments, sampled_rows


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(5, 3)

    def forward(self, x, attention_mask):
        return self.fc(x)


def masked(seed=0):
    torch.manual_seed(seed)
    batches = []
    for size in (4, 2, 3):
        mask = (torch.rand(size, 6) < 0.7).long()
        batches.append({"x": torch.randn(size, 6, 5) * 3 + 1, "attention_mask": mask})
    rows = torch.cat([b["x"][b["attention_mask"].bool()] for b in batches])
    return Masked().eval(), batches, rows


def test_moments_leave_padding_out():
    model, batches, rows = masked()
    found = moments(model, batches, ["fc"])["fc"]
    exact = rows.double()
    assert found.count == len(rows)
    assert torch.allclose(found.mean, exact.mean(0))
    assert torch.allclose(found.gram, exact.T @ exact / len(rows))


def test_rows_of_a_convolution_are_its_patches():
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3, stride=2, padding=1)
    model = nn.Sequential(conv).eval()

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model

        def forward(self, x):
            return self.body(x)

    x = torch.randn(2, 3, 8, 8)
    rows = sampled_rows(Wrapped(), [{"x": x}], ["body.0"], 10**6)["body.0"]
    wanted = conv(x).flatten(2).transpose(1, 2).reshape(-1, 4)
    assert torch.allclose(rows @ conv.weight.flatten(1).T + conv.bias, wanted, atol=1e-5)


def test_samples_are_rows_that_were_seen_and_the_same_each_time():
    model, batches, rows = masked()
    found = sampled_rows(model, batches, ["fc"], 7, seed=3)["fc"]
    assert found.shape == (7, 5)
    seen = {tuple(r) for r in rows.tolist()}
    assert all(tuple(r) in seen for r in found.tolist())
    assert len({tuple(r) for r in found.tolist()}) == 7
    assert torch.equal(found, sampled_rows(model, batches, ["fc"], 7, seed=3)["fc"])
    assert not torch.equal(found, sampled_rows(model, batches, ["fc"], 7, seed=4)["fc"])


def test_a_sample_is_uniform_however_the_data_was_cut():
    """Every row is kept about equally often, first batch or last."""
    model, batches, rows = masked()
    order = {tuple(r): i for i, r in enumerate(rows.tolist())}
    counts = torch.zeros(len(rows))
    for seed in range(200):
        for row in sampled_rows(model, batches, ["fc"], 5, seed=seed)["fc"].tolist():
            counts[order[tuple(row)]] += 1
    expected = 200 * 5 / len(rows)
    assert float((counts - expected).abs().max()) < 5 * expected**0.5  # five standard deviations of a count


def test_fewer_rows_than_asked_for_are_all_kept_in_order():
    model, batches, rows = masked()
    assert torch.equal(sampled_rows(model, batches, ["fc"], 10**6)["fc"], rows)
