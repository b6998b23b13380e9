"""Does S2D repair W4A4 in a pre-LN vision transformer? CIFAR-10, AdamW pre-training, fine-tuning with and without it.

    python benchmarks/cifar_vit.py --data FOLDER_OR_TAR

Pre-trains a ViT with AdamW at a constant rate, without weight decay and clipping (what makes outliers grow), and looks
at it on the way: PCDR, kurtosis, ranges, the W4A4 simulation. Then the same steps on the same batches with each of
`--arms`: control, s2d (decoupled, at `--tau`), low-tau (the same at `--low-tau`), named (low-tau, only in layers whose
triplets `diagnose` makes responsible for a site), decay (AdamW's own), coupled (as the paper writes it); `--qat-arms`
also fake-quantized at W4A4. The end of each is measured on the test images in float, W8A8, W4A8 and W4A4, with absmax
and MSE ranges: accuracy, agreement with its own float decisions, noise of the logits. Each arm is compared with the
control of its own seed, image by image (`paired.paired_drop`; a gain is a negative drop).

`--factor` is chosen so that a flagged singular value S is about halved over the fine-tuning, as in the paper:
decoupled, 1/S grows by factor * tune-lr * tune-steps / 2 (cosine), by default by 0.23.

Images are an ImageFolder, train/CLASS/* and test/CLASS/*, or a tar of one. What was decoded, pre-trained and fine-tuned
is kept in --work: an interrupted run goes on where it stopped. Writes DATE-cifar-vit.json and DATE-cifar-vit.html.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _common
import numpy as np
import torch
from _cifar_bench import OUTPUT, PRECISIONS, Bench, brief_scores, mean, summary
from _cifar_images import Images, load_images
from _cifar_page import page
from _common import Figure
from torch import Tensor, nn

from s2d_deploy.attribution import SiteAttribution
from s2d_deploy.checkpointing import save
from s2d_deploy.condition import condition
from s2d_deploy.diagnose import diagnose, diagnose_model
from s2d_deploy.paired import paired_drop
from s2d_deploy.s2d_config import S2DConfig

ARMS = ("control", "s2d", "low-tau", "named", "decay", "coupled")


# ---- pre-training -------------------------------------------------------------------------------------------


def new_model(a: argparse.Namespace) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(a.seed)
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=a.width,
            num_hidden_layers=a.depth,
            num_attention_heads=a.heads,
            intermediate_size=4 * a.width,
            image_size=a.image,
            patch_size=a.patch,
            num_labels=a.classes,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def pretrain(a: argparse.Namespace, train: Images, look: Callable[[nn.Module], dict[str, Any]], path: Path) -> Any:
    """AdamW at a constant rate behind a warmup: (model, trace of looks, seconds). Continues from `path`."""
    model = new_model(a)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=a.lr, betas=(0.9, a.beta2), weight_decay=a.pretrain_decay, fused=True
    )
    generator = torch.Generator().manual_seed(a.seed)
    step, trace, before = 0, [], 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        step, trace, before = state["step"], json.loads(state["trace"]), state["seconds"]
    started = time.perf_counter()
    every, losses = max(1, a.pretrain_steps // a.looks), []
    model.train()
    while step < a.pretrain_steps:
        index = torch.randint(len(train.labels), (a.batch,), generator=generator)
        flip = torch.rand(a.batch, generator=generator) < 0.5
        for group in optimizer.param_groups:
            group["lr"] = a.lr * min(1.0, (step + 1) / a.warmup)
        loss = model(**train.batch(index, flip=flip)).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if a.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), a.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
        step += 1
        if step % every == 0 or step == a.pretrain_steps:
            entry = {"step": step, "loss": sum(losses) / len(losses)} | look(model)
            losses = []
            trace.append(entry)
            spent = before + time.perf_counter() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            save(path, state | {"generator": generator.get_state(), "trace": json.dumps(trace), "seconds": spent})
            found = entry["settings"]
            print(
                f"pre-training: step {step}, {spent:.0f} s, loss {entry['loss']:.3f}, "
                f"top-1 {found['fp32']['top1']:.1f}, "
                f"W4A4 {found['w4a4-absmax']['top1']:.1f} absmax {found['w4a4-mse']['top1']:.1f} MSE, "
                f"PCDR_1 {entry['pcdr_1']:.2f}, kurtosis {entry['kurtosis']:.0f}",
                flush=True,
            )
            model.train()
    return model.eval(), trace, before + time.perf_counter() - started


# ---- fine-tuning --------------------------------------------------------------------------------------------


def arm_settings(name: str, a: argparse.Namespace) -> dict[str, Any]:
    """What `condition` is given for an arm beside what all arms share."""
    kind, config = name.removesuffix("-qat"), None
    if kind in ("s2d", "low-tau", "named", "coupled"):
        config = S2DConfig(
            tau=a.low_tau if kind in ("low-tau", "named") else a.tau,
            k_max=a.k_max,
            decoupled_factor=a.factor,
            refresh_every=a.refresh,
            application="coupled" if kind == "coupled" else "decoupled",
        )
    return {
        "config": config,
        "adam_decay": a.decay if kind == "decay" else 0.0,
        "qat": kind != name,
        "named": kind == "named",
    }


def epochs(train: Images, size: int, seed: int) -> Callable[[], Iterator[dict[str, Tensor]]]:
    """The same batches for every arm of a seed; half of the images mirrored."""
    generator = torch.Generator().manual_seed(seed)

    def one() -> Iterator[dict[str, Tensor]]:
        order = torch.randperm(len(train.labels), generator=generator)
        for index in order.split(size):
            yield train.batch(index, flip=torch.rand(len(index), generator=generator) < 0.5)

    return one


def named_layers(sites: Sequence[SiteAttribution]) -> list[str]:
    """Layers that alone stand before a site whose error their leading triplets make: what S2D should press."""
    return sorted({s.linears[0] for s in sites if s.verdict == "triplet" and len(s.linears) == 1})


def finetune(
    model: nn.Module, arm: str, seed: int, bench: Bench, folder: Path, named: list[str], a: argparse.Namespace
) -> dict[str, Any]:
    """One arm from the pre-trained weights: what came out, with right and wrong of each test image."""
    settings = arm_settings(arm, a)
    qat = settings.pop("qat")
    layers = named if settings.pop("named") else None
    kept = folder / f"{arm}-{seed}.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    model, cpu = copy.deepcopy(model), time.process_time()
    found = condition(
        model,
        "task",
        epochs(bench.train, a.tune_batch, 1000 + seed),
        bench.calibration[:2],
        steps=a.qat_steps if qat else a.tune_steps,
        lr=a.qat_lr if qat else a.tune_lr,
        warmup=(a.qat_steps if qat else a.tune_steps) // 20,
        seed=seed,
        plan=bench.plan if qat else None,
        layers=layers,
        checkpoint_path=folder / f"{arm}-{seed}.pt",
        checkpoint_every=200,
        **settings,
    )
    compared = [
        {k: layer[k] for k in ("name", "flagged", "k_target")} | {w: _brief(layer[w]) for w in ("before", "after")}
        for layer in found.layers
    ]
    precisions = ("w4a4",) if qat else PRECISIONS
    result = {
        "arm": arm,
        "seed": seed,
        "method": found.method,
        "steps": found.steps,
        "seconds": round(found.seconds, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "loss": mean(found.losses[-100:]),
        "scores": bench.measured(model, a.test, precisions),
        "summary": summary(diagnose(model.eval(), bench.calibration[:2], tau=a.tau)),
        "layers": compared,
        "refreshes": len(found.refreshes),
    }
    if seed == a.seeds[0]:
        result |= bench.attributed(model)
    kept.write_text(json.dumps(result))
    return result


def _brief(state: dict[str, Any]) -> dict[str, Any]:
    names = ("pcdr", "sigma_max", "max_abs_activation", "max_abs_input", "kurtosis", "kurtosis_input")
    return {k: state[k] for k in names} | {"singular_values": state["singular_values"][:32]}


def against(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """How much `second` gains over `first` in points, with its 95 % interval."""
    drop = paired_drop(first, second)
    return {"gain": 0.0 - drop.drop, "lo": 0.0 - drop.hi, "hi": 0.0 - drop.lo, "n": drop.n, "method": drop.method}


def pooled(
    runs: Sequence[dict[str, Any]], arm: str, control: str, setting: str, what: str = "correct"
) -> dict[str, Any] | None:
    """The gain of `arm` over `control`, of the mean over seeds for each image; None where a run is missing."""
    by = {(r["arm"], r["seed"]): r["scores"][setting][what] for r in runs if setting in r["scores"]}
    seeds = sorted(s for name, s in by if name == arm and (control, s) in by)
    if not seeds:
        return None
    means = [torch.tensor([by[name, s] for s in seeds]).mean(0).tolist() for name in (control, arm)]
    each = [mean(by[arm, s]) - mean(by[control, s]) for s in seeds]
    return against(*means) | {"seeds": seeds, "each": each}


# ---- all of it ----------------------------------------------------------------------------------------------


def measure(a: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    images = load_images(a.data, a.work, a.image, a.seed)
    a.classes = int(max(int(split.labels.max()) for split in images.values())) + 1
    a.test = min(a.test, len(images["test"].labels))
    bench = Bench(images["train"], images["test"], a)
    settings = {k: v for k, v in vars(a).items() if k not in ("data", "work", "results", "threads")}
    data_digest = hashlib.sha256(images["train"].pixels.numpy().tobytes()).hexdigest()
    pre = ("width", "depth", "heads", "image", "patch", "batch", "pretrain_steps", "lr", "beta2", "pretrain_decay")
    pre = (*pre, "clip", "warmup", "seed", "classes", "looks", "calibration")
    folder = a.work / _digest([data_digest, {k: settings[k] for k in pre}])
    folder.mkdir(parents=True, exist_ok=True)
    model, trace, seconds = pretrain(a, bench.train, bench.look, folder / "pretrained.pt")
    jobs = [(arm, seed) for seed in a.seeds for arm in a.arms]
    jobs += [(f"{arm}-qat", seed) for seed in a.qat_seeds for arm in a.qat_arms]
    arms = list(dict.fromkeys(arm for arm, _ in jobs))
    tuned = folder / _digest(
        {k: v for k, v in settings.items() if k not in (*pre, "arms", "seeds", "qat_arms", "qat_seeds")}
    )
    tuned.mkdir(exist_ok=True)
    start = at_start(model, bench, tuned / "start.json")
    runs = []
    for arm, seed in jobs:
        run = finetune(model, arm, seed, bench, tuned, start["named"], a)
        runs.append(run)
        print(f"{arm}, seed {seed}: {shown(brief_scores(run['scores']))} ({run['seconds']:.0f} s)", flush=True)
    gains: dict[str, Any] = {}
    for arm in arms:
        control = "control-qat" if arm.endswith("-qat") else "control"
        if arm != control:
            for what in ("correct", "agree"):
                names = [
                    n for n in next(r for r in runs if r["arm"] == arm)["scores"] if what == "correct" or n != "fp32"
                ]
                found = {name: pooled(runs, arm, control, name, what) for name in names}
                gains.setdefault(arm, {})[what] = {name: gain for name, gain in found.items() if gain is not None}
    figures = [
        Figure(
            f"{arm} over its control, {name}, points",
            gain["gain"],
            None,
            "pass",
            f"95 % [{gain['lo']:.2f}, {gain['hi']:.2f}], by seed {', '.join(f'{e:+.2f}' for e in gain['each'])}",
        )
        for arm, kinds in gains.items()
        for name, gain in kinds["correct"].items()
    ]
    briefs = {(r["arm"], r["seed"]): brief_scores(r["scores"]) for r in runs}
    means = {
        arm: {
            name: {
                k: mean([found[name][k] for (other, _), found in briefs.items() if other == arm])
                for k in ("top1", "agree", "db")
                if name != "fp32" or k == "top1"
            }
            for name in next(found for (other, _), found in briefs.items() if other == arm)
        }
        for arm in arms
    }
    return figures, {
        "settings": settings,
        "images_sha256": data_digest,
        "pretraining": {"seconds": round(seconds, 1), "trace": trace},
        "start": start,
        "means": means,
        "gains": gains,
        "runs": [_packed(run, run["seed"] == a.seeds[0]) for run in runs],
    }


def at_start(model: nn.Module, bench: Bench, kept: Path) -> dict[str, Any]:
    """What all arms start from: accuracies, both forecasts, and which part of the model W4A4 hurts."""
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    a = bench.a
    scores = brief_scores(bench.measured(model, a.test))
    print("pre-trained: ", shown(scores), flush=True)
    batches, found = bench.calibration[:2], {}
    for tau in (a.tau, a.low_tau):
        found[tau] = diagnose_model(copy.deepcopy(model), lambda: batches, output=OUTPUT, tau=tau)
        print(f"tau {tau:g}: {found[tau].forecast.sentence}", flush=True)
    before = found[a.tau]
    named = named_layers(before.sites)
    print(f"named by diagnose: {', '.join(named) or 'nothing'}", flush=True)
    result = {
        "scores": scores,
        "forecast": before.forecast.to_dict(),
        "forecast_low_tau": found[a.low_tau].forecast.to_dict(),
        "named": named,
        "sites": [site.to_dict() for site in before.sites],
        "layers": [
            {"name": d.name, "flagged": d.flagged, "k_target": d.k_target} | _brief(d.to_dict()) for d in before.layers
        ],
        "left_in_float": bench.left_in_float(model),
    }
    for group, by in result["left_in_float"].items():
        print(f"W4A4, {group} in float: {shown(by)}", flush=True)
    kept.write_text(json.dumps(result))
    return result


def shown(scores: dict[str, dict[str, Any]]) -> str:
    return " ".join(
        f"{n} {s['top1']:.2f}" + ("" if s["db"] is None else f" ({s['db']:.1f} dB)") for n, s in scores.items()
    )


def _packed(run: dict[str, Any], layers: bool) -> dict[str, Any]:
    """Right and wrong as bits in hexadecimal, the first image first: every sample is there. Layers of one seed only."""
    scores = {
        n: {k: bits([v > 0 for v in s[k]]) for k in ("correct", "agree")} | {"db": s["db"]}
        for n, s in run["scores"].items()
    }
    packed = run | {"scores": scores, "brief": brief_scores(run["scores"])}
    if not layers:
        return {k: v for k, v in packed.items() if k != "layers"}
    for layer in packed["layers"]:
        for when in ("before", "after"):
            layer[when]["singular_values"] = layer[when]["singular_values"][:12]
    return packed


def rounded(value: Any) -> Any:
    """Every float to five significant digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(v) for v in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def bits(values: Sequence[bool]) -> str:
    """One bit for each value, filled up with zeros to whole bytes."""
    return np.packbits(np.asarray(values, dtype=bool)).tobytes().hex()


