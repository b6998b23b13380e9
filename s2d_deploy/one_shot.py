"""One-shot conditioning: change weights by calibration data alone, with no training step.

Two families. *Shrinking* is the paper's aim in closed form: the leading triplets of flagged layers are shrunk, and
the change in the layer's output is made as small as calibration data allow, in the same layer (a constrained least
squares) or in the Linears that follow (ridge regression). It is approximate: the float output moves, and is measured.

*Equalizing* follows from `attribution`: where single channels of a norm or of attention's context make a quantized
site's range, each channel gets a shift and a scale, and the Linear behind takes their inverse. Exact in real
arithmetic. Where the norm feeds nothing but Linears (pre-LN) and for attention's context, the weights alone hold it
("fold"); where a residual sum reads the norm as well (post-LN, BERT) or a GELU stands in front, an elementwise
multiply-add has to be put in front of the Linear ("insert"): then the model is no longer one that transformers can
load, and the runtime pays one elementwise pass. "neurons" instead scales neurons through the GELU, which is not
homogeneous: approximate, weights only, and its error is measured. "centre" only shifts: each channel's median becomes
0, which the weights alone hold in post-LN models as well, because a bias in front of the residual sum takes it back.

What is inserted may also copy channels (outlier channel splitting: Zhao et al., arXiv 1901.09504, section 3): a channel
that arrives twice at half its size needs half the range, and no weight grows, at the price of a wider K. "bypass"
may besides lead up to four channels of a site past the quantizer in float (as LLM.int8 does: Dettmers et al., arXiv
2208.07339, section 3.2): still exact in float, but those products, 4 of K, are no longer integers.

Scales are chosen by search (`equalize_choice`). The parts are `shrink`, `refit`, `centring`, `equalize` and
`scale_neurons`; here they are composed and measured.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.centring import centre_norms
from s2d_deploy.equalize import equalize
from s2d_deploy.equalized_linear import EqualizedLinear
from s2d_deploy.errors import RecipeError, message
from s2d_deploy.evaluate import outputs, score, torch_run
from s2d_deploy.layer_inputs import calibrated_ops
from s2d_deploy.one_shot_variants import INSERTING, SHRINKING, VARIANTS, Variant, check_variants
from s2d_deploy.pcdr import Batch
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.refit import refit
from s2d_deploy.scale_neurons import scale_neurons
from s2d_deploy.session import Progress
from s2d_deploy.shrink import shrink_triplets
from s2d_deploy.simulation import simulate
from s2d_deploy.weight_change import Change

# Points below the float original up to which a result is called enough: a rule of thumb, like any gate's limit.
ENOUGH = 5.0


@dataclass(slots=True)
class OneShotResult:
    """What a variant did, and what it bought.

    Attributes:
        variant: its name.
        exact: whether the float function is the same up to rounding.
        loadable: whether transformers loads the result (no module was inserted).
        changes: every place that was changed; empty is a finding.
        cosine: mean cosine of the float output to the original's on held-out samples; for classifiers the share of
            equal decisions. 1 where nothing moved.
        metric: name of the quantized metric.
        before: by ``"w4a4/mse"``: the quantized metric of the original, in points.
        after: of the changed model. The reference is the original float model in both.
        finding: one plain sentence.
    """

    variant: str
    exact: bool
    loadable: bool
    changes: list[Change]
    cosine: float
    metric: str
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    finding: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def one_shot(
    model: nn.Module,
    calibration: Sequence[Batch],
    held_out: Sequence[Batch],
    variants: Sequence[Variant],
    *,
    output: str,
    task: str = "embedding",
    flagged: Mapping[str, int] | None = None,
    factor: float = 0.5,
    precisions: Sequence[str] = ("w8a8", "w4a8", "w4a4"),
    methods: Sequence[Literal["absmax", "percentile", "mse"]] = ("mse",),
    config: QuantizeConfig | None = None,
    before: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, OneShotResult]:
    """Apply `variants` in order to a copy of `model` and measure the copy.

    Args:
        model: the float model; left as it was.
        calibration: for every choice that is made.
        held_out: for the metric only.
        variants: of `VARIANTS`, as `one_shot_variants.check_variants` allows them.
        output: the model's output that is compared.
        task: as in `evaluate.score`.
        flagged: k_target by layer, for the shrinking variants.
        factor: what is left of a flagged singular value, 0 to 1.
        precisions: to simulate.
        methods: range methods, for weights and activations alike.
        config: ranges and layers instead of `methods`; the keys of the result are then the precisions alone.
        before: the original's quantized metrics where they are known (as in `OneShotResult.before`).
        progress: called with one line of text now and then.

    Raises:
        RecipeError: variants that cannot be applied in this order, or shrinking without `flagged`.
    """
    changed = copy.deepcopy(model).eval()
    changes = apply_variants(
        changed, calibration, variants, output=output, flagged=flagged, factor=factor, progress=progress
    )
    run = torch_run(model, output)
    reference = outputs(run, output, (dict(b) for b in held_out))
    masks = [b["attention_mask"].numpy() for b in held_out if "attention_mask" in b]
    mask = None if not masks or task != "embedding" else torch.cat([b["attention_mask"] for b in held_out]).numpy()

    def points(candidate: nn.Module) -> tuple[str, float]:
        found = outputs(torch_run(candidate, output), output, (dict(b) for b in held_out))
        result = score(task, found, reference, None, mask)
        return result.name, result.value

    name, value = points(changed)
    result = OneShotResult(
        "+".join(variants),
        exact=not any(c.what in ("shrunk", "refitted", "neurons") for c in changes),
        loadable=not any(c.what == "inserted" for c in changes),
        changes=changes,
        cosine=value / 100.0,
        metric=name,
        before=dict(before) if before is not None else {},
    )
    settings = {f"{p}/{m}": (p, QuantizeConfig(weights=m, activations=m)) for p in precisions for m in methods}
    if config is not None:
        settings = {p: (p, config) for p in precisions}
    if before is None:
        for key, simulated in _simulated(model, calibration, settings, output):
            result.before[key] = points(simulated)[1]
    for key, simulated in _simulated(changed, calibration, settings, output):
        result.after[key] = points(simulated)[1]
        if progress is not None:
            progress(f"one-shot: {result.variant}: {key} {result.after[key]:.1f}")
    result.finding = _finding(result)
    return changed, result


def apply_variants(
    model: nn.Module,
    calibration: Sequence[Batch],
    variants: Sequence[str],
    *,
    output: str,
    flagged: Mapping[str, int] | None = None,
    factor: float = 0.5,
    progress: Progress | None = None,
) -> list[Change]:
    """Apply `variants` in order to `model`, in place. Arguments, returns and errors as in `one_shot`."""
    checked = check_variants(variants)
    if flagged is None and any(v in SHRINKING for v in checked):
        raise RecipeError(
            message("shrinking needs the flagged layers", fix="pass {d.name: d.k_target} of diagnose.diagnose")
        )
    chosen = {name: k for name, k in (flagged or {}).items() if k}
    original = copy.deepcopy(model) if "shrink-next" in checked else model
    changes: list[Change] = []
    for variant in checked:
        if progress is not None:
            progress(f"one-shot: {variant}")
        if variant in SHRINKING:
            changes += shrink_triplets(model, calibration, chosen, factor=factor)
            if variant == "shrink-next" and chosen:
                changes += refit(model, original, calibration, after=list(chosen), output=output)
        elif variant == "centre":
            changes += centre_norms(model, calibration, output=output)
        elif variant == "neurons":
            changes += scale_neurons(model, calibration, output=output)
        else:
            insert = variant in INSERTING
            changes += equalize(model, calibration, insert=insert, bypass=variant == "bypass", output=output)
    return changes


def _simulated(
    model: nn.Module, calibration: Sequence[Batch], settings: Mapping[str, tuple[str, QuantizeConfig]], output: str
) -> Iterable[tuple[str, nn.Module]]:
    ops = calibrated_ops(model, calibration, output)
    statistics = calibrate(model, ops, calibration)
    for key, (precision, config) in settings.items():
        plan = build_plan(model, ops, statistics, precision, config)
        yield key, simulate(model, plan).eval()


def _finding(result: OneShotResult) -> str:
    if not result.changes:
        return f"{result.variant}: nothing to change in this model."
    gains = {key: result.after[key] - result.before[key] for key in result.after if key in result.before}
    words = ", ".join(f"{key} {result.before[key]:.1f} -> {result.after[key]:.1f}" for key in gains)
    moved = f"float cosine {result.cosine:.4f}"
    if result.metric.startswith("top-1"):
        moved = f"{result.cosine:.2%} of the float decisions as before"
    kind = "exact in float" if result.exact else moved
    enough = ""
    if gains:
        worst = min(gains, key=lambda key: result.after[key])
        missing = 100.0 - result.after[worst]
        if max(gains.values()) < 1.0:
            enough = " Not enough by itself: no precision gains a point."
        elif missing > ENOUGH:
            enough = f" Not enough by itself: {worst} still lacks {missing:.1f} points of the float original."
    where = "" if result.loadable else " It adds elementwise layers, which transformers does not load."
    return f"{result.variant}: {len(result.changes)} place(s), {kind}; {words}.{enough}{where}"


__all__ = [
    "VARIANTS",
    "Change",
    "EqualizedLinear",
    "OneShotResult",
    "Variant",
    "apply_variants",
    "centre_norms",
    "equalize",
    "one_shot",
    "refit",
    "scale_neurons",
    "shrink_triplets",
]
