"""Checkpoints of a training run: whole or absent, and only ever continued by the run that wrote them.

A file is written beside its place, flushed to the disk, and renamed: an interrupted save leaves the one
before as it was. It carries a fingerprint of the arguments and the initial weights. Sharded tensors are
stored whole, so a run on many processes may be continued on another number of them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ArtifactError, StageError, message
from s2d_deploy.files import REFUSALS, refused
from s2d_deploy.sharding import is_sharded
from s2d_deploy.spectral import whole

_DIGEST = "sha256"


def prepared(path: Path) -> Path:
    """`path`, its folder made: checked before the first step, not at the first checkpoint.

    Raises:
        StageError: the folder cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StageError(
            message(f"the folder of the checkpoint {path} cannot be made: {error}", fix="choose another folder")
        ) from error
    return path


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` atomically.

    Raises:
        StageError: it cannot be written; an earlier file is still there.
    """
    temporary = path.with_name(path.name + ".part")
    refusals: list[OSError] = []
    try:
        with temporary.open("wb") as file:
            torch.save({**state, _DIGEST: digest_of(state)}, _Noting(file, refusals))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            refusals.append(error)
        if refusals and refusals[0].errno in REFUSALS:
            raise refused(refusals[0], path) from error
        raise StageError(
            message(f"the checkpoint {path} cannot be written: {error}", fix="free space, or choose another folder")
        ) from error


class _Noting:
    """A file to write to that remembers what the machine refused: torch's writer says something else of it."""

    def __init__(self, file: BinaryIO, refusals: list[OSError]) -> None:
        self._file, self._refusals = file, refusals

    def write(self, data: bytes) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self._refusals.append(error)
            raise

    def flush(self) -> None:
        self._file.flush()


def load(path: Path, fingerprint: str) -> dict[str, Any]:
    """Read a checkpoint of the run with this fingerprint; tensors on the CPU.

    Raises:
        ArtifactError: truncated, foreign, or of another run.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found, recorded = state["fingerprint"], state.pop(_DIGEST)
        if recorded != digest_of(state):
            raise ValueError("the values are not those that were written")
    except Exception as error:
        raise ArtifactError(
            message(
                f"{path} is not a readable checkpoint of a conditioning run: {type(error).__name__}",
                fix="remove it to begin anew",
            )
        ) from error
    if found != fingerprint:
        raise ArtifactError(
            message(
                f"the checkpoint {path} belongs to another run",
                expected="the same initial weights, objective, S2D config, steps, lr, warmup and seed",
                fix="remove it to begin anew, or give another checkpoint path",
            )
        )
    result: dict[str, Any] = state
    return result


def digest_of(value: Any) -> str:
    """SHA-256 over a nested state, tensors bit by bit: torch's archives carry no digest that loading would check."""
    h = hashlib.sha256()
    _feed(h, value)
    return h.hexdigest()


def _feed(h: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        h.update(f"tensor {value.dtype} {list(value.shape)}".encode())
        h.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, dict):
        h.update(f"dict {len(value)}".encode())
        for key, entry in value.items():
            h.update(repr(key).encode())
            _feed(h, entry)
    elif isinstance(value, list | tuple):
        h.update(f"list {len(value)}".encode())
        for entry in value:
            _feed(h, entry)
    else:
        h.update(f"{type(value).__name__} {value!r}".encode())


def fingerprint(model: nn.Module, *arguments: object) -> str:
    """SHA-256 over the arguments and the weights: only the same run may be resumed."""
    digest = hashlib.sha256(repr(arguments).encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def whole_state(value: Any) -> Any:
    """A nested state with every sharded tensor gathered. Collective."""
    if isinstance(value, Tensor):
        return whole(value)
    if isinstance(value, dict):
        return {key: whole_state(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [whole_state(entry) for entry in value]
    return value


def load_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy whole tensors into the weights and buffers of a model, each process its shard.

    Raises:
        ArtifactError: names or shapes are not the model's.
    """
    own = model.state_dict()
    wrong = sorted(set(own) ^ set(state)) or [n for n, t in own.items() if t.shape != state[n].shape]
    if wrong:
        raise ArtifactError(
            message(f"the checkpoint is of another model: {', '.join(wrong[:3])} does not fit", fix="remove it")
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(like(state[name], tensor))


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`Optimizer.load_state_dict` of whole tensors, each process its shard."""
    parameters: Sequence[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {
        index: {k: like(v, parameters[index]) if isinstance(v, Tensor) else v for k, v in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": kept})


def like(tensor: Tensor, model: Any) -> Tensor:
    """A whole `tensor`, sharded as `model` is where both have one shape (so not a step counter)."""
    if not is_sharded(model) or tensor.shape != model.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    moved = tensor.to(model.device_mesh.device_type)
    return distribute_tensor(moved, model.device_mesh, model.placements, src_data_rank=None)
