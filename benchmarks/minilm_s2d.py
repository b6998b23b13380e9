"""What S2D does for a sentence encoder (all-MiniLM-L6-v2), against the same steps without it.

    python benchmarks/minilm_s2d.py --model FOLDER --data corpus.txt

Every arm gets the same sentences and steps: the model imitates its own frozen copy (`distill`), with S2D or without.
Then it is simulated at each precision with absmax and with MSE ranges, and compared with the original in FP32 on
sentences that neither training nor calibration saw: mean cosine of the embeddings, and the share of sentences whose
nearest other held-out sentence is the same. Held-out sentences are the same for all seeds; a seed chooses and orders
the others for calibration and training. Each (arm, seed) is kept in --work and used again when the settings are equal.
Writes DATE-minilm-s2d.json and its plots into benchmarks/results (or --results). Exits with 0 only where the S2D arm
halves what it presses, worst layer and mean of the seeds, and keeps the float model (cosine 0.995, neighbours 90 %).
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import _common
import _minilm_plots
import numpy as np
import torch
from _common import Figure, at_most
from _minilm_arms import ARMS, DEFAULT_ARMS, Data
from minilm_one_shot import OUTPUT, batches
from torch import nn

from s2d_deploy.calibrate import calibrate
from s2d_deploy.discovery import discover
from s2d_deploy.errors import DataError, message
from s2d_deploy.evaluate import embed, neighbour_agreement, outputs, score, torch_run
from s2d_deploy.files import write_json
from s2d_deploy.host import versions
from s2d_deploy.models import load_model
from s2d_deploy.pcdr import Batch
from s2d_deploy.quantize import QuantizeConfig, build_plan
from s2d_deploy.recipe import ModelSection
from s2d_deploy.session import Array
from s2d_deploy.simulation import simulate

PRECISIONS = ("w8a8", "w6a6", "w5a5", "w4a8", "w4a4")
METHODS = ("absmax", "mse")
# Sentences in one forward pass, for calibration and selection, and for the comparison.
_SEEN, _ROWS = 32, 50
# Shuffles which sentences are held out; not a seed of the experiment, so that all seeds answer the same questions.
_HELD_OUT = 20261123


def split(lines: Sequence[str], held_out: int, calibration: int, seed: int) -> tuple[list[str], list[str], list[str]]:
    """Calibration, training and held-out sentences, each sentence once; held out are the same for every seed.

    Raises:
        DataError: too few sentences.
    """
    known = list(dict.fromkeys(lines))
    if len(known) < held_out + 2 * calibration:
        raise DataError(
            message(
                "too few sentences to hold some out",
                expected=f"at least {held_out + 2 * calibration} different ones",
                found=f"{len(known)}",
                fix="give a larger corpus, or lower --held-out and --calibration",
            )
        )
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(_HELD_OUT)).tolist()
    rest = order[held_out:]
    mixed = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed)).tolist()
    seen = [known[rest[i]] for i in mixed]
    return seen[:calibration], seen[calibration:], [known[i] for i in order[:held_out]]


def trimmed(batch: Batch) -> Batch:
    """Without the tokens that pad every sentence of the batch: the real ones do not see them."""
    longest = int(batch["attention_mask"].sum(dim=1).max())
    return {name: tensor[:, :longest] for name, tensor in batch.items()}


def embeddings(model: nn.Module, held_out: Sequence[Batch]) -> Array:
    """Unit embeddings ``(n, D)`` of all held-out sentences."""
    run = torch_run(model, OUTPUT)
    parts = [embed(outputs(run, OUTPUT, [dict(b)]), b["attention_mask"].numpy()) for b in held_out]
    return np.concatenate(parts)


def compared(found: Array, reference: Array) -> dict[str, float]:
    """How near embeddings are to the original's."""
    return {
        "cosine": score("embedding", found, reference, None, None).value / 100,
        "neighbour": neighbour_agreement(found, reference).value,
        "neighbour5": neighbour_agreement(found, reference, k=5).value,
    }


