"""Run the builder's process, and raise what it answers. The words of its refusals are in `_trt_refusals`."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from s2d_deploy.errors import DeviceUnavailable, RecipeError, RuntimeUnavailable, StageError, UnsupportedError, message

from ._trt_options import KEY, Options, sm_name
from ._trt_refusals import SHOWN, build_refusal, parse_refusal, reason_of


def compile_engine(model: onnx.ModelProto, path: Path, engine: Path, options: Options) -> dict[str, Any]:
    """Compile the dialect file `path` (already read as `model`) into the file `engine`, or a packed one.

    Returns:
        The builder's answer: package, version, seconds, engine (the file's name: ``.xz`` where it was packed),
            engine_bytes, layers (text), inputs, outputs.

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
        "plugins": list(options.plugins),
        "timing_cache": options.timing_cache,
    }
    answer = _run(request, options.timeout_s)
    if answer["stage"] == "done":
        return answer
    if answer["stage"] == "package":
        raise RuntimeUnavailable(answer["errors"][0])
    if answer["stage"] == "plugin":
        raise UnsupportedError(
            message(
                f"{KEY}.plugins: {answer['plugin']} does not load",
                expected=f"a shared library with plugins for {answer['package']} {answer['version']}",
                found=answer["errors"][0] if answer["errors"] else "no reason given",
                fix="give its whole path, and build it for this version of TensorRT",
            )
        )
    if answer["stage"] == "capability":
        raise RecipeError(_unknown_capability(answer, options))
    if options.compute_capabilities == ("current",) and any("cudaError" in text for text in answer["errors"]):
        raise DeviceUnavailable(
            message(
                f'{KEY}.compute_capabilities: "current" needs an NVIDIA GPU and its driver here',
                found=reason_of(answer["errors"][0]),
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
            last = [line for line in done.stderr.strip().splitlines() if line.strip()][-SHOWN:]
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
