"""Range setting and round to nearest: the pass that fills the Plan (`quantize.build_plan`)."""

from __future__ import annotations

from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.quantize import build_plan


class Options(passes.Options):
    """None here: methods and granularities are the quantize section's own keys."""


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:  # noqa: ARG001 - the passes' signature
    """Calibrate the model as it is now and set every site's scale and zero point.

    Sites that a transform has put into the plan already (a softmax grid of its own) stay as they are.
    """
    plan = quantized.plan
    statistics = context.calibration(quantized.model, plan.ops)
    made = build_plan(quantized.model, plan.ops, statistics, plan.precision, context.config)
    made.sites.update({name: site for name, site in plan.sites.items() if name in made.sites})
    made.info = plan.info | made.info
    return Quantized(quantized.model, made)
