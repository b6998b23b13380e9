"""Rotation: orthogonal matrices between layers spread outliers over channels (QuaRot, arXiv 2404.00456).

Three places, the first two in the weights alone:

- **The residual stream** of pre-LN models. QuaRot (Ashkboos et al.) replaces LayerNorm by RMSNorm first; here the
  random R leaves the vector of ones where it is (R 1 = 1), so that mean and variance of every token stay and LayerNorm
  itself commutes with R: ``LN(x R) = LN(x) R`` without gain and bias. Those move into the layers that read the norm;
  all that is added into the stream is multiplied with R, every reader takes R^T. A norm whose output something else
  reads too (the last one, where it is the model's output) gets ``x R^T`` in front of it, in float, at run time. In
  post-LN models (BERT) a norm's gain acts on the stream itself: left out, and listed.
- **Heads**: values with the output projection, queries with keys, by one matrix for each head.
- **Online** (`online: true`): at the Linear inputs that remain (post-LN, GELU) a block Hadamard transform at run time
  in front of the quantizer, absorbed by the weight. It costs K times `block` multiply-accumulates a token in float,
  which every audit counts.

R is random (SpinQuant, Liu et al., arXiv 2405.16406, shows how much that choice matters, and learns it; this does not).
What is lost: nothing in real arithmetic; in float32 the last bits. Not guaranteed: a lower error. Where a tensor has no
outliers, or a zero that many values share (GELU's), mixing channels can widen what one scale must cover.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import cast

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from s2d_deploy.attention import watching
from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, message
from s2d_deploy.producers import trace_producers
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.folding import Group, Unchanged, first_sample, reader_groups, shared_modules
from s2d_deploy.ptq.input_transform import BlockHadamard, Rotation, attach, hadamard
from s2d_deploy.ptq.passes import Batch, Context, Quantized
from s2d_deploy.ptq.residual import Stream, residual_streams

logger = logging.getLogger(__name__)


class Options(passes.Options):
    """Which places are rotated."""

    residual: bool = Field(True, description="Rotate the residual stream of pre-LN models, in the weights.")
    heads: bool = Field(True, description="Rotate attention's heads (values, and queries with keys), in the weights.")
    online: bool = Field(
        False, description="Put block Hadamard transforms in front of the Linears that remain, at run time."
    )
    block: int | None = Field(
        None,
        ge=2,
        description="Largest block of an online transform; null for the largest power of two that divides K.",
    )

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError("must be a power of two")
        return value


@dataclass(slots=True)
class _Done:
    """What became of each place, for ``plan.info``; `rotated` are layers whose input is rotated by weights."""

    norms: list[str] = field(default_factory=list)
    turned_back: list[str] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)
    online: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    rotated: set[str] = field(default_factory=set)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, uniform over all of them: float64 ``(size, size)``."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    signed: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)  # without it QR's choice would be in it
    return signed


def head_rotation(size: int, generator: torch.Generator) -> Tensor:
    """A Hadamard matrix with random signs where `size` is a power of two, else `orthogonal`: float64."""
    if size & (size - 1):
        return orthogonal(size, generator)
    signs = torch.randint(0, 2, (size, 1), generator=generator).double() * 2 - 1
    exact: Tensor = hadamard(size).sign().double() / size**0.5  # its float32 entries are rounded
    return signs * exact


def stream_rotation(width: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal R with ``R 1 = R^T 1 = 1``: float64 ``(width, width)``.

    A reflection P takes the ones to the first axis; R is ``P diag(1, Q) P`` with a random orthogonal Q.
    """
    v = torch.full((width,), width**-0.5, dtype=torch.float64)
    v[0] -= 1.0
    inner = _on_diagonal([torch.ones(1, 1, dtype=torch.float64), orthogonal(width - 1, generator)])
    if width == 1:
        return inner
    p: Tensor = torch.eye(width, dtype=torch.float64) - 2 * torch.outer(v, v) / v.dot(v)
    return p @ inner @ p


