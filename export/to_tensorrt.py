"""Target `tensorrt`: common ONNX -> explicit Q/DQ -> one engine for a list of GPUs, built with no GPU here.

The dialect (`_trt_dialect`) keeps every code exact. Rungs on TensorRT: W8A8 is native (INT8 products); W4A8 and W4A4
are emulated, 4-bit codes multiplied as INT8, because TensorRT has no 4-bit integer activations; W4A16 is weight-only;
NVFP4 is native on Blackwell (FP4 by FP4). 4-bit weights lie packed in the engine, two in a byte.

One engine serves all listed compute capabilities: TensorRT-RTX stores kernels as portable programs and compiles them on
the device, so six capabilities take no more room than one. The file is stored as ``.xz`` where that saves a quarter,
because those programs repeat themselves (a ViT-Tiny's 19 MB become 2.4 MB); reading it is ``lzma.decompress``.

What was built is audited from the layer list that the builder prints: fusions and operand types are seen, nothing is
executed. Run as a script: ``python -m s2d_deploy.export.to_tensorrt CHECKPOINT|COMMON.onnx FOLDER``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import onnx
from onnx import numpy_helper

from s2d_deploy import __version__
from s2d_deploy.errors import ArtifactError, RuntimeUnavailable, S2DDeployError, UnsupportedError, message
from s2d_deploy.files import read_json, write_json
from s2d_deploy.graph_check import sound
from s2d_deploy.qgraph import contractions, load_model, metadata
from s2d_deploy.registry import load_checkpoint_exporter
from s2d_deploy.runtimes import _trt_package as package
from s2d_deploy.runtimes._trt_layers import audit_layers, listing, low_bit_bytes, parse_layers
from s2d_deploy.session import Artifact, Progress

from ._standalone import write_manifest
from ._trt_attention import fuse_attention
from ._trt_build import compile_engine
from ._trt_compute import Compute, to_compute
from ._trt_dialect import widen_weights, write_dialect
from ._trt_example import EXAMPLE, write_example
from ._trt_files import save
from ._trt_fp4 import uses_fp4, with_fp4
from ._trt_options import KEY, Options

DIALECT = "model.onnx"
DESCRIPTION = "engine.json"
FORMAT = 1  # of DESCRIPTION


class TensorRTTarget:
    """See `s2d_deploy.session.Target`; `Options` lists what `build` takes."""

    name = "tensorrt"

    def dialect(self, model: Path, folder: Path, *, precision: str) -> Path:
        """Write the dialect as ``model.onnx`` in `folder`; needs no TensorRT.

        Raises:
            ArtifactError: no readable common ONNX file, or one of another precision.
            UnsupportedError: quantizers that TensorRT cannot express; every one is named, with the recipe key.
        """
        found = metadata(load_model(model)).get("s2d.precision")
        if found != precision:
            raise ArtifactError(
                message(
                    f"{model}: not the common ONNX file for this precision",
                    expected=f"s2d.precision {precision!r} in its metadata",
                    found=repr(found) if found else "none: the file is truncated or foreign",
                    fix="export it again",
                )
            )
        target = folder / DIALECT
        with sound(str(model)):
            write_dialect(model, target)
        return target

    def shape_options(self, batches: Sequence[int], sizes: Mapping[str, int]) -> dict[str, Any]:
        """A profile from 1 to the largest batch, tuned for the smallest; the same for other dimensions."""
        return {
            "batch_sizes": sorted(set(batches)),
            "dimensions": {name: {"min": 1, "opt": size, "max": size} for name, size in sizes.items()},
        }

    def build(
        self,
        dialect: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        progress: Progress,
    ) -> Artifact:
        """Compile the dialect file into an engine, and describe it in ``engine.json``.

        The artifact's files are what a runtime needs (engine, description); the dialect file lies beside them.

        Raises:
            RecipeError: an unknown or bad option.
            RuntimeUnavailable: neither `tensorrt` nor `tensorrt_rtx` is installed.
            UnsupportedError: TensorRT refuses the graph; the message names node, layer, reason and recipe line.
        """
        chosen = Options.parse(options)
        if not package.installed():
            raise RuntimeUnavailable(message("TensorRT is not installed", fix=package.INSTALL))
        folder.mkdir(parents=True, exist_ok=True)
        model = load_model(dialect)
        notes = []
        if uses_fp4(model):
            chosen, left_out = _only_fp4(chosen)
            notes += [f"built without {', '.join(left_out)}: FP4 begins with Blackwell (10.0)"] if left_out else []
        if chosen.attention == "fused" and (sites := fuse_attention(model)):
            notes.append(
                f"attention as one kernel: {len(sites)} site(s) have another step than the plan's: {sites[0]}, .."
            )
        compute = compute_of(chosen.compute, precision)
        to_compute(model, compute)
        if chosen.weight_storage == "int8":
            widen_weights(model)
        dialect = folder / DIALECT
        save(model, dialect)
        progress(f"tensorrt: building for compute capability {', '.join(chosen.compute_capabilities)}")
        answer = compile_engine(model, dialect, folder / "model.engine", chosen)
        engine = folder / answer["engine"]
        description = _describe(model, answer, chosen, precision, compute, notes)
        write_json(folder / DESCRIPTION, description)
        progress(f"tensorrt: built in {answer['seconds']:.1f} s, {engine.stat().st_size} bytes")
        keys = ("package", "version", "compute_capabilities", "batch", "compute", "engine_bytes", "audit")
        info = {key: description[key] for key in keys}
        if description["weight_size_bytes"] is not None:
            info["weight_size_bytes"] = description["weight_size_bytes"]
        info["rung"] = description["audit"]["rung"]
        return Artifact(folder, self.name, precision, {"engine": engine.name, "description": DESCRIPTION}, info)


TARGET = TensorRTTarget()


def compute_of(wanted: str, precision: str) -> Compute:
    """The float part's type: ``auto`` is fp16 where a precision says that activations have 16 bits, else fp32."""
    if wanted == "auto":
        return "fp16" if precision.endswith("a16") else "fp32"
    return cast(Compute, wanted)


