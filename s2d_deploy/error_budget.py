"""The error budget: how error grows with depth, predicted from each layer alone, and what a sound runtime may show.

**Quantization.** Each op's own error (its output through its grids, minus its output, on float operands) is put into
the float model at every op at once, a fraction `STEP` of it with a random sign for each op, and what arrives behind
every op is measured. That is the first-order prediction ``sum_j J_oj e_j`` with independent errors: with random signs
its power is, on average, the sum of the powers of the ops' own contributions. Where the prediction and the simulation
part, errors are not independent (they cancel, or are clipped), or not small.

**Hardware.** A runtime whose every float operator is right to FP32 still rounds otherwise. A value with noise of a
standard deviation d (in codes; FP32 against FP64, measured at each site) is flipped with the probability
``d sqrt(2 / pi)``; their sum says how many codes of a sample rounding flips. What such flips set off is no small
number: behind one code that moved, every value moves a little, and codes near a boundary follow. So the simulation is
run with just as many flips (at least one a sample), at the values nearest to a boundary, at sites drawn by where they
are likely; the codes that move and the output's error are what this network makes of rounding. `MARGIN` times that, and
`RARE` samples more, is what it may show before it is a fault.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from s2d_deploy.attention import multiplying
from s2d_deploy.data import Batch
from s2d_deploy.error_analysis import decibel, product
from s2d_deploy.fake_quant import FakeQuantizer
from s2d_deploy.forced import Forced, View
from s2d_deploy.models import forward
from s2d_deploy.plan import Plan
from s2d_deploy.ptq.activations import real_tokens
from s2d_deploy.session import Array

STEP = 1.0 / 64.0
DRAWS = 2
MARGIN = 4.0
RARE = 3
_MOST = 4096  # flips put into one sample


@dataclass(frozen=True, slots=True)
class LayerBudget:
    """One op, in the order of execution.

    Attributes:
        op: its name.
        isolated_snr_db: of its own error; None where it makes none.
        predicted_snr_db: of all errors that have arrived by then, predicted.
        seen_snr_db: the same in the simulation.
    """

    op: str
    isolated_snr_db: float | None
    predicted_snr_db: float | None
    seen_snr_db: float | None


@dataclass(slots=True)
class ErrorBudget:
    """What to expect of this network.

    Attributes:
        layers: quantization error by depth; the last is the model's output, under the name ``"output"``.
        flips: codes of one sample that rounding is expected to flip by itself; may be far below 1.
        moved: codes of one sample that differ where it flipped any.
        moved_error: relative power of that sample's output error.
        samples: that this was measured on.
    """

    layers: list[LayerBudget] = field(default_factory=list)
    flips: float = 0.0
    moved: float = 1.0
    moved_error: float = 0.0
    samples: int = 0

    def _hit(self, samples: int) -> float:
        return min(MARGIN * samples * min(self.flips, 1.0) + RARE, MARGIN * samples)

    def allowed_codes(self, samples: int) -> int:
        """How many codes of so many samples may differ end to end before it is more than rounding."""
        return math.ceil(self.moved * self._hit(samples))

    def allowed_output_snr_db(self, samples: int) -> float | None:
        """The output's SNR against the simulation that this may bring; None where it moves no output."""
        error = self.moved_error * self._hit(samples) / max(samples, 1)
        return None if error <= 0.0 else decibel(error)

    def to_dict(self) -> dict[str, Any]:
        """For the report: ``parity.budget``."""
        return asdict(self)


