"""PCDR: which share of a layer's outliers its leading singular triplets make.

Output i of a layer for input x_j expands as A_ij = sum_r s_r U_ir (V_r . x_j), and

    PCDR_k(i, j) = |sum_{r<=k} s_r U_ir (V_r . x_j)| / |A_ij|

averaged over the layer's largest |A_ij| (Chavan et al., arXiv 2602.14432). Near 1, the top k triplets
alone make the outliers. The bias is no part of the expansion, so it is subtracted before the largest are
looked for. PCDR_k may exceed 1 where later triplets cancel a part of the leading ones.

Streaming: over the batches each layer keeps its `top` largest entries and the inputs that made them,
`top * K` numbers, however many batches there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d_deploy.errors import DataError, message
from s2d_deploy.spectral import Part, Triplets, WeightedLayer, parts_of, weight_matrix, weighted_layers, whole

Batch = Mapping[str, Tensor]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
DEFAULT_TOP = 32


@dataclass(frozen=True, slots=True)
class Outliers:
    """The largest |A_ij| of one layer, largest first (ties: the earlier one).

    Attributes:
        values: float32 [m], A_ij without the bias.
        channels: int64 [m], i; counted from the part's first row.
        inputs: float32 [m, K], x_j (Conv: the unfolded patch of the channel's group).
    """

    values: Tensor
    channels: Tensor
    inputs: Tensor


class OutlierCollector:
    """Watches the layers of a model and keeps the outliers of each; use it as a context manager.

    Args:
        model: its forward passes inside the ``with`` block are watched.
        top: how many outliers each layer keeps.
        layers: module paths; None watches every Linear and Conv.
        split: pattern -> number of parts (see `spectral.parts_of`); each part keeps its own outliers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        top: int = DEFAULT_TOP,
        layers: list[str] | None = None,
        split: Mapping[str, int] | None = None,
    ) -> None:
        self.top = top
        self.layers = weighted_layers(model, layers)
        self._parts: dict[str, list[Part]] = {name: [] for name in self.layers}
        for part in parts_of(self.layers, split or {}):
            self._parts[part.layer].append(part)
        self._kept: dict[str, Outliers] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> OutlierCollector:
        for name, layer in self.layers.items():
            self._handles.append(layer.register_forward_hook(self._hook(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def outliers(self) -> dict[str, Outliers]:
        """By part (a layer that is not split is its own); a layer that no forward pass reached is absent."""
        return dict(self._kept)

    def _hook(self, name: str) -> Callable[[WeightedLayer, tuple[Any, ...], Tensor], None]:
        def watch(layer: WeightedLayer, args: tuple[Any, ...], output: Tensor) -> None:
            with torch.no_grad():
                product = channels_last(layer, output).float()
                if layer.bias is not None:
                    product = product - whole(layer.bias.detach()).float()
                for part in self._parts[name]:
                    found = _largest(name, layer, args[0], product, part, self.top)
                    before = self._kept.get(part.name)
                    self._kept[part.name] = found if before is None else _merge(before, found, self.top)

        return watch


def pcdr(weight: Tensor, triplets: Triplets, outliers: Outliers) -> list[float]:
    """PCDR_1 .. PCDR_k, averaged over the outliers.

    Args:
        weight: [N, K], the matrix whose `triplets` these are.
        triplets: its k leading ones.
        outliers: where to evaluate.

    Returns:
        k numbers >= 0. All are 0 when every A_ij is 0 (a dead layer) or there is no outlier; entries with
        A_ij = 0 beside others that are not are left out of the mean, because they are no outliers.
    """
    # Float64: the sum over r is compared with the whole, and both may be cancellations of larger terms.
    x = outliers.inputs.double()
    whole = (weight.detach()[outliers.channels].double() * x).sum(dim=1)  # [m]
    terms = triplets.S.double() * triplets.U[outliers.channels].double() * (x @ triplets.V.double())  # [m, k]
    alive = whole != 0
    if not bool(alive.any()):
        return [0.0] * terms.shape[1]
    ratio = terms.cumsum(dim=1)[alive].abs() / whole[alive].abs().unsqueeze(1)
    return [float(value) for value in ratio.mean(dim=0)]


def is_dead(outliers: Outliers) -> bool:
    """Whether the layer's output was nothing but its bias for every input seen."""
    return not bool(outliers.values.any())


def smallest_k(ratios: list[float], tau: float, rank: int) -> int:
    """k_target: the smallest k with PCDR_k >= tau; 0 when there is none (the layer is not flagged).

    `rank` is min(N, K). There PCDR is 1 by construction and says nothing (a head with two classes would always
    be flagged at k = 2), so only k < rank counts.
    """
    return next((k for k, ratio in enumerate(ratios, start=1) if ratio >= tau and k < rank), 0)


def forward_batches(model: nn.Module, batches: Iterable[Batch], *, each: Callable[[int], None] | None = None) -> int:
    """Run `model` over `batches` in eval mode without gradients; modes and RNG are as before afterwards.

    Args:
        model: called as ``model(**batch)``.
        batches: moved to the device of the model's first parameter.
        each: called with the number of batches done.

    Returns:
        The number of batches.

    Raises:
        DataError: no batch, or a batch that the model cannot take.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    count = 0
    try:
        with torch.no_grad():
            for batch in batches:
                call_model(model, batch)
                count += 1
                if each is not None:
                    each(count)
    finally:
        for module, mode in modes:
            module.training = mode
    if count == 0:
        raise DataError(
            message(
                "the calibration data holds no batch",
                expected="at least one dict of tensors",
                fix="check the data's path; a generator can be read only once: pass a list",
            )
        )
    return count


def call_model(model: nn.Module, batch: Batch, **extra: Any) -> Any:
    """``model(**batch, **extra)`` on the model's device.

    Raises:
        DataError: the batch is not a mapping, or holds a name that the model does not take.
    """
    if not isinstance(batch, Mapping):
        raise DataError(message("not a batch", expected="a dict of tensors by input name", found=type(batch).__name__))
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    try:
        return model(**moved, **extra)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise DataError(
            message(
                f"the model does not take this batch: {error}",
                expected="the names of the model's forward()",
                found=", ".join(map(str, batch)),
            )
        ) from error


def channels_last(layer: WeightedLayer, output: Tensor) -> Tensor:
    """The layer's output as [samples, positions, N]. Conv positions are flattened; unbatched is one sample."""
    if isinstance(layer, CONVOLUTIONS):
        if output.dim() == len(layer.kernel_size) + 1:
            output = output.unsqueeze(0)
        return output.flatten(2).transpose(1, 2)
    if output.dim() == 1:
        return output.reshape(1, 1, -1)
    return output.reshape(output.shape[0], -1, output.shape[-1])


def require_finite_activation(name: str, what: str, tensor: Tensor) -> None:
    """Check an activation.

    Raises:
        DataError: NaN or infinity; names the layer.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise DataError(
            message(
                f"NaN or infinity in the {what} of layer {name!r}",
                expected="finite activations",
                fix="check the calibration data for NaN, and the model's range in this dtype",
            )
        )


def _largest(name: str, layer: WeightedLayer, x: Tensor, product: Tensor, part: Part, top: int) -> Outliers:
    """The largest of the part's columns of the layer's output without its bias, [samples, positions, N]."""
    rows = part.rows(product.shape[-1])
    positions, width = product.shape[1], rows.stop - rows.start
    entries = product[..., rows].reshape(-1, width)
    if not entries.numel():
        nothing = torch.zeros(0, dtype=torch.int64, device=entries.device)
        return Outliers(entries.reshape(-1), nothing, _inputs(layer, x.detach(), nothing, nothing, positions))
    low, high = torch.aminmax(entries, dim=1)
    peaks = torch.maximum(high, -low)
    require_finite_activation(name, "output", peaks)
    # The `top` largest entries lie in the `top` places with the largest peaks: one pass, and then a few rows.
    places = _top_index(peaks, top).sort().values
    flat = entries[places].reshape(-1)
    index = _top_index(flat, top)
    chosen, channels = places[index // width], index % width
    return Outliers(flat[index], channels, _inputs(layer, x.detach(), chosen, channels + rows.start, positions))


def _inputs(layer: WeightedLayer, x: Tensor, rows: Tensor, channels: Tensor, positions: int) -> Tensor:
    """x_j of each (row, channel): float32 [m, K]."""
    if not isinstance(layer, CONVOLUTIONS):
        return x.reshape(-1, x.shape[-1])[rows].float()
    spatial = len(layer.kernel_size)
    x = x.unsqueeze(0) if x.dim() == spatial + 1 else x
    # The padding as torch itself keeps it, last dimension first; one entry at a time, never the whole unfolding.
    padding = list(layer._reversed_padding_repeated_twice)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    out_shape = _conv_out_shape(layer, x, padding)
    group_in, group_out = x.shape[1] // layer.groups, layer.out_channels // layer.groups
    patches = []
    for row, channel in zip(rows.tolist(), channels.tolist(), strict=True):
        first = channel // group_out * group_in
        patch = F.pad(x[row // positions, first : first + group_in].unsqueeze(0).float(), padding, mode=mode)[0]
        place = row % positions
        for axis in reversed(range(spatial)):
            place, at = divmod(place, out_shape[axis])
            start, step = at * int(layer.stride[axis]), int(layer.dilation[axis])
            window = torch.arange(start, start + step * int(layer.kernel_size[axis]), step, device=x.device)
            patch = patch.index_select(axis + 1, window)
        patches.append(patch.reshape(-1))
    return torch.stack(patches) if patches else x.new_zeros((0, weight_matrix(layer).shape[1]))


def _conv_out_shape(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor, padding: list[int]) -> list[int]:
    """Spatial output shape, from torch's rule for convolutions."""
    shape = []
    spatial = len(layer.kernel_size)
    for axis in range(spatial):
        before, after = padding[2 * (spatial - 1 - axis)], padding[2 * (spatial - 1 - axis) + 1]
        reach = int(layer.dilation[axis]) * (int(layer.kernel_size[axis]) - 1) + 1
        shape.append((x.shape[axis + 2] + before + after - reach) // int(layer.stride[axis]) + 1)
    return shape


def _merge(old: Outliers, new: Outliers, top: int) -> Outliers:
    values = torch.cat([old.values, new.values])
    index = _top_index(values, top)
    channels = torch.cat([old.channels, new.channels])[index]
    return Outliers(values[index], channels, torch.cat([old.inputs, new.inputs])[index])


def _top_index(values: Tensor, top: int) -> Tensor:
    """Indices of the largest magnitudes. Sorted stably within the chosen, so that equal ones keep their order."""
    index = values.abs().topk(min(top, values.numel())).indices.sort().values
    return index[values[index].abs().argsort(descending=True, stable=True)]
