"""Centre the channels of norms in front of quantized sites: one-shot, exact, weights only.

A norm's output is shifted so that each channel's median over the real tokens is 0. The Linears that read it take the
shift back in their biases, and where a residual sum reads the norm as well (post-LN), so does the bias of a Linear
that is added into that sum (`site_moves.centre`). So it reaches the norms of a post-LN model, into which no scale can
be folded. What is lost: nothing in float but rounding. A channel's spread stays as it was; only its offset goes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from s2d_deploy.layer_inputs import calibrated_ops, input_tokens
from s2d_deploy.pcdr import Batch
from s2d_deploy.producers import trace_norm_inputs, trace_producers
from s2d_deploy.site_moves import centre, neighbours
from s2d_deploy.weight_change import Change

# Tokens of a site that its range is looked at on, before and after.
ROWS = 1024


def centre_norms(model: nn.Module, batches: Sequence[Batch], *, output: str | None = None) -> list[Change]:
    """Shift the outputs of norms that make a quantized site, exactly, in place.

    Args:
        model: changed in place. Norms whose readers have no bias, share it, or are frozen are left alone.
        batches: calibration data, padding left out by its attention mask.
        output: as in `discovery.discover`.

    Returns:
        One change for each norm that was shifted, named with the Linears that read it: the largest magnitude at
        their input, before and after.

    Raises:
        RecipeError: no batch.
    """
    ops = calibrated_ops(model, batches, output)
    sample = {name: tensor[:1] for name, tensor in batches[0].items() if name != "labels"}
    inputs = trace_norm_inputs(model, sample)
    around = neighbours(trace_producers(model, ops, sample), inputs)
    first = {norm: near.readers[0] for norm, near in around.items() if norm in inputs}
    before = input_tokens(model, batches, list(first.values()), ROWS)
    done = centre(model, around, [name for name in inputs if name in first], batches)
    after = input_tokens(model, batches, [first[norm] for norm in done], ROWS)
    changes = []
    for norm in done:
        low, high = (float(seen[first[norm]].abs().max()) for seen in (after, before))
        words = f"largest magnitude behind the norm {high:.3g} -> {low:.3g}"
        changes.append(Change((norm, *around[norm].readers), "centred", high, low, words))
    return changes


__all__ = ["centre_norms"]
