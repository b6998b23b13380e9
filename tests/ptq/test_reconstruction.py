"""The frame of weight reconstruction: which rows a layer is shown, against whole forward passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny_quantized as tiny
import torch

from s2d_deploy.errors import DataError, ModelError
from s2d_deploy.ptq.passes import Context
from s2d_deploy.ptq.reconstruction import Reconstruction, float_grams, layer_input

LAYER = "encoder.layer.1.attention.self.query"


@pytest.fixture(scope="module")
def work() -> Reconstruction:
    quantized, context, _ = tiny.run("bert", "w4a4", [])
    return Reconstruction(quantized, context, "gptq")


def whole(model: torch.nn.Module, name: str, batch: dict) -> torch.Tensor:
    """The layer's input in an uninterrupted forward pass."""
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    with torch.no_grad():
        model(**batch)
    handle.remove()
    return seen[0]


def group_of(work: Reconstruction) -> tuple[str, ...]:
    return next(g for g in work.groups if LAYER in g)


def test_rows_are_those_of_a_whole_forward_pass(work: Reconstruction):
    quantizer = work.simulated.get_submodule(LAYER).input_quantizer
    group = group_of(work)
    for batch, (q, x), (_, s) in zip(
        work.context.batches(), work.rows(group, "float"), work.rows(group, "simulated"), strict=True
    ):
        real = batch["attention_mask"].bool()
        given = whole(work.simulated, LAYER, batch)
        assert torch.equal(q, quantizer(given)[real])
        assert torch.equal(s, given[real])
        assert torch.equal(x, whole(work.reference, LAYER, batch)[real])


def test_statistics_are_the_means_of_products(work: Reconstruction):
    group = group_of(work)
    pairs = list(work.rows(group, "float"))
    q, x = torch.cat([p[0] for p in pairs]).double(), torch.cat([p[1] for p in pairs]).double()
    found = work.statistics(group, "float")
    assert found.count == len(q)
    assert torch.allclose(found.gram, q.T @ q / len(q))
    assert torch.allclose(found.cross, x.T @ q / len(q))
    assert torch.allclose(found.float_mean, x.mean(0))
    means = work.means(group)
    assert torch.allclose(means[0], q.mean(0))
    assert torch.allclose(means[1], x.mean(0))


def test_folds_are_the_even_and_the_odd_batches(work: Reconstruction):
    group = work.groups[0]
    folds = work.folds(group, "float")
    rows = list(work.rows(group, "float"))
    for fold, part in zip(folds, (rows[::2], rows[1::2]), strict=True):
        q, x = (torch.cat([pair[i] for pair in part]).double() for i in (0, 1))
        assert fold.count == q.shape[0]
        assert torch.allclose(fold.gram, q.T @ q / q.shape[0])
        assert torch.allclose(fold.cross, x.T @ q / q.shape[0])
    whole, pooled = work.statistics(group, "float"), folds[0].pooled(folds[1])
    assert pooled.count == whole.count
    for name in ("gram", "cross", "mean", "float_mean"):
        assert torch.allclose(getattr(pooled, name), getattr(whole, name))


def test_folds_of_a_single_batch(work: Reconstruction):
    batch = next(iter(work.context.batches()))
    single = Reconstruction(work.quantized, replace(work.context, batches=lambda: [batch]), "gptq")
    group = single.groups[0]
    folds = single.folds(group)
    [(rows, _)] = list(single.rows(group))
    q = rows.double()
    middle = (len(q) + 1) // 2
    assert torch.allclose(folds[0].gram, q[:middle].T @ q[:middle] / middle)
    assert torch.allclose(folds[1].gram, q[-middle:].T @ q[-middle:] / middle)


def test_relative_rows_make_outputs_of_one_size(work: Reconstruction):
    group = group_of(work)
    weights = torch.cat([work.reference.get_submodule(n).weight.detach() for n in group])
    for (q, x), (plain_q, plain_x) in zip(
        work.rows(group, "float", relative=True), work.rows(group, "float"), strict=True
    ):
        assert torch.allclose((x @ weights.T).square().mean(1), torch.ones(len(x)), rtol=1e-4)
        size = (plain_x @ weights.T).square().mean(1, keepdim=True).sqrt()
        assert torch.allclose(q * size, plain_q, rtol=1e-4, atol=1e-6)


def test_sampled_rows_stay_pairs(work: Reconstruction):
    group = group_of(work)
    pairs = {
        tuple(q.tolist()): tuple(x.tolist())
        for qs, xs in work.rows(group, "float")
        for q, x in zip(qs, xs, strict=True)
    }
    q, x = work.sampled(group, 20, "float")
    assert q.shape == x.shape == (20, q.shape[1])
    assert all(pairs[tuple(a.tolist())] == tuple(b.tolist()) for a, b in zip(q, x, strict=True))
    assert torch.equal(q, work.sampled(group, 20, "float")[0])


@pytest.mark.parametrize("budget", [1, 2**30])
def test_float_grams_whatever_the_memory(work: Reconstruction, budget: int):
    for group, gram in float_grams(work.reference, work.context, work.groups, budget):
        rows = torch.cat(
            [whole(work.reference, group[0], b)[b["attention_mask"].bool()].double() for b in work.context.batches()]
        )
        assert torch.allclose(gram, rows.T @ rows / len(rows))


def test_the_model_runs_no_further_than_the_layer(work: Reconstruction):
    ran = []
    handle = work.reference.encoder.layer[1].output.register_forward_hook(lambda *_: ran.append(1))
    batch = next(iter(work.context.batches()))
    found = layer_input(work.reference, LAYER, batch)
    assert not ran
    assert torch.equal(found, whole(work.reference, LAYER, batch))
    assert ran
    handle.remove()


def test_a_layer_that_does_not_run(work: Reconstruction):
    model = tiny.Convolutions()
    model.spare = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="layer 'spare' did not run on a calibration batch"):
        layer_input(model, "spare", {"x": torch.zeros(1, 3, 8, 8)})


def test_no_data(work: Reconstruction):
    quantized, context, _ = tiny.run("bert", "w4a4", [])
    with pytest.raises(DataError, match="pass 'erq' needs calibration data"):
        Reconstruction(quantized, Context(list, context.output), "erq")
