"""What a comparison of quantization recipes is measured on: one model, its calibration batches, its held-out samples.

Everything comes from a seed, so that scripts that load the same settings judge the same samples against the same
output of the float original. torch and transformers are imported when something is loaded, not before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _common

if TYPE_CHECKING:
    import torch

    from s2d_deploy.data import Batch
    from s2d_deploy.evaluate import Score
    from s2d_deploy.session import Array

    Run = Callable[[Mapping[str, Array]], dict[str, Array]]


@dataclass(frozen=True)
class Evidence:
    """A float model and the samples that its quantized versions are judged by.

    Attributes:
        task: ``"embedding"`` or ``"image-classification"``.
        module: the float original, in evaluation mode.
        output: name of the exported output.
        calibration, held_out: batches of inputs.
        mask: ``(n, T)`` of the held-out samples, 1 for real tokens; None without tokens.
        labels: int64 ``(n,)`` of the held-out samples, or None.
        reference: the original's output for the held-out samples.
    """

    task: str
    module: torch.nn.Module
    output: str
    calibration: list[Batch]
    held_out: list[Batch]
    mask: Array | None
    labels: torch.Tensor | None
    reference: Array

    def scores(self, run: Run) -> dict[str, Score]:
        """How good a quantized model's outputs are, by sample; the first score is the one that is judged.

        For an encoder ``value`` (cosine to the original, times 100) and ``neighbours`` (share of equal nearest ones);
        for a classifier ``value`` (top-1) and ``agreement`` (share of the original's decisions).
        """
        from s2d_deploy.evaluate import neighbour_agreement, outputs, score

        found = outputs(run, self.output, self.held_out)
        scores = {"value": score(self.task, found, self.reference, self.labels, self.mask)}
        if self.task == "embedding":
            scores["neighbours"] = neighbour_agreement(found, self.reference, self.mask)
        else:
            scores["agreement"] = score(self.task, found, self.reference, None, None)
        return scores

    def measured(self, module: torch.nn.Module) -> dict[str, float]:
        """The means of `scores` for a torch model."""
        from s2d_deploy.evaluate import torch_run

        return {name: s.value for name, s in self.scores(torch_run(module, self.output)).items()}


def load_evidence(a: argparse.Namespace) -> Evidence:
    """Load what the options of `add_options` name.

    Raises:
        S2DDeployError: no such model or data.
    """
    import torch

    from s2d_deploy.data import load_data
    from s2d_deploy.evaluate import outputs, torch_run
    from s2d_deploy.models import load_model
    from s2d_deploy.recipe import DataSection, ModelSection

    torch.set_num_threads(a.threads)
    loaded = load_model(ModelSection(pretrained=str(a.model), task=a.task))
    kind = "text" if a.task == "embedding" else "images"
    data = load_data(
        DataSection(
            kind=kind,
            path=str(a.data),
            calibration_samples=a.calibration,
            test_samples=a.held_out,
            max_length=a.length,
            seed=a.seed,
            image_size=loaded.image_size if kind == "images" else None,
        ),
        image_size=loaded.image_size,
        channels=loaded.channels,
        classes=loaded.classes,
        model_source=loaded.source,
    )
    held_out = [dict(b) for b in data.test.batches(a.batch)]
    mask = torch.cat([b["attention_mask"] for b in held_out]).numpy() if "attention_mask" in held_out[0] else None
    return Evidence(
        a.task,
        loaded.module,
        loaded.output,
        [dict(b) for b in data.calibration.batches(a.batch)],
        held_out,
        mask,
        data.test.labels,
        outputs(torch_run(loaded.module, loaded.output), loaded.output, held_out),
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that `load_evidence` reads, and the name of the result file."""
    parser.add_argument("--model", type=Path, required=True, help="folder of the float model (transformers)")
    parser.add_argument("--data", type=Path, required=True, help="text file, or image folder with train/ and test/")
    parser.add_argument("--task", choices=["embedding", "image-classification"], required=True)
    parser.add_argument("--name", default="model", help="of the result file")
    parser.add_argument("--calibration", type=_common.positive, default=128, help="samples")
    parser.add_argument("--held-out", type=_common.positive, default=500, help="samples")
    parser.add_argument("--length", type=_common.positive, default=32, help="tokens of a text, padded")
    parser.add_argument("--batch", type=_common.positive, default=32)
    parser.add_argument("--threads", type=_common.positive, default=1)
    parser.add_argument("--seed", type=int, default=0)


def settings(a: argparse.Namespace) -> dict[str, Any]:
    """What a result file says about the samples."""
    return {name: getattr(a, name) for name in ("calibration", "held_out", "length", "seed")}
