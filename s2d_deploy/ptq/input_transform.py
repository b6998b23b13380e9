"""An elementwise or small linear map in front of a Linear, computed in float at run time: ``y = Linear(T(x))``.

The site ``<op>.input`` is what the Linear multiplies, so it lies behind the map. The map is a child module
``input_transform`` of the layer, applied by a forward pre-hook that is registered first: everything that looks at a
layer's inputs by hooks (discovery, calibration, attribution, GPTQ) sees the transformed input without knowing of it,
and names of ops and sites stay what they were. `simulation.simulate` carries it over to the quantized layer, and export
writes it as float operators in front of QuantizeLinear.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2d_deploy.errors import ArtifactError, ModelError, S2DDeployError, message
from s2d_deploy.files import read_json

NAME = "input_transform"
_TENSORS, _KINDS = "changed.safetensors", "changed.json"


@runtime_checkable
class InputTransform(Protocol):
    """A module that can be written down: its class's `kind` and the arguments that make it again."""

    kind: str

    def arguments(self) -> dict[str, Any]:
        """JSON-ready keyword arguments of the constructor; tensors are buffers and saved beside."""


class BlockHadamard(nn.Module):
    """``x -> x (I (x) D H / sqrt(size))``: signs and an orthogonal Hadamard matrix on every run of `size` channels.

    Spreads an outlier over its block (QuaRot, Ashkboos et al., arXiv 2404.00456, section 4). The layer behind it gets
    ``W (I (x) D H / sqrt(size))``, so the product is unchanged. Random signs D keep what all channels share (a mean
    above zero) from gathering in the block's first channel; they are part of the matrix and cost nothing.

    Args:
        size: a power of two that divides the width.
        seed: of the signs; None for none.
    """

    kind = "block-hadamard"
    matrix: Tensor

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__()
        self.size, self.seed = size, seed
        matrix = hadamard(size)
        if seed is not None:
            signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(seed))
            matrix = matrix * (2.0 * signs - 1.0)
        self.register_buffer("matrix", matrix)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K)."""
        return (x.reshape(*x.shape[:-1], -1, self.size) @ self.matrix).reshape(x.shape)

    def arguments(self) -> dict[str, Any]:
        """What makes it again."""
        return {"size": self.size, "seed": self.seed}


class Rotation(nn.Module):
    """``x -> x matrix``, an orthogonal matrix on all channels.

    Args:
        width: number of channels; the identity until the matrix is set.
    """

    kind = "rotation"
    matrix: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("matrix", torch.eye(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K)."""
        return x @ self.matrix

    def arguments(self) -> dict[str, Any]:
        """What makes it again."""
        return {"width": self.matrix.shape[0]}


class ChannelScale(nn.Module):
    """``x -> x * factor``, one positive factor for each channel (SmoothQuant, Xiao et al., arXiv 2211.10438, eq. 3).

    A product, not a division by the smoothing factor: it rounds alike everywhere, and costs less. The layer behind it
    gets its columns divided by `factor`.

    Args:
        width: number of channels; factors are 1 until they are set.
    """

    kind = "channel-scale"
    factor: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K)."""
        return x * self.factor

    def arguments(self) -> dict[str, Any]:
        """What makes it again."""
        return {"width": self.factor.numel()}


class Kronecker(nn.Module):
    """``x -> x (P1 (x) P2)`` with its outputs in transposed order: ``P2^T X^T P1`` of X, the row as ``(n1, n2)``.

    Two small products (FlatQuant, Sun et al., arXiv 2410.09426, equation 3) in place of a full matrix: ``K (n1 + n2)``
    multiply-accumulates a row, K = n1 n2, where a full one takes K^2. Both have their matrix on the right, which makes
    each one large product for all rows at once; the order that this leaves channels in costs nothing, since the layer
    behind takes it into its weight (`absorb`).

    Args:
        first: n1.
        second: n2; both matrices are the identity until they are set.
    """

    kind = "kronecker"
    p1: Tensor
    p2: Tensor

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        self.register_buffer("p1", torch.eye(first))
        self.register_buffer("p2", torch.eye(second))

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K)."""
        return kronecker(x, self.p1, self.p2)

    def absorb(self, weight: Tensor) -> Tensor:
        """``W ((P1 (x) P2)^-1)^T`` in the same order, ``(N, K)``: what multiplies transformed rows; float64."""
        return kronecker(weight.double(), *(torch.linalg.inv(p.double()).T for p in (self.p1, self.p2)))

    def arguments(self) -> dict[str, Any]:
        """What makes it again."""
        return {"first": self.p1.shape[0], "second": self.p2.shape[0]}