def predict_depth(
    model: nn.Module, simulated: nn.Module, plan: Plan, batches: Iterable[Batch], output: str, draws: int = 2
) -> list[LayerBudget]:
    """Isolated, predicted and seen SNR of every quantized op and of the output.

    Args:
        model: the float model behind the plan.
        simulated: its simulation.
        plan: its quantization.
        batches: a few samples.
        output: of the model.
        draws: of signs; their powers are averaged.
    """
    ops = [name for name, op in plan.ops.items() if any(site in plan.sites for site, _ in op.sites)]
    names = [*ops, "output"]
    power = {kind: dict.fromkeys(names, 0.0) for kind in ("signal", "own", "predicted", "seen")}
    # A plan without sites: the frozen copy computes the float model, and its products can be looked at and changed.
    plain, quantized = _Products(model, plan), _Products(simulated, plan)
    own = _OwnErrors(model, plan)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for batch in batches:
            base, errors = plain.run(batch, output, own.of)
            seen, _ = quantized.run(batch, output)
            for name in names:
                real = _real(batch, base[name])
                power["signal"][name] += _power(base[name], real)
                power["seen"][name] += _power(seen[name] - base[name], real)
                if name in errors:
                    power["own"][name] += _power(errors[name], real)
            for _ in range(draws):
                signs = {n: float(torch.randint(0, 2, (), generator=generator)) * 2 - 1 for n in errors}
                moved, _ = plain.run(batch, output, added={n: e * (STEP * signs[n]) for n, e in errors.items()})
                for name in names:
                    real = _real(batch, base[name])
                    power["predicted"][name] += _power((moved[name] - base[name]) / STEP, real) / draws
    return [
        LayerBudget(
            name,
            *(_db(power[kind][name], power["signal"][name]) for kind in ("own", "predicted", "seen")),
        )
        for name in names
    ]


def predict_rounding(
    simulated: nn.Module, plan: Plan, batches: Sequence[Batch], output: str, draws: int = DRAWS
) -> tuple[float, float, float]:
    """What FP32 rounding alone does.

    Args:
        simulated: the simulation.
        plan: its quantization.
        batches: samples, looked at more than once.
        output: of the model.
        draws: of the flips.

    Returns:
        `ErrorBudget.flips`, `.moved`, `.moved_error`.
    """
    single = Forced(simulated, plan, torch.float32)
    expected = _expected_flips(simulated, plan, batches[0], output)
    if not expected:
        return 0.0, 0.0, 0.0
    total = sum(expected.values())
    seeds = min(max(round(total), 1), _MOST)
    rng = np.random.default_rng(0)
    names, chances = list(expected), np.array(list(expected.values())) / total
    moved, errors = [], []
    with torch.no_grad():
        for _ in range(draws):
            for batch in batches:
                count = len(next(iter(batch.values())))
                drawn = dict(zip(names, rng.multinomial(seeds, chances, count).T.tolist(), strict=True))
                plain: dict[str, Tensor] = {}

                def look(view: View, p: dict[str, Tensor] = plain) -> None:
                    p[view.site] = view.codes().to(torch.int16)

                different = torch.zeros(count)

                def flipped(
                    view: View, p: dict[str, Tensor] = plain, k: dict[str, list[int]] = drawn, d: Tensor = different
                ) -> Tensor:
                    codes = _nearest_flipped(view, k[view.site], len(d))
                    d += (codes.to(torch.int16) != p[view.site]).reshape(len(d), -1).sum(1)
                    return codes

                wanted = single.run(batch, output, None, look)
                single.quantizers = dict.fromkeys(plain, flipped)
                other = single.run(batch, output)
                single.quantizers = {}
                moved += different.tolist()
                if wanted is not None and other is not None:
                    noise = (other - wanted).double().square().reshape(count, -1).sum(1)
                    errors += (noise / wanted.double().square().reshape(count, -1).sum(1).clamp_min(1e-30)).tolist()
    return total, float(np.mean(moved)), float(np.mean(errors))


def _expected_flips(simulated: nn.Module, plan: Plan, batch: Batch, output: str) -> dict[str, float]:
    """Codes of one sample that FP32's noise is expected to flip, by site."""
    single, double = Forced(simulated, plan, torch.float32), Forced(simulated, plan)
    first = {name: tensor[:1] for name, tensor in batch.items()}
    exact: dict[str, Tensor] = {}
    codes: dict[str, Array] = {}
    found: dict[str, float] = {}

    def keep(view: View) -> None:
        exact[view.site], codes[view.site] = view.u, view.codes().numpy()

    def compare(view: View) -> None:
        noise = float((view.u.double() - exact.pop(view.site)).square().mean().sqrt())
        found[view.site] = noise * math.sqrt(2.0 / math.pi) * view.u.numel()

    with torch.no_grad():
        double.run(first, output, None, keep)
        single.run(first, output, codes, compare)
    # Where FP32 and FP64 agree exactly (the model's input), FP32's last bit is still unknown to a runtime's.
    return found if sum(found.values()) > 0 else {}


