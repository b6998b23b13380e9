"""A Linear behind a shift, a scale and copies of its input channels: exact in real arithmetic.

What `equalize` puts in front of a Linear whose channels no weight can hold. The tensor that the inner Linear reads is
its quantized site; shift, scale and copies stay elementwise in float. What is lost: the model is no longer one that
transformers builds by itself, and the runtime pays one elementwise pass, two for each direct channel.
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
    not arrive: its column times its value is added elementwise to the output.

    Args:
        linear: the original; its weights are copied and take the inverse.
        shift: (K,).
        scale: (K,), positive.
        copies: int64 (K,), how often each channel arrives; 0 for the direct ones. None: 1 everywhere.
        direct: the direct channels.
    """

    shift: Tensor
    inverse: Tensor
    index: Tensor | None
    columns: Tensor

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
        bias = weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach().clone()
        self.linear = nn.Linear(len(index), linear.out_features).to(weight)
        with torch.no_grad():
            self.linear.weight.copy_((weight * scale.to(weight))[:, index])
            self.linear.bias.copy_(bias + weight @ shift.to(weight))
        self.direct = tuple(direct)
        self.register_buffer("columns", weight[:, list(direct)].T.contiguous())
        self.register_buffer("shift", shift.to(weight))
        self.register_buffer("inverse", 1 / (scale.to(weight)[index] * count.to(weight)[index]))
        self.register_buffer("index", index if copies is not None else None)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., K) -> (..., N)``."""
        x = x - self.shift
        y: Tensor = self.linear((x if self.index is None else x.index_select(-1, self.index)) * self.inverse)
        for column, channel in zip(self.columns, self.direct, strict=True):
            y = y + x[..., channel : channel + 1] * column
        return y


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The Linear at `name`, which may lie inside an `EqualizedLinear` by now."""
    module = model.get_submodule(name)
    if isinstance(module, EqualizedLinear):
        module = module.linear
    if not isinstance(module, nn.Linear):
        raise ModelError(message(f"layer {name!r} cannot be changed", expected="a Linear", found=type(module).__name__))
    return module


__all__ = ["EqualizedLinear", "linear_at"]
