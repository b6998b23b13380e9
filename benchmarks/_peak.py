"""What this machine can multiply at best, measured before anything is compared with it.

The ceiling comes from a loop on registers (`_peak.c`, compiled here for this CPU): no program that uses the same
instruction can be faster. Where no C compiler is installed, or the CPU has no byte dot product, the fastest large
library product (torch FP32, ONNX Runtime MatMulInteger) stands in: a lower bound of the peak, and called that.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Literal

Kind = Literal["int8", "fp32"]
KINDS: tuple[Kind, ...] = ("int8", "fp32")
_SOURCE = Path(__file__).with_name("_peak.c")
_ROUNDS = 2_000_000  # about 10 ms on one core
_REPEATS = 40


@dataclass(frozen=True, slots=True)
class Peak:
    """The best rate seen.

    Attributes:
        kind: int8 or fp32.
        threads: how many.
        gmacs: 10^9 multiply-accumulates a second.
        method: what was measured.
        lower_bound: the machine may do better: a library's product, not a register loop.
        repeats: GMAC/s of every repeat.
    """

    kind: Kind
    threads: int
    gmacs: float
    method: str
    lower_bound: bool
    repeats: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """A JSON document."""
        return asdict(self)

    def __str__(self) -> str:
        bound = "at least " if self.lower_bound else ""
        return f"{self.kind}, {self.threads} thread(s): {bound}{self.gmacs:.0f} GMAC/s ({self.method})"


def share_of_peak(macs: int, milliseconds: float, peak_gmacs: float) -> float:
    """Which part of the peak a computation of `macs` multiply-accumulates reaches in `milliseconds`."""
    return gmacs(macs, milliseconds) / peak_gmacs


def gmacs(macs: int, milliseconds: float) -> float:
    """10^9 multiply-accumulates a second."""
    return macs / milliseconds / 1e6


def measure_peaks(threads: int) -> list[Peak]:
    """The peaks of both kinds on one thread and on `threads`."""
    counts = sorted({1, threads})
    with tempfile.TemporaryDirectory() as folder:
        library = _compiled(Path(folder))
        return [_measured(kind, count, library) for kind in KINDS for count in counts]


def _measured(kind: Kind, threads: int, library: ctypes.CDLL | None) -> Peak:
    name = _text(library, f"{kind}_name") if library is not None else ""
    if library is not None and name:
        loop = getattr(library, f"{kind}_peak")
        loop.argtypes, loop.restype = [ctypes.c_int64], ctypes.c_int64
        macs = _number(library, f"{kind}_macs") * _ROUNDS * threads
        rates = [gmacs(macs, _milliseconds(loop, threads)) for _ in range(_REPEATS)]
        # The best, not the median: a ceiling is what the machine can do, and disturbance only ever slows it.
        return Peak(kind, threads, max(rates), f"{name}, register loop", False, tuple(rates))
    rates, method = _library_product(kind, threads)
    return Peak(kind, threads, max(rates), method, True, tuple(rates))


def _milliseconds(loop: Callable[[int], int], threads: int) -> float:
    """Wall time of `threads` simultaneous loops; ctypes releases the interpreter's lock while it calls."""
    others = [Thread(target=loop, args=(_ROUNDS,)) for _ in range(threads - 1)]
    begin = time.perf_counter_ns()
    for other in others:
        other.start()
    loop(_ROUNDS)
    for other in others:
        other.join()
    return (time.perf_counter_ns() - begin) / 1e6


def _compiled(folder: Path) -> ctypes.CDLL | None:
    """The loops compiled for this CPU; None without a C compiler that can."""
    candidates = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    compiler = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if compiler is None:
        return None
    target = folder / "peak.so"
    command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", "-o", str(target), str(_SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return ctypes.CDLL(str(target)) if done.returncode == 0 else None


def _text(library: ctypes.CDLL, name: str) -> str:
    function = getattr(library, name)
    function.restype = ctypes.c_char_p
    return str(function().decode())


def _number(library: ctypes.CDLL, name: str) -> int:
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    return int(function())


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
