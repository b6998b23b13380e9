"""Recipe passes: what they are, which exist, and how a list of them runs.

A pass is a function ``apply(quantized, context, options) -> Quantized``. It owns the model that it is given (the runner
copies the user's once) and may change it in place. Three kinds, in this order:

- **transform**: changes the float model without changing its function (smoothing, rotation), before ranges are set;
- **ranges**: fills the Plan's sites (`ranges`; put in where a recipe does not list it);
- **weights**: given a Plan, chooses other codes for the weights (GPTQ, AdaRound, ERQ) or other scales. A weight that
  such a pass leaves behind lies *on its grid*: rounding it to nearest gives the chosen codes, so simulation, export and
  every runtime need to know nothing of the pass. The runner checks this.

A pass that cannot serve a model says so by name (`ModelError`), and nothing is silently left out: what a pass did is
recorded in ``plan.info["passes"]``.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import combinations, pairwise
from typing import Any, Literal, Protocol, cast

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from s2d_deploy.calibrate import Calibration, calibrate
from s2d_deploy.errors import DataError, PlanError, RecipeError, message
from s2d_deploy.fake_quant import dequantize, quantize
from s2d_deploy.plan import Op, Plan
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.session import Progress

Batch = Mapping[str, Tensor]
Kind = Literal["transform", "ranges", "weights"]


class Options(BaseModel):
    """What every pass's ``Options`` inherits: unknown keys are errors, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A float model and how it is quantized.

    Attributes:
        model: in eval mode; weights may already lie on their grids.
        plan: its ops; without sites until the ranges are set.
    """

    model: nn.Module
    plan: Plan


@dataclass(frozen=True)
class Context:
    """What a pass may read.

    Attributes:
        batches: gives the same calibration batches at every call; the only data there is.
        output: the model output that is exported.
        config: how ranges are set (`ranges`), and which ops stay float.
        seed: of every random choice.
        progress: called with a sentence now and then.
        statistics: histograms of a model's activation sites; a pipeline puts its cache here.
        reference: for passes of kind "weights": the float model as the transforms left it, which several such passes in
            a row all compare with. The runner puts it in; None where a pass is called by itself.
        learned: scales that were trained with the weights (LSQ): `ranges` takes them in place of calibrated ones.
    """

    batches: Callable[[], Iterable[Batch]]
    output: str
    config: QuantizeConfig = field(default_factory=QuantizeConfig)
    seed: int = 0
    progress: Progress = field(default=lambda _text: None)
    statistics: Callable[[nn.Module, Mapping[str, Op]], Calibration] | None = None
    reference: nn.Module | None = None
    learned: Plan | None = None

    def calibration(self, model: nn.Module, ops: Mapping[str, Op]) -> Calibration:
        """Histograms of `model`'s activation sites over the calibration batches."""
        if self.statistics is not None:
            return self.statistics(model, ops)
        return calibrate(model, ops, self.batches(), self.progress, self.config.padding)


class Apply(Protocol):
    """The function that every pass module calls ``apply``."""

    def __call__(self, quantized: Quantized, context: Context, options: Any) -> Quantized:
        """Do the pass."""


@dataclass(frozen=True, slots=True)
class PassEntry:
    """One line of the table.

    Attributes:
        module: holds ``Options`` (pydantic) and ``apply``.
        kind: when it may run.
        title: the field's name of the method, and its source.
    """

    module: str
    kind: Kind
    title: str


PASSES: dict[str, PassEntry] = {
    "equalization": PassEntry(
        "s2d_deploy.ptq.equalization", "transform", "Cross-layer equalization (Nagel et al., arXiv 1906.04721)"
    ),
    "rotation": PassEntry("s2d_deploy.ptq.rotation", "transform", "QuaRot (Ashkboos et al., arXiv 2404.00456)"),
    "smoothquant": PassEntry("s2d_deploy.ptq.smoothquant", "transform", "SmoothQuant (Xiao et al., arXiv 2211.10438)"),
    "awq": PassEntry("s2d_deploy.ptq.awq", "transform", "AWQ, scaling (Lin et al., arXiv 2306.00978)"),
    "flatquant": PassEntry("s2d_deploy.ptq.flatquant", "transform", "FlatQuant (Sun et al., arXiv 2410.09426)"),
    "repq": PassEntry("s2d_deploy.ptq.repq", "transform", "RepQ-ViT, Li et al., arXiv 2212.08254"),
    "ranges": PassEntry("s2d_deploy.ptq.ranges", "ranges", "Range setting and round to nearest"),
    "ptq4vit": PassEntry("s2d_deploy.ptq.ptq4vit", "ranges", "PTQ4ViT (Yuan et al., arXiv 2111.12293)"),
    "modelopt": PassEntry(
        "s2d_deploy.ptq.modelopt_bridge", "ranges", "A preset of NVIDIA ModelOpt, read into the Plan"
    ),
    "mixed": PassEntry(
        "s2d_deploy.ptq.mixed", "ranges", "Mixed precision by sensitivity (after HAWQ, arXiv 1905.03696)"
    ),
    "awq_clip": PassEntry("s2d_deploy.ptq.awq_clip", "weights", "AWQ, clipping (Lin et al., arXiv 2306.00978)"),
    "gptq": PassEntry("s2d_deploy.ptq.gptq", "weights", "GPTQ (Frantar et al., arXiv 2210.17323)"),
    "adaround": PassEntry("s2d_deploy.ptq.adaround", "weights", "AdaRound (Nagel et al., arXiv 2004.10568)"),
    "erq": PassEntry("s2d_deploy.ptq.erq", "weights", "ERQ (Zhong et al., arXiv 2407.06794)"),
    "norm_tweaking": PassEntry(
        "s2d_deploy.ptq.norm_tweaking", "weights", "Norm tweaking (Li et al., arXiv 2309.02784)"
    ),
    "bias_correction": PassEntry(
        "s2d_deploy.ptq.bias_correction", "weights", "Bias correction (Nagel et al., arXiv 1906.04721)"
    ),
}


