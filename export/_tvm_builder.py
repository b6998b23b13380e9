"""TensorIR written by Python, statement by statement: a thin layer over TVM's IRBuilder.

TVMScript would parse a kernel's text in 50 ms and cannot vary the number of arguments; this takes a few. Kernels see
every tensor as a flat run of elements, and compute places themselves: operands then may lie in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np


def ir() -> Any:
    """TVM's builder functions for TensorIR."""
    from tvm.tirx.script.builder import ir as builder

    return builder


def prim_func(arguments: Sequence[tuple[str, tuple[int, ...], str]], body: Callable[..., None]) -> Any:
    """A PrimFunc whose buffers, flattened, are handed to `body`.

    Args:
        arguments: name, shape and dtype of each buffer, outputs last.
        body: called once; writes the statements.
    """
    from tvm.script.ir_builder import IRBuilder

    b = ir()
    with IRBuilder() as builder:
        with b.prim_func(is_private=True, s_tir=True):
            b.func_name("kernel")
            buffers = [b.arg(name, b.buffer(shape, dtype)) for name, shape, dtype in arguments]
            b.func_attr({"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True})
            flat = [
                b.decl_buffer((int(np.prod(shape, dtype=np.int64)),), dtype, data=buffer.data)
                for buffer, (_, shape, dtype) in zip(buffers, arguments, strict=True)
            ]
            body(*flat)
        return builder.get()


def ramp(start: Any, lanes: int) -> Any:
    """`lanes` indices in a row."""
    from tvm import tirx

    return tirx.Ramp(start, 1, lanes)


def splat(value: Any, lanes: int) -> Any:
    """`value` in every lane."""
    from tvm import tirx

    return tirx.Broadcast(value, lanes)


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements that run where `condition` holds (bool: decided now; by the caller, who does not open it if False)."""
    b = ir()
    if isinstance(condition, bool):
        yield
        return
    with b.If(condition), b.Then():
        yield


def loop(work: int, limit: int) -> Any:
    """The parallel loop, or the serial one where there is less work than `limit`."""
    b = ir()
    return b.parallel if work >= limit else b.serial


@contextmanager
def shares(work: int, limit: int, count: int) -> Iterator[tuple[Any, Any]]:
    """One run of the units 0 to `count` for each worker thread: its first unit, and the one behind its last.

    TVM gives every worker the same number of iterations; here there are as many iterations as workers, asked for when
    the kernel runs. What is allocated inside lives through the whole run, so that a unit can use what the one before
    it has prepared. With less `work` than `limit` there is one run, on the calling thread.
    """
    from tvm import tirx

    b = ir()
    if work < limit:
        yield 0, count
        return
    workers = b.alloc_buffer((1,), "int32")
    b.buffer_store(workers, tirx.call_packed("runtime.NumThreads").astype("int32"), [0])
    with b.parallel(0, workers[0]) as worker:
        yield worker * count // workers[0], (worker + 1) * count // workers[0]
