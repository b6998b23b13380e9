"""Tiny transformers models with planted outliers, for the tests of attribution and one-shot conditioning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

WIDTH, HIDDEN = 32, 64


def bert(seed: int = 0, layers: int = 2) -> nn.Module:
    """A post-LN encoder in eval mode."""
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=HIDDEN,
        vocab_size=64,
        max_position_embeddings=16,
        initializer_range=0.3,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def vit(seed: int = 0, layers: int = 2) -> nn.Module:
    """A pre-LN encoder in eval mode."""
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=HIDDEN,
        image_size=16,
        patch_size=4,
        initializer_range=0.3,
    )
    return ViTModel(config, add_pooling_layer=False).eval()


def texts(batches: int = 3, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of 4 samples with 10 tokens, the last two of which are padding in every second sample."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[::2, 8:] = 0
    return [
        {"input_ids": torch.randint(0, 64, (4, 10), generator=generator), "attention_mask": mask.clone()}
        for _ in range(batches)
    ]


def images(batches: int = 3, seed: int = 1, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Batches of 4 images."""
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(4, 3, 16, 16, generator=generator).to(dtype)} for _ in range(batches)]


def rank_one(layer: nn.Linear, direction: Tensor, size: float) -> None:
    """Add ``size * u direction^T`` to the weight, with u spread evenly over all outputs."""
    u = torch.ones(layer.out_features)
    u[::2] = -1
    with torch.no_grad():
        layer.weight += size * torch.outer(u / u.norm(), direction / direction.norm())


def captured_input(model: nn.Module, name: str, batch: dict[str, Tensor]) -> Tensor:
    """What the module `name` reads for `batch`."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]
