"""Find the contractions of a model by running it once: nothing is guessed from names.

Every Linear and Conv2d that is really called, and the two products of every attention module that calls the
attention interface, becomes an `Op`, in execution order, with its multiply-accumulates.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.attention import use_visible_attention, watching
from s2d_deploy.errors import ModelError, message
from s2d_deploy.plan import Op

logger = logging.getLogger(__name__)


@contextmanager
def recorded_by_autograd(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and gradients for frozen parameters too, so that the graph is whole; both are put back."""
    modes = [(module, module.training) for module in model.modules()]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.eval()
    try:
        for p in frozen:
            p.requires_grad_(p.is_floating_point())
        with torch.enable_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for p in frozen:
            p.requires_grad_(False)


def discover(model: nn.Module, batch: Mapping[str, Tensor], output: str | None = None) -> dict[str, Op]:
    """The model's ops by name.

    Args:
        model: called as ``model(**batch)``; its attention implementation is switched to the visible one.
        batch: tensors whose first dimension is the batch.
        output: the output that will be exported. Ops that it does not depend on (a pooler beside the hidden
            states) are left out: they will not be in the graph.

    Raises:
        ModelError: a module is called more than once (its sites would be ambiguous), or nothing was found.
    """
    use_visible_attention(model)
    names = {module: name for name, module in model.named_modules()}
    ops: dict[str, Op] = {}
    size = next(iter(batch.values())).shape[0]
    queries: dict[str, Tensor] = {}
    witnesses: dict[str, Tensor] = {}

    def add(op: Op) -> None:
        if op.name in ops:
            raise ModelError(
                message(
                    f"layer {op.name!r} runs more than once in one forward pass",
                    expected="each layer once, so that a site has one scale",
                    fix="skip it with quantize.skip, or give each use its own module",
                )
            )
        ops[op.name] = op

    def on_layer(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        name = names[module]
        if isinstance(module, nn.Linear):
            k, n = module.in_features, module.out_features
            add(Op(name, "linear", k, n, args[0].numel() // size * n))
            witnesses[name] = output
        elif isinstance(module, nn.Conv2d):
            k = module.in_channels // module.groups * math.prod(module.kernel_size)
            add(Op(name, "conv", k, module.out_channels, output.numel() // size * k))
            witnesses[name] = output

    def on_operand(module: nn.Module, operand: str, x: Tensor) -> None:
        name = names[module]
        if operand in ("query", "probs"):
            queries[name] = x
            return
        left = queries.pop(name)
        kind = "scores" if operand == "key" else "context"
        n = x.shape[-1]
        add(
            Op(
                f"{name}.{kind}",
                "scores" if operand == "key" else "context",
                left.shape[-1],
                n,
                left.numel() // size * n,
            )
        )
        witnesses[f"{name}.{kind}"] = x

    handles = [m.register_forward_hook(on_layer) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    try:
        with recorded_by_autograd(model), watching(on_operand):
            result = model(**batch)
        unused = _unused(result, output, witnesses)
    finally:
        for handle in handles:
            handle.remove()
    if not ops:
        raise ModelError(message("the model has no Linear, Conv2d or attention", found=type(model).__name__))
    if unused:
        logger.info("not needed for output %r, left out: %s", output, ", ".join(unused))
    return {name: op for name, op in ops.items() if name not in unused}


def _unused(result: Any, output: str | None, witnesses: Mapping[str, Tensor]) -> list[str]:
    """Ops from which no path leads to the output: autograd knows."""
    if output is None or isinstance(result, Tensor):
        return []
    if output not in result:
        known = ", ".join(result.keys())
        raise ModelError(message(f"the model has no output {output!r}", expected=known, fix="set model.output"))
    reached = torch.autograd.grad(result[output].sum(), list(witnesses.values()), allow_unused=True)
    return [name for name, grad in zip(witnesses, reached, strict=True) if grad is None]
