"""Plant faults in built artifacts, and count which of them are found, at the right layer, under the right name.

Tiny ViT and BERT models (3 layers, 32 wide, random weights), W8A8 and W4A4; every fault at random layers, executed
by the runtime itself: ONNX Runtime and the integer reference on the edited file, TVM compiled from it. Controls without
a fault must not be flagged. Only the first finding counts, and it counts as right where its layer and its name are.
TVM's quantizers cannot be run alone, so half-away rounding, of which codes of real data show nothing, is planted there
only where the model's input is quantized; and a scale may lie in a product or in the quantizer behind it, in one
kernel: such a finding names both ("two places"). TVM compiles for seconds, so it gets the first precision only.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from _common import Figure, Record, at_most, finish, guarded, limit_threads, names, parser, positive, table

from s2d_deploy.errors import UnsupportedError

TARGETS = ("ort", "reference", "tvm")
_ONLY_ORT = ("saturated-in-the-kernel",)
_NOT_TVM = ("half-away",)
_TVM_SHARE = 4


def main(arguments: argparse.Namespace) -> int:
    """Plant, explain, count."""
    limit_threads(1)
    import torch
    from _faults import PLANTS, tiny

    torch.set_num_threads(1)
    record = Record("fault-injection", threads=1)
    wanted = names(arguments.faults) or tuple(PLANTS)
    rows: list[dict[str, Any]] = []
    refused: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for kind in names(arguments.models):
            for precision in names(arguments.precisions):
                case = tiny(kind, precision, root / f"{kind}-{precision}")
                for target in names(arguments.targets):
                    if target == "tvm" and precision != names(arguments.precisions)[0]:
                        continue
                    count = max(1, arguments.repeats // _TVM_SHARE) if target == "tvm" else arguments.repeats
                    for fault in wanted:
                        if (fault in _ONLY_ORT and target != "ort") or (fault in _NOT_TVM and target == "tvm"):
                            continue
                        if fault == "half-away-at-the-input" and target == "tvm" and kind == "bert":
                            continue  # tokens are not quantized
                        # Controls see other inputs each time; so they are repeated as often as a fault.
                        for seed in range(count):
                            where = root / f"{kind}-{precision}-{target}-{fault}-{seed}"
                            try:
                                rows.append(one(fault, case, target, where, seed))
                            except (
                                UnsupportedError
                            ) as error:  # a target that refuses the edited graph has no fault in it
                                refused.append(f"{kind} {precision} {target} {fault}: {error}")
                                continue
                            say(rows[-1], len(rows))
    figures, summary = judge(rows)
    print(summary)
    return finish(record, arguments.results, figures, {"plants": rows, "refused_by_the_target": refused})


def one(fault: str, case: Any, target: str, folder: Path, seed: int) -> dict[str, Any]:
    """Plant one fault, explain the artifact, compare with the truth."""
    from _faults import OUTPUT, batches_of, opened, plant

    from s2d_deploy.explain import Explainer

    artifact, truth = plant(fault, case, target, folder, seed)
    batch = batches_of(case.kind, 1000 + seed, 1)[0]
    with opened(artifact) as session:
        found = Explainer(session, case.simulated, case.plan, batch, OUTPUT, case.sources).explain()
    first = found.findings[0] if found.findings else None
    located = first is not None and bool(truth.layers & {first.layer, *first.also})
    named = first is not None and first.cause in truth.causes
    return {
        "model": case.kind,
        "precision": case.precision,
        "target": target,
        "fault": truth.fault,
        "seed": seed,
        "planted": {"causes": sorted(truth.causes), "layers": sorted(truth.layers), "where": truth.where},
        "verdict": found.verdict,
        "findings": [
            {
                "cause": f.cause,
                "layer": f.layer,
                "also": list(f.also),
                "site": f.site,
                "detail": f.detail,
                "confirmed": f.confirmed,
            }
            for f in found.findings
        ],
        "two_places": first is not None and bool(first.also),
        "found": bool(found.findings),
        "located": located,
        "named": named,
        "confirmed": bool(found.findings) and all(f.confirmed for f in found.findings),
        "right": (located and named) if truth.causes else first is None,
    }


def say(row: dict[str, Any], number: int) -> None:
    """One line for what went wrong, a dot for what did not."""
    if row["right"]:
        print(".", end="" if number % 80 else "\n", flush=True)
        return
    first = row["findings"][0] if row["findings"] else {"cause": "nothing", "layer": "-", "detail": ""}
    print(
        f"\n{row['model']} {row['precision']} {row['target']} {row['fault']} ({row['planted']['where']}): "
        f"found {first['cause']} in {first['layer']}: {first['detail']}"
    )


def judge(rows: list[dict[str, Any]]) -> tuple[list[Figure], str]:
    """Figures, and the table by fault and runtime."""
    planted = [r for r in rows if r["planted"]["causes"]]
    controls = [r for r in rows if not r["planted"]["causes"]]
    counts: dict[tuple[str, str], Counter[str]] = {}
    for row in rows:
        counter = counts.setdefault((row["fault"], row["target"]), Counter())
        counter["planted"] += 1
        for key in ("found", "located", "named", "confirmed", "two_places", "right"):
            counter[key] += bool(row[key])
    lines = [
        (
            f"{fault}, {target}",
            *(str(c[k]) for k in ("planted", "found", "located", "named", "confirmed", "two_places", "right")),
        )
        for (fault, target), c in counts.items()
    ]
    shown = table(("fault, runtime", "planted", "found", "located", "named", "confirmed", "two places", "right"), lines)
    missed = len(planted) - sum(r["found"] for r in planted)
    wrong = sum(not r["right"] for r in planted)
    false = sum(not r["right"] for r in controls)
    return [
        at_most("faults not found", missed, 0, f"of {len(planted)} planted"),
        at_most(
            "faults not located and named rightly",
            wrong,
            0,
            f"of {len(planted)} planted; {_bound(wrong, len(planted))}",
        ),
        at_most("controls flagged", false, 0, f"of {len(controls)} controls; {_bound(false, len(controls))}"),
    ], shown


def _bound(wrong: int, count: int) -> str:
    """The one-sided 95 % upper bound of the share (Clopper and Pearson)."""
    if not count:
        return "none tried"
    low, high = wrong / count, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        tail = sum(math.comb(count, k) * middle**k * (1 - middle) ** (count - k) for k in range(wrong + 1))
        low, high = (middle, high) if tail > 0.05 else (low, middle)
    return f"true share below {high:.1%} with 95 % confidence"


def options() -> argparse.ArgumentParser:
    """The command line."""
    made = parser("fault_injection.py", __doc__ or "")
    made.add_argument("--targets", default=",".join(TARGETS), help=f"runtimes (default: {','.join(TARGETS)})")
    made.add_argument("--models", default="vit,bert", help="default: vit,bert")
    made.add_argument("--precisions", default="w8a8,w4a4", help="default: w8a8,w4a4")
    made.add_argument("--faults", default="", help="kinds of faults, separated by commas (default: all)")
    made.add_argument(
        "--repeats", type=positive, default=4, help=f"plants of a kind; a {_TVM_SHARE}th of it for tvm (default: 4)"
    )
    return made


if __name__ == "__main__":
    sys.exit(guarded(main, options().parse_args()))
