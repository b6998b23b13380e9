"""What a quantized number is: one frozen dataclass that every consumer reads.

    code = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)        x' = (code - zero_point) * scale

A Grid says which codes exist and which elements share a scale. It holds no scale: scales are
measured (see `observers`) and live in the Plan. Nobody else in this package writes 2**bits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from s2d_deploy.errors import PlanError, message

ScaleRule = Literal["qmax", "qmin"]


@dataclass(frozen=True, slots=True)
class PerTensor:
    """One scale for all elements: ``(..., K) -> ()``."""

    kind: Literal["tensor"] = "tensor"


@dataclass(frozen=True, slots=True)
class PerAxis:
    """One scale for each index of `axis`: weight ``(N, K)``, axis 0 -> ``(N,)``. Per-channel."""

    axis: int
    kind: Literal["axis"] = "axis"


@dataclass(frozen=True, slots=True)
class PerToken:
    """One scale for each vector along the last axis, computed at run time: ``(B, T, K) -> (B, T, 1)``."""

    kind: Literal["token"] = "token"


@dataclass(frozen=True, slots=True)
class PerBlock:
    """One scale for each run of `size` elements along `axis`: weight ``(N, K)``, axis 1 -> ``(N, K / size)``."""

    axis: int
    size: int
    kind: Literal["block"] = "block"


Granularity = PerTensor | PerAxis | PerToken | PerBlock


@dataclass(frozen=True, slots=True)
class Grid:
    """A uniform integer grid.

    Attributes:
        bits: width of a code, 2 to 8.
        signed: two's complement codes; otherwise codes start at 0.
        symmetric: the zero point is 0 and not stored as a parameter to be learned. An unsigned
            symmetric grid serves non-negative tensors (softmax output).
        narrow: drop the most negative code, so that the range is -qmax .. qmax.
        granularity: which elements share a scale.
        scale_rule: a symmetric signed scale is absmax / qmax ("qmax") or absmax / -qmin ("qmin").
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    granularity: Granularity = PerTensor()
    scale_rule: ScaleRule = "qmax"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise PlanError(message("Grid.bits is out of range", expected="2 to 8", found=str(self.bits)))
        if self.narrow and not self.signed:
            raise PlanError(message("Grid.narrow needs a signed grid", fix="drop narrow, or set signed"))
        if isinstance(self.granularity, PerToken) and not self.symmetric:
            raise PlanError(message("a per-token grid must be symmetric", found="symmetric=False"))

    @property
    def qmin(self) -> int:
        """The smallest code."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed from the tensor at run time rather than stored."""
        return isinstance(self.granularity, PerToken)

    @property
    def storage(self) -> str:
        """ONNX element type that holds a code with the least waste: INT4, UINT4, INT8 or UINT8."""
        return f"{'' if self.signed else 'U'}INT{4 if self.bits <= 4 else 8}"

    @property
    def bytes_per_code(self) -> float:
        """Bytes that one code takes when packed: 0.5 or 1."""
        return 0.5 if self.bits <= 4 else 1.0

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scale tensor for a tensor of `shape`.

        Raises:
            PlanError: the axis does not exist, or the block size does not divide it.
        """
        g = self.granularity
        if isinstance(g, PerTensor):
            return ()
        if isinstance(g, PerToken):
            return (*shape[:-1], 1)
        if not -len(shape) <= g.axis < len(shape):
            raise PlanError(message(f"axis {g.axis} does not exist", found=f"shape {shape}"))
        axis = g.axis % len(shape)
        if isinstance(g, PerAxis):
            return (shape[axis],)
        if shape[axis] % g.size:
            raise PlanError(
                message(
                    "width not divisible by the block size",
                    expected=f"a multiple of {g.size} along axis {axis}",
                    found=f"{shape[axis]} in shape {shape}",
                    fix="set quantize.block_size to a divisor, or keep this layer per-channel with quantize.overrides",
                )
            )
        return (*shape[:axis], shape[axis] // g.size, *shape[axis + 1 :])

    def to_dict(self) -> dict[str, Any]:
        """A JSON document; `from_dict` reads it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, document: dict[str, Any]) -> Grid:
        """Inverse of `to_dict`.

        Raises:
            PlanError: the document is not a Grid.
        """
        try:
            fields = dict(document)
            granularity = dict(fields.pop("granularity"))
            kinds = {"tensor": PerTensor, "axis": PerAxis, "token": PerToken, "block": PerBlock}
            return cls(**fields, granularity=kinds[granularity.pop("kind")](**granularity))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(message("not a Grid", found=f"{document!r} ({error})")) from error
