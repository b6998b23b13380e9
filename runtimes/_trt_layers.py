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

import json
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
_WAITING = ("shape_call", "signal", "wait")
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
_NO_OPERANDS = ("Bool", "Int32", "Int64")  # masks and positions that are fused into a product's kernel
# Words for types in TensorRT's lists -> their names above; the first that is found counts.
_WORDS = (
    ("fp4", "FP4E2M1"),
    ("int4", "Int4"),
    ("int8", "Int8"),
    ("fp8", "FP8"),
    ("bfloat16", "BFloat16"),
    ("bf16", "BFloat16"),
    ("fp16", "Half"),
    ("half", "Half"),
    ("fp32", "Float"),
    ("float", "Float"),
    ("int32", "Int32"),
    ("int64", "Int64"),
    ("bool", "Bool"),
)
UNSEEN = "unseen"  # an op that the list does not show; counts as not executed on integers


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that enters or leaves a layer: its dimensions (-1 where dynamic) and TensorRT's name of its type."""

    dimensions: tuple[int, ...]
    type: str
    weights: bool = False  # a layer's own, whose dimensions are not shown

    @property
    def matrix(self) -> bool:
        """Whether it can be an operand of a product: at least two dimensions beyond 1."""
        return self.weights or sum(d != 1 for d in self.dimensions) >= 2


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of the compiled engine, with the ONNX nodes that went into it."""

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    tactic: str
    nodes: frozenset[str]
    outputs: tuple[Tensor, ...] = ()


def parse_layers(text: str) -> list[Layer]:
    """Layers of TensorRT's list, as lines or as JSON; what is no layer, or a mere name, is passed over."""
    if text.lstrip().startswith("{"):
        return _from_json(text)
    return [
        Layer(
            match["name"],
            match["kind"],
            _tensors(match["inputs"]),
            _tensors(match["constants"]),
            match["tactic"],
            frozenset(_ONNX.findall(match["metadata"])),
            _tensors(match["outputs"]),
        )
        for line in text.splitlines()
        if (match := _LAYER.match(line.strip()))
    ]


def _from_json(text: str) -> list[Layer]:
    """``{"Layers": [{"Name", "LayerType", "Inputs": [{"Dimensions", "Format/Datatype"}, ..], "Weights", ..}]}``."""
    try:
        listed = json.loads(text).get("Layers", [])
    except ValueError:
        return []
    return [
        Layer(
            str(entry.get("Name", "")),
            str(entry.get("LayerType", "")),
            _entries(entry.get("Inputs")),
            _entries(entry.get("Constants")) + _kernel(entry.get("Weights")),
            str(entry.get("TacticName", "")),
            frozenset(_ONNX.findall(str(entry.get("Metadata", "")))),
            _entries(entry.get("Outputs")),
        )
        for entry in listed
        if isinstance(entry, Mapping)  # a string is what the builder leaves without profiling verbosity DETAILED
    ]


def _entries(listed: Any) -> tuple[Tensor, ...]:
    entries = [e for e in listed or () if isinstance(e, Mapping)]
    return tuple(
        Tensor(tuple(int(d) for d in e.get("Dimensions", ())), _type(e.get("Datatype") or e.get("Format/Datatype")))
        for e in entries
    )


def _kernel(weights: Any) -> tuple[Tensor, ...]:
    """A layer's own weights, ``{"Type": "Int8", "Count": 9408}``: their dimensions are not shown."""
    if not isinstance(weights, Mapping) or not int(weights.get("Count", 0)):
        return ()
    return (Tensor((int(weights["Count"]),), _type(weights.get("Type")), weights=True),)


def _type(words: Any) -> str:
    """TensorRT's name of a type in what it says of a tensor, as ``"Channel major INT8 format ..."``."""
    text = str(words or "").lower()
    return next((name for word, name in _WORDS if word in text), str(words or ""))


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


def listing(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """The layers that compute something, for ``engine.json``: types in and out, and the ONNX nodes fused there."""
    return [
        {
            "name": layer.name,
            "kind": layer.kind,
            "kernel": layer.tactic,
            "reads": sorted({t.type for t in layer.inputs + layer.constants}),
            "writes": sorted({t.type for t in layer.outputs}),
            "nodes": sorted(layer.nodes),
        }
        for layer in layers
        if layer.kind not in _WAITING
    ]


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
    types = [t for t in types if t not in _NO_OPERANDS]
    if not any(types):
        return UNSEEN
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
