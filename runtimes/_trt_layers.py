"""The layer list of a TensorRT engine -> an Audit: which types each contraction's operands have in the compiled engine.

TensorRT writes the list as text, one layer to a line, twice: the builder prints it while it compiles (profiling
verbosity DETAILED, log severity VERBOSE), which needs no GPU; the engine inspector returns it from a loaded engine,
which does. Both are read here::

    Name: fc1_myl0_17, LayerType: gemm, Inputs: [ { Name: ..., Dimensions: [-1,64], ..., Datatype: Int8, ... }],
    Constants: [ ... ], Outputs: [ ... ], TacticName: ..., StreamId: 0, Metadata: [ONNX Layer: fc1][ONNX Layer: ...]

What the list shows: fusions, and the type of every tensor that enters or leaves a layer. What it does not show: the
inside of a fused kernel, and which kernel TensorRT-RTX's just-in-time compiler picks on the device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from s2d_deploy.session import Audit, ExecutedOp, Rung, lowest_rung

_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), TacticName: (?P<tactic>.*?),(?: StreamId: \d+,)? Metadata: ?(?P<metadata>.*)$"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>[^,]*), Dimensions: \[(?P<dimensions>[^\]]*)\].*?Datatype: (?P<type>\w+)")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PRODUCT = re.compile(r"mha|gemm|Fc|Conv")  # in the names of generated kernels that hold a product
_HELPERS = ("kgen", "runtime_fusion", "shape_call", "signal", "wait", "Reformat")
_PRECISION = {
    "Int8": "int8",
    "Int4": "int4",
    "Float": "float32",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "FP8": "fp8",
    "FP4E2M1": "nvfp4",
}
_LOW_BIT = ("Int4", "Int8", "FP4E2M1")
_FP4 = "FP4E2M1"
UNSEEN = "unseen"  # an op that the list does not show; counts as not executed on integers


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that enters or leaves a layer: its dimensions (-1 where dynamic) and TensorRT's name of its type."""

    dimensions: tuple[int, ...]
    type: str

    @property
    def matrix(self) -> bool:
        """Whether it can be an operand of a product: at least two dimensions beyond 1."""
        return sum(d != 1 for d in self.dimensions) >= 2


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the compiled engine, with the ONNX nodes that went into it."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    tactic: str
    nodes: frozenset[str]


def parse_layers(text: str) -> list[Layer]:
    """Layers of TensorRT's list; lines that are no layer are passed over."""
    return [
        Layer(
            match["name"],
            match["kind"],
            _tensors(match["inputs"]),
            _tensors(match["constants"]),
            match["tactic"],
            frozenset(_ONNX.findall(match["metadata"])),
        )
        for line in text.splitlines()
        if (match := _LAYER.match(line.strip()))
    ]


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(tuple(int(d) for d in m["dimensions"].split(",") if d.strip()), m["type"])
        for m in _TENSOR.finditer(text)
    )


def audit_layers(layers: Sequence[Layer], ops: Sequence[Mapping[str, Any]], evidence: str) -> Audit:
    """What the engine executes for each contraction.

    Args:
        layers: the engine's layer list.
        ops: contractions of the dialect: ``name``, ``macs``, ``declared``, ``weight`` (its DequantizeLinear, or "").
        evidence: where the list was read.

    Returns:
        One ExecutedOp each; precision `UNSEEN` where no layer of the list computes it.
    """
    executed, rungs, notes = [], list[Rung](), set[str]()
    for op in ops:
        layer = _computing(layers, op["name"])
        precision = UNSEEN if layer is None else _precision(layer)
        kernel = "" if layer is None else layer.kind if layer.tactic in ("", "__myelin_CASK_STUB") else layer.tactic
        executed.append(ExecutedOp(op["name"], kernel, precision, int(op["macs"]), op["declared"]))
        if op["declared"] != "float":
            rungs.append(_rung(layers, op, precision))
        if layer is None:
            notes.add(f"{op['name']}: no layer of the engine's list computes it")
        elif layer.kind == "kgen" and "mha" in layer.name:
            notes.add("attention is one fused kernel: the types of its inputs are seen, its inner product is not")
    if any(c.type == "Int4" for layer in layers for c in layer.constants):
        notes.add("4-bit weights lie packed in the engine; it widens them in front of the product")
    return Audit(tuple(executed), lowest_rung(rungs), evidence, tuple(sorted(notes)))


def low_bit_bytes(layers: Sequence[Layer]) -> int:
    """Bytes of the low-bit constants that the engine's list shows: packed 4-bit codes count half a byte.

    FP8 constants are NVFP4's block scales, with the padding that the kernel's layout has.
    """
    bits = {"Int4": 4, "Int8": 8, _FP4: 4, "FP8": 8}
    total = 0
    for layer in layers:
        for constant in layer.constants:
            count = 1
            for dimension in constant.dimensions:
                count *= dimension
            total += count * bits.get(constant.type, 0)
    return total // 8


def _computing(layers: Sequence[Layer], name: str) -> Layer | None:
    """The layer that computes the contraction `name`, whose node is listed with pads and epilogues too."""
    candidates = [layer for layer in layers if name in layer.nodes]
    products = [
        la for la in candidates if la.kind not in _HELPERS and sum(t.matrix for t in la.inputs + la.constants) >= 2
    ]
    fused = [la for la in candidates if la.kind == "runtime_fusion"]
    generated = [la for la in candidates if la.kind == "kgen" and _PRODUCT.search(la.name)]
    return next(iter([*products, *fused, *generated]), None)


def _precision(layer: Layer) -> str:
    """Integers, or FP4, when both operands are; otherwise the float type that takes part."""
    operands = [t for t in layer.inputs + layer.constants if t.matrix]
    fp4 = [t for t in operands if t.type == _FP4]
    if len(fp4) >= 2:  # the others are block scales
        return _PRECISION[_FP4]
    if fp4:
        rest = [t.type for t in layer.inputs if t.type in ("Half", "BFloat16", "Float")]
        return _PRECISION[rest[0]] if rest else UNSEEN
    types = [layer.inputs[0].type if layer.inputs else "", *(t.type for t in operands[:2])]
    if "mha" in layer.name:
        types = [t.type for t in operands]
    floats = [t for t in types if t not in _LOW_BIT]
    if floats:
        return _PRECISION.get(floats[0], floats[0].lower() or UNSEEN)
    return "int8"  # INT4 beside INT8 is widened first: TensorRT has no 4-bit integer multiplier


def _rung(layers: Sequence[Layer], op: Mapping[str, Any], precision: str) -> Rung:
    if precision == _PRECISION[_FP4]:
        return "native"
    if precision == "int8":
        return "native" if op["declared"] == "W8A8" else "emulated"
    stored = any(op["weight"] in la.nodes and any(c.type in _LOW_BIT for c in la.constants) for la in layers)
    return "weight-only" if op["declared"].endswith("A16") and stored else "dequantized"
