"""Placement search: which form of each contraction is fastest here, measured on ONNX Runtime itself.

For each op that can be written in several forms (`_ort_rewrite.forms_of`), the op is cut out of the common file with
its quantizers and its bias, each form is built and opened as an artifact would be, and all forms take turns in one
process (`s2d_deploy.latency`). Ops that do the same work are measured once. A quantized form is kept where it takes at
most ``1 - margin`` of the time of the float form; otherwise the op stays in float: the stored weight dequantized when
the session loads, the activations not rounded. Exact forms must give the default form's output, or they are out.

Then the whole model is measured in the placement that was found, in the default one, and in float, and the same rule
decides once more, because an op alone does not share quantizers, and finds its weights in the cache. The placement that
wins there is the one that ships, with these figures in its manifest.

What this is not: a promise for another machine, another number of threads, or another batch size. They are in the key.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx

from s2d_deploy.errors import UnsupportedError, message
from s2d_deploy.large_models import stored_bytes
from s2d_deploy.latency import LatencyStats, measure, ratio
from s2d_deploy.one_op import one_op, signature
from s2d_deploy.qgraph import contractions
from s2d_deploy.session import Array, Feeds, Progress, Session

from ._ort_rewrite import forms_of, to_integer_kernels

log = logging.getLogger(__name__)

KIND, VERSION = "s2d-deploy placement", 1
FLOAT = "float"
INEXACT = ("nbits-int8",)
DEFAULT_MARGIN = 0.05
_WHOLE_BELOW = 1 << 30  # bytes of a model that is opened three times
# Of one op: enough rounds for a median, not a benchmark.
_OP_LIMITS = {"warmup": 3, "min_samples": 15, "min_seconds": 0.15, "max_seconds": 4.0}
_WHOLE_LIMITS = {"warmup": 3, "min_samples": 15, "min_seconds": 0.3, "max_seconds": 30.0}
# Relative to the largest output: roundings of K float32 products in another order, and of the product of two scales.
_EQUAL = 1e-5

Open = Callable[[onnx.ModelProto], AbstractContextManager[Session]]


def search(
    model: onnx.ModelProto,
    shapes: Mapping[str, Sequence[Sequence[int]]],
    feeds: Feeds,
    opened: Open,
    *,
    margin: float = DEFAULT_MARGIN,
    int8_activations: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure the forms of every contraction of a common model, and choose.

    Args:
        model: the common model.
        shapes: of each op's operands, left before right, by op name.
        feeds: inputs of the whole model.
        opened: a session of a dialect model, as an artifact's would be.
        margin: share of the float form's time that a quantized form must save.
        int8_activations: whether forms that round activations otherwise than the plan may be chosen.
        progress: told what is measured.

    Returns:
        A JSON document: ``forms`` (op -> form, where not the default), ``kept_float`` (ops that the plan promises
        integers for and that stay in float), ``groups`` (what was measured, by distinct work) and ``whole`` (the last
        measurement).
    """
    choices = forms_of(model, int8_activations=int8_activations)
    groups = []
    for number, (names, part) in enumerate(alike := _alike(model, choices, shapes), 1):
        progress(f"placement: {number} of {len(alike)}: {names[0]}")
        groups.append(_group(names, part, choices[names[0]], shapes[names[0]], opened, margin))
    forms = {name: group["chosen"] for group in groups for name in group["ops"] if group["chosen"] != choices[name][0]}
    whole = _whole(model, forms, choices, feeds, opened, margin, progress)
    forms = whole.pop("forms")
    integers = {op.name for op in contractions(model) if op.left is not None and op.right is not None}
    kept = [name for name, form in forms.items() if form == FLOAT and name in integers]
    return {
        "kind": KIND,
        "version": VERSION,
        "margin": margin,
        "int8_activations": int8_activations,
        "forms": forms,
        "kept_float": kept,
        "groups": groups,
        "whole": whole,
    }


def _alike(
    model: onnx.ModelProto, choices: Mapping[str, Sequence[str]], shapes: Mapping[str, Sequence[Sequence[int]]]
) -> list[tuple[list[str], onnx.ModelProto]]:
    """Ops that do the same work, with one of them cut out."""
    found: dict[Any, tuple[list[str], onnx.ModelProto]] = {}
    for name in choices:
        if name not in shapes:
            raise UnsupportedError(
                message(f"op {name!r}: its shapes are not known", fix="give the shapes of all inputs")
            )
        part = one_op(model, name, shapes[name])
        key = (tuple(map(tuple, shapes[name])), tuple(choices[name]), signature(part))
        found.setdefault(key, ([], part))[0].append(name)
    return list(found.values())


