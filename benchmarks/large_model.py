"""A model beyond 2 GB through every step on ONNX Runtime: export, dialect, session, codes, accumulators, audit.

    python benchmarks/large_model.py

Square Linears in a row, random weights: in FP32 more bytes than a protobuf can hold. What is checked is that each step
works and that the output is the simulation's, not how fast it is. Needs about eight times the model's bytes of memory.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _common
from _common import Figure, Record

# Float: float32 sums of 8192 products in another order, nine times. Quantized: codes at rounding boundaries flip on top
# of that, nine layers in a row; accumulators are compared exactly instead.
LEAST_DB = {"fp32": 60.0}
_FLIPPED_DB = 20.0


def arguments_parser() -> argparse.ArgumentParser:
    """The command line."""
    made = _common.parser(
        "large_model.py", str(__doc__), "exit codes: 0 every step works, 1 one does not, 2 wrong input"
    )
    made.add_argument("--width", type=_common.positive, default=8192, help="of each Linear (default: 8192)")
    made.add_argument("--layers", type=_common.positive, default=9, help="Linears (default: 9)")
    made.add_argument("--precisions", type=_common.names, default=("fp32", "w8a8"), help="default: fp32,w8a8")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    return _common.guarded(run, arguments_parser().parse_args(argv))


def run(chosen: argparse.Namespace) -> int:
    """Export, build, run, compare."""
    _common.limit_threads(1)
    import numpy as np
    import torch
    from torch import nn

    from s2d_deploy.calibrate import calibrate
    from s2d_deploy.discovery import discover
    from s2d_deploy.parity import snr_db
    from s2d_deploy.plan import Plan
    from s2d_deploy.quantize import QuantizeConfig, build_plan
    from s2d_deploy.registry import load_exporter, load_runtime, load_target
    from s2d_deploy.simulation import recorded_codes, simulate, weight_codes

    record = Record("large-model", 1)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    layers = [nn.Linear(chosen.width, chosen.width, bias=False) for _ in range(chosen.layers)]
    model = nn.Sequential(*layers).eval()
    sample = {"input": torch.randn(2, chosen.width)}
    ops = discover(model, {"input": sample["input"][:1]})
    figures: list[Figure] = []
    data: dict[str, Any] = {"width": chosen.width, "layers": chosen.layers}
    for precision in chosen.precisions:
        plan = Plan("fp32", dict(ops))
        if precision != "fp32":
            statistics = calibrate(model, ops, [sample])
            plan = build_plan(model, ops, statistics, precision, QuantizeConfig(weights="absmax", activations="absmax"))
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            common = Path(folder) / "common" / "model.onnx"
            load_exporter()(model, plan, sample, ["output"], common)
            size = sum(file.stat().st_size for file in common.parent.iterdir())
            target = load_target("ort")
            dialect = target.dialect(common, Path(folder) / "made", precision=precision)
            artifact = target.build(dialect, Path(folder) / "made", precision=precision, options={}, progress=print)
            feeds = {name: tensor.numpy() for name, tensor in sample.items()}
            with load_runtime("ort").open(artifact, threads=1) as session:
                found = session.run(feeds)["output"]
                audit = session.audit()
                if precision != "fp32":
                    codes = session.codes(feeds)["0.input"]
                    weight = weight_codes(simulate(model, plan))["0.weight"].numpy()
                    exact = codes.astype(np.float64) @ weight.T.astype(np.float64)  # below 2**53: exact
                    differ = int((session.accumulate("0", codes) != exact).sum())
                    figures.append(_common.at_most(f"{precision}: accumulators that differ, first layer", differ, 0))
            facts = {"common_bytes": size, "artifact_bytes": artifact.size_bytes, "executed": audit.executed}
        with torch.no_grad(), recorded_codes(simulated := simulate(model, plan)):
            wanted = simulated(**sample).numpy()
        snr = snr_db(wanted, found)
        data[precision] = facts | {"seconds": time.perf_counter() - begin, "snr_db": snr}
        least = LEAST_DB.get(precision, _FLIPPED_DB)
        verdict: _common.Verdict = "pass" if snr is None or snr >= least else "fail"
        figures.append(
            Figure(f"{precision}: dB from the simulation", snr, None, verdict, f"{size:,} bytes of common file")
        )
        print(precision, data[precision], flush=True)
    data["peak_memory_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return _common.finish(record, chosen.results, figures, data)


if __name__ == "__main__":
    raise SystemExit(main())
