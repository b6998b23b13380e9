"""The reference runtime: the common ONNX file, with every quantized contraction computed on exact integers.

onnx's own ReferenceEvaluator (NumPy) runs the graph. A MatMul or Conv whose two operands are codes is replaced by a
node that reads the codes themselves and computes what `s2d_deploy.integer` defines: int32 accumulators, then one FP32
rescale. So the accumulators are exact; float operators (LayerNorm, softmax, GELU) are NumPy's and differ from other
runtimes by ULPs.

It needs nothing beyond the base install and no device, and is slow. Three of the evaluator's operators are replaced:
QuantizeLinear, because a value beyond int32 after the division would wrap to the wrong end of the grid before it is
clamped; Erf and Gelu, because they call Python once for each element.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import helper
from onnx.helper import tensor_dtype_to_np_dtype
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from scipy.special import erf

from s2d_deploy import __version__
from s2d_deploy.errors import ArtifactError, DataError, RecipeError, UnsupportedError, message
from s2d_deploy.feeds import Input, check_feeds
from s2d_deploy.graph_check import sound
from s2d_deploy.integer import (
    integer_conv2d,
    integer_matmul,
    integer_matmul_blocks,
    rescale,
    rescale_blocks,
)
from s2d_deploy.precision import parse_precision
from s2d_deploy.qgraph import Contraction, attributes, contractions, initializers, load_model, metadata
from s2d_deploy.session import (
    Array,
    Artifact,
    Audit,
    ExecutedOp,
    Feeds,
    Rung,
    as_codes,
    lowest_rung,
)

from ._onnx_cuts import ancestors, quantizer_model, until

DOMAIN = "s2d_deploy.reference"


class IntegerMatMul(OpRun):
    """MatMul of codes: inputs ``lhs, scale, zero point, rhs, scale, zero point``; ``block`` is 0 without blocks."""

    op_domain = DOMAIN

    def _run(self, lhs: Array, ls: Array, lz: Array, rhs: Array, rs: Array, rz: Array, block: int = 0) -> tuple[Array]:
        if block:
            return (rescale_blocks(integer_matmul_blocks(lhs, rhs, block, lz, rz), ls, rs),)
        return (rescale(integer_matmul(lhs, rhs, lz, rz), ls, rs),)


class IntegerConv(OpRun):
    """Conv of codes: inputs as `IntegerMatMul`, and an optional FP32 bias; attributes as `integer_conv2d` has them."""

    op_domain = DOMAIN

    def _run(
        self,
        lhs: Array,
        ls: Array,
        lz: Array,
        rhs: Array,
        rs: Array,
        rz: Array,
        bias: Array | None = None,
        stride: Sequence[int] = (1, 1),
        padding: Sequence[int] = (0, 0, 0, 0),
        dilation: Sequence[int] = (1, 1),
        groups: int = 1,
    ) -> tuple[Array]:
        sums = integer_conv2d(lhs, rhs, lz, rz, stride=stride, padding=padding, dilation=dilation, groups=groups)
        y = rescale(sums, ls, rs, axis=1)
        return (y if bias is None else y + bias.reshape(1, -1, 1, 1),)


class QuantizeLinear(OpRun):
    """As ONNX defines it; clamped before the cast to an integer, so that no value can wrap."""

    op_domain = ""

    def _run(
        self, x: Array, scale: Array, zero_point: Array, axis: int = 1, block_size: int = 0, **_: Any
    ) -> tuple[Array]:
        limits = ml_dtypes.iinfo(zero_point.dtype)  # type: ignore[no-untyped-call]
        offset = zero_point.astype(np.float32)
        if block_size:
            scale, offset = scale.repeat(block_size, axis), offset.repeat(block_size, axis)
        elif scale.ndim:
            shape = [1] * x.ndim
            shape[axis] = -1
            scale, offset = scale.reshape(shape), offset.reshape(shape)
        codes = np.clip(np.rint(x / scale) + offset, limits.min, limits.max)
        return (codes.astype(np.int32).astype(zero_point.dtype),)


class Erf(OpRun):
    """The error function, vectorized."""

    op_domain = ""

    def _run(self, x: Array) -> tuple[Array]:
        return (erf(x).astype(x.dtype, copy=False),)


class Gelu(OpRun):
    """``x * Phi(x)``, or its tanh approximation; as ONNX defines it, in the type of `x`."""

    op_domain = ""

    def _run(self, x: Array, approximate: str = "none") -> tuple[Array]:
        half, one = x.dtype.type(0.5), x.dtype.type(1)
        if approximate == "tanh":
            inner = x.dtype.type(np.sqrt(2 / np.pi)) * (x + x.dtype.type(0.044715) * x * x * x)
            return (half * x * (one + np.tanh(inner)),)
        return (half * x * (one + erf(x * x.dtype.type(np.sqrt(0.5)))),)


class ReferenceSession:
    """A loaded common ONNX file; see `s2d_deploy.session.Session`.

    Args:
        model: the common ONNX model.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._contractions = {c.name: c for c in contractions(model)}
        self._integer = {name: c for name, c in self._contractions.items() if _on_integers(c)}
        self._inputs = {i.name: _input(i.type.tensor_type) for i in model.graph.input}
        self._outputs = [o.name for o in model.graph.output]
        self._sites = _activation_sites(model)
        self._evaluator: ReferenceEvaluator | None = ReferenceEvaluator(
            _with_integer_nodes(model, self._integer), new_ops=[IntegerMatMul, IntegerConv, QuantizeLinear, Erf, Gelu]
        )

    def __enter__(self) -> ReferenceSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Outputs by name. Raises DataError for a wrong name, dtype, rank or dimension."""
        return self._evaluate(self._outputs, feeds)

    def codes(self, feeds: Feeds) -> dict[str, Array]:
        """Codes at every activation site, also under the names of sites that share a quantizer."""
        found = self._evaluate(sorted(set(self._sites.values())), feeds)
        return {site: as_codes(found[value]) for site, value in self._sites.items()}

    def accumulate(self, op: str, lhs: Array, rhs: Array | None = None) -> Array:
        """The int32 accumulators of `op` for given codes.

        Raises:
            UnsupportedError: unknown, float, or with per-block weights (one accumulator for each block, not one).
            DataError: codes of the wrong type, or a missing or surplus right operand.
        """
        contraction = self._contractions.get(op)
        known = [name for name, c in self._integer.items() if c.integer]
        if contraction is None or op not in known:
            raise UnsupportedError(
                message(
                    f"op {op!r} has no single integer accumulator in this artifact",
                    expected=f"one of {', '.join(known) or 'none'}",
                    found="no such op" if contraction is None else f"declared {contraction.declared}",
                )
            )
        left, right = contraction.left, contraction.right
        assert left is not None  # noqa: S101 - `integer` says so; for the type checker
        assert right is not None  # noqa: S101
        stored = right.stored
        if (rhs is None) == (stored is None):
            raise DataError(
                message(
                    f"op {op!r}: wrong operands",
                    expected="codes of both operands" if stored is None else "codes of the left operand only",
                    found="one" if rhs is None else "two",
                )
            )
        if stored is None:
            stored = rhs
        assert stored is not None  # noqa: S101
        for operand, codes in ((left, lhs), (right, stored)):
            if codes.dtype != operand.zero_point.dtype:
                raise DataError(
                    message(
                        f"site {operand.site!r}: wrong codes",
                        expected=operand.zero_point.dtype.name,
                        found=codes.dtype.name,
                    )
                )
        if contraction.node.op_type == "Conv":
            return integer_conv2d(lhs, stored, left.zero_point, right.zero_point, **_conv_arguments(contraction))
        if lhs.ndim < 2 or lhs.shape[-1] != stored.shape[-2]:
            raise DataError(
                message(
                    f"op {op!r}: wrong shapes",
                    expected=f"K = {stored.shape[-2]} on both sides",
                    found=f"{lhs.shape} by {stored.shape}",
                )
            )
        return integer_matmul(lhs, stored, left.zero_point, right.zero_point)

    def audit(self) -> Audit:
        """Every contraction; integer ones count as int8: 8-bit or narrower codes, exact, in wider units."""
        ops, rungs = [], []
        for c in self._contractions.values():
            integer = c.name in self._integer
            kernel = f"Integer{c.node.op_type}" if integer else c.node.op_type
            ops.append(ExecutedOp(c.name, kernel, "int8" if integer else "float32", c.macs, c.declared))
            rungs.append(_op_rung(c, integer))
        return Audit(
            tuple(ops),
            lowest_rung(rungs),
            evidence=f"the evaluated graph, onnx {onnx.__version__} ReferenceEvaluator with exact integer nodes",
        )

    def facts(self) -> dict[str, str]:
        """What the artifact says that it was made from."""
        return metadata(self._model)

    def quantize(self, site: str, sources: Sequence[str], x: Array) -> Array:
        """Codes that the artifact's own nodes make of `x`; see `s2d_deploy.probing.QuantizerProbe`."""
        model, _ = self.quantizer(site, sources)
        try:
            evaluator = ReferenceEvaluator(model, new_ops=[QuantizeLinear])
            codes: Any = evaluator.run(None, {model.graph.input[0].name: x})
            return as_codes(codes[0])
        except Exception as error:  # whatever the evaluator makes of nodes that take no plain list of values
            why = f"{type(error).__name__}: {error}"
            raise UnsupportedError(message(f"site {site!r}: its quantizer does not run alone", found=why)) from error

    def quantizer(self, site: str, sources: Sequence[str]) -> tuple[onnx.ModelProto, int]:
        """A site's quantizer as a model; its codes are not shifted. See `s2d_deploy.probing.LayerCut`."""
        if site not in self._sites:
            raise UnsupportedError(message(f"site {site!r} has no quantizer in this artifact"))
        return quantizer_model(self._model, site, self._sites[site], sources), 0

    def layer(self, op: str, value: str) -> tuple[onnx.ModelProto, dict[str, tuple[str, int]]]:
        """One op with its own scales: codes in, float out; see `s2d_deploy.probing.LayerCut`."""
        producers = {name: node for node in self._model.graph.node for name in node.output}
        if value not in producers:
            raise UnsupportedError(message(f"op {op!r}: this artifact has no value {value!r}"))
        stored = initializers(self._model)
        names = {codes: site for site, codes in reversed(self._sites.items())}
        behind = ancestors(producers, value, set(names))
        types = {name: stored[producers[name].input[2]].data_type for name in behind}
        inputs = [helper.make_tensor_value_info(name, types[name], None) for name in behind]
        return until(self._model, value, inputs), {name: (names[name], 0) for name in behind}

    def close(self) -> None:
        """Free the weights. A closed session refuses to run."""
        self._evaluator = None

    def _evaluate(self, names: list[str], feeds: Feeds) -> dict[str, Array]:
        if self._evaluator is None:
            raise ArtifactError(message("this session is closed", fix="open the artifact again"))
        check_feeds(feeds, self._inputs)
        with sound("the artifact's graph, which was loaded"):
            values = self._evaluator.run(names, dict(feeds))
        return dict(zip(names, values, strict=True))


