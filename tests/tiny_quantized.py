"""Tiny models with their ops and calibration batches, for the tests of weight reconstruction."""

from __future__ import annotations

import planted
import torch
from torch import Tensor, nn

from s2d_deploy.discovery import discover
from s2d_deploy.ptq.passes import Context, Quantized, parse_steps, run_passes
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.simulation import simulate


class Convolutions(nn.Module):
    """Two convolutions (the second with groups), a pooling and a Linear."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        self.head = nn.Linear(8, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def case(kind: str) -> tuple[nn.Module, list[dict[str, Tensor]], str]:
    """A model in eval mode, its batches, the name of its output."""
    torch.set_num_threads(1)
    if kind == "bert":
        return planted.bert(), planted.texts(), "last_hidden_state"
    if kind == "vit":
        return planted.vit(), planted.images(), "last_hidden_state"
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(4, 3, 8, 8, generator=generator)} for _ in range(3)]
    return Convolutions(2 if kind == "grouped" else 1).eval(), batches, "output"


def run(kind: str, precision: str, steps: list, **config: object) -> tuple[Quantized, Context, nn.Module]:
    """The tiny model `kind` after `steps`, its context, and the float model."""
    model, batches, output = case(kind)
    ops = discover(model, {n: t[:1] for n, t in batches[0].items()}, output if kind in ("bert", "vit") else None)
    context = Context(lambda: batches, output, QuantizeConfig(**config))
    return run_passes(model, ops, precision, parse_steps(steps), context), context, model


def error(quantized: Quantized, context: Context, model: nn.Module) -> float:
    """Mean squared difference of the simulated output to the float model's, on the calibration data."""
    simulated = simulate(quantized.model, quantized.plan).eval()
    with torch.no_grad():
        pairs = [(_value(simulated(**b), context), _value(model(**b), context), b) for b in context.batches()]
    total = [(s - f).square()[b["attention_mask"].bool() if "attention_mask" in b else ...].mean() for s, f, b in pairs]
    return float(torch.stack(total).mean())


def _value(result: object, context: Context) -> Tensor:
    return result if isinstance(result, Tensor) else result[context.output]


__all__ = ["Convolutions", "case", "error", "run"]