def _group(
    names: list[str],
    part: onnx.ModelProto,
    forms: Sequence[str],
    shapes: Sequence[Sequence[int]],
    opened: Open,
    margin: float,
) -> dict[str, Any]:
    """Measure one op in each of its forms."""
    generator = np.random.default_rng(0)
    inputs = [value.name for value in part.graph.input]
    feeds = {n: generator.standard_normal(tuple(s), dtype=np.float32) for n, s in zip(inputs, shapes, strict=False)}
    out: dict[str, str] = {}
    with ExitStack() as stack:
        sessions: dict[str, Session] = {}
        outputs: dict[str, Array] = {}
        for form in forms:
            try:
                sessions[form] = stack.enter_context(opened(to_integer_kernels(part, {names[0]: form})))
                outputs[form] = sessions[form].run(feeds)["y"]
            except Exception as error:
                if form in (forms[0], FLOAT):
                    raise
                log.debug("%s: form %s does not run", names[0], form, exc_info=error)
                out[form] = f"does not run: {' '.join(str(error).split())[:200]}"
                sessions.pop(form, None)
        for form in [f for f in sessions if f not in (forms[0], FLOAT, *INEXACT)]:
            if not _equal(outputs[forms[0]], outputs[form]):
                out[form] = "its output is not that of the default form"
                del sessions[form]
        stats = _timed(sessions, feeds, _OP_LIMITS)
    chosen, why = _choose(stats, margin)
    return {
        "ops": names,
        "shapes": [list(shape) for shape in shapes],
        "default": forms[0],
        "forms": {form: _facts(stats, form) for form in stats},
        "out": out,
        "chosen": chosen,
        "why": why,
    }


def _whole(
    model: onnx.ModelProto,
    forms: Mapping[str, str],
    choices: Mapping[str, Sequence[str]],
    feeds: Feeds,
    opened: Open,
    margin: float,
    progress: Progress,
) -> dict[str, Any]:
    """Measure the model as a whole in the placements that come into question; the fastest is chosen."""
    everything = dict.fromkeys(choices, FLOAT)
    placements: dict[str, Mapping[str, str]] = {"default": {}}
    if forms and forms != everything:
        placements["searched"] = forms
    placements[FLOAT] = everything
    if not choices or stored_bytes(model) > _WHOLE_BELOW:
        why = "the model is too large to be opened several times" if choices else "no op has a choice"
        return {"forms": dict(forms), "chosen": "searched" if forms else "default", "why": why, "placements": {}}
    progress(f"placement: the whole model, {', '.join(placements)}")
    with ExitStack() as stack:
        sessions = {n: stack.enter_context(opened(to_integer_kernels(model, f))) for n, f in placements.items()}
        stats = _timed(sessions, feeds, _WHOLE_LIMITS)
    chosen, why = _choose(stats, margin)
    return {
        "forms": dict(placements[chosen]),
        "chosen": chosen,
        "why": why,
        "placements": {name: _facts(stats, name) for name in stats},
    }


def _choose(stats: Mapping[str, LatencyStats], margin: float) -> tuple[str, str]:
    """The fastest that beats float by the margin, else float; and why. Ratios are paired by round: drift cancels."""
    shares = {name: ratio(s, stats[FLOAT]).median for name, s in stats.items() if name != FLOAT}
    best = min(shares, key=lambda name: shares[name])
    told = f"{best} takes {shares[best]:.2f} of the float form's time, limit {1 - margin:.2f}"
    return (best, told) if shares[best] <= 1 - margin else (FLOAT, told)


def _timed(sessions: Mapping[str, Session], feeds: Feeds, limits: Mapping[str, Any]) -> dict[str, LatencyStats]:
    return measure({name: partial(session.run, feeds) for name, session in sessions.items()}, **limits)


def _facts(stats: Mapping[str, LatencyStats], name: str) -> dict[str, Any]:
    s = stats[name]
    facts: dict[str, Any] = {"median_ms": s.p50_ms, "count": len(s.samples_ns), "stable": s.stable, "note": s.note}
    if name != FLOAT:
        facts["over_float"] = ratio(s, stats[FLOAT]).to_dict()
    return facts


def _equal(wanted: Array, found: Array) -> bool:
    scale = float(np.abs(wanted).max()) or 1.0
    return wanted.shape == found.shape and float(np.abs(found - wanted).max()) <= _EQUAL * scale


def scratch_session(
    open_artifact: Callable[[Path], AbstractContextManager[Session]],
) -> Open:
    """`opened` for `search`: each model in a folder of its own, which goes when its session is closed."""

    class _Scratch(AbstractContextManager[Session]):
        def __init__(self, model: onnx.ModelProto) -> None:
            self.model, self.stack = model, ExitStack()

        def __enter__(self) -> Session:
            with self.stack:
                folder = Path(self.stack.enter_context(TemporaryDirectory(prefix="s2d-placement-")))
                onnx.save_model(self.model, folder / "model.onnx")
                session = self.stack.enter_context(open_artifact(folder))
                self.kept = self.stack.pop_all()
            return session

        def __exit__(self, *error: object) -> None:
            self.kept.close()

    return _Scratch
