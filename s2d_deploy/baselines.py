"""The optimizers that conditioning is compared with, and runs under.

"adamw" trains everything with AdamW; with a decay it is the plain weight decay that S2D is measured against.
"muon" gives the hidden 2-D weights to `torch.optim.Muon`, which orthogonalizes each update, and the rest
(embeddings, the head, norms, biases, convolutions) to AdamW, as its author prescribes (Jordan et al. 2024,
https://kellerjordan.github.io/posts/muon/). Muon's step is scaled to AdamW's RMS (Liu et al., arXiv 2502.16982),
so that both share one learning rate.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from s2d_deploy.errors import RecipeError, message
from s2d_deploy.sharding import bare, is_sharded
from s2d_deploy.spectral import weighted_layers

OptimizerName = Literal["adamw", "muon"]
BETAS = (0.9, 0.999)


def optimizers(model: nn.Module, name: OptimizerName, *, lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """The optimizers of all trainable weights of `model`; step each.

    Args:
        model: a bare one, or DDP's.
        name: "adamw" or "muon".
        lr: of all of them.
        decay: decoupled weight decay on all weights.

    Raises:
        RecipeError: an unknown name, or Muon without a hidden matrix or on sharded weights.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "adamw":
        return [torch.optim.AdamW(trained, lr=lr, betas=BETAS, weight_decay=decay)]
    if name != "muon":
        raise RecipeError(message(f"unknown optimizer {name!r}", expected="'adamw' or 'muon'"))
    hidden = hidden_matrices(bare(model))
    if not hidden:
        raise RecipeError(message("Muon has nothing to do: the model has no hidden 2-D weight", fix="use adamw"))
    if any(is_sharded(p) for p in hidden):
        raise RecipeError(
            message("Muon orthogonalizes whole matrices, and FSDP2 shards them", fix="use DDP, or another baseline")
        )
    chosen = {id(p) for p in hidden}
    rest = [p for p in trained if id(p) not in chosen]
    found: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, lr=lr, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    ]
    if rest:
        found.append(torch.optim.AdamW(rest, lr=lr, betas=BETAS, weight_decay=decay))
    return found


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Trainable 2-D weights of linear layers, each once, without embeddings tied to them and without the head.

    The head of a transformers model is what lies outside its ``base_model``; of any other model its last linear layer.
    """
    layers = {n: m for n, m in weighted_layers(model).items() if m.weight.dim() == 2}
    base = getattr(model, "base_model", None)
    if isinstance(base, nn.Module) and base is not model:
        inside = {id(p) for p in base.parameters()}
        kept = [m.weight for m in layers.values() if id(m.weight) in inside]
    else:
        kept = [m.weight for m in layers.values()]
        kept = kept if isinstance(base, nn.Module) else kept[:-1]
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    unique: dict[int, Tensor] = {id(w): w for w in kept if w.requires_grad and id(w) not in embedded}
    return [w for w in unique.values() if isinstance(w, nn.Parameter)]
