"""What a model consists of, found by running it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError
from s2d_deploy.plan import Op


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(3, 3)
        self.conv = nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, groups=2)
        self.fc = nn.Linear(6, 5, bias=False)

    def forward(self, x):
        return self.fc(self.conv(x).flatten(2).transpose(1, 2))


def test_layers_in_execution_order_with_their_macs():
    ops = discover(Small(), {"x": torch.randn(3, 4, 7, 6)})
    # Output 4 x 4: (7 + 2 - 3) // 2 + 1 and (6 + 2 - 2) // 2 + 1.
    assert list(ops.values()) == [
        Op("conv", "conv", 2 * 3 * 2, 6, 6 * 4 * 4 * (2 * 3 * 2)),
        Op("fc", "linear", 6, 5, 4 * 4 * 6 * 5),
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_macs_are_those_of_one_sample(size):
    assert discover(Small(), {"x": torch.randn(size, 4, 7, 6)})["fc"].macs == 480


def test_attention_has_two_products():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=9)
    model = BertModel(config, add_pooling_layer=False)
    ids = torch.randint(0, 9, (3, 5))
    ops = discover(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    layer = "encoder.layer.1"
    assert [n for n in ops if n.startswith(layer)] == [
        f"{layer}.attention.self.query",
        f"{layer}.attention.self.key",
        f"{layer}.attention.self.value",
        f"{layer}.attention.self.scores",
        f"{layer}.attention.self.context",
        f"{layer}.attention.output.dense",
        f"{layer}.intermediate.dense",
        f"{layer}.output.dense",
    ]
    scores, context = ops[f"{layer}.attention.self.scores"], ops[f"{layer}.attention.self.context"]
    assert (scores.kind, scores.k, scores.n, scores.macs) == ("scores", 8, 5, 2 * 5 * 8 * 5)
    assert (context.kind, context.k, context.n, context.macs) == ("context", 5, 8, 2 * 5 * 5 * 8)


def test_it_agrees_with_torch_s_own_counter():
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, hidden_size=16, num_hidden_layers=2, num_labels=3)
    config.num_attention_heads, config.intermediate_size = 2, 40
    model, batch = ViTForImageClassification(config).eval(), {"pixel_values": torch.randn(2, 1, 8, 8)}
    ops = discover(model, batch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    assert counter.get_total_flops() == 2 * 2 * sum(op.macs for op in ops.values())


def test_the_model_s_mode_and_hooks_are_left_alone():
    model = Small().train()
    discover(model, {"x": torch.randn(2, 4, 7, 6)})
    assert model.training
    assert not model.fc._forward_hooks


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(self.fc(x))


def test_a_layer_that_runs_twice_is_refused():
    model = _Twice()
    with pytest.raises(ModelError, match=r"layer 'fc' runs more than once in one forward pass"):
        discover(model, {"x": torch.randn(2, 4)})
    assert not model.fc._forward_hooks


def test_a_model_with_nothing_to_quantize_is_refused():
    class Nothing(nn.Module):
        def forward(self, x):
            return x + 1

    with pytest.raises(ModelError, match=r"the model has no Linear, Conv2d or attention\. Found: Nothing\."):
        discover(Nothing(), {"x": torch.randn(2, 4)})
