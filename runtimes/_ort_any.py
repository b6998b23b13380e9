"""Audit of any ONNX model on ONNX Runtime: what each layer declares, and what runs it.

The model runs twice on the same random inputs, under the profiler: as it is written (no optimization), which gives the
shapes, and so the multiply-accumulates, of each layer; and as a session would run it, which gives kernel, arithmetic,
execution provider and time. A layer is found again in the optimized graph by its name, or by the value that it makes.
The outputs of the two runs are compared as well: an optimizer that changes numbers is seen, not only read.

What this does not show: accuracy (inputs are random), and layers inside If, Loop and Scan bodies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from s2d_deploy.errors import ArtifactError, DataError, ModelError, S2DDeployError, UnsupportedError, message
from s2d_deploy.qgraph import attributes, initializers, metadata
from s2d_deploy.session import Array

from ._ort_audit import FLOAT_KERNELS, INTEGER_KERNELS, find_kernel
from ._ort_layers import ATTENTIONS, INT8_LEVEL, NBITS, UNCOUNTED, Layer, bad_scales, integer, layers_of, macs_of, named
from ._ort_loading import PLACED
from ._ort_profile import Event, Profile, profiled
from ._ort_providers import CPU, asked_for, short_name

_TYPES = {
    "float": "float32",
    "double": "float64",
    "float16": "float16",
    "bfloat16": "bfloat16",
    "int8": "int8",
    "uint8": "int8",
    "int32": "int32",
}
_WATCHED_DB = 30.0  # an optimized session further than this from the written graph is worth a sentence
_FORWARD = 14  # nodes from a projection to the end of a fused attention


@dataclass(frozen=True, slots=True)
class LayerAudit:
    """One layer, declared against executed.

    Attributes:
        name: the op's name where the model carries ours, else the node's.
        operator: in the model as written.
        declared: ``"W8A8"``, ``"W4A16"``, ``"float"``, ...
        kernel: what runs it, or ``"unseen"``.
        executed: its arithmetic: ``"int8"``, ``"float32"``, ``"float16"``, ..., or ``"unseen"``.
        provider: short name of the execution provider.
        macs: multiply-accumulates of one run on the audited shapes; 0 where the shapes do not say.
        microseconds: of the kernel, fastest of three runs; None where it was not seen.
        differs: why this is not what was declared, or "".
    """

    name: str
    operator: str
    declared: str
    kernel: str
    executed: str
    provider: str
    macs: int
    microseconds: int | None
    differs: str


def audit_any(
    path: Path, *, shapes: Mapping[str, Sequence[int]], info: Mapping[str, Any], threads: int, version: str
) -> dict[str, Any]:
    """Audit `path`.

    Args:
        path: an ONNX file, with external data where it has some.
        shapes: of inputs (``{"x": (1, 3, 224, 224)}``) or sizes of named dimensions (``{"sequence": (128,)}``).
        info: ``providers`` and ``graph_optimization_level``.
        threads: of the session.
        version: of onnxruntime.

    Returns:
        A JSON document: ``layers`` (`LayerAudit`), ``kernels`` (MACs by kernel, arithmetic and provider), ``declared``
        and ``executed`` (shares of all MACs), ``differ`` (names of layers), ``outputs`` (dB of each output against the
        graph as written), ``notes``; and what was audited on what.

    Raises:
        ArtifactError: not a readable ONNX file.
        ModelError: scales that nothing can divide by, or a graph that onnxruntime refuses as invalid.
        UnsupportedError: operators, domains, types, or versions that this onnxruntime does not have.
        DataError: shapes that are missing or do not fit.
        DeviceUnavailable: a provider is not here.
    """
    model = _read(path)
    renamed = named(model)
    if wrong := bad_scales(model):
        raise ModelError(
            message(
                f"{path}: {len(wrong)} quantizer(s) with scales that no runtime can divide by",
                expected="finite, positive, normal numbers",
                found="; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""),
                fix="quantize again; the tensor was NaN, infinite or constant zero when it was calibrated",
            )
        )
    feeds = _feeds(model, shapes)
    info = {**info, **({} if "s2d.precision" in metadata(model) else {"defaults": "theirs"})}
    source: Path | bytes = model.SerializeToString() if renamed else path
    weights = path.resolve().parent if renamed else None

    def run(settings: Mapping[str, Any]) -> Profile:
        try:
            return profiled(source, settings, threads, feeds, weights=weights)
        except ArtifactError as error:
            reason = " ".join(str(error.__cause__ or error).split())[:400]
            raise ModelError(
                message(
                    f"{path}: onnxruntime {version} refuses the model", found=reason, fix="check it with onnx.checker"
                )
            ) from error
        except S2DDeployError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no base class
            given = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise DataError(
                message(
                    f"{path}: onnxruntime cannot run the model on {given}",
                    found=" ".join(str(error).split())[:400],
                    fix="give shapes that the model takes: --shape NAME=1x3x224x224, or --shape DIMENSION=128",
                )
            ) from error

    optimized = run(info)
    notes: list[str] = []
    try:
        written: Profile | None = run({"graph_optimization_level": "disable", "defaults": "theirs"})
    except S2DDeployError as error:  # a kernel that only another provider, or a fusion, has
        written = None
        notes.append(f"the graph as written does not run on the CPU, so shapes are those of the kernels: {error}")
    layers = layers_of(model)
    rows = _rows(model, layers, written, optimized, _first_provider(info))
    return _document(path, model, info, threads, version, feeds, rows, written, optimized, notes)


def operand_shapes(
    path: Path, shapes: Mapping[str, Sequence[int]], threads: int
) -> tuple[dict[str, list[tuple[int, ...]]], dict[str, Array]]:
    """Shapes of every contraction's operands as the graph is written, by node name, and the inputs that gave them.

    Args:
        path: an ONNX file whose contractions have names.
        shapes: as in `audit_any`.
        threads: of the session.
    """
    feeds = _feeds(_read(path), shapes)
    found = profiled(path, {"graph_optimization_level": "disable"}, threads, feeds)
    return {name: [shape for _, shape in event.inputs[:2]] for name, event in found.events.items()}, feeds


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ArtifactError(message(f"{path}: no such file", fix="give the path of an ONNX file"))
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            message(
                f"{path}: not a readable ONNX file", found=f"{type(error).__name__}: {reason}", fix="export it again"
            )
        ) from error
    if not model.graph.node:
        raise ArtifactError(message(f"{path}: an ONNX file without nodes", fix="export it again"))
    missing = sorted(
        {
            entry.value
            for tensor in model.graph.initializer
            if tensor.data_location == TensorProto.EXTERNAL
            for entry in tensor.external_data
            if entry.key == "location" and not (path.parent / entry.value).is_file()
        }
    )
    if missing:
        raise ArtifactError(
            message(f"{path}: its weights are missing", expected=", ".join(missing), fix="put them beside the model")
        )
    for tensor in model.graph.initializer:  # scales and the like: their values are read
        if tensor.data_location == TensorProto.EXTERNAL and len(tensor.dims) < 2:
            onnx.external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
            tensor.data_location = TensorProto.DEFAULT
            del tensor.external_data[:]
    return model


def _feeds(model: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> dict[str, Array]:
    stored = initializers(model)
    inputs = [value for value in model.graph.input if value.name not in stored]
    dimensions = {d.dim_param for v in inputs for d in v.type.tensor_type.shape.dim if d.dim_param}
    known = {value.name for value in inputs} | dimensions
    if unknown := [name for name in shapes if name not in known]:
        raise DataError(
            message(
                f"--shape {', '.join(unknown)}: the model has no such input or dimension",
                expected=f"an input ({', '.join(v.name for v in inputs)})"
                + (f" or a dimension ({', '.join(sorted(dimensions))})" if dimensions else ""),
            )
        )
    generator = np.random.default_rng(0)
    return {value.name: _feed(value, shapes, generator) for value in inputs}


def _feed(value: onnx.ValueInfoProto, shapes: Mapping[str, Sequence[int]], generator: np.random.Generator) -> Array:
    if not value.type.HasField("tensor_type"):
        raise UnsupportedError(message(f"input {value.name!r} is no tensor", fix="audit a model that takes tensors"))
    kind = value.type.tensor_type
    size: list[int] = []
    for i, dim in enumerate(kind.shape.dim):
        if dim.dim_param in shapes and dim.dim_param:
            size.append(shapes[dim.dim_param][0])
        elif dim.HasField("dim_value") and dim.dim_value > 0:
            size.append(dim.dim_value)
        elif i == 0 or value.name in shapes:
            size.append(1)  # a batch of one
        else:
            what = f"dimension {i} ({dim.dim_param!r})" if dim.dim_param else f"dimension {i}"
            way = f"--shape {dim.dim_param}=128, or " if dim.dim_param else ""
            raise DataError(
                message(f"input {value.name!r}: {what} is open", fix=f"{way}--shape {value.name}=1x128 in full")
            )
    if value.name in shapes:
        given = list(shapes[value.name])
        fixed = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        fits = not kind.HasField("shape") or len(given) == len(fixed)
        if not fits or any(f not in (None, 0, g) for f, g in zip(fixed, given, strict=False)):
            shown = "x".join(d.dim_param or str(d.dim_value) for d in kind.shape.dim)
            raise DataError(
                message(f"--shape {value.name}", expected=shown or "a scalar", found="x".join(map(str, given)))
            )
        size = given
    try:
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type))
    except (KeyError, TypeError) as error:
        name = TensorProto.DataType.Name(kind.elem_type)
        raise UnsupportedError(message(f"input {value.name!r} is of type {name}, which cannot be fed")) from error
    if dtype.kind == "b":
        return np.ones(size, dtype)
    if dtype.kind in "iu":
        # Token, segment and position numbers: 0 is one of them in any vocabulary. A mask of ones hides nothing.
        return np.full(size, 1 if "mask" in value.name.lower() else 0, dtype)
    return generator.standard_normal(size).astype(dtype)


def _first_provider(info: Mapping[str, Any]) -> str:
    return asked_for(info)[0][0]


def _rows(
    model: onnx.ModelProto, layers: Sequence[Layer], written: Profile | None, optimized: Profile, wanted: str
) -> list[LayerAudit]:
    stored = initializers(model)
    graph = optimized.optimized.graph if optimized.optimized is not None else onnx.GraphProto()
    kernels = {n.name: n for n in graph.node if n.op_type in INTEGER_KERNELS | FLOAT_KERNELS}
    producers = {value: node for node in graph.node for value in node.output}
    followers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for value in node.input:
            followers.setdefault(value, []).append(node)
    # A provider that compiles whole subgraphs shows neither their layers nor their arithmetic.
    compiled = sorted({e.provider for e in optimized.events.values() if e.provider not in ("", CPU)})
    if optimized.optimized is not None or not compiled:
        compiled = []
    rows = []
    for layer in layers:
        node = layer.node
        kernel = find_kernel(node, kernels, producers, followers) or _fused_attention(node, producers, followers)
        event = optimized.events.get(kernel.name if kernel is not None else node.name)
        shape = written.events.get(node.name) if written is not None else None
        shape = shape or event
        macs = 0 if shape is None else macs_of(node, shape.inputs, shape.outputs, stored)
        executed = _arithmetic(kernel, event)
        provider = event.provider if event is not None else ""
        hidden = event is None and bool(compiled)
        if hidden:
            provider = compiled[0]
        rows.append(
            LayerAudit(
                layer.name,
                node.op_type,
                layer.declared,
                "compiled" if hidden else _kernel_name(kernel, event),
                executed,
                short_name(provider) if provider else "unseen",
                macs,
                None if event is None else event.microseconds,
                _hidden(layer, provider) if hidden else _difference(layer, kernel, executed, provider, wanted),
            )
        )
    return rows


def _kernel_name(kernel: onnx.NodeProto | None, event: Event | None) -> str:
    return str(kernel.op_type) if kernel is not None else event.kernel if event is not None else "unseen"


def _hidden(layer: Layer, provider: str) -> str:
    if layer.declared == "float":
        return ""
    return f"compiled by {short_name(provider)}, which does not say in which arithmetic it computes"


def _fused_attention(
    node: onnx.NodeProto, producers: Mapping[str, onnx.NodeProto], followers: Mapping[str, list[onnx.NodeProto]]
) -> onnx.NodeProto | None:
    """The attention kernel that a product went into: forward to the first value that such a kernel makes."""
    pending = [(value, 0) for value in node.output]
    seen: set[str] = set()
    while pending:
        value, depth = pending.pop(0)
        maker = producers.get(value)
        if maker is not None:
            if maker.op_type in ATTENTIONS:
                return maker
            continue
        if depth < _FORWARD and value not in seen:
            seen.add(value)
            pending += [(output, depth + 1) for user in followers.get(value, []) for output in user.output]
    return None


def _arithmetic(kernel: onnx.NodeProto | None, event: Event | None) -> str:
    name = kernel.op_type if kernel is not None else event.kernel if event is not None else ""
    if name in INTEGER_KERNELS:
        return "int8"
    if name == NBITS and kernel is not None and attributes(kernel).get("accuracy_level", 0) == INT8_LEVEL:
        return "int8"
    if event is None or not event.inputs or name not in FLOAT_KERNELS:
        return "unseen"
    return _TYPES.get(event.inputs[0][0], event.inputs[0][0])


def _difference(layer: Layer, kernel: onnx.NodeProto | None, executed: str, provider: str, wanted: str) -> str:
    name = kernel.op_type if kernel is not None else ""
    if executed == "unseen":
        return "what executes it cannot be seen" if layer.declared != "float" else ""
    if integer(layer.declared) and executed != "int8":
        if metadata(layer.node).get(PLACED) == "float":
            return f"declared {layer.declared}, kept in float by the placement search that it was built with"
        why = f"; {layer.problem}" if layer.problem else ""
        return f"declared {layer.declared}, computed in {executed} by {name} from dequantized values{why}"
    if layer.problem and executed == "int8":
        return f"{name} ignores the axis of its scales, so its output is wrong: {layer.problem}"
    if not integer(layer.declared) and executed == "int8":
        if layer.declared == "float":
            return f"declared float, computed in int8 by {name}"
        return (
            f"declared {layer.declared}, but {name} rounds activations to INT8; the session setting "
            "session.qdq_matmulnbits_accuracy_level=1 keeps them in float"
        )
    if wanted != CPU and provider == CPU:
        return f"fell back to the CPU from {short_name(wanted)}"
    return ""


def _document(
    path: Path,
    model: onnx.ModelProto,
    info: Mapping[str, Any],
    threads: int,
    version: str,
    feeds: Mapping[str, Array],
    rows: Sequence[LayerAudit],
    written: Profile | None,
    optimized: Profile,
    notes: list[str],
) -> dict[str, Any]:
    total = sum(row.macs for row in rows)
    groups: dict[tuple[str, str, str], list[LayerAudit]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.executed, row.provider), []).append(row)
    kernels = [
        {
            "kernel": kernel,
            "executed": executed,
            "provider": provider,
            "layers": len(members),
            "macs": (count := sum(r.macs for r in members)),
            "share": count / total if total else 0.0,
            "microseconds": sum(r.microseconds or 0 for r in members),
        }
        for (kernel, executed, provider), members in groups.items()
    ]
    outputs = {} if written is None else {n: _db(written.outputs[n], y) for n, y in optimized.outputs.items()}
    notes += [
        f"output {name!r} of the session lies {db:.0f} dB from the graph as written"
        for name, db in outputs.items()
        if db is not None and db < _WATCHED_DB
    ]
    if uncounted := sorted({n.op_type for n in model.graph.node} & set(UNCOUNTED)):
        notes.append(f"not counted: {', '.join(uncounted)}")
    if any(a.type == onnx.AttributeProto.GRAPH for n in model.graph.node for a in n.attribute):
        notes.append("not looked into: bodies of If, Loop and Scan")
    if unknown := [row.name for row in rows if not row.macs]:
        notes.append(f"multiply-accumulates unknown: {', '.join(unknown[:5])}")
    return {
        "model": str(path),
        "onnxruntime": version,
        "providers": [short_name(name) for name in optimized.providers],
        "graph_optimization_level": info.get("graph_optimization_level", "all"),
        "threads": threads,
        "shapes": {name: list(array.shape) for name, array in feeds.items()},
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "macs": total,
        "declared": _shares(rows, "declared", total),
        "executed": _shares(rows, "executed", total),
        "kernels": sorted(kernels, key=lambda k: -int(k["macs"])),
        "layers": [asdict(row) for row in rows],
        "differ": [row.name for row in rows if row.differs],
        "outputs": outputs,
        "notes": notes,
        "evidence": f"profile and optimized graph of onnxruntime {version}, fastest of three runs on random inputs",
    }


def _shares(rows: Sequence[LayerAudit], field: str, total: int) -> dict[str, float]:
    macs: dict[str, int] = {}
    for row in rows:
        macs[getattr(row, field)] = macs.get(getattr(row, field), 0) + row.macs
    return {name: count / total if total else 0.0 for name, count in macs.items()}


def _db(wanted: Array, found: Array) -> float | None:
    """Signal to noise, dB; None where nothing differs, or where the output is no float."""
    if wanted.dtype.kind != "f" or wanted.shape != found.shape:
        return None
    signal = wanted.astype(np.float64)
    noise = float(np.square(found.astype(np.float64) - signal).sum())
    power = float(np.square(signal).sum())
    return None if not noise or not power or not np.isfinite(noise) else float(10 * np.log10(power / noise))
