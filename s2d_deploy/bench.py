"""What is measured of artifacts that run here: latency, throughput over batch sizes, cold start, memory, roofline.

Latency of all precisions is interleaved in one process (`latency.measure`). Throughput is the same for larger batches.
Cold start and memory are measured in a process of each artifact's own (`footprint`), the ceilings of the machine once
(`peak`). A session that runs on another machine is timed by that machine's clock, and has latency only.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from s2d_deploy.console import Step
from s2d_deploy.latency import DeviceClock, LatencyStats, measure
from s2d_deploy.peak import Peak, Roofline
from s2d_deploy.recipe import BenchSection
from s2d_deploy.session import Feeds, RemoteSession, Session


def time_sessions(
    sessions: Mapping[str, Session], feeds: Feeds, section: BenchSection, step: Step
) -> tuple[dict[str, LatencyStats], dict[str, dict[str, float]]]:
    """Latency by precision and further facts: what another machine's way there and back adds to its own time."""
    calls = {p: partial(s.run, feeds) for p, s in sessions.items()}
    clock = DeviceClock()
    timed = {}
    for p, s in sessions.items():
        timer = s.on_device_ns(feeds) if isinstance(s, RemoteSession) else None
        if timer is not None:
            timed[p] = clock.candidate(timer)
    limits = partial(measure, warmup=section.warmup, min_samples=section.min_samples, max_seconds=section.max_seconds)
    if not timed:
        return limits(calls, min_seconds=section.min_seconds, progress=step), {p: {} for p in sessions}
    # The device's clock stands between its runs: seconds of it do not say how long the measurement takes.
    stats = limits(timed, min_seconds=0, clock=clock, progress=step)
    whole = measure(calls, warmup=1, min_samples=5, min_seconds=0, max_seconds=60)
    return stats, {p: {"round_trip_ms": s.p50_ms} for p, s in whole.items()}


def measure_throughput(
    sessions: Mapping[str, Session], feeds: Feeds, section: BenchSection, step: Step
) -> dict[str, list[dict[str, Any]]]:
    """Samples a second by precision, one entry for each batch size of the recipe; all precisions take turns.

    Args:
        sessions: by precision.
        feeds: at least one sample; repeated until a batch is full.
        section: batch sizes and bounds; the time is shared among the batch sizes.
        step: shown while it works.
    """
    found: dict[str, list[dict[str, Any]]] = {p: [] for p in sessions}
    for size in section.throughput:
        batch = {name: np.resize(array, (size, *array.shape[1:])) for name, array in feeds.items()}
        stats = measure(
            {p: partial(s.run, batch) for p, s in sessions.items()},
            warmup=min(section.warmup, 2),
            min_samples=max(3, section.min_samples // 3),
            min_seconds=0,
            max_seconds=max(1.0, section.max_seconds / len(section.throughput)),
            progress=step,
        )
        for p, s in stats.items():
            found[p].append(
                {
                    "batch": size,
                    "p50_ms": s.p50_ms,
                    "samples_per_second": 1e3 * size / s.p50_ms,
                    "samples_ms": s.samples_ms,
                    "stable": s.stable,
                }
            )
    return found


def roofline_of(document: Mapping[str, Any]) -> Roofline:
    """The other direction of `Roofline.to_dict`; the single repeats are not kept."""
    peaks = {
        kind: Peak(kind, document["threads"], facts["gmacs"], facts["method"], False, ())
        for kind, facts in document["peaks"].items()
    }
    return Roofline(document["threads"], peaks, document["gigabytes_per_second"])


def roofline_share(
    document: Mapping[str, Any], ops: list[Mapping[str, Any]], size_bytes: int, batch: int, p50_ms: float
) -> dict[str, Any] | None:
    """Which part of its time an artifact could not have been faster than: the report's ``roofline``.

    Args:
        document: `Roofline.to_dict`.
        ops: of the audit, with ``precision`` and ``macs`` of one sample.
        size_bytes: of the artifact: weights are read once a run, whatever else is.
        batch: samples in a run.
        p50_ms: median latency of a run.
    """
    macs: dict[str, float] = {}
    for op in ops:
        macs[op["precision"]] = macs.get(op["precision"], 0.0) + batch * op["macs"]
    found = roofline_of(document).floor_ms(macs, size_bytes)
    if found is None or p50_ms <= 0:
        return None
    floor, bound = found
    return {"floor_ms": floor, "bound": bound, "share": floor / p50_ms, **document}


__all__ = ["measure_throughput", "roofline_of", "roofline_share", "time_sessions"]
