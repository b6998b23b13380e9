"""Changes to a norm's channel or to a single neuron that the layers behind take back.

A norm's channel made smaller by f is made larger by 1 / f in the columns of every Linear that reads it, and a shift of
the norm's output goes into those Linears' biases: exact in real arithmetic. In a post-LN model a residual sum reads
the norm too. A shift is then taken back by the bias of a Linear that is added into the same sum (still exact). A scale
can go along the stream ("stream": the channel's rows of the Linears in that sum by f, the next norm's gain by 1 / f),
which leaves only that norm's mean and variance changed, or not ("readers": the sum is simply less that much of the
channel). Which of the two moves the model's output less is tried, not guessed. A neuron's row is scaled through its
activation function, which is not homogeneous: approximate. What is not exact is left to the training that runs
meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from s2d_deploy.distill import output_tensors
from s2d_deploy.pcdr import Batch, call_model, forward_batches
from s2d_deploy.producers import NormInput, Producer

Residual = Literal["none", "stream", "readers"]
# A shift is kept when no output moves by more than this share of its largest magnitude; float32 rounds far below.
EXACT = 1e-3
# The scale that is tried to choose between "stream" and "readers".
TRIAL = 0.5


@dataclass(frozen=True, slots=True)
class Neighbours:
    """Who reads a norm or an activation, and the residual sum that reads the norm besides.

    Attributes:
        readers: Linears whose input it is.
        shared: something else reads it, too.
        next_norm: the one norm into whose input the norm's output is added; "" where there is none, or several.
        writers: the Linears that are added into the same sum.
    """

    readers: tuple[str, ...]
    shared: bool
    next_norm: str = ""
    writers: tuple[str, ...] = ()


def neighbours(producers: Mapping[str, Producer], inputs: Mapping[str, NormInput]) -> dict[str, Neighbours]:
    """For every norm and activation module that makes a site. Both arguments are of `producers`."""
    readers: dict[str, list[str]] = {}
    shared: dict[str, bool] = {}
    for site, producer in producers.items():
        if producer.kind in ("norm", "activation") and site.endswith(".input"):
            readers.setdefault(producer.module, []).append(site.removesuffix(".input"))
            shared[producer.module] = producer.shared
    found = {}
    for name, linears in readers.items():
        behind = [other for other, made in inputs.items() if name in made.norms]
        following = behind[0] if len(behind) == 1 and shared[name] else ""
        writers = inputs[following].linears if following else ()
        found[name] = Neighbours(tuple(linears), shared[name], following, writers)
    return found


def is_free(model: nn.Module, names: Iterable[str]) -> bool:
    """Whether all these modules are norms or Linears with trained weights that no other module shares."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    for name in names:
        module = model.get_submodule(name)
        own = list(module.parameters(recurse=False))
        if not isinstance(module, nn.Linear | nn.LayerNorm):
            return False
        if not own or any(not p.requires_grad or owners[id(p)] > 1 for p in own):
            return False
    return True


def scale_norm(
    model: nn.Module, norm: str, around: Neighbours, channels: Tensor, f: Tensor, residual: Residual
) -> None:
    """Scale `channels` (int64 [m]) of a norm's output by `f` (float32 [m]) in place."""
    with torch.no_grad():
        _scale_rows(model.get_submodule(norm), channels, f)
        for name in around.readers:
            _scale_columns(model.get_submodule(name), channels, 1 / f)
        if residual == "stream":
            for name in around.writers:
                _scale_rows(model.get_submodule(name), channels, f)
            gain = model.get_submodule(around.next_norm).get_parameter("weight")
            gain[channels] = gain[channels] / f.to(gain)


def scale_neuron(model: nn.Module, linear: str, readers: Iterable[str], rows: Tensor, f: Tensor) -> None:
    """Scale rows (int64 [m]) of a Linear in front of an activation by `f` (float32 [m]), and take it back behind."""
    with torch.no_grad():
        _scale_rows(model.get_submodule(linear), rows, f)
        for name in readers:
            _scale_columns(model.get_submodule(name), rows, 1 / f)


