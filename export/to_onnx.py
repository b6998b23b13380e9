"""Torch + plan -> the common ONNX file that every target reads (docs/architecture.md, section 4).

The simulated model itself goes through `torch.onnx.export(dynamo=True)`; each fake quantizer becomes a
QuantizeLinear/DequantizeLinear pair. Then the graph is brought into the common form: weights become real
INT4/INT8 initializers, Gemm becomes MatMul + Add, transposes move in front of quantizers, equal
quantizers of one tensor become one, and contractions and sites get their plan names.

Run as a script: ``python -m s2d_deploy.export.to_onnx QUANTIZED_FOLDER OUT.onnx``, which writes an example beside it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import logging
import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx.reference import ReferenceEvaluator
from onnxscript import opset21 as op21
from torch import Tensor, nn

from s2d_deploy import __version__
from s2d_deploy.errors import ModelError, S2DDeployError, UnsupportedError, message
from s2d_deploy.fake_quant import quantize
from s2d_deploy.grid import Grid, PerAxis, PerToken
from s2d_deploy.large_models import infer_shapes, save_model
from s2d_deploy.plan import Plan, Site
from s2d_deploy.simulation import simulate

from . import _onnx_fp4

logger = logging.getLogger(__name__)

OPSET = 21
_STORAGE = {
    "INT4": (ir.DataType.INT4, ml_dtypes.int4),
    "UINT4": (ir.DataType.UINT4, ml_dtypes.uint4),
    "INT8": (ir.DataType.INT8, np.int8),
    "UINT8": (ir.DataType.UINT8, np.uint8),
}
_SCOPES = "pkg.torch.onnx.name_scopes"


class _Forward(nn.Module):
    """Fixes argument and output names: positional tensors in, a tuple of tensors out."""

    def __init__(self, model: nn.Module, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, tuple(inputs), tuple(outputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        if isinstance(result, Tensor):
            return (result,)
        return tuple(result[name] for name in self.outputs)


def export_onnx(
    model: nn.Module,
    plan: Plan,
    sample: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    *,
    dynamic: Mapping[str, Mapping[int, str]] | None = None,
) -> onnx.ModelProto:
    """Export `model` as `plan` quantizes it, and write the common ONNX file.

    Args:
        model: the float model; called as ``model(**sample)``.
        plan: its quantization; one without sites exports the float baseline.
        sample: one batch of at least two samples (a batch of one would fix the dimension).
        outputs: names of the outputs to keep (keys of the model's output; any one name for a plain tensor).
        path: where to write; weights beyond 2 GB go to ``<path>.data``.
        dynamic: further dynamic dimensions, ``{input: {dimension: name}}``; dimension 0 is always ``batch``.

    Returns:
        The model as written, checked by the ONNX checker with shape inference; its tensors, beyond 1 GB, are then in
        the file only.

    Raises:
        ModelError: torch cannot export the model; the message carries torch's own reason.
        UnsupportedError: sites on grids that are neither uniform integers nor NVFP4; every one is named.
    """
    _require_stored_types(plan)
    module = simulate(model, plan).eval()
    _onnx_fp4.put_placeholders(module)
    dims = _dynamic_shapes(sample, dynamic or {})
    program = _trace(_Forward(module, tuple(sample), outputs).eval(), sample, outputs, dims)
    graph_model = program.model
    _bring_into_common_form(graph_model, plan)
    graph_model.metadata_props.update(
        {
            "s2d.precision": plan.precision,
            "s2d.plan_sha256": plan.digest(),
            "s2d.version": __version__,
        }
    )
    proto = ir.serde.serialize_model(graph_model)
    _require_dynamic_batch(proto, sample)
    _count_unplanned(proto, sample)
    proto.producer_name, proto.producer_version = "s2d-deploy", __version__
    inferred = infer_shapes(proto)
    path.parent.mkdir(parents=True, exist_ok=True)
    if save_model(inferred, path) is None:
        onnx.checker.check_model(inferred, full_check=False)
    else:
        onnx.checker.check_model(str(path), full_check=False)  # too large for memory; by its path it may be any size
    return inferred


def _require_stored_types(plan: Plan) -> None:
    """The common file holds Q/DQ on INT4 to UINT8 codes and on NVFP4; no grid is replaced by its nearest."""
    other: dict[str, list[str]] = {}
    for site in plan.sites.values():
        if not site.grid.integer and site.grid.name != _onnx_fp4.NAME:
            other.setdefault(site.grid.name, []).append(site.name)
    if other:
        found = "; ".join(
            f"{name}: {', '.join(sites[:4])}{f' and {len(sites) - 4} more' if len(sites) > 4 else ''}"
            for name, sites in other.items()
        )
        raise UnsupportedError(
            message(
                "the common ONNX file holds uniform integer codes and NVFP4 only",
                expected="int, uint and nvfp4 grids",
                found=found,
                fix="simulate only, or use a wN aM precision and `softmax: uniform` (ptq4vit: `twin: false`)",
            )
        )


def _require_dynamic_batch(proto: onnx.ModelProto, sample: Mapping[str, Tensor]) -> None:
    """torch may fix a dimension that it was told to leave open, where the model's Python code reads its size."""
    fixed = [i.name for i in proto.graph.input if i.type.tensor_type.shape.dim[0].HasField("dim_value")]
    if fixed:
        raise ModelError(
            message(
                f"the model fixes the batch size of {', '.join(fixed)}",
                expected="a batch dimension that stays open",
                found=f"{next(iter(sample.values())).shape[0]}, the batch size of the sample",
                fix="make its forward pass free of Python code that depends on the batch size or on values",
            )
        )


def _count_unplanned(proto: onnx.ModelProto, sample: Mapping[str, Tensor]) -> None:
    """Write ``s2d.macs`` of contractions that are in no plan (inside modules that call no Linear), for one sample."""
    missing = [n for n in proto.graph.node if n.op_type in ("MatMul", "Conv") and _macs(n) is None]
    if not missing:
        return
    # Shapes are read off a run: shape inference gives up behind an Expand or a Reshape by computed sizes.
    wanted = sorted({name for n in missing for name in (*n.input[:2], n.output[0])})
    feeds = {name: tensor[:1].detach().cpu().numpy() for name, tensor in sample.items()}
    found = ReferenceEvaluator(proto).run(wanted, feeds)
    shapes = {name: np.shape(value) for name, value in zip(wanted, found, strict=True)}
    for node in missing:
        # Conv: all but the first dimension of the weight (O, I / groups, kh, kw). MatMul: the left operand's last.
        inner = shapes[node.input[1]][1:] if node.op_type == "Conv" else shapes[node.input[0]][-1:]
        node.metadata_props.add(key="s2d.macs", value=str(math.prod(shapes[node.output[0]]) * math.prod(inner)))


def _macs(node: onnx.NodeProto) -> str | None:
    return next((p.value for p in node.metadata_props if p.key == "s2d.macs"), None)


def _dynamic_shapes(sample: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]]) -> tuple[Any, ...]:
    dims: dict[str, Any] = {"batch": torch.export.Dim("batch")}
    for axes in dynamic.values():
        dims.update({name: torch.export.Dim(name) for name in axes.values() if name not in dims})
    return (tuple({0: dims["batch"]} | {a: dims[n] for a, n in dynamic.get(name, {}).items()} for name in sample),)