class ReferenceRuntime:
    """See `s2d_deploy.session.Runtime`."""

    name = "reference"

    def available(self) -> str | None:
        """None: it comes with the base install."""
        return None

    def version(self) -> str:
        """This package's version, with those of onnx and NumPy, which compute the float operators."""
        return f"{__version__} (onnx {onnx.__version__}, NumPy {np.__version__})"

    def device(self) -> str:
        """Always the CPU."""
        return "cpu: NumPy, exact integers"

    def rung(self, precision: str) -> Rung | None:
        """Integers are exact but wide: emulated, W8A8 too."""
        if precision == "fp32":
            return "float"
        try:
            parsed = parse_precision(precision)
        except RecipeError:
            return None
        if parsed.format != "int":  # NVFP4: values on the grid, products in FP32; no exporter writes MXFP4
            return "dequantized" if parsed.format == "nvfp4" else None
        return "weight-only" if parsed.activations == 16 else "emulated"

    def open(self, artifact: Artifact, *, threads: int) -> ReferenceSession:  # noqa: ARG002 - NumPy's BLAS has its own setting
        """Load the artifact's common ONNX file.

        Raises:
            ArtifactError: missing, truncated, of another precision or not written by this package.
        """
        if "model" not in artifact.files:
            raise ArtifactError(
                message(
                    f"{artifact.folder}: not an artifact of the reference runtime",
                    expected="a file in the role 'model'",
                    found=f"target {artifact.target!r}, roles {', '.join(sorted(artifact.files)) or 'none'}",
                    fix="build it for the target 'reference'",
                )
            )
        path = artifact.path("model")
        model = load_model(path)
        found = metadata(model).get("s2d.precision")
        if found != artifact.precision:
            raise ArtifactError(
                message(
                    f"{path}: not the model that this artifact describes",
                    expected=f"s2d.precision {artifact.precision!r} in its metadata",
                    found=repr(found) if found else "none: the file is truncated or foreign",
                    fix="build the artifact again",
                )
            )
        try:
            return ReferenceSession(model)
        except (ArtifactError, UnsupportedError):
            raise
        except Exception as error:
            raise ArtifactError(
                message(
                    f"{path}: the graph cannot be loaded",
                    found=f"{type(error).__name__}: {error}",
                    fix="export it again",
                )
            ) from error


