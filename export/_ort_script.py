"""The command line of ``to_ort``: from a quantized checkpoint or a common ONNX file to files that stand alone."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from s2d_deploy.errors import ArtifactError, RecipeError, S2DDeployError, message
from s2d_deploy.files import read_json, write_json
from s2d_deploy.qgraph import load_model, metadata
from s2d_deploy.registry import load_checkpoint_exporter, load_runtime
from s2d_deploy.session import Artifact, Audit

from ._ort_options import DEFAULT_PROVIDERS, LEVELS, checked_options
from ._ort_placement import DEFAULT_MARGIN
from ._ort_placement import KIND as PLACEMENT_KIND
from ._standalone import EXAMPLE, write_example, write_manifest

FILE = "model.onnx"


def run_script(target: Any, argv: Sequence[str] | None = None) -> int:
    """The command line of ``to_ort``; `target` is its `TARGET`."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d_deploy.export.to_ort",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Build for ONNX Runtime from a quantized checkpoint (<run>/quantize/<precision>, written by s2d-deploy\n"
            "quantize) or from a common ONNX file (written by s2d_deploy.export.to_onnx). Writes into OUT_FOLDER:\n"
            "  model.onnx       on ONNX Runtime's integer kernels (beyond 1 GB with model.onnx.data)\n"
            "  manifest.json    files with SHA-256, inputs, outputs, options, versions, what it was made from\n"
            "  example.py       loads and runs it with onnxruntime and NumPy alone\n"
            "  placement.json   with --placement search: what was measured, and what was chosen\n"
            "and prints what the artifact executes."
        ),
        epilog=(
            "The result needs nothing but onnxruntime:\n\n"
            "  import onnxruntime\n"
            '  session = onnxruntime.InferenceSession("OUT_FOLDER/model.onnx")\n'
            "  outputs = session.run(None, {session.get_inputs()[0].name: batch})\n\n"
            "example: python -m s2d_deploy.export.to_ort runs/mine/quantize/w8a8 out/ort --threads 2\n"
            "example: python -m s2d_deploy.export.to_ort common.onnx out/ort --placement search --shape sequence=128"
        ),
    )
    parser.add_argument(
        "model",
        type=Path,
        metavar="CHECKPOINT|COMMON.onnx",
        help="a quantized checkpoint's folder, or a common ONNX file, whose metadata names the precision",
    )
    parser.add_argument(
        "folder", type=Path, metavar="OUT_FOLDER", help="where the files go; made where it does not exist"
    )
    parser.add_argument(
        "--model", dest="source", metavar="MODEL", help="of a checkpoint outside its run folder: a folder or hub id"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the sessions that measure (default: 1)")
    parser.add_argument(
        "--provider",
        action="append",
        metavar="NAME",
        help="an execution provider: cpu, cuda, openvino, xnnpack, or any by name; repeatable, most preferred first "
        "(default: cpu)",
    )
    parser.add_argument(
        "--graph-optimization-level",
        choices=LEVELS,
        default="all",
        help="how far onnxruntime may rewrite the graph when it loads (default: all)",
    )
    parser.add_argument(
        "--placement",
        default="default",
        metavar="search|FILE",
        help="search: measure the forms of each op here, and keep what is faster than float by the margin; FILE: the "
        "placement.json of an earlier search",
    )
    parser.add_argument("--margin", type=float, default=DEFAULT_MARGIN, help=f"see --placement ({DEFAULT_MARGIN})")
    parser.add_argument("--int8-activations", action="store_true", help="let the search round INT4 blocks' activations")
    parser.add_argument("--batch", type=int, default=1, help="batch size that the search measures (default: 1)")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="NAME=SIZE", help="of another open dimension, as sequence=128"
    )
    arguments = parser.parse_args(argv)
    try:
        artifact, audit = _built(target, arguments)
    except S2DDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(_summary(artifact, audit))
    return 0


