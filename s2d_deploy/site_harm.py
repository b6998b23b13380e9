"""Harm: what each activation site does to the model's output when it alone is quantized at 4 bits.

A site's error over its bulk (`attribution`) says how badly its own numbers are kept, not what the model loses by it:
the inputs of a layer that the output hardly depends on may be lost altogether. Here the output itself is asked. One
simulation is made, all its quantizers are switched off, and each is switched on alone (the error power of
`error_analysis.output_error` with `error_analysis.subset` on one site, without a copy of the model for each).

Cost: for S sites and n samples S + 2 forward passes over n samples, so a site costs as much as n more samples in the
diagnosis without its statistics. Both are capped: few samples are enough for sums over many sites, and above `most`
sites the remaining ones are quantized together. Memory: a copy of the model, a histogram for each site, the
samples and their outputs.

What is lost: samples that were not looked at (an outlier in one of a hundred is not among eight), errors of sites that
cancel or amplify each other, and, where a few tokens hold most of the output's power, what happens to the others.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from s2d_deploy.attention import quantizer_name
from s2d_deploy.calibrate import calibrate
from s2d_deploy.error_analysis import float_outputs, simulated_error
from s2d_deploy.errors import DataError, message
from s2d_deploy.plan import Op
from s2d_deploy.quantize import build_plan
from s2d_deploy.session import Progress
from s2d_deploy.simulation import simulate

log = logging.getLogger(__name__)

HARM_SAMPLES = 8
# ViT-Base and BERT-Base have some 120 sites, the large models 240.
HARM_SITES = 256
Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Harm:
    """What the sites do to the output.

    Attributes:
        sites: by site, the relative error power ``sum |y - y'|^2 / sum |y|^2`` of the output with this site alone at
            4 bits. Empty where it cannot be measured.
        rest: the same with all sites together that are not in `sites`; 0 where there are none.
        samples: how many were run.
    """

    sites: dict[str, float] = field(default_factory=dict)
    rest: float = 0.0
    samples: int = 0


def site_harm(
    model: nn.Module,
    ops: Mapping[str, Op],
    batches: Iterable[Batch],
    output: str | None,
    *,
    first: Sequence[str] = (),
    samples: int = HARM_SAMPLES,
    most: int = HARM_SITES,
    progress: Progress | None = None,
) -> Harm:
    """Quantize each activation site of `ops` alone, per tensor at 4 bits with MSE ranges of the same samples.

    Args:
        model: the float model; left as it was.
        ops: from `discovery.discover`.
        batches: the first `samples` samples of them are read, and no more.
        output: of the model; None: the only one, or the first tensor of floats.
        first: sites to measure first where there are more than `most`.
        samples: at most so many.
        most: at most so many sites are measured singly; the others together.
        progress: called with one line of text for each site.

    Raises:
        DataError: no samples.
    """
    few = first_samples(batches, samples)
    if not few:
        raise DataError(message("the harm of the sites has no samples", expected="at least one"))
    training = model.training
    model.eval()
    try:
        calibration = calibrate(model, ops, few)
        name = output if output is not None else _first_output(model, few[0])
        if name is None:
            log.warning("the harm of the sites is not measured: the model has no output of floats")
            return Harm()
        plan = build_plan(model, ops, calibration, "w16a4")  # activations alone: no weight is searched
        reference = float_outputs(model, few, name)
        simulated = simulate(model, plan).eval()
    finally:
        model.train(training)
    switches = {
        site: (simulated.get_submodule(_owner(op)), quantizer_name(role))
        for op in ops.values()
        for site, role in op.sites
        if site in plan.sites
    }
    quantizers = {site: getattr(owner, attribute) for site, (owner, attribute) in switches.items()}

    def switch(sites: Iterable[str], on: bool) -> None:
        for site in sites:
            owner, attribute = switches[site]
            setattr(owner, attribute, quantizers[site] if on else nn.Identity())

    def error(sites: Sequence[str]) -> float:
        switch(sites, on=True)
        found = simulated_error(simulated, few, name, reference)
        switch(sites, on=False)
        return found

    switch(switches, on=False)
    order = [site for site in dict.fromkeys(first) if site in switches]
    order += [site for site in switches if site not in set(order)]
    singly, together = order[:most], order[most:]
    found: dict[str, float] = {}
    for number, site in enumerate(singly, start=1):
        if progress is not None:
            progress(f"harm of each site {number}/{len(singly)}")
        found[site] = error([site])
    rest = error(together) if together else 0.0
    if not all(math.isfinite(value) for value in (*found.values(), rest)):
        log.warning("the harm of the sites is not measured: the output is zero or not finite")
        return Harm()
    # In the order of the model, not of the measurement.
    return Harm({s: found[s] for s in switches if s in found}, rest, calibration.samples)


def first_samples(batches: Iterable[Batch], samples: int) -> list[dict[str, Tensor]]:
    """The first `samples` samples in batches as they come, the last one cut; no batch more is read than needed."""
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        size = next(iter(batch.values())).shape[0]
        found.append({name: tensor[:samples] for name, tensor in batch.items()})
        samples -= size
        if samples <= 0:
            break
    return found


def _owner(op: Op) -> str:
    return op.name.rpartition(".")[0] if op.kind in ("scores", "context") else op.name


def _first_output(model: nn.Module, batch: Batch) -> str | None:
    with torch.no_grad():
        result = model(**{name: tensor[:1] for name, tensor in batch.items()})
    if isinstance(result, Tensor):
        return ""
    named = result.items() if isinstance(result, Mapping) else ()
    return next((n for n, x in named if isinstance(x, Tensor) and x.is_floating_point()), None)


__all__ = ["HARM_SAMPLES", "HARM_SITES", "Harm", "first_samples", "site_harm"]
