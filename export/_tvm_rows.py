# mypy: disable-error-code="untyped-decorator, no-untyped-def, valid-type, misc"
# (TVMScript: annotations are buffers, and the text is parsed by TVM, not run by Python)
"""TensorIR kernels that work row by row: LayerNorm and softmax over the last axis, FP32.

Two passes for the variance (the mean first), the largest value subtracted before the exponential; rows run in parallel,
the elements of a row in vectors, what is left over one by one.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ._tvm_math import exp

_LANES = 16
_SERIAL_BELOW = 1 << 15  # elements; waking another thread takes longer than so many


def _outer_loop(elements: int) -> Any:
    from tvm.script import tirx as T

    return T.parallel if elements >= _SERIAL_BELOW else T.serial


@lru_cache(maxsize=512)  # TVM parses a kernel's text in 50 ms: equal layers share it
def layer_norm_kernel(rows: int, width: int, epsilon: float) -> Any:
    """``(rows, width), gamma (width,), beta (width,) -> (rows, width)`` as a PrimFunc."""
    from tvm.script import tirx as T

    whole, left = width // _LANES, width % _LANES
    base = whole * _LANES
    each_row = _outer_loop(rows * width)

    @T.prim_func(private=True, s_tir=True)
    def layer_norm(
        x: T.Buffer((rows, width), "float32"),
        gamma: T.Buffer((width,), "float32"),
        beta: T.Buffer((width,), "float32"),
        o: T.Buffer((rows, width), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        for row in each_row(rows):
            lanes = T.alloc_buffer((_LANES,), "float32", scope="local")
            total = T.alloc_buffer((2,), "float32", scope="local")
            for j in T.vectorized(_LANES):
                lanes[j] = T.float32(0)
            for i in T.serial(whole):
                for j in T.vectorized(_LANES):
                    lanes[j] = lanes[j] + x[row, i * _LANES + j]
            total[0] = T.float32(0)
            for j in T.unroll(_LANES):
                total[0] = total[0] + lanes[j]
            for j in T.serial(left):
                total[0] = total[0] + x[row, base + j]
            total[0] = total[0] / T.float32(width)
            for j in T.vectorized(_LANES):
                lanes[j] = T.float32(0)
            for i in T.serial(whole):
                for j in T.vectorized(_LANES):
                    lanes[j] = lanes[j] + (x[row, i * _LANES + j] - total[0]) * (x[row, i * _LANES + j] - total[0])
            total[1] = T.float32(0)
            for j in T.unroll(_LANES):
                total[1] = total[1] + lanes[j]
            for j in T.serial(left):
                total[1] = total[1] + (x[row, base + j] - total[0]) * (x[row, base + j] - total[0])
            total[1] = T.float32(1) / T.sqrt(total[1] / T.float32(width) + T.float32(epsilon))
            for i in T.serial(whole):
                for j in T.vectorized(_LANES):
                    o[row, i * _LANES + j] = (x[row, i * _LANES + j] - total[0]) * total[1] * gamma[
                        i * _LANES + j
                    ] + beta[i * _LANES + j]
            for j in T.serial(left):
                o[row, base + j] = (x[row, base + j] - total[0]) * total[1] * gamma[base + j] + beta[base + j]

    return layer_norm


@lru_cache(maxsize=512)  # TVM parses a kernel's text in 50 ms: equal layers share it
def softmax_kernel(rows: int, width: int) -> Any:
    """``(rows, width) -> (rows, width)`` as a PrimFunc."""
    from tvm.script import tirx as T

    whole, left = width // _LANES, width % _LANES
    base = whole * _LANES
    each_row = _outer_loop(rows * width)
    lowest = -3.4028234663852886e38

    @T.prim_func(private=True, s_tir=True)
    def softmax(x: T.Buffer((rows, width), "float32"), o: T.Buffer((rows, width), "float32")):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
        for row in each_row(rows):
            lanes = T.alloc_buffer((_LANES,), "float32", scope="local")
            total = T.alloc_buffer((2,), "float32", scope="local")
            for j in T.vectorized(_LANES):
                lanes[j] = T.float32(lowest)
            for i in T.serial(whole):
                for j in T.vectorized(_LANES):
                    lanes[j] = T.max(lanes[j], x[row, i * _LANES + j])
            total[0] = T.float32(lowest)
            for j in T.unroll(_LANES):
                total[0] = T.max(total[0], lanes[j])
            for j in T.serial(left):
                total[0] = T.max(total[0], x[row, base + j])
            for j in T.vectorized(_LANES):
                lanes[j] = T.float32(0)
            for i in T.serial(whole):
                for j in T.vectorized(_LANES):
                    o[row, i * _LANES + j] = exp(x[row, i * _LANES + j] - total[0])
                for j in T.vectorized(_LANES):
                    lanes[j] = lanes[j] + o[row, i * _LANES + j]
            total[1] = T.float32(0)
            for j in T.unroll(_LANES):
                total[1] = total[1] + lanes[j]
            for j in T.serial(left):
                o[row, base + j] = exp(x[row, base + j] - total[0])
                total[1] = total[1] + o[row, base + j]
            for i in T.serial(whole):
                for j in T.vectorized(_LANES):
                    o[row, i * _LANES + j] = o[row, i * _LANES + j] / total[1]
            for j in T.serial(left):
                o[row, base + j] = o[row, base + j] / total[1]

    return softmax