def _only_fp4(options: Options) -> tuple[Options, list[str]]:
    """Options for the capabilities that have FP4, and the others.

    Raises:
        UnsupportedError: none has.
    """
    has, has_not = with_fp4(options.compute_capabilities)
    if not has:
        raise UnsupportedError(
            message(
                f"{KEY}.compute_capabilities: none of {', '.join(has_not)} has FP4",
                expected="12.0 or 12.1 (Blackwell) for nvfp4",
                fix="add 12.0, or use w4a4, which runs there as INT8 with 4-bit codes",
            )
        )
    return replace(options, compute_capabilities=tuple(has)), has_not


def _describe(
    model: onnx.ModelProto,
    answer: Mapping[str, Any],
    options: Options,
    precision: str,
    compute: Compute,
    notes: Sequence[str],
) -> dict[str, Any]:
    """The artifact's ``engine.json``: what it is, what it is for, what its compiled layers are."""
    stored = {t.name: t for t in model.graph.initializer}
    weights = {n.output[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}
    ops = [
        {
            "name": c.node.name,
            "macs": c.macs,
            "declared": c.declared,
            "weight": weights[c.node.input[1]].name if c.node.input[1] in weights else "",
        }
        for c in contractions(model)
    ]
    layers = parse_layers(answer["layers"])
    evidence = (
        f"layer list that {answer['package']} {answer['version']} printed while it compiled for compute capability "
        f"{', '.join(options.compute_capabilities)}; nothing was executed"
    )
    if not layers:
        raise UnsupportedError(
            message(
                f"{answer['package']} {answer['version']} printed no layer list that can be read: nothing to audit",
                expected="TensorRT-RTX 1.5 to 1.7, or TensorRT 10 and 11",
                fix=package.INSTALL,
            )
        )
    # Scales of integer codes, as they lie in the file; FP4's block scales are among the engine's low-bit constants.
    scales = sum(numpy_helper.to_array(stored[n.input[1]]).nbytes for n in weights.values() if n.input[1] in stored)
    codes = low_bit_bytes(layers)
    audit = audit_layers(layers, ops, evidence)
    return {
        "format": FORMAT,
        "s2d_deploy": __version__,
        "precision": precision,
        "package": answer["package"],
        "version": answer["version"],
        "compute_capabilities": list(options.compute_capabilities),
        "batch": dict(zip(("min", "opt", "max"), options.batch, strict=True)),
        "shapes": options.shapes(model),
        "inputs": answer["inputs"],
        "outputs": answer["outputs"],
        "compressed": "xz" if answer["engine"].endswith(".xz") else None,
        "engine_bytes": answer["engine_bytes"],
        "weight_size_bytes": codes + scales if scales else None,
        "tf32": options.tf32,
        "compute": compute,
        "build_seconds": round(answer["seconds"], 1),
        "gpu": answer.get("gpu"),
        "plugins": list(options.plugins),
        "notes": list(notes),
        "ops": ops,
        "layers": listing(layers),
        "audit": replace(audit, notes=(*notes, *audit.notes)).to_dict(),
    }


EPILOG = """
rungs: w8a8 native (INT8 x INT8); w4a8, w4a4 emulated (4-bit codes multiplied as INT8); w4a16 weight-only;
nvfp4 native on Blackwell, and nowhere else.

examples
  from a quantized checkpoint, for an RTX 30 and an RTX 40, batches up to 16:
    python -m s2d_deploy.export.to_tensorrt runs/mine/quantize/w8a8 out --compute-capability 8.6 8.9 --batch 1 4 16
  a text model with a dynamic length, float parts in FP16:
    python -m s2d_deploy.export.to_tensorrt model.onnx out --dimension sequence 1 64 128 --compute fp16

exit codes: 0 built, 2 the input or an option is wrong or cannot be expressed, 3 TensorRT is not installed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: a quantized checkpoint or a common ONNX file -> an artifact folder that stands alone."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d_deploy.export.to_tensorrt",
        description="Build a TensorRT engine from a quantized checkpoint (<run>/quantize/<precision>, written by\n"
        "s2d-deploy quantize) or from a common ONNX file (written by s2d_deploy.export.to_onnx). No GPU is needed\n"
        "to build; running the engine needs one. Writes into OUT_FOLDER:\n"
        "  model.engine.xz  the engine, for all listed GPUs (Ampere 8.0, 8.6; Ada 8.9; Blackwell 12.0, 12.1);\n"
        "                   model.engine where packing would not save a quarter\n"
        "  engine.json      versions, capabilities, shapes; each layer's types and what was fused into it\n"
        "  model.onnx       what TensorRT's parser read: explicit Q/DQ, signed INT8 with zero points 0, or FP4\n"
        "  manifest.json    files with SHA-256, inputs, outputs, options, versions, what it was made from\n"
        "  example.py       loads and runs it with TensorRT and NumPy alone",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Options()
    parser.add_argument(
        "model",
        type=Path,
        metavar="CHECKPOINT|COMMON.onnx",
        help="a quantized checkpoint's folder, or a common ONNX file, whose metadata names the precision",
    )
    parser.add_argument("folder", type=Path, metavar="OUT_FOLDER", help="where the files go")
    parser.add_argument(
        "--model", dest="source", metavar="MODEL", help="of a checkpoint outside its run folder: a folder or hub id"
    )
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        action="extend",
        metavar="X.Y",
        help=f"GPUs the engine is for, or `current` (default: {' '.join(default.compute_capabilities)})",
    )
    parser.add_argument(
        "--batch", nargs=3, type=int, metavar=("MIN", "OPT", "MAX"), help="batch sizes (default: 1 8 32)"
    )
    parser.add_argument(
        "--dimension",
        nargs=4,
        action="append",
        default=[],
        metavar=("NAME", "MIN", "OPT", "MAX"),
        help="another dynamic dimension",
    )
    parser.add_argument(
        "--compute",
        choices=("auto", "fp32", "fp16", "bf16"),
        default=default.compute,
        help="type of the float part (auto: fp16 for w*a16, else fp32, where the simulation is followed exactly)",
    )
    parser.add_argument(
        "--attention",
        choices=("exact", "fused"),
        default=default.attention,
        help="fused: 8-bit attention as one kernel, with 128 steps for its probabilities instead of the plan's 256",
    )
    parser.add_argument(
        "--weights",
        choices=("int4", "int8"),
        default=default.weight_storage,
        help="how 4-bit weights lie in the engine: int4 is packed, int8 is twice as large and needs no unpacking",
    )
    parser.add_argument(
        "--tf32", action="store_true", help="let float products run in TF32 (faster, 10 bits of mantissa)"
    )
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE", help="a library with plugins")
    parser.add_argument("--timing-cache", metavar="FILE", help="kept between builds (package tensorrt only)")
    parser.add_argument("--workspace-mb", type=int, metavar="MB", help="limit of scratch memory")
    parser.add_argument("--timeout", type=float, default=default.timeout_s, metavar="S", help="give up after S seconds")
    parser.add_argument("--no-compress", action="store_true", help="write model.engine instead of model.engine.xz")
    parser.add_argument("--json", action="store_true", help="print the description as one JSON document")
    arguments = parser.parse_args(argv)
    try:
        artifact = _from_command_line(arguments)
    except S2DDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print((artifact.folder / DESCRIPTION).read_text(encoding="utf-8"))
    else:
        audit = artifact.info["audit"]
        shares = ", ".join(f"{share:.1%} {name}" for name, share in audit["executed"].items())
        print(
            f"{artifact.path('engine')}: {artifact.precision}, {artifact.size_bytes:,} bytes, "
            f"rung {artifact.info['rung']}"
        )
        print(f"compiled, not run: {shares} of the multiply-accumulates ({audit['evidence']})")
        for note in audit["notes"]:
            print(f"note: {note}")
        print(f"{artifact.folder / EXAMPLE}: runs it with {artifact.info['package']} and NumPy alone")
    return 0


def _from_command_line(arguments: argparse.Namespace) -> Artifact:
    options: dict[str, Any] = {
        "compute": arguments.compute,
        "attention": arguments.attention,
        "weight_storage": arguments.weights,
        "tf32": arguments.tf32,
        "plugins": arguments.plugin,
        "timing_cache": arguments.timing_cache,
        "workspace_mb": arguments.workspace_mb,
        "timeout_s": arguments.timeout,
        "compress": not arguments.no_compress,
    }
    if arguments.compute_capability:
        options["compute_capabilities"] = arguments.compute_capability
    if arguments.batch:
        options["batch"] = arguments.batch
    ranges = {}
    for name, *numbers in arguments.dimension:
        ranges[name] = [int(n) if n.isdigit() else n for n in numbers]
    if ranges:
        options["dimensions"] = ranges
    Options.parse(options)  # before any work
    folder: Path = arguments.folder
    with tempfile.TemporaryDirectory() as scratch:
        common, source = arguments.model, {"common": arguments.model.name}
        if arguments.model.is_dir():
            common, source = Path(scratch) / DIALECT, {"checkpoint": arguments.model.name}
            load_checkpoint_exporter()(arguments.model, common, arguments.source)
        precision = metadata(load_model(common)).get("s2d.precision", "none")
        dialect = TARGET.dialect(common, folder, precision=precision)
        artifact = TARGET.build(
            dialect,
            folder,
            precision=precision,
            options=options,
            progress=lambda text: None if arguments.json else print(text, file=sys.stderr),
        )
    write_manifest(artifact, load_model(dialect), source)
    write_example(folder, artifact.files["engine"], read_json(folder / DESCRIPTION))
    return artifact


if __name__ == "__main__":
    raise SystemExit(main())
