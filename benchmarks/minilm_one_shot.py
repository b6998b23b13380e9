"""One-shot conditioning and attribution on a sentence encoder (all-MiniLM-L6-v2).

    python benchmarks/minilm_one_shot.py --model FOLDER --data corpus.txt

Attributes every quantized site, then measures each one-shot variant: cosine of the float output to the original's,
and of the simulation at W8A8, W4A8 and W4A4 with MSE and absmax ranges, on sentences that nothing was chosen on.
Calibration and held-out sentences come from a seeded shuffle of the corpus; the last ones are held out.
Writes DATE-minilm-attribution.json and DATE-minilm-one-shot.json into benchmarks/results (or --results); the second
anew after every variant, so that nothing is lost. An empty --variants attributes only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from s2d_deploy.diagnose import diagnose_model
from s2d_deploy.host import cpu_model, versions
from s2d_deploy.models import load_model
from s2d_deploy.one_shot import one_shot
from s2d_deploy.recipe import ModelSection

VARIANTS = ("bypass", "shrink", "insert", "neurons", "fold", "shrink-next", "centre", "centre+bypass")
OUTPUT = "last_hidden_state"


def batches(lines: list[str], tokenizer: Any, length: int, size: int) -> list[dict[str, torch.Tensor]]:
    """Padded batches of the model's inputs."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    result = []
    for start in range(0, len(lines), size):
        encoded = tokenizer(
            lines[start : start + size],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        result.append({name: encoded[name] for name in names if name in encoded})
    return result


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python benchmarks/minilm_one_shot.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or hub id of the encoder")
    parser.add_argument("--data", required=True, type=Path, help="text file, one sentence a line")
    parser.add_argument("--calibration", type=int, default=256, help="sentences to choose on")
    parser.add_argument("--held-out", type=int, default=500, help="sentences to measure on")
    parser.add_argument("--length", type=int, default=32, help="tokens in a sentence, padded")
    parser.add_argument("--tau", type=float, default=0.9, help="PCDR from which on a layer is flagged")
    parser.add_argument("--factor", type=float, default=0.5, help="what is left of a flagged singular value")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), help="variants, several joined by +")
    parser.add_argument("--precisions", nargs="+", default=["w8a8", "w4a8", "w4a4"])
    parser.add_argument("--methods", nargs="+", default=["mse", "absmax"], choices=["mse", "absmax", "percentile"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="for the JSON files")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    from transformers import AutoTokenizer

    model = load_model(ModelSection(pretrained=a.model, task="embedding", output=OUTPUT)).module
    tokenizer = AutoTokenizer.from_pretrained(a.model)
    lines = [line.strip() for line in a.data.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < a.calibration + a.held_out:
        parser.error(f"{a.data} has {len(lines)} lines, {a.calibration + a.held_out} are needed")
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(a.seed)).tolist()
    calibration = batches([lines[i] for i in order[: a.calibration]], tokenizer, a.length, 16)
    held_out = batches([lines[i] for i in order[-a.held_out :]], tokenizer, a.length, 20)
    now = datetime.now(UTC)
    a.results.mkdir(parents=True, exist_ok=True)
    path = a.results / f"{now:%Y-%m-%d}-minilm-one-shot.json"
    settings = {k: v for k, v in vars(a).items() if k not in ("model", "data", "results")}
    document: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(
            ["python benchmarks/minilm_one_shot.py --model MODEL --data CORPUS --variants", *a.variants]
        ),
        "settings": settings,
        "corpus_sha256": hashlib.sha256(a.data.read_bytes()).hexdigest(),
        "cpu": cpu_model(),
        "versions": {k: v for k, v in versions().items() if k in ("python", "torch", "transformers", "numpy")},
    }
    started = time.perf_counter()
    found = diagnose_model(model, lambda: calibration[:4], output=OUTPUT, tau=a.tau)
    flagged = {layer.name: layer.k_target for layer in found.layers if layer.flagged}
    attribution = {
        "seconds": round(time.perf_counter() - started, 1),
        "flagged": flagged,
        "forecast": found.forecast.to_dict(),
        "sites": [site.to_dict() for site in found.sites],
    }
    sites = a.results / f"{now:%Y-%m-%d}-minilm-attribution.json"
    sites.write_text(json.dumps(document | attribution, indent=1) + "\n")
    document |= {"flagged": flagged, "variants": []}
    print(found.forecast.sentence, flush=True)
    before = None
    for name in a.variants:
        started = time.perf_counter()
        _, result = one_shot(
            model,
            calibration,
            held_out,
            name.split("+"),
            output=OUTPUT,
            flagged=flagged,
            factor=a.factor,
            precisions=a.precisions,
            methods=a.methods,
            before=before,
        )
        before = result.before
        entry = result.to_dict() | {"seconds": round(time.perf_counter() - started, 1)}
        document["variants"].append(entry)
        path.write_text(json.dumps(document, indent=1) + "\n")
        if len(document["variants"]) == 1:
            print(f"{'original':16}", *(f"{key} {value:.1f}" for key, value in before.items()), flush=True)
        values = " ".join(f"{key} {value:.1f}" for key, value in result.after.items())
        print(f"{name:16} {values}  float cosine {result.cosine:.4f}, {entry['seconds']:.0f} s", flush=True)
    print(sites, path if a.variants else "")


if __name__ == "__main__":
    main()
