"""Range setting and round to nearest: the pass that fills the Plan (`quantize.build_plan`)."""

from __future__ import annotations

from s2d_deploy.calibrate import Calibration
from s2d_deploy.errors import PlanError, message
from s2d_deploy.lsq import SOURCE
from s2d_deploy.plan import Plan
from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.quantize import build_plan, quantizes_activations


class Options(passes.Options):
    """None here: methods and granularities are the quantize section's own keys."""


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:  # noqa: ARG001 - the passes' signature
    """Calibrate the model as it is now and set every site's scale and zero point.

    Sites that a transform has put into the plan already (a softmax grid of its own) stay as they are, and scales that
    were trained with the weights are taken as they were trained.
    """
    plan = quantized.plan
    statistics = Calibration()
    if quantizes_activations(quantized.model, plan.ops, plan.precision, context.config):
        statistics = context.calibration(quantized.model, plan.ops)
    made = build_plan(quantized.model, plan.ops, statistics, plan.precision, context.config)
    made.sites.update({name: site for name, site in plan.sites.items() if name in made.sites})
    if context.learned is not None:
        _take_learned(made, context.learned)
    made.info = plan.info | made.info
    return Quantized(quantized.model, made)


def _take_learned(made: Plan, learned: Plan) -> None:
    """Put the scales of `learned` (LSQ) into `made`.

    Raises:
        PlanError: a learned site is not in the plan, or lies on another grid there.
    """
    trained = {name: site for name, site in learned.sites.items() if site.source == SOURCE}
    strange = [
        name
        for name, site in trained.items()
        if name not in made.sites
        or made.sites[name].grid != site.grid
        or made.sites[name].scale.shape != site.scale.shape
    ]
    if strange:
        raise PlanError(
            message(
                f"{len(strange)} site(s) have learned scales that do not fit the plan: {', '.join(strange[:4])}",
                expected="the sites and grids that were trained",
                fix="condition again with this quantize section",
            )
        )
    made.sites.update(trained)
    made.info["learned_steps"] = len(trained)
