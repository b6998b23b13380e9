"""Our quantization beside what a user would otherwise take, on the same model and samples, in one run.

    python benchmarks/ptq_peers.py --model FOLDER --data corpus.txt --task embedding --name peers-minilm

INT8 weights and activations: ONNX Runtime's `quantize_static`, NVIDIA ModelOpt, NNCF. INT4 weights in blocks: ModelOpt,
ONNX Runtime's `MatMulNBitsQuantizer`, NNCF's `compress_weights`. Ours: the presets and the best recipes, as the
simulation and (`@ort`) as ONNX Runtime executes them. `_ptq_toolkits.py` says what each is given and what is timed.

Each row: accuracy on the held-out samples (cosine to the float original and share of equal nearest neighbours; top-1
and share of equal decisions), seconds of quantization with calibration, quantized layers (with attention's products
behind the plus). Rounds interleave all candidates; whoever takes more than 30 s runs once. The process is bound to as
many cores as --threads says, because some toolkits take all they see.

Figures: for each format our best against the best peer; and for each peer its counterpart of ours, whatever came out
best. Accuracy passes where ours is not below; where it is, but the paired 95 % interval holds zero, it is undecided.
Seconds pass where ours took no longer in any round. What cannot run is listed as unavailable, with its reason.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _common
import _ptq_data
from _common import Figure
from _ptq_toolkits import (
    PRECISION,
    TOKEN,
    Bench,
    Candidate,
    modelopt,
    nbits_config,
    nncf,
    ort_nbits,
    ort_static,
    ours,
)

if TYPE_CHECKING:
    from s2d_deploy.evaluate import Score

_ONCE_BEYOND_SECONDS = 30.0
_FIRST = {"embedding": ("cosine x 100", "neighbours"), "image-classification": ("top-1", "agreement")}
_AWQ: list[Any] = ["awq", "ranges", "awq_clip"]
_SMOOTH: list[Any] = [{"smoothquant": {"insert": True}}]
_ROTATED: list[Any] = [{"rotation": {"online": True}}]
_ABSMAX = {"weights": "absmax", "activations": "absmax"}


def _both(name: str, passes: list[Any], keys: Mapping[str, Any], how: str) -> list[Candidate]:
    """A W8A8 recipe simulated, and on ONNX Runtime."""
    return [ours(name, "int8", passes, keys, how), ours(f"{name}@ort", "int8", passes, keys, how, executed=True)]


CANDIDATES: tuple[Candidate, ...] = (
    *_both("int8", [], {}, "preset int8: MSE ranges"),
    *_both("int8-absmax", [], _ABSMAX, "absmax ranges"),
    *_both("int8_smoothquant", ["smoothquant"], {}, "preset int8_smoothquant: MSE ranges, scales folded"),
    *_both("int8-smoothquant-insert", _SMOOTH, {}, "SmoothQuant with products inserted, MSE ranges"),
    *_both("int8-rotated", _ROTATED, {}, "rotation, online Hadamard products, MSE ranges"),
    *_both("int8-token", [], TOKEN, "one scale for each token, at run time"),
    *_both("int8-rotated-token", _ROTATED, TOKEN, "rotation, one scale for each token"),
    ort_static("ort-minmax", "MinMax", "int8@ort"),
    ort_static("ort-entropy", "Entropy", "int8@ort"),
    ort_static("ort-percentile", "Percentile", "int8@ort"),
    modelopt("modelopt-int8", "int8", "INT8_DEFAULT_CFG", "INT8_DEFAULT_CFG, torch fake quant", "int8"),
    modelopt(
        "modelopt-smoothquant",
        "int8",
        "INT8_SMOOTHQUANT_CFG",
        "INT8_SMOOTHQUANT_CFG, torch fake quant",
        "int8_smoothquant",
    ),
    nncf("nncf", "int8", "quantize, TRANSFORMER, fast bias correction; OpenVINO", "int8_smoothquant@ort"),
    nncf("nncf-onnx", "int8", "the same, of the ONNX file; OpenVINO", "int8_smoothquant@ort", onnx=True),
    nncf(
        "nncf-bias",
        "int8",
        "quantize, TRANSFORMER, full bias correction; OpenVINO",
        "int8_smoothquant@ort",
        fast_bias_correction=False,
    ),
    ours("int4", "int4", [], {}, "round to nearest, MSE ranges"),
    ours("int4@ort", "int4", [], {}, "round to nearest, MSE ranges", executed=True),
    ours("int4-absmax", "int4", [], _ABSMAX, "round to nearest, absmax ranges"),
    ours("int4_awq", "int4", _AWQ, {}, "preset int4_awq"),
    ours("int4_awq@ort", "int4", _AWQ, {}, "preset int4_awq", executed=True),
    ours("int4_gptq", "int4", ["gptq"], {}, "preset int4_gptq"),
    ours("int4_gptq@ort", "int4", ["gptq"], {}, "preset int4_gptq", executed=True),
    ours("int4-gptq-once", "int4", [{"gptq": {"sequential": False}}], {}, "GPTQ on the float model's inputs, one pass"),
    ours("int4-awq-gptq", "int4", [*_AWQ, "gptq"], {}, "AWQ, then GPTQ"),
    modelopt(
        "modelopt-int4",
        "int4",
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG, torch fake quant",
        "int4",
    ),
    modelopt("modelopt-awq-lite", "int4", "INT4_AWQ_CFG", "INT4_AWQ_CFG (awq_lite), torch fake quant", "int4_awq"),
    modelopt(
        "modelopt-awq-full",
        "int4",
        "INT4_AWQ_CFG",
        "INT4_AWQ_CFG with awq_full, torch fake quant",
        "int4_awq",
        method="awq_full",
    ),
    modelopt(
        "modelopt-gptq",
        "int4",
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
        "INT4_BLOCKWISE_WEIGHT_ONLY_CFG with gptq, torch fake quant",
        "int4_gptq",
        method="gptq",
    ),
    ort_nbits("ort-rtn", "MatMulNBits, default, asymmetric", "int4@ort", nbits_config("Default"), False),
    ort_nbits(
        "ort-rtn-sym", "MatMulNBits, default, symmetric", "int4@ort", nbits_config("Default", is_symmetric=True), True
    ),
    ort_nbits("ort-hqq", "MatMulNBits, HQQ, asymmetric", "int4_gptq@ort", nbits_config("HQQ"), False),
    ort_nbits("ort-gptq-sym", "MatMulNBits, GPTQ, symmetric", "int4_gptq@ort", nbits_config("GPTQ"), True),
    ort_nbits("ort-kquant", "MatMulNBits, k-quant, asymmetric", "int4_gptq@ort", nbits_config("KQuant"), False),
    ort_nbits("ort-gptq", "MatMulNBits, GPTQ, asymmetric", "int4_gptq@ort", nbits_config("GPTQ"), False),
    nncf("nncf-int4", "int4", "compress_weights INT4_SYM; OpenVINO", "int4@ort"),
    nncf(
        "nncf-int4-scale",
        "int4",
        "compress_weights INT4_SYM, scale estimation; OpenVINO",
        "int4@ort",
        scale_estimation=True,
    ),
    nncf("nncf-int4-awq", "int4", "compress_weights INT4_SYM, AWQ; OpenVINO", "int4_awq@ort", awq=True),
    nncf(
        "nncf-int4-awq-scale",
        "int4",
        "compress_weights INT4_SYM, AWQ, scale estimation; OpenVINO",
        "int4_awq@ort",
        awq=True,
        scale_estimation=True,
    ),
    nncf("nncf-int4-gptq", "int4", "compress_weights INT4_SYM, GPTQ; OpenVINO", "int4_gptq@ort", gptq=True),
)
BY_NAME = {c.name: c for c in CANDIDATES}


@dataclass
class Row:
    """What was measured of one candidate.

    Attributes:
        seconds, cpu_seconds: of each round, by round.
        scores: by name; the first is judged.
        facts: layers, products, export seconds, note.
        unavailable: why there are no numbers, else None.
    """

    seconds: dict[int, float] = field(default_factory=dict)
    cpu_seconds: dict[int, float] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    unavailable: str | None = None

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds.values())

    def document(self) -> dict[str, Any]:
        """For the result file."""
        if self.unavailable is not None:
            return {"unavailable": self.unavailable}
        return {
            **{name: score.value for name, score in self.scores.items()},
            "seconds": [round(s, 3) for s in self.seconds.values()],
            "cpu_seconds": [round(s, 3) for s in self.cpu_seconds.values()],
            **self.facts,
        }


def measure(candidates: Sequence[Candidate], bench: Bench, rounds: int) -> dict[str, Row]:
    """Quantize with every candidate in turn, `rounds` times; accuracy is measured in the first round."""
    rows = {c.name: Row() for c in candidates}
    for turn in range(rounds):
        bench.next_round(only_seconds=turn > 0)
        order = candidates if turn % 2 == 0 else list(reversed(candidates))
        for candidate in order:
            row = rows[candidate.name]
            if row.unavailable is not None or max(row.seconds.values(), default=0) > _ONCE_BEYOND_SECONDS:
                continue
            _one(candidate, bench, row, turn)
            print(f"round {turn + 1}  {candidate.name:26} {_said(row)}", flush=True)
    return rows


def _one(candidate: Candidate, bench: Bench, row: Row, turn: int) -> None:
    gc.collect()
    try:
        candidate.check()
        made = candidate.make(bench)
        row.seconds[turn], row.cpu_seconds[turn] = made.seconds, made.cpu_seconds
        if turn == 0:
            row.scores = bench.evidence.scores(made.run)
            row.facts = {"layers": made.layers, "products": made.products}
            row.facts |= {} if made.export_seconds is None else {"export_seconds": round(made.export_seconds, 2)}
            row.facts |= {"note": made.note} if made.note else {}
    except Exception as error:  # toolkits fail in their own ways; a refusal of ours is a result as well
        text = " ".join(str(error).split()).replace(str(bench.folder), "FOLDER")
        row.unavailable = f"{type(error).__name__}: {text[:400]}"


def _said(row: Row) -> str:
    if row.unavailable is not None:
        return f"unavailable: {row.unavailable}"
    scores = ", ".join(f"{name} {score.value:.3f}" for name, score in row.scores.items())
    return f"{scores}, {list(row.seconds.values())[-1]:.2f} s, {row.facts['layers']}+{row.facts['products']} quantized"


def figures_of(candidates: Sequence[Candidate], rows: Mapping[str, Row], task: str) -> list[Figure]:
    """Best against best for each format, then each peer against its counterpart."""
    unit = _FIRST[task][0]
    figures = []
    for form in PRECISION:
        best: dict[bool, str | None] = {}
        for mine in (True, False):
            names = [c.name for c in candidates if c.format == form and c.ours == mine and rows[c.name].scores]
            best[mine] = max(names, key=lambda n: rows[n].scores["value"].value, default=None)
        if any(c.format == form for c in candidates):
            figures += _pair(f"{form}, best of each", best[True], best[False], rows, unit)
    for peer in candidates:
        if not peer.ours:
            mine_name = peer.counterpart if peer.counterpart in rows else None
            figures += _pair(f"{peer.format}, {peer.counterpart} / {peer.name}", mine_name, peer.name, rows, unit)
    return figures


def _pair(title: str, mine: str | None, theirs: str | None, rows: Mapping[str, Row], unit: str) -> list[Figure]:
    """Two figures of two rows: accuracy missing, seconds over seconds."""
    names = (f"{title}: {unit} below the peer", f"{title}: seconds over the peer's")
    limits = (0.0, 1.0)
    reasons = []
    for name in (mine, theirs):
        row = None if name is None else rows.get(name)
        if row is None or not row.scores:
            reasons.append(f"{name or 'nothing'}: {row.unavailable if row is not None else 'not measured'}")
    if reasons or mine is None or theirs is None:
        note = f"unavailable: {'; '.join(reasons)}"
        return [Figure(name, None, limit, "undecided", note) for name, limit in zip(names, limits, strict=True)]
    from s2d_deploy.paired import paired_drop

    ours_row, peer = rows[mine], rows[theirs]
    drop = paired_drop(peer.scores["value"].per_sample.tolist(), ours_row.scores["value"].per_sample.tolist())
    note = f"{mine} {ours_row.scores['value'].value:.3f}, {theirs} {peer.scores['value'].value:.3f}; {drop.method}"
    below = Figure(
        names[0],
        drop.drop,
        0.0,
        "pass" if drop.drop <= 0 else "undecided" if drop.lo <= 0 else "fail",
        f"{note} {drop.lo:.3f} to {drop.hi:.3f}",
    )
    ratios = [ours_row.seconds[r] / peer.seconds[r] for r in sorted(ours_row.seconds.keys() & peer.seconds.keys())]
    value = ours_row.median / peer.median
    verdict = "pass" if max(ratios) <= 1 else "fail" if min(ratios) > 1 else "undecided"
    note = (
        f"{mine} {ours_row.median:.2f} s, {theirs} {peer.median:.2f} s; "
        f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} round(s)"
    )
    return [below, Figure(names[1], value, 1.0, verdict, note)]  # type: ignore[arg-type]


def _table(candidates: Sequence[Candidate], rows: Mapping[str, Row], task: str) -> str:
    lines = []
    for c in candidates:
        row, side = rows[c.name], "ours" if c.ours else "peer"
        head = [c.name, c.format, side, "executed" if c.executed else "simulated"]
        if row.unavailable is not None:
            lines.append([*head, "unavailable", *[""] * 5])
            continue
        spread = f"{min(row.seconds.values()):.2f}-{max(row.seconds.values()):.2f}"
        scores = [f"{score.value:.3f}" for score in row.scores.values()]
        layers = f"{row.facts['layers']}+{row.facts['products']}"
        cpu = statistics.median(row.cpu_seconds.values())
        lines.append([*head, *scores, layers, f"{row.median:.2f}", spread, f"{cpu:.2f}"])
    header = ["candidate", "format", "side", "how", *_FIRST[task], "layers", "s", "spread", "CPU s"]
    reasons = [f"{name}: unavailable: {row.unavailable}" for name, row in rows.items() if row.unavailable]
    return "\n".join([_common.table(header, lines), *reasons])


def block_size(widths: Sequence[int], wanted: int = 128) -> int:
    """The largest power of two up to `wanted` that divides every width."""
    size = wanted
    while size > 1 and any(width % size for width in widths):
        size //= 2
    return size


def run(a: argparse.Namespace) -> int:
    """Measure, print, write."""
    _bind(a.threads)
    import torch

    record = _common.Record(f"ptq-peers-{a.name}", a.threads, _command(a))
    candidates = [BY_NAME[name] for name in a.candidates]
    evidence = _ptq_data.load_evidence(a)
    widths = [m.in_features for m in evidence.module.modules() if isinstance(m, torch.nn.Linear)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(evidence, Path(folder), a.threads, a.block or block_size(widths), a.seed)
        rows = measure(candidates, bench, a.rounds)
        export_seconds = bench.float_onnx[1]
    print("\n" + _table(candidates, rows, a.task) + "\n")
    document = {
        "task": a.task,
        "settings": {**_ptq_data.settings(a), "batch": a.batch, "block": bench.block, "rounds": a.rounds},
        "float": evidence.measured(evidence.module),
        "float_export_seconds": round(export_seconds, 2),
        "linears": len(widths),
        "versions": _versions(),
        "results": {
            c.name: {
                "format": c.format,
                "ours": c.ours,
                "executed": c.executed,
                "how": c.how,
                **rows[c.name].document(),
            }
            for c in candidates
        },
        "not_worse_and_not_slower": {c.name: beaten_by(c, candidates, rows) for c in candidates if not c.ours},
    }
    return _common.finish(record, a.results, figures_of(candidates, rows, a.task), document)


def beaten_by(peer: Candidate, candidates: Sequence[Candidate], rows: Mapping[str, Row]) -> list[str]:
    """Our recipes of the same format that are at least as accurate as the peer (in the mean), and not slower."""
    theirs = rows[peer.name]
    if not theirs.scores:
        return []
    mine = [c.name for c in candidates if c.ours and c.format == peer.format and rows[c.name].scores]
    value = theirs.scores["value"].value
    return [n for n in mine if rows[n].scores["value"].value >= value and rows[n].median <= theirs.median]


def _bind(threads: int) -> None:
    """Keep this process on as many cores: calibration sessions of some toolkits start a thread for each they see."""
    _common.limit_threads(threads)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[-threads:]))


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("onnxruntime", "nvidia-modelopt", "nncf", "openvino"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _command(a: argparse.Namespace) -> list[str]:
    """As typed, without the paths of one machine."""
    command = ["python", "benchmarks/ptq_peers.py", "--model", "MODEL", "--data", "DATA", "--task", a.task]
    given = [("calibration", a.calibration), ("held-out", a.held_out), ("length", a.length), ("batch", a.batch)]
    given += [("threads", a.threads), ("seed", a.seed), ("rounds", a.rounds), ("name", a.name)]
    command += [str(word) for name, value in given for word in (f"--{name}", value)]
    command += ["--block", str(a.block)] if a.block else []
    return command if a.candidates == list(BY_NAME) else [*command, "--candidates", *a.candidates]


def arguments_parser() -> argparse.ArgumentParser:
    """Every option."""
    parser = _common.parser("ptq_peers.py", str(__doc__))
    _ptq_data.add_options(parser)
    parser.add_argument(
        "--candidates", nargs="+", choices=list(BY_NAME), default=list(BY_NAME), metavar="NAME", help=", ".join(BY_NAME)
    )
    parser.add_argument("--block", type=_common.positive, help="of INT4 (default: the largest up to 128 that fits)")
    parser.add_argument("--rounds", type=_common.positive, default=2)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return _common.guarded(run, arguments_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
