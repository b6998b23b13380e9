"""What makes each site's tensor: post-LN and pre-LN models, and what must be reported as unknown."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from s2d_deploy.discovery import discover
from s2d_deploy.producers import Producer, module_kind, trace_producers

sys.path.insert(0, str(Path(__file__).parent))
import planted


def trace(model: nn.Module, batch: dict[str, Tensor], output: str | None = None) -> dict[str, Producer]:
    return trace_producers(model, discover(model, batch, output), batch)


def test_post_norm_sites_and_their_makers() -> None:
    found = trace(planted.bert(), planted.texts(1)[0], "last_hidden_state")
    site = found["encoder.layer.1.attention.self.query.input"]
    assert (site.kind, site.module) == ("norm", "encoder.layer.0.output.LayerNorm")
    assert site.linears == ("encoder.layer.0.output.dense",)
    assert site.shared  # the residual sum reads it as well
    gelu = found["encoder.layer.0.output.dense.input"]
    assert (gelu.kind, gelu.linears) == ("activation", ("encoder.layer.0.intermediate.dense",))
    assert found["encoder.layer.0.attention.self.key"].module == "encoder.layer.0.attention.self.key"
    assert found["encoder.layer.0.attention.self.probs"].kind == "softmax"
    context = found["encoder.layer.0.attention.output.dense.input"]
    assert (context.kind, context.linears) == ("attention", ("encoder.layer.0.attention.self.value",))
    assert found["encoder.layer.0.attention.self.query.input"].linears == ()  # embeddings alone


def test_pre_norm_collects_the_whole_residual_stream() -> None:
    found = trace(planted.vit(), planted.images(1)[0], "last_hidden_state")
    site = found["layers.1.mlp.fc1.input"]
    assert site.kind == "norm"
    assert set(site.linears) == {"layers.0.attention.o_proj", "layers.0.mlp.fc2", "layers.1.attention.o_proj"}
    assert not site.shared
    assert found["embeddings.patch_embeddings.projection.input"].kind == "input"


def test_siglip_and_clip_leave_nothing_unknown() -> None:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 8,
        "patch_size": 4,
    }
    batch = {"pixel_values": torch.randn(2, 3, 8, 8)}
    for model in (SiglipVisionModel(SiglipVisionConfig(**sizes)), CLIPVisionModel(CLIPVisionConfig(**sizes))):
        found = trace(model.eval(), batch)
        assert found["encoder.layers.0.mlp.fc2.input"].kind == "activation"
        assert not [p for p in found.values() if p.kind == "unknown"]


class Odd(nn.Module):
    """A functional GELU, a gate, and half of an output: none may be guessed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.b(F.gelu(self.a(x)))
        return self.d(self.c(gated * torch.sigmoid(gated))[..., :4])


def test_what_is_not_recognized_is_unknown_with_a_reason() -> None:
    found = trace(Odd(), {"x": torch.randn(2, 3, 8)})
    assert {name: p.kind for name, p in found.items()} == {
        "a.input": "input",
        "b.input": "unknown",
        "c.input": "unknown",
        "d.input": "unknown",
    }
    assert found["b.input"].note == "made by Gelu, which no module owns"
    assert found["d.input"].note == "a part of the output of c"


def test_the_model_is_left_as_it_was() -> None:
    model = planted.bert().train()
    for parameter in list(model.parameters())[::2]:
        parameter.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    batch = planted.texts(1)[0]
    trace(model, batch)
    assert [p.requires_grad for p in model.parameters()] == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_module_kinds() -> None:
    assert module_kind(nn.LayerNorm(4)) == "norm"
    assert module_kind(nn.LayerNorm(4, elementwise_affine=False)) is None
    assert module_kind(nn.GELU()) == "activation"
    assert module_kind(nn.Softmax(-1)) is None
    assert module_kind(nn.PReLU()) is None  # has weights
    assert module_kind(nn.Dropout()) is None
