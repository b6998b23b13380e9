"""What each quantization recipe is worth: on the original model and on the one that S2D conditioned.

    python benchmarks/ptq_recipes.py --model FOLDER --data corpus.txt --task embedding --conditioned FOLDER2
    python benchmarks/ptq_recipes.py --model FOLDER --data IMAGES --task image-classification

Every recipe of the table below runs at every precision on the same calibration and held-out samples: cosine to the
float original and share of equal nearest neighbours for an encoder, top-1 for a classifier; with the seconds of its
passes and the peak memory of its own process (model, data and torch included; the float forward pass stands beside it).
Everything is the simulation, which the parity checks of a run compare with the runtimes.

Each recipe is a process of its own, its result kept in --work: an interrupted run goes on where it stopped. Writes
DATE-ptq-NAME.json and DATE-ptq-NAME.svg.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _common
import _ptq_data
from _common import Figure

PRECISIONS = ("w8a8", "w6a6", "w4a8", "w4a4")
TOKEN = {"activation_granularity": "token"}
# name -> (passes, keys of QuantizeConfig)
RECIPES: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "rtn-absmax": ([], {"weights": "absmax", "activations": "absmax"}),
    "rtn-percentile": ([], {"weights": "mse", "activations": "percentile"}),
    "rtn-entropy": ([], {"weights": "mse", "activations": "entropy"}),
    "rtn-mse": ([], {}),
    "rtn-token": ([], TOKEN),
    "smoothquant": (["smoothquant"], {}),
    "smoothquant-insert": ([{"smoothquant": {"insert": True}}], {}),
    "equalization": (["equalization"], {}),
    "rotation": (["rotation"], {}),
    "rotation-online": ([{"rotation": {"online": True}}], {}),
    "rotation-online-token": ([{"rotation": {"online": True}}], TOKEN),
    "gptq": (["gptq"], {}),
    "awq": (["awq", "ranges", "awq_clip"], {}),
    "adaround": (["adaround"], {}),
    "bias-correction": (["bias_correction"], {}),
    "erq": (["erq"], {}),
    "norm-tweaking": (["gptq", "norm_tweaking"], {}),
    "repq": (["repq"], {}),
    "ptq4vit": (["ptq4vit"], {}),
    "flatquant": (["flatquant"], {}),
    "mixed-6": ([{"mixed": {"budget": 6}}], {}),
    "rotated-gptq": ([{"rotation": {"online": True}}, "gptq"], {}),
    "rotated-erq": ([{"rotation": {"online": True}}, "erq"], {}),
    "rotated-erq-token": ([{"rotation": {"online": True}}, "erq"], TOKEN),
    "rotated-gptq-token": ([{"rotation": {"online": True}}, "gptq"], TOKEN),
    "smooth-rotated-token": ([{"smoothquant": {"insert": True}}, {"rotation": {"online": True}}], TOKEN),
    "smooth-rotated-gptq-token": ([{"smoothquant": {"insert": True}}, {"rotation": {"online": True}}, "gptq"], TOKEN),
    "flatquant-erq-norm": (["flatquant", "erq", "norm_tweaking"], {}),
    "flatquant-erq-norm-token": (["flatquant", "erq", "norm_tweaking"], TOKEN),
    "flatquant-gptq": (["flatquant", "gptq"], {}),
    "flatquant-gptq-token": (["flatquant", "gptq"], TOKEN),
}


def child(a: argparse.Namespace) -> dict[str, Any]:
    """One recipe on one model, at every precision, in this process."""
    from s2d_deploy.discovery import discover
    from s2d_deploy.errors import S2DDeployError
    from s2d_deploy.models import load_model
    from s2d_deploy.ptq.passes import Context, parse_steps, run_passes
    from s2d_deploy.quantize import QuantizeConfig
    from s2d_deploy.recipe import ModelSection
    from s2d_deploy.simulation import simulate

    evidence = _ptq_data.load_evidence(a)
    calibration = evidence.calibration
    module = evidence.module
    if a.conditioned is not None:
        module = load_model(ModelSection(pretrained=str(a.conditioned), task=a.task)).module

    ops = discover(module, {n: t[:1] for n, t in calibration[0].items()}, evidence.output)
    result: dict[str, Any] = {"float": evidence.measured(module), "memory_before_bytes": _peak(), "precisions": {}}
    passes, keys = RECIPES[a.only]
    for precision in a.precisions:
        started = time.perf_counter()
        try:
            context = Context(lambda: iter(calibration), evidence.output, QuantizeConfig(**keys), a.seed)
            quantized = run_passes(module, ops, precision, parse_steps(passes), context)
            seconds = time.perf_counter() - started
            simulated = simulate(quantized.model, quantized.plan).eval()
            result["precisions"][precision] = {"seconds": round(seconds, 1), **evidence.measured(simulated)}
        except S2DDeployError as error:  # a recipe that this model or precision cannot have says why
            result["precisions"][precision] = {"refused": str(error)}
    result["memory_bytes"] = _peak()
    return result


def _peak() -> int:
    """Peak resident memory of this process, bytes."""
    unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(a: argparse.Namespace) -> int:
    """Every recipe on every model, and the tables."""
    if a.only is not None:
        print(json.dumps(child(a)))
        return 0
    record = _common.Record(f"ptq-{a.name}", a.threads, _command(a))
    models: dict[str, Path | None] = {"original": None}
    if a.conditioned is not None:
        models["s2d"] = a.conditioned
    found: dict[str, dict[str, Any]] = {}
    for name in a.recipes:
        found[name] = {}
        for model, folder in models.items():
            found[name][model] = _kept(a, name, folder)
            print(f"{name:22} {model:9} {_line(found[name][model])}", flush=True)
    document = {
        "task": a.task,
        "recipes": {name: {"passes": p, "keys": k} for name, (p, k) in RECIPES.items() if name in found},
        "settings": _ptq_data.settings(a),
        "results": found,
    }
    print(_table(found, list(models), a.precisions))
    code = _common.finish(record, a.results, figures_of(a, found), document)
    from _ptq_plot import draw

    path = a.results / f"{record.started:%Y-%m-%d}-ptq-{a.name}.svg"
    path.write_text(draw(found, a.precisions, a.task), encoding="utf-8")
    print(f"plot: {path}")
    return code


def figures_of(a: argparse.Namespace, found: Mapping[str, Mapping[str, Any]]) -> list[Figure]:
    """What the project promises: for an encoder the cosine that W4A4 reaches, for a classifier the points it loses."""
    figures = []
    limits = {"w4a4": 5.0} if a.task == "embedding" else {"w4a4": 1.0, "w8a8": 0.1}
    for precision, limit in limits.items():
        best: tuple[float, str] | None = None
        # A mixed assignment has the bits of its budget, whatever the column says.
        for name, models in ((n, m) for n, m in found.items() if not n.startswith("mixed")):
            for model, result in models.items():
                value = result["precisions"].get(precision, {}).get("value")
                if value is not None:
                    whole = 100.0 if a.task == "embedding" else found[name]["original"]["float"]["value"]
                    best = min(best or (float("inf"), ""), (whole - value, f"{name} on {model}"))
        what = "cosine x 100 lost" if a.task == "embedding" else "points lost"
        name = f"{precision}: {what} by the best recipe"
        figures.append(_common.at_most(name, best[0] if best else None, limit, best[1] if best else "not measured"))
    return figures


def _kept(a: argparse.Namespace, name: str, conditioned: Path | None) -> dict[str, Any]:
    """The result of one process, from --work where it is there for the same settings."""
    key = {
        "recipe": RECIPES[name],
        "model": _digest(a.model),
        "conditioned": None if conditioned is None else _digest(conditioned),
        "sources": _sources(RECIPES[name][0]),
        "precisions": list(a.precisions),
        **{k: str(getattr(a, k)) for k in ("task", "calibration", "held_out", "length", "batch", "seed", "data")},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = a.work / f"{name}-{digest}.json"
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    arguments = ["--model", a.model, "--data", a.data, "--task", a.task, "--only", name]
    arguments += ["--conditioned", conditioned] if conditioned is not None else []
    for option in ("calibration", "held_out", "length", "batch", "seed", "threads"):
        arguments += [f"--{option.replace('_', '-')}", getattr(a, option)]
    arguments += ["--precisions", *a.precisions]
    done = subprocess.run([sys.executable, __file__, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        return {"float": {}, "precisions": {p: {"refused": done.stderr.strip()[-400:]} for p in a.precisions}}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return result


def _digest(folder: Path) -> str:
    h = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")) + sorted(Path(folder).glob("*.bin")):
        h.update(path.read_bytes())
    return h.hexdigest()


def _sources(passes: Sequence[Any]) -> str:
    """Digest of the code that a recipe's result depends on: its passes, and whatever they import of the package."""
    names = [entry if isinstance(entry, str) else next(iter(entry)) for entry in passes]
    pending = [f"s2d_deploy.ptq.{name}" for name in ["ranges", *names]]
    pending += ["s2d_deploy.ptq.passes", "s2d_deploy.simulation", "s2d_deploy.discovery"]
    root = Path(__file__).resolve().parents[1]
    found: dict[str, bytes] = {}
    while pending:
        name = pending.pop()
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        if name in found or not path.is_file():
            continue
        found[name] = path.read_bytes()
        for node in ast.walk(ast.parse(found[name])):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("s2d_deploy"):
                pending += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return hashlib.sha256(b"".join(found[name] for name in sorted(found))).hexdigest()


