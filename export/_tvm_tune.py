"""Optional: better loops for what has no kernel of its own, found by trying, within a budget of seconds.

Products, LayerNorm and attention run on kernels whose shape is computed, not searched. What is left (transposes,
additions of positions, quantizers apart) gets plain loops (`_tvm_schedule`); here MetaSchedule samples other ones, each
is compiled and timed on this machine, and the fastest is kept where it beats the plain one. Every schedule that was
timed lies in MetaSchedule's database, so that a second build of the same function on such a machine takes none.

The values do not change: loops are cut, reordered where iterations do not depend on each other, and put in vectors.
MetaSchedule's own search strategies are not used: they load every tensor intrinsic that TVM has, which takes a minute.
"""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from s2d_deploy.errors import RuntimeUnavailable, message
from s2d_deploy.host import cpu_model
from s2d_deploy.session import Progress

from ._tvm_schedule import plain_schedule, simple_blocks

log = logging.getLogger(__name__)
_LEAST = 1 << 14  # elements; below that a function takes no time worth a trial
_BROKEN_FFI = (0, 1, 15)  # saving any expression as JSON crashes the process


@dataclass(frozen=True, slots=True)
class Tuning:
    """The budget.

    Attributes:
        seconds: for all functions together; the largest get theirs first.
        folder: of the database; shared by builds, made where it does not exist.
        trials: for one function at most.
        seed: of the samples.
    """

    seconds: float
    folder: Path
    trials: int = 32
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Tuned:
    """One function.

    Attributes:
        function: its name.
        plain_us: of the plain loops, the best of a few runs.
        best_us: of the best schedule that was found; kept where it is less.
        trials: schedules timed now; 0 where the database knew it.
    """

    function: str
    plain_us: float
    best_us: float
    trials: int


def tune_loops(module: Any, target: Any, lanes: int, tuning: Tuning, progress: Progress) -> tuple[Any, list[Tuned]]:
    """`module` (an IRModule) with the functions that trying has made faster; the others are left as they are.

    Args:
        module: after fusion, before `schedule_loops`.
        target: of this machine.
        lanes: of a vector.
        tuning: the budget.
        progress: told which function is tried.

    Raises:
        RuntimeUnavailable: the installed apache-tvm-ffi would crash.
    """
    require_sound_ffi()
    from tvm import tirx

    database = _database(tuning.folder, target)
    found: list[Tuned] = []
    deadline = time.monotonic() + tuning.seconds
    todo = [
        (name, function)
        for name, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
        and not (function.attrs or {}).get("tirx.is_scheduled", False)
        and _elements(function) >= _LEAST
    ]
    todo.sort(key=lambda pair: (-_elements(pair[1]), pair[0].name_hint))
    for i, (name, function) in enumerate(todo):
        progress(f"TVM: trying loops of {name.name_hint} ({i + 1} of {len(todo)})")
        result, best = _tune(name.name_hint, function, target, lanes, tuning, database, deadline)
        if result is None:
            continue
        found.append(result)
        if best is not None and result.best_us < result.plain_us:
            kept = best
            for key, value in (function.attrs or {}).items():
                kept = kept.with_attr(key, value)
            module.update_func(name, kept.with_attr("tirx.is_scheduled", True))
    return module, found


def require_sound_ffi() -> None:
    """Refuse versions of apache-tvm-ffi that crash when a schedule is saved.

    Raises:
        RuntimeUnavailable: such a version is installed.
    """
    with suppress(metadata.PackageNotFoundError, ValueError):
        version = metadata.version("apache-tvm-ffi")
        if tuple(int(part) for part in version.split(".")[:3]) >= _BROKEN_FFI:
            raise RuntimeUnavailable(
                message(
                    "tuning with TVM is not possible",
                    found=f"apache-tvm-ffi {version}, which crashes when it saves a schedule",
                    fix="pip install 'apache-tvm-ffi<0.1.15', or leave the option tune out",
                )
            )


def _database(folder: Path, target: Any) -> Any:
    """The database of machines like this one."""
    import tvm
    from tvm.s_tir import meta_schedule

    kind = hashlib.sha256(f"{tvm.__version__} {target} {cpu_model()}".encode()).hexdigest()[:16]
    place = folder / kind
    place.mkdir(parents=True, exist_ok=True)
    return meta_schedule.database.JSONDatabase(
        path_workload=str(place / "workloads.json"), path_tuning_record=str(place / "records.json")
    )