def _trace(module: nn.Module, sample: Mapping[str, Tensor], outputs: Sequence[str], dims: tuple[Any, ...]) -> Any:
    table = {
        torch.ops.s2d_deploy.fake_quantize.default: _pair,
        torch.ops.s2d_deploy.fake_quantize_token.default: _token_pair,
    }
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)  # it warns of a missing torchvision, which nothing here needs
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore", FutureWarning)  # of torch's own tree specs
            warnings.filterwarnings("ignore", message=r"# The axis name", category=UserWarning)  # two inputs, one batch
            return torch.onnx.export(
                module,
                tuple(sample.values()),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(sample),
                output_names=list(outputs),
                dynamic_shapes=dims,
                custom_translation_table=cast(Any, table),
                verbose=False,
            )
    except Exception as error:
        raise ModelError(
            message(
                "torch cannot export this model to ONNX",
                found=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error}",
                fix="make the forward pass free of data-dependent control flow, or export a smaller part",
            )
        ) from error
    finally:
        registration.setLevel(level)


def _pair(  # type: ignore[no-untyped-def]
    x, scale, zero_point, bits: int, signed: bool, narrow: bool, axis: int | None = None, block: int | None = None
):
    """One static quantizer as Q/DQ. The zero point is always written: some runtimes need it to pick the type."""
    grid = Grid(bits, signed=signed, narrow=narrow)
    container = _STORAGE[grid.storage][0]
    attributes = {} if axis is None else {"axis": axis} if block is None else {"axis": axis, "block_size": block}
    typed = op21.Cast(zero_point, to=container.value)
    if axis is None and _wider_container(grid):  # an axis: see `_clip_channels`
        offset = op21.Cast(zero_point, to=ir.DataType.FLOAT.value)
        lower = op21.Mul(op21.Sub(op21.Constant(value_float=float(grid.qmin)), offset), scale)
        upper = op21.Mul(op21.Sub(op21.Constant(value_float=float(grid.qmax)), offset), scale)
        x = op21.Clip(x, lower, upper)
    codes = op21.QuantizeLinear(x, scale, typed, **attributes)
    return op21.DequantizeLinear(codes, scale, typed, **attributes)


