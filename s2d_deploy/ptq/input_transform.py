"""An elementwise or small linear map in front of a Linear, computed in float at run time: ``y = Linear(T(x))``.

The site ``<op>.input`` is what the Linear multiplies, so it lies behind the map. The map is a child module
``input_transform`` of the layer, applied by a forward pre-hook that is registered first: everything that looks at a
layer's inputs by hooks (discovery, calibration, attribution, GPTQ) sees the transformed input without knowing of it,
and names of ops and sites stay what they were. `simulation.simulate` carries it over to the quantized layer, and export
writes it as float operators in front of QuantizeLinear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2d_deploy.errors import ArtifactError, ModelError, message

NAME = "input_transform"
_TENSORS, _KINDS = "changed.safetensors", "changed.json"


@runtime_checkable
class InputTransform(Protocol):
    """A module that can be written down: its class's `kind` and the arguments that make it again."""

    kind: str

    def arguments(self) -> dict[str, Any]:
        """JSON-ready keyword arguments of the constructor; tensors are buffers and saved beside."""


class BlockHadamard(nn.Module):
    """``x -> x (I (x) H / sqrt(size))``: an orthogonal Hadamard matrix on every run of `size` channels.

    Spreads an outlier over its block (QuaRot, Ashkboos et al., arXiv 2404.00456, section 4). Its own inverse; the layer
    behind it gets ``W (I (x) H / sqrt(size))``, so the product is unchanged.

    Args:
        size: a power of two that divides the width.
    """

    kind = "block-hadamard"
    matrix: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("matrix", hadamard(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K)."""
        return (x.reshape(*x.shape[:-1], -1, self.size) @ self.matrix).reshape(x.shape)

    def arguments(self) -> dict[str, Any]:
        """What makes it again."""
        return {"size": self.size}


def hadamard(size: int) -> Tensor:
    """Sylvester's Hadamard matrix over sqrt(size), float32 ``(size, size)``: symmetric and orthogonal.

    Raises:
        ModelError: not a power of two.
    """
    if size < 1 or size & (size - 1):
        raise ModelError(message("no Sylvester Hadamard matrix", expected="a power of two", found=str(size)))
    matrix: Tensor = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix.div(size**0.5).float()


KINDS: dict[str, type[nn.Module]] = {BlockHadamard.kind: BlockHadamard}


def attach(layer: nn.Module, transform: nn.Module) -> None:
    """Put `transform` in front of `layer`. The caller changes the weight so that the function stays.

    Raises:
        ModelError: the layer has one already.
    """
    if getattr(layer, NAME, None) is not None:
        raise ModelError(message("a layer has two input transforms", fix="use one pass that inserts them"))
    layer.add_module(NAME, transform)
    layer.register_forward_pre_hook(_apply, prepend=True)


def carry(layer: nn.Module, quantized: nn.Module) -> None:
    """Give `quantized`, which stands in for `layer`, the same transform."""
    transform = getattr(layer, NAME, None)
    if transform is not None:
        attach(quantized, transform)


def save_changes(original: nn.Module, model: nn.Module, folder: Path) -> None:
    """Write what passes changed in `model`: tensors that differ from `original`'s, and input transforms.

    Two files in `folder`, none where nothing was changed.
    """
    before = original.state_dict()
    tensors = {
        name: tensor.detach().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name not in before or not torch.equal(before[name], tensor)
    }
    kinds = {
        name: {"kind": t.kind, "arguments": t.arguments()}
        for name, layer in model.named_modules()
        if isinstance(t := getattr(layer, NAME, None), InputTransform)
    }
    if tensors or kinds:
        save_file(tensors, folder / _TENSORS)
        (folder / _KINDS).write_text(json.dumps({"transforms": kinds}, indent=1) + "\n")


def load_changes(model: nn.Module, folder: Path) -> None:
    """Apply to `model`, in place, what `save_changes` wrote (nothing where it wrote nothing).

    Raises:
        ArtifactError: truncated or foreign files, or another model's.
    """
    path = folder / _KINDS
    if not path.exists():
        return
    try:
        document: Mapping[str, Any] = json.loads(path.read_text())
        for name, entry in document["transforms"].items():
            attach(model.get_submodule(name), KINDS[entry["kind"]](**entry["arguments"]))
        tensors = load_file(folder / _TENSORS)
        own = model.state_dict()
        wrong = [n for n, t in tensors.items() if n not in own or own[n].shape != t.shape]
        if wrong:
            raise KeyError(f"{wrong[0]} of another model")
        model.load_state_dict(tensors, strict=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ArtifactError(
            message(
                f"{path}: not changes of this model",
                found=f"{type(error).__name__}: {error}",
                fix="run `s2d-deploy quantize` again",
            )
        ) from error


def _apply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(nn.Module, getattr(module, NAME))(args[0]), *args[1:])
