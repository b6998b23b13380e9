"""Attention with visible operands.

transformers lets a model call an attention function by name. The one registered here computes plain
softmax attention and, when the calling module carries fake quantizers, passes the four operands through
them: query and key before the scores, probabilities and value before the context. An observer may
watch the same operands (discovery, calibration, verification).

Scores are scaled after the product (as transformers' eager attention does), so that query codes do not
depend on the head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTENTION_NAME = "s2d_deploy"
Watcher = Callable[[nn.Module, str, Tensor], None]
Multiplier = Callable[[nn.Module, str, Tensor, Tensor], Tensor]

_watcher: ContextVar[Watcher | None] = ContextVar("attention_watcher", default=None)
_multiplier: ContextVar[Multiplier | None] = ContextVar("attention_multiplier", default=None)


def quantizer_name(operand: str) -> str:
    """Attribute of the attention module that holds the quantizer of `operand`."""
    return f"{operand}_quantizer"


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher(attention module, operand, tensor)`` for each operand, before it is quantized."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def multiplying(multiplier: Multiplier) -> Iterator[None]:
    """Let ``multiplier(attention module, "scores" or "context", left, right)`` take both products in the block."""
    token = _multiplier.set(multiplier)
    try:
        yield
    finally:
        _multiplier.reset(token)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention.

    Args:
        module: the attention module; its ``<operand>_quantizer`` children are applied where present.
        query, key, value: ``(B, heads, T, D)``.
        attention_mask: additive, or boolean with True for visible, broadcastable to ``(B, heads, T, T)``.
        scaling: of the scores; ``D ** -0.5`` when None.
        dropout: on the probabilities, while training.

    Returns:
        Context ``(B, T, heads, D)`` and probabilities ``(B, heads, T, T)``.
    """
    if scaling is None:
        scaling = query.size(-1) ** -0.5
    query = _operand(module, "query", query)
    # Transposed before it is quantized: per-tensor quantization commutes, and the codes feed the product directly.
    key_t = _operand(module, "key", key.transpose(2, 3))
    scores = _product(module, "scores", query, key_t) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            lowest = max(torch.finfo(scores.dtype).min, torch.finfo(torch.float32).min)  # `where` makes FP32 of numbers
            attention_mask = torch.where(attention_mask, 0.0, lowest)
        scores = scores + attention_mask
    # At least FP32 whatever the model's type: a low-precision softmax is not a quantization that the plan declares.
    probs = F.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    probs = F.dropout(probs, p=dropout, training=module.training)
    context = _product(module, "context", _operand(module, "probs", probs), _operand(module, "value", value))
    return context.transpose(1, 2).contiguous(), probs


def use_visible_attention(model: nn.Module) -> bool:
    """Make a transformers model call `attention`. Returns False for a model that has no such switch."""
    switch: Callable[[str], None] | None = getattr(model, "set_attn_implementation", None)
    if switch is None:
        return False
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _mask)
    switch(ATTENTION_NAME)
    return True


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' boolean mask; None where nothing is masked, so that no Add of zeros enters the exported graph."""
    from transformers.masking_utils import sdpa_mask

    if kwargs.get("attention_mask") is None and kwargs.get("allow_is_bidirectional_skip", False):
        return None
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def _product(module: nn.Module, name: str, left: Tensor, right: Tensor) -> Tensor:
    multiplier = _multiplier.get()
    return torch.matmul(left, right) if multiplier is None else multiplier(module, name, left, right)


def _operand(module: nn.Module, operand: str, x: Tensor) -> Tensor:
    watcher = _watcher.get()
    if watcher is not None:
        watcher(module, operand, x)
    quantizer: nn.Module | None = getattr(module, quantizer_name(operand), None)
    return x if quantizer is None else quantizer(x)