def _wider_container(grid: Grid) -> bool:
    """Whether codes beyond the grid's fit into the ONNX type that holds it."""
    return grid.bits not in (4, 8) or grid.narrow


def _token_pair(x, bits: int):  # type: ignore[no-untyped-def]
    """One per-token quantizer: a run-time scale for each vector along the last axis."""
    grid = Grid(bits, granularity=PerToken())
    container = _STORAGE[grid.storage][0]
    absmax = op21.ReduceMax(op21.Abs(x), op21.Constant(value_ints=[-1]), keepdims=1)
    one = op21.Constant(value_float=1.0)
    zero = op21.Constant(value_float=0.0)
    scale = op21.Where(op21.Greater(absmax, zero), op21.Div(absmax, op21.Constant(value_float=float(grid.qmax))), one)
    # The whole token is one block, so the scale is spread over it: ONNX wants a static block size, a Div does not.
    codes = op21.QuantizeLinear(op21.Div(x, scale), one, op21.Cast(op21.Constant(value_int=0), to=container.value))
    return op21.Mul(op21.DequantizeLinear(codes, one, op21.Cast(op21.Constant(value_int=0), to=container.value)), scale)


def _bring_into_common_form(model: ir.Model, plan: Plan) -> None:
    graph = model.graph
    _split_gemm(graph)
    _store_weight_codes(graph, plan)
    _clip_channels(graph, plan)
    _type_zero_points(graph)
    _share_equal_quantizers(graph)
    if _onnx_fp4.used(plan):
        _quantize_to_fp4(graph, plan)
        _onnx_fp4.declare(model)
    _drop_unused(graph)
    _name(graph, plan)
    graph.sort()


def _scopes(node: ir.Node) -> list[str]:
    """Torch module paths that `node` lies in, outermost first."""
    text = node.metadata_props.get(_SCOPES, "[]")
    return [s.removeprefix("model.") for s in ast.literal_eval(text)[:-1] if s not in ("", "model")]


def _constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    if value is None or value.const_value is None:
        return None
    return cast("np.ndarray[Any, Any]", value.const_value.numpy())


def _initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any], dtype: ir.DataType) -> ir.Value:
    tensor = ir.Tensor(array, dtype=dtype, name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def _like(
    node: ir.Node, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any] | None = None
) -> ir.Node:
    new = ir.node(op_type, inputs, attributes or {})
    new.metadata_props.update(node.metadata_props)
    return new


def _split_gemm(graph: ir.Graph) -> None:
    """Gemm(A, W, bias) with transB -> MatMul(A, Transpose(W)) + Add: one form of Linear for every reader."""
    for node in list(graph):
        if node.op_type != "Gemm":
            continue
        transposed = bool(node.attributes.get_int("transB", 0))
        weight = node.inputs[1]
        before: list[ir.Node] = []
        if transposed:
            transpose = _like(node, "Transpose", [weight], {"perm": [1, 0]})
            before.append(transpose)
            weight = transpose.outputs[0]
        product = _like(node, "MatMul", [node.inputs[0], weight])
        before.append(product)
        last = product
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            last = _like(node, "Add", [product.outputs[0], node.inputs[2]])
            before.append(last)
        last.outputs[0].shape, last.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        _replace(graph, node, before, last.outputs[0])


