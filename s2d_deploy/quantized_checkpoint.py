"""A quantized checkpoint, as ``s2d-deploy quantize`` leaves it: float weights as the passes put them, and their plan.

``<run>/quantize/<precision>`` holds the plan and what passes changed; model and data stand in the recipe of the run
folder around it. Where the folder was taken out of its run, the model is named instead, and inputs are made up from its
config: only their names and shapes matter to an export.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.errors import ArtifactError, DataError, message
from s2d_deploy.files import read_json
from s2d_deploy.manifest import MANIFEST, verify_folder
from s2d_deploy.models import LoadedModel, load_model
from s2d_deploy.plan import Plan
from s2d_deploy.ptq.input_transform import load_changes
from s2d_deploy.recipe import ModelSection, parse_recipe

_TOKENS = 16  # of a made-up sample; the dimension stays open


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """What an export reads.

    Attributes:
        module: the float model behind the passes.
        plan: its quantization.
        output: name of the output that is exported.
        sample: two samples, by input.
        dynamic: further open dimensions, as `export_onnx` takes them.
    """

    module: nn.Module
    plan: Plan
    output: str
    sample: dict[str, Tensor]
    dynamic: dict[str, dict[int, str]]


def load_quantized(folder: Path, model: str | None = None) -> QuantizedCheckpoint:
    """Load a quantized checkpoint.

    Args:
        folder: ``<run>/quantize/<precision>``, or a copy of it.
        model: a ``save_pretrained`` folder or hub id, for a folder outside its run.

    Raises:
        ArtifactError: no quantized checkpoint, a changed or truncated file, or changes of another model.
        DataError: outside its run, and no model is named; or a model whose inputs cannot be made up.
        RecipeError, ModelError: the model cannot be loaded.
    """
    if not (folder / "plan.json").is_file():
        raise ArtifactError(
            message(
                f"{folder}: no quantized checkpoint",
                expected="a folder with plan.json, as s2d-deploy quantize writes <run>/quantize/<precision>",
                fix="run s2d-deploy quantize first, or give the common .onnx file",
            )
        )
    if (folder / MANIFEST).is_file():
        verify_folder(folder)
    plan = Plan.load(folder)
    loaded, sample = _named(model) if model is not None else _of_run(folder)
    load_changes(loaded.module, folder)
    text = any(name == "input_ids" for name in sample)
    dynamic = {name: {1: "sequence"} for name in sample} if text else {}
    return QuantizedCheckpoint(loaded.module, plan, loaded.output, sample, dynamic)


def _of_run(folder: Path) -> tuple[LoadedModel, dict[str, Tensor]]:
    """Model and samples of the run that the folder lies in."""
    root = folder.resolve().parent.parent
    document: dict[str, Any] = read_json(root / MANIFEST) if (root / MANIFEST).is_file() else {}
    if not isinstance(document.get("recipe"), dict):
        raise DataError(
            message(
                f"{folder} lies in no run folder, so its model is not known", fix="name it: --model FOLDER_OR_HUB_ID"
            )
        )
    from s2d_deploy.data import load_data

    recipe = parse_recipe(document["recipe"], str(root / MANIFEST))
    loaded = load_model(recipe.model, checkpoint=root / "condition")
    data = load_data(
        recipe.data,
        image_size=loaded.image_size,
        channels=loaded.channels,
        classes=loaded.classes,
        model_source=loaded.source,
    )
    return loaded, dict(next(iter(data.test.batches(2))))


def _named(source: str) -> tuple[LoadedModel, dict[str, Tensor]]:
    """A transformers model by name, with a made-up sample."""
    loaded = load_model(ModelSection.model_validate({"pretrained": source, "task": _task(source)}))
    config = getattr(loaded.module, "config", None)
    generator = torch.Generator().manual_seed(0)
    if loaded.image_size is not None:
        shape = (2, loaded.channels, loaded.image_size, loaded.image_size)
        return loaded, {"pixel_values": torch.randn(shape, generator=generator)}
    if getattr(config, "vocab_size", None) is None:
        raise DataError(
            message(
                f"{source}: its inputs cannot be made up",
                expected="a model of images or of tokens",
                fix="export from inside its run folder",
            )
        )
    tokens = torch.zeros((2, _TOKENS), dtype=torch.long)
    return loaded, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _task(source: str) -> str:
    from transformers import AutoConfig

    from s2d_deploy.errors import ModelError

    try:
        architectures = getattr(AutoConfig.from_pretrained(source), "architectures", None) or []
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(message(f"{source}: no model", found=reason, fix="give a folder or a hub id")) from error
    return "image-classification" if any("Classification" in a for a in architectures) else "embedding"


__all__ = ["QuantizedCheckpoint", "load_quantized"]
