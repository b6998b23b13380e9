"""Latency of our artifacts beside what a user would otherwise run, interleaved in one process.

    python benchmarks/latency.py --model vit-small --targets ort,tvm --precisions fp32,w4a4 --peers openvino

First the machine's peak is measured and printed, then the model's multiply-accumulates, so that every latency can be
read as a share of what is possible. Weights and inputs are random: nothing here says anything about accuracy.

All candidates take turns, one call each a round, in an order shuffled by round, on the same number of threads. Before
each call the process sleeps for a moment, because worker threads go on spinning after their work is done (torch's
OpenMP, ONNX Runtime, TVM) and would take a core from the next candidate. So every runtime keeps its own settings, and
every call starts with sleeping workers, as it does where a service answers one request at a time.
"""

from __future__ import annotations

import argparse
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _common
from _common import Figure, Record, table

from s2d_deploy.errors import RecipeError, UnavailableError, UnsupportedError, message
from s2d_deploy.precision import BASELINE, STANDARD

if TYPE_CHECKING:
    from _models import Bench
    from _peak import Peak

    from s2d_deploy.latency import LatencyStats, Ratio
    from s2d_deploy.session import Array

log = logging.getLogger(__name__)
TARGETS = ("ort", "tvm")
LEAST_RUNS = 30  # a ratio of fewer rounds decides nothing
# A float candidate further than this from torch's float output computes something else: fast and wrong is no speed.
_FLOAT_SNR_DB = 60.0


@dataclass(frozen=True, slots=True)
class Limit:
    """A promised ratio: `candidate` takes at most `value` times as long as `baseline`."""

    candidate: str
    baseline: str
    value: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """``"tvm-w4a4/openvino-int8=0.70"``."""
        match = re.fullmatch(r"([\w-]+)/([\w-]+)=([0-9.]+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text}: expected CANDIDATE/BASELINE=RATIO, as ort-w4a4/ort-fp32=1.0")
        return cls(match[1], match[2], float(match[3]))


@dataclass(slots=True)
class Candidate:
    """Something that can be timed.

    Attributes:
        name: ``"ort-w4a4"``, or a peer's name.
        call: runs one batch and returns its output.
        kind: the peak that its arithmetic is measured by, "int8" or "fp32".
        about: facts for the result file.
    """

    name: str
    call: Callable[[], Array]
    kind: str
    about: dict[str, Any] = field(default_factory=dict)


def judge(limit: Limit, stats: Mapping[str, LatencyStats], wrong: Mapping[str, str]) -> Figure:
    """A limit against what was measured; undecided where the interval holds the limit, or the evidence is no good."""
    from s2d_deploy.latency import ratio

    name = f"{limit.candidate} / {limit.baseline}"
    missing = [n for n in (limit.candidate, limit.baseline) if n not in stats]
    if missing:
        return Figure(name, None, limit.value, "undecided", f"not measured: {', '.join(missing)}")
    r = ratio(stats[limit.candidate], stats[limit.baseline])
    note = f"95 % interval {r.lo:.3f} to {r.hi:.3f}"
    doubts = [f"{n} is wrong: {wrong[n]}" for n in (limit.candidate, limit.baseline) if n in wrong]
    doubts += [f"{n} is not stable: {stats[n].note}" for n in (limit.candidate, limit.baseline) if not stats[n].stable]
    if len(stats[limit.candidate].samples_ns) < LEAST_RUNS:
        doubts.append(f"{len(stats[limit.candidate].samples_ns)} rounds, fewer than {LEAST_RUNS}")
    if doubts:
        return Figure(name, r.median, limit.value, "undecided", "; ".join([note, *doubts]))
    if r.hi <= limit.value:
        return Figure(name, r.median, limit.value, "pass", note)
    return Figure(name, r.median, limit.value, "fail" if r.lo > limit.value else "undecided", note)


