"""Find the contractions of a model by running it once: nothing is guessed from names.

Every Linear and Conv2d that is really called, and the two products of every attention module that calls the
attention interface, becomes an `Op`, in execution order, with its multiply-accumulates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2d_deploy.attention import use_visible_attention, watching
from s2d_deploy.errors import ModelError, message
from s2d_deploy.plan import Op


def discover(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Op]:
    """The model's ops by name.

    Args:
        model: called as ``model(**batch)``; its attention implementation is switched to the visible one.
        batch: tensors whose first dimension is the batch.

    Raises:
        ModelError: a module is called more than once (its sites would be ambiguous), or nothing was found.
    """
    use_visible_attention(model)
    names = {module: name for name, module in model.named_modules()}
    ops: dict[str, Op] = {}
    size = next(iter(batch.values())).shape[0]
    queries: dict[str, Tensor] = {}

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
        elif isinstance(module, nn.Conv2d):
            k = module.in_channels // module.groups * math.prod(module.kernel_size)
            add(Op(name, "conv", k, module.out_channels, output.numel() // size * k))

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

    handles = [m.register_forward_hook(on_layer) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), watching(on_operand):
            model(**batch)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not ops:
        raise ModelError(message("the model has no Linear, Conv2d or attention", found=type(model).__name__))
    return ops
