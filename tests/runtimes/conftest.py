"""Tiny models, exported once for each precision: what the contract suite and the runtimes' own tests feed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@dataclass(frozen=True)
class Exported:
    """One model at one precision.

    Attributes:
        path: the common ONNX file.
        plan: its quantization.
        feeds: a batch of three.
        outputs: the simulation's outputs for it.
        codes: the simulation's codes at every activation site, in execution order.
        scaled: the same before rounding: input / scale + zero point.
        simulate: outputs of the simulation for other feeds.
    """

    path: Path
    plan: Any
    feeds: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    scaled: dict[str, np.ndarray]
    simulate: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def _vit():
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=10,
    )
    return ViTForImageClassification(config), {"pixel_values": torch.randn(3, 1, 8, 8)}, ["logits"], {}


def _bert():
    import torch
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=50,
        max_position_embeddings=32,
    )
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2, 2:] = 0
    sample = {"input_ids": torch.randint(0, 50, (3, 7)), "attention_mask": mask}
    return (
        BertModel(config, add_pooling_layer=False),
        sample,
        ["last_hidden_state"],
        {n: {1: "sequence"} for n in sample},
    )


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[[str, str], Exported]:
    """``exported("vit" or "bert", precision)``; each is made once for the whole run."""
    from importlib import import_module

    import torch

    from s2d_deploy.calibrate import calibrate
    from s2d_deploy.discovery import discover
    from s2d_deploy.quantize import QuantizeConfig, build_plan
    from s2d_deploy.simulation import recorded_codes, simulate

    export_onnx = import_module("s2d_deploy.export.to_onnx").export_onnx
    absmax = QuantizeConfig(weights="absmax", activations="absmax")

    @cache
    def floating(name: str):
        torch.manual_seed(0)
        model, sample, outputs, dynamic = {"vit": _vit, "bert": _bert}[name]()
        # transformers initializes with 0.02: so small that attention is flat and codes hardly vary.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
        model.eval()
        ops = discover(model, sample)
        return model, sample, outputs, dynamic, ops, calibrate(model, ops, [sample])

    @cache
    def make(name: str, precision: str) -> Exported:
        model, sample, names, dynamic, ops, calibration = floating(name)
        plan = build_plan(model, ops, calibration, precision, absmax)
        path = tmp_path_factory.mktemp(f"{name}-{precision}") / "model.onnx"
        export_onnx(model, plan, sample, names, path, dynamic=dynamic)
        simulated = simulate(model, plan)
        scaled: dict[str, np.ndarray] = {}

        def remember(site: str, quantizer: Any):
            def hook(_module: Any, args: tuple[Any, ...]) -> None:
                scaled[site] = (args[0] / quantizer.scale + quantizer.zero_point).detach().numpy()

            return hook

        handles = [
            module.register_forward_pre_hook(remember(n.removesuffix("_quantizer"), module))
            for n, module in simulated.named_modules()
            if hasattr(module, "grid") and not n.endswith("weight_quantizer")
        ]
        with recorded_codes(simulated) as codes:
            result = simulated(**sample)
        for handle in handles:
            handle.remove()

        def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.no_grad():
                y = simulated(**{n: torch.from_numpy(a) for n, a in feeds.items()})
            return {n: y[n].numpy() for n in names}

        return Exported(
            path,
            plan,
            {n: t.numpy() for n, t in sample.items()},
            {n: result[n].numpy() for n in names},
            {n: c.numpy() for n, c in codes.items()},
            scaled,
            run,
        )

    return make