def arguments_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = _common.parser(
        "latency.py",
        str(__doc__),
        "models: vit-tiny, vit-small, vit-base (224 px, patches of 16), minilm-l6 (128 tokens)\n"
        "peers:  ort-static, ort-dynamic, openvino-fp32, openvino-int8 (both: openvino), torch-eager, torch-compile\n"
        "exit codes: 0 every --limit holds, 1 one does not or is undecided, 2 wrong input",
    )
    made.add_argument("--model", default="vit-small", help="architecture (default: vit-small)")
    made.add_argument("--width", type=_common.positive, help="another width of the residual stream")
    made.add_argument("--depth", type=_common.positive, help="another number of layers")
    made.add_argument("--tokens", type=_common.positive, help="another sequence length (ViT: a square plus one)")
    made.add_argument("--targets", type=_common.names, default=TARGETS, help="comma-separated (default: ort,tvm)")
    made.add_argument(
        "--precisions",
        type=_common.names,
        default=(BASELINE, *STANDARD),
        help=f"comma-separated (default: {','.join((BASELINE, *STANDARD))})",
    )
    made.add_argument("--peers", type=_common.names, default=(), help="comma-separated, see below (default: none)")
    made.add_argument("--skip", type=_common.names, default=(), help="candidates to leave out, as tvm-fp32")
    made.add_argument(
        "--placed",
        type=_common.names,
        default=(),
        help="candidates to measure by a placement search, too, as ort-w4a16 (then ort-w4a16-placed)",
    )
    made.add_argument("--batch", type=_common.positive, default=1, help="samples in a call (default: 1)")
    made.add_argument("--threads", type=_common.positive, default=2, help="of every candidate (default: 2)")
    made.add_argument("--runs", type=_common.positive, default=40, help="timed rounds (default: 40)")
    made.add_argument("--warmup", type=_common.positive, default=5, help="rounds at least (default: 5)")
    made.add_argument("--max-seconds", type=float, default=1200.0, help="rounds end here in any case (default: 1200)")
    made.add_argument(
        "--pause-ms", type=float, default=20.0, help="sleep before each call, untimed (default: 20; 0: none)"
    )
    made.add_argument(
        "--limit",
        type=Limit.parse,
        action="append",
        default=[],
        metavar="A/B=RATIO",
        help="a promise to check, repeatable: A takes at most RATIO times as long as B",
    )
    made.add_argument(
        "--work", type=Path, default=_common.WORK, metavar="DIR", help=f"kept artifacts (default: {_common.WORK})"
    )
    made.add_argument("--name", help="of the result file (default: latency-<model>-b<batch>)")
    return made


def prepare(
    bench: Bench, chosen: argparse.Namespace, stack: ExitStack
) -> tuple[list[Candidate], dict[str, str], list[Figure]]:
    """Build and load every candidate; reasons of those that cannot be had; a failed figure for each that breaks."""
    from _peers import expand, make_peer

    peers = expand(chosen.peers)
    found: list[Candidate] = []
    unavailable: dict[str, str] = {}
    broken: list[Figure] = []
    wanted: list[tuple[str, Callable[[], Candidate]]] = [
        (f"{target}-{precision}", lambda t=target, p=precision: _ours(bench, t, p, chosen, stack))  # type: ignore[misc]
        for target in chosen.targets
        for precision in chosen.precisions
    ]

    for name in chosen.placed:
        target, _, precision = name.partition("-")
        wanted.append((f"{name}-placed", lambda t=target, p=precision: _ours(bench, t, p, chosen, stack, placed=True)))  # type: ignore[misc]

    def a_peer(name: str) -> Candidate:
        peer = make_peer(name, bench, chosen.batch, chosen.threads)
        return Candidate(name, peer.call, peer.kind, {"how": peer.how, "build_seconds": peer.seconds})

    wanted += [(name, lambda n=name: a_peer(n)) for name in peers]  # type: ignore[misc]
    known = [name for name, _ in wanted]
    if foreign := [name for name in chosen.skip if name not in known]:
        raise RecipeError(message(f"--skip {', '.join(foreign)}", expected=f"any of {', '.join(known)}"))
    for name, make in wanted:
        if name in chosen.skip:
            continue
        begin = time.perf_counter()
        try:
            found.append(make())
        except (UnavailableError, UnsupportedError) as error:
            unavailable[name] = str(error)
            print(f"  {name}: unavailable: {error}")
        except Exception as error:  # a compiler or a peer may fail in its own way; the others are measured all the same
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            log.debug("%s broke", name, exc_info=error)
            broken.append(Figure(f"{name} can be built and run", None, None, "fail", why))
            print(f"  {name}: BROKEN: {why}")
        else:
            print(f"  {name}: ready after {time.perf_counter() - begin:.1f} s", flush=True)
    if not found:
        raise RecipeError(message("nothing to measure", expected="at least one candidate that is available"))
    return found, unavailable, broken


