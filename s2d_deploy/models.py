"""Float models: from a transformers config, a pretrained folder or id, or the user's own factory.

Checkpoints are safetensors only; a checkpoint that exists only as a pickle is refused.
"""

from __future__ import annotations

import copy
import importlib
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from s2d_deploy.attention import use_visible_attention
from s2d_deploy.errors import ModelError, RecipeError, message
from s2d_deploy.inserted_layers import apply_inserted, inserted_layers, save_inserted, without_inserted

if TYPE_CHECKING:
    from s2d_deploy.recipe import ModelSection

logger = logging.getLogger(__name__)

STATE_FILE = "model.safetensors"
# What lies beside the weights of a checkpoint and is read with them: tokenizer, image processor, pooling.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "preprocessor_config.json",
    "processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
)


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
            load_state(module, Path(section.weights).expanduser())
    elif checkpoint is not None:
        # Through transformers: its files may name weights otherwise than the module does.
        module = _from_pretrained(str(checkpoint), section.task)
    elif section.config is not None:
        module = _from_config(section.config, section.task)
    else:
        module = _from_pretrained(str(section.pretrained), section.task)
    if checkpoint is not None:
        apply_inserted(module, checkpoint)
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
        _classes(module, config, section.task),
        section.pretrained,
    )


def save_checkpoint(module: nn.Module, folder: Path) -> None:
    """Write weights (and, for transformers models, the config) so that transformers loads the folder again.

    Inserted layers of one-shot conditioning lie beside the weights (`inserted_layers`); `load_model` applies them.
    """
    if inserted_layers(module):
        save_inserted(module, folder)
        module = without_inserted(module)
    save = getattr(module, "save_pretrained", None)
    if save is not None:
        with _no_progress_bars():
            save(folder)
        return
    state = {name: tensor.contiguous() for name, tensor in _unique_state(module).items()}
    save_file(state, folder / STATE_FILE)


def save_companions(source: str | None, folder: Path) -> None:
    """Copy the tokenizer and the image processor of `source` (folder or hub id), so that `folder` loads without it.

    Of a hub id, what was downloaded for this run: the tokenizer of text, the processor of images.
    """
    for name, path in companion_files(source).items():
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, folder / name)


def companion_files(source: str | None) -> dict[str, Path]:
    """What `save_companions` copies: path by name."""
    if source is None:
        return {}
    home = Path(source).expanduser()
    if not home.is_dir():
        from transformers.utils.hub import cached_file

        config = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False)
        if config is None:
            return {}
        home = Path(config).parent
    return {name: home / name for name in COMPANIONS if (home / name).is_file()}


@contextmanager
def config_as_it_was(module: nn.Module) -> Iterator[None]:
    """Take back what running the model does to its config: transformers notes there which loss it has computed.

    A checkpoint would otherwise tell whether its training was resumed when no step was left.
    """
    config = getattr(module, "config", None)
    fields = getattr(config, "__dict__", None)
    kept = copy.deepcopy(fields)
    yield
    if fields is not None and kept is not None:
        fields.clear()
        fields.update(kept)


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
    """Raise ModelError naming the parameters and buffers (the first five) that hold NaN or infinite values."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    bad = [name for name, t in tensors if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise ModelError(
            message(
                f"NaN or infinite weights in {len(bad)} tensor(s): {', '.join(bad[:5])}",
                expected="finite weights",
                fix="use a sound checkpoint",
            )
        )


def forward(module: nn.Module, batch: Mapping[str, torch.Tensor], output: str) -> torch.Tensor:
    """``module(**batch)``'s tensor called `output` (or the tensor, where it returns just one).

    Raises:
        ModelError: the model refuses these inputs, or has no such output.
    """
    try:
        result = module(**batch)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        shapes = ", ".join(
            f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in batch.items()
        )
        raise ModelError(
            message(
                f"the model cannot run on this data: {' '.join(str(error).split())[:240]}",
                found=f"inputs {shapes}",
                fix="use data that fits the model; npz arrays are named train.<input>, test.<input>",
            )
        ) from error
    if isinstance(result, torch.Tensor):
        return result
    named = dict(result) if isinstance(result, Mapping) else {}
    tensor = named.get(output)
    if not isinstance(tensor, torch.Tensor):
        raise ModelError(
            message(
                f"the model has no output {output!r}",
                expected="a tensor, or a mapping from names to tensors",
                found=", ".join(named) or f"a {type(result).__name__}",
                fix="set model.output to one of its outputs" if named else None,
            )
        )
    return tensor


def parameters(module: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(p.numel() for p in module.parameters())


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without transformers' own bars: the pipeline has its own display."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _unique_state(module: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with tied tensors once (safetensors refuses shared memory)."""
    seen: dict[int, str] = {}
    result = {}
    for name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen[tensor.data_ptr()] = name
            result[name] = tensor
    return result


def _classes(module: nn.Module, config: Any, task: str) -> int | None:
    """From the config's num_labels, or the factory model's own num_classes."""
    if task != "image-classification":
        return None
    for owner, name in ((config, "num_labels"), (module, "num_classes")):
        value = getattr(owner, name, None)
        if isinstance(value, int):
            return value
    return None


