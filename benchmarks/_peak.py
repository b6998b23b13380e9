"""The machine's peak as the benchmarks print it: by a loop on registers (`s2d_deploy.peak`), or else by a library.

Where no C compiler is installed, or the CPU has no byte dot product, the fastest large library product (torch FP32,
ONNX Runtime MatMulInteger) stands in: a lower bound of the peak, and called that.
"""

from __future__ import annotations

import ctypes
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from s2d_deploy.peak import KINDS, Kind, Peak, compiled, gmacs, register_peak, share_of_peak


def measure_peaks(threads: int) -> list[Peak]:
    """The peaks of both kinds on one thread and on `threads`."""
    counts = sorted({1, threads})
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        return [_measured(kind, count, library) for kind in KINDS for count in counts]


def _measured(kind: Kind, threads: int, library: ctypes.CDLL | None) -> Peak:
    found = register_peak(kind, threads, library) if library is not None else None
    if found is not None:
        return found
    rates, method = _library_product(kind, threads)
    return Peak(kind, threads, max(rates), method, True, tuple(rates))


def _library_product(kind: Kind, threads: int, size: int = 1024, repeats: int = 20) -> tuple[list[float], str]:
    """GMAC/s of one large square product in a library."""
    call, method = _fp32_product(size, threads) if kind == "fp32" else _int8_product(size, threads)
    call()
    rates = []
    for _ in range(repeats):
        begin = time.perf_counter_ns()
        call()
        rates.append(gmacs(size**3, (time.perf_counter_ns() - begin) / 1e6))
    return rates, f"{method}, {size} x {size} x {size}"


def _fp32_product(size: int, threads: int) -> tuple[Callable[[], object], str]:
    import torch

    x, y = torch.rand(size, size), torch.rand(size, size)

    def call() -> object:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return x @ y

    return call, f"torch {torch.__version__} matmul"


def _int8_product(size: int, threads: int) -> tuple[Callable[[], object], str]:
    import numpy as np
    import onnx
    import onnxruntime

    def info(name: str, dtype: int) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, dtype, [size, size])

    rng = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(rng.integers(-127, 128, (size, size), dtype=np.int8), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMulInteger", ["x", "w"], ["y"])],
        "product",
        [info("x", onnx.TensorProto.UINT8)],
        [info("y", onnx.TensorProto.INT32)],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": rng.integers(0, 256, (size, size), dtype=np.uint8)}
    return lambda: session.run(None, feeds), f"onnxruntime {onnxruntime.__version__} MatMulInteger"


__all__ = ["Peak", "gmacs", "measure_peaks", "share_of_peak"]