def _ours(
    bench: Bench, target: str, precision: str, chosen: argparse.Namespace, stack: ExitStack, *, placed: bool = False
) -> Candidate:
    from s2d_deploy.errors import RuntimeUnavailable
    from s2d_deploy.registry import load_runtime

    runtime = load_runtime(target)
    if (reason := runtime.available()) is not None:
        raise RuntimeUnavailable(reason)
    artifact, stage = bench.build(target, precision, chosen.batch, placed_for=chosen.threads if placed else None)
    session = stack.enter_context(runtime.open(artifact, threads=chosen.threads))
    audit = session.audit()
    feeds, output = bench.feeds(chosen.batch), bench.output
    kind = "int8" if audit.executed.get("int8", 0.0) + audit.executed.get("int4", 0.0) > 0.5 else "fp32"
    about = {
        "runtime": runtime.version(),
        "device": runtime.device(),
        "rung": audit.rung,
        "executed": audit.executed,
        "size_bytes": artifact.size_bytes,
        "build_seconds": float(stage.manifest["seconds"]),
    }
    if placed:
        about["placed"] = artifact.info["placed"]
    return Candidate(
        f"{target}-{precision}{'-placed' if placed else ''}", lambda: session.run(feeds)[output], kind, about
    )


def check_outputs(bench: Bench, candidates: Sequence[Candidate], batch: int) -> dict[str, str]:
    """Signal-to-noise ratio of every candidate against torch in float, into `about`; who is wrong, and why."""
    import torch

    from s2d_deploy.parity import snr_db

    with torch.inference_mode():
        reference = bench.module(**bench.batch(batch))[bench.output].numpy()
    wrong = {}
    for candidate in candidates:
        output = candidate.call()
        if output.shape != reference.shape:
            wrong[candidate.name] = f"its output has shape {output.shape}, not {reference.shape}"
            continue
        snr = snr_db(reference, output)
        candidate.about["snr_db"] = snr
        if candidate.name.endswith(("fp32", "eager", "compile")) and snr is not None and snr < _FLOAT_SNR_DB:
            wrong[candidate.name] = f"{snr:.0f} dB from torch in float, expected at least {_FLOAT_SNR_DB:.0f}"
    return wrong


def latency_rows(
    candidates: Sequence[Candidate], stats: Mapping[str, LatencyStats], macs: int, peaks: Mapping[str, float]
) -> list[tuple[str, ...]]:
    """The table of latencies; `macs` of a whole batch, `peaks` in GMAC/s by kind."""
    from _peak import gmacs, share_of_peak

    rows: list[tuple[str, ...]] = []
    for c in candidates:
        s = stats[c.name]
        snr = c.about.get("snr_db")
        rows.append(
            (
                c.name,
                f"{s.p50_ms:.2f}",
                f"{s.p90_ms:.2f}",
                f"{s.min_ms:.2f}",
                f"{gmacs(macs, s.p50_ms):.0f}",
                f"{share_of_peak(macs, s.p50_ms, peaks[c.kind]):.0%} of {c.kind}",
                "-" if snr is None else f"{snr:.0f}",
                "stable" if s.stable else "NOT STABLE",
            )
        )
    return rows


LATENCY_HEADER = ("candidate", "p50 ms", "p90 ms", "min ms", "GMAC/s", "share of peak", "SNR dB", "")


