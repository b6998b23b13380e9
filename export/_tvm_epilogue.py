"""What a kernel does with a value before it leaves the registers: scales, bias, GELU, residual, the next quantizer.

An epilogue is data, not code: a list of elementwise steps and where their operands and results lie. Equal epilogues of
equal products are one compiled function, whatever layer they stand in. `evaluate` writes them as TIR expressions; every
step computes what the ONNX operator of the same name says, in the same order, in FP32.

Codes leave a kernel as *bytes*: unsigned, signed codes plus 128, because the byte dot product of the next kernel wants
them so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from . import _tvm_math as fast
from ._tvm_builder import ir

SIGNED_OFFSET = 128

Argument = tuple[Literal["value", "operand"], int] | tuple[Literal["constant"], float]


@dataclass(frozen=True, slots=True)
class Place:
    """Where the elements of a tensor lie, for a product's (batch, batch within it, row, column).

    Attributes:
        shape: of the tensor, as the graph has it.
        strides: elements from one index to the next of each of the four; 0 where it is the same for all.
        dtype: of the elements.
    """

    shape: tuple[int, ...]
    strides: tuple[int, int, int, int]
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class Step:
    """One elementwise operator; its result is the value with the step's number plus one (value 0 is the product's).

    Attributes:
        op: of `OPERATORS`, or ``"quantize"``: round half to even, zero point, clamp, as a byte.
        arguments: what it reads.
        low, high, zero: of "quantize": range of the codes, and their zero point.
        offset: of "quantize": 128 for signed codes, 0 for unsigned ones.
    """

    op: str
    arguments: tuple[Argument, ...]
    low: int = 0
    high: int = 0
    zero: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Epilogue:
    """Steps from a product's int32 accumulators (as float32: value 0) to what is stored.

    Attributes:
        operands: tensors that the steps read.
        steps: in order.
        outputs: value and place of each tensor that is stored; value -1 are the int32 accumulators themselves.
    """

    operands: tuple[Place, ...] = ()
    steps: tuple[Step, ...] = ()
    outputs: tuple[tuple[int, Place], ...] = ()


def _relu(x: Any) -> Any:
    from tvm import tirx

    return tirx.max(x, tirx.const(0.0, "float32"))


OPERATORS: dict[str, Callable[..., Any]] = {
    "Identity": lambda a: a,
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b,
    "Relu": _relu,
    "Gelu": fast.gelu,
    "GeluTanh": fast.gelu_tanh,
    "Erf": fast.erf,
    "Exp": fast.exp,
    "Tanh": fast.tanh,
    "Sigmoid": fast.sigmoid,
}


def evaluate(steps: Sequence[Step], first: Any, load: Callable[[int], Any], keep: Callable[[Any], Any]) -> list[Any]:
    """Every value of `steps` as a TIR expression of type float32 (uint8 for bytes), the first one included.

    Args:
        steps: of an epilogue.
        first: value 0.
        load: gives the element of an operand.
        keep: is given every float value and returns what reads it, so that no expression is computed twice.
    """
    from tvm import tirx

    values = [first]
    for step in steps:
        given = []
        for kind, which in step.arguments:
            if kind == "constant":
                given.append(tirx.const(float(which), "float32"))
            else:
                given.append(values[int(which)] if kind == "value" else load(int(which)))
        if step.op == "quantize":
            values.append(byte_code(given[0], given[1], step))
        else:
            values.append(keep(OPERATORS[step.op](*given)))
    return values


def byte_code(x: Any, scale: Any, step: Step) -> Any:
    """The byte of a value: ``clamp(round_half_even(x / scale) + zero) + offset``.

    Clamped before it is rounded, which is the same, since the bounds are integers; then rounding needs no instruction
    of its own (`_tvm_math.small_integer`).
    """
    from tvm import tirx

    def f(value: int) -> Any:
        return tirx.const(float(value), "float32")

    clamped = tirx.max(tirx.min(x / scale, f(step.high - step.zero)), f(step.low - step.zero))
    return (fast.small_integer(clamped) + (step.zero + step.offset)).astype("uint8")


def place_of(place: Place, outer: Any, inner: Any, row: Any, column: Any) -> Any:
    """Flat index of an element."""
    index: Any = 0
    for stride, at in zip(place.strides, (outer, inner, row, column), strict=True):
        if stride:
            index = index + at * stride
    return index


def scratch_of(epilogue: Epilogue, lanes: int) -> list[Any]:
    """A vector for each float step, so that no value is computed twice."""
    steps = sum(step.op != "quantize" for step in epilogue.steps)
    return [ir().alloc_buffer((lanes,), "float32") for _ in range(steps)]


def store(
    epilogue: Epilogue,
    operands: tuple[Any, ...],
    outputs: tuple[Any, ...],
    accumulator: Any,
    at: tuple[Any, Any, Any, Any],
    scratch: list[Any],
    lane: Any,
) -> None:
    """The epilogue of one element; inside a vectorized loop over `lane`, of a vector."""
    values = values_of(epilogue, operands, accumulator, at, scratch, lane)
    for (value, place), output in zip(epilogue.outputs, outputs, strict=True):
        ir().buffer_store(output, accumulator if value < 0 else values[value], [place_of(place, *at)])


def values_of(
    epilogue: Epilogue,
    operands: tuple[Any, ...],
    accumulator: Any,
    at: tuple[Any, Any, Any, Any],
    scratch: list[Any],
    lane: Any,
) -> list[Any]:
    """Every value of the epilogue for one element, each kept in a vector of its own."""
    free = list(scratch)

    def keep(value: Any) -> Any:
        buffer = free.pop()
        ir().buffer_store(buffer, value, [lane])
        return buffer[lane]

    def load(i: int) -> Any:
        return operands[i][place_of(epilogue.operands[i], *at)]

    return evaluate(epilogue.steps, accumulator.astype("float32"), load, keep)
