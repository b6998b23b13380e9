"""The stages for each target: export and build, verify, bench; and the report's rows that they make.

A runtime or device that is missing gives a row that says so: "built" where an artifact exists, "unavailable" where
none could be made, always with the reason and never with a number. Whatever else breaks at one precision becomes such
a row, too, and is kept in `Deployment.errors`, so that the other precisions and targets are still reported.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from s2d_deploy.bench import measure_throughput, roofline_share, time_sessions
from s2d_deploy.conditions import conditions
from s2d_deploy.console import Step
from s2d_deploy.errors import RecipeError, S2DDeployError, StageError, UnavailableError, UnsupportedError, message
from s2d_deploy.evaluate import outputs
from s2d_deploy.files import plain_name
from s2d_deploy.footprint import measure_footprint
from s2d_deploy.host import cpu_model
from s2d_deploy.judge import UNTIMED
from s2d_deploy.latency import ratio
from s2d_deploy.parity import output_parity, top1_flips
from s2d_deploy.peak import measure_roofline
from s2d_deploy.pipeline import Pipeline
from s2d_deploy.placement import device_of, placement_row, placement_stage, slower_than_float, write_dialect
from s2d_deploy.plan import Plan
from s2d_deploy.precision import BASELINE
from s2d_deploy.recipe import TargetSection
from s2d_deploy.registry import load_runtime, load_target
from s2d_deploy.session import Artifact, Progress, RemoteRuntime, Runtime, Session
from s2d_deploy.store import Stage
from s2d_deploy.verification import FOLDER, examine
from s2d_deploy.verify import end_to_end_codes, teacher_forced

log = logging.getLogger(__name__)

_QUICK_BUILD_SECONDS = 20.0  # a build that takes longer is not made a second time to see whether it comes out the same

Row = dict[str, Any]


class Deployment:
    """One target of a pipeline.

    Args:
        pipeline: makes plans and common ONNX files.
        section: the recipe's entry of this target.

    Attributes:
        errors: what broke while `rows` was made; a run that has any did not succeed.
    """

    def __init__(self, pipeline: Pipeline, section: TargetSection) -> None:
        self.pipeline, self.section = pipeline, section
        self.errors: list[Exception] = []
        self._makers: dict[str, Callable[[Path, Progress], Artifact]] = {}
        self.target = load_target(section.name)
        # Stages of what ran elsewhere stand beside those of what ran here.
        self.place = section.name + (plain_name(f"@{section.device}") if section.device else "")

    @cached_property
    def runtime(self) -> Runtime:
        """What runs the artifacts; on another machine it is connected when it is first asked for."""
        return runtime_of(self.section)

    def _version(self) -> str:
        """The runtime's version, which no device need be connected for."""
        return (self.runtime if self.section.device is None else load_runtime(self.section.name)).version()

    def export(self, precision: str, *, build: bool = True) -> Stage:
        """Dialect and artifact of one precision.

        Raises:
            UnsupportedError: the target cannot express the plan.
            RuntimeUnavailable: its compiler is not installed.
        """
        common = self.pipeline.onnx(precision)
        stage = "export" if build else "dialect"
        recipe, sequence = self.pipeline.recipe, self.pipeline.data.max_sequence
        batches = sorted({recipe.bench.batch_size, recipe.data.batch_size, *recipe.bench.throughput})
        options = self.target.shape_options(batches, {"sequence": sequence} if sequence else {}) | self.section.options

        sizes = {"sequence": sequence} if sequence else {}
        asked = self.section.options
        placement = None
        if build:
            placement = placement_stage(
                self.pipeline, self.target, common, precision=precision, options=asked, batches=batches, sizes=sizes,
                version=self._version(),
            )  # fmt: skip

        def write(folder: Path) -> Path:
            model = common.folder / "model.onnx"
            return write_dialect(self.target, model, folder, precision=precision, options=asked, placement=placement)

        def make(folder: Path, progress: Progress) -> Artifact:
            return self.target.build(write(folder), folder, precision=precision, options=options, progress=progress)

        self._makers[precision] = make

        def work(folder: Path, step: Step) -> dict[str, Any]:
            if not build:
                return {"dialect": write(folder).name}
            artifact = make(folder, step)
            step.note = f"{artifact.size_bytes / 1024:.0f} KiB"
            return {"files": artifact.files, "info": artifact.info, "size_bytes": artifact.size_bytes}

        key = {
            "onnx": common.sha256,
            "options": options,
            "runtime": self._version(),
            "cpu": cpu_model(),
        }
        if placement is not None:
            key["placement"] = placement.sha256
        return self.pipeline._stage(f"{stage}/{self.section.name}/{precision}", key, work)

    @contextmanager
    def _second_build(self, precision: str) -> Iterator[Session]:
        """A session of the artifact, built once more."""
        with tempfile.TemporaryDirectory() as folder:
            artifact = self._makers[precision](Path(folder), lambda _text: None)
            with self.runtime.open(artifact, threads=self.pipeline.recipe.bench.threads) as session:
                yield session

    def artifact(self, precision: str) -> Artifact:
        """The built artifact."""
        stage = self.export(precision)
        return Artifact(stage.folder, self.section.name, precision, stage.info["files"], stage.info["info"])

    def verify(self, precision: str) -> Stage:
        """Run the artifact: metric on the test split, teacher-forced and end-to-end parity, audit.

        Raises:
            UnavailableError: it cannot run here.
        """
        artifact, pipeline = self.artifact(precision), self.pipeline
        recipe = pipeline.recipe

        def work(folder: Path, step: Step) -> dict[str, Any]:
            plan = pipeline.plan(precision)
            simulated = pipeline.simulated(precision)
            wanted, name = pipeline.simulated_outputs(precision), pipeline.model.output
            with self.runtime.open(artifact, threads=recipe.bench.threads) as session:
                audit = session.audit()
                total, done = len(wanted), 0

                def on_batch(n: int) -> None:
                    nonlocal done
                    done += n
                    step.advance(done, total, "measuring the metric")

                output = outputs(session.run, name, pipeline.test_batches(), on_batch)
                parity = output_parity(wanted, output, name=name)
                if recipe.model.task == "image-classification":
                    parity["top1_flips"] = top1_flips(wanted, output)
                if plan.sites:
                    samples = min(recipe.verify.samples, pipeline.data.test.size)
                    size = min(recipe.verify.batch_size, samples)
                    index = list(range(samples))
                    step("teacher-forced accumulators")
                    parity |= teacher_forced(session, simulated, plan, pipeline.data.test.load(index[:size]), step)
                    step("codes end to end")
                    groups = [index[i : i + size] for i in range(0, samples, size)]
                    parity |= end_to_end_codes(session, simulated, (pipeline.data.test.load(g) for g in groups))
                    parity["samples_compared"] = samples
                    quick = float(self.export(precision).manifest.get("seconds", 0.0)) < _QUICK_BUILD_SECONDS
                    parity |= examine(
                        session,
                        pipeline.quantized_model(precision),
                        simulated,
                        plan,
                        pipeline.onnx(precision).folder / "model.onnx",
                        pipeline.data.test.load,
                        {"float": pipeline.simulated_outputs(BASELINE), "simulated": wanted, "runtime": output},
                        name,
                        folder,
                        counts=parity,
                        samples=samples,
                        batch_size=size,
                        metric=lambda some: pipeline.score_first(some).value,
                        second=(lambda: self._second_build(precision)) if quick else None,
                        step=step,
                    )
                    if "reproducer" in parity.get("explanation", {}):
                        parity["explanation"]["reproducer"] = f"verify/{self.place}/{precision}/{FOLDER}"
            np.savez(folder / "outputs.npz", output=output)
            measured = pipeline.score(output)
            step.note = f"measured {measured.value:.2f}; {_parity_words(parity)}"
            return {
                "audit": audit.to_dict(),
                "rung": audit.rung,
                "executed": audit.executed,
                "parity": parity,
                "measured": measured.value,
                "per_sample": measured.per_sample.tolist(),
            }

        key = {
            "export": self.export(precision).sha256,
            "quantize": pipeline.quantize(precision).identity,
            "verify": recipe.verify.model_dump(),
            "examined": 1,
            "threads": recipe.bench.threads,
            "runtime": self.runtime.version(),
            "device": self.runtime.device(),
        }
        return pipeline._stage(f"verify/{self.place}/{precision}", key, work)

    def bench(self, precisions: list[str]) -> Stage:
        """Latency of all `precisions`, interleaved in one process, the float baseline among them."""
        pipeline, section = self.pipeline, self.pipeline.recipe.bench
        artifacts = {p: self.artifact(p) for p in precisions}

        def work(_folder: Path, step: Step) -> dict[str, Any]:
            batch = pipeline.data.test.load(list(range(min(section.batch_size, pipeline.data.test.size))))
            feeds = {name: tensor.numpy() for name, tensor in batch.items()}
            with ExitStack() as stack:
                sessions = {
                    p: stack.enter_context(self.runtime.open(a, threads=section.threads)) for p, a in artifacts.items()
                }
                before = conditions()
                stats, facts = time_sessions(sessions, feeds, section, step)
                around = {"before": before, "after": conditions()}
                throughput = measure_throughput(sessions, feeds, section, step) if self._here else {}
            result: dict[str, Any] = {"latency": {}, "speedup": {}, "throughput": throughput, "footprint": {}}
            if section.footprint and self._here:
                for p, artifact in artifacts.items():
                    step(f"cold start and memory, {p}")
                    found = measure_footprint(artifact, feeds, threads=section.threads)
                    result["footprint"][p] = found.to_dict() if found is not None else None
            for p, s in stats.items():
                batch_size = len(next(iter(feeds.values())))
                result["latency"][p] = s.to_dict(
                    threads=section.threads, batch=batch_size, conditions=around, **facts[p]
                )
                if p != BASELINE and BASELINE in stats:
                    r = ratio(stats[BASELINE], s)
                    result["speedup"][p] = {"median": r.median, "ci": [r.lo, r.hi]}
            step.note = ", ".join(f"{p} {s.p50_ms:.3g} ms" for p, s in stats.items())
            return result

        key = {
            "exports": {p: self.export(p).sha256 for p in precisions},
            "data": pipeline.data.fingerprint,
            "bench": section.model_dump(),
            "runtime": self.runtime.version(),
            "device": self.runtime.device(),
            "cpu": cpu_model(),
        }
        # Named by what is in it: a narrowed run must not replace the measurement of the whole.
        return pipeline._stage(f"bench/{self.place}-{'-'.join(precisions)}", key, work)

    def roofline(self) -> dict[str, Any] | None:
        """The ceilings of this machine's processor; None for what runs elsewhere, or without a C compiler."""
        section = self.pipeline.recipe.bench
        if not section.roofline or not self._here or not self.runtime.device().startswith("cpu"):
            return None

        def work(_folder: Path, step: Step) -> dict[str, Any]:
            found = measure_roofline(section.threads)
            step.note = ", ".join(f"{kind} {peak.gmacs:.0f} GMAC/s" for kind, peak in found.peaks.items())
            return found.to_dict()

        document: dict[str, Any] = self.pipeline._stage(
            f"roofline/{section.threads}", {"cpu": cpu_model(), "threads": section.threads}, work
        ).info
        return {name: document[name] for name in ("threads", "peaks", "gigabytes_per_second")}

    @property
    def _here(self) -> bool:
        """Whether artifacts run on this machine."""
        return self.section.device is None

    # ---- the report's rows ----------------------------------------------------------------------------------

    def rows(self, *, bench: bool = True) -> list[Row]:
        """One row for each precision, the baseline first. `errors` has what broke, missing required runtimes included.

        Raises:
            StageError: the machine refuses (disk full, ...): nothing after it could be written either.
        """
        try:
            self.runtime.device()  # before anything is built for it
        except UnavailableError as error:  # asked for by address, so an error whether or not it is required
            self._broke(error)
            return [self._empty_row(p) | {"reason": str(error)} for p in self.pipeline.precisions] + self._broken_rows()
        # The stages that all targets share, first: what breaks there is no target's fault, and is raised.
        for precision in self.pipeline.precisions:
            self.pipeline.onnx(precision)
        rows = {p: self._guarded_row(p) for p in self.pipeline.precisions}
        timed = [p for p, row in rows.items() if row["status"] == "measured"]
        if bench and timed and self.section.name not in UNTIMED:
            self._add_latency({p: rows[p] for p in timed})
        elif timed and self.section.name in UNTIMED:
            for p in timed:
                rows[p]["reason"] = "latency is not measured: the integer reference is slow on purpose"
        float_size = rows[BASELINE].get("size_bytes")
        for row in rows.values():
            row["float_size_bytes"] = float_size
        return [*rows.values(), *self._broken_rows()]

    def _broken_rows(self) -> list[Row]:
        """Of precisions that could not be made for any target."""
        return [self._empty_row(p) | {"reason": _words(error)} for p, error in self.pipeline.broken.items()]

    def _add_latency(self, rows: Mapping[str, Row]) -> None:
        try:
            info = self.bench(list(rows)).info
            ceilings = self.roofline()
        except StageError:
            raise
        except Exception as error:
            self._broke(error)
            for row in rows.values():
                row["reason"] = f"latency could not be measured: {_words(error)}"
            return
        for precision, row in rows.items():
            row["latency_ms"] = info["latency"][precision]
            for name in ("throughput", "footprint"):
                if info[name].get(precision):
                    row[name] = info[name][precision]
            if ceilings is not None:
                share = roofline_share(
                    ceilings,
                    row["audit"]["ops"],
                    row["size_bytes"],
                    row["latency_ms"]["batch"],
                    row["latency_ms"]["p50"],
                )
                if share is not None:
                    row["roofline"] = share
            speedup = info["speedup"].get(precision)
            if speedup is not None:
                row |= {"speedup_over_float": speedup["median"], "speedup_ci": speedup["ci"]}
                if advice := slower_than_float(self.section.name, precision, speedup, self.section.options):
                    row["audit"] = row["audit"] | {"notes": [*row["audit"]["notes"], advice]}

    def _guarded_row(self, precision: str) -> Row:
        try:
            return self._row(precision)
        except StageError:
            raise
        except Exception as error:  # an adapter may fail in its own way; the others are reported all the same
            self._broke(error, precision)
            return self._empty_row(precision) | {"reason": _words(error)}

    def _broke(self, error: Exception, precision: str = "latency") -> None:
        self.errors.append(error)
        log.info("%s %s broke", self.section.name, precision, exc_info=error)

    def _empty_row(self, precision: str) -> Row:
        reached = self.section.device is None or "runtime" in vars(self)
        return {
            "target": self.section.name,
            "runtime": _label(self.section.name, self._version()),
            "device": device_of(self.runtime, self.section.options) if reached else self.section.device,
            "precision": precision,
            "status": "unavailable",
            "reason": None,
        }

    def _row(self, precision: str) -> Row:
        row = self._empty_row(precision)
        try:
            exported = self.export(precision)
        except (UnsupportedError, UnavailableError) as error:
            self._missed(error)
            return row | {"reason": str(error)}
        info = exported.info
        row |= {
            "status": "built",
            "size_bytes": info["size_bytes"],
            **_weight_bytes(self.pipeline.plan(precision), info["info"]),
            **placement_row(self.section.options, info["info"]),
        }
        for name in ("compute_capabilities", "audit", "rung"):
            if name in info["info"]:
                row[name] = info["info"][name]
        simulated = self.pipeline.quantize(precision).info
        row["metric"] = {
            "name": simulated["metric"],
            "n": simulated["n"],
            "float": self.pipeline.quantize(BASELINE).info["value"],
            "simulated": simulated["value"],
            "measured": None,
        }
        reason = self.runtime.available()
        if reason is not None:
            self._missed(UnavailableError(f"target {self.section.name!r} is required by the recipe: {reason}"))
            return row | {"reason": reason}
        try:
            info = self.verify(precision).info
        except UnavailableError as error:
            self._missed(error)
            return row | {"reason": str(error)}
        baseline = self.pipeline.score(self.pipeline.simulated_outputs(BASELINE))
        row["metric"] |= {
            "measured": info["measured"],
            "per_sample_float": baseline.per_sample.tolist(),
            "per_sample_measured": info["per_sample"],
        }
        return row | {
            "status": "measured",
            **{k: info[k] for k in ("audit", "rung", "executed", "parity")},
        }

    def _missed(self, error: S2DDeployError) -> None:
        """A runtime, a device or an operator is missing: an error only where the recipe requires the target."""
        log.info("%s: %s", self.section.name, error)
        if self.section.required:
            self.errors.append(error)