def _digest(what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def arguments_parser() -> argparse.ArgumentParser:
    parser = _common.parser("cifar_vit.py", __doc__ or "")
    parser.add_argument("--data", type=Path, required=True, help="ImageFolder with train/ and test/, or a tar of one")
    parser.add_argument("--work", type=Path, default=_common.WORK / "cifar-vit", help="what is kept between runs")
    parser.add_argument("--threads", type=_common.positive, default=2)
    for name, value in {
        "image": 16,
        "patch": 4,
        "width": 64,
        "depth": 6,
        "heads": 2,
        "batch": 16,
        "pretrain-steps": 12_500,
        "warmup": 300,
        "looks": 5,
        "tune-steps": 600,
        "tune-batch": 32,
        "refresh": 100,
        "k-max": 3,
        "calibration": 256,
        "test": 4000,
    }.items():
        parser.add_argument(f"--{name}", type=_common.positive, default=value)
    for name, number in {
        "lr": 1e-3,
        "beta2": 0.999,
        "pretrain-decay": 0.0,
        "clip": 0.0,
        "tune-lr": 3e-4,
        "qat-lr": 3e-4,
        "tau": 0.9,
        "low-tau": 0.5,
        "factor": 2.5,
        "decay": 0.1,
    }.items():
        parser.add_argument(f"--{name}", type=float, default=number)
    parser.add_argument("--qat-steps", type=_common.positive, default=200)
    parser.add_argument("--qat-arms", nargs="*", choices=ARMS, default=["control", "low-tau"])
    parser.add_argument("--qat-seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:5]))
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the fine-tuning: order of the batches"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of pre-training")
    return parser


def run(a: argparse.Namespace) -> int:
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    a.work.mkdir(parents=True, exist_ok=True)
    record = _common.Record("cifar-vit", a.threads)
    figures, data = measure(a)
    data = rounded(data)
    print(_common.show_figures(figures))
    path = record.write(a.results, figures, data)
    document = record.document(figures, data)
    path.with_suffix(".html").write_text(page(document), encoding="utf-8")
    print(f"results: {path}, {path.with_suffix('.html')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(_common.guarded(run, arguments_parser().parse_args()))
