"""One pass over calibration data: a histogram for every activation site, whatever precision is asked for later.

Memory is bounded by the number of sites (256 KiB each), not by the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2d_deploy.attention import use_visible_attention, watching
from s2d_deploy.errors import ArtifactError, DataError, message
from s2d_deploy.observers import HALF_BINS, Histogram
from s2d_deploy.plan import Op
from s2d_deploy.session import Progress

Padding = Literal["count", "leave_out"]


@dataclass(slots=True)
class Calibration:
    """What the activation sites saw.

    Attributes:
        histograms: by site name.
        samples: number of calibration samples.
    """

    histograms: dict[str, Histogram] = field(default_factory=dict)
    samples: int = 0

    def save(self, path: Path) -> None:
        """Write one safetensors file."""
        tensors = {}
        for name, h in self.histograms.items():
            tensors[f"{name}.counts"] = h.counts
            tensors[f"{name}.moments"] = torch.cat(
                [torch.tensor([h.limit, h.low, h.high, float(h.total)], dtype=torch.float64), h.power]
            )
        save_file(tensors, path, metadata={"samples": str(self.samples)})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read it back.

        Raises:
            ArtifactError: missing, truncated or foreign.
        """
        from safetensors import safe_open

        try:
            tensors = load_file(path)
            with safe_open(path, framework="pt") as file:
                samples = int(file.metadata()["samples"])
            result = cls({}, samples)
            for name in sorted(n.removesuffix(".counts") for n in tensors if n.endswith(".counts")):
                h = Histogram()
                h.counts = tensors[f"{name}.counts"]
                if h.counts.numel() != 2 * HALF_BINS:
                    raise ValueError(f"{name}: {h.counts.numel()} bins")
                h.limit, h.low, h.high, total = tensors[f"{name}.moments"][:4].tolist()
                h.total, h.power = int(total), tensors[f"{name}.moments"][4:]
                result.histograms[name] = h
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ArtifactError(
                message(
                    f"{path}: not calibration statistics",
                    found=f"{type(error).__name__}: {error}",
                    fix="calibrate again",
                )
            ) from error
        return result


def real_tokens(x: Tensor, mask: Tensor, axis: int) -> Tensor:
    """`x` without what the attention mask hides; `x` itself where the two do not fit.

    Args:
        x: ``(B, T, K)`` or ``(B, heads, ..)``, tokens along `axis`.
        mask: ``(B, T)``, not 0 for real tokens.
        axis: of the tokens.
    """
    if mask.dim() != 2 or x.dim() <= axis or (x.shape[0], x.shape[axis]) != mask.shape:
        return x
    return x.movedim(axis, 1)[mask.bool()]


def calibrate(
    model: nn.Module,
    ops: Mapping[str, Op],
    batches: Iterable[Mapping[str, Tensor]],
    progress: Progress | None = None,
    padding: Padding = "count",
) -> Calibration:
    """Observe every activation site of `ops` while `model` runs over `batches` in evaluation mode.

    Args:
        model: the float model.
        ops: from `discovery.discover`.
        batches: dictionaries of tensors, first dimension the batch.
        progress: called with a sentence after each batch.
        padding: whether tokens that a batch's ``attention_mask`` hides count. They run through the model like all
            others, and nothing of their values reaches a real token.

    Raises:
        DataError: no batches, or NaN in an activation (the site is named).
    """
    use_visible_attention(model)
    result = Calibration()
    names = {module: name for name, module in model.named_modules()}

    mask: list[Tensor] = []

    def observe(site: str, x: Tensor, axis: int) -> None:
        seen = real_tokens(x, mask[-1], axis) if mask else x
        result.histograms.setdefault(site, Histogram()).update(seen, site)

    def on_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        observe(f"{names[module]}.input", args[0], 1)

    def on_operand(module: nn.Module, operand: str, x: Tensor) -> None:
        observe(f"{names[module]}.{operand}", x, 3 if operand == "key" else 2)

    handles = [
        module.register_forward_pre_hook(on_input)
        for name, module in model.named_modules()
        if name in ops and ops[name].kind in ("linear", "conv")
    ]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), watching(on_operand):
            for batch in batches:
                mask[:] = [batch["attention_mask"]] if padding == "leave_out" and "attention_mask" in batch else []
                model(**batch)
                result.samples += next(iter(batch.values())).shape[0]
                if progress is not None:
                    progress(f"{result.samples} samples")
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not result.samples:
        raise DataError(
            message(
                "the calibration set is empty",
                expected="at least one sample",
                fix="set data.calibration_samples above 0",
            )
        )
    return result
