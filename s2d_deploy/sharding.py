"""Weights that lie on several processes: who works on what, and how a sharded weight is changed.

DDP keeps every weight whole on every process; FSDP2 keeps a shard of it, a DTensor. S2D changes a weight by
a matrix of low rank, ``W += alpha * L R^T``: a whole one in place, a shard by its share of the rows. With no
process group everything here is a no-op, and nothing is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.spectral import Part, as_matrix, as_weight, is_transposed


def processes() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gathered(mine: dict[str, Any]) -> dict[str, Any]:
    """The union of every process's dictionary: the same on each of them. Collective."""
    _, world = processes()
    if world == 1:
        return mine
    everyone: list[dict[str, Any]] = [{} for _ in range(world)]
    torch.distributed.all_gather_object(everyone, mine)
    return {key: value for one in everyone for key, value in one.items()}


def bare(model: nn.Module) -> nn.Module:
    """The model inside DDP's or torch.compile's wrapper, so that module paths are the user's own."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_sharded(tensor: Tensor) -> bool:
    """Whether this is a DTensor."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this process holds of it; shares its memory."""
    if not is_sharded(tensor):
        return tensor
    shard: Tensor = tensor._local_tensor  # type: ignore[attr-defined]  # to_local() is differentiable and so no alias
    return shard


def reshard(model: nn.Module) -> None:
    """Give FSDP2's weights back after forward passes without a backward pass.

    FSDP2 keeps the root's weights gathered until the backward pass. A weight that is changed in that state loses
    the change.
    """
    if processes()[1] > 1:
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def add_low_rank(target: Tensor, layer: nn.Module, part: Part, left: Tensor, right: Tensor, alpha: float) -> None:
    """``target[rows of part] += alpha * left @ right^T`` in place.

    Args:
        target: the layer's weight, or its gradient, in the layer's layout; whole or sharded.
        layer: whose weight it is.
        part: which rows.
        left: float32 [rows, k].
        right: float32 [K, k].
        alpha: factor.
    """
    with torch.no_grad():
        if is_sharded(target):
            _add_to_shard(target, layer, part, left, right, alpha)
            return
        length = target.shape[1 if is_transposed(layer) else 0]
        rows = as_matrix(layer, target)[part.rows(length)]
        if target.dtype == torch.float32 and rows.untyped_storage().data_ptr() == target.untyped_storage().data_ptr():
            rows.addmm_(left, right.T, alpha=alpha)  # no matrix of the weight's size is made
        else:
            target.add_(_placed(layer, part, target.shape, length, alpha * left @ right.T).to(target.dtype))


def _add_to_shard(target: Any, layer: nn.Module, part: Part, left: Tensor, right: Tensor, alpha: float) -> None:
    from torch.distributed.tensor import distribute_tensor

    length = target.shape[1 if is_transposed(layer) else 0]
    whole = _placed(layer, part, target.shape, length, alpha * left @ right.T)
    # Every process has made the same matrix; None: cut out the own share, send nothing.
    share = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    local(target).add_(local(share).to(target.dtype))


def _placed(layer: nn.Module, part: Part, shape: torch.Size, length: int, rows: Tensor) -> Tensor:
    """The part's rows within a matrix of zeros, in the layer's layout."""
    if part.count > 1:
        matrix = rows.new_zeros(length, rows.shape[1])
        matrix[part.rows(length)] = rows
        rows = matrix
    return as_weight(layer, rows, shape).contiguous()