def ratios(stats: Mapping[str, LatencyStats], baselines: Sequence[str]) -> dict[str, dict[str, Ratio]]:
    """Candidate -> baseline -> ratio; below 1 the candidate is faster."""
    from s2d_deploy.latency import ratio

    return {a: {b: ratio(stats[a], stats[b]) for b in baselines if b != a} for a in stats}


def run(chosen: argparse.Namespace) -> int:
    """Measure, print, write."""
    _common.limit_threads(chosen.threads)
    from _models import Bench, shape_of
    from _peak import measure_peaks
    from _peers import PEERS

    from s2d_deploy.latency import measure

    shape = shape_of(chosen.model, chosen.width, chosen.depth, chosen.tokens)
    record = Record(chosen.name or f"latency-{shape.name}-b{chosen.batch}", chosen.threads)
    peaks = measure_peaks(chosen.threads)
    for peak in peaks:
        print(f"peak, {peak}")
    by_kind = _peak_of(peaks, chosen.threads)
    with ExitStack() as stack:
        bench = stack.enter_context(Bench(shape, chosen.work))
        macs = bench.macs * chosen.batch
        floor = macs / by_kind["int8"] / 1e6
        print(
            f"\n{shape.name}: width {shape.width}, {shape.depth} layers, {shape.tokens} tokens, batch {chosen.batch}: "
            f"{macs / 1e9:.2f} GMAC; at the INT8 peak {floor:.2f} ms\n"
            "random weights and inputs: latency only, accuracy means nothing here\n"
        )
        candidates, unavailable, broken = prepare(bench, chosen, stack)
        wrong = check_outputs(bench, candidates, chosen.batch)
        for name, why in wrong.items():
            print(f"  {name}: WRONG: {why}")
        stats = measure(
            {c.name: c.call for c in candidates},
            warmup=chosen.warmup,
            min_samples=chosen.runs,
            min_seconds=0.0,
            max_seconds=chosen.max_seconds,
            pause=(lambda: time.sleep(chosen.pause_ms / 1e3)) if chosen.pause_ms else None,
        )
        by_baseline = ratios(stats, [n for n in stats if n in PEERS or n == f"ort-{BASELINE}"])
        ours = [c.name for c in candidates if c.name not in PEERS]
        print("\n" + table(LATENCY_HEADER, latency_rows(candidates, stats, macs, by_kind)))
        print("\n" + _ratio_table(ours, by_baseline))
        print()
        figures = [*broken, *(judge(limit, stats, wrong) for limit in chosen.limit)]
        for name, s in stats.items():
            if s.note:
                print(f"note: {name}: {s.note}")
        data = {
            "model": {
                "name": shape.name,
                "width": shape.width,
                "depth": shape.depth,
                "tokens": shape.tokens,
                "macs": bench.macs,
                "weights": "random",
            },
            "batch": chosen.batch,
            "threads": chosen.threads,
            "pause_ms": chosen.pause_ms,
            "peaks": [peak.to_dict() for peak in peaks],
            "unavailable": unavailable,
            "wrong": wrong,
            "candidates": {
                c.name: c.about
                | {"kind": c.kind, "latency_ms": stats[c.name].to_dict(threads=chosen.threads, batch=chosen.batch)}
                for c in candidates
            },
            "ratios": {a: {b: r.to_dict() for b, r in row.items()} for a, row in by_baseline.items()},
        }
        return _common.finish(record, chosen.results, figures, data)


def _peak_of(peaks: Sequence[Peak], threads: int) -> dict[str, float]:
    return {peak.kind: peak.gmacs for peak in peaks if peak.threads == threads}


def _ratio_table(ours: Sequence[str], found: Mapping[str, Mapping[str, Ratio]]) -> str:
    baselines = list(dict.fromkeys(b for row in found.values() for b in row))

    def cell(a: str, b: str) -> str:
        r = found[a].get(b)
        return "-" if r is None else f"{r.median:.2f} [{r.lo:.2f}, {r.hi:.2f}]"

    return table(("time over", *baselines), [(a, *(cell(a, b) for b in baselines)) for a in ours])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return _common.guarded(run, arguments_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
