"""modelopt's presets read into a Plan: our simulation against modelopt's own fake quantization."""

from __future__ import annotations

import contextlib
import copy
import io
import sys
import warnings

import pytest
import torch
from torch import nn

from s2d_deploy.discovery import discover
from s2d_deploy.errors import ModelError, PlanError, UnavailableError
from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
from s2d_deploy.simulation import simulate

pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2, stride=2)
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 16)

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return self.b(nn.functional.gelu(self.a(x)))


def block():
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():
        model.a.weight[:, 3] *= 8  # something to smooth
    batches = [{"x": torch.randn(4, 3, 8, 8) * 2} for _ in range(3)]
    return model, batches, discover(model, batches[0])


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = BertModel(config, add_pooling_layer=False).eval()
    batches = [{"input_ids": torch.randint(0, 50, (4, 7)), "attention_mask": torch.ones(4, 7, dtype=torch.long)}]
    return model, batches, discover(model, batches[0], "last_hidden_state")


CONFIGS = {
    "int8": ("INT8_DEFAULT_CFG", "w8a8"),
    "int8_smoothquant": ("INT8_SMOOTHQUANT_CFG", "w8a8"),
    "int4_awq": ("INT4_AWQ_CFG", "w4a16"),
    "int4_blockwise": ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "w4a16"),
}


def theirs(model: nn.Module, preset: str, batches: list[dict[str, torch.Tensor]], block_size: int) -> nn.Module:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq

        config = copy.deepcopy(getattr(mtq, CONFIGS[preset][0]))
        for entry in config["quant_cfg"]:
            if (entry.get("cfg") or {}).get("block_sizes"):
                entry["cfg"]["block_sizes"][-1] = block_size
        return mtq.quantize(copy.deepcopy(model), config, lambda m: [m(**b) for b in batches])


def bridged(preset: str, model: nn.Module, batches, ops, block_size: int = 8, output: str = "output"):
    steps = parse_steps([{"modelopt": {"preset": preset, "block_size": block_size}}])
    return run_passes(model, ops, CONFIGS[preset][1], steps, Context(lambda: batches, output))


@pytest.mark.parametrize("preset", list(CONFIGS))
def test_our_simulation_is_modelopts_fake_quantization(preset: str):
    model, batches, ops = block()
    found = bridged(preset, model, batches, ops)
    reference = theirs(model, preset, batches, 8)
    if preset.startswith("int4"):  # a convolution has no weight-only kernel here, so it stays float on both sides
        reference.conv.weight_quantizer.disable()
    simulated = simulate(found.model, found.plan).eval()
    with torch.no_grad():
        for batch in batches:
            ours, wanted = simulated(**batch), reference(**batch)
            # A value within an ULP of a boundary may get the other code: one step of one input among thousands.
            assert float((ours - wanted).norm() / wanted.norm()) < 1e-3
            assert float(((ours - wanted).abs() > 1e-5).float().mean()) < 0.02


@pytest.mark.parametrize("preset", list(CONFIGS))
def test_scales_are_amax_over_qmax(preset: str):
    model, batches, ops = block()
    found, reference = bridged(preset, model, batches, ops), theirs(model, preset, batches, 8)
    for name in ("a", "b"):
        site = found.plan.sites[f"{name}.weight"]
        amax = getattr(reference, name).weight_quantizer.amax.flatten()
        assert torch.equal(site.scale.flatten(), amax / site.grid.qmax)
        assert site.source == f"modelopt-{preset}"
        assert (f"{name}.input" in found.plan.sites) == preset.startswith("int8")


def test_a_transformer():
    model, batches, ops = bert()
    found = bridged("int8", model, batches, ops, output="last_hidden_state")
    assert found.plan.declared("encoder.layer.0.attention.self.query") == "W8A8"
    assert found.plan.declared("encoder.layer.0.attention.self.scores") == "float"  # modelopt leaves it so
    simulated, reference = simulate(found.model, found.plan).eval(), theirs(model, "int8", batches, 8)
    ignored = found.plan.info["modelopt"]["not_taken"]
    assert "embeddings.LayerNorm" in ignored
    assert not set(ignored) & set(ops)
    for name in ignored:
        for which in ("input", "weight", "output"):
            quantizer = getattr(reference.get_submodule(name), f"{which}_quantizer", None)
            if quantizer is not None:
                quantizer.disable()
    with torch.no_grad():
        ours = simulated(**batches[0]).last_hidden_state
        wanted = reference(**batches[0]).last_hidden_state
    assert float((ours - wanted).norm() / wanted.norm()) < 5e-3


def test_what_its_patterns_leave_out_is_named(caplog: pytest.LogCaptureFixture):
    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_model, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.head(self.vision_model(x))

    torch.manual_seed(0)
    model, batches = Tower().eval(), [{"x": torch.randn(4, 8)}]
    found = bridged("int8", model, batches, discover(model, batches[0]))
    assert found.plan.info["modelopt"]["left_out"] == ["vision_model"]
    assert "vision_model" in caplog.text

    class Only(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_model = nn.Linear(8, 8)

        def forward(self, x):
            return self.vision_model(x)

    model = Only().eval()
    with pytest.raises(ModelError, match=r"modelopt refuses this model.*nothing would be quantized"):
        bridged("int8", model, batches, discover(model, batches[0]))


def test_the_precision_must_be_the_presets():
    model, batches, ops = block()
    steps = parse_steps(["modelopt"])
    with pytest.raises(PlanError, match=r"preset 'int8' is not w4a4.*w8a8"):
        run_passes(model, ops, "w4a4", steps, Context(lambda: batches, "output"))


def test_a_width_that_blocks_do_not_divide():
    model, batches, ops = block()
    with pytest.raises(PlanError, match=r"modelopt's block size in 2 layer\(s\): a \(K = 8\), b \(K = 32\)"):
        bridged("int4_awq", model, batches, ops, block_size=128)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "modelopt"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "modelopt", None)
    model, batches, ops = block()
    with pytest.raises(UnavailableError, match=r"pip install 's2d-deploy\[modelopt\]'"):
        bridged("int8", model, batches, ops)


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]):
    model, batches, ops = block()
    bridged("int8", model, batches, ops)
    assert capsys.readouterr().out == ""
