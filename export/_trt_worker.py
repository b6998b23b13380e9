"""The process that calls TensorRT's parser and builder: ``python -m s2d_deploy.export._trt_worker REQUEST.json``.

A process of its own, because TensorRT writes to the standard error stream past its logger, can take the process with
it when it meets a graph that it did not expect, and cannot be interrupted. The request names the ONNX file, the
capabilities, the profile and where to write; the answer, a JSON file beside it, holds what was built or why not.
"""

from __future__ import annotations

import json
import lzma
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2d_deploy.errors import DeviceUnavailable, RuntimeUnavailable
from s2d_deploy.files import atomic_write
from s2d_deploy.runtimes import _trt_package as package
from s2d_deploy.runtimes._cuda_driver import Driver

_SAMPLES, _SAMPLE_BYTES = 32, 1 << 15
PRESET = 1  # of lzma: engines are mostly repetitive program text; higher presets gain 10 % and take ten times as long


def build(request: dict[str, Any]) -> dict[str, Any]:
    """Parse, compile, write the engine.

    Args:
        request: ``model`` and ``engine`` (paths; ``.xz`` is appended to a packed engine's), ``compress``,
            ``capabilities`` (names as ``SM86``, or ``CURRENT``),
            ``shapes`` ({input: [min, opt, max]}), ``workspace_mb`` or None, ``tf32``, ``level`` or None, ``plugins``
            and ``timing_cache`` (paths; the latter may be None).

    Returns:
        ``{"stage": "done", ...}`` with layers, io, seconds and sizes, or another stage (``package``, ``capability``,
        ``plugin``, ``parse``, ``build``) with what stood in the way.
    """
    try:
        trt = package.load()
    except RuntimeUnavailable as error:
        return {"stage": "package", "errors": [str(error)]}
    log = package.new_log(trt)
    answer: dict[str, Any] = {"package": trt.__name__, "version": str(trt.__version__)}
    known = sorted(getattr(getattr(trt, "ComputeCapability", None), "__members__", {}))
    if set(request["capabilities"]) - {"CURRENT", *known}:
        return {**answer, "stage": "capability", "known": known}
    for plugin in request["plugins"]:
        if reason := package.load_plugin(trt, plugin):
            return {**answer, "stage": "plugin", "plugin": plugin, "errors": [reason]}
    started = time.perf_counter()
    builder = trt.Builder(log)
    if builder is None:
        return {**answer, "stage": "build", "errors": log.errors}
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(request["model"]):
        return {
            **answer,
            "stage": "parse",
            "parser": [_parser_error(parser, i) for i in range(parser.num_errors)],
            "errors": log.errors,
        }
    config = _config(trt, builder, request)
    timings = _timings(trt, config, request["timing_cache"])
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        return {**answer, "stage": "build", "errors": log.errors}
    if timings is not None:
        atomic_write(Path(request["timing_cache"]), bytes(timings.serialize()))
    seconds, data = time.perf_counter() - started, bytes(serialized)
    packs = request["compress"] and _pays(data)
    path = Path(request["engine"] + (".xz" if packs else ""))
    path.write_bytes(lzma.compress(data, preset=PRESET) if packs else data)
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    return {
        **answer,
        "stage": "done",
        "seconds": seconds,
        "engine": path.name,
        "engine_bytes": len(data),
        "network_layers": network.num_layers,
        "layers": log.layers,
        "inputs": [_tensor(t) for t in tensors],
        "outputs": [_tensor(t) for t in outputs],
        "gpu": _gpu() if request["capabilities"] == ["CURRENT"] else None,
    }


def _pays(data: bytes) -> bool:
    """Whether packing saves a quarter, by samples: program text shrinks eightfold, float weights hardly, in minutes."""
    step = max(len(data) // _SAMPLES, 1)
    sample = b"".join(data[i : i + _SAMPLE_BYTES] for i in range(0, len(data), step))
    return len(lzma.compress(sample, preset=PRESET)) < 0.75 * len(sample)


def _timings(trt: Any, config: Any, path: str | None) -> Any:
    """TensorRT's timing cache, as far as it was filled before; None where there is none to keep."""
    if path is None or trt.__name__ != "tensorrt":
        return None
    known = Path(path).read_bytes() if Path(path).is_file() else b""
    timings = config.create_timing_cache(known)
    return timings if config.set_timing_cache(timings, ignore_mismatch=False) else None


def _gpu() -> dict[str, str] | None:
    """The GPU that an engine for the current one was built on."""
    try:
        device = Driver().device()
    except DeviceUnavailable:
        return None
    return {"name": device.name, "capability": device.capability, "driver": device.driver}


def _config(trt: Any, builder: Any, request: dict[str, Any]) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # or the builder prints no layer list
    if hasattr(config, "num_compute_capabilities") and hasattr(trt, "ComputeCapability"):
        config.num_compute_capabilities = len(request["capabilities"])
        for index, name in enumerate(request["capabilities"]):
            config.set_compute_capability(getattr(trt.ComputeCapability, name), index)
    if not request["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default: float products would silently lose 13 bits of mantissa
    if request["workspace_mb"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mb"] << 20)
    if request["level"] is not None:
        config.builder_optimization_level = request["level"]
    if request["shapes"]:
        profile = builder.create_optimization_profile()
        for name, shapes in request["shapes"].items():
            profile.set_shape(name, *[tuple(s) for s in shapes])
        config.add_optimization_profile(profile)
    return config


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": str(tensor.dtype).rsplit(".", 1)[-1], "shape": [int(d) for d in tensor.shape]}


def _parser_error(parser: Any, index: int) -> dict[str, Any]:
    error = parser.get_error(index)
    return {
        "node": error.node_name(),
        "operator": error.node_operator(),
        "code": str(error.code()).rsplit(".", 1)[-1],
        "text": error.desc(),
    }


def main(argv: Sequence[str]) -> int:
    """Read the request, build, and write the answer as ``<request>.answer``."""
    path = Path(argv[0])
    answer = build(json.loads(path.read_text(encoding="utf-8")))
    path.with_suffix(".answer").write_text(json.dumps(answer), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