@dataclass
class Bench:
    """The original model and what all arms are measured against."""

    chosen: argparse.Namespace
    model: nn.Module
    encode: Callable[[Sequence[str], int], list[Batch]]
    lines: list[str]
    identity: dict[str, Any]
    _reference: Array | None = field(default=None, init=False)

    def data(self, seed: int) -> Data:
        """This seed's batches; exactly as many for training as there are steps, or all there are."""
        chosen = self.chosen
        calibration, train, held_out = split(self.lines, chosen.held_out, chosen.calibration, seed)
        return Data(
            self.encode(calibration, _SEEN),
            self.encode(train[: chosen.steps * chosen.batch], chosen.batch),
            # By length, so that there is padding to cut off.
            [trimmed(batch) for batch in self.encode(sorted(held_out, key=len), _ROWS)],
        )

    def settings(self, name: str, seed: int) -> dict[str, Any]:
        """All that a result depends on."""
        common = ("held_out", "calibration", "length", "tau", "k_max", "precisions", "methods")
        options = {key: getattr(self.chosen, key) for key in (*common, *ARMS[name].options)}
        return json.loads(json.dumps({"arm": name, "seed": seed, **self.identity, **options}))

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """One arm with one seed, from the work folder where it was measured with the same settings."""
        path = self.chosen.work / f"{name}-seed{seed}.json"
        wanted = self.settings(name, seed)
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["settings"] == wanted:
                print(f"{name}, seed {seed}: kept", flush=True)
                return kept
        started = time.perf_counter()
        result = {"settings": wanted, **self._measured(name, seed)}
        result["seconds"] = round(time.perf_counter() - started, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)
        values = " ".join(f"{key} {value['cosine']:.3f}" for key, value in result["quantized"].items())
        print(
            f"{name}, seed {seed}, {result['seconds']:.0f} s: float {result['float']['cosine']:.4f} {values}",
            flush=True,
        )
        return result

    def _measured(self, name: str, seed: int) -> dict[str, Any]:
        data, chosen = self.data(seed), self.chosen
        if self._reference is None:
            self._reference = embeddings(self.model, data.held_out)
        model = copy.deepcopy(self.model)
        facts = ARMS[name].apply(model, data, chosen, seed)
        model.eval()
        quantized = {}
        ops = discover(model, data.calibration[0], OUTPUT)
        seen = calibrate(model, ops, data.calibration)
        for precision in chosen.precisions:
            for method in chosen.methods:
                plan = build_plan(model, ops, seen, precision, QuantizeConfig(weights=method, activations=method))
                found = embeddings(simulate(model, plan), data.held_out)
                quantized[f"{precision}/{method}"] = compared(found, self._reference)
        return {
            "layers": facts.pop("layers", {}),
            "facts": facts,
            "float": compared(embeddings(model, data.held_out), self._reference),
            "quantized": quantized,
        }


# ---- summaries ----------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and largest of the seeds."""
    return {"mean": fmean(values), "min": min(values), "max": max(values)}


def ratios(result: dict[str, Any], key: str) -> dict[str, float]:
    """After over before, by flagged layer."""
    return {name: pair["after"][key] / pair["before"][key] for name, pair in result["layers"].items()}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One arm over its seeds: every metric's spread; layers as after over before."""

    def over(pick: Callable[[dict[str, Any]], dict[str, float]]) -> dict[str, dict[str, float]]:
        picked = [pick(run) for run in runs]
        shared = [key for key in picked[0] if all(key in p for p in picked)]
        return {key: spread([p[key] for p in picked]) for key in shared}

    return {
        "seeds": [run["settings"]["seed"] for run in runs],
        "float": over(lambda run: run["float"]),
        "quantized": {key: over(lambda run, key=key: run["quantized"][key]) for key in runs[0]["quantized"]},
        "sigma_max_ratio": over(lambda run: ratios(run, "sigma_max")),
        "max_abs_ratio": over(lambda run: ratios(run, "max_abs_activation")),
    }


def figures_of(arms: dict[str, dict[str, Any]], arm: str = "s2d") -> list[Figure]:
    """What the S2D arm promises of the float model; what it buys is reported."""
    if arm not in arms:
        return []
    s, result = arms[arm], []
    for key, words in (("max_abs_ratio", "largest |output|"), ("sigma_max_ratio", "s_max")):
        worst = max(s[key].items(), key=lambda entry: entry[1]["mean"], default=None)
        note = "no layer is flagged" if worst is None else f"worst of {len(s[key])} flagged layers: {worst[0]}"
        value = None if worst is None else worst[1]["mean"]
        result.append(at_most(f"{arm}: {words}, after over before, worst layer", value, 0.5, note))
    result.append(at_most(f"{arm}: 1 - float cosine", 1 - s["float"]["cosine"]["mean"], 0.005))
    result.append(
        at_most(f"{arm}: sentences with another neighbour, float, %", 100 - s["float"]["neighbour"]["mean"], 10)
    )
    return result


def show(arms: dict[str, dict[str, Any]], metric: str, digits: int) -> str:
    """Mean [min, max] over the seeds, arms down and precisions across."""

    def cell(values: dict[str, float]) -> str:
        return f"{values['mean']:.{digits}f} [{values['min']:.{digits}f}, {values['max']:.{digits}f}]"

    keys = list(next(iter(arms.values()))["quantized"])
    rows = [
        (name, cell(s["float"][metric]), *(cell(s["quantized"][key][metric]) for key in keys))
        for name, s in arms.items()
    ]
    return _common.table((metric, "float", *keys), rows)


