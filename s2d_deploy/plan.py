"""The Plan: how one model is quantized, site by site. One document for simulation, export, audit and report.

On disk a plan is two files in one folder: ``plan.json`` (ops, grids, who put them there) and
``plan.safetensors`` (``<site>.scale`` float32, ``<site>.zero_point`` int32, and ``<site>.tensor_scale`` float32 where
block scales have one beside them). No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from s2d_deploy import formats
from s2d_deploy.errors import ArtifactError, PlanError, message
from s2d_deploy.files import read_json
from s2d_deploy.grid import Grid

OpKind = Literal["linear", "conv", "scores", "context"]
Role = Literal["input", "weight", "query", "key", "probs", "value"]
PLAN_VERSION = 1


@dataclass(frozen=True, slots=True)
class Op:
    """A contraction of the model.

    Attributes:
        name: torch module path; attention products append ``.scores`` or ``.context``.
        kind: what it is.
        k: length of the inner product (for a convolution: channels per group times kernel area).
        n: number of output features (attention: columns of the right operand for the traced sample).
        macs: multiply-accumulates for one sample.
    """

    name: str
    kind: OpKind
    k: int
    n: int
    macs: int

    @property
    def sites(self) -> tuple[tuple[str, Role], tuple[str, Role]]:
        """Names and roles of the left and the right operand."""
        if self.kind == "scores":
            owner = self.name.removesuffix(".scores")
            return (f"{owner}.query", "query"), (f"{owner}.key", "key")
        if self.kind == "context":
            owner = self.name.removesuffix(".context")
            return (f"{owner}.probs", "probs"), (f"{owner}.value", "value")
        return (f"{self.name}.input", "input"), (f"{self.name}.weight", "weight")


@dataclass(frozen=True, slots=True)
class Site:
    """One quantized operand.

    Attributes:
        name: see `Op.sites`.
        op: name of the contraction it feeds.
        role: which operand.
        grid: the codes that exist.
        scale: float32 of the grid's scale shape, what a code is multiplied by; empty for a dynamic grid. With block
            scales in 8 bits, their product with `tensor_scale`.
        zero_point: int32 of the same shape.
        source: the recipe pass that put it there, e.g. ``"mse"``.
        tensor_scale: float32 scalar: the FP32 scale of the whole tensor beside E4M3 block scales (NVFP4); else None.

    Raises:
        PlanError: scales that the grid's scale format cannot store.
    """

    name: str
    op: str
    role: Role
    grid: Grid
    scale: Tensor
    zero_point: Tensor
    source: str
    tensor_scale: Tensor | None = None

    def __post_init__(self) -> None:
        if not formats.representable(self.scale, self.grid, self.tensor_scale):
            raise PlanError(
                message(
                    f"site {self.name!r}: its block scales are not {self.grid.scale_format.upper()} numbers"
                    + (" times its tensor scale" if self.grid.scale_format == "e4m3" else ""),
                    fix="make them with formats.block_scale",
                )
            )


@dataclass(slots=True)
class Plan:
    """The calibrated model's quantization.

    Attributes:
        precision: the name it was made for, e.g. ``"w4a4"``; ops may be overridden to another one.
        ops: every contraction that was seen, quantized or not, in execution order.
        sites: quantized operands by name.
        info: facts for the reader (calibration data, observers, ...), JSON only.
    """

    precision: str
    ops: dict[str, Op] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def add(self, site: Site) -> None:
        """Put a site into the plan.

        Raises:
            PlanError: its op is unknown, or another pass has already put it there.
        """
        if site.op not in self.ops:
            raise PlanError(message(f"site {site.name!r} belongs to no op", found=f"op {site.op!r}"))
        if site.name in self.sites:
            raise PlanError(
                message(f"site {site.name!r} is quantized twice", found=f"by {self.sites[site.name].source}")
            )
        self.sites[site.name] = site

    def declared(self, op: str) -> str:
        """What the plan promises for `op`: ``"W4A4"``, ``"W4A16"``, ..., or ``"float"``.

        For attention products, both operands are activations: ``"A8A8"`` would be unusual to read, so
        the left operand stands for W: ``"W8A8"``. FP4 in blocks is ``"NVFP4"`` or ``"MXFP4"``; other formats that are
        no integers are named behind: ``"W4A4 (logsqrt2-4)"``.
        """
        (left, _), (right, _) = self.ops[op].sites
        grids = [self.sites[s].grid for s in (left, right) if s in self.sites]
        if [g.name for g in grids] in (["nvfp4"] * 2, ["mxfp4"] * 2):
            return grids[0].name.upper()
        bits_left = self.sites[left].grid.bits if left in self.sites else 16
        bits_right = self.sites[right].grid.bits if right in self.sites else 16
        if bits_left == bits_right == 16:
            return "float"
        other = [g.name for g in grids if not g.integer]
        formats_named = f" ({', '.join(other)})" if other else ""
        if self.ops[op].kind in ("linear", "conv"):
            return f"W{bits_right}A{bits_left}{formats_named}"
        return f"W{max(bits_left, bits_right)}A{max(bits_left, bits_right)}{formats_named}"

    def save(self, folder: Path) -> None:
        """Write ``plan.json`` and ``plan.safetensors`` into `folder`, which exists."""
        tensors = {f"{s.name}.scale": s.scale.contiguous().clone() for s in self.sites.values()}
        tensors |= {f"{s.name}.zero_point": s.zero_point.contiguous().clone() for s in self.sites.values()}
        tensors |= {f"{s.name}.tensor_scale": s.tensor_scale for s in self.sites.values() if s.tensor_scale is not None}
        save_file(tensors, folder / "plan.safetensors")
        document = self._document() | {"tensors_sha256": _sha256((folder / "plan.safetensors").read_bytes())}
        (folder / "plan.json").write_text(json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Plan:
        """Read a plan back.

        Raises:
            ArtifactError: a file is missing, truncated, foreign, or the two do not belong together.
        """
        path = folder / "plan.json"
        try:
            document = read_json(path)
            version = document["plan_version"]
            if version != PLAN_VERSION:
                raise ArtifactError(
                    message(f"{path}: unknown plan version", expected=str(PLAN_VERSION), found=str(version))
                )
            blob = (folder / "plan.safetensors").read_bytes()
            if _sha256(blob) != document["tensors_sha256"]:
                raise ArtifactError(
                    message(
                        f"{folder / 'plan.safetensors'}: not the tensors that plan.json describes",
                        expected=f"sha256 {document['tensors_sha256'][:12]}",
                        found=f"sha256 {_sha256(blob)[:12]}",
                        fix="run `s2d-deploy quantize` again",
                    )
                )
            tensors = load_file(folder / "plan.safetensors")
            ops = {o["name"]: Op(**o) for o in document["ops"]}
            plan = cls(document["precision"], ops, {}, document["info"])
            for s in document["sites"]:
                name = s["name"]
                plan.add(
                    Site(
                        name,
                        s["op"],
                        s["role"],
                        Grid.from_dict(s["grid"]),
                        tensors[f"{name}.scale"],
                        tensors[f"{name}.zero_point"],
                        s["source"],
                        tensors.get(f"{name}.tensor_scale"),
                    )
                )
        except PlanError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
            raise ArtifactError(
                message(
                    f"{path}: not a quantization plan",
                    found=f"{type(error).__name__}: {error}",
                    fix="run `s2d-deploy quantize`",
                )
            ) from error
        return plan

    def digest(self) -> str:
        """sha256 over grids, scales and zero points: equal digests quantize alike."""
        h = hashlib.sha256(json.dumps(self._document(), sort_keys=True).encode())
        for name in sorted(self.sites):
            site = self.sites[name]
            h.update(site.scale.to(torch.float32).contiguous().numpy().tobytes())
            h.update(site.zero_point.to(torch.int32).contiguous().numpy().tobytes())
            if site.tensor_scale is not None:
                h.update(site.tensor_scale.to(torch.float32).contiguous().numpy().tobytes())
        return h.hexdigest()

    def _document(self) -> dict[str, Any]:
        return {
            "plan_version": PLAN_VERSION,
            "precision": self.precision,
            "info": self.info,
            "ops": [{"name": o.name, "kind": o.kind, "k": o.k, "n": o.n, "macs": o.macs} for o in self.ops.values()],
            "sites": [
                {"name": s.name, "op": s.op, "role": s.role, "grid": s.grid.to_dict(), "source": s.source}
                for s in self.sites.values()
            ],
        }


def sites_of(plan: Plan, ops: Iterable[Op]) -> list[Site]:
    """The quantized operands of `ops`, in order."""
    return [plan.sites[name] for op in ops for name, _ in op.sites if name in plan.sites]


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()
