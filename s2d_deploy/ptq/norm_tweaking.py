"""Norm tweaking: gains and biases of LayerNorms are nudged until channel statistics are those of the float model.

Li et al., arXiv 2309.02784. Norm after norm, in execution order: with everything else fixed, Adam moves one LayerNorm's
gain and bias on ``mean_c(|mu_f - mu_q| + |sigma_f^2 - sigma_q^2|)`` (equation 2), the mean and variance of each channel
over the real tokens of a batch, in the float model (f) and in the simulated one (q). The tensor that is compared is
what the next norm is given (the residual stream, where a block ends), and the model's output behind the last one; so
pre-LN and post-LN models need no table of names. Gradients pass the quantizers straight through.

Steps are bounded: gains by a share of themselves, biases by that share of the gains' root mean square. A norm whose
statistics over all calibration batches do not get closer keeps what it had, so the loss above never grows there. What
is lost: channel statistics say nothing of single tokens, so a smaller loss is not promised to be a better output; and
the float model itself, run without quantizers, is no longer what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from s2d_deploy.attention import use_visible_attention
from s2d_deploy.errors import ModelError, message
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.activations import real_tokens
from s2d_deploy.ptq.passes import Batch, Context, Quantized
from s2d_deploy.simulation import simulate

logger = logging.getLogger(__name__)


class Options(passes.Options):
    """How far, and how long."""

    learning_rate: float = Field(2e-3, gt=0, description="of Adam, relative to the gain")
    epochs: int = Field(2, ge=1, description="times that the calibration batches are gone through for each norm")
    bound: float = Field(0.1, gt=0, le=1, description="largest change of a gain, as a share of it")


@dataclass(slots=True)
class _Reached(Exception):  # noqa: N818 - not an error: the rest of the forward pass is not needed
    tensor: Tensor


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Tune every LayerNorm that something quantized follows.

    Raises:
        ModelError: the model has no LayerNorm with a gain.
    """
    reference = quantized.model if context.reference is None else context.reference
    use_visible_attention(reference)
    simulated = simulate(quantized.model, quantized.plan).eval()
    batches = list(context.batches())
    norms = norm_order(simulated, batches[0] if batches else {})
    if not norms:
        raise ModelError(
            message(
                "norm_tweaking found nothing to tune",
                expected="a LayerNorm with a gain that runs once in a forward pass",
                found=type(quantized.model).__name__,
                fix="take norm_tweaking out of quantize.passes",
            )
        )
    wanted = [_float_statistics(reference, norms, batch, context.output) for batch in batches]
    report: dict[str, list[float]] = {}
    for index, name in enumerate(norms):
        context.progress(f"norm_tweaking {index + 1} of {len(norms)}: {name}")
        following = norms[index + 1] if index + 1 < len(norms) else None
        targets = [statistics[following] for statistics in wanted]
        tuned = _Tuned(simulated, name, following, context.output, options)
        found = tuned.tune(batches, targets)
        if found is not None:
            report[name] = [float(f"{value:.4g}") for value in found]
            layer = quantized.model.get_submodule(name)
            with torch.no_grad():
                for mine, theirs in zip(layer.parameters(), simulated.get_submodule(name).parameters(), strict=True):
                    mine.copy_(theirs)
    quantized.plan.info["norm_tweaking"] = {"loss": report}
    return quantized


def norm_order(model: nn.Module, batch: Batch) -> list[str]:
    """LayerNorms with a gain that run exactly once on `batch`, in execution order."""
    calls: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, _args: calls.append(name)

    handles = [
        module.register_forward_pre_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm) and module.elementwise_affine
    ]
    try:
        if handles:
            with torch.no_grad():
                model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in dict.fromkeys(calls) if calls.count(name) == 1]