def _replace(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node], value: ir.Value) -> None:
    name = old.outputs[0].name
    graph.insert_before(old, list(new))
    ir.convenience.replace_all_uses_with(old.outputs[0], value, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    value.name = name


def _owner(node: ir.Node) -> str:
    """The fake quantizer's module path: ``<op>.weight_quantizer``, ``<attention>.query_quantizer``, ..."""
    scopes = _scopes(node)
    return scopes[-1] if scopes else ""


def _store_weight_codes(graph: ir.Graph, plan: Plan) -> None:
    """Fold Q(weight) into an initializer of codes, and a following Transpose into its layout."""
    for node in list(graph):
        if node.op_type != "DequantizeLinear" or not _owner(node).endswith(".weight_quantizer"):
            continue
        site = plan.sites[_owner(node).removesuffix("_quantizer")]
        weight = _weight_behind(node)
        codes = quantize(torch.from_numpy(weight), site.scale, site.zero_point, site.grid).numpy()
        scale, zero_point = site.scale.numpy(), site.zero_point.numpy()
        axis = getattr(site.grid.granularity, "axis", None)
        consumers = list(node.outputs[0].consumers())
        target = node
        if codes.ndim == 2 and all(c.op_type == "Transpose" for c in consumers):
            codes, scale, zero_point = codes.T, scale.T, zero_point.T
            axis = None if axis is None else 1 - (axis % 2)
            target = consumers[0]
        if site.grid.name == _onnx_fp4.NAME:
            made = _onnx_fp4.weight_nodes(graph, site, codes, scale, axis)
            made[-1].metadata_props.update(node.metadata_props)
        else:
            made = [_dequantize_codes(graph, node, site, codes, scale, zero_point, axis)]
        dequantize = made[-1]
        _replace(graph, target, made, dequantize.outputs[0])
        for extra in consumers[1:] if target is not node else []:
            ir.convenience.replace_all_uses_with(extra.outputs[0], dequantize.outputs[0])
            graph.remove(extra, safe=True)


def _quantize_to_fp4(graph: ir.Graph, plan: Plan) -> None:
    """NVFP4 activations in the place of the placeholders that torch exported."""
    for node in list(graph):
        site = plan.sites.get(_owner(node).removesuffix("_quantizer")) if node.op_type == "QuantizeLinear" else None
        if site is None or site.grid.name != _onnx_fp4.NAME:
            continue
        for reader in [c for c in node.outputs[0].consumers() if c.op_type == "DequantizeLinear"]:
            made = _onnx_fp4.activation_nodes(graph, site, node.inputs[0])
            _replace(graph, reader, made, made[-1].outputs[0])


def _weight_behind(dequantize: ir.Node) -> np.ndarray[Any, Any]:
    quantizer = dequantize.inputs[0].producer() if dequantize.inputs[0] else None
    weight = _constant(quantizer.inputs[0]) if quantizer is not None else None
    if weight is None:
        raise ModelError(message(f"{_owner(dequantize)}: the quantized weight is not a stored tensor"))
    return np.ascontiguousarray(weight, dtype=np.float32)


def _dequantize_codes(
    graph: ir.Graph,
    like: ir.Node,
    site: Site,
    codes: np.ndarray[Any, Any],
    scale: np.ndarray[Any, Any],
    zero_point: np.ndarray[Any, Any],
    axis: int | None,
) -> ir.Node:
    container, dtype = _STORAGE[site.grid.storage]
    attributes = {} if axis is None else {"axis": axis}
    size = getattr(site.grid.granularity, "size", None)
    if size is not None:
        attributes["block_size"] = size
    # Not np.ascontiguousarray, which would give a scale of the whole tensor an axis.
    inputs = [
        _initializer(graph, f"{site.name}.codes", np.asarray(codes, order="C").astype(dtype), container),
        _initializer(graph, f"{site.name}.scale", np.asarray(scale, order="C"), ir.DataType.FLOAT),
        _initializer(graph, f"{site.name}.zero_point", np.asarray(zero_point, order="C").astype(dtype), container),
    ]
    return _like(like, "DequantizeLinear", inputs, attributes)


def _clip_channels(graph: ir.Graph, plan: Plan) -> None:
    """Keep activations with a scale for each channel on a grid that is narrower than its container.

    Clip takes scalar bounds only, so it is a Min and a Max with a bound for each channel. (Weights have none of this:
    their codes are stored.)
    """
    for node in list(graph):
        site = plan.sites.get(_owner(node).removesuffix("_quantizer")) if node.op_type == "QuantizeLinear" else None
        if site is None or not isinstance(site.grid.granularity, PerAxis) or not _wider_container(site.grid):
            continue
        x = node.inputs[0]
        if x is None or x.shape is None:
            raise ModelError(message(f"site {site.name!r}: torch does not say how many dimensions it has"))
        spread = [1] * len(x.shape)
        spread[site.grid.granularity.axis % len(spread)] = -1
        for op_type, code in (("Min", site.grid.qmax), ("Max", site.grid.qmin)):
            bound = ((code - site.zero_point) * site.scale).numpy().astype(np.float32).reshape(spread)
            limit = _initializer(graph, f"{site.name}.{op_type.lower()}", bound, ir.DataType.FLOAT)
            clipped = _like(node, op_type, [x, limit])
            graph.insert_before(node, clipped)
            x = clipped.outputs[0]
        node.replace_input_with(0, x)


def _type_zero_points(graph: ir.Graph) -> None:
    """Fold Cast(int32 zero point) and the Clip bounds of odd widths into typed initializers."""
    for node in list(graph):
        if node.op_type == "Cast":
            array = _constant(node.inputs[0])
            if array is None or array.dtype not in (np.int32, np.int64):
                continue
            to = ir.DataType(node.attributes.get_int("to"))
            folded = array.astype(to.numpy())
            value = _initializer(graph, f"{node.outputs[0].name}.typed", folded, to)
            ir.convenience.replace_all_uses_with(node.outputs[0], value)
            graph.remove(node, safe=True)


def _share_equal_quantizers(graph: ir.Graph) -> None:
    """One pair for equal quantizers of one tensor (q, k and v projections read the same LayerNorm)."""
    seen: dict[tuple[object, ...], tuple[ir.Node, ir.Node]] = {}
    for node in list(graph):
        if node.op_type != "QuantizeLinear":
            continue
        users = [c for c in node.outputs[0].consumers() if c.op_type == "DequantizeLinear"]
        if len(users) != 1:
            continue
        key = (node.inputs[0], _key(node.inputs[1]), _key(node.inputs[2]))
        if key not in seen:
            seen[key] = (node, users[0])
            continue
        ir.convenience.replace_all_uses_with(users[0].outputs[0], seen[key][1].outputs[0])
        graph.remove([users[0], node], safe=True)


def _key(value: ir.Value | None) -> object:
    array = _constant(value)
    return value if array is None else (array.tobytes(), str(array.dtype), array.shape)


def _name(graph: ir.Graph, plan: Plan) -> None:
    """Plan names for contractions and quantizers; unique names for everything else."""
    unplanned: dict[str, int] = {}
    for node in graph:
        if node.op_type in ("MatMul", "Conv"):
            name = _op_name(node)
            if name not in plan.ops:  # one module's code may hold several, and each is counted
                owner = _owner(node) or "graph"
                unplanned[owner] = unplanned.get(owner, 0) + 1
                name = f"{owner}.{node.op_type}.{unplanned[owner]}"
            node.name = name
            node.metadata_props["s2d.op"] = name
            if name in plan.ops:
                node.metadata_props["s2d.macs"] = str(plan.ops[name].macs)
            node.metadata_props["s2d.declared"] = plan.declared(name) if name in plan.ops else "float"
    _name_sites(graph, plan)
    names: set[str] = set()
    for i, node in enumerate(graph):
        name = node.name or f"{_owner(node) or 'graph'}.{node.op_type}"
        node.name = name if name not in names else f"{name}.{i}"
        names.add(node.name)
        # The exporter's stack traces carry paths of the exporting machine, and its scopes outweigh small weights.
        for key in [k for k in node.metadata_props if not k.startswith("s2d.")]:
            del node.metadata_props[key]
    for value in list(graph.initializers.values()):
        name = (value.name or "").removeprefix("model.").replace("_quantizer.", ".")
        if name not in graph.initializers:
            value.name = name


def _name_sites(graph: ir.Graph, plan: Plan) -> None:
    """Sites are found from the contractions that read them: equal quantizers may long have been merged by torch."""
    sites: dict[ir.Node, list[str]] = {}
    for node in graph:
        op = plan.ops.get(node.metadata_props.get("s2d.op", ""))
        for (site, _), value in zip(op.sites, node.inputs, strict=False) if op is not None else ():
            pair = _pair_behind(value) if site in plan.sites else []
            for part in pair:
                sites.setdefault(part, []).append(site)
    for node, names in sites.items():
        node.metadata_props["s2d.site"] = ",".join(names)
        node.name = f"{names[0]}.{'dequantize' if node.op_type == 'DequantizeLinear' else 'quantize'}"
    # An op that none of the exported outputs needs is not in the graph, and its sites with it.
    present = {node.metadata_props.get("s2d.op") for node in graph}
    lost = {s.name for s in plan.sites.values() if s.op in present}.difference(*sites.values())
    if lost:
        raise ModelError(
            message(
                f"{len(lost)} quantized site(s) do not reach their layer in the exported graph",
                found=", ".join(sorted(lost)),
                fix="name their layers in quantize.skip",
            )
        )


def _pair_behind(value: ir.Value | None) -> list[ir.Node]:
    """The DequantizeLinear that makes `value`, and its QuantizeLinear where the codes are not stored."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Mul":  # a per-token scale
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear":
        return []
    quantizer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return [node] if quantizer is None else [node, quantizer]


def _op_name(node: ir.Node) -> str:
    """A Linear or Conv is named by its module; attention's products by which of them comes first."""
    owner = _owner(node)
    if node.op_type == "Conv" or node.inputs[1] is None:
        return owner
    if _is_stored(node.inputs[1]):
        return owner
    return f"{owner}.context" if _reads_softmax(node.inputs[0]) else f"{owner}.scores"


def _is_stored(value: ir.Value) -> bool:
    """Whether `value` is a weight: an initializer, possibly behind dequantization or a transpose."""
    while value.const_value is None:
        producer = value.producer()
        if producer is None or producer.op_type not in ("DequantizeLinear", "Transpose", "QuantizeLinear"):
            return False
        following = producer.inputs[0]
        if following is None:
            return False
        value = following
    return True


def _reads_softmax(value: ir.Value | None) -> bool:
    for _ in range(8):
        producer = value.producer() if value is not None else None
        if producer is None:
            return False
        if producer.op_type == "Softmax":
            return True
        value = producer.inputs[0]
    return False


def _drop_unused(graph: ir.Graph) -> None:
    for node in reversed(list(graph)):
        if not any(out.consumers() or out.is_graph_output() for out in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.consumers() and not value.is_graph_output():
            del graph.initializers[name]


def export_checkpoint(folder: Path, path: Path, model: str | None = None) -> onnx.ModelProto:
    """The common ONNX file of a quantized checkpoint (``<run>/quantize/<precision>``).

    Args:
        folder: what ``s2d-deploy quantize`` left.
        path: where to write.
        model: of a folder outside its run: a ``save_pretrained`` folder or hub id.

    Raises:
        ArtifactError, DataError, RecipeError, ModelError: as `load_quantized`; else as `export_onnx`.
    """
    from s2d_deploy.quantized_checkpoint import load_quantized

    found = load_quantized(folder, model)
    return export_onnx(found.module, found.plan, found.sample, [found.output], path, dynamic=found.dynamic)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: a quantized checkpoint becomes the common ONNX file, with an example that computes it."""
    parser = argparse.ArgumentParser(
        prog="python -m s2d_deploy.export.to_onnx",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Export a quantized checkpoint (<run>/quantize/<precision>, written by s2d-deploy quantize) to the common\n"
            "ONNX file: opset 21, INT4/INT8 Q/DQ, open batch. <OUT>.example.py beside it computes it with onnx alone."
        ),
        epilog="example: python -m s2d_deploy.export.to_onnx runs/mine/quantize/w4a4 model.onnx",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="folder of the quantized checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT.onnx", help="where to write")
    parser.add_argument("--model", help="of a checkpoint outside its run folder: a folder or hub id")
    arguments = parser.parse_args(argv)
    try:
        proto = export_checkpoint(arguments.checkpoint, arguments.out, arguments.model)
    except S2DDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    from ._standalone import write_example

    example = write_example(arguments.out.with_suffix(".example.py"), proto, file=arguments.out.name)
    print(f"{arguments.out}: {arguments.out.stat().st_size:,} bytes")
    print(f"{example}: computes it with onnx and NumPy alone")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
