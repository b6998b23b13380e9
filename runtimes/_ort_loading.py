"""Make onnxruntime sessions: one place for the settings that change numbers, speed or noise."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx

from s2d_deploy.errors import ArtifactError, message
from s2d_deploy.large_models import LARGE, save_model, stored_bytes

from ._cpu_features import byte_dot_product
from ._ort_providers import asked_for, check_loaded, configure, refusal
from ._ort_refusals import refused_model

_FATAL_ONLY = (
    4  # onnxruntime's log severity: what it logs as an error it raises as well, and ours is the message to read
)
_IN_MEMORY_BELOW = LARGE
# Workers spin within a run, not after it: several sessions live side by side here, and on two cores the idle ones
# took every other run of a neighbour to twice its time (benchmarks/LOG.md).
_QUIET_BETWEEN_RUNS = ("session.force_spinning_stop", "1")
# INT4 Q/DQ that onnxruntime fuses to MatMulNBits would get level 4: activations rounded to INT8.
_FLOAT_ACTIVATIONS = ("session.qdq_matmulnbits_accuracy_level", "1")
# Without VNNI, x86 multiplies UINT8 x INT8 with 16-bit sums that saturate; this takes the exact UINT8 x UINT8 kernel.
# It is not for processors with VNNI: onnxruntime would obey there too, and multiply 1.5 times as slowly for nothing.
# What the dialect writes into ``metadata_props``; s2d_deploy/export/_ort_rewrite.py defines it, a test compares.
PART = "s2d.part"
PLACED = "s2d.placement"
STORAGE, SHIFT, CONTAINER = "s2d.storage", "s2d.shift", "s2d.container"
_EXACT_WITHOUT_VNNI = ("session.x64quantprecision", "1")


def new_session(
    model: Path | bytes,
    info: Mapping[str, Any],
    threads: int,
    optimized: Path | None = None,
    *,
    profile: Path | None = None,
    weights: Path | None = None,
) -> Any:
    """An InferenceSession, sequential, on `threads` threads.

    Args:
        model: the ONNX file, or its bytes.
        info: of the artifact: ``providers`` and ``graph_optimization_level``; ``defaults: theirs`` leaves what changes
            numbers as onnxruntime has it, for a model that is not ours.
        threads: of one operator.
        optimized: where to save the optimized graph; tensors go to ``<optimized>.data``.
        profile: beginning of the path of a profile of all runs, which `end_profiling` writes; none by default.
        weights: folder of external data, for a model in bytes.

    Raises:
        ArtifactError: onnxruntime cannot load the model; the message carries its reason.
        UnsupportedError: an operator, domain, opset or type that this onnxruntime does not have.
        DeviceUnavailable: a provider is not in this build of onnxruntime, does not load, or runs a part of the model.
    """
    import onnxruntime

    wanted = asked_for(info)
    names = [name for name, _ in wanted]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = {
        "all": levels.ORT_ENABLE_ALL,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "basic": levels.ORT_ENABLE_BASIC,
        "disable": levels.ORT_DISABLE_ALL,
    }[info.get("graph_optimization_level", "all")]
    options.log_severity_level = _FATAL_ONLY
    if info.get("defaults") != "theirs":
        options.add_session_config_entry(*_FLOAT_ACTIVATIONS)
    options.add_session_config_entry(*_QUIET_BETWEEN_RUNS)
    if byte_dot_product() is None and info.get("defaults") != "theirs":
        options.add_session_config_entry(*_EXACT_WITHOUT_VNNI)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        key = "session.optimized_model_external_initializers"
        options.add_session_config_entry(f"{key}_file_name", f"{optimized.name}.data")
        options.add_session_config_entry(f"{key}_min_size_in_bytes", "1024")
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if weights is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights))
    providers = configure(options, wanted)
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = onnxruntime.InferenceSession(source, options, providers=providers or None, enable_fallback=0)
    except Exception as error:  # its exceptions share no base class
        if (unavailable := refusal(error, names)) is not None:
            raise unavailable from error
        where = "the model" if isinstance(model, bytes) else str(model)
        if (unsupported := refused_model(error, where)) is not None:
            raise unsupported from error
        raise ArtifactError(
            message(
                f"{where}: onnxruntime {onnxruntime.__version__} cannot load it",
                found=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:400]}",
                fix="build the artifact again",
            )
        ) from error
    check_loaded(session, names)
    return session


def session_of(model: onnx.ModelProto, info: Mapping[str, Any], threads: int) -> Any:
    """A session of a model in memory, however large it is."""
    if stored_bytes(model) < _IN_MEMORY_BELOW:
        return new_session(model.SerializeToString(), info, threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        copy = onnx.ModelProto()
        copy.CopyFrom(model)  # what is saved beside a file is taken out of the model
        save_model(copy, path, beyond=0)
        return new_session(path, info, threads)


def optimized_graph(model: onnx.ModelProto, info: Mapping[str, Any]) -> onnx.ModelProto:
    """What onnxruntime's optimizer leaves of a model in memory, without its large tensors."""
    with tempfile.TemporaryDirectory() as folder:
        path, target = Path(folder) / "model.onnx", Path(folder) / "optimized.onnx"
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        save_model(copy, path, beyond=_IN_MEMORY_BELOW)
        new_session(path, info, 1, optimized=target)
        return onnx.load(target, load_external_data=False)
