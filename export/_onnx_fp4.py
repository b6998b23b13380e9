"""NVFP4 in the common ONNX file: E2M1 codes in blocks of 16, an E4M3 scale each, one FP32 scale for the tensor.

    x' = E2M1 code * (E4M3 block scale * tensor scale)

ONNX has the types since opset 23, and no operator that makes block scales at run time. So the file carries one as a
function of standard operators, `OPERATOR` in the domain `DOMAIN`: it computes bit for bit what `s2d_deploy.formats`
does, onnx's own evaluator runs it, and TensorRT's dialect puts TensorRT's operator in its place.

torch's exporter knows no FP4. It is given 4-bit integer quantizers as placeholders, and they are replaced in the graph
by what stands in the plan; nothing of the placeholders' numbers is left.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from s2d_deploy import formats
from s2d_deploy.errors import ModelError, message
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.grid import Grid
from s2d_deploy.plan import Plan, Site

DOMAIN, OPERATOR = "s2d", "NVFP4DynamicQuantize"
OPSET, IR_VERSION = 23, 11  # the first of each that hold FLOAT4E2M1 in QuantizeLinear
BLOCK = 16
NAME = "nvfp4"  # Grid.name


def used(plan: Plan) -> bool:
    """Whether any site of `plan` is on an NVFP4 grid."""
    return any(site.grid.name == NAME for site in plan.sites.values())


def put_placeholders(model: nn.Module) -> None:
    """Replace NVFP4 quantizers of a simulated model by 4-bit integer ones, which torch can export, in place."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, FakeQuantizer) and child.grid.name == NAME:
                setattr(module, name, _placeholder(child))


def _placeholder(quantizer: FakeQuantizer) -> FakeQuantizer:
    if not quantizer.grid.dynamic:
        return FakeQuantizer(Grid(4, granularity=quantizer.grid.granularity), quantizer.scale)
    # Unsigned: no integer plan has such inputs of a Linear, so torch cannot merge this with a real quantizer.
    return FakeQuantizer(Grid(4, signed=False), quantizer.tensor_scale)


def weight_nodes(
    graph: ir.Graph, site: Site, codes: npt.NDArray[Any], scale: npt.NDArray[Any], axis: int | None
) -> list[ir.Node]:
    """Two DequantizeLinear: of the E4M3 scales by the tensor's, and of the codes by what that gives.

    Args:
        graph: where the initializers go.
        site: of the weight.
        codes: E2M1 bit patterns in the layout of the graph, integers.
        scale: float32 block scales of that layout.
        axis: of the blocks.

    Returns:
        The two nodes in order; the last one's output is the weight.
    """
    of_tensor = _tensor_scale(site)
    values = formats.decode(torch.from_numpy(np.ascontiguousarray(codes)), site.grid).numpy()
    stored = formats.stored_scale(torch.from_numpy(np.ascontiguousarray(scale)), site.grid, of_tensor).numpy()
    name = site.name
    inputs = [
        _initializer(graph, f"{name}.codes", values.astype(ml_dtypes.float4_e2m1fn), ir.DataType.FLOAT4E2M1),
        _initializer(graph, f"{name}.block_scale", stored.astype(ml_dtypes.float8_e4m3fn), ir.DataType.FLOAT8E4M3FN),
        _initializer(graph, f"{name}.tensor_scale", of_tensor.numpy(), ir.DataType.FLOAT),
    ]
    scales = ir.node("DequantizeLinear", inputs[1:], name=f"{name}.block_scale.dequantize")
    return [
        scales,
        ir.node("DequantizeLinear", [inputs[0], scales.outputs[0]], {"axis": axis, "block_size": BLOCK}),
    ]