def _tune(
    name: str, function: Any, target: Any, lanes: int, tuning: Tuning, database: Any, deadline: float
) -> tuple[Tuned | None, Any]:
    """What was found for one function, and the fastest schedule of it."""
    import tvm
    from tvm import s_tir
    from tvm.s_tir import meta_schedule

    workload = tvm.IRModule({"main": _bare(function)})
    plain = _seconds(plain_schedule(function, lanes), target)
    if plain is None:
        return None, None
    known = database.query_tuning_record(workload, target, "main") if database.has_workload(workload) else None
    if known is not None:
        schedule = database.query_schedule(workload, target, "main")
        again = _seconds(schedule.mod["main"], target)  # measured anew beside the plain one: records may be old
        if again is not None:
            return Tuned(name, 1e6 * plain, 1e6 * again, 0), schedule.mod["main"]
    committed = database.commit_workload(workload)
    best, best_seconds, seen, trials = None, float("inf"), set(), 0
    for attempt in range(4 * tuning.trials):
        if trials >= tuning.trials or time.monotonic() > deadline:
            break
        schedule = s_tir.Schedule(workload, seed=tuning.seed + attempt + 1)
        if not _sample(schedule, lanes):
            return None, None
        key = schedule.mod["main"].script()
        if key in seen:
            continue
        seen.add(key)
        seconds = _seconds(schedule.mod["main"], target)
        if seconds is None:
            continue
        trials += 1
        record = meta_schedule.database.TuningRecord(
            schedule.trace, committed, [seconds], target, meta_schedule.arg_info.ArgInfo.from_entry_func(workload)
        )
        database.commit_tuning_record(record)
        if seconds < best_seconds:
            best, best_seconds = schedule.mod["main"], seconds
    if best is None:
        return None, None
    log.info("%s: %.1f us plain, %.1f us after %d trials", name, 1e6 * plain, 1e6 * best_seconds, trials)
    return Tuned(name, 1e6 * plain, 1e6 * best_seconds, trials), best


def _sample(schedule: Any, lanes: int) -> bool:
    """Draw one schedule; False for what is no nest of simple loops."""
    blocks = simple_blocks(schedule)
    if blocks is None:
        return False
    for block, spatial in blocks:
        loops = schedule.get_loops(block)
        outer = loops[:spatial]
        if not outer:
            continue
        width = schedule.sample_categorical([lanes // 2, lanes, 2 * lanes, 4 * lanes], [0.25] * 4)
        rest, vector = schedule.split(outer[-1], [None, width])
        outer = [*outer[:-1], rest]
        if len(outer) > 1:  # several rows of one run of columns, for functions that transpose
            height = schedule.sample_categorical([1, 4, 16], [0.4, 0.3, 0.3])
            top, inner = schedule.split(outer[-2], [None, height])
            schedule.reorder(top, rest, inner)
            outer = [*outer[:-2], top, rest]
        if spatial == len(loops):
            schedule.vectorize(vector)
        depth = int(schedule.get(schedule.sample_categorical([0, 1, len(outer)], [0.3, 0.3, 0.4])))
        if depth:
            schedule.parallel(schedule.fuse(*outer[:depth]) if depth > 1 else outer[0])
    return True


def _seconds(function: Any, target: Any) -> float | None:
    """The best of a few runs; None where it cannot be compiled."""
    import tvm

    try:
        library = tvm.compile(tvm.IRModule({"main": _bare(function)}), target=target)
    except Exception as error:  # a sampled schedule may be one that TVM cannot lower
        log.debug("a schedule does not compile: %s", error)
        return None
    arguments = [tvm.runtime.empty([int(size) for size in p.shape], str(p.dtype)) for p in function.params]
    timer = library.mod.time_evaluator("main", tvm.cpu(), number=3, repeat=5, min_repeat_ms=2)
    return float(min(timer(*arguments).results))


def _bare(function: Any) -> Any:
    """The function as one that can be called, without what the graph's passes noted on it."""
    return function.with_attr("global_symbol", "main")


def _elements(function: Any) -> int:
    """Of the largest buffer."""
    sizes: list[int] = []
    for p in function.params:
        total = 1
        for size in p.shape:
            total *= int(size)
        sizes.append(total)
    return max(sizes, default=0)