def kronecker(x: Tensor, p1: Tensor, p2: Tensor) -> Tensor:
    """``P2^T X^T P1`` for each row X = (n1, n2) of `x`: (..., K) -> (..., K)."""
    right = x.reshape(*x.shape[:-1], p1.shape[0], p2.shape[0]) @ p2
    return (right.transpose(-1, -2) @ p1).reshape(x.shape)


class Chain(nn.Module):
    """Several transforms, the first listed applied first: what `attach` makes of a second one.

    Args:
        parts: transforms, or their documents ``{"kind": ..., "arguments": ...}``.
    """

    kind = "chain"

    def __init__(self, parts: Sequence[nn.Module | Mapping[str, Any]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(p if isinstance(p, nn.Module) else made(p) for p in parts)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., K)."""
        for part in self.parts:
            x = part(x)
        return x

    def arguments(self) -> dict[str, Any]:
        """What makes it again."""
        return {"parts": [document(cast(InputTransform, part)) for part in self.parts]}


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


KINDS: dict[str, type[nn.Module]] = {
    BlockHadamard.kind: BlockHadamard,
    Rotation.kind: Rotation,
    ChannelScale.kind: ChannelScale,
    Kronecker.kind: Kronecker,
    Chain.kind: Chain,
}


def document(transform: InputTransform) -> dict[str, Any]:
    """``{"kind": ..., "arguments": ...}`` of a transform; `made` reads it back."""
    return {"kind": transform.kind, "arguments": transform.arguments()}


def made(written: Mapping[str, Any]) -> nn.Module:
    """The transform of a `document`, its buffers as the constructor leaves them."""
    return KINDS[written["kind"]](**written["arguments"])


def attach(layer: nn.Module, transform: nn.Module) -> None:
    """Put `transform` in front of `layer`, behind one that is there. The caller changes the weight accordingly.

    Layers that read one tensor may share an instance; the exporter writes equal transforms of one tensor once.
    """
    before = getattr(layer, NAME, None)
    if before is not None:
        setattr(layer, NAME, Chain([*(before.parts if isinstance(before, Chain) else [before]), transform]))
        return
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
        name: document(t)
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
        written: Mapping[str, Any] = read_json(path)
        for name, entry in written["transforms"].items():
            layer = model.get_submodule(name)
            _require_bounded(entry, getattr(layer, "in_features", None))
            attach(layer, made(entry))
        tensors = load_file(folder / _TENSORS)
        own = model.state_dict()
        wrong = [n for n, t in tensors.items() if n not in own or own[n].shape != t.shape]
        if wrong:
            raise KeyError(f"{wrong[0]} of another model")
        model.load_state_dict(tensors, strict=False)
    except ArtifactError:
        raise
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError),
        *(SafetensorError, S2DDeployError),
    ) as error:
        raise ArtifactError(
            message(
                f"{path}: not changes of this model",
                found=f"{type(error).__name__}: {error}",
                fix="run `s2d-deploy quantize` again",
            )
        ) from error


def _require_bounded(entry: Any, width: int | None) -> None:
    """Refuse a transform that is larger than the layer behind it, before anything of its size is made (ValueError)."""
    for key, value in entry["arguments"].items():
        if key == "parts":
            for part in value:
                _require_bounded(part, width)
        elif key != "seed" and (not isinstance(value, int) or width is None or not 0 < value <= width):
            raise ValueError(f"{entry['kind']} with {key} {value!r} in front of {width} channels")


def _apply(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (cast(nn.Module, getattr(module, NAME))(args[0]), *args[1:])