def activation_nodes(graph: ir.Graph, site: Site, x: ir.Value | None) -> list[ir.Node]:
    """Codes and block scales of `x`, and the two DequantizeLinear behind them; the last one's output is ``x'``."""
    name = site.name
    if x is None:
        raise ModelError(message(f"site {name!r}: a quantizer without input"))
    of_tensor = _initializer(graph, f"{name}.tensor_scale", _tensor_scale(site).numpy(), ir.DataType.FLOAT)
    quantize = ir.node(OPERATOR, [x, of_tensor], domain=DOMAIN, num_outputs=2)
    codes, scales = quantize.outputs
    effective = ir.node("DequantizeLinear", [scales, of_tensor], name=f"{name}.block_scale.dequantize")
    values = ir.node("DequantizeLinear", [codes, effective.outputs[0]], {"axis": -1, "block_size": BLOCK})
    values.outputs[0].type, values.outputs[0].shape = x.type, x.shape
    return [quantize, effective, values]


def declare(model: ir.Model) -> None:
    """Give the file the opset that holds FP4, and the function."""
    model.graph.opset_imports.update({"": OPSET, DOMAIN: 1})
    model.ir_version = max(model.ir_version or 0, IR_VERSION)
    function = ir.serde.deserialize_function(dynamic_quantize())
    model.functions[function.identifier()] = function


def dynamic_quantize() -> onnx.FunctionProto:
    """``(x [..., K], tensor scale) -> (codes FLOAT4E2M1 [..., K], scales FLOAT8E4M3FN [..., K / 16])``.

    ``scale = e4m3(clip(absmax / (6 * tensor scale), 2 ** -9, 448))``, 1 for a block of zeros: `formats.block_scale`.
    """

    def constant(name: str, value: npt.ArrayLike) -> onnx.NodeProto:
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value), name))

    body = [
        constant("last", np.array([-1], np.int64)),
        constant("block", np.array([-1, BLOCK], np.int64)),
        constant("largest", np.float32(formats.E2M1_MAX)),
        constant("lower", np.float32(2.0**-9)),
        constant("upper", np.float32(formats.E4M3_MAX)),
        constant("zero", np.float32(0)),
        constant("one", np.float32(1)),
        helper.make_node("Shape", ["x"], ["lead"], start=0, end=-1),
        helper.make_node("Concat", ["lead", "block"], ["split"], axis=0),
        helper.make_node("Reshape", ["x", "split"], ["blocks"]),
        helper.make_node("Abs", ["blocks"], ["magnitude"]),
        helper.make_node("ReduceMax", ["magnitude", "last"], ["absmax"], keepdims=0),
        helper.make_node("Mul", ["largest", "tensor_scale"], ["unit"]),
        helper.make_node("Div", ["absmax", "unit"], ["wanted"]),
        helper.make_node("Clip", ["wanted", "lower", "upper"], ["clipped"]),
        helper.make_node("Equal", ["absmax", "zero"], ["empty"]),
        helper.make_node("Where", ["empty", "one", "clipped"], ["kept"]),
        helper.make_node("Cast", ["kept"], ["scales"], to=TensorProto.FLOAT8E4M3FN),
        helper.make_node("DequantizeLinear", ["scales", "tensor_scale"], ["effective"]),
        helper.make_node(
            "QuantizeLinear",
            ["x", "effective"],
            ["codes"],
            axis=-1,
            block_size=BLOCK,
            output_dtype=TensorProto.FLOAT4E2M1,
        ),
    ]
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, OPERATOR, ["x", "tensor_scale"], ["codes", "scales"], body, imports)


def _tensor_scale(site: Site) -> torch.Tensor:
    if site.tensor_scale is None or not isinstance(getattr(site.grid.granularity, "size", None), int):
        raise ModelError(message(f"site {site.name!r}: an NVFP4 grid without its tensor scale", fix="calibrate again"))
    return site.tensor_scale


def _initializer(graph: ir.Graph, name: str, array: npt.NDArray[Any], dtype: ir.DataType) -> ir.Value:
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.Tensor(np.asarray(array, order="C"), dtype=dtype, name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


__all__ = [
    "DOMAIN",
    "IR_VERSION",
    "NAME",
    "OPERATOR",
    "OPSET",
    "activation_nodes",
    "declare",
    "dynamic_quantize",
    "put_placeholders",
    "used",
    "weight_nodes",
]
