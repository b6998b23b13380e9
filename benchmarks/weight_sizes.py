"""Figure: W4A4 weights in real artifacts take at most 0.15 of their FP32 bytes (TVM, TensorRT; ORT: reported).

    python benchmarks/weight_sizes.py

Counted are the codes as they lie in the artifact, padding included, and their scales, over four bytes for each weight
of every quantized layer; embeddings, norms and biases are in neither. Two models: the digits recipe (trained and
conditioned here, or read from ``--run``), whose small layers and 8-bit first and last layer make it the hard case, and
a ViT-Small with random weights, whose sizes do not depend on their values.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import _common
from _common import Figure, Record, at_most, table

from s2d_deploy.errors import ArtifactError, UnavailableError, UnsupportedError, message
from s2d_deploy.precision import STANDARD
from s2d_deploy.session import Artifact

if TYPE_CHECKING:
    from s2d_deploy.plan import Plan

TARGETS = ("ort", "tvm", "tensorrt")
LIMITED = ("tvm", "tensorrt")
LIMIT = 0.15
RECIPE = "digits-vit"


@dataclass(frozen=True, slots=True)
class Size:
    """Quantized weights of one artifact.

    Attributes:
        model, target, precision: which.
        stored: bytes of codes and scales; None where there is no artifact.
        float32: bytes of the same weights in FP32.
        artifact: bytes of all files.
        note: why there is no artifact.
    """

    model: str
    target: str
    precision: str
    stored: int | None = None
    float32: int | None = None
    artifact: int | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """Stored bytes over FP32 bytes."""
        return None if self.stored is None or not self.float32 else self.stored / self.float32


def float_bytes(plan: Plan) -> int:
    """FP32 bytes of the weights that the plan quantizes."""
    return sum(4 * op.k * op.n for op in plan.ops.values() if f"{op.name}.weight" in plan.sites)


def stored_bytes(artifact: Artifact, plan: Plan) -> int:
    """Bytes of codes and scales of the quantized weights: as the target counted them, or counted here for TVM.

    Raises:
        ArtifactError: fewer bytes than the codes need, so something was not found.
    """
    counted = artifact.info.get("weight_size_bytes")
    stored = int(counted) if counted is not None else _in_parameters(artifact, plan)
    weights = [(op, plan.sites.get(f"{op.name}.weight")) for op in plan.ops.values()]
    least = sum(op.k * op.n * site.grid.bits // 8 for op, site in weights if site is not None)
    if stored < least:
        raise ArtifactError(
            message(f"{artifact.folder}: quantized weights are missing", expected=f"{least} bytes", found=f"{stored}")
        )
    return stored


def _in_parameters(artifact: Artifact, plan: Plan) -> int:
    """TVM: ``<op>::packed`` and ``<op>::scale`` in the parameter file."""
    from safetensors.numpy import load_file

    tensors = load_file(artifact.path("parameters"))
    ops = [op.name for op in plan.ops.values() if f"{op.name}.weight" in plan.sites]
    return sum(tensors[name].nbytes for op in ops for name in (f"{op}::packed", f"{op}::scale") if name in tensors)


def size_of(model: str, artifact: Artifact, plan: Plan) -> Size:
    """One row."""
    stored, whole = stored_bytes(artifact, plan), artifact.size_bytes
    return Size(model, artifact.target, artifact.precision, stored, float_bytes(plan), whole)


def of_run(folder: Path, precisions: Sequence[str]) -> Iterator[Size]:
    """Sizes in a finished run folder.

    Raises:
        ArtifactError: a stage is missing or damaged.
    """
    from s2d_deploy.plan import Plan
    from s2d_deploy.store import verify_folder

    for precision in precisions:
        plan = Plan.load(folder / "quantize" / precision)
        for target in TARGETS:
            place = folder / "export" / target / precision
            if not place.is_dir():
                yield Size(RECIPE, target, precision, note=f"{place} is not there")
                continue
            info = verify_folder(place)["info"]
            yield size_of(RECIPE, Artifact(place, target, precision, info["files"], info["info"]), plan)


def of_recipe(work: Path, precisions: Sequence[str]) -> Iterator[Size]:
    """Sizes of the digits recipe, made in `work` as far as the artifacts."""
    from s2d_deploy.console import Display
    from s2d_deploy.deployment import Deployment
    from s2d_deploy.pipeline import Pipeline
    from s2d_deploy.recipe import load_recipe
    from s2d_deploy.store import RunFolder

    recipe = load_recipe(RECIPE)
    with RunFolder(work / RECIPE) as store:
        store.claim(recipe.document())
        pipeline = Pipeline(recipe, store, Display())
        for section in recipe.targets:
            if section.name not in TARGETS:
                continue
            deployment = Deployment(pipeline, section)
            for precision in precisions:
                try:
                    artifact = deployment.artifact(precision)
                except (UnavailableError, UnsupportedError) as error:
                    yield Size(RECIPE, section.name, precision, note=str(error))
                else:
                    yield size_of(RECIPE, artifact, pipeline.plan(precision))


def of_vit(name: str, work: Path, precisions: Sequence[str]) -> Iterator[Size]:
    """Sizes of a ViT with random weights."""
    from _models import Bench, shape_of

    from s2d_deploy.plan import Plan

    with ExitStack() as stack:
        bench = stack.enter_context(Bench(shape_of(name), work))
        for target in TARGETS:
            for precision in precisions:
                try:
                    artifact, _ = bench.build(target, precision, batch=1)
                except (UnavailableError, UnsupportedError) as error:
                    yield Size(name, target, precision, note=str(error))
                else:
                    yield size_of(name, artifact, Plan.load(bench.onnx(precision).folder))


def figures(sizes: Sequence[Size], limited: Sequence[str] = LIMITED) -> list[Figure]:
    """W4A4 of every model and target; only `limited` targets have a limit."""
    return [
        at_most(
            f"{s.model} {s.target} w4a4, weights over FP32", s.ratio, LIMIT if s.target in limited else None, s.note
        )
        for s in sizes
        if s.precision == "w4a4"
    ]


def run(chosen: argparse.Namespace) -> int:
    """Build, count, print, write."""
    record = Record("weight-sizes")
    digits = of_run(chosen.run, chosen.precisions) if chosen.run else of_recipe(chosen.work, chosen.precisions)
    sizes = [*digits, *of_vit(chosen.model, chosen.work, chosen.precisions)]

    def number(value: int | None) -> str:
        return "-" if value is None else f"{value:,}"

    rows = [
        (
            f"{s.model} {s.target} {s.precision}",
            number(s.stored),
            number(s.float32),
            "-" if s.ratio is None else f"{s.ratio:.4f}",
            number(s.artifact),
        )
        for s in sizes
    ]
    print(table(("quantized weights, bytes", "stored", "in FP32", "ratio", "whole artifact"), rows) + "\n")
    data = {"sizes": [asdict(s) | {"ratio": s.ratio} for s in sizes]}
    return _common.finish(record, chosen.results, figures(sizes), data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    made = _common.parser("weight_sizes.py", str(__doc__))
    made.add_argument("--run", type=Path, metavar="DIR", help="a finished run of digits-vit, instead of a new one")
    made.add_argument("--model", default="vit-small", help="the model with random weights (default: vit-small)")
    made.add_argument(
        "--precisions",
        type=_common.names,
        default=STANDARD,
        help=f"comma-separated (default: {','.join(STANDARD)})",
    )
    made.add_argument(
        "--work", type=Path, default=_common.WORK, metavar="DIR", help=f"kept artifacts (default: {_common.WORK})"
    )
    return _common.guarded(run, made.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
