"""Read spoiled files: recipes, manifests, plans, ONNX, checkpoints, images, texts, arrays, reports, artifacts.

Every input must be read, or be refused by an error of ours with exit code 2 or 3. A traceback, a crash, a hang, memory
beyond the limit, a file outside of the folder, a class that is unpickled, a process or a connection is a failure.
`--reader NAME --first N --cases 1` reads one input again and prints what it came to (with the same `--seed`).
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _common import WORK, Record, at_most, finish, guarded, limit_threads, parser, positive

CHUNK = 100  # cases for one child


def arguments_parser() -> argparse.ArgumentParser:
    made = parser("fuzz_inputs.py", __doc__ or "")
    made.add_argument("--cases", type=positive, default=10_500, help="over all readers (default: %(default)s)")
    made.add_argument("--reader", action="append", default=[], metavar="NAME", help="only this one; repeatable")
    made.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case of each reader")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--work", type=Path, default=WORK / "fuzz-inputs", help="emptied first (default: %(default)s)")
    made.add_argument("--run", type=Path, metavar="DIR", help="a run made by an earlier call, to save its seconds")
    made.add_argument("--no-record", action="store_true", help="write no result file")
    return made


def main(arguments: argparse.Namespace) -> int:
    """Read everything; exit code 0 where nothing failed."""
    limit_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    record = Record("fuzz-inputs", threads=1, command=["python", "benchmarks/fuzz_inputs.py", *sys.argv[1:]])
    from _fuzz import Case, prepare
    from _fuzz import run as run_cases
    from _fuzz_readers import Readers, made

    work: Path = arguments.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    (work / "cases").mkdir(parents=True)
    os.environ["TMPDIR"] = str(work)
    readers = Readers(arguments.run.absolute() if arguments.run else made(work / "run")).all()
    chosen = [r for r in readers if not arguments.reader or r.name in arguments.reader]
    total = sum(r.weight for r in chosen)
    found: list[Case] = []
    seconds: dict[str, float] = {}
    for reader in chosen:
        prepare(reader, work / "cases")
        count = -(-int(arguments.cases * reader.weight) // max(1, round(total)))
        start, mine = time.perf_counter(), list[Case]()
        for first in range(arguments.first, arguments.first + count, CHUNK):
            indices = range(first, min(first + CHUNK, arguments.first + count))
            mine += run_cases(reader, work / "cases", indices, arguments.seed)
        seconds[reader.name] = round(time.perf_counter() - start, 1)
        print(f"{reader.name:<16} {len(mine):>5}  {_counted(mine)}", flush=True)
        for case in {c.text[-160:]: c for c in mine if c.failed}.values():
            print(f"  {case.index}: {case.text}")
        if count == 1:
            print(f"  {mine[0].outcome}: {mine[0].text}")
        found += mine
    failed = [c for c in found if c.failed]
    figures = [
        at_most(
            f"of {len(found)} spoiled inputs, with a traceback, a crash, a hang or an escape",
            len(failed),
            0,
            f"{len(chosen)} readers; " + _counted(found),
        )
    ]
    data: dict[str, Any] = {
        "seed": arguments.seed,
        "inputs": len(found),
        "readers": {
            r.name: {
                "inputs": sum(c.reader == r.name for c in found),
                "outcomes": dict(Counter(c.outcome for c in found if c.reader == r.name)),
                "seconds": seconds[r.name],
                "slowest_seconds": max(c.seconds for c in found if c.reader == r.name),
            }
            for r in chosen
        },
        "outcomes": dict(Counter(c.outcome for c in found)),
        "failed": [{"reader": c.reader, "case": c.index, "text": c.text} for c in failed],
    }
    if arguments.no_record:
        return 1 if failed else 0
    return finish(record, arguments.results, figures, data)


def _counted(cases: list[Any]) -> str:
    return ", ".join(f"{n} {count}" for n, count in sorted(Counter(c.outcome for c in cases).items()))


if __name__ == "__main__":
    sys.exit(guarded(main, arguments_parser().parse_args()))
