"""A Linear behind a shift, a scale and copies of its input channels: exact in real arithmetic.

What `equalize` puts in front of a Linear whose channels no weight can hold. The inner Linear, ``<layer>.linear``, is
the op, and the tensor that it reads is its quantized site; shift, scale and copies stay elementwise in float, and the
direct channels are a float product of their own, which every audit counts. What is lost: the model is no longer one
that transformers builds by itself (see `inserted_layers`), and the runtime pays one elementwise pass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ModelError, message


class EqualizedLinear(nn.Module):
    """A Linear behind a shift, a scale and copies of its input channels, with a few channels led past it in float.

    Computes what the original Linear did; its quantized site is the tensor that the inner Linear reads. A channel
    with m copies arrives m times at 1/m of its size, and meets m copies of its weight column. A direct channel does
    not arrive: the direct ones are multiplied with their columns in float, and added to the output.

    Args:
        linear: the original; its weights are copied and take the inverse.
        shift: (K,).
        scale: (K,), positive.
        copies: int64 (K,), how often each channel arrives; 0 for the direct ones. None: 1 everywhere.
        direct: the direct channels, ascending.
    """

    shift: Tensor
    scale: Tensor
    inverse: Tensor
    index: Tensor | None
    direct: Tensor | None
    columns: Tensor | None

    def __init__(
        self,
        linear: nn.Linear,
        shift: Tensor,
        scale: Tensor,
        copies: Tensor | None = None,
        direct: Sequence[int] = (),
    ) -> None:
        super().__init__()
        weight = linear.weight.detach().clone()
        count = torch.ones(len(scale), dtype=torch.int64) if copies is None else copies
        index = torch.repeat_interleave(torch.arange(len(scale)), count)
        self.biased = linear.bias is not None
        bias = weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach().clone()
        self.linear = nn.Linear(len(index), linear.out_features).to(weight)
        with torch.no_grad():
            self.linear.weight.copy_((weight * scale.to(weight))[:, index])
            self.linear.bias.copy_(bias + weight @ shift.to(weight))
        self.register_buffer("direct", torch.tensor(list(direct), dtype=torch.int64) if len(direct) else None)
        self.register_buffer("columns", weight[:, list(direct)].T.contiguous() if len(direct) else None)
        self.register_buffer("shift", shift.to(weight))
        self.register_buffer("scale", scale.to(weight))
        self.register_buffer("inverse", 1 / (scale.to(weight)[index] * count.to(weight)[index]))
        self.register_buffer("index", index if copies is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K) -> (..., N)``."""
        x = x - self.shift
        y: Tensor = self.linear((x if self.index is None else x.index_select(-1, self.index)) * self.inverse)
        if self.direct is None or self.columns is None:
            return y
        return y + x.index_select(-1, self.direct) @ self.columns

    def parts(self) -> dict[str, Tensor]:
        """What stands around the Linear: the arguments of the constructor, without those that are None or empty."""
        result = {"shift": self.shift, "scale": self.scale}
        if self.index is not None:
            result["copies"] = torch.bincount(self.index, minlength=len(self.scale))
        if self.direct is not None:
            result["direct"] = self.direct
        return result

    def plain(self) -> nn.Linear:
        """A Linear that computes the same: ``(N, K)`` again, by float64 sums.

        A channel with m copies x_c / (s_c m) meets m columns w_j: together it has their mean over s_c.
        """
        inner, scale = self.linear.weight.detach().double(), self.scale.double()
        index = torch.arange(len(scale), device=inner.device) if self.index is None else self.index
        count = torch.bincount(index, minlength=len(scale)).clamp_min(1)
        weight = torch.zeros(inner.shape[0], len(scale), dtype=inner.dtype, device=inner.device)
        weight = weight.index_add(1, index, inner) / (count * scale)
        if self.direct is not None and self.columns is not None:
            weight[:, self.direct] = self.columns.T.double()
        plain = nn.Linear(len(scale), inner.shape[0], bias=self.biased).to(self.linear.weight)
        with torch.no_grad():
            plain.weight.copy_(weight)
            if self.biased:
                plain.bias.copy_(self.linear.bias.double() - weight @ self.shift.double())
        return plain.train(self.training)


def layer_name(model: nn.Module, op: str) -> str:
    """The name that `op`'s layer has in the model before anything was inserted: ``fc1`` for ``fc1.linear`` within."""
    outer, _, leaf = op.rpartition(".")
    if leaf != "linear" or not outer:
        return op
    try:
        return outer if isinstance(model.get_submodule(outer), EqualizedLinear) else op
    except AttributeError:  # not of this model
        return op


def put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The Linear at `name`, which may lie inside an `EqualizedLinear` by now."""
    module = model.get_submodule(name)
    if isinstance(module, EqualizedLinear):
        module = module.linear
    if not isinstance(module, nn.Linear):
        raise ModelError(message(f"layer {name!r} cannot be changed", expected="a Linear", found=type(module).__name__))
    return module


__all__ = ["EqualizedLinear", "layer_name", "linear_at", "put"]