ROUNDING = ("gptq", "adaround", "erq")
_MIXED = "works on channels that {0} has mixed"
# (first, second) -> why {1} may not come behind {0}, and what works.
_CONFLICTS: dict[tuple[str, str], tuple[str, str]] = {
    **{("rotation", name): (_MIXED, "list {1} before {0}") for name in ("smoothquant", "awq", "equalization")},
    ("rotation", "repq"): (_MIXED, "keep one of them"),
    ("repq", "rotation"): ("mixes the channels whose ranges {0} has evened out", "keep one of them"),
    **{
        ("flatquant", name): ("changes what {0} was learned on", "list {0} behind the other transforms")
        for name in ("smoothquant", "awq", "equalization", "rotation", "repq")
    },
    **{
        (first, second): ("makes another error than the one that {0} has corrected", "list {1} before {0}")
        for first in ("bias_correction", "norm_tweaking")
        for second in ROUNDING
    },
    **{
        (first, second): ("finds weights that {0} has rounded", "keep one of them")
        for first in ROUNDING
        for second in ROUNDING
        if first != second
    },
}


@dataclass(frozen=True, slots=True)
class Step:
    """A pass with its checked options."""

    name: str
    options: Options

    @property
    def kind(self) -> Kind:
        """When it may run."""
        return PASSES[self.name].kind

    def document(self) -> dict[str, Any]:
        """For the plan: ``{"name": ..., options}``."""
        return {"name": self.name, **self.options.model_dump(mode="json")}


def parse_steps(passes: Sequence[str | Mapping[str, Any]], key: str = "quantize.passes") -> list[Step]:
    """Checked passes of a recipe's list, `ranges` put behind the transforms where it is not listed.

    Args:
        passes: names, or single-entry mappings ``{name: {option: value}}``.
        key: named in errors.

    Raises:
        RecipeError: unknown pass or option (with a suggestion), a bad value, or passes that undo each other or stand in
            an order that cannot be (with the order that works).
    """
    steps = []
    for entry in passes:
        name, given = _entry(entry, key)
        if name not in PASSES:
            close = get_close_matches(name, PASSES, n=1, cutoff=0.5)
            raise RecipeError(
                message(
                    f"{key}: unknown pass {name!r}",
                    expected=f"one of {', '.join(PASSES)}",
                    fix=f"did you mean {close[0]!r}?" if close else None,
                )
            )
        steps.append(Step(name, _options(name, given, f"{key}.{name}")))
    names = [step.name for step in steps]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise RecipeError(message(f"{key}: listed twice: {', '.join(twice)}"))
    for pair in combinations(names, 2):
        if pair in _CONFLICTS:
            why, fix = _CONFLICTS[pair]
            raise RecipeError(
                message(
                    f"{key}: {pair[1]!r} behind {pair[0]!r} {why.format(*pair)}",
                    found=", ".join(names),
                    fix=fix.format(*pair),
                )
            )
    setting = [step.name for step in steps if step.kind == "ranges"]
    if len(setting) > 1:
        raise RecipeError(message(f"{key}: {' and '.join(setting)} both set ranges", fix="keep one of them"))
    if not setting:
        behind = sum(step.kind == "transform" for step in steps)
        transforms_first = all(step.kind == "transform" for step in steps[:behind])
        steps.insert(behind if transforms_first else len(steps), Step("ranges", _options("ranges", {}, key)))
    order = ["transform", "ranges", "weights"]
    for before, after in pairwise(steps):
        if order.index(after.kind) < order.index(before.kind):
            raise RecipeError(
                message(
                    f"{key}: {after.name!r} cannot come behind {before.name!r}",
                    expected="passes that transform the float model, then ranges, then passes that choose weights",
                    found=", ".join(names),
                )
            )
    return steps