def runtime_of(section: TargetSection) -> Runtime:
    """The runtime of a target, here or on the section's device.

    Raises:
        RecipeError: no such address, or the runtime runs here only.
        UnavailableError: the device cannot be reached.
    """
    runtime = load_runtime(section.name)
    if section.device is None:
        return runtime
    if not isinstance(runtime, RemoteRuntime):
        raise RecipeError(
            message(
                f"target {section.name!r} runs on this machine only",
                found=f"device {section.device!r}",
                fix="leave the device out, or use the target tvm",
            )
        )
    return runtime.at(section.device)


def _words(error: Exception) -> str:
    """One line: our own errors as they are, others with their class, because their text alone may be a bare key."""
    text = " ".join(str(error).split())
    return text if isinstance(error, S2DDeployError) else f"{type(error).__name__}: {text}"


def _label(name: str, version: str) -> str:
    """The version with the runtime's name, unless it begins with a package's name."""
    return version if version[:1].isalpha() else f"{name} {version}".strip()


def _parity_words(parity: Mapping[str, Any]) -> str:
    if "accumulators_checked" not in parity:
        return "float"
    if not parity["accumulators_checked"]:
        return "no product of integers to check"
    return f"{parity['accumulators_different']} of {parity['accumulators_checked']} accumulators differ"


def _weight_bytes(plan: Plan, info: Mapping[str, Any]) -> Row:
    """Bytes of the quantized weights in FP32, and in the artifact where the target says."""
    float_bytes = sum(4 * op.k * op.n for op in plan.ops.values() if f"{op.name}.weight" in plan.sites)
    if not float_bytes:
        return {}
    stored = info.get("weight_size_bytes")
    row: Row = {"weight_float_size_bytes": float_bytes}
    if stored is not None:
        row |= {"weight_size_bytes": stored, "weight_ratio": stored / float_bytes}
    return row
