"""How long the verification of one model on one runtime takes: accumulators, codes end to end, causes, budget, gap.

The model has random weights (`_models.py`); the plan, the artifact and every step of the verification are real. Making
the artifact is not counted, nor is the simulation's output, which `quantize` keeps: verification reads it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import WORK, Record, at_most, finish, guarded, limit_threads, parser, positive, table
from _models import SHAPES, Bench, shape_of

LIMIT_SECONDS = 300.0


def main(arguments: argparse.Namespace) -> int:
    """Build, simulate once, verify, and say how long each step took."""
    limit_threads(arguments.threads)
    import numpy as np
    import torch

    from s2d_deploy.evaluate import outputs, torch_run
    from s2d_deploy.parity import output_parity, top1_flips
    from s2d_deploy.registry import load_runtime
    from s2d_deploy.simulation import simulate
    from s2d_deploy.verification import examine
    from s2d_deploy.verify import end_to_end_codes, teacher_forced

    torch.set_num_threads(arguments.threads)
    record = Record(f"verify-time-{arguments.model}-{arguments.target}", threads=arguments.threads)
    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}
    clock, used = time.perf_counter(), time.process_time()

    def lap(name: str) -> None:
        nonlocal clock, used
        now, busy = time.perf_counter(), time.process_time()
        seconds[name], processor[name] = now - clock, busy - used
        clock, used = now, busy
        print(f"{name}: {seconds[name]:.1f} s, {processor[name]:.1f} s of processor", flush=True)

    count, size = arguments.samples, arguments.batch
    with Bench(shape_of(arguments.model), arguments.work) as bench, tempfile.TemporaryDirectory() as folder:
        plan, name = bench.plan(arguments.precision), bench.output
        artifact, _ = bench.build(arguments.target, arguments.precision, size)
        simulated = simulate(bench.module, plan).eval()
        data = bench.batch(count)

        def load(index: Any) -> Any:
            return {n: t[list(index)] for n, t in data.items()}

        def batches() -> Any:
            return (load(range(i, min(i + size, count))) for i in range(0, count, size))

        lap("not counted: model, plan, artifact")
        wanted = outputs(torch_run(simulated, name), name, batches())
        plain = outputs(torch_run(bench.module, name), name, batches())
        lap("not counted: outputs of the simulation and the float model")
        with load_runtime(arguments.target).open(artifact, threads=arguments.threads) as session:
            session.audit()
            lap("load and audit")
            shown = outputs(session.run, name, batches())
            parity: dict[str, Any] = output_parity(wanted, shown, name=name)
            parity["top1_flips"] = top1_flips(wanted, shown)
            lap("output of the artifact")
            parity |= teacher_forced(session, simulated, plan, load(range(min(size, count))))
            lap("teacher-forced accumulators")
            parity |= end_to_end_codes(session, simulated, batches())
            lap("codes end to end")
            parity |= examine(
                session,
                bench.module,
                simulated,
                plan,
                bench.onnx(arguments.precision).folder / "model.onnx",
                load,
                {"float": plain, "simulated": wanted, "runtime": shown},
                name,
                Path(folder),
                counts=parity,
                samples=count,
                batch_size=size,
                step=lambda text: print(f"  {text}", flush=True),
            )
            lap("causes, budget, gap")
    total = sum(s for step, s in seconds.items() if not step.startswith("not counted"))
    busy = sum(s for step, s in processor.items() if not step.startswith("not counted"))
    rows = [(step, f"{s:.1f}", f"{processor[step]:.1f}") for step, s in seconds.items()]
    print(table(("step", "seconds", "seconds of processor"), rows))
    found = {k: v for k, v in parity.items() if k not in ("sites", "explanation", "budget")}
    found["explanation"] = {k: v for k, v in parity.get("explanation", {}).items() if k != "sites"}
    found["budget"] = {k: v for k, v in parity.get("budget", {}).items() if k != "layers"}
    found["mean_abs_output"] = float(np.abs(plain).mean())
    what = f"verification of {arguments.model}, {count} samples"
    figures = [
        at_most(f"{what}, seconds", round(total, 1), LIMIT_SECONDS),
        at_most(
            f"{what}, seconds of processor over threads", round(busy / arguments.threads, 1), None, "no waiting in it"
        ),
    ]
    return finish(record, arguments.results, figures, {"seconds": seconds, "processor": processor, "parity": found})


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser("verify_time.py", __doc__ or "")
    made.add_argument("--model", choices=tuple(SHAPES), default="vit-base", help="default: vit-base")
    made.add_argument("--target", choices=("ort", "reference", "tvm"), default="ort", help="default: ort")
    made.add_argument("--precision", default="w8a8", help="default: w8a8")
    made.add_argument("--samples", type=positive, default=256, help="default: 256")
    made.add_argument("--batch", type=positive, default=8, help="default: 8")
    made.add_argument("--threads", type=positive, default=2, help="default: 2")
    made.add_argument("--work", type=Path, default=WORK, metavar="DIR", help=f"where artifacts lie (default: {WORK})")
    return made


if __name__ == "__main__":
    sys.exit(guarded(main, options().parse_args()))
