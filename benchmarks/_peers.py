"""The competitors: what a user would otherwise run, each with its own quantizer and its own defaults.

All read the same FP32 ONNX export, or the same torch module; all are given the same number of threads, static shapes
where they profit from them, and the same random calibration inputs. A peer that is not installed is unavailable.

    ort-static       onnxruntime.quantization.quantize_static: QDQ, UINT8 activations, INT8 weights per channel
    ort-dynamic      onnxruntime.quantization.quantize_dynamic: INT8 weights per channel
    openvino-fp32    OpenVINO, latency hint, one stream, FP32 (no bfloat16)
    openvino-int8    the same, quantized by NNCF for transformers
    torch-eager      PyTorch FP32
    torch-compile    PyTorch FP32 through torch.compile (Inductor; needs a C++ compiler)
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _models import Bench

from s2d_deploy.errors import RecipeError, RuntimeUnavailable, message
from s2d_deploy.files import sha256_file
from s2d_deploy.precision import BASELINE
from s2d_deploy.session import Array

PEERS = ("ort-static", "ort-dynamic", "openvino-fp32", "openvino-int8", "torch-eager", "torch-compile")
GROUPS = {"openvino": ("openvino-fp32", "openvino-int8")}
NEEDS = {"ort": ("onnxruntime", "ort"), "openvino": ("openvino", "bench"), "torch": ("torch", "")}
_CALIBRATION_SAMPLES = 4
_THIS = sha256_file(Path(__file__))  # how peers are quantized is written here


@dataclass(frozen=True, slots=True)
class Peer:
    """A competitor, ready to be timed.

    Attributes:
        call: runs one batch and returns its output.
        kind: whose peak its arithmetic is measured by: "int8" or "fp32".
        how: quantizer and settings, in words.
        seconds: what quantizing and compiling took, where it was done now; None where it was found in the work folder.
    """

    call: Callable[[], Array]
    kind: str
    how: str
    seconds: float | None = None


def expand(wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Names of peers, groups replaced by their members.

    Raises:
        RecipeError: an unknown name.
    """
    found = [peer for name in wanted for peer in GROUPS.get(name, (name,))]
    unknown = [name for name in found if name not in PEERS]
    if unknown:
        raise RecipeError(message(f"--peers {', '.join(unknown)}", expected=f"any of {', '.join((*PEERS, *GROUPS))}"))
    return tuple(dict.fromkeys(found))


def make_peer(name: str, bench: Bench, batch: int, threads: int) -> Peer:
    """Prepare a peer.

    Raises:
        RuntimeUnavailable: a package or a compiler is missing; the message has the pip line.
    """
    _require(name)
    makers = {"ort": _onnxruntime, "openvino": _openvino, "torch": _torch}
    return makers[name.partition("-")[0]](name, bench, batch, threads)


def _require(name: str) -> None:
    package, extra = NEEDS[name.partition("-")[0]]
    missing = [p for p in (package, *(["nncf"] if name == "openvino-int8" else [])) if find_spec(p) is None]
    if missing:
        raise RuntimeUnavailable(
            message(f"{' and '.join(missing)} not installed", fix=f"pip install 's2d-deploy[{extra}]'")
        )


class _Calibration:
    """Random samples, one at a time, as onnxruntime's CalibrationDataReader wants them."""

    def __init__(self, bench: Bench) -> None:
        self.samples: Iterator[dict[str, Array]] = iter(calibration_feeds(bench))

    def get_next(self) -> dict[str, Array] | None:
        return next(self.samples, None)


def calibration_feeds(bench: Bench) -> list[dict[str, Array]]:
    """What every peer's quantizer is shown."""
    return [
        {name: tensor.numpy() for name, tensor in bench.batch(1, seed=1 + 100 * i).items()}
        for i in range(_CALIBRATION_SAMPLES)
    ]


