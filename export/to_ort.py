"""Target `ort`: the common ONNX file -> the same model on ONNX Runtime's integer kernels (`_ort_rewrite` says how).

The artifact is that one ONNX file. Plain onnxruntime loads it, without this package:

    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"pixel_values": images})

Weights stay INT4 or INT8 in the file and are unpacked when the session loads, so the file that ships is small and the
kernels see bytes. Run as a script: ``python -m s2d_deploy.export.to_ort CHECKPOINT|COMMON.onnx OUT_FOLDER``, which also
writes a manifest and an example that needs nothing of this project.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from s2d_deploy.errors import ArtifactError, PlanError, RecipeError, RuntimeUnavailable, S2DDeployError, message
from s2d_deploy.files import read_json, write_json
from s2d_deploy.graph_check import sound
from s2d_deploy.large_models import LARGE, save_model
from s2d_deploy.qgraph import initializers, load_model, metadata, require_integer_codes
from s2d_deploy.registry import load_checkpoint_exporter, load_runtime
from s2d_deploy.session import Artifact, Audit, Progress

from ._ort_placement import DEFAULT_MARGIN, scratch_session, search
from ._ort_placement import KIND as PLACEMENT_KIND
from ._ort_rewrite import to_integer_kernels, to_plain_quantizers
from ._standalone import EXAMPLE, write_example, write_manifest

FILE = "model.onnx"
OPTIONS = ("providers", "graph_optimization_level", "dialect", "placement", "margin", "int8_activations")
DIALECTS = ("kernels", "qdq")
PLACEMENTS = ("default", "search")
LEVELS = ("all", "extended", "basic", "disable")
DEFAULT_PROVIDERS = ("CPUExecutionProvider",)
PLACEMENT_KEY = "s2d.placed"  # metadata of the model
_EXTERNAL_BEYOND = LARGE
# Inputs of a kernel that are the stored weight: codes, scales, zero points.
_WEIGHT_INPUTS = {
    "MatMulIntegerToFloat": (1, 3, 5),
    "MatMulNBits": (1, 2, 3),
    "ConvInteger": (1, 3),
    "MatMul": (1,),
    "Conv": (1,),
}


class OrtTarget:
    """See `s2d_deploy.session.Target`."""

    name = "ort"

    def dialect(self, model: Path, folder: Path, *, precision: str) -> Path:
        """Rewrite the common file onto integer kernels, as ``model.onnx`` in `folder`.

        Raises:
            ArtifactError: no readable ONNX, not exported for `precision`, or it lies where the dialect would go.
            PlanError: a scale is zero, negative, denormal, infinite or NaN; every one is named.
        """
        return self.dialect_for(model, folder, precision=precision, options={}, placement=None)

    def dialect_for(
        self,
        model: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        placement: Mapping[str, Any] | None,
    ) -> Path:
        """As `dialect`: in Q/DQ where the options say so, and with each op in the form that a search has chosen.

        Raises:
            RecipeError: an unknown option or value. Else as `dialect`.
        """
        settings = _settings(options)
        target = folder / FILE
        if model.resolve() == target.resolve():
            raise ArtifactError(
                message(f"{model}: the dialect would overwrite the common file", fix="choose another output folder")
            )
        common = _checked(model, precision)
        require_integer_codes(common, "onnxruntime")
        with sound(str(model)):
            _check_scales(model, common)
            if settings["dialect"] == "qdq":
                rewritten = to_plain_quantizers(common)
            else:
                rewritten = to_integer_kernels(common, (placement or {}).get("forms"))
        if placement is not None:
            rewritten.metadata_props.add(key=PLACEMENT_KEY, value=json.dumps(_summary_of(placement)))
        folder.mkdir(parents=True, exist_ok=True)
        save_model(rewritten, target, beyond=_EXTERNAL_BEYOND)
        return target

    def search(
        self,
        model: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        batches: Sequence[int],
        sizes: Mapping[str, int],
        threads: int,
        progress: Progress,
    ) -> dict[str, Any] | None:
        """Measure the forms of every contraction of the common file and of the whole; see `_ort_placement.search`.

        Args:
            model: the common file.
            precision: as exported.
            options: those of `build`; None is returned unless they hold ``placement: search``.
            batches: batch sizes that will be run; the smallest is measured.
            sizes: length of every other dynamic dimension.
            threads: of the sessions.
            progress: told what is measured.

        Raises:
            RecipeError: unknown options.
            RuntimeUnavailable, DeviceUnavailable: it cannot be measured here.
        """
        settings = _settings(options)
        if settings["placement"] != "search":
            return None
        runtime: Any = load_runtime(self.name)
        if (reason := runtime.available()) is not None:
            raise RuntimeUnavailable(reason)
        common = _checked(model, precision)
        _check_scales(model, common)
        given = {"batch": (min(batches),), **{name: (size,) for name, size in sizes.items()}}
        known = {d.dim_param for value in common.graph.input for d in value.type.tensor_type.shape.dim}
        shapes, feeds = runtime.operand_shapes(model, {k: v for k, v in given.items() if k in known}, threads)

        def opened(folder: Path) -> Any:
            return runtime.open(Artifact(folder, self.name, precision, {"model": FILE}, settings), threads=threads)

        found = search(
            common,
            shapes,
            feeds,
            scratch_session(opened),
            margin=settings["margin"],
            int8_activations=settings["int8_activations"],
            progress=progress,
        )
        return found | {
            "precision": precision,
            "threads": threads,
            "shapes": {name: list(array.shape) for name, array in feeds.items()},
            "onnxruntime": runtime.version(),
            "device": runtime.device_for(settings),
            "graph_optimization_level": settings["graph_optimization_level"],
        }

    def shape_options(self, batches: Sequence[int], sizes: Mapping[str, int]) -> dict[str, Any]:  # noqa: ARG002
        """Nothing: any shape is served."""
        return {}

    def build(
        self,
        dialect: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],
        progress: Progress,
    ) -> Artifact:
        """Put the dialect file into `folder` and load it once, so that what cannot be loaded is known now.

        Args:
            dialect: what `dialect` wrote.
            folder: where the artifact goes; may be the dialect's own folder.
            precision: as exported.
            options: ``providers``: names, or pairs of name and options, in order of preference (default: the CPU);
                ``graph_optimization_level``: ``all`` (default), ``extended``, ``basic`` or ``disable``;
                ``dialect``: ``kernels`` (default where the CPU is first) or ``qdq`` (default elsewhere);
                ``placement``: ``default`` or ``search``, with ``margin`` (0.05) and ``int8_activations`` (false); the
                last three are read by `search`, and here only checked.
            progress: told what happens.

        Raises:
            RecipeError: an unknown option or value.
            RuntimeUnavailable: onnxruntime is not installed.
            ArtifactError: no readable ONNX, or onnxruntime refuses it.
        """
        settings = _settings(options)
        runtime = load_runtime(self.name)
        if (reason := runtime.available()) is not None:
            raise RuntimeUnavailable(reason)
        model = _checked(dialect, precision)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"model": FILE}
        data = dialect.with_name(f"{dialect.name}.data")
        if data.exists():
            files["data"] = data.name
        for source, name in ((dialect, FILE), *([(data, data.name)] if "data" in files else [])):
            if source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)
        info = {**settings, "onnxruntime": runtime.version(), "weights": weight_bytes(model)}
        info["weight_size_bytes"] = info["weights"]["stored_bytes"]
        if (placed := metadata(model).get(PLACEMENT_KEY)) is not None:
            info["placed"] = json.loads(placed)
        artifact = Artifact(folder, self.name, precision, files, info)
        progress(f"ort: loading {FILE} in onnxruntime {runtime.version()}")
        with runtime.open(artifact, threads=1):
            pass
        return artifact


TARGET = OrtTarget()


def weight_bytes(model: onnx.ModelProto) -> dict[str, Any]:
    """Bytes of the quantized weights in a dialect file, scales and zero points included, against FP32.

    Returns:
        ``{"stored_bytes", "float32_bytes", "ratio"}``; the ratio is None where nothing is quantized.
    """
    stored = initializers(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    counted: set[str] = set()
    total, elements = 0, 0
    for node in model.graph.node:
        props = metadata(node)
        if "s2d.op" not in props or props.get("s2d.declared", "float") == "float":
            continue
        leaves: list[str] = []
        for i in _WEIGHT_INPUTS.get(node.op_type, ()):
            if i < len(node.input) and (found := _stored_behind(node.input[i], producers, stored)) is not None:
                leaves += found
        tensors = [stored[name] for name in dict.fromkeys(leaves) if name not in counted]
        counted.update(leaves)
        codes = [math.prod(t.dims) * (2 if node.op_type == "MatMulNBits" else 1) for t in tensors]
        total += sum(_bytes(t) for t in tensors)
        # An activation as the right operand (attention) brings only its scale: one element, no weight.
        elements += max((n for n in codes if n > 1), default=0)
    return {"stored_bytes": total, "float32_bytes": 4 * elements, "ratio": total / (4 * elements) if elements else None}


def _stored_behind(
    name: str, producers: Mapping[str, onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]
) -> list[str] | None:
    """Initializers that `name` is computed from, or None where an activation is among its sources."""
    if name in stored:
        return [name]
    node = producers.get(name)
    if node is None:
        return None if name else []
    result: list[str] = []
    for source in node.input:
        found = _stored_behind(source, producers, stored)
        if found is None:
            return None
        result += found
    return result


def _bytes(tensor: onnx.TensorProto) -> int:
    narrow = tensor.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    bits = 4 if narrow else 8 * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    elements: int = math.prod(tensor.dims)
    return (elements * bits + 7) // 8


def _checked(path: Path, precision: str) -> onnx.ModelProto:
    model = load_model(path)
    found = metadata(model).get("s2d.precision")
    if found != precision:
        raise ArtifactError(
            message(
                f"{path}: not the ONNX file for this precision",
                expected=f"s2d.precision {precision!r} in its metadata",
                found=repr(found) if found else "none: the file is truncated or foreign",
                fix="export it again",
            )
        )
    return model


def _check_scales(path: Path, model: onnx.ModelProto) -> None:
    stored = initializers(model)
    wrong = []
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.input[1] in stored:
            scale = numpy_helper.to_array(stored[node.input[1]]).astype(np.float64)
            # Below the smallest normal float32, kernels that flush denormals to zero divide by zero.
            if not (np.isfinite(scale).all() and (scale >= np.finfo(np.float32).tiny).all()):
                wrong.append(metadata(node).get("s2d.site", node.name))
    if wrong:
        raise PlanError(
            message(
                f"{path}: scales that no runtime can divide by: {', '.join(dict.fromkeys(wrong))}",
                expected="finite, positive, and no denormals (1.2e-38 or more)",
                fix="calibrate again; a weight or an activation is NaN or infinite",
            )
        )


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """Checked options with defaults, as they go into the manifest."""
    for name in options:
        if name not in OPTIONS:
            close = get_close_matches(str(name), OPTIONS, n=1)
            raise RecipeError(
                message(
                    f"target 'ort': unknown option {name!r}",
                    expected=f"one of {', '.join(OPTIONS)}",
                    fix=f"did you mean {close[0]!r}?" if close else None,
                )
            )
    level = options.get("graph_optimization_level", "all")
    if level not in LEVELS:
        close = get_close_matches(str(level), LEVELS, n=1)
        raise RecipeError(
            message(
                "target 'ort': graph_optimization_level",
                expected=f"one of {', '.join(LEVELS)}",
                found=repr(level),
                fix=f"did you mean {close[0]!r}?" if close else None,
            )
        )
    checks: tuple[tuple[str, Any, Any], ...] = (
        ("dialect", DIALECTS, options.get("dialect", DIALECTS[0])),
        ("placement", PLACEMENTS, options.get("placement", PLACEMENTS[0])),
    )
    for name, known, found in checks:
        if found not in known:
            close = get_close_matches(str(found), known, n=1)
            raise RecipeError(
                message(
                    f"target 'ort': {name}",
                    expected=f"one of {', '.join(known)}",
                    found=repr(found),
                    fix=f"did you mean {close[0]!r}?" if close else None,
                )
            )
    margin, int8 = options.get("margin", DEFAULT_MARGIN), options.get("int8_activations", False)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin < 1:
        raise RecipeError(message("target 'ort': margin", expected="0 or more, below 1", found=repr(margin)))
    if not isinstance(int8, bool):
        raise RecipeError(message("target 'ort': int8_activations", expected="true or false", found=repr(int8)))
    providers = options.get("providers", DEFAULT_PROVIDERS)
    if isinstance(providers, str) or not isinstance(providers, Sequence) or not providers:
        raise RecipeError(
            message("target 'ort': providers", expected="a list, as [CPUExecutionProvider]", found=repr(providers))
        )
    for provider in providers:
        pair = isinstance(provider, Sequence) and len(provider) == 2 and isinstance(provider[1], Mapping)
        if not (isinstance(provider, str) or (pair and isinstance(provider[0], str))):
            raise RecipeError(
                message("target 'ort': providers", expected="names, or pairs [name, options]", found=repr(provider))
            )
    first = str(providers[0] if isinstance(providers[0], str) else providers[0][0]).lower()
    # Other providers fuse Q/DQ themselves; the kernels that are written for the CPU are unknown to them.
    dialect = options.get("dialect", "kernels" if first in ("cpu", "cpuexecutionprovider") else "qdq")
    if dialect == "qdq" and options.get("placement") == "search":
        raise RecipeError(
            message(
                "target 'ort': placement: search measures the CPU's kernels",
                found=f"dialect qdq, providers {', '.join(map(str, providers))}",
                fix="leave placement out, or set providers: [cpu]",
            )
        )
    return {
        "providers": [p if isinstance(p, str) else [p[0], dict(p[1])] for p in providers],
        "graph_optimization_level": level,
        "dialect": dialect,
        "placement": options.get("placement", "default"),
        "margin": float(margin),
        "int8_activations": int8,
    }


def _summary_of(placement: Mapping[str, Any]) -> dict[str, Any]:
    """What the artifact says of its placement; the whole document lies with the search."""
    return {key: placement[key] for key in ("margin", "int8_activations", "forms", "kept_float", "whole")}


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: a quantized checkpoint or a common ONNX file becomes an artifact that stands alone."""
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
        artifact, audit = _built(arguments)
    except S2DDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(_summary(artifact, audit))
    return 0


def _built(arguments: argparse.Namespace) -> tuple[Artifact, Audit]:
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
    settings = _settings(options)
    with tempfile.TemporaryDirectory() as scratch:
        common, source = arguments.model, {"common": arguments.model.name}
        if arguments.model.is_dir():
            common = Path(scratch) / FILE
            load_checkpoint_exporter()(arguments.model, common, arguments.source)
            source = {"checkpoint": arguments.model.name}
        precision = metadata(load_model(common)).get("s2d.precision", "none")
        folder: Path = arguments.folder
        placement = _placement_of(arguments, common, precision, options)
        folder.mkdir(parents=True, exist_ok=True)
        dialect = TARGET.dialect_for(common, folder, precision=precision, options=options, placement=placement)
    artifact = TARGET.build(dialect, folder, precision=precision, options=options, progress=print)
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
    arguments: argparse.Namespace, common: Path, precision: str, options: Mapping[str, Any]
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
    return TARGET.search(
        common,
        precision=precision,
        options=options,
        batches=[arguments.batch],
        sizes=sizes,
        threads=arguments.threads,
        progress=print,
    )


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


if __name__ == "__main__":
    raise SystemExit(main())
