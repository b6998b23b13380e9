"""Attribution: what makes the range of each quantized site, and which share of it S2D can reach.

A layer's dominant triplets matter to quantization only where their outliers arrive at a quantized site. Two passes
over the data measure that. The first sees every activation site as it is. The second computes, from the same
inputs, what the site would be without one cause at a time:

- *triplets*: the leading triplets of the layers that make the site are taken out of their outputs, and the norm,
  the activation or the attention product between is computed again. Direct effect: a layer's input stays as it was.
- *gain*: the norm without its gain and bias (the noise is weighted with the gains, which the next Linear would hold).
- *channels*: the site without its few most extreme channels (of an activation: single neurons of the Linear before).

What a cause costs is measured in the quantizer's own currency: the error at 4 bits with the best clipping range, over
the variance of the bulk (within channels, because what is constant in a channel carries no information; without the
largest 5 %, because outliers would count as the signal that they drown). The maximum alone would overstate outliers
that a clipping range simply cuts. What is lost: second-order effects of one layer on the next,
and the correlation of the error between channels. Memory is bounded by the number of sites, not by the data.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from s2d_deploy.attribution_measurement import Measurement
from s2d_deploy.attribution_stream import NORMAL_BULK
from s2d_deploy.errors import DataError, message
from s2d_deploy.forecast import Forecast, forecast
from s2d_deploy.pcdr import Batch
from s2d_deploy.plan import Op
from s2d_deploy.producers import Producer, trace_producers
from s2d_deploy.session import Progress
from s2d_deploy.site_attribution import HARMLESS, NORMAL_ERROR, Channel, SiteAttribution, Verdict, Without


def attribute(
    model: nn.Module,
    ops: Mapping[str, Op],
    batches: Iterable[Batch],
    *,
    k_target: Mapping[str, int],
    k_max: int = 3,
    producers: Mapping[str, Producer] | None = None,
    progress: Progress | None = None,
) -> list[SiteAttribution]:
    """Attribute every activation site of `ops`.

    Args:
        model: the float model, called as ``model(**batch)``.
        ops: from `discovery.discover`.
        batches: read twice, so not a generator.
        k_target: by layer, how many triplets S2D presses (`LayerDiagnosis.k_target`); absent or 0: not flagged.
        k_max: how many triplets of any layer S2D could press.
        producers: of `trace_producers`; traced on the first batch when None.
        progress: called with one line of text now and then.

    Returns:
        In the order of `ops`.

    Raises:
        DataError: a generator, no batch, or activations that are not finite (the site is named).
    """
    if iter(batches) is batches:
        raise DataError(
            message("the batches can be read only once", expected="a list, or anything read anew each time")
        )
    first = next(iter(batches), None)
    if first is None:
        raise DataError(message("the calibration data holds no batch", fix="check the data's path"))
    if producers is None:
        producers = trace_producers(model, ops, {name: tensor[:1] for name, tensor in first.items()})
    measurement = Measurement(model, producers, k_target, k_max)
    say: Progress = progress if progress is not None else (lambda _: None)
    measurement.run(batches, lambda n: say(f"attribute: {n} batches, means"))
    measurement.choose_channels()
    measurement.run(batches, lambda n: say(f"attribute: {n} batches, errors"))
    return [measurement.result(producer) for producer in producers.values()]


__all__ = [
    "HARMLESS",
    "NORMAL_BULK",
    "NORMAL_ERROR",
    "Channel",
    "Forecast",
    "SiteAttribution",
    "Verdict",
    "Without",
    "attribute",
    "forecast",
]
