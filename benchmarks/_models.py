"""Models of known architecture with random weights, and their artifacts: for latency and size only.

Weights and inputs are random, from a seed. The plans are made by the real calibration on random inputs, so every
kernel, scale and file is real; what the model answers means nothing, and no accuracy may be read off it.

Everything that takes time is kept in a work folder, stage by stage, and redone when its sources change: the common
files with s2d_deploy/ and export/to_onnx.py, the artifacts with export/ and runtimes/.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from s2d_deploy.errors import RecipeError, message
from s2d_deploy.files import sha256_file
from s2d_deploy.host import cpu_model, versions
from s2d_deploy.precision import BASELINE
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.session import Artifact, SearchingTarget
from s2d_deploy.store import RunFolder, Stage

if TYPE_CHECKING:
    import torch

    from s2d_deploy.calibrate import Calibration
    from s2d_deploy.plan import Op, Plan
    from s2d_deploy.session import Array

PATCH = 16
_CALIBRATION_SAMPLES = 4
_CALIBRATION_SEED, _INPUT_SEED, _WEIGHT_SEED = 1, 2, 0


@dataclass(frozen=True, slots=True)
class Shape:
    """An architecture.

    Attributes:
        name: of the model in tables and files.
        family: "vit" (patches of 16 pixels, 1,000 classes) or "bert" (vocabulary of 30,522).
        width: of the residual stream; the MLP is four times as wide.
        depth: number of layers.
        heads: of attention.
        tokens: that the layers see: for "vit" patches and class token.
    """

    name: str
    family: Literal["vit", "bert"]
    width: int
    depth: int
    heads: int
    tokens: int

    @property
    def image_size(self) -> int:
        """Side of the image in pixels, for "vit"."""
        return math.isqrt(self.tokens - 1) * PATCH


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("vit-tiny", "vit", 192, 12, 3, 197),
        Shape("vit-small", "vit", 384, 12, 6, 197),
        Shape("vit-base", "vit", 768, 12, 12, 197),
        Shape("minilm-l6", "bert", 384, 6, 12, 128),
    )
}


def shape_of(name: str, width: int | None = None, depth: int | None = None, tokens: int | None = None) -> Shape:
    """A named architecture, with other dimensions where given; the size of a head stays.

    Raises:
        RecipeError: an unknown name, a width that the heads do not divide, or tokens that are no square of patches.
    """
    if name not in SHAPES:
        raise RecipeError(message(f"--model {name}", expected=f"one of {', '.join(SHAPES)}"))
    base = SHAPES[name]
    if not any((width, depth, tokens)):
        return base
    head = base.width // base.heads
    width, depth, tokens = width or base.width, depth or base.depth, tokens or base.tokens
    if width % head:
        raise RecipeError(message(f"--width {width}", expected=f"a multiple of {head}, the width of {name}'s heads"))
    if base.family == "vit" and (tokens < 2 or math.isqrt(tokens - 1) ** 2 != tokens - 1):
        raise RecipeError(
            message(
                f"--tokens {tokens}", expected="a square number of patches and one class token, as 197 = 14 x 14 + 1"
            )
        )
    label = f"{base.family}-w{width}-d{depth}-t{tokens}"
    return replace(base, name=label, width=width, depth=depth, heads=width // head, tokens=tokens)


class Bench:
    """One model in one work folder. Use it as a context manager: the folder is locked for one process.

    Args:
        shape: the architecture.
        work: work folder of all models.
    """

    def __init__(self, shape: Shape, work: Path) -> None:
        self.shape = shape
        self.store = RunFolder(work / shape.name, {k: v for k, v in versions().items() if v is not None})

    def __enter__(self) -> Bench:
        self.store.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.store.__exit__(kind, error, trace)

    @property
    def output(self) -> str:
        """Name of the exported output."""
        return "logits" if self.shape.family == "vit" else "last_hidden_state"

    @cached_property
    def module(self) -> torch.nn.Module:
        """The float model, in evaluation mode."""
        import torch
        from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

        shape = self.shape
        common: dict[str, Any] = {
            "hidden_size": shape.width,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.heads,
            "intermediate_size": 4 * shape.width,
        }
        torch.manual_seed(_WEIGHT_SEED)
        module: Any
        if shape.family == "vit":
            config = ViTConfig(image_size=shape.image_size, patch_size=PATCH, **(common | {"num_labels": 1000}))
            module = ViTForImageClassification(config)
        else:
            positions = max(512, shape.tokens)
            module = BertModel(BertConfig(max_position_embeddings=positions, **common), add_pooling_layer=False)
        module.eval()
        found: torch.nn.Module = module
        return found

    def batch(self, samples: int, seed: int = _INPUT_SEED) -> dict[str, torch.Tensor]:
        """Random inputs: standard normal pixels, or tokens drawn evenly, none of them padding."""
        import torch

        generator = torch.Generator().manual_seed(seed)
        if self.shape.family == "vit":
            side = self.shape.image_size
            return {"pixel_values": torch.randn(samples, 3, side, side, generator=generator)}
        ids = torch.randint(0, 30522, (samples, self.shape.tokens), generator=generator)
        # What the model's own tokenizer returns.
        return {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}

    def feeds(self, samples: int) -> dict[str, Array]:
        """The inputs that are timed, as arrays."""
        return {name: tensor.numpy() for name, tensor in self.batch(samples).items()}

    @cached_property
    def ops(self) -> dict[str, Op]:
        """The model's contractions."""
        from s2d_deploy.discovery import discover

        return discover(self.module, self.batch(1), self.output)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one sample: matrix products and convolutions, nothing else."""
        return sum(op.macs for op in self.ops.values())

    @cached_property
    def calibration(self) -> Calibration:
        """Statistics of random inputs."""
        from s2d_deploy.calibrate import Calibration, calibrate

        def work(folder: Path) -> dict[str, Any]:
            batches = [self.batch(1, _CALIBRATION_SEED + 100 * i) for i in range(_CALIBRATION_SAMPLES)]
            calibrate(self.module, self.ops, batches).save(folder / "calibration.safetensors")
            return {"samples": _CALIBRATION_SAMPLES, "inputs": "random"}

        stage = self.store.run("calibrate", self._key(), work)
        return Calibration.load(stage.folder / "calibration.safetensors")

    def plan(self, precision: str) -> Plan:
        """The plan of a precision; the baseline's has no sites."""
        from s2d_deploy.plan import Plan
        from s2d_deploy.quantize import build_plan

        if precision == BASELINE:
            return Plan(BASELINE, dict(self.ops))
        return build_plan(self.module, self.ops, self.calibration, precision)

    def onnx(self, precision: str) -> Stage:
        """The common ONNX file of a precision (``model.onnx``), with its plan."""

        def work(folder: Path) -> dict[str, Any]:
            plan = self.plan(precision)
            plan.save(folder)
            sample = self.batch(2)
            dynamic = {name: {1: "sequence"} for name in sample} if self.shape.family == "bert" else {}
            load_exporter()(self.module, plan, sample, [self.output], folder / "model.onnx", dynamic=dynamic)
            return {}

        return self.store.run(f"onnx/{precision}", self._key() | {"precision": precision}, work)

    def build(
        self, target: str, precision: str, batch: int, *, placed_for: int | None = None
    ) -> tuple[Artifact, Stage]:
        """The artifact of a target for one batch size; by a placement search on `placed_for` threads, where given.

        Raises:
            RecipeError: a search on a target that has none.
            UnsupportedError: the target cannot express the plan.
            RuntimeUnavailable: its compiler is not installed.
        """
        exporter, common = load_target(target), self.onnx(precision)
        sizes = {"sequence": self.shape.tokens} if self.shape.family == "bert" else {}
        options = exporter.shape_options([batch], sizes)

        if placed_for is not None and not isinstance(exporter, SearchingTarget):
            raise RecipeError(message(f"target {target!r} has no placement search", fix="leave it out of --placed"))

        def work(folder: Path) -> dict[str, Any]:
            model, asked = common.folder / "model.onnx", {"placement": "search"}
            if placed_for is not None and isinstance(exporter, SearchingTarget):
                found = exporter.search(
                    model, precision=precision, options=asked, batches=[batch], sizes=sizes, threads=placed_for,
                    progress=lambda _: None,
                )  # fmt: skip
                dialect = exporter.dialect_for(model, folder, precision=precision, options=asked, placement=found)
            else:
                dialect = exporter.dialect(model, folder, precision=precision)
            artifact = exporter.build(dialect, folder, precision=precision, options=options, progress=lambda _: None)
            return {"files": artifact.files, "info": artifact.info}

        key = {
            "onnx": common.sha256,
            "options": options | ({} if placed_for is None else {"placed_for": placed_for}),
            "runtime": load_runtime(target).version(),
            "cpu": cpu_model(),
            "sources": _digest(export=(), runtimes=(), s2d_deploy=("qgraph",)),
        }
        stage = self.store.run(f"{target}/{precision}-b{batch}{'' if placed_for is None else '-placed'}", key, work)
        return Artifact(stage.folder, target, precision, stage.info["files"], stage.info["info"]), stage

    def _key(self) -> dict[str, Any]:
        packages = {k: v for k, v in versions().items() if k in ("torch", "transformers", "onnx", "onnxscript")}
        return {
            "shape": asdict(self.shape),
            "packages": packages,
            "seeds": [_WEIGHT_SEED, _CALIBRATION_SEED, _INPUT_SEED],
            "sources": _digest(s2d_deploy=_COMMON_SOURCES, export=("to_onnx",)),
            "this": sha256_file(Path(__file__)),
        }


# Modules that the common file depends on; latency, report and their like do not change it.
_COMMON_SOURCES = (
    "attention",
    "calibrate",
    "discovery",
    "fake_quant",
    "grid",
    "observers",
    "plan",
    "precision",
    "quantize",
    "simulation",
)


def _digest(**packages: tuple[str, ...]) -> str:
    """SHA-256 of sources: of s2d_deploy, export and runtimes, the modules named, or all where none is named."""
    h = hashlib.sha256()
    for name, modules in sorted(packages.items()):
        found = find_spec(name if name == "s2d_deploy" else f"s2d_deploy.{name}")
        if found is None or found.origin is None:
            raise RuntimeError(f"{name} has no source folder")
        for file in sorted(Path(found.origin).parent.glob("*.py")):
            if not modules or file.stem in modules:
                h.update(f"{name}/{file.name}\0".encode() + file.read_bytes())
    return h.hexdigest()
