"""What S2D costs: a training step with it over one without, a refresh over a full SVD of the same layers.

    python benchmarks/s2d_cost.py                 # ViT-Base, 2 threads
    python benchmarks/s2d_cost.py --layers 4      # a shallower one, where time is short; not ViT-Base

ViT-Base with random weights (the cost does not depend on them, but the iteration does: a flat random spectrum is its
worst case), a dominant triplet planted in each second MLP layer, so that all of these are flagged. Steps with and
without S2D take turns in one process. Amortized: (step + what S2D adds to a step + refresh / m) / step, with the parts
measured by themselves; direct: `--steps` whole steps with S2D acting, one refresh among them, over as many without.
Measured by themselves are: the S2D part of a step, the decomposition of a refresh after every weight has moved by m
learning rates in random directions, its calibration forward passes, and `torch.linalg.svd` of the same matrices.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import _common
import torch
from _common import Figure, at_most
from torch import Tensor, nn

from s2d_deploy.pcdr import OutlierCollector, forward_batches
from s2d_deploy.s2d import S2D, S2DConfig
from s2d_deploy.spectral import refreshed_triplets, weight_matrix, weighted_layers

RATE = 1e-5
STEP_LIMIT, REFRESH_LIMIT = 1.02, 0.1


def vit_base(layers: int) -> nn.Module:
    """google/vit-base-patch16-224's shapes, `layers` of its 12 blocks."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=layers, num_labels=1000))
    with torch.no_grad():
        for name, layer in weighted_layers(model).items():
            if tuple(layer.weight.shape) == (768, 3072):
                g = torch.Generator().manual_seed(len(name))
                u = torch.randn(768, generator=g)
                # Along the mean of GELU's outputs, so that the triplet makes this layer's outliers.
                layer.weight.add_(8.0 * torch.outer(u / u.norm(), torch.full((3072,), 3072**-0.5)))
    return model


def batch_of(size: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(size, 3, 224, 224, generator=g)}


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - start) / 1e9


def measure(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    model = vit_base(arguments.layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    config = S2DConfig(tau=0.5, refresh_every=arguments.m, decoupled_factor=1.0)
    calibration = [batch_of(arguments.batch, seed) for seed in range(100, 104)]
    train = batch_of(arguments.batch, 1)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(**train).logits.square().mean().backward()
        optimizer.step()

    print("select ...", flush=True)
    s2d = S2D(model, config)
    select_s = seconds(lambda: s2d.select(calibration))
    flagged = len(s2d.flagged)
    print(f"{flagged} layers flagged; steps ...", flush=True)
    step()
    plain, added = [], []
    for number in range(arguments.steps):
        plain.append(seconds(step))
        if number:  # between refreshes: step 0 is the selection's own

            def act() -> None:
                s2d.before_step()
                s2d.after_step(RATE)

            added.append(seconds(act))
        else:
            s2d.after_step(RATE)
    if len(s2d.refreshes) != 1:
        raise SystemExit("a refresh fell among the plain steps: choose fewer --steps than --m")

    print("refresh ...", flush=True)
    layers = s2d.layers
    # As far as AdamW can have moved every weight in m steps, in random directions: harder than any real training.
    g = torch.Generator().manual_seed(0)
    matrices = [
        w + arguments.m * RATE * torch.randn(w.shape, generator=g).sign() for w in map(weight_matrix, layers.values())
    ]
    warm = [s2d.triplets(name).V for name in layers]
    refresh_s = [seconds(lambda: refreshed_triplets(matrices, config.k_max, warm)) for _ in range(arguments.repeats)]
    found = refreshed_triplets(matrices, config.k_max, warm)

    def look() -> None:
        with OutlierCollector(model, top=config.outliers, layers=list(layers)):
            forward_batches(model, calibration[: config.refresh_batches])

    forward_s = seconds(look)
    print("full SVD ...", flush=True)
    svd_s, worst = [], 0.0
    for matrix, triplets in zip(matrices, found, strict=True):
        svd_s.append(seconds(lambda m=matrix: torch.linalg.svd(m, full_matrices=False)))
        exact = torch.linalg.svdvals(matrix)[: config.k_max]
        worst = max(worst, float(((triplets.S - exact).abs() / exact[0]).max()))

    print("direct ...", flush=True)
    direct: dict[str, float] = {"without": 0.0, "with": 0.0}
    for number in range(arguments.direct):
        order = ("without", "with") if number % 2 else ("with", "without")
        for kind in order:
            if kind == "without":
                direct[kind] += seconds(step)
                continue

            def pressed() -> None:
                optimizer.zero_grad(set_to_none=True)
                model(**train).logits.square().mean().backward()
                s2d.before_step()
                optimizer.step()
                s2d.after_step(RATE)

            direct[kind] += seconds(pressed)
    refreshes = len(s2d.refreshes) - 1

    step_s, extra_s, spectral_s = median(plain), median(added), median(refresh_s)
    amortized = 1 + (extra_s + (spectral_s + forward_s) / arguments.m) / step_s
    kept = sum(t.numel() * t.element_size() for p in s2d.state_dict()["triplets"].values() for t in p.values())
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    note = f"{arguments.layers} blocks, batch {arguments.batch}, m = {arguments.m}, {flagged} layers flagged"
    figures = [
        at_most("step with S2D / without, amortized", amortized, STEP_LIMIT, note),
        at_most(
            "the same without calibration's forward", 1 + (extra_s + spectral_s / arguments.m) / step_s, None, note
        ),
        at_most("refresh / full SVD", spectral_s / sum(svd_s), REFRESH_LIMIT, f"{len(matrices)} matrices"),
        at_most("largest error of a singular value / s_1", worst, None, "against torch.linalg.svdvals"),
        at_most("cached triplets / weights, in bytes", kept / weights, None, f"{kept} bytes"),
    ]
    if arguments.direct:
        note = f"{arguments.direct} steps of each, {refreshes} refreshes among them; a share of the noise of the steps"
        figures.append(at_most("step with S2D / without, direct", direct["with"] / direct["without"], None, note))
    raw = {
        "step_s": plain, "s2d_in_a_step_s": added, "refresh_spectral_s": refresh_s, "refresh_forward_s": forward_s,
        "svd_s": svd_s, "select_s": select_s, "direct_s": direct, "direct_refreshes": refreshes,
        "load_average": os.getloadavg(),
    }  # fmt: skip
    return figures, raw


def run(chosen: argparse.Namespace) -> int:
    """Measure and record."""
    torch.set_num_threads(chosen.threads)
    record = _common.Record("s2d-cost", chosen.threads)
    figures, raw = measure(chosen)
    return _common.finish(record, chosen.results, figures, raw)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    made = _common.parser("s2d_cost.py", str(__doc__))
    made.add_argument("--layers", type=_common.positive, default=12, help="blocks (default: 12, as ViT-Base)")
    made.add_argument("--batch", type=_common.positive, default=16)
    made.add_argument("--m", type=_common.positive, default=100, help="steps between refreshes (default: 100)")
    made.add_argument("--steps", type=_common.positive, default=4, help="plain steps, each with S2D's part behind it")
    made.add_argument("--direct", type=int, default=3, help="whole steps with and without S2D, taking turns")
    made.add_argument("--repeats", type=_common.positive, default=3, help="of the refresh's decomposition")
    made.add_argument("--threads", type=_common.positive, default=2)
    return _common.guarded(run, made.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
