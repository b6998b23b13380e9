"""Image files -> the pixels that a model was trained to see: resized, scaled to 0..1, normalized channel by channel.

What is lost: the aspect ratio (an image is squeezed, not cropped), as Pillow's bicubic filter resizes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from s2d_deploy.errors import DataError, message


def read_images(files: Sequence[Path], size: tuple[int, int], channels: int, mean: Tensor, std: Tensor) -> Tensor:
    """The files' pixels.

    Args:
        files: images of any size and mode.
        size: width and height that they are resized to (bicubic, without keeping the aspect ratio).
        channels: 3 for RGB, 1 for grey.
        mean, std: of the channels, on the scale 0 to 1; ``(1, channels, 1, 1)``.

    Returns:
        float32 ``(len(files), channels, height, width)``.

    Raises:
        DataError: a file is not a readable image.
    """
    from PIL import Image, UnidentifiedImageError

    pixels = []
    for path in files:
        try:
            with Image.open(path) as image:
                converted = image.convert("RGB" if channels == 3 else "L").resize(size, Image.Resampling.BICUBIC)
                pixels.append(torch.from_numpy(np.asarray(converted, dtype=np.float32) / 255.0))
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            # Pillow's readers raise SyntaxError and ValueError for some kinds of damage.
            raise DataError(
                message(f"{path}: not a readable image", found=str(error), fix="remove or replace the file")
            ) from error
    stacked = torch.stack(pixels).reshape(len(pixels), size[1], size[0], channels).permute(0, 3, 1, 2)
    return ((stacked - mean) / std).contiguous()


def image_statistics(source: str | None, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and spread, ``(1, channels, 1, 1)`` each, from the checkpoint's preprocessor_config.json; 0.5 without one.

    Raises:
        DataError: the file is broken, or its numbers do not fit `channels`.
    """
    mean, std = [0.5] * channels, [0.5] * channels
    document = _preprocessor(source) if source else {}
    if document.get("do_normalize") is False:
        mean, std = [0.0] * channels, [1.0] * channels
    else:
        mean, std = document.get("image_mean", mean), document.get("image_std", std)
    try:
        m, s = torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise DataError(message(f"{source}: image statistics are not numbers", found=str(error))) from error
    if m.shape != (channels,) or s.shape != (channels,) or not bool((torch.isfinite(m) & (s > 0)).all()):
        raise DataError(
            message(
                f"{source}: image statistics do not fit",
                expected=f"{channels} means and {channels} positive spreads",
                found=f"image_mean {mean}, image_std {std}",
                fix="repair preprocessor_config.json",
            )
        )
    return m.reshape(1, -1, 1, 1), s.reshape(1, -1, 1, 1)


def has_image_processor(source: str) -> bool:
    """Whether the checkpoint says how its images are normalized."""
    return bool(_preprocessor(source))


def _preprocessor(source: str) -> dict[str, Any]:
    """The checkpoint's preprocessor_config.json, from a folder or the hub (or its cache); empty where there is none."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        path: str | None = str(folder / "preprocessor_config.json")
    else:
        from transformers.utils.hub import cached_file

        path = cached_file(source, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if path is None or not Path(path).is_file():
        return {}
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(message(f"{path}: not readable JSON", found=str(error))) from error
    return document if isinstance(document, dict) else {}
