"""Calibration of real modules against hooks and loops written here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import planted
import pytest
import torch
from torch import Tensor, nn

from s2d_deploy.calibrate import Calibration, calibrate, real_tokens
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ArtifactError, DataError
from s2d_deploy.models import load_model
from s2d_deploy.recipe import ModelSection

CONFIG = {
    "model_type": "vit",
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 1,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 3,
}


@pytest.fixture
def vit() -> nn.Module:
    return load_model(ModelSection(config=CONFIG)).module


def pixels(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def cut(x: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
    for part in x.split(size):
        yield {"pixel_values": part}


def test_every_activation_site_is_observed_once_and_nothing_else(vit: nn.Module) -> None:
    ops = discover(vit, {"pixel_values": pixels(1)})
    result = calibrate(vit, ops, cut(pixels(6), 4))
    sites = {name for op in ops.values() for name, role in op.sites if role != "weight"}
    assert set(result.histograms) == sites
    assert result.samples == 6
    assert any(s.endswith(".probs") for s in sites)
    for name, h in result.histograms.items():
        assert h.total % 6 == 0, name
        if name.endswith(".probs"):
            assert 0 <= h.low <= h.high <= 1


def test_the_extremes_are_those_that_a_hook_sees(vit: nn.Module) -> None:
    x = pixels(5)
    seen: dict[str, Tensor] = {}
    handles = [
        m.register_forward_pre_hook(lambda _m, args, name=n: seen.__setitem__(name, args[0].detach().clone()))
        for n, m in vit.named_modules()
        if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    ops = discover(vit, {"pixel_values": x})
    with torch.no_grad():
        vit(pixel_values=x)
    for handle in handles:
        handle.remove()
    result = calibrate(vit, ops, cut(x, 5))
    assert seen
    for name, tensor in seen.items():
        h = result.histograms[f"{name}.input"]
        assert (h.low, h.high, h.total) == (float(tensor.min()), float(tensor.max()), tensor.numel())
        assert h.std == pytest.approx(float(tensor.double().std(correction=0)), rel=1e-6, abs=1e-12)


def test_it_runs_in_evaluation_mode_leaves_no_hooks_and_repeats_bit_for_bit(vit: nn.Module) -> None:
    ops = discover(vit, {"pixel_values": pixels(1)})
    vit.train()
    before = sum(len(m._forward_pre_hooks) for m in vit.modules())
    notes: list[str] = []
    first = calibrate(vit, ops, cut(pixels(5), 2), notes.append)
    second = calibrate(vit, ops, cut(pixels(5), 2))
    assert vit.training
    assert sum(len(m._forward_pre_hooks) for m in vit.modules()) == before
    assert notes == ["2 samples", "4 samples", "5 samples"]
    for name, h in first.histograms.items():
        other = second.histograms[name]
        assert torch.equal(h.counts, other.counts)
        assert torch.equal(h.power, other.power)


def test_dropout_plays_no_part_in_calibration() -> None:
    model = load_model(ModelSection(config=CONFIG | {"hidden_dropout_prob": 0.5})).module
    ops = discover(model, {"pixel_values": pixels(1)})
    calm = calibrate(model.eval(), ops, cut(pixels(4), 4))
    wild = calibrate(model.train(), ops, cut(pixels(4), 4))
    assert all(torch.equal(h.counts, wild.histograms[n].counts) for n, h in calm.histograms.items())


def test_an_empty_set_and_nan_are_refused(vit: nn.Module) -> None:
    ops = discover(vit, {"pixel_values": pixels(1)})
    with pytest.raises(DataError, match=r"^the calibration set is empty\. Expected: at least one sample\."):
        calibrate(vit, ops, [])
    bad = pixels(2)
    bad[1, 0, 0, 0] = math.nan
    first = next(name for name, op in ops.items() if op.kind == "conv")
    with pytest.raises(DataError, match=rf"^{first}\.input: 1 of 128 observed values are NaN or infinite"):
        calibrate(vit, ops, cut(bad, 2))
    assert not any(m._forward_pre_hooks for m in vit.modules())


def test_saved_statistics_load_back_whole(vit: nn.Module, tmp_path: Path) -> None:
    ops = discover(vit, {"pixel_values": pixels(1)})
    first = calibrate(vit, ops, cut(pixels(4), 4))
    first.save(tmp_path / "c.safetensors")
    second = Calibration.load(tmp_path / "c.safetensors")
    assert second.samples == 4
    assert set(second.histograms) == set(first.histograms)
    for name, h in first.histograms.items():
        o = second.histograms[name]
        assert (o.limit, o.low, o.high, o.total) == (h.limit, h.low, h.high, h.total)
        assert torch.equal(o.counts, h.counts)
        assert torch.equal(o.power, h.power)


def test_truncated_foreign_and_missing_statistics_are_named(vit: nn.Module, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    ops = discover(vit, {"pixel_values": pixels(1)})
    whole = tmp_path / "whole.safetensors"
    calibrate(vit, ops, cut(pixels(1), 1)).save(whole)
    truncated, foreign, short = (tmp_path / f"{n}.safetensors" for n in ("truncated", "foreign", "short"))
    truncated.write_bytes(whole.read_bytes()[:-100])
    save_file({"weight": torch.zeros(3)}, foreign)
    save_file({"a.counts": torch.zeros(3), "a.moments": torch.zeros(8)}, short, metadata={"samples": "1"})
    for path in (truncated, foreign, short, tmp_path / "missing.safetensors"):
        with pytest.raises(ArtifactError, match=rf"{path.name}: not calibration statistics.*Fix: calibrate again"):
            Calibration.load(path)


def test_padding_may_be_left_out() -> None:
    """Every site of a BERT: what real tokens have, taken sample by sample from a run without any padding."""
    model, batches = planted.bert(), planted.texts()
    ops = discover(model, {n: t[:1] for n, t in batches[0].items()}, "last_hidden_state")
    found = calibrate(model, ops, batches, padding="leave_out")
    samples = []
    for batch in batches:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            samples.append({"input_ids": ids[None, :length], "attention_mask": mask[None, :length]})
    expected = calibrate(model, ops, samples)
    hidden = sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)
    assert hidden > 0
    counted = calibrate(model, ops, batches)
    for site, histogram in expected.histograms.items():
        seen = found.histograms[site]
        assert seen.low == pytest.approx(histogram.low, rel=1e-4, abs=1e-5), site
        assert seen.high == pytest.approx(histogram.high, rel=1e-4, abs=1e-5), site
        if not site.endswith(".probs"):  # their rows keep the columns of hidden keys, which are 0
            assert seen.total == histogram.total < counted.histograms[site].total, site


def test_a_mask_that_does_not_fit_hides_nothing() -> None:
    x = torch.arange(24.0).reshape(2, 3, 4)
    assert real_tokens(x, torch.ones(2, 5), 1) is x
    assert real_tokens(x[0], torch.ones(2, 3), 2).shape == (3, 4)
    mask = torch.tensor([[1, 0, 1], [0, 0, 1]])
    assert torch.equal(real_tokens(x, mask, 1), torch.stack([x[0, 0], x[0, 2], x[1, 2]]))
    heads = x.reshape(2, 2, 2, 3)  # keys: tokens along the last axis
    assert torch.equal(real_tokens(heads, mask, 3), heads.permute(0, 3, 1, 2)[mask.bool()])