def _onnxruntime(name: str, bench: Bench, batch: int, threads: int) -> Peer:
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    CalibrationDataReader.register(_Calibration)  # ABCMeta: ours has its one method
    common = bench.onnx(BASELINE)
    static = name == "ort-static"

    def work(folder: Path) -> dict[str, Any]:
        with _quiet():
            prepared = folder / "prepared.onnx"
            # Its symbolic shape inference knows no opset 21; onnx's own is enough for static weights.
            quant_pre_process(common.folder / "model.onnx", prepared, skip_symbolic_shape=True)
            if static:
                quantize_static(
                    prepared,
                    folder / "model.onnx",
                    _Calibration(bench),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=True,
                    op_types_to_quantize=["MatMul", "Gemm", "Conv"],
                )
            else:
                quantize_dynamic(prepared, folder / "model.onnx", weight_type=QuantType.QInt8, per_channel=True)
            prepared.unlink()
        return {}

    key = {"onnx": common.sha256, "onnxruntime": onnxruntime.__version__, "this": _THIS}
    stage = bench.store.run(f"peers/{name}", key, work)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # as our own sessions: spin in runs, not after
    session = onnxruntime.InferenceSession(stage.folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    feeds = bench.feeds(batch)
    how = (
        "quantize_static, QDQ of MatMul, Gemm and Conv, UINT8 activations, INT8 weights per channel"
        if static
        else "quantize_dynamic, INT8 weights per channel"
    )
    seconds = None if stage.cached else float(stage.manifest["seconds"])
    return Peer(lambda: session.run([bench.output], feeds)[0], "int8", how, seconds)


def _openvino(name: str, bench: Bench, batch: int, threads: int) -> Peer:
    import openvino

    common = bench.onnx(BASELINE)
    feeds = bench.feeds(batch)
    core = openvino.Core()

    def fixed(path: Path, samples: int) -> Any:
        model = core.read_model(path)
        model.reshape({key: [samples, *array.shape[1:]] for key, array in feeds.items()})
        return model

    seconds = None
    if name == "openvino-fp32":
        model, how = fixed(common.folder / "model.onnx", batch), "FP32, static shapes, latency hint, one stream"
    else:
        import nncf

        def work(folder: Path) -> dict[str, Any]:
            with _quiet():
                quantized = nncf.quantize(
                    fixed(common.folder / "model.onnx", 1),
                    nncf.Dataset(calibration_feeds(bench)),
                    model_type=nncf.ModelType.TRANSFORMER,
                    subset_size=_CALIBRATION_SAMPLES,
                )
            openvino.save_model(quantized, folder / "model.xml", compress_to_fp16=False)
            return {}

        key = {"onnx": common.sha256, "openvino": openvino.__version__, "nncf": nncf.__version__, "this": _THIS}
        stage = bench.store.run(f"peers/{name}", key, work)
        seconds = None if stage.cached else float(stage.manifest["seconds"])
        model = fixed(stage.folder / "model.xml", batch)
        how = f"NNCF {nncf.__version__} quantize, ModelType.TRANSFORMER, static shapes, latency hint, one stream"
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(threads),
        # On processors with bfloat16 OpenVINO would take it by default: another precision than the one compared.
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def call() -> Array:
        request.infer(feeds)
        result: Array = request.get_output_tensor(0).data
        return result

    return Peer(call, "fp32" if name == "openvino-fp32" else "int8", how, seconds)


def _torch(name: str, bench: Bench, batch: int, threads: int) -> Peer:
    import torch

    # Our own attention is made to be watched and exported; the peer gets the one that PyTorch is fast with.
    # A copy of the config as well: the implementation is set there, and the original is still to be exported.
    module: Any = type(bench.module)(copy.deepcopy(bench.module.config), **_pooling(bench))
    module.load_state_dict(bench.module.state_dict())
    module.eval()
    module.set_attn_implementation("sdpa")
    inputs = bench.batch(batch)
    how = "FP32, inference mode, SDPA"

    def run(model: Any) -> Array:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            result: Array = model(**inputs)[bench.output].numpy()
            return result

    if name == "torch-eager":
        return Peer(lambda: run(module), "fp32", how)
    compiled = torch.compile(module)
    try:
        with _quiet():
            run(compiled)
    except Exception as error:  # Inductor's own errors share no base class; most often: no C++ compiler
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise RuntimeUnavailable(
            message("torch.compile does not work here", found=f"{type(error).__name__}: {first[:200]}")
        ) from error
    return Peer(lambda: run(compiled), "fp32", f"{how}, torch.compile with its defaults")


def _pooling(bench: Bench) -> dict[str, bool]:
    return {"add_pooling_layer": False} if bench.shape.family == "bert" else {}


@contextmanager
def _quiet() -> Iterator[None]:
    """Peers log, warn and draw bars while they quantize; errors still come through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
