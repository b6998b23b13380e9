"""TensorIR kernel for CUDA: products in FP32, for what is not quantized and for weights of which only the codes are.

Sums run in another order than other libraries': they agree within a few ULPs, not bit for bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ._tvm_builder import ir, prim_func, when
from ._tvm_cuda_intrinsics import barrier
from ._tvm_panels import Panels


@lru_cache(maxsize=512)
def float_kernel(panels: Panels, batch: int, rows: int) -> Any:
    """``(batch, rows, depth) x (batch, *shape) -> (batch, rows, columns)``, all float32: see `_tvm_kernels`.

    A block of 16 x 16 threads makes 64 rows times a panel, each thread four rows and every 16th column.
    """
    from tvm import tirx

    b, (count, runs, width) = ir(), panels.shape
    step, tall, wide = 16, 4, width // 16
    row_tiles, depth, columns = -(-rows // 64), panels.depth, panels.columns

    def body(a: Any, right: Any, o: Any) -> None:
        tasks = batch * count * row_tiles
        with b.launch_thread("blockIdx.x", tasks) as task, b.launch_thread("threadIdx.x", 256) as thread:
            tile, p, product = task % row_tiles, task // row_tiles % count, task // (row_tiles * count)
            ty, tx = thread // 16, thread % 16
            left = b.alloc_buffer((64 * (step + 1),), "float32", scope="shared")
            shared = b.alloc_buffer((step * width,), "float32", scope="shared")
            acc = b.alloc_buffer((tall * wide,), "float32", scope="local")
            zero = tirx.const(0.0, "float32")
            for i in range(tall * wide):
                b.buffer_store(acc, zero, [i])
            base = (product * count + p) * runs * width
            with b.serial(0, -(-runs // step)) as stage:
                for i in range(64 * step // 256):
                    row, k = tile * 64 + i * 16 + ty, stage * step + tx
                    value = a[(product * rows + row) * depth + k]
                    value = tirx.if_then_else(tirx.all(row < rows, k < depth), value, zero)
                    b.buffer_store(left, value, [(i * 16 + ty) * (step + 1) + tx])
                for i in range(step * width // 256):
                    at = i * 256 + thread
                    k = stage * step + at // width
                    value = tirx.if_then_else(k < runs, right[base + k * width + at % width], zero)
                    b.buffer_store(shared, value, [at])
                barrier()
                with b.serial(0, step) as k:
                    for i in range(tall):
                        for j in range(wide):
                            value = left[(ty + 16 * i) * (step + 1) + k] * shared[k * width + tx + 16 * j]
                            b.buffer_store(acc, acc[i * wide + j] + value, [i * wide + j])
                barrier()
            for i in range(tall):
                row = tile * 64 + ty + 16 * i
                with when(row < rows if rows % 64 else True):
                    for j in range(wide):
                        place = (product * rows + row) * columns + p * width + tx + 16 * j
                        b.buffer_store(o, acc[i * wide + j], [place])

    arguments = [
        ("a", (batch, rows, depth), "float32"),
        ("b", (batch, *panels.shape), "float32"),
        ("o", (batch, rows, columns), "float32"),
    ]
    return prim_func(arguments, body)
