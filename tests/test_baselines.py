"""Which weight goes to which optimizer, and the baselines from the same function as S2D."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTForImageClassification

from s2d_deploy.baselines import hidden_matrices, optimizers
from s2d_deploy.condition import condition
from s2d_deploy.errors import DataError, RecipeError
from s2d_deploy.objectives import share_of


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.second(torch.tanh(self.first(x))))))


def names(model: nn.Module) -> list[str]:
    chosen = {id(p) for p in hidden_matrices(model)}
    return [name for name, p in model.named_parameters() if id(p) in chosen]


def test_hidden_matrices_are_neither_embedding_nor_head_nor_convolution() -> None:
    assert names(Net()) == ["first.weight", "second.weight"]
    small: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    vit = names(ViTForImageClassification(ViTConfig(**small, image_size=8, patch_size=4, num_labels=3)))
    assert len(vit) == 6
    assert not any("classifier" in n or "projection" in n for n in vit)
    bert = names(BertModel(BertConfig(**small, vocab_size=20)))
    assert len(bert) == 7  # the pooler is hidden: a BertModel has no head
    assert not any("embeddings" in n for n in bert)
    gpt = names(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20, n_positions=8)))
    assert sorted(n.rpartition("h.0.")[2] for n in gpt) == [
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight",
    ]  # fmt: skip


def test_every_weight_is_trained_once() -> None:
    model = Net()
    for name in ("adamw", "muon"):
        found = optimizers(model, name, lr=1e-3, decay=0.1)  # type: ignore[arg-type]
        held = [id(p) for o in found for g in o.param_groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
        assert all(g["weight_decay"] == 0.1 for o in found for g in o.param_groups)
    assert [type(o).__name__ for o in optimizers(model, "muon", lr=1e-3, decay=0.0)] == ["Muon", "AdamW"]
    with pytest.raises(RecipeError, match="Muon has nothing to do"):
        optimizers(nn.Sequential(nn.LayerNorm(3)), "muon", lr=1e-3, decay=0.0)
    with pytest.raises(RecipeError, match=r"unknown optimizer 'sgd'. Expected: 'adamw' or 'muon'"):
        optimizers(model, "sgd", lr=1e-3, decay=0.0)  # type: ignore[arg-type]


def data() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(8, 6, generator=g)} for _ in range(4)]


def run(model: nn.Module, **changes: Any) -> Any:
    def loss(m: nn.Module, batch: Any) -> Tensor:
        return (m(**batch) - batch["x"][:, :3]).square().mean()

    arguments = {"steps": 12, "lr": 1e-2, **changes}
    return condition(model, loss, data, data(), None, **arguments)


def test_the_same_function_gives_every_baseline() -> None:
    results = {
        "custom": run(control := Net()),
        "custom+weight-decay": run(decayed := Net(), adam_decay=0.5),
        "custom+muon": run(muon := Net(), optimizer="muon"),
    }
    for method, result in results.items():
        assert result.method == method
        assert result.steps == 12
        assert result.refreshes == []
        assert result.losses[0] == results["custom"].losses[0]
        assert result.losses[-1] < result.losses[0]
    assert float(decayed.first.weight.detach().norm()) < float(control.first.weight.detach().norm())
    # An orthogonalized update moves all directions alike; AdamW's does not.
    spread = {}
    for name, model in (("control", control), ("muon", muon)):
        moved = torch.linalg.svdvals((model.second.weight - Net().second.weight).detach())
        spread[name] = float(moved[0] / moved.mean())
    assert spread["muon"] < spread["control"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_batches_are_one_large_batch(optimizer: str) -> None:
    """Two batches of 8 or one of 16: the same mean. FP32 sums in another order, so 1 % of AdamW's way (see loop)."""

    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Identity()  # batch statistics would differ

    pairs = data()
    large = [{"x": torch.cat([a["x"], b["x"]])} for a, b in zip(pairs[::2], pairs[1::2], strict=True)]

    def loss(m: nn.Module, batch: Any) -> Tensor:
        return m(**batch).square().mean()

    models = {}
    for name, batches, accumulate in (("small", pairs, 2), ("large", large, 1)):
        models[name] = Plain()
        arguments: dict[str, Any] = {"steps": 6, "lr": 1e-3, "optimizer": optimizer, "accumulate": accumulate}
        losses = condition(models[name], loss, lambda b=batches: b, pairs, None, **arguments).losses
        assert len(losses) == 6
    difference = max(
        float((a - b).abs().max().detach())
        for a, b in zip(models["small"].parameters(), models["large"].parameters(), strict=True)
    )
    # Muon iterates in bfloat16: its update is known to 2^-8.
    assert difference <= 6 * 1e-3 * (0.01 if optimizer == "adamw" else 0.1)


def test_bfloat16_autocast_keeps_float32_weights(tmp_path: Path) -> None:
    exact, coarse = run(a := Net()), run(b := Net(), autocast="bf16")
    assert all(p.dtype == torch.float32 for p in b.parameters())
    assert coarse.losses != exact.losses
    assert coarse.losses == pytest.approx(exact.losses, rel=0.1)
    assert not torch.equal(a.first.weight, b.first.weight)


def test_resuming_muon_gives_the_same_weights(tmp_path: Path) -> None:
    def stop(done: int, *_: Any) -> None:
        if done == 6:
            raise KeyboardInterrupt

    settings: dict[str, Any] = {"optimizer": "muon", "accumulate": 2, "checkpoint_every": 5}
    run(whole := Net(), **settings)
    with pytest.raises(KeyboardInterrupt):
        run(Net(), **settings, checkpoint_path=tmp_path / "s.pt", progress=stop)
    run(resumed := Net(), **settings, checkpoint_path=tmp_path / "s.pt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_absurd_settings_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"conditioning: accumulate, autocast out of range.*accumulate=0"):
        run(Net(), accumulate=0, autocast="fp8")
    with pytest.raises(RecipeError, match=r"optimizer, sharding out of range"):
        run(Net(), optimizer="sgd", sharding="zero")


def test_shares_of_a_batch() -> None:
    batch = {"x": torch.arange(14).reshape(7, 2), "scale": torch.tensor(3.0), "name": "a"}
    shares = [share_of(batch, rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat([mine["x"] for mine, _ in shares]), batch["x"])
    assert [len(mine["x"]) for mine, _ in shares] == [2, 2, 3]
    assert sum(weight for _, weight in shares) == pytest.approx(3.0)
    assert all(mine["name"] == "a" and mine["scale"] == 3.0 for mine, _ in shares)
    with pytest.raises(DataError, match="a batch of 7 rows cannot be shared by 8 processes"):
        share_of(batch, 0, 8)
