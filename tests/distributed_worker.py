"""What one process of `test_distributed` does: train the tiny model below in every way, write what came out.

Started by torchrun (two processes) and called directly (one process), with the same arguments.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from s2d_deploy.condition import condition
from s2d_deploy.s2d import S2D, S2DConfig
from s2d_deploy.sharding import processes
from s2d_deploy.spectral import whole

CONFIG = S2DConfig(tau=0.9, refresh_every=3, decoupled_factor=2.0, outliers=8, split={"blocks.*.qkv": 3})
STEPS, RATE = 8, 1e-3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.qkv = nn.Linear(12, 36)
        self.out = nn.Linear(36, 12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.qkv(self.norm(x))))


class Tiny(nn.Module):
    """Two blocks and a head; the head, a whole layer and one third of a fused one have a dominant triplet."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(12, 5)
        self.unused = nn.Linear(3, 3)
        with torch.no_grad():
            for rows in (self.head.weight, self.blocks[0].out.weight, self.blocks[1].qkv.weight[12:24]):
                u, s, vh = torch.linalg.svd(rows, full_matrices=False)
                s[0] = 9.0
                rows.copy_((u * s) @ vh)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def batches(*, labels: bool, seed: int = 0) -> list[dict[str, Tensor]]:
    """Of 7 rows: two processes get 3 and 4."""
    g = torch.Generator().manual_seed(seed)
    made = [{"x": torch.randn(7, 12, generator=g), "labels": torch.randint(0, 5, (7,), generator=g)} for _ in range(3)]
    return made if labels else [{"x": batch["x"]} for batch in made]


def by_library(sharding: str, application: str) -> dict[str, Any]:
    """The library in a loop of one's own: SGD, no gradients but the decay's, so that only S2D acts."""
    model: nn.Module = Tiny()
    if sharding == "ddp" and processes()[1] > 1:
        model = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    elif sharding == "fsdp2" and processes()[1] > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (processes()[1],))
        for block in model.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    config = S2DConfig(**{**CONFIG.to_dict(), "application": application, "weight_decay": 0.1, "refresh_drift": 0.9})
    s2d = S2D(model, config, optimizer=optimizer)
    s2d.select(batches(labels=False))
    flagged = dict(s2d.flagged)
    for _ in range(5):
        optimizer.zero_grad()
        sum((0 * p).sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
    weights = {n.removeprefix("module."): whole(p.detach()).clone() for n, p in model.named_parameters()}
    return {"weights": weights, "flagged": flagged, "drift": s2d.drift(), "refreshes": len(s2d.refreshes)}


def by_condition(sharding: Any, objective: Any, **changes: Any) -> dict[str, Any]:
    """Our own loop."""
    model = Tiny()
    data = batches(labels=objective == "task", seed=1)
    arguments: dict[str, Any] = {"steps": STEPS, "lr": RATE, "sharding": sharding, **changes}
    result = condition(model, objective, lambda: data, batches(labels=False), CONFIG, **arguments)
    return {
        "weights": {name: p.detach().clone() for name, p in model.named_parameters()},
        "flagged": {entry["name"]: entry["k_target"] for entry in result.layers},
        "losses": result.losses,
        "refreshes": [entry["step"] for entry in result.refreshes],
        "method": result.method,
    }


def interrupted(sharding: str, path: Path) -> None:
    """Leave a checkpoint of step 3 behind."""

    def stop(done: int, *_: Any) -> None:
        if done == 4:
            raise KeyboardInterrupt

    try:
        by_condition(sharding, "distill", checkpoint_path=path, checkpoint_every=3, progress=stop)
    except KeyboardInterrupt:
        return
    raise AssertionError("it was not interrupted")


def everything(folder: Path) -> dict[str, Any]:
    """All that is compared, by name."""
    results: dict[str, Any] = {}
    for sharding in ("ddp", "fsdp2"):
        for objective in ("task", "distill"):
            results[f"{sharding} {objective}"] = by_condition(sharding, objective)
        results[f"{sharding} accumulate"] = by_condition(sharding, "task", accumulate=2)
        results[f"{sharding} bf16"] = by_condition(sharding, "task", autocast="bf16")
        for application in ("coupled", "decoupled"):
            results[f"{sharding} library {application}"] = by_library(sharding, application)
        interrupted(sharding, folder / f"{sharding}.pt")
        results[f"{sharding} resumed"] = by_condition(
            sharding, "distill", checkpoint_path=folder / f"{sharding}.pt", checkpoint_every=3
        )
    interrupted("fsdp2", folder / "left.pt")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    torch.distributed.init_process_group("gloo")
    found = everything(target)
    torch.save(found, target / f"rank{processes()[0]}.pt")
    torch.distributed.destroy_process_group()