def _command(a: argparse.Namespace) -> list[str]:
    """As typed, without the paths of one machine."""
    command = ["python", "benchmarks/ptq_recipes.py", "--model", "MODEL", "--data", "DATA", "--task", a.task]
    command += ["--conditioned", "CONDITIONED"] if a.conditioned is not None else []
    settings = [("calibration", a.calibration), ("held-out", a.held_out), ("batch", a.batch), ("name", a.name)]
    command += [str(word) for name, value in settings for word in (f"--{name}", value)]
    return [*command, "--precisions", *a.precisions, "--recipes", *a.recipes]


def _line(result: Mapping[str, Any]) -> str:
    parts = []
    for precision, row in result["precisions"].items():
        parts.append(f"{precision} {row['value']:.2f}" if "value" in row else f"{precision} refused")
    return ", ".join(parts)


def _table(found: Mapping[str, Mapping[str, Any]], models: Sequence[str], precisions: Sequence[str]) -> str:
    header = ["recipe", *(f"{p} {m}" for p in precisions for m in models), "s", "MiB"]
    rows = []
    for name, results in found.items():
        cells = [name]
        for precision in precisions:
            for model in models:
                row = results[model]["precisions"].get(precision, {})
                cells.append(f"{row['value']:.2f}" if "value" in row else "-")
        first = results[models[0]]
        cells.append(f"{max((r.get('seconds', 0) for r in first['precisions'].values()), default=0):.0f}")
        cells.append(f"{first['memory_bytes'] / 2**20:.0f}" if "memory_bytes" in first else "-")
        rows.append(cells)
    return _common.table(header, rows)


def arguments_parser() -> argparse.ArgumentParser:
    """Every option."""
    parser = _common.parser("ptq_recipes.py", __doc__)
    _ptq_data.add_options(parser)
    parser.add_argument("--conditioned", type=Path, help="folder of the same model after conditioning")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--work", type=Path, default=_common.WORK / "ptq", help="where finished recipes are kept")
    parser.add_argument("--only", choices=list(RECIPES), help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    chosen = arguments_parser().parse_args()
    _common.limit_threads(chosen.threads)
    sys.exit(_common.guarded(run, chosen))