def _built(target: Any, arguments: argparse.Namespace) -> tuple[Artifact, Audit]:
    """What the command line asks for, done."""
    for name in ("threads", "batch"):
        if getattr(arguments, name) < 1:
            raise RecipeError(message(f"--{name}", expected="1 or more", found=str(getattr(arguments, name))))
    searching = arguments.placement == "search"
    options = {
        "providers": arguments.provider or list(DEFAULT_PROVIDERS),
        "graph_optimization_level": arguments.graph_optimization_level,
        "placement": "search" if searching else "default",
        "margin": arguments.margin,
        "int8_activations": arguments.int8_activations,
    }
    settings = checked_options(options)
    with tempfile.TemporaryDirectory() as scratch:
        common, source = arguments.model, {"common": arguments.model.name}
        if arguments.model.is_dir():
            common = Path(scratch) / FILE
            load_checkpoint_exporter()(arguments.model, common, arguments.source)
            source = {"checkpoint": arguments.model.name}
        precision = metadata(load_model(common)).get("s2d.precision", "none")
        folder: Path = arguments.folder
        placement = _placement_of(target, arguments, common, precision, options)
        folder.mkdir(parents=True, exist_ok=True)
        dialect = target.dialect_for(common, folder, precision=precision, options=options, placement=placement)
    artifact = target.build(dialect, folder, precision=precision, options=options, progress=print)
    with load_runtime("ort").open(artifact, threads=arguments.threads) as session:
        audit = session.audit()
    artifact = replace(artifact, info=artifact.info | {"rung": audit.rung, "executed": audit.executed})
    model = onnx.load(artifact.path("model"), load_external_data=False)
    if placement is not None:
        write_json(folder / "placement.json", placement)
    write_manifest(artifact, model, source)
    names = [str(p if isinstance(p, str) else p[0]) for p in settings["providers"]]
    write_example(folder / EXAMPLE, model, file=FILE, providers=[runtime_provider(n) for n in names])
    return artifact, audit


def runtime_provider(name: str) -> str:
    """The full name of an execution provider, as onnxruntime wants it."""
    runtime: Any = load_runtime("ort")
    return str(runtime.provider(name))


def _placement_of(
    target: Any, arguments: argparse.Namespace, common: Path, precision: str, options: Mapping[str, Any]
) -> dict[str, Any] | None:
    """A search, an earlier one's file, or None."""
    if arguments.placement == "default":
        return None
    if arguments.placement != "search":
        path = Path(arguments.placement)
        document = read_json(path)
        if document.get("kind") != PLACEMENT_KIND or document.get("precision") != precision:
            raise ArtifactError(
                message(
                    f"{path}: not the placement of this model",
                    expected=f"kind {PLACEMENT_KIND!r} of {precision}",
                    found=f"kind {document.get('kind')!r} of {document.get('precision')}",
                    fix="search again: --placement search",
                )
            )
        return document
    sizes = {}
    for text in arguments.shape:
        name, _, size = text.partition("=")
        if not name or not size.isdigit() or int(size) < 1:
            raise RecipeError(message(f"--shape {text!r}", expected="NAME=SIZE, for example sequence=128"))
        sizes[name] = int(size)
    found: dict[str, Any] | None = target.search(
        common,
        precision=precision,
        options=options,
        batches=[arguments.batch],
        sizes=sizes,
        threads=arguments.threads,
        progress=print,
    )
    return found


def _summary(artifact: Artifact, audit: Audit) -> str:
    shares = ", ".join(f"{share:.1%} {name}" for name, share in sorted(audit.executed.items()))
    macs = sum(op.macs for op in audit.ops)
    lines = [
        f"{artifact.path('model')}: {artifact.precision}, {artifact.size_bytes:,} bytes",
        f"executes {shares} of {macs:,} multiply-accumulates per sample; rung: {audit.rung}",
    ]
    ratio = artifact.info["weights"]["ratio"]
    if ratio is not None:
        lines.append(f"quantized weights take {ratio:.3f} of their FP32 bytes")
    return "\n".join([*lines, *(f"note: {note}" for note in audit.notes)])
