"""Bias correction: the mean error that quantization adds to a layer's output is taken out through its bias.

Nagel et al., arXiv 1906.04721, section 4.2, in its empirical form (appendix D): channel by channel, the mean output of
the simulated layer over the calibration data is compared with that of the float layer, and the bias gets the
difference. Layers are served in execution order, so a correction sees the earlier ones. A layer is linear, so the means
of its input rows are all that is read.

The mean is weighed (`relative`): in a post-LN encoder a few tokens have outputs a hundred times the others', a clipped
range cuts them, and the plain mean of the paper puts their error into the bias of every token. With ``relative: false``
every served layer's plain mean output over the calibration data is afterwards the float model's. What is not
guaranteed: that the error around the mean, which is most of it at four bits, gets smaller in the layers behind. A layer
without a bias is left out, and that is said: what a pass may change are the tensors that a model has.
"""

from __future__ import annotations

from typing import cast

import torch
from pydantic import Field
from torch import Tensor, nn

from s2d_deploy.ptq import passes
from s2d_deploy.ptq.passes import Context, Quantized
from s2d_deploy.ptq.reconstruction import Reconstruction


class Options(passes.Options):
    """Which mean."""

    relative: bool = Field(
        True, description="weigh each token by one over its output's power; false is the paper's plain mean"
    )


def apply(quantized: Quantized, context: Context, options: Options) -> Quantized:
    """Correct the bias of every layer that has a quantized weight and a bias.

    Raises:
        ModelError: no quantized weight.
        DataError: no calibration data.
    """
    work = Reconstruction(quantized, context, "bias_correction", rounds=False)
    for group in work.groups:
        biased = []
        for name in group:
            if work.float_layer(name).bias is None:
                work.leave_out(name, "it has no bias")
            else:
                biased.append(name)
        if not any(cast(Tensor, work.reference.get_submodule(name).weight).any() for name in group):
            for name in biased:
                work.leave_out(name, "its weights are all zero")
            biased = []
        if not biased:
            continue
        context.progress(f"bias_correction: {', '.join(biased)}")
        quantized_mean, float_mean = work.means(group, relative=options.relative)
        for name in biased:
            # Whatever order the group's layers come in: they do not feed each other.
            wanted = _mean_output(work.reference.get_submodule(name), float_mean)
            found = _mean_output(work.simulated.get_submodule(name), quantized_mean)
            shift = (wanted - found).float()
            with torch.no_grad():
                for model in (quantized.model, work.simulated):
                    cast(Tensor, model.get_submodule(name).bias).add_(shift)
    work.say_left_out()
    return quantized


def _mean_output(layer: nn.Module, mean: Tensor) -> Tensor:
    """Mean output for rows of that mean, float64 ``(N,)``; a simulated layer's weight through its quantizer."""
    weight, bias = cast(Tensor, layer.weight).detach(), cast(Tensor, layer.bias).detach()
    quantizer = getattr(layer, "weight_quantizer", None)
    if quantizer is not None:
        weight = quantizer(weight)
    return weight.flatten(1).double() @ mean + bias.double()
