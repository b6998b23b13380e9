"""Vision towers, text encoders and a convolution network of odd sizes, through every runtime that runs here.

What is built must compute what the simulation says: no accumulator differs, and no code but a few at rounding
boundaries.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from s2d_deploy.discovery import discover
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.quantize import QuantizeConfig
from s2d_deploy.registry import load_exporter, load_runtime, load_target
from s2d_deploy.simulation import simulate
from s2d_deploy.verify import end_to_end_codes, teacher_forced

# Odd everywhere: widths that fill no panel, lengths that fill no tile, several depths.
SIZES = {"hidden_size": 36, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 52}
PIXELS = {"image_size": 20, "patch_size": 4, "num_channels": 3}


def images(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(batch, 3, 20, 20, generator=torch.Generator().manual_seed(batch))}


def texts(batch: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch * length)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[-1, length - 2 :] = 0
    return {"input_ids": torch.randint(0, 20, (batch, length), generator=generator), "attention_mask": mask}


def model_of(name: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor], str]:
    """A network with random weights, a batch for it, and the name of its output."""
    import transformers as t

    torch.manual_seed(0)
    torch.set_num_threads(1)
    hidden = "last_hidden_state"
    if name == "vit":
        return t.ViTModel(t.ViTConfig(**SIZES, **PIXELS)).eval(), images(3), hidden
    if name == "deit":
        return t.DeiTModel(t.DeiTConfig(**SIZES, **PIXELS)).eval(), images(2), hidden
    if name == "siglip":
        return t.SiglipVisionModel(t.SiglipVisionConfig(**SIZES, **PIXELS)).eval(), images(2), hidden
    if name == "clip":
        return t.CLIPVisionModel(t.CLIPVisionConfig(**SIZES, **PIXELS)).eval(), images(1), hidden
    if name == "bert":
        config = t.BertConfig(**SIZES, vocab_size=20, max_position_embeddings=16)
        return t.BertModel(config).eval(), texts(3, 11), hidden
    config = t.ResNetConfig(
        embedding_size=10, hidden_sizes=[12, 20], depths=[1, 2], layer_type="basic", num_labels=7, hidden_act="relu"
    )
    return t.ResNetForImageClassification(config).eval(), images(2), "logits"


@pytest.mark.parametrize("runtime", ["tvm", "ort"])
@pytest.mark.parametrize("name", ["vit", "deit", "siglip", "clip", "bert", "resnet"])
def test_what_is_built_computes_what_is_simulated(name: str, runtime: str, tmp_path: Path) -> None:
    pytest.importorskip({"tvm": "tvm", "ort": "onnxruntime"}[runtime])
    model, batch, output = model_of(name)
    ops = discover(model, {n: t[:1] for n, t in batch.items()}, output)
    context = Context(lambda: [batch], output, QuantizeConfig())
    quantized = run_passes(model, ops, "w4a4", parse_steps([]), context)
    common = tmp_path / "model.onnx"
    load_exporter()(quantized.model, quantized.plan, batch, [output], common, dynamic={})
    target = load_target(runtime)
    folder = tmp_path / runtime
    folder.mkdir()
    dialect = target.dialect(common, folder, precision="w4a4")
    options: dict[str, Any] = target.shape_options([len(next(iter(batch.values())))], {})
    artifact = target.build(dialect, folder, precision="w4a4", options=options, progress=lambda _: None)
    simulated = simulate(quantized.model, quantized.plan).eval()
    with load_runtime(runtime).open(artifact, threads=2) as session, torch.no_grad():
        forced = teacher_forced(session, simulated, quantized.plan, batch)
        codes = end_to_end_codes(session, simulated, [batch])
        audit = session.audit()
    assert forced["accumulators_checked"] > 0
    assert forced["accumulators_different"] == 0
    assert forced["ops_not_integer"] == []
    assert not audit.mismatches()
    assert codes["codes_checked"] > 1000
    assert codes["codes_different"] < 0.02 * codes["codes_checked"], [s for s in codes["sites"] if s["different"]]
