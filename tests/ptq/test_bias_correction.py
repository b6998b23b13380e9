"""Bias correction: afterwards every layer's mean output is the float model's."""

from __future__ import annotations

import logging

import pytest
import tiny_quantized as tiny
import torch

from s2d_deploy.errors import ModelError
from s2d_deploy.ptq.passes import Context
from s2d_deploy.ptq.reconstruction import Reconstruction
from s2d_deploy.simulation import simulate


def mean_outputs(model: torch.nn.Module, names: list[str], context: Context) -> dict[str, torch.Tensor]:
    """Mean output of each layer over real tokens, watched while the whole model runs."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    current: dict = {}

    def hook(name: str):
        def see(_module, _args, output):
            rows = output.movedim(1, -1) if output.dim() == 4 else output
            mask = current.get("attention_mask")
            kept = rows[mask.bool()] if mask is not None else rows.reshape(-1, rows.shape[-1])
            seen[name].append(kept.double())

        return see

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    with torch.no_grad():
        for batch in context.batches():
            current = batch
            model(**batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(rows).mean(0) for name, rows in seen.items()}


@pytest.mark.parametrize(
    ("kind", "precision", "steps"),
    [("bert", "w4a4", []), ("vit", "w4a16", []), ("bert", "w4a4", ["gptq"]), ("conv", "w4a4", [])],
)
def test_mean_outputs_are_the_float_models(kind: str, precision: str, steps: list):
    config = {"block_size": 8, "skip": ("head",)} if kind == "conv" else {"block_size": 8}
    found, context, model = tiny.run(kind, precision, [*steps, {"bias_correction": {"relative": False}}], **config)
    before, _, _ = tiny.run(kind, precision, steps, **config)
    names = [s.op for s in found.plan.sites.values() if s.role == "weight"]
    wanted = mean_outputs(model, names, context)
    after = mean_outputs(simulate(found.model, found.plan).eval(), names, context)
    plain = mean_outputs(simulate(before.model, before.plan).eval(), names, context)
    for name in names:
        size = float(wanted[name].abs().max())
        # FP32 sums over a few hundred rows.
        assert float((after[name] - wanted[name]).abs().max()) < 1e-5 * size
    assert max(float((plain[name] - wanted[name]).abs().max()) for name in names) > 1e-3
    # Nothing but biases moves.
    for name, tensor in before.model.state_dict().items():
        moved = not torch.equal(tensor, found.model.state_dict()[name])
        assert moved == (name.endswith(".bias") and name.removesuffix(".bias") in names), name


def test_one_huge_token_does_not_rule_the_weighed_mean():
    quantized, context, _ = tiny.run("bert", "w4a4", [])
    work = Reconstruction(quantized, context, "bias_correction", rounds=False)
    group = next(g for g in work.groups if g[0].endswith("layer.0.output.dense"))
    pairs = list(work.rows(group, "float"))
    q, x = torch.cat([p[0] for p in pairs]).double(), torch.cat([p[1] for p in pairs]).double()
    weight = work.reference.get_submodule(group[0]).weight.detach().double()
    each = [1 / float((weight @ row).square().mean()) for row in x]
    for found, rows in zip(work.means(group, relative=True), (q, x), strict=True):
        wanted = sum(w * row for w, row in zip(each, rows, strict=True)) / sum(each)
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(work.means(group)[1], work.means(group, relative=True)[1], rtol=1e-3)


def test_a_layer_without_bias_is_left_out_and_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        found, _, _ = tiny.run("conv", "w4a4", ["bias_correction"])
    assert found.plan.info["left_out"] == {"bias_correction": {"head": "it has no bias"}}
    assert "bias_correction leaves out head (it has no bias)" in caplog.text
    assert found.model.head.bias is None


def test_a_layer_of_zeros_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch):
    model, batches, output = tiny.case("bert")
    name = "encoder.layer.1.output.dense"
    with torch.no_grad():
        model.get_submodule(name).weight.zero_()
    monkeypatch.setattr(tiny, "case", lambda _kind: (model, batches, output))
    quantized, _, _ = tiny.run("bert", "w4a8", ["bias_correction"])
    assert quantized.plan.info["left_out"]["bias_correction"] == {name: "its weights are all zero"}


def test_twice_the_same():
    states = [tiny.run("bert", "w4a4", ["bias_correction"])[0].model.state_dict() for _ in range(2)]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])


def test_nothing_to_serve():
    with pytest.raises(ModelError, match="pass 'bias_correction' can serve no layer"):
        tiny.run("bert", "w4a4", ["bias_correction"], skip=("*",))
