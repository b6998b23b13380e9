"""exp, erf, tanh and sigmoid as plain FP32 arithmetic, so that they run in vectors instead of calling libm one by one.

Errors, measured at a million points of [-30, 30] against float64: exp 1.5e-7 relative (it saturates at -87.3 and 88.7),
tanh and sigmoid 3e-7 absolute, erf 4e-7 absolute. Polynomials are interpolated at Chebyshev points when they are first
needed; none of them divides, branches or looks anything up.
Every function takes and returns a TIR expression of type float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np


def nearbyint(x: Any) -> Any:
    """Round half to even, in the default rounding mode.

    As LLVM's intrinsic: TVM's own operator makes a vectorized loop serial again, and LLVM then vectorizes whatever loop
    it likes (seen: the wrong one, with gathers, at half the speed).
    """
    from tvm import tirx

    return tirx.call_llvm_pure_intrin("float32", "llvm.nearbyint", x)


def small_integer(x: Any) -> Any:
    """|x| <= 2^22 rounded half to even, as int32: 1.5 * 2^23 is added, beyond which floats are the integers.

    `nearbyint` is a call to libm for each element where the processor has no instruction for it (x86-64 before SSE4.1).
    The sum's bits are taken, and not the sum less what was added: that difference is simplified away to `x`.
    """
    from tvm import tirx

    return tirx.reinterpret("int32", x + _f(1.5 * 2**23)) - 0x4B400000


def exp(x: Any) -> Any:
    """e^x: 2^n times a polynomial in the rest, |rest| <= ln(2) / 2 (Cody and Waite's two-part reduction)."""
    from tvm import tirx

    x = tirx.max(tirx.min(x, _f(88.72283)), _f(-87.33654))
    return _power_of_two(tirx.min(small_integer(x * _f(1.0 / math.log(2.0))), tirx.const(127, "int32")), x)


def exp_of_negative(x: Any) -> Any:
    """e^x for x <= 0, as softmax needs it: 0 is not reached, the least result is 1e-38."""
    from tvm import tirx

    x = tirx.max(x, _f(-87.33654))
    return _power_of_two(small_integer(x * _f(1.0 / math.log(2.0))), x)


def _power_of_two(n: Any, x: Any) -> Any:
    """e^x, n being x / ln 2 rounded, an int32."""
    from tvm import tirx

    whole = n.astype("float32")
    rest = x - whole * _f(0.693359375) - whole * _f(-2.12194440e-4)  # ln 2 in two parts, the first exact in few bits
    power = tirx.reinterpret("float32", (n + 127) << 23)
    return (_polynomial(_exp_coefficients(), rest) * (rest * rest) + rest + _f(1.0)) * power


def erf(x: Any) -> Any:
    """The error function: an odd polynomial where |x| < 3.8, beyond which it is 1 to within 8e-8."""
    from tvm import tirx

    x = tirx.max(tirx.min(x, _f(_ERF_END)), _f(-_ERF_END))
    place = x * x * _f(2.0 / _ERF_END**2) - _f(1.0)  # in [-1, 1], where the coefficients are small
    return x * _polynomial(_erf_coefficients(), place)


_ERF_END = 3.8


@lru_cache(maxsize=1)
def _erf_coefficients() -> tuple[float, ...]:
    """Of ``erf(x) / x`` in powers of ``2 x^2 / 3.8^2 - 1``: interpolated at 15 Chebyshev points."""

    def ratio(place: float) -> float:
        x = math.sqrt((place + 1.0) / 2.0) * _ERF_END
        return math.erf(x) / x

    return _interpolated(ratio, 14)


@lru_cache(maxsize=1)
def _exp_coefficients() -> tuple[float, ...]:
    """Of ``(e^x - 1 - x) / x^2`` on |x| <= ln(2) / 2: interpolated at 6 Chebyshev points; error of e^x 1e-9."""
    half = math.log(2.0) / 2.0

    def ratio(place: float) -> float:
        x = place * half
        return sum(x**k / math.factorial(k + 2) for k in range(20))

    return tuple(c / half**k for k, c in enumerate(_interpolated(ratio, 5)))


def _interpolated(function: Callable[[float], float], degree: int) -> tuple[float, ...]:
    """Coefficients, in rising powers, of the polynomial that meets `function` at the Chebyshev points of [-1, 1]."""
    from numpy.polynomial import chebyshev

    points = np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    series = chebyshev.chebfit(points, np.array([function(float(p)) for p in points]), degree)
    return tuple(float(c) for c in chebyshev.cheb2poly(series))


def _polynomial(coefficients: tuple[float, ...], x: Any) -> Any:
    """Even and odd powers apart: two short chains of dependent operations keep more elements in flight than one."""
    square = x * x
    return _horner(coefficients[1::2], square) * x + _horner(coefficients[0::2], square)


def _horner(coefficients: tuple[float, ...], x: Any) -> Any:
    result = _f(coefficients[-1])
    for c in coefficients[-2::-1]:
        result = result * x + _f(c)
    return result


def _f(value: float) -> Any:
    from tvm import tirx

    return tirx.const(value, "float32")


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^-x)."""
    from tvm import tirx

    one = tirx.const(1.0, "float32")
    return one / (one + exp(tirx.const(0.0, "float32") - x))


def tanh(x: Any) -> Any:
    """2 sigmoid(2x) - 1."""
    from tvm import tirx

    two = tirx.const(2.0, "float32")
    return two * sigmoid(two * x) - tirx.const(1.0, "float32")


def gelu(x: Any) -> Any:
    """x (1 + erf(x / sqrt 2)) / 2, the constants folded into erf's polynomial: half x plus half x times it."""
    from tvm import tirx

    end = _ERF_END * math.sqrt(2.0)
    inside = tirx.max(tirx.min(x, _f(end)), _f(-end))
    place = inside * inside * _f(2.0 / end**2) - _f(1.0)
    ratio = _polynomial(tuple(c * math.sqrt(0.5) for c in _erf_coefficients()), place)
    half = x * _f(0.5)
    return half * inside * ratio + half


def gelu_tanh(x: Any) -> Any:
    """The tanh form of GELU."""
    from tvm import tirx

    def f(value: float) -> Any:
        return tirx.const(value, "float32")

    inner = f(math.sqrt(2.0 / math.pi)) * (x + f(0.044715) * x * x * x)
    return f(0.5) * x * (f(1.0) + tanh(inner))
