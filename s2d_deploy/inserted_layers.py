"""Keep a model with inserted layers on disk, so that the folder still loads without them.

Equalizing is exact, so a plain Linear computes what an `EqualizedLinear` does. The checkpoint holds that plain
Linear: transformers loads it, and its float function is the same. Beside it lies ``inserted.safetensors`` with
``<layer>.shift`` and ``<layer>.scale`` (K), and where they exist ``<layer>.copies`` and ``<layer>.direct`` (int64);
`apply_inserted` puts the layers back. What is lost: the last bits of the weights, once, because a scale is divided out
and multiplied in again.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2d_deploy.equalized_linear import EqualizedLinear, put
from s2d_deploy.errors import ModelError, message

INSERTED_FILE = "inserted.safetensors"
_MOST_COPIES = 64  # of a channel, on average: far above what any search makes, far below what could not be stored
_README = """\
This folder holds the weights of the model after one-shot conditioning.

transformers loads it, and gets the same float function as the conditioned model. What makes that model fit for low
precisions is not in it: {count} layer(s) have a shift, a scale and copies of their input channels in front, which
`inserted.safetensors` holds. `s2d-deploy` puts them back when it continues the run that made this folder.
"""


def inserted_layers(model: nn.Module) -> dict[str, EqualizedLinear]:
    """The inserted layers by the name of the Linear whose place they took."""
    return {name: m for name, m in model.named_modules() if isinstance(m, EqualizedLinear)}


def without_inserted(model: nn.Module) -> nn.Module:
    """A copy of `model` with plain Linears: the same function in real arithmetic."""
    plain = copy.deepcopy(model)
    for name, layer in inserted_layers(plain).items():
        put(plain, name, layer.plain())
    return plain


def save_inserted(model: nn.Module, folder: Path) -> None:
    """Write the inserted layers of `model`, and a note, into `folder`."""
    layers = inserted_layers(model)
    tensors = {f"{name}.{part}": value for name, layer in layers.items() for part, value in layer.parts().items()}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / INSERTED_FILE)
    (folder / "README.md").write_text(_README.format(count=len(layers)), encoding="utf-8")


def apply_inserted(model: nn.Module, folder: Path) -> bool:
    """Put the inserted layers that `folder` holds into `model`, in place. Returns whether there were any.

    Raises:
        ModelError: the file is not readable, or belongs to another model.
    """
    path = folder / INSERTED_FILE
    if not path.exists():
        return False
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            message(f"{path}: not readable", found=f"{type(error).__name__}: {error}", fix="condition the model again")
        ) from error
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, part = key.rpartition(".")
        layers.setdefault(name, {})[part] = tensor
    modules = dict(model.named_modules())
    wrong = [f"{name}: {why}" for name, parts in layers.items() if (why := _misfit(modules.get(name), parts))]
    if wrong:
        raise ModelError(
            message(
                f"{path}: inserted layers of another model: {'; '.join(wrong[:4])}",
                expected="the model that this folder was made from",
                fix="condition the model again",
            )
        )
    for name, parts in layers.items():
        linear = modules[name]
        if isinstance(linear, nn.Linear):  # as `_misfit` has made sure
            direct = parts["direct"].tolist() if "direct" in parts else ()
            put(model, name, EqualizedLinear(linear, parts["shift"], parts["scale"], parts.get("copies"), direct))
    return True


def _misfit(layer: nn.Module | None, parts: dict[str, Tensor]) -> str:
    """Why these parts cannot stand in front of `layer`; "" when they can."""
    if not isinstance(layer, nn.Linear):
        return f"expected a Linear, found {'nothing' if layer is None else type(layer).__name__}"
    if not {"shift", "scale"} <= set(parts) <= {"shift", "scale", "copies", "direct"}:
        return f"holds {', '.join(sorted(parts))} instead of shift, scale, copies, direct"
    k = layer.in_features
    for part in ("shift", "scale", "copies"):
        if part in parts and tuple(parts[part].shape) != (k,):
            return f"{part} has shape {tuple(parts[part].shape)} for {k} input channels"
    shift, scale = parts["shift"], parts["scale"]
    if not bool(torch.isfinite(shift).all() and torch.isfinite(scale).all() and (scale > 0).all()):
        return "shift or scale is not finite, or a scale is not positive"
    copies = parts.get("copies", torch.ones(k, dtype=torch.int64))
    direct = parts.get("direct", torch.zeros(0, dtype=torch.int64))
    absent = (copies == 0).nonzero().flatten()
    if copies.dtype == torch.int64 and int(copies.clamp(0, _MOST_COPIES * k + 1).sum()) > _MOST_COPIES * k:
        return f"more than {_MOST_COPIES} copies of a channel, on average"
    if copies.dtype != torch.int64 or bool((copies < 0).any()) or not torch.equal(absent, direct.to(absent)):
        return "a channel neither arrives nor is led past"
    return ""


__all__ = ["INSERTED_FILE", "apply_inserted", "inserted_layers", "save_inserted", "without_inserted"]
