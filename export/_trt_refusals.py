"""What TensorRT says when it refuses a graph, in the user's words: ONNX node, our layer, the reason, the recipe line.

TensorRT's own messages carry source files, call chains and the text of failed assertions; what is kept of them is the
sentence that says what did not fit. The node is named by the parser; the builder only mentions it, so it is looked for
in the text: first where TensorRT writes ``I...Layer NAME``, then as a whole word, longest name first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from s2d_deploy.errors import message
from s2d_deploy.qgraph import metadata

from ._trt_options import KEY

SHOWN = 3  # errors; the first says why, the rest follow from it
_TAIL = re.compile(r"[\s.]*(?: In \w+ at /\S+:\d+\)?)+[\s.)]*$")  # where in TensorRT's sources
_HEAD = re.compile(r"^(?:\S+::\S+ )?(?:\[[^\]]*\]:? )?(?:I\w+::\w+: )?Error Code \d+: [\w ]+\(")
_NAMED = re.compile(r"\bI\w+Layer ([^\s:]+)")


def parse_refusal(model: onnx.ModelProto, refused: Sequence[Mapping[str, Any]], log: Sequence[str]) -> str:
    """Why the parser refused the graph: node, layer, reason, recipe line."""
    nodes = {n.name: n for n in model.graph.node}
    parts = []
    for error in refused[:SHOWN]:
        node = nodes.get(error["node"])
        operator = error["operator"] or (node.op_type if node is not None else "")
        where = f"ONNX node {error['node'] or '(none named)'!r} ({operator or 'unknown operator'})"
        layer = layer_of(model, node) if node is not None else None
        parts.append(f"{where}{f', layer {layer!r}' if layer else ''}: {_why(error['text'], operator)}")
    if not parts:
        parts = [reason_of(text) for text in log[-SHOWN:]] or ["no reason given"]
    if len(refused) > SHOWN:
        parts.append(f"and {len(refused) - SHOWN} more")
    layer = next((found for e in refused if (found := layer_of(model, nodes.get(e["node"])))), None)
    return message(
        "TensorRT's parser refuses the graph: " + "; ".join(parts),
        fix="write the model's forward pass without that operator, or leave tensorrt out of targets"
        if not layer
        else f"change the model's code around {layer!r}, keep the layer float with "
        f"quantize.overrides: {{{layer!r}: fp32}}, or leave tensorrt out of targets",
    )


def build_refusal(model: onnx.ModelProto, log: Sequence[str]) -> str:
    """Why the builder refused the network: node, layer, reason, recipe line."""
    text = " ".join(_lines(t)[0] for t in log[-SHOWN:]) or "no reason given"
    node = mentioned(model, text)
    layer = layer_of(model, node)
    where = "the network"
    if node is not None:
        where = f"ONNX node {node.name!r} ({node.op_type})" + (f", layer {layer!r}" if layer else "")
    return message(f"TensorRT's builder refuses {where}", found="; ".join(_told(log)), fix=_remedy(text.lower(), layer))


def _told(log: Sequence[str]) -> list[str]:
    """The reasons in the log, without repetitions and without the missing driver's, which building needs not."""
    reasons = [reason_of(text) for text in log[-SHOWN:] if "cudaError" not in text]
    return list(dict.fromkeys(reasons)) or ["no reason given"]


def _remedy(text: str, layer: str | None) -> str:
    capabilities = f"{KEY}.compute_capabilities"
    if "sm75" in text or "turing" in text:
        return (
            f'leave "7.5" out of {capabilities}: there Turing gets no products with FP32 results and no INT4 weights, '
            f"so nothing but precision fp32 with {KEY}.compute: fp16"
        )
    if "hw-specific datatypes" in text:
        return f"leave the GPUs that are named out of {capabilities}, or use another precision for them"
    if "workspace" in text:
        return f"raise {KEY}.workspace_mb, or leave it out"
    if "out of memory" in text or "insufficient memory" in text or "bad_alloc" in text:
        return f"lower {KEY}.batch.max or {KEY}.workspace_mb, or build where more memory is free"
    if "shape constraints" in text or "violate shape" in text:
        return (
            f"the model fixes a size that the profile changes: make its forward pass free of fixed sizes, or build for "
            f"sizes that fit with {KEY}.batch and {KEY}.dimensions"
        )
    if layer:
        return f"keep the layer float with quantize.overrides: {{{layer!r}: fp32}}, or leave tensorrt out of targets"
    return "leave tensorrt out of targets, or this precision out of quantize.precisions"


def mentioned(model: onnx.ModelProto, text: str) -> onnx.NodeProto | None:
    """The node that TensorRT's words are about, if they name one."""
    nodes: dict[str, onnx.NodeProto] = {n.name: n for n in model.graph.node if n.name}
    for name in _NAMED.findall(text):
        if name in nodes:
            return nodes[name]
    for name in sorted(nodes, key=len, reverse=True):
        if len(name) > 2 and re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text):
            return nodes[name]
    return None


def layer_of(model: onnx.ModelProto, node: onnx.NodeProto | None) -> str | None:
    """Our name for where `node` lies: its own, or that of the nearest contraction behind it, then in front of it."""
    if node is None:
        return None
    for forward in (True, False):
        seen, queue = {id(node)}, [node]
        while queue:
            current = queue.pop(0)
            props = metadata(current)
            if name := props.get("s2d.op") or props.get("s2d.site"):
                return name.split(",")[0]
            for other in model.graph.node:
                touches = set(current.output) & set(other.input) if forward else set(current.input) & set(other.output)
                if touches and id(other) not in seen:
                    seen.add(id(other))
                    queue.append(other)
    return None


def _why(text: str, operator: str) -> str:
    """The parser's reason. For an operator that it does not have it says "false", or that a plugin is missing."""
    lower = text.lower()
    if lower.strip() == "false" or ("plugin" in lower and "not found" in lower.replace("was not", "not")):
        return f"TensorRT has no operator {operator}"
    lines = [line for line in _lines(text) if "cudaError" not in line]
    if len(lines) > 1 and lines[0].startswith("Invalid Node"):
        lines = lines[1:]
    return reason_of(lines[0])


def reason_of(text: str) -> str:
    """The sentence in TensorRT's words that says what did not fit."""
    line = _lines(text)[0]
    if quoted := re.search(r'&& "([^"]+)"', line):  # an assertion with its message
        return quoted[1].rstrip(".!")
    if line.startswith("Assertion failed:") and ": " in line[17:]:
        return line.rsplit(": ", 1)[-1].rstrip(".")
    for start in ("] Cannot", "] Mismatched", "CHECK("):
        if start in line:
            return _TAIL.sub("", line[line.index(start) :].lstrip("] ").split(" In compileGraph", 1)[0]).strip(" .;)(")
    return _TAIL.sub("", _HEAD.sub("", line)).strip(" .")[:400]


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines() if line.strip()] or ["no reason given"]


__all__ = ["SHOWN", "build_refusal", "layer_of", "mentioned", "parse_refusal", "reason_of"]