def show_layers(arms: dict[str, dict[str, Any]]) -> str:
    """After over before of the flagged layers: s_max and largest |output|, mean over the seeds."""
    rows = [
        (name, layer, f"{s['sigma_max_ratio'][layer]['mean']:.2f}", f"{s['max_abs_ratio'][layer]['mean']:.2f}")
        for name, s in arms.items()
        for layer in s["sigma_max_ratio"]
        if name != "original"
    ]
    return _common.table(("arm", "layer", "s_max", "max |output|"), rows)


def run(chosen: argparse.Namespace) -> int:
    """Measure what is missing, summarize, write."""
    torch.set_num_threads(chosen.threads)
    from transformers import AutoTokenizer

    typed = sys.argv[1:]
    for key, word in (("model", "MODEL"), ("data", "CORPUS"), ("work", "WORK"), ("results", "RESULTS")):
        typed = [word if value == str(getattr(chosen, key)) else value for value in typed]
    record = _common.Record("minilm-s2d", chosen.threads, ["python", "benchmarks/minilm_s2d.py", *typed])
    model = load_model(ModelSection(pretrained=chosen.model, task="embedding", output=OUTPUT)).module
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + tensor.contiguous().numpy().tobytes())
    bench = Bench(
        chosen,
        model,
        lambda lines, size: batches(list(lines), tokenizer, chosen.length, size),
        [line.strip() for line in chosen.data.read_text(encoding="utf-8").splitlines() if line.strip()],
        {
            "weights_sha256": weights.hexdigest(),
            "corpus_sha256": hashlib.sha256(chosen.data.read_bytes()).hexdigest(),
            "torch": versions()["torch"],
            "threads": chosen.threads,
        },
    )
    # Seed by seed, so that a run that is cut short has whole comparisons.
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen.arms}
    for seed in chosen.seeds:
        for name in chosen.arms:
            runs[name].append(bench.measure(name, seed))
    arms = {name: summary(found) for name, found in runs.items()}
    print("", show(arms, "cosine", 3), "", show(arms, "neighbour", 1), "", show_layers(arms), "", sep="\n")
    figures = figures_of(arms)
    print(_common.show_figures(figures))
    options = {k: v for k, v in vars(chosen).items() if k not in ("model", "data", "work", "results")}
    data = {
        "options": options,
        **bench.identity,
        "arms": {name: {"about": ARMS[name].about, **found} for name, found in arms.items()},
        "runs": runs,
    }
    path = record.write(chosen.results, figures, data)
    plots = _minilm_plots.write(arms, runs, path.with_suffix(""))
    print("results:", path, *plots)
    return 0 if _common.overall(figures) == "pass" else 1


def arguments_parser() -> argparse.ArgumentParser:
    made = _common.parser("minilm_s2d.py", str(__doc__))
    made.add_argument("--model", required=True, help="folder or hub id of the encoder")
    made.add_argument("--data", required=True, type=Path, help="text file, one sentence a line")
    made.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(DEFAULT_ARMS))
    made.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of data order, calibration and training")
    made.add_argument("--held-out", type=_common.positive, default=500, help="sentences to measure on")
    made.add_argument("--calibration", type=_common.positive, default=256, help="sentences for ranges and selection")
    made.add_argument("--length", type=_common.positive, default=32, help="tokens in a sentence, padded")
    made.add_argument("--steps", type=_common.positive, default=200)
    made.add_argument("--batch", type=_common.positive, default=16, help="sentences in a step")
    made.add_argument("--lr", type=float, default=5e-5, help="peak learning rate")
    made.add_argument("--warmup", type=int, default=5, help="steps")
    made.add_argument("--tau", type=float, default=0.9, help="PCDR from which on a layer is flagged")
    made.add_argument("--k-max", type=_common.positive, default=8, help="triplets of a layer that may be pressed")
    made.add_argument("--refresh", type=_common.positive, default=40, help="steps between refreshes")
    made.add_argument("--factor", type=float, default=125.0, help="of the decoupled decay, times the learning rate")
    made.add_argument("--sites-factor", type=float, default=10.0, help="as --factor, of the arm s2d-sites")
    made.add_argument("--decay", type=float, default=5e-2, help="lambda of the coupled penalty")
    made.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    made.add_argument("--methods", nargs="+", default=list(METHODS), choices=["mse", "absmax", "percentile"])
    made.add_argument("--threads", type=_common.positive, default=1)
    made.add_argument("--work", type=Path, default=Path("build/minilm-s2d"), help="where finished arms are kept")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return _common.guarded(run, arguments_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