def run_passes(
    model: nn.Module, ops: Mapping[str, Op], precision: str, steps: Sequence[Step], context: Context
) -> Quantized:
    """Run `steps` in order on a copy of `model`.

    Args:
        model: the float model; left as it was.
        ops: its contractions, from `discovery.discover`.
        precision: e.g. ``"w4a4"``.
        steps: from `parse_steps`.
        context: data and settings.

    Raises:
        PlanError: a pass left a weight off its grid.
        DataError: NaN or infinity in the calibration data.
        S2DDeployError: whatever a pass refuses.
    """
    quantized = Quantized(copy.deepcopy(model).eval(), Plan(precision, dict(ops)))
    context = replace(context, batches=_finite(context.batches))
    for step in steps:
        context.progress(step.name)
        apply = cast(Apply, importlib.import_module(PASSES[step.name].module).apply)
        if step.kind == "weights" and context.reference is None:
            context = replace(context, reference=copy.deepcopy(quantized.model))
        quantized = apply(quantized, context, step.options)
        if step.kind == "weights":
            _check_on_grid(quantized, step.name)
    quantized.plan.info["passes"] = [step.document() for step in steps]
    return quantized


def _finite(batches: Callable[[], Iterable[Batch]]) -> Callable[[], Iterable[Batch]]:
    """`batches`, each looked at: a NaN spreads into every sum, and not every pass would fall over it."""

    def checked() -> Iterator[Batch]:
        for index, batch in enumerate(batches()):
            for name, values in batch.items():
                if values.is_floating_point() and not bool(torch.isfinite(values).all()):
                    found = int((~torch.isfinite(values)).sum())
                    raise DataError(
                        message(
                            f"calibration batch {index}, input {name!r}: NaN or infinity",
                            expected="finite values",
                            found=f"{found} of {values.numel()}",
                            fix="leave those samples out, or mend what reads them",
                        )
                    )
            yield batch

    return checked


def put_on_grid(quantized: Quantized, site: str, codes: Tensor, source: str) -> None:
    """Give the weight of `site` the values of `codes` (int32, the weight's shape) and record who did it."""
    found = quantized.plan.sites[site]
    layer = quantized.model.get_submodule(found.op)
    with torch.no_grad():
        cast(Tensor, layer.weight).copy_(dequantize(codes, found.scale, found.zero_point, found.grid))
    quantized.plan.sites[site] = replace(found, source=source)


def _check_on_grid(quantized: Quantized, name: str) -> None:
    """Rounding a weight that a pass chose must give the chosen codes: half a code away would be another model."""
    for site in quantized.plan.sites.values():
        if site.role != "weight" or not site.source.startswith(name):
            continue
        weight = cast(Tensor, quantized.model.get_submodule(site.op).weight).detach()
        codes = quantize(weight, site.scale, site.zero_point, site.grid)
        if not torch.equal(dequantize(codes, site.scale, site.zero_point, site.grid), weight):
            raise PlanError(message(f"pass {name!r} left the weight of {site.op!r} off its grid"))


def _entry(entry: str | Mapping[str, Any], key: str) -> tuple[str, Mapping[str, Any]]:
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, given = next(iter(entry.items()))
        if isinstance(name, str) and (given is None or isinstance(given, Mapping)):
            return name, given or {}
    raise RecipeError(
        message(f"{key}: not a pass", expected="a name, or {name: {option: value}}", found=repr(entry)[:80])
    )


def _options(name: str, given: Mapping[str, Any], key: str) -> Options:
    kind = cast(type[Options], importlib.import_module(PASSES[name].module).Options)
    try:
        return kind.model_validate(dict(given))
    except ValidationError as error:
        lines = []
        for e in error.errors(include_url=False):
            option = ".".join(map(str, e["loc"]))
            if e["type"] == "extra_forbidden":
                close = get_close_matches(option, kind.model_fields, n=1, cutoff=0.5)
                lines.append(
                    message(
                        f"{key}: unknown option {option!r}",
                        expected=f"one of {', '.join(sorted(kind.model_fields)) or 'none'}",
                        fix=f"did you mean {close[0]!r}?" if close else "remove it",
                    )
                )
            else:
                text = e["msg"]
                lines.append(message(f"{key}.{option}: {text[0].lower()}{text[1:]}", found=repr(e["input"])[:80]))
        raise RecipeError("\n  ".join(lines)) from error


__all__ = [
    "PASSES",
    "Apply",
    "Batch",
    "Context",
    "Options",
    "PassEntry",
    "Quantized",
    "Step",
    "parse_steps",
    "put_on_grid",
    "run_passes",
]
