"""Error analysis against the same comparisons written out, layer by layer."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from s2d_deploy.attention import use_visible_attention
from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.error_analysis import analyse_errors, output_error, subset
from s2d_deploy.errors import DataError
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.plan import Plan
from s2d_deploy.quantize import build_plan
from s2d_deploy.simulation import simulate


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.fc(self.conv(x).mean((2, 3))).relu())


def small(precision="w4a4"):
    torch.manual_seed(0)
    model, batches = Small().eval(), [{"x": torch.randn(5, 2, 6, 6)} for _ in range(2)]
    ops = discover(model, batches[0])
    return model, batches, build_plan(model, ops, calibrate(model, ops, batches), precision)


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config, add_pooling_layer=False).eval()
    ids = torch.randint(0, 50, (4, 7))
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[0, 4:] = 0
    mask[2, 2:] = 0
    batches = [{"input_ids": ids, "attention_mask": mask}]
    ops = discover(model, batches[0], "last_hidden_state")
    return model, batches, build_plan(model, ops, calibrate(model, ops, batches), "w4a4")


def fake(plan: Plan, site: str, x: torch.Tensor) -> torch.Tensor:
    s = plan.sites[site]
    return FakeQuantizer(s.grid, s.scale, s.zero_point)(x)


def relative(reference: torch.Tensor, other: torch.Tensor) -> float:
    return float((reference - other).double().square().sum() / reference.double().square().sum())


def test_every_figure_of_a_small_model():
    model, batches, plan = small()
    found = analyse_errors(model, plan, lambda: batches, "output")
    layers = {entry.op: entry for entry in found.layers}
    assert set(layers) == {"conv", "fc", "head"}
    x = torch.cat([b["x"] for b in batches])
    with torch.no_grad():
        h = model.conv(x).mean((2, 3))
        y = model.fc(h)
        isolated = F.linear(fake(plan, "fc.input", h), fake(plan, "fc.weight", model.fc.weight), model.fc.bias)
        simulated = simulate(model, plan).eval()
        inside = simulated.fc(simulated.conv(x).mean((2, 3)))
        alone = simulate(model, subset(plan, ["fc"])).eval()
        assert layers["fc"].isolated_snr_db == pytest.approx(-10 * math.log10(relative(y, isolated)), rel=1e-6)
        assert layers["fc"].isolated_cosine == pytest.approx(
            float(F.cosine_similarity(y.flatten(), isolated.flatten(), 0))
        )
        assert layers["fc"].accumulated_snr_db == pytest.approx(-10 * math.log10(relative(y, inside)), rel=1e-6)
        assert layers["fc"].accumulated_cosine == pytest.approx(
            float(F.cosine_similarity(y.flatten(), inside.flatten(), 0))
        )
        assert layers["fc"].output_error == pytest.approx(relative(model(x), alone(x)), rel=1e-6)
        assert found.output_error == pytest.approx(relative(model(x), simulated(x)), rel=1e-6)
    assert sum(entry.share for entry in found.layers) == pytest.approx(1.0)
    assert [entry.share for entry in found.layers] == sorted((e.share for e in found.layers), reverse=True)
    assert found.additivity == pytest.approx(sum(e.output_error for e in found.layers) / found.output_error)
    assert found.samples == 10


def test_attention_products_and_padding():
    """Padded tokens are noise that no one reads: what they hold must not move a figure."""
    model, batches, plan = bert()
    found = {e.op: e for e in analyse_errors(model, plan, lambda: batches, "last_hidden_state", explain=False).layers}
    owner = "encoder.layer.0.attention.self"
    assert {f"{owner}.scores", f"{owner}.context"} <= set(found)
    use_visible_attention(model)
    seen: dict[str, torch.Tensor] = {}
    layer = model.encoder.layer[0].attention.self
    with torch.no_grad():
        handles = [
            getattr(layer, n).register_forward_hook(lambda _m, _a, y, n=n: seen.__setitem__(n, y))
            for n in ("query", "key")
        ]
        model(**batches[0])
        for handle in handles:
            handle.remove()
        q, k = (seen[n].view(4, 7, 2, 8).transpose(1, 2) for n in ("query", "key"))
        scores = q @ k.transpose(2, 3)
        other = fake(plan, f"{owner}.query", q) @ fake(plan, f"{owner}.key", k.transpose(2, 3))
        mask = batches[0]["attention_mask"].bool()
        real = (mask[:, None, :, None] & mask[:, None, None, :]).expand(4, 2, 7, 7)
    assert found[f"{owner}.scores"].isolated_snr_db == pytest.approx(
        -10 * math.log10(relative(scores[real], other[real])), rel=1e-5
    )
    changed = [
        {**batches[0], "input_ids": torch.where(batches[0]["attention_mask"].bool(), batches[0]["input_ids"], 9)}
    ]
    again = analyse_errors(model, plan, lambda: changed, "last_hidden_state", explain=False)
    linear = "encoder.layer.0.attention.self.query"
    assert {e.op: e for e in again.layers}[linear].isolated_snr_db == pytest.approx(found[linear].isolated_snr_db)


def test_a_layer_in_float_has_no_row_and_no_error():
    model, batches, plan = small()
    kept = subset(plan, ["head"])
    found = analyse_errors(model, kept, lambda: batches, "output")
    assert [entry.op for entry in found.layers] == ["head"]
    assert found.layers[0].share == 1.0
    assert found.additivity == pytest.approx(1.0)


def test_nothing_quantized_is_no_error_at_all():
    model, batches, plan = small()
    found = analyse_errors(model, subset(plan, []), lambda: batches, "output")
    assert found.layers == []
    assert found.output_error == 0.0
    assert found.to_dict()["output_snr_db"] is None
    json.dumps(found.to_dict(), allow_nan=False)


def test_one_part_of_a_layer():
    model, batches, plan = small()
    weights = output_error(model, subset(plan, ["fc"], ["weight"]), lambda: batches, "output")
    both = output_error(model, subset(plan, ["fc"]), lambda: batches, "output")
    assert 0 < weights < both


def test_more_bits_less_error():
    errors = []
    for precision in ("w4a4", "w6a6", "w8a8"):
        model, batches, plan = small(precision)
        errors.append(analyse_errors(model, plan, lambda b=batches: b, "output", explain=False).output_error)
    assert errors == sorted(errors, reverse=True)


def test_no_samples():
    model, _, plan = small()
    with pytest.raises(DataError, match="error analysis has no samples"):
        analyse_errors(model, plan, list, "output")