def channel_statistics(x: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Mean and variance (divided by the count) of each channel of `x` (..., C) over real tokens, ``(C,)`` each."""
    rows = x[real_tokens(batch, x)]
    mean = rows.mean(0)
    return mean, (rows - mean).square().mean(0)


def statistics_loss(x: Tensor, batch: Batch, target: tuple[Tensor, Tensor]) -> Tensor:
    """Equation 2 for one batch."""
    mean, variance = channel_statistics(x, batch)
    return (mean - target[0]).abs().mean() + (variance - target[1]).abs().mean()


class _Tuned:
    """One norm of the simulated model, tuned on what the next norm is given."""

    def __init__(self, model: nn.Module, name: str, following: str | None, output: str, options: Options) -> None:
        self.model, self.following, self.output, self.options = model, following, output, options
        self.layer = cast(nn.LayerNorm, model.get_submodule(name))
        self.gain = self.layer.weight.detach().clone()
        self.bias = None if self.layer.bias is None else self.layer.bias.detach().clone()
        self.unit = self.gain.square().mean().sqrt()

    def tune(self, batches: Sequence[Batch], targets: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float] | None:
        """Loss before and after over all batches; None where the norm does not reach what is compared."""
        before = self._total(batches, targets)
        changes = [torch.zeros_like(self.gain, requires_grad=True)]
        if self.bias is not None:
            changes.append(torch.zeros_like(self.gain, requires_grad=True))
        optimizer = torch.optim.Adam(changes, lr=self.options.learning_rate)
        for _ in range(self.options.epochs):
            for batch, target in zip(batches, targets, strict=True):
                with self._moved(changes):
                    loss = statistics_loss(self._tensor(batch), batch, target)
                if not loss.requires_grad:
                    return None
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                with torch.no_grad():
                    for change in changes:
                        change.clamp_(-self.options.bound, self.options.bound)
        with torch.no_grad():
            self._store([change.detach() for change in changes])
        after = self._total(batches, targets)
        if not after < before:
            with torch.no_grad():
                self._store([torch.zeros_like(self.gain) for _ in changes])
            return before, before
        return before, after

    def _values(self, changes: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias + self.unit * changes[1]
        return self.gain * (1 + changes[0]), bias

    def _store(self, changes: Sequence[Tensor]) -> None:
        gain, bias = self._values(changes)
        self.layer.weight.copy_(gain)
        if bias is not None:
            self.layer.bias.copy_(bias)

    @contextmanager
    def _moved(self, changes: Sequence[Tensor]) -> Iterator[None]:
        """The layer computes with changed values that gradients flow into; nothing before it is recorded."""

        def replace(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            gain, bias = self._values(changes)
            return nn.functional.layer_norm(args[0], self.layer.normalized_shape, gain, bias, self.layer.eps)

        handle = self.layer.register_forward_hook(replace)
        fixed = [p for p in self.model.parameters() if p.requires_grad]
        try:
            for parameter in fixed:
                parameter.requires_grad_(False)
            with torch.enable_grad():
                yield
        finally:
            for parameter in fixed:
                parameter.requires_grad_(True)
            handle.remove()

    def _tensor(self, batch: Batch) -> Tensor:
        return compared(self.model, self.following, batch, self.output)

    def _total(self, batches: Sequence[Batch], targets: Sequence[tuple[Tensor, Tensor]]) -> float:
        with torch.no_grad():
            losses = [statistics_loss(self._tensor(b), b, t) for b, t in zip(batches, targets, strict=True)]
        return float(torch.stack(losses).double().mean())


def compared(model: nn.Module, norm: str | None, batch: Batch, output: str) -> Tensor:
    """What norm `norm` is given, or the model's output where it is None."""
    if norm is None:
        result = model(**batch)
        return cast(Tensor, result if isinstance(result, Tensor) else result[output])

    def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        raise _Reached(args[0])

    handle = model.get_submodule(norm).register_forward_pre_hook(stop)
    try:
        model(**batch)
    except _Reached as reached:
        return reached.tensor
    finally:
        handle.remove()
    raise ModelError(message(f"norm {norm!r} did not run on a calibration batch"))


def _float_statistics(
    model: nn.Module, norms: Sequence[str], batch: Batch, output: str
) -> dict[str | None, tuple[Tensor, Tensor]]:
    """Statistics of every norm's input and (None) of the output, in one run of the float model."""
    found: dict[str | None, tuple[Tensor, Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = channel_statistics(args[0], batch)

        return see

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in norms]
    try:
        with torch.no_grad():
            result = model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    found[None] = channel_statistics(cast(Tensor, result if isinstance(result, Tensor) else result[output]), batch)
    return found