def centre(
    model: nn.Module, around: Mapping[str, Neighbours], order: Iterable[str], batches: Iterable[Batch]
) -> list[str]:
    """Shift the norms' outputs so that each channel's median is 0, with the model's function as it was.

    Only where every Linear that reads the norm has a bias to take the shift back, and where a residual sum reads it as
    well, a Linear in that sum. Each is checked on the first batch; one that moves an output is undone.

    Args:
        model: changed in place.
        around: of `neighbours`.
        order: the norms' names, in the order of the forward pass.
        batches: where the medians are taken; where a batch has an attention mask, over its real tokens.

    Returns:
        The norms that were shifted.
    """
    kept = list(batches)
    wanted = _outputs(model, kept[0])
    done = []
    for name in order:
        near = around.get(name)
        if near is None or (near.shared and not near.next_norm):
            continue
        linears = (*near.readers, *(near.writers[:1] if near.shared else ()))
        if (near.shared and not near.writers) or not is_free(model, (name, *linears)):
            continue
        parameters = [dict(model.get_submodule(n).named_parameters(recurse=False)) for n in (name, *linears)]
        if any("bias" not in held for held in parameters):
            continue
        biases = [held["bias"] for held in parameters]
        before = [bias.detach().clone() for bias in biases]
        shift = _median(model, name, kept)
        with torch.no_grad():
            biases[0].sub_(shift)
            for linear, bias in zip(linears, biases[1:], strict=True):
                writes = near.shared and linear == linears[-1]
                weight = model.get_submodule(linear).get_parameter("weight")
                bias.add_(shift if writes else weight @ shift)
            if _moved(wanted, _outputs(model, kept[0])) > EXACT:
                for bias, old in zip(biases, before, strict=True):
                    bias.copy_(old)
                continue
        done.append(name)
    return done


def best_residual(model: nn.Module, norm: str, near: Neighbours, channels: Tensor, batch: Batch) -> Residual:
    """What to do about the residual sum when `channels` of this norm are pressed; the model stays as it is."""
    if not near.shared:
        return "none"
    if not near.next_norm or not near.writers or not is_free(model, (near.next_norm, *near.writers)):
        return "readers"
    wanted = _outputs(model, batch)
    f = torch.full((len(channels),), TRIAL, device=channels.device)
    moved: dict[Residual, float] = {}
    ways: tuple[Residual, ...] = ("readers", "stream")
    for way in ways:
        names = (norm, *near.readers, *((*near.writers, near.next_norm) if way == "stream" else ()))
        held = [(p, p.detach().clone()) for n in names for p in model.get_submodule(n).parameters(recurse=False)]
        scale_norm(model, norm, near, channels, f, way)
        moved[way] = _moved(wanted, _outputs(model, batch))
        with torch.no_grad():
            for p, old in held:
                p.copy_(old)
    return min(ways, key=lambda way: moved[way])


def _scale_rows(module: nn.Module, rows: Tensor, f: Tensor) -> None:
    weight = module.get_parameter("weight")
    weight[rows] = weight[rows] * (f.to(weight)[:, None] if weight.dim() == 2 else f.to(weight))
    bias = getattr(module, "bias", None)
    if bias is not None:
        bias[rows] = bias[rows] * f.to(bias)


def _scale_columns(module: nn.Module, columns: Tensor, f: Tensor) -> None:
    weight = module.get_parameter("weight")
    weight[:, columns] = weight[:, columns] * f.to(weight)


def _median(model: nn.Module, name: str, batches: list[Batch]) -> Tensor:
    rows: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: rows.append(output.detach()))
    try:
        forward_batches(model, batches)
    finally:
        handle.remove()
    real = []
    for output, batch in zip(rows, batches, strict=True):
        mask = batch.get("attention_mask")
        fits = mask is not None and mask.shape == output.shape[:-1]
        real.append(output[mask.to(output.device).bool()] if fits and mask is not None else output.flatten(0, -2))
    median: Tensor = torch.cat(real).median(dim=0).values
    return median


def _outputs(model: nn.Module, batch: Batch) -> list[tuple[Tensor, Tensor | None]]:
    """The float outputs, each with the mask of its real tokens where there is one."""
    results = []
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    with torch.no_grad():
        for _, tensor in output_tensors(call_model(model, batch)):
            mask = batch.get("attention_mask")
            fits = mask is not None and tensor.dim() == 3 and mask.shape == tensor.shape[:2]
            results.append((tensor, mask.to(tensor.device).bool() if fits and mask is not None else None))
    for module, mode in modes:
        module.training = mode
    return results


def _moved(wanted: list[tuple[Tensor, Tensor | None]], got: list[tuple[Tensor, Tensor | None]]) -> float:
    """The largest change of an output, over its largest magnitude."""
    worst = 0.0
    for (a, mask), (b, _) in zip(wanted, got, strict=True):
        a, b = (a, b) if mask is None else (a[mask], b[mask])
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)))
    return worst


__all__ = ["Neighbours", "Residual", "best_residual", "centre", "is_free", "neighbours", "scale_neuron", "scale_norm"]
