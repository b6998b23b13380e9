"""Float models: from a transformers config, a pretrained folder or id, or the user's own factory.

Checkpoints are safetensors only; a checkpoint that exists only as a pickle is refused.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from s2d_deploy.attention import use_visible_attention
from s2d_deploy.errors import ModelError, RecipeError, S2DDeployError, message

if TYPE_CHECKING:
    from s2d_deploy.recipe import ModelSection

logger = logging.getLogger(__name__)

STATE_FILE = "model.safetensors"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A float model in evaluation mode, and what the pipeline must know of it.

    Attributes:
        module: called as ``module(**batch)``.
        output: name of the exported output.
        image_size: side of its images in pixels, or None.
        channels: of its images.
        classes: number of labels, or None.
        source: folder or id that carries tokenizer and preprocessing, or None.
    """

    module: nn.Module
    output: str
    image_size: int | None
    channels: int
    classes: int | None
    source: str | None


def load_model(section: ModelSection, checkpoint: Path | None = None, seed: int = 0) -> LoadedModel:
    """Build the recipe's model, with the weights of `checkpoint` (a folder that `save_checkpoint` wrote) where given.

    Raises:
        RecipeError: unknown model type, field or factory.
        ModelError: weights that cannot be loaded, do not fit, or are NaN or infinite.
    """
    torch.manual_seed(seed)
    if section.factory is not None:
        module = _from_factory(section)
        if checkpoint is not None:
            load_state(module, checkpoint / STATE_FILE)
        elif section.weights is not None:
            load_state(module, Path(section.weights))
    elif checkpoint is not None:
        # Through transformers: its files may name weights otherwise than the module does.
        module = _from_pretrained(str(checkpoint), section.task)
    elif section.config is not None:
        module = _from_config(section.config, section.task)
    else:
        module = _from_pretrained(str(section.pretrained), section.task)
    check_finite(module)
    module = module.float().eval()
    use_visible_attention(module)
    config = getattr(module, "config", None)
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    return LoadedModel(
        module,
        section.output or ("logits" if section.task == "image-classification" else "last_hidden_state"),
        size[0] if isinstance(size, list | tuple) else size,
        int(getattr(vision, "num_channels", 3)),
        _classes(config, section.task),
        section.pretrained,
    )


def save_checkpoint(module: nn.Module, folder: Path) -> None:
    """Write weights (and, for transformers models, the config) so that transformers loads the folder again."""
    save = getattr(module, "save_pretrained", None)
    if save is not None:
        with _no_progress_bars():
            save(folder)
        return
    state = {name: tensor.contiguous() for name, tensor in _unique_state(module).items()}
    save_file(state, folder / STATE_FILE)


def load_state(module: nn.Module, path: Path) -> None:
    """Load a safetensors state dict.

    Raises:
        ModelError: missing, truncated, foreign, or of another model (the first offenders are named).
    """
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            message(
                f"{path}: not readable weights",
                expected="a .safetensors file",
                found=f"{type(error).__name__}: {error}",
            )
        ) from error
    own = module.state_dict()
    tied = set(own) - set(_unique_state(module))
    wrong = [f"{n} is missing" for n in own if n not in state and n not in tied]
    wrong += [f"{n} is unknown" for n in state if n not in own]
    wrong += [
        f"{n} has shape {tuple(state[n].shape)} instead of {tuple(own[n].shape)}"
        for n in own
        if n in state and state[n].shape != own[n].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ModelError(
            message(
                f"{path}: weights of another model: {'; '.join(wrong[:4])}{more}", fix="use the model that wrote them"
            )
        )
    module.load_state_dict(state, strict=False)


def check_finite(module: nn.Module) -> None:
    """Raise ModelError naming every parameter with NaN or infinite values."""
    bad = [name for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ModelError(
            message(
                f"NaN or infinite weights in {len(bad)} tensor(s): {', '.join(bad[:5])}",
                expected="finite weights",
                fix="use a sound checkpoint",
            )
        )


def parameters(module: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without transformers' own bars: the pipeline has its own display."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _unique_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with tied tensors once (safetensors refuses shared memory)."""
    seen: dict[int, str] = {}
    result = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen[tensor.data_ptr()] = name
            result[name] = tensor
    return result


def _classes(config: Any, task: str) -> int | None:
    return int(config.num_labels) if task == "image-classification" and hasattr(config, "num_labels") else None


def _from_config(fields: Mapping[str, Any], task: str) -> nn.Module:
    from transformers import AutoConfig

    rest = dict(fields)
    kind = rest.pop("model_type", None)
    if kind is None:
        raise RecipeError(message("model.config has no model_type", expected="e.g. vit, siglip_vision_model, bert"))
    try:
        config = AutoConfig.for_model(kind, **rest)
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise RecipeError(message(f"model.config: unknown model_type {kind!r} or a bad field", found=reason)) from error
    fields_known = {*type(config)().to_dict(), "num_labels", "id2label"}
    unknown = sorted(k for k in rest if k not in fields_known)
    if unknown:
        raise RecipeError(
            message(f"model.config: {kind} has no field {', '.join(map(repr, unknown))}", fix="check the spelling")
        )
    try:
        return _auto_class(config, task).from_config(config)  # type: ignore[no-any-return]
    except (ValueError, KeyError, TypeError, ZeroDivisionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise RecipeError(message("model.config: no model can be built from it", found=reason)) from error


def _from_pretrained(source: str, task: str) -> nn.Module:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
        with _no_progress_bars():
            return _auto_class(config, task).from_pretrained(  # type: ignore[no-any-return]
                source, use_safetensors=True, dtype=torch.float32
            )
    except S2DDeployError:
        raise
    except Exception as error:  # transformers raises a dozen kinds here, hub clients more
        reason = " ".join(str(error).split())[:240]
        raise ModelError(
            message(
                f"model.pretrained: {source!r} cannot be loaded",
                expected="a folder written by save_pretrained (safetensors), or a hub id that can be reached",
                found=f"{type(error).__name__}: {reason}",
                fix="check the path, or download the model first",
            )
        ) from error


def _auto_class(config: Any, task: str) -> Any:
    import transformers

    if task == "image-classification":
        return transformers.AutoModelForImageClassification
    # Two-tower checkpoints: the vision tower is the part that is deployed here.
    towers = {
        "clip": "CLIPVisionModel",
        "clip_vision_model": "CLIPVisionModel",
        "siglip": "SiglipVisionModel",
        "siglip_vision_model": "SiglipVisionModel",
    }
    name = towers.get(config.model_type)
    if name is None:
        return transformers.AutoModel
    tower = getattr(transformers, name)
    return _Tower(tower) if config.model_type.endswith("vision_model") else tower


class _Tower:
    """Gives a tower class the ``from_config`` that transformers keeps for Auto classes."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower

    def from_config(self, config: Any) -> Any:
        return self.tower(config)

    def from_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        return self.tower.from_pretrained(*args, **kwargs)


def _from_factory(section: ModelSection) -> nn.Module:
    name = str(section.factory)
    module_name, separator, function = name.partition(":")
    if not separator:
        raise RecipeError(message(f"model.factory {name!r}", expected="package.module:function"))
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(
            message(
                f"model.factory {name!r} cannot be imported",
                found=str(error),
                fix="install the package, or set PYTHONPATH",
            )
        ) from error
    try:
        model = factory(**section.factory_arguments)
    except TypeError as error:
        raise RecipeError(message(f"model.factory {name!r} refused its arguments", found=str(error))) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(message(f"model.factory {name!r}", expected="a torch.nn.Module", found=type(model).__name__))
    return model
