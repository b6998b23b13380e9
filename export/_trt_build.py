"""Run the builder's process, and say in the user's words why it refused.

A refusal names the ONNX node, our layer, TensorRT's reason and the recipe line to change.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from s2d_deploy.errors import DeviceUnavailable, RecipeError, RuntimeUnavailable, StageError, UnsupportedError, message
from s2d_deploy.qgraph import metadata

from ._trt_options import KEY, Options, sm_name

_SHOWN = 3  # errors; the first says why, the rest follow from it


def compile_engine(model: onnx.ModelProto, path: Path, engine: Path, options: Options) -> dict[str, Any]:
    """Compile the dialect file `path` (already read as `model`) into the file `engine`.

    Returns:
        The builder's answer: package, version, seconds, engine_bytes, layers (text), inputs, outputs.

    Raises:
        RecipeError: a compute capability that this TensorRT does not know, or a dynamic dimension without a range.
        RuntimeUnavailable, DeviceUnavailable: the package, or the GPU that ``"current"`` asks for, is missing.
        UnsupportedError: TensorRT refuses the graph; the message names node, layer, reason and recipe line.
        StageError: the builder was stopped by the time limit, by a signal, or by a full disk.
    """
    request = {
        "model": str(path.resolve()),
        "engine": str(engine.resolve()),
        "compress": options.compress,
        "capabilities": [sm_name(c) for c in options.compute_capabilities],
        "shapes": options.shapes(model),
        "workspace_mb": options.workspace_mb,
        "tf32": options.tf32,
        "level": options.optimization_level,
    }
    answer = _run(request, options.timeout_s)
    if answer["stage"] == "done":
        return answer
    if answer["stage"] == "package":
        raise RuntimeUnavailable(answer["errors"][0])
    if answer["stage"] == "capability":
        raise RecipeError(_unknown_capability(answer, options))
    if options.compute_capabilities == ("current",) and any("cudaError" in text for text in answer["errors"]):
        raise DeviceUnavailable(
            message(
                f'{KEY}.compute_capabilities: "current" needs an NVIDIA GPU and its driver here',
                found=_first_line(answer["errors"][0]),
                fix='list the capabilities to build for, e.g. ["8.6", "8.9", "12.0"]',
            )
        )
    if answer["stage"] == "parse":
        raise UnsupportedError(parse_refusal(model, answer["parser"], answer["errors"]))
    raise UnsupportedError(build_refusal(model, answer["errors"]))


def _run(request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="s2d-trt-") as folder:
        ask = Path(folder) / "build.json"
        ask.write_text(json.dumps(request), encoding="utf-8")
        command = [sys.executable, "-m", "s2d_deploy.export._trt_worker", str(ask)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise StageError(
                message(
                    "TensorRT's builder was stopped",
                    found=f"still at work after {timeout_s:g} s",
                    fix=f"raise {KEY}.timeout_s, or lower {KEY}.optimization_level",
                )
            ) from error
        reply = ask.with_suffix(".answer")
        if done.returncode or not reply.exists():
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-_SHOWN:]
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            raise StageError(
                message(
                    "TensorRT's builder ended without an answer",
                    found=f"{how}; it said last: {' | '.join(last) or 'nothing'}",
                    fix="see whether memory or disk ran out, then build again",
                )
            )
        result: dict[str, Any] = json.loads(reply.read_text(encoding="utf-8"))
        return result


def _unknown_capability(answer: Mapping[str, Any], options: Options) -> str:
    known = answer["known"]
    if not known:
        return message(
            f"{KEY}.compute_capabilities: the package {answer['package']} builds only for the GPU that is here",
            found=", ".join(options.compute_capabilities),
            fix='set it to "current" on the machine with that GPU, or install tensorrt-rtx, which builds without one',
        )
    spoken = [f"{k[2:-1]}.{k[-1]}" for k in sorted(known, key=lambda k: (len(k), k)) if k.startswith("SM")]
    unknown = [c for c in options.compute_capabilities if sm_name(c) not in known]
    return message(
        f"{KEY}.compute_capabilities: {answer['package']} {answer['version']} cannot build for {', '.join(unknown)}",
        expected=f"{', '.join(spoken)}, or current",
        fix=f"leave {', '.join(unknown)} out (data-center GPUs need the package tensorrt, on the machine that has one)",
    )


def parse_refusal(model: onnx.ModelProto, refused: Sequence[Mapping[str, Any]], log: Sequence[str]) -> str:
    """Why the parser refused the graph: node, layer, reason, recipe line."""
    nodes = {n.name: n for n in model.graph.node}
    parts = []
    for error in refused[:_SHOWN]:
        node = nodes.get(error["node"])
        operator = error["operator"] or (node.op_type if node is not None else "")
        where = f"ONNX node {error['node'] or '(none named)'!r} ({operator or 'unknown operator'})"
        layer = layer_of(model, node) if node is not None else None
        reason = _first_line(error["text"])
        if "plugin not found" in reason.lower():
            reason = f"TensorRT has no operator {operator}"
        parts.append(f"{where}{f', layer {layer!r}' if layer else ''}: {reason}")
    if not parts:
        parts = [_first_line(text) for text in log[-_SHOWN:]] or ["no reason given"]
    if len(refused) > _SHOWN:
        parts.append(f"and {len(refused) - _SHOWN} more")
    layer = next((found for e in refused if (found := layer_of(model, nodes.get(e["node"])))), None)
    return message(
        "TensorRT's parser refuses the graph: " + "; ".join(parts),
        fix="write the model's forward pass without that operator, or leave tensorrt out of targets"
        if not layer
        else f"change the model's code around {layer!r}, keep the layer float with "
        f"quantize.overrides: {{{layer!r}: fp32}}, or leave tensorrt out of targets",
    )


def build_refusal(model: onnx.ModelProto, log: Sequence[str]) -> str:
    """Why the builder refused the network: layer, reason, recipe line."""
    text = " ".join(_first_line(t) for t in log[-_SHOWN:]) or "no reason given"
    names = sorted((p["s2d.op"] for n in model.graph.node if (p := metadata(n)).get("s2d.op")), key=len, reverse=True)
    layer = next((name for name in names if name in text), None)
    reason = _reason(text)
    lower = text.lower()
    if "sm75" in lower or "turing" in lower:
        fix = f'leave "7.5" out of {KEY}.compute_capabilities: Turing takes neither FP32 products nor INT4 weights'
    elif "memory" in lower:
        fix = f"lower {KEY}.batch.max or raise {KEY}.workspace_mb"
    elif layer:
        fix = f"keep the layer float with quantize.overrides: {{{layer!r}: fp32}}, or leave tensorrt out of targets"
    else:
        fix = "leave tensorrt out of targets, or this precision out of quantize.precisions"
    return message(
        f"TensorRT's builder refuses {f'layer {layer!r}' if layer else 'the network'}", found=reason, fix=fix
    )


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


def _reason(text: str) -> str:
    """TensorRT's own words without its file names and call chains."""
    for start in ("] Cannot", "] Mismatched", "CHECK("):
        if start in text:
            cut = text[text.index(start) :].lstrip("] ")
            return cut.split(" In compileGraph", 1)[0].split(" In ", 1)[0].strip(" .;)(")
    return text[:400]


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].strip() if text.strip() else "no reason given"
