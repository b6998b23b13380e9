"""TensorRT engines for every GPU that can be built for here: bytes, seconds, and what the compiled layers execute.

    python benchmarks/trt_engines.py

ViTs with random weights are built at each precision for all compute capabilities together (ViT-Tiny at W8A8, W4A4 and
NVFP4 for each alone, too), and in the forms that options choose (float part in FP16, attention as one kernel, 4-bit
weights stored as bytes). Nothing is executed: no GPU is needed, and no latency is claimed. What a layer executes is
read from the list that the builder prints. The figures: no op whose arithmetic is not the declared one, and W4A4 and
NVFP4 weights within their share of FP32's bytes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _common
from _common import Figure, Record, at_most, table

from s2d_deploy.errors import S2DDeployError

MODELS = ("vit-tiny", "vit-small", "vit-base")
PRECISIONS = ("fp32", "w8a8", "w4a16", "w4a8", "w4a4", "nvfp4")
CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
ALONE = ("w8a8", "w4a4", "nvfp4")
TOGETHER = ("8.0", "8.6", "8.9", "12.0", "12.1")
# Options beside the default, for all capabilities together: precision, what it is called, the options.
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("fp32", "fp16", {"compute": "fp16"}),
    ("w8a8", "fp16", {"compute": "fp16"}),
    ("w8a8", "fused attention", {"attention": "fused"}),
    ("w8a8", "fused attention, fp16", {"attention": "fused", "compute": "fp16"}),
    ("w4a16", "fp32", {"compute": "fp32"}),
    ("w4a4", "weights as bytes", {"weight_storage": "int8"}),
    ("nvfp4", "fp16", {"compute": "fp16"}),
)
LIMITS = {"w4a4": 0.15, "nvfp4": 0.18}  # of FP32: 4 bits and a scale for a channel, or 4.5 bits and padding


@dataclass(frozen=True, slots=True)
class Engine:
    """One build.

    Attributes:
        model, precision, form, capabilities: what was built; `form` names the options.
        file_bytes: the engine as it is stored (xz); None where it was refused.
        engine_bytes: unpacked.
        weight_ratio: quantized weights' bytes in the engine over their FP32 bytes.
        build_seconds: TensorRT's part, on a machine that does other work, too.
        rung, executed: of the audit; shares of multiply-accumulates.
        mismatches: ops that execute something else than declared.
        kernels: compiled layers by kind, without those that only wait.
        attention: kernel names of attention's products.
        note: why it was refused.
    """

    model: str
    precision: str
    form: str
    capabilities: tuple[str, ...]
    file_bytes: int | None = None
    engine_bytes: int | None = None
    weight_ratio: float | None = None
    build_seconds: float | None = None
    rung: str = ""
    executed: dict[str, float] = field(default_factory=dict)
    mismatches: int | None = None
    kernels: dict[str, int] = field(default_factory=dict)
    attention: tuple[str, ...] = ()
    note: str = ""


def built(
    model: str, precision: str, form: str, capabilities: tuple[str, ...], common: Path, options: dict[str, Any]
) -> Engine:
    """Build one engine in a folder that is thrown away, and describe it."""
    from s2d_deploy.files import read_json
    from s2d_deploy.registry import load_target
    from s2d_deploy.session import Audit, ExecutedOp

    target = load_target("tensorrt")
    folder = Path(tempfile.mkdtemp(prefix="s2d-engine-"))
    try:
        dialect = target.dialect(common, folder, precision=precision)
        chosen = {"compute_capabilities": list(capabilities), "batch": [1, 8, 32], **options}
        artifact = target.build(dialect, folder, precision=precision, options=chosen, progress=lambda _: None)
        description = read_json(artifact.path("description"))
        audit = description["audit"]
        ops = tuple(ExecutedOp(**op) for op in audit["ops"])
        weights = [op for op in description["ops"] if op["weight"]]
        stored = artifact.info.get("weight_size_bytes")
        return Engine(
            model,
            precision,
            form,
            tuple(artifact.info["compute_capabilities"]),
            artifact.path("engine").stat().st_size,
            artifact.info["engine_bytes"],
            stored / float_bytes(common, {op["name"] for op in weights}) if stored else None,
            description["build_seconds"],
            audit["rung"],
            audit["executed"],
            len(Audit(ops, audit["rung"], audit["evidence"]).mismatches()),
            dict(Counter(layer["kind"] for layer in description["layers"])),
            tuple(sorted({op.kernel.split("_0x")[0] for op in ops if op.name.endswith((".scores", ".context"))})),
        )
    except S2DDeployError as error:
        return Engine(model, precision, form, capabilities, note=str(error))
    finally:
        shutil.rmtree(folder)


def float_bytes(common: Path, names: set[str]) -> int:
    """FP32 bytes of the quantized weights of a common file."""
    import onnx

    model = onnx.load(common)
    dims = {t.name: list(t.dims) for t in model.graph.initializer}
    codes = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    total = 0
    for node in model.graph.node:
        if node.name in names:
            size = 4
            for dimension in dims[codes[node.input[1]]]:
                size *= dimension
            total += size
    return total


def engines(models: Sequence[str], precisions: Sequence[str], work: Path) -> Iterator[Engine]:
    """Every build, one after the other."""
    from _models import Bench, shape_of

    for name in models:
        with Bench(shape_of(name), work) as bench:
            for precision in precisions:
                common = bench.onnx(precision).folder / "model.onnx"
                for capability in CAPABILITIES if name == MODELS[0] and precision in ALONE else ():
                    yield built(name, precision, "not packed", (capability,), common, {"compress": False})
                yield built(name, precision, "default", TOGETHER, common, {})
                for of, form, options in VARIANTS:
                    if of == precision:
                        yield built(name, precision, form, TOGETHER, common, options)


def figures(found: Sequence[Engine]) -> list[Figure]:
    """Ops that are not as declared, and bytes of 4-bit weights, for each model, precision and form."""
    made = []
    for engine in found:
        if engine.mismatches is None or len(engine.capabilities) == 1:
            continue
        label = f"{engine.model} {engine.precision} ({engine.form})"
        made.append(at_most(f"{label}: ops not as declared", engine.mismatches, 0))
        if engine.form == "default" and engine.precision in LIMITS:
            made.append(at_most(f"{label}: weights over FP32", engine.weight_ratio, LIMITS[engine.precision]))
    return made


def row(engine: Engine) -> tuple[str, ...]:
    """One line of the table."""
    gpus = "all" if len(engine.capabilities) > 2 else " ".join(engine.capabilities)
    name = f"{engine.model} {engine.precision} ({engine.form}) {gpus}"
    if engine.file_bytes is None:
        return (name, "-", "-", "-", "-", "refused", "-")
    shares = " ".join(f"{100 * s:.0f}% {p}" for p, s in sorted(engine.executed.items()))
    return (
        name,
        f"{engine.file_bytes:,}",
        f"{engine.engine_bytes:,}",
        "-" if engine.weight_ratio is None else f"{engine.weight_ratio:.4f}",
        f"{engine.build_seconds:.1f}",
        shares,
        str(sum(engine.kernels.values())),
    )


def run(chosen: argparse.Namespace) -> int:
    """Build, print, write."""
    from s2d_deploy.registry import load_runtime

    record = Record("trt-engines")
    started, found = time.perf_counter(), []
    for engine in engines(chosen.models, chosen.precisions, chosen.work):
        found.append(engine)
        print(f"{time.perf_counter() - started:6.0f} s  {'  '.join(row(engine))}", flush=True)
    header = ("engine", "stored, bytes", "unpacked", "weights/FP32", "build s", "compiled, not run", "kernels")
    print("\n" + table(header, map(row, found)) + "\n")
    notes = {e.note for e in found if e.note}
    print("".join(f"refused: {note}\n" for note in sorted(notes)))
    data = {"tensorrt": load_runtime("tensorrt").version(), "engines": [asdict(e) for e in found]}
    return _common.finish(record, chosen.results, figures(found), data)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    made = _common.parser("trt_engines.py", str(__doc__))
    made.add_argument(
        "--models", type=_common.names, default=MODELS, help=f"comma-separated (default: {','.join(MODELS)})"
    )
    made.add_argument(
        "--precisions",
        type=_common.names,
        default=PRECISIONS,
        help=f"comma-separated (default: {','.join(PRECISIONS)})",
    )
    made.add_argument(
        "--work", type=Path, default=_common.WORK, metavar="DIR", help=f"kept common files (default: {_common.WORK})"
    )
    return _common.guarded(run, made.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