def _nearest_flipped(view: View, counts: Sequence[int], samples: int) -> Tensor:
    """The view's codes with the values nearest to a boundary on its other side: so many in each sample."""
    codes = view.codes()
    if not any(counts):
        return codes
    u, flat = view.u.reshape(samples, -1), codes.reshape(samples, -1).clone()
    away = u - torch.round(u)  # towards the code that is nearest to the other side
    for sample, k in enumerate(counts):
        if k:
            at = (0.5 - away[sample].abs()).topk(min(k, away.shape[1]), largest=False).indices
            flat[sample, at] += torch.sign(away[sample, at])
    grid = view.quantizer.grid
    return flat.clamp(grid.qmin, grid.qmax).reshape(codes.shape)


def make_budget(
    model: nn.Module, simulated: nn.Module, plan: Plan, batches: Sequence[Batch], output: str
) -> ErrorBudget:
    """Both predictions on a few samples."""
    return ErrorBudget(
        predict_depth(model, simulated, plan, batches, output),
        *predict_rounding(simulated, plan, batches, output),
        sum(len(next(iter(batch.values()))) for batch in batches),
    )


class _Products:
    """A model whose op outputs (attention: products) can be read and added to."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.names = {id(module): name for name, module in model.named_modules()}

    def run(
        self, batch: Batch, output: str, compare: Any = None, added: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Outputs by op (and ``"output"``), and the errors that `compare` finds at each."""
        outputs: dict[str, Tensor] = {}
        errors: dict[str, Tensor] = {}

        def keep(op: str, left: Tensor, right: Tensor, result: Tensor) -> Tensor:
            if compare is not None and (error := compare(op, left, right, result)) is not None:
                errors[op] = error
            if added is not None and op in added:
                result = result + added[op]
            outputs[op] = result
            return result

        def multiply(module: nn.Module, name: str, left: Tensor, right: Tensor) -> Tensor:
            return keep(f"{self.names[id(module)]}.{name}".lstrip("."), left, right, torch.matmul(left, right))

        def hook(op: str) -> Any:
            return lambda module, args, result: keep(op, args[0], module.weight, result)

        handles = [
            self.model.get_submodule(name).register_forward_hook(hook(name))
            for name, op in self.plan.ops.items()
            if op.kind in ("linear", "conv")
        ]
        try:
            with multiplying(multiply):
                outputs["output"] = forward(self.model, batch, output)
        finally:
            for handle in handles:
                handle.remove()
        return outputs, errors


class _OwnErrors:
    """What quantization does to one op on float operands."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.plan = plan
        self.quantizers = {n: FakeQuantizer.of(s) for n, s in plan.sites.items()}
        self.model = model
        self.weights: dict[str, Tensor] = {}

    def of(self, op: str, left: Tensor, right: Tensor, result: Tensor) -> Tensor | None:
        """The error, of the shape of `result`; None for a float op."""
        (one, _), (other, _) = self.plan.ops[op].sites
        if one not in self.quantizers and other not in self.quantizers:
            return None
        lhs = self.quantizers[one](left) if one in self.quantizers else left
        if self.plan.ops[op].kind in ("scores", "context"):
            return torch.matmul(lhs, self.quantizers[other](right) if other in self.quantizers else right) - result
        if op not in self.weights:
            self.weights[op] = self.quantizers[other](right) if other in self.quantizers else right
        return product(self.model.get_submodule(op), lhs, self.weights[op]) - result


def _real(batch: Batch, x: Tensor) -> Tensor | Any:
    return real_tokens(batch, x)


def _power(x: Tensor, real: Tensor) -> float:
    return float(x[real].double().square().sum())


def _db(noise: float, signal: float) -> float | None:
    if noise == 0.0 or signal == 0.0:
        return None
    return decibel(noise / signal)