def _on_diagonal(blocks: Sequence[Tensor]) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Rotate every place that can be; what was left out stands in ``plan.info["rotation"]``.

    Raises:
        ModelError: nothing could be rotated; every place is listed with its reason.
    """
    model, plan = quantized.model, quantized.plan
    sample = first_sample(context.batches())
    generator = torch.Generator().manual_seed(context.seed)
    unchanged = Unchanged(model, sample)
    done = _Done()
    if options.residual:
        for stream in residual_streams(model, sample):
            context.progress(f"rotation of the residual stream that {stream.norms[0]} reads")
            _rotate_stream(model, stream, sample, generator, done)
            unchanged.check(f"rotating the residual stream that {stream.norms[0]} reads")
    if options.heads:
        context.progress("rotation of attention's heads")
        _rotate_heads(model, sample, generator, unchanged, done)
    if options.online:
        wanted = {n for n in plan.ops if not any(fnmatchcase(n, pattern) for pattern in context.config.skip)}
        for group in reader_groups(model, sample):
            _put_online(model, group, wanted, options.block, context.seed, done)
        unchanged.check("putting block Hadamard transforms in front of layers")
    if not (done.norms or done.heads or done.online):
        raise ModelError(
            message(
                "rotation can change none of the model's layers",
                found="; ".join(f"{name}: {reason}" for name, reason in done.left_out.items()) or "no place to rotate",
                fix="set rotation.online: true, or leave the pass out",
            )
        )
    if options.residual and not done.norms:
        first = next((f"{n}: {why}" for n, why in done.left_out.items() if n.startswith("residual")), "none was found")
        more = "" if options.online else "; `online: true` rotates in front of the layers instead"
        logger.warning("rotation turns no residual stream (%s)%s", first, more)
    for name, reason in done.left_out.items():
        logger.info("rotation leaves out %s: %s", name, reason)
    plan.info["rotation"] = {
        "norms": done.norms,
        "turned_back": done.turned_back,
        "heads": done.heads,
        "online": done.online,
        "left_out": done.left_out,
    }
    return Quantized(model, plan)


def _rotate_stream(model: nn.Module, stream: Stream, sample: Batch, generator: torch.Generator, done: _Done) -> None:
    groups = {g.maker: g for g in reader_groups(model, sample) if g.kind == "norm" and g.maker}
    folded = [name for name in stream.norms if name in groups and _takes_norm(model, name, groups[name])]
    title = f"residual stream of {stream.norms[0]}"
    if not stream.reasons and not folded:
        stream.reasons.append("no norm that reads it is read by Linears alone")
    tied = shared_modules(model).intersection([*stream.layers, *stream.embeddings])
    stream.reasons += [f"the weight of {name} is shared with another module" for name in sorted(tied)]
    if stream.reasons:
        done.left_out[title] = "; ".join(stream.reasons)
        return
    rotation = stream_rotation(stream.width, generator)
    for name in folded:
        _move_gain(model.get_submodule(name), [model.get_submodule(n) for n in groups[name].names])
        for reader in groups[name].names:
            _rotate_input(model.get_submodule(reader), rotation)
            done.rotated.add(reader)
    for name in stream.norms:
        if name not in folded:
            back = Rotation(stream.width)
            back.matrix.copy_(rotation.T)
            attach(model.get_submodule(name), back)
            done.turned_back.append(name)
    for name in stream.layers:
        _rotate_output(model.get_submodule(name), rotation)
    for name in stream.embeddings:
        _put(cast(Tensor, model.get_submodule(name).weight), lambda table: table @ rotation)
    for name in stream.parameters:
        _put(model.get_parameter(name), lambda row: row @ rotation)
    done.norms += folded


def _takes_norm(model: nn.Module, norm: str, group: Group) -> bool:
    """Whether the group's layers can take the norm's gain and bias."""
    layers = [model.get_submodule(name) for name in group.names]
    bias = cast("Tensor | None", model.get_submodule(norm).bias)
    needed = bias is not None and bool(bias.detach().abs().max() > 0)
    return all(isinstance(layer, nn.Linear) and (layer.bias is not None or not needed) for layer in layers)


def _move_gain(norm: nn.Module, readers: Sequence[nn.Module]) -> None:
    """``W (g n + b) + c = (W g) n + (W b + c)``: the norm keeps gain 1 and bias 0."""
    gain, bias = cast(Tensor, norm.weight), cast("Tensor | None", norm.bias)
    for layer in readers:
        weight, own = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        if own is not None and bias is not None:
            with torch.no_grad():
                own.copy_(own.double() + weight.double() @ bias.double())
        _put(weight, lambda w: w * gain.detach().double())
    with torch.no_grad():
        gain.fill_(1.0)
        if bias is not None:
            bias.zero_()


def _rotate_input(layer: nn.Module, rotation: Tensor) -> None:
    """For inputs ``x rotation``: W becomes ``W rotation``, since ``(x R) (W R)^T = x W^T``."""
    _put(cast(Tensor, layer.weight), lambda w: w @ rotation)


def _rotate_output(layer: nn.Module, rotation: Tensor) -> None:
    """Outputs become ``y rotation``: rows of a Linear's weight, filters of a Conv2d's, and the bias."""
    _put(cast(Tensor, layer.weight), lambda w: (rotation.T @ w.flatten(1)).reshape(w.shape))
    bias = cast("Tensor | None", layer.bias)
    if bias is not None:
        _put(bias, lambda b: b @ rotation)


def _put(parameter: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """In place, computed in float64, rounded once."""
    with torch.no_grad():
        parameter.copy_(change(parameter.detach().double()))


def _rotate_heads(
    model: nn.Module, sample: Batch, generator: torch.Generator, unchanged: Unchanged, done: _Done
) -> None:
    heads = _head_sizes(model, sample)
    ops = discover(model, sample)
    producers = trace_producers(model, ops, sample)
    behind = {g.maker: g for g in reader_groups(model, sample) if g.kind == "attention" and g.maker}
    for op in ops.values():
        if op.kind not in ("scores", "context"):
            continue
        owner = op.name.rpartition(".")[0]
        sites = [f"{owner}.query", f"{owner}.key"] if op.kind == "scores" else [f"{owner}.value"]
        odd = [s for s in sites if producers[s].kind != "linear" or not _is_linear(model, producers[s].module)]
        made = [producers[s].module for s in sites]
        if odd:
            p = producers[odd[0]]
            done.left_out[op.name] = f"{odd[0]} is not the output of a Linear ({p.note or p.kind})"
            continue
        if op.kind == "context" and made[0] not in behind:
            done.left_out[op.name] = f"no Linear reads the context that {made[0]} makes"
            continue
        count, size = heads[owner, "query" if op.kind == "scores" else "value"]
        writers = [cast(nn.Linear, model.get_submodule(name)) for name in made]
        readers = [model.get_submodule(n) for n in behind[made[0]].names] if op.kind == "context" else []
        if len(set(made)) < len(made) or any(w.out_features != count * size for w in writers):
            done.left_out[op.name] = f"{' and '.join(made)} do not make {count} heads of {size}"
            continue
        rotation = _on_diagonal([head_rotation(size, generator) for _ in range(count)])

        def change(
            writers: list[nn.Linear] = writers, readers: list[nn.Module] = readers, rotation: Tensor = rotation
        ) -> None:
            for layer in writers:
                _rotate_output(layer, rotation)
            for reader in readers:
                _rotate_input(reader, rotation)

        if unchanged.after([*writers, *readers], change):
            done.heads.append(op.name)
            done.rotated.update(behind[made[0]].names if op.kind == "context" else ())
        else:
            done.left_out[op.name] = f"the model reads the output of {' or '.join(made)} elsewhere"


def _is_linear(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), nn.Linear)


def _head_sizes(model: nn.Module, sample: Batch) -> dict[tuple[str, str], tuple[int, int]]:
    """Number and width of the heads of every attention's query and value."""
    names = {module: name for name, module in model.named_modules()}
    found: dict[tuple[str, str], tuple[int, int]] = {}

    def on_operand(module: nn.Module, operand: str, x: Tensor) -> None:
        if operand in ("query", "value"):
            found[names[module], operand] = x.shape[1], x.shape[3]

    with torch.no_grad(), watching(on_operand):
        model(**sample)
    return found


def _put_online(model: nn.Module, group: Group, wanted: set[str], limit: int | None, seed: int, done: _Done) -> None:
    """One block Hadamard transform in front of the layers of a group that are quantized and not rotated yet."""
    names = [name for name in group.names if name in wanted and name not in done.rotated]
    if not names:
        return
    title = ", ".join(names)
    if not all(_is_linear(model, name) for name in names):
        done.left_out[title] = "a convolution reads it"
        return
    if group.fixed:
        done.left_out[title] = group.fixed
        return
    layers = [cast(nn.Linear, model.get_submodule(name)) for name in names]
    k = layers[0].in_features
    size = min(k & -k, limit or k)  # the largest power of two that divides K
    if size == 1:
        done.left_out[title] = f"no power of two divides K = {k}"
        return
    shared = BlockHadamard(size, seed)
    for layer in layers:
        _put(layer.weight, lambda w: (w.reshape(w.shape[0], -1, size) @ shared.matrix.double()).flatten(1))
        attach(layer, shared)
    done.online[title] = size


__all__ = ["Options", "apply", "head_rotation", "orthogonal", "stream_rotation"]