def _reason(error: Exception, length: int = 240) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def _from_config(fields: Mapping[str, Any], task: str) -> nn.Module:
    from transformers import CONFIG_MAPPING, AutoConfig

    rest = dict(fields)
    kind = rest.pop("model_type", None)
    if kind is None:
        raise RecipeError(message("model.config has no model_type", expected="e.g. vit, siglip_vision_model, bert"))
    if kind not in CONFIG_MAPPING:
        close = get_close_matches(str(kind), list(CONFIG_MAPPING), n=1)
        raise RecipeError(
            message(
                f"model.config: unknown model_type {kind!r}",
                expected="one that transformers knows, e.g. vit, siglip_vision_model, clip_vision_model, bert",
                fix=f"did you mean {close[0]!r}?" if close else None,
            )
        )
    try:
        config = AutoConfig.for_model(kind, **rest)
        known = {*type(config)().to_dict(), "num_labels", "id2label", "label2id"}
    except Exception as error:  # transformers validates fields with a dozen kinds of exceptions
        raise RecipeError(message(f"model.config: {kind} refuses a field", found=_reason(error))) from error
    unknown = sorted(k for k in rest if k not in known)
    if unknown:
        close = [m for k in unknown for m in get_close_matches(k, sorted(known), n=1)]
        raise RecipeError(
            message(
                f"model.config: {kind} has no field {', '.join(map(repr, unknown))}",
                fix=f"did you mean {', '.join(map(repr, close))}?" if close else "check the spelling",
            )
        )
    try:
        return _auto_class(config, task).from_config(config)  # type: ignore[no-any-return]
    except Exception as error:  # as above
        raise RecipeError(message("model.config: no model can be built from it", found=_reason(error))) from error


def _from_pretrained(source: str, task: str) -> nn.Module:
    """Weights of a folder or hub id: safetensors only, and the checkpoint's own code is never run.

    A checkpoint that lacks weights is refused (transformers would fill them with random numbers), save for a pooler,
    which no output that is exported here depends on.
    """
    from transformers import AutoConfig

    folder = Path(source).expanduser()
    if folder.is_dir():
        source = str(folder)
    elif folder.is_absolute() or source.startswith((".", "~")):
        raise ModelError(message(f"model.pretrained: {source!r} is not a folder", fix="check the path"))
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        with _no_progress_bars():
            module, info = _auto_class(config, task).from_pretrained(
                source, use_safetensors=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    except Exception as error:  # transformers raises a dozen kinds here, hub clients more
        raise ModelError(
            message(
                f"model.pretrained: {source!r} cannot be loaded",
                expected="a folder written by save_pretrained (safetensors), or a hub id that can be reached",
                found=_reason(error),
                fix="check the path, or download the model first",
            )
        ) from error
    missing = sorted(info["missing_keys"])
    needed = [name for name in missing if "pooler" not in name.split(".")]
    if needed:
        raise ModelError(
            message(
                f"model.pretrained: {source!r} lacks {len(needed)} weight(s) of {type(module).__name__}: "
                f"{', '.join(needed[:4])}",
                expected=f"a checkpoint for the task {task}",
                fix="fine-tune it for this task first, or set model.task",
            )
        )
    if missing:
        logger.info("%s: no weights for %s; left out, since no output here depends on them", source, ", ".join(missing))
        _drop_poolers(module, missing)
    return module  # type: ignore[no-any-return]


def _drop_poolers(module: nn.Module, missing: Iterable[str]) -> None:
    """Poolers that the checkpoint has no weights for: random ones must not get into the next checkpoint."""
    for name in missing:
        parts = name.split(".")
        owner = module.get_submodule(".".join(parts[: parts.index("pooler")]))
        setattr(owner, "pooler", None)  # noqa: B010 - a submodule by its name


def _auto_class(config: Any, task: str) -> Any:
    import transformers

    if task == "image-classification":
        return transformers.AutoModelForImageClassification
    # Two-tower checkpoints: the vision tower is the part that is deployed here.
    towers = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}
    name = towers.get(config.model_type.removesuffix("_vision_model"))
    return transformers.AutoModel if name is None else _Tower(getattr(transformers, name))


class _Tower:
    """Gives a tower class the ``from_config`` that transformers keeps for Auto classes."""

    def __init__(self, tower: Any) -> None:
        self.tower = tower

    def from_config(self, config: Any) -> Any:
        return self.tower(getattr(config, "vision_config", config))

    def from_pretrained(self, source: str, *, trust_remote_code: bool, **options: Any) -> Any:
        # Only Auto classes look for code in the checkpoint; a tower class has its own.
        del trust_remote_code
        return self.tower.from_pretrained(source, **options)


def _from_factory(section: ModelSection) -> nn.Module:
    name = str(section.factory)
    module_name, separator, function = name.partition(":")
    if not (module_name and separator and function) or module_name.startswith("."):
        raise RecipeError(message(f"model.factory {name!r}", expected="package.module:function"))
    try:
        factory = getattr(importlib.import_module(module_name), function)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise RecipeError(
            message(
                f"model.factory {name!r} cannot be imported",
                found=_reason(error),
                fix="check the name, install the package, or set PYTHONPATH",
            )
        ) from error
    if not callable(factory):
        raise RecipeError(message(f"model.factory {name!r}", expected="a function", found=type(factory).__name__))
    try:
        model = factory(**section.factory_arguments)
    except Exception as error:  # the user's code
        raise RecipeError(
            message(
                f"model.factory {name!r} failed",
                expected=f"a model for the arguments {section.factory_arguments}",
                found=_reason(error),
                fix="set model.factory_arguments, or repair the factory",
            )
        ) from error
    if not isinstance(model, nn.Module):
        raise RecipeError(message(f"model.factory {name!r}", expected="a torch.nn.Module", found=type(model).__name__))
    return model
