"""Teacher-forced accumulators: one contraction of an artifact, cut out of its graph and fed with given codes.

The cut takes the op's kernel with the artifact's own stored weights and zero points, the Cast that unpacks them, and
the nodes that rearrange its bytes. ``MatMulIntegerToFloat`` multiplies its int32 accumulators by scales before it shows
them, so two models run on the same inputs:

- ``MatMulInteger``: the same integer matrix product of ONNX Runtime, shown as int32;
- the artifact's ``MatMulIntegerToFloat`` with both scales 1 and no bias: its accumulators, rounded to float32.

Where the second is not the first rounded to float32, the artifact's own kernel is believed and its value returned, so
that a comparison with the reference shows the difference. A float32 holds integers exactly up to 2**24 (16.8 million);
beyond that the second sees no difference that is smaller than its rounding. ``ConvInteger`` shows its int32 itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from s2d_deploy.errors import DataError, UnsupportedError, message
from s2d_deploy.qgraph import initializers, metadata
from s2d_deploy.session import Array

from ._onnx_cuts import ancestors, until
from ._ort_loading import CONTAINER, PART, SHIFT, STORAGE, session_of

_KERNELS = ("MatMulIntegerToFloat", "MatMulInteger", "ConvInteger")
_RAW, _RESULT, _ONE = "accumulators.raw", "accumulators", "one"


class ForcedOps:
    """The integer contractions of a dialect model, each as a model of its own (made when first asked for)."""

    def __init__(self, model: onnx.ModelProto, info: Mapping[str, Any], threads: int) -> None:
        self._model, self._info, self._threads = model, info, threads
        self._stored = initializers(model)
        self._producers = {value: node for node in model.graph.node for value in node.output}
        self._ops = {p["s2d.op"]: n for n in model.graph.node if "s2d.op" in (p := metadata(n))}
        self._cuts: dict[str, tuple[list[Any], list[onnx.NodeProto]]] = {}

    def accumulate(self, op: str, lhs: Array, rhs: Array | None) -> Array:
        """int32 accumulators of `op`; see `s2d_deploy.session.Session.accumulate`.

        Raises:
            UnsupportedError: no such op, or it does not run on integers.
            DataError: codes of the wrong type, shape or number.
        """
        kernel = self._kernel(op)
        sessions, sites = self._cut(op, kernel)
        given = [lhs] if rhs is None else [lhs, rhs]
        if len(given) != len(sites):
            raise DataError(
                message(
                    f"op {op!r}: wrong operands",
                    expected="codes of both operands" if len(sites) == 2 else "codes of the left operand only",
                    found=f"{len(given)} operand(s)",
                )
            )
        feeds = {site.output[0]: _shifted(site, codes) for site, codes in zip(sites, given, strict=True)}
        try:
            result, *fused = (np.asarray(session.run(None, feeds)[0]) for session in sessions)
        except Exception as error:  # onnxruntime's exceptions share no base class
            shapes = ", ".join(str(codes.shape) for codes in given)
            raise DataError(
                message(f"op {op!r}: codes of shape {shapes} do not fit", found=str(error)[:300])
            ) from error
        if fused and not np.array_equal(fused[0], result.astype(np.float32)):
            return fused[0].astype(np.int64).astype(np.int32)
        return result

    def layer(self, op: str, value: str) -> tuple[onnx.ModelProto, dict[str, tuple[str, int]]]:
        """From the bytes of the op's sites to the float `value` behind it; see `s2d_deploy.probing.LayerCut`.

        Raises:
            UnsupportedError: no such value, or it needs more than codes.
        """
        if value not in self._producers:
            raise UnsupportedError(message(f"op {op!r}: this artifact has no value {value!r}"))
        sites = {node.output[0]: node for node in self._model.graph.node if SHIFT in metadata(node)}
        behind = ancestors(self._producers, value, set(sites))
        inputs = [helper.make_tensor_value_info(name, _container(sites[name]), None) for name in behind]
        meaning = {n: (metadata(sites[n])["s2d.site"].split(",")[0], int(metadata(sites[n])[SHIFT])) for n in behind}
        return until(self._model, value, inputs), meaning

    def _kernel(self, op: str) -> onnx.NodeProto:
        node: onnx.NodeProto | None = self._ops.get(op)
        if node is None or node.op_type not in _KERNELS:
            known = [name for name, n in self._ops.items() if n.op_type in _KERNELS]
            raise UnsupportedError(
                message(
                    f"op {op!r} does not run on integers in this artifact",
                    expected=f"one of {', '.join(known) or 'none'}",
                    found="no such op"
                    if node is None
                    else f"{node.op_type}, declared {metadata(node).get('s2d.declared')}",
                )
            )
        return node

    def _cut(self, op: str, kernel: onnx.NodeProto) -> tuple[list[Any], list[onnx.NodeProto]]:
        """The sessions of one op (int32 accumulators, then the fused kernel's), and its sites' nodes: left first."""
        if op not in self._cuts:
            before: list[onnx.NodeProto] = []
            sites = [s for value in kernel.input[:2] if (s := self._ancestors(value, before)) is not None]
            models = [self._model_of(op, kernel, node, before, sites) for node in _arithmetic(kernel)]
            self._cuts[op] = [session_of(model, self._info, self._threads) for model in models], sites
        return self._cuts[op]

    def _model_of(
        self,
        op: str,
        kernel: onnx.NodeProto,
        arithmetic: onnx.NodeProto,
        before: list[onnx.NodeProto],
        sites: list[onnx.NodeProto],
    ) -> onnx.ModelProto:
        after = [n for n in self._model.graph.node if metadata(n).get(PART) == op and n not in before]
        nodes = [*reversed(before), arithmetic, *_moves(after, kernel.output[0])]
        used = {value for node in nodes for value in node.input}
        constants = [t for name, t in self._stored.items() if name in used]
        constants.append(numpy_helper.from_array(np.ones((), np.float32), _ONE))
        inputs = [helper.make_tensor_value_info(s.output[0], _container(s), None) for s in sites]
        kind = TensorProto.FLOAT if arithmetic.op_type == "MatMulIntegerToFloat" else TensorProto.INT32
        shown = [helper.make_tensor_value_info(_RESULT, kind, None)]
        graph = helper.make_graph(nodes, "accumulate", inputs, shown, constants)
        model = helper.make_model(graph, opset_imports=list(self._model.opset_import))
        model.ir_version = self._model.ir_version
        return model

    def _ancestors(self, value: str, nodes: list[onnx.NodeProto]) -> onnx.NodeProto | None:
        """Collect what lies behind `value`, last first, back to the site whose codes it is; None for a weight."""
        node: onnx.NodeProto | None = self._producers.get(value)
        if node is None:
            return None
        if SHIFT in metadata(node):
            return node
        nodes.append(node)
        return self._ancestors(node.input[0], nodes)


def _arithmetic(kernel: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The kernel as nodes that show its accumulators as `_RAW`."""
    if kernel.op_type != "MatMulIntegerToFloat":
        node = onnx.NodeProto()
        node.CopyFrom(kernel)
        node.output[0] = _RAW
        return [node]
    left, right, _, _, left_zero, right_zero = [*kernel.input, "", ""][:6]
    operands = [left, right, left_zero, right_zero]
    fused = [left, right, _ONE, _ONE, left_zero, right_zero]
    for names in (operands, fused):
        while not names[-1]:
            names.pop()
    return [
        helper.make_node("MatMulInteger", operands, [_RAW]),
        helper.make_node("MatMulIntegerToFloat", fused, [_RAW], domain=kernel.domain),
    ]


def _moves(after: list[onnx.NodeProto], value: str) -> list[onnx.NodeProto]:
    """The chain of rearranging nodes that follows the kernel's output `value`, from `_RAW` to `_RESULT`."""
    chain: list[onnx.NodeProto] = []
    current = _RAW
    while (node := next((n for n in after if n.input[0] == value), None)) is not None:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        value = node.output[0]
        copy.input[0], current = current, f"{_RAW}.{value}"
        copy.output[0] = current
        chain.append(copy)
    if not chain:
        return [helper.make_node("Identity", [current], [_RESULT])]
    chain[-1].output[0] = _RESULT
    return chain


def _container(site: onnx.NodeProto) -> int:
    """UINT8 or INT8: what the codes of a site are stored in."""
    return TensorProto.UINT8 if metadata(site)[CONTAINER] == "UINT8" else TensorProto.INT8


def _shifted(site: onnx.NodeProto, codes: Array) -> Array:
    """Codes of the plan as the bytes of the dialect.

    Raises:
        DataError: not the type that the site has in the plan.
    """
    props = metadata(site)
    expected = "uint8" if props[STORAGE].startswith("U") else "int8"
    if codes.dtype.name != expected:
        raise DataError(message(f"site {props['s2d.site']!r}: wrong codes", expected=expected, found=codes.dtype.name))
    dtype = np.uint8 if _container(site) == TensorProto.UINT8 else np.int8
    shifted: Array = (codes.astype(np.int16) + int(props[SHIFT])).astype(dtype)
    return shifted