RUNTIME = ReferenceRuntime()


def _on_integers(c: Contraction) -> bool:
    """Whether both operands are codes, and the right one's blocks, if any, lie along K."""
    if c.left is None or c.right is None or c.left.axis is not None:
        return False
    return c.integer or (c.right.block is not None and c.right.axis == 0 and c.node.op_type == "MatMul")


def _op_rung(c: Contraction, integer: bool) -> Rung:
    if c.declared == "float":
        return "float"
    if integer:
        return "emulated"
    return "weight-only" if c.left is None and c.right is not None and c.right.stored is not None else "dequantized"


def _activation_sites(model: onnx.ModelProto) -> dict[str, str]:
    """Site name -> graph value of its codes."""
    sites: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            for site in metadata(node).get("s2d.site", node.name).split(","):
                sites[site] = node.output[0]
    return sites


def _with_integer_nodes(model: onnx.ModelProto, chosen: Mapping[str, Contraction]) -> onnx.ModelProto:
    """A copy of `model` whose chosen MatMul and Conv nodes read codes, without dequantizers that nobody reads."""
    producers = {output: node for node in model.graph.node for output in node.output}
    nodes = []
    for node in model.graph.node:
        c = chosen.get(metadata(node).get("s2d.op", node.name)) if node.op_type in ("MatMul", "Conv") else None
        if c is None:
            nodes.append(node)
            continue
        # Q/DQ carry the same three inputs (codes, scale, zero point), and the integer node reads them as they are.
        inputs = [name for operand in node.input[:2] for name in producers[operand].input]
        arguments = (
            {"block": c.right.block or 0} if c.right is not None and node.op_type == "MatMul" else _conv_arguments(c)
        )
        nodes.append(
            onnx.helper.make_node(
                f"Integer{node.op_type}",
                inputs + list(node.input[2:]),
                list(node.output),
                c.name,
                domain=DOMAIN,
                **arguments,
            )
        )
    read = {name for node in nodes for name in node.input} | {o.name for o in model.graph.output}
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(n for n in nodes if n.op_type != "DequantizeLinear" or n.output[0] in read)
    result.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return result


def _conv_arguments(c: Contraction) -> dict[str, Any]:
    """Attributes of a Conv node as arguments of `integer_conv2d`."""
    values = attributes(c.node)
    if values.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise UnsupportedError(message(f"op {c.name!r}: auto_pad is not supported", fix="export explicit pads"))
    return {
        "stride": list(values.get("strides", (1, 1))),
        "padding": list(values.get("pads", (0, 0, 0, 0))),
        "dilation": list(values.get("dilations", (1, 1))),
        "groups": int(values.get("group", 1)),
    }


def _input(declared: Any) -> Input:
    dims = tuple(d.dim_value or d.dim_param or None for d in declared.shape.dim)
    return Input(tensor_dtype_to_np_dtype(declared.elem_type).name, dims)
