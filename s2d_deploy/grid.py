"""What a quantized number is: one frozen dataclass that every consumer reads.

    code = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)        x' = (code - zero_point) * scale

A Grid says which codes exist and which elements share a scale. It holds no scale: scales are
measured (see `observers`) and live in the Plan. Nobody else in this package writes 2**bits.

Other formats than uniform integers (FP4, logarithmic, twin) have ``x' = value(code) * scale`` with values from
`formats`. They have no qmin and qmax: whoever computes with integer bounds is refused by name, not served wrongly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from s2d_deploy.errors import PlanError, message

ScaleRule = Literal["qmax", "qmin"]
Format = Literal["int", "e2m1", "log2", "logsqrt2", "twin"]
ScaleFormat = Literal["fp32", "e4m3", "e8m0"]
# NVFP4 (16) and OCP MX v1.0 (32): elements that share one 8-bit scale.
BLOCK_OF_SCALE_FORMAT = {"e4m3": 16, "e8m0": 32}


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


@dataclass(frozen=True, slots=True)
class PerTokenBlock:
    """One scale for each run of `size` elements of the last axis, at run time: ``(B, T, K) -> (B, T, K / size)``."""

    size: int
    kind: Literal["token-block"] = "token-block"


Granularity = PerTensor | PerAxis | PerToken | PerBlock | PerTokenBlock


@dataclass(frozen=True, slots=True)
class Grid:
    """A uniform integer grid, or one of the formats below.

    Attributes:
        bits: width of a code, 2 to 8.
        signed: two's complement codes; otherwise codes start at 0.
        symmetric: the zero point is 0 and not stored as a parameter to be learned. An unsigned
            symmetric grid serves non-negative tensors (softmax output).
        narrow: drop the most negative code, so that the range is -qmax .. qmax.
        granularity: which elements share a scale.
        scale_rule: a symmetric signed scale is absmax / qmax ("qmax") or absmax / -qmin ("qmin").
        format: "int"; "e2m1" (4-bit float: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives); "log2" and "logsqrt2"
            (powers of 1/2 or of its root, for softmax output); "twin" (two uniform ranges, a fine and a coarse one).
        scale_format: of block scales: "fp32"; "e4m3" beside one FP32 scale for the tensor (NVFP4); "e8m0" (MXFP4).
        shift: "twin" only: the coarse step is the fine one (the scale) times 2 to this power.
    """

    bits: int
    signed: bool = True
    symmetric: bool = True
    narrow: bool = False
    granularity: Granularity = PerTensor()
    scale_rule: ScaleRule = "qmax"
    format: Format = "int"
    scale_format: ScaleFormat = "fp32"
    shift: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise PlanError(message("Grid.bits is out of range", expected="2 to 8", found=str(self.bits)))
        if self.narrow and not self.signed:
            raise PlanError(message("Grid.narrow needs a signed grid", fix="drop narrow, or set signed"))
        if isinstance(self.granularity, PerToken) and not self.symmetric:
            raise PlanError(message("a per-token grid must be symmetric", found="symmetric=False"))
        self._check_format()

    def _check_format(self) -> None:
        g = self.granularity
        plain = self.symmetric and not self.narrow
        fits = {
            "int": not isinstance(g, PerTokenBlock),
            "e2m1": plain and self.signed and self.bits == 4,
            "log2": plain and not self.signed and isinstance(g, PerTensor),
            "logsqrt2": plain and not self.signed and isinstance(g, PerTensor),
            "twin": plain and isinstance(g, PerTensor) and 0 <= self.shift <= 16,
        }
        if self.format not in fits:
            raise PlanError(message("unknown Grid.format", expected=", ".join(fits), found=repr(self.format)))
        if not fits[self.format] or (self.shift and self.format != "twin"):
            raise PlanError(message(f"Grid.format {self.format!r} does not exist in this form", found=repr(self)))
        if self.scale_format != "fp32":
            size = BLOCK_OF_SCALE_FORMAT.get(self.scale_format)
            if self.format != "e2m1" or not isinstance(g, PerBlock | PerTokenBlock) or g.size != size:
                raise PlanError(
                    message(
                        f"Grid.scale_format {self.scale_format!r} does not fit",
                        expected=f"e2m1 codes in blocks of {size}" if size else "fp32, e4m3 or e8m0",
                        found=f"{self.format} codes, per {g.kind} {getattr(g, 'size', '')}".strip(),
                    )
                )

    @property
    def integer(self) -> bool:
        """Whether codes are uniform integers: what integer kernels and Q/DQ graphs compute with."""
        return self.format == "int"

    @property
    def name(self) -> str:
        """``"int8"``, ``"uint4"``, ``"nvfp4"``, ``"mxfp4"``, ``"e2m1"``, ``"log2-4"``, ``"twin4"``, ..."""
        if self.format == "int":
            return f"{'' if self.signed else 'u'}int{self.bits}"
        if self.format == "e2m1":
            return {"fp32": "e2m1", "e4m3": "nvfp4", "e8m0": "mxfp4"}[self.scale_format]
        return f"twin{self.bits}" if self.format == "twin" else f"{self.format}-{self.bits}"

    def _require_integer(self, what: str) -> None:
        if not self.integer:
            raise PlanError(
                message(
                    f"a {self.name} grid has no {what}",
                    expected="a uniform integer grid here",
                    fix="use a wN aM precision and uniform softmax and GELU grids for what needs integers",
                )
            )

    @property
    def qmin(self) -> int:
        """The smallest code. Raises PlanError for a format that is not "int"."""
        self._require_integer("smallest integer code")
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + int(self.narrow)

    @property
    def qmax(self) -> int:
        """The largest code. Raises PlanError for a format that is not "int"."""
        self._require_integer("largest integer code")
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dynamic(self) -> bool:
        """Whether scales are computed from the tensor at run time rather than stored."""
        return isinstance(self.granularity, PerToken | PerTokenBlock)

    @property
    def storage(self) -> str:
        """ONNX element type that holds a code with the least waste: INT4, UINT4, INT8, UINT8 or FLOAT4E2M1.

        Raises:
            PlanError: a format that ONNX has no type for.
        """
        if self.format == "e2m1":
            return "FLOAT4E2M1"
        self._require_integer("ONNX element type")
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
        if isinstance(g, PerTokenBlock):
            g = PerBlock(-1, g.size)
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
            kinds["token-block"] = PerTokenBlock
            _require_types(fields, granularity)
            return cls(**fields, granularity=kinds[granularity.pop("kind")](**granularity))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise PlanError(message("not a Grid", found=f"{document!r} ({error})")) from error


def _require_types(fields: dict[str, Any], granularity: dict[str, Any]) -> None:
    """A dataclass takes anything; what was read from a file must be what its annotations say (TypeError)."""
    integers = {k: v for k, v in fields.items() if k in ("bits", "shift")}
    integers |= {k: v for k, v in granularity.items() if k != "kind"}
    flags = {k: v for k, v in fields.items() if k in ("signed", "symmetric", "narrow")}
    wrong = [k for k, v in integers.items() if type(v) is not int] + [
        k for k, v in flags.items() if type(v) is not bool
    ]
    if wrong or granularity.get("size", 1) < 1:
        raise TypeError(f"wrong type or value: {', '.join(wrong) or 'size'}")
