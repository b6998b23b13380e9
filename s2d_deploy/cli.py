"""The command line. Verbs are prefixes of one pipeline; each works on what the one before left in the run folder.

Nothing heavy is imported here: ``--help`` answers at once, and each verb imports what it needs.
stdout holds results only (one JSON document with ``--json``); progress and errors go to stderr.
Exit codes: 0 all gates passed, 1 a gate failed or is undecided, 2 the input is wrong, 3 a runtime or device is missing,
70 an error that nobody foresaw, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from s2d_deploy import __version__
from s2d_deploy.cli_options import (
    debug_option,
    device_option,
    gate_options,
    model_options,
    recipe_options,
    report_options,
)
from s2d_deploy.errors import EXIT_GATE_FAILED, EXIT_UNAVAILABLE, EXIT_USER_ERROR, S2DDeployError, exit_code_of
from s2d_deploy.interrupts import remember_interrupts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s2d_deploy.pipeline import Pipeline

_OURS = logging.getLogger("s2d_deploy")
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count

_EPILOG = """\b
Examples:
  s2d-deploy doctor                                what runs here, and on which rung
  s2d-deploy run digits-vit --output runs/digits   the embedded default, every stage
  s2d-deploy run my.yaml --set quantize.block_size=16
  s2d-deploy quantize my.yaml --precision w4a4     only up to the plan
  s2d-deploy compare runs/a runs/b                 two runs side by side
  s2d-deploy audit model.onnx                      any model: declared against executed


Exit codes:
  0    done, and all gates passed
  1    a gate failed or is undecided
  2    the input is wrong, or the machine refused (disk full, no permission)
  3    a runtime or device is missing
  70   an unexpected error, a bug (--debug shows the traceback)
  130  interrupted; the same command goes on where it was stopped"""


class _Commands(click.Group):
    """Lists verbs in the order in which a user meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self.commands)


@click.group(
    cls=_Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="s2d-deploy")
def cli() -> None:
    """Condition, quantize, export, run, prove, measure and gate low-bit transformers.

    A RECIPE is a YAML file, or the name of an embedded one: digits-vit, minilm. The verbs are steps of one pipeline, in
    this order; each does the steps before it where they are not done yet, and reuses them where they are.
    """


@contextmanager
def _opened(
    recipe: str | dict[str, Any],
    output: Path | None,
    overrides: tuple[str, ...],
    precisions: tuple[str, ...],
    targets: tuple[str, ...],
    threads: int | None,
    update: bool,
    quiet: bool,
    devices: tuple[str, ...] = (),
) -> Iterator[Pipeline]:
    """The recipe with its flags applied, in its locked run folder."""
    from s2d_deploy.recipe import load_recipe

    own = [*overrides, *([f"bench.threads={threads}"] if threads else [])]
    claimed = resolved = load_recipe(recipe, own)
    # Flags that narrow a run do not make it another recipe.
    if precisions:
        resolved = load_recipe(recipe, [*own, f"quantize.precisions=[{', '.join(precisions)}]"])
    if targets:
        resolved = _only_targets(resolved, targets)
    if devices:
        resolved = _on_devices(resolved, devices)
    from s2d_deploy.console import Display
    from s2d_deploy.host import versions
    from s2d_deploy.store import RunFolder

    folder = output or Path("runs") / resolved.name
    known = {k: v for k, v in versions().items() if v is not None}
    with RunFolder(folder, known) as store:
        store.claim(claimed.document(), update)
        display = Display(quiet=quiet)
        display.say(f"{resolved.name} -> {folder}")
        from s2d_deploy.pipeline import Pipeline  # only now: it takes seconds, and a folder may be refused at once

        yield Pipeline(resolved, store, display)


def _only_targets(recipe: Any, names: tuple[str, ...]) -> Any:
    from s2d_deploy.recipe import parse_recipe

    document = recipe.document()
    listed = {t["name"]: t for t in document["targets"]}
    document["targets"] = [listed.get(n, {"name": n}) for n in dict.fromkeys(names)]
    return parse_recipe(document, "--target")


def _on_devices(recipe: Any, devices: tuple[str, ...]) -> Any:
    """An address says where tvm runs; anything else is its build option."""
    from s2d_deploy.errors import RecipeError, message
    from s2d_deploy.recipe import parse_recipe

    document = recipe.document()
    found = [t for t in document["targets"] if t["name"] == "tvm"]
    if not found:
        names = ", ".join(t["name"] for t in document["targets"])
        raise RecipeError(message("--device is for the target tvm", found=names, fix="add --target tvm"))
    for device in devices:
        if device.startswith("rpc:"):
            found[0]["device"] = device
        else:
            found[0]["options"] = {**found[0]["options"], "device": device}
    return parse_recipe(document, "--device")


def _print(document: Any, as_json: bool, text: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=1, default=str, allow_nan=False))
    else:
        text()


@cli.command(short_help="What runs here: CPU, GPU, runtimes, rungs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@debug_option
def doctor(as_json: bool) -> None:
    """Say what runs here: CPU, GPU, runtimes, versions, and the rung that each precision gets.

    A runtime that is missing is listed with the pip line that installs it. Nothing is built or changed.
    """
    from rich.console import Console

    from s2d_deploy.doctor import examine, render

    report = examine()
    _print(report, as_json, lambda: Console().print(render(report)))


@cli.command(short_help="Print the JSON schema of a recipe.")
@click.option("--json", is_flag=True, expose_value=False, hidden=True)  # what it prints anyway
def schema() -> None:
    """Print the JSON schema of a recipe (for editors and validation).

    \b
    Example: s2d-deploy schema > recipe.schema.json
    and in a recipe's first line, for editors that know the YAML language server:
      # yaml-language-server: $schema=recipe.schema.json
    """
    from s2d_deploy.recipe import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))


@cli.command(short_help="Find outliers, and say whether S2D will help.")
@recipe_options
@model_options(samples=64)
@click.option("--plots", type=click.Path(path_type=Path), help="Write spectra, PCDR and sites as SVG into this folder.")
def diagnose(
    as_json: bool, data: str | None, task: str | None, samples: int, plots: Path | None, **options: Any
) -> None:
    """Find outliers before any conditioning, what they cost at the quantized sites, and whether S2D will help.

    Per layer: PCDR, singular values, ranges, and what S2D would touch. Per quantized site: its error at 4 bits and
    what makes it. Layers are flagged where PCDR reaches condition.tau; try another with --set condition.tau=0.8.

    \b
    Examples:
      s2d-deploy diagnose my.yaml --plots plots
      s2d-deploy diagnose ./my-checkpoint --data texts.txt
      s2d-deploy diagnose google/vit-base-patch16-224 --data ./images --samples 32
    """
    from s2d_deploy.diagnosis_recipe import as_recipe
    from s2d_deploy.store import read_json

    with _opened(as_recipe(options.pop("recipe"), data, task, samples), **options) as pipeline:
        document = read_json(pipeline.diagnose().folder / "diagnosis.json")
    from s2d_deploy.diagnosis_view import sites_table, write_plots
    from s2d_deploy.tables import diagnosis_table

    def text() -> None:
        click.echo(diagnosis_table(document["layers"]))
        if document["sites"]:
            click.echo(sites_table(document["sites"]))
        click.echo(document["forecast"]["sentence"])

    _print(document, as_json, text)
    if plots is not None:
        for path in write_plots(document, plots, tau=document["tau"]):
            click.echo(str(path), err=True)


@cli.command(short_help="Press the outliers down with S2D, and say what it bought.")
@recipe_options
@model_options(samples=128)
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps [default: the recipe's; with --data 300].")
@click.option(
    "--objective",
    type=click.Choice(["distill", "task"]),
    help="Imitate the original, or the task's loss on labels [default: the recipe's; with --data distill].",
)
@click.option("--method", help="s2d, or what it is compared with: control, weight-decay, muon [default: s2d].")
def condition(as_json: bool, data: str | None, task: str | None, samples: int, **options: Any) -> None:
    """Train (where the recipe says so) and press the outliers down with S2D.

    The result, <output>/condition, is a checkpoint that transformers loads with from_pretrained.

    With --data RECIPE is a model, and no recipe and no labels are needed. Then a tenth of the data (or test/, beside
    train/) is held out, and the command ends with what S2D bought: float quality, and simulated quality at each
    --precision [default: w8a8, w4a4], before and after, with an interval. <output>/outcome holds it with plots,
    <output>/before and after the two diagnoses. That nothing was bought is an answer, too: exit code 0.

    \b
    Examples:
      s2d-deploy condition my.yaml
      s2d-deploy condition ./my-checkpoint --data texts.txt --out runs/mine
      s2d-deploy condition google/vit-base-patch16-224 --data ./images --steps 500 --set condition.tau=0.9
    On two processes:
      torchrun --nproc-per-node 2 -m s2d_deploy.cli condition my.yaml
    """
    from s2d_deploy.diagnosis_recipe import as_recipe, conditioning_sections
    from s2d_deploy.follow import follow, rank

    flags = {name: options.pop(name) for name in ("steps", "objective", "method")}
    options["overrides"] = (*(f"condition.{k}={v}" for k, v in flags.items() if v is not None), *options["overrides"])
    sections = conditioning_sections(flags["steps"])
    recipe = as_recipe(options.pop("recipe"), data, task, samples, purpose="conditioned", sections=sections)
    if rank() > 0:  # the first process owns the folder and says what is to be done
        from s2d_deploy.recipe import load_recipe

        follow(load_recipe(recipe, options["overrides"]))
        return
    with _opened(recipe, **options) as pipeline:
        if data is None:
            stage = pipeline.condition()
            document = {"stage": stage.name, "folder": str(stage.folder), **stage.info}
        else:
            from s2d_deploy.conditioning_run import condition_and_judge

            document = condition_and_judge(pipeline)
    if data is None:
        _print(document, as_json, lambda: _say_stages([stage]))
    else:
        from s2d_deploy.conditioning_view import statement, where

        _print(document, as_json, lambda: click.echo(statement(document) + where(document)))


@cli.command(short_help="Calibrate, plan each precision, measure its simulation.")
@recipe_options
@click.option("--preset", help="Precisions and passes by name: the recipe's own keys give way. See the list below.")
def quantize(as_json: bool, preset: str | None, **options: Any) -> None:
    """Calibrate, run the recipe's passes, make the plan of each precision, and measure its simulation.

    Writes <output>/quantize/<precision>: plan.json and plan.safetensors hold every grid, scale and zero point;
    changed.safetensors the weights that a pass has changed. <output>/errors/<precision> says where the simulation's
    error comes from, layer by layer (quantize.error_samples=0 leaves that out).

    \b
    Presets: int8, int8_smoothquant, int4_awq, int4_gptq, w4a8, w4a4, w4a4_rotated, w4a4_erq, w4a4_repq,
      w4a4_flatquant, nvfp4
    Examples:
      s2d-deploy quantize my.yaml --preset w4a4_erq
      s2d-deploy quantize my.yaml --set "quantize.passes=[smoothquant, ranges, gptq]" --precision w4a8
    """
    if preset is not None:
        from s2d_deploy.ptq.presets import preset as keys_of

        keys = {"preset": preset, **keys_of(preset)}
        options["overrides"] = (*(f"quantize.{k}={json.dumps(v)}" for k, v in keys.items()), *options["overrides"])
    with _opened(**options) as pipeline:
        stages = [pipeline.quantize(p) for p in pipeline.precisions]
        analysed = pipeline.error_analyses()
    from s2d_deploy.tables import errors_table

    def text() -> None:
        _say_stages(stages)
        if analysed:
            click.echo(errors_table(analysed))

    document = [{"stage": s.name, "folder": str(s.folder), **s.info} for s in stages]
    _print(document, as_json, text)


@cli.command(short_help="Write ONNX in each target's dialect; compile nothing.")
@recipe_options
def export(as_json: bool, **options: Any) -> None:
    """Export the simulated model to ONNX, in the dialect of each target (nothing is compiled).

    Writes <output>/onnx/<precision> (the common file) and <output>/dialect/<target>/<precision>. A target that cannot
    express a precision says why on stderr; it is an error where the target is required, or where nothing is left.
    """
    _deploy(as_json, options, build=False)


@cli.command(short_help="Build what each runtime loads.")
@recipe_options
@device_option
def build(as_json: bool, **options: Any) -> None:
    """Build each target's artifact: ONNX Runtime model, TVM library, TensorRT engine.

    Writes <output>/export/<target>/<precision>. Options of a target stand in the recipe under targets.options, e.g.
    compute_capabilities: ["8.6", "8.9"] for tensorrt, which are built with no GPU; tvm's device may be given by
    --device. A target that cannot be built says why on stderr; it is an error where the target is required, or where
    nothing is left.

    \b
    Example, another processor: s2d-deploy build my.yaml --target tvm --device 'llvm -mcpu=x86-64-v3'
    """
    _deploy(as_json, options, build=True)


def _deploy(as_json: bool, options: dict[str, Any], *, build: bool) -> None:
    from s2d_deploy.deployment import Deployment
    from s2d_deploy.errors import UnavailableError, UnsupportedError
    from s2d_deploy.precision import BASELINE

    stages, refused, grave = [], [], []
    with _opened(**options) as pipeline:
        for section in pipeline.recipe.targets:
            deployment = Deployment(pipeline, section)
            for precision in pipeline.precisions:
                try:
                    stages.append(deployment.export(precision, build=build))
                except (UnsupportedError, UnavailableError) as error:
                    refused.append((f"{section.name}/{precision}", error))
                    grave += [error] if section.required else []
        # The baseline alone is not what was asked for, unless nothing else was.
        wanted = pipeline.precisions[1:] or (BASELINE,)
    if not any(stage.name.endswith(f"/{precision}") for stage in stages for precision in wanted):
        grave = [error for _, error in refused]
    document = [{"stage": s.name, "folder": str(s.folder), **s.info} for s in stages]
    document += [{"stage": name, "refused": str(refusal)} for name, refusal in refused]
    _print(document, as_json, lambda: _say_stages(stages))
    for name, refusal in refused:
        click.echo(f"{name}: {refusal}", err=True)
    _exit(max(map(exit_code_of, grave), default=0))


def _say_stages(stages: list[Any]) -> None:
    for stage in stages:
        click.echo(f"{stage.name:<28} {stage.folder}")


@cli.command(short_help="Run each artifact: accuracy, exact parity, audit.")
@recipe_options
@device_option
def verify(as_json: bool, **options: Any) -> None:
    """Run each artifact: accuracy, teacher-forced accumulators, codes end to end, and what it really executes.

    acc. diff. counts int32 accumulators that differ from the exact integer product: 0 is the promise. codes diff.
    counts codes that a float operator between two quantizers moved over a rounding boundary. Limits for both are
    gates of the recipe. Exit code 3 where nothing can be run here.
    """
    _measure(as_json, options, bench=False)


@cli.command(short_help="Measure latency beside the float baseline.")
@recipe_options
@device_option
@click.option(
    "--per-op",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Time each op alone at each precision instead, and write FILE, which quantize.passes.mixed.costs reads.",
)
def bench(as_json: bool, per_op: Path | None, **options: Any) -> None:
    """Measure latency, interleaved with the float baseline of the same runtime (and verify, where not done yet).

    Threads, batch, warm-up and duration stand in the recipe under bench. A ~ behind a latency says that it was not
    stable. Exit code 3 where nothing can be run here.

    \b
    Another machine, through TVM's RPC tracker: s2d-deploy bench my.yaml --target tvm --device rpc://host:9190/key
    Ops alone: s2d-deploy bench my.yaml --target ort --per-op costs.json --precision w8a8 --precision w4a8
    """
    if per_op is not None:
        _measure_ops(as_json, per_op, options)
    else:
        _measure(as_json, options, bench=True)


def _measure_ops(as_json: bool, path: Path, options: dict[str, Any]) -> None:
    from s2d_deploy.errors import RecipeError, message
    from s2d_deploy.store import write_json
    from s2d_deploy.tables import op_costs_table

    if not path.parent.is_dir():  # now, not behind the measurement
        raise RecipeError(message(f"--per-op {path}: no folder {path.parent}", fix="make it first"))
    with _opened(**options) as pipeline:
        sections = pipeline.recipe.targets
        if len(sections) != 1:
            listed = ", ".join(s.name for s in sections)
            raise RecipeError(message("--per-op measures one target", found=listed, fix="add --target ort"))
        from s2d_deploy.op_costs import measure_op_costs

        document = measure_op_costs(pipeline, sections[0], pipeline.precisions)
    write_json(path, document)
    _print(document, as_json, lambda: click.echo(op_costs_table(document) + str(path)))


def _measure(as_json: bool, options: dict[str, Any], *, bench: bool) -> None:
    from s2d_deploy.deployment import Deployment
    from s2d_deploy.tables import parity_text, results_table

    rows, errors = [], []
    with _opened(**options) as pipeline:
        for section in pipeline.recipe.targets:
            deployment = Deployment(pipeline, section)
            rows += deployment.rows(bench=bench)
            errors += deployment.errors
    _print(rows, as_json, lambda: click.echo(results_table(rows) + parity_text(rows)))
    _say_errors(errors)
    if not errors and not any(row["status"] == "measured" for row in rows):
        click.echo("error: nothing could be run here; the reasons stand above, in `reason` with --json", err=True)
        _exit(EXIT_UNAVAILABLE)
    _exit(max(map(exit_code_of, errors), default=0))


@cli.command(short_help="Judge the run by the recipe's limits; the exit code says.")
@recipe_options
@device_option
@gate_options
def gate(
    as_json: bool,
    baseline: Path | None,
    write: bool,
    tolerance: float | None,
    slower: float | None,
    junit: Path | None,
    summary: Path | None,
    **options: Any,
) -> None:
    """Judge the run by the recipe's limits; exit code 0 pass, 1 fail or undecided.

    Limits stand in the recipe under gates; a key left out makes no gate. Whatever the verdict, the report is written.
    RECIPE may be a finished run, too (its folder, or a report.json): then nothing is run, and its figures are judged.

    \b
    Examples:
      s2d-deploy gate my.yaml --set gates.accuracy_drop=1.0 --update
      s2d-deploy gate my.yaml --baseline baseline.json --write    commit the file
      s2d-deploy gate my.yaml --baseline baseline.json            later: no worse than that, sample by sample
      s2d-deploy gate runs/mine --set gates.accuracy_drop=0.5 --junit junit.xml
    """
    from s2d_deploy.gating import BaselineOptions
    from s2d_deploy.judge import is_report

    against = BaselineOptions(baseline, write, tolerance, slower)
    against.check()
    if is_report(options["recipe"]):
        _judge_report(as_json, options, against, junit, summary)
    else:
        _finish(as_json, options, against=against, junit=junit, summary=summary)


def _judge_report(
    as_json: bool, options: dict[str, Any], against: Any, junit: Path | None, summary: Path | None
) -> None:
    from s2d_deploy.errors import RecipeError, message
    from s2d_deploy.gate import exit_code
    from s2d_deploy.gating import apply_baseline, write_files
    from s2d_deploy.judge import judged_again
    from s2d_deploy.report import read_report

    ignored = [n for n in ("output", "precisions", "targets", "threads", "update", "devices") if options[n]]
    if ignored:
        raise RecipeError(
            message(
                f"{options['recipe']} is a finished run: nothing is run",
                found=", ".join(ignored),
                fix="leave these options out, or give the recipe",
            )
        )
    judged = judged_again(read_report(Path(options["recipe"])), options["overrides"])
    judged, said = apply_baseline(judged, against)
    _say_verdicts(as_json, judged, write_files(judged, junit=junit, summary=summary), said)
    _exit(exit_code(judged["verdict"]))


@cli.command(short_help="Write report.json, .html, .md and junit.xml.")
@report_options
@device_option
def report(as_json: bool, bundle: Path | None, check: Path | None, rerun: bool, **options: Any) -> None:
    """Write report.json, report.html, report.md and junit.xml (exit code 0 whatever the gates say).

    report.html is self-contained: it can be mailed, or kept as a CI artifact. --bundle packs what its claims rest on;
    --check says which claims of a bundle hold (exit code 1: one does not). It reads the file and believes nothing.

    \b
    Examples:
      s2d-deploy report my.yaml --bundle evidence.zip
      s2d-deploy report --check evidence.zip
      s2d-deploy report --check evidence.zip --rerun --set data.path=./images
    """
    from s2d_deploy.errors import RecipeError, message

    if check is not None:
        if options["recipe"] is not None or bundle is not None:
            raise RecipeError(message("--check reads a bundle, and nothing else", fix="leave RECIPE and --bundle out"))
        _check_bundle(as_json, check, rerun, options)
        return
    if options["recipe"] is None or rerun:
        raise RecipeError(message("report needs a RECIPE, or --check FILE; --rerun belongs to --check"))
    if bundle is not None and not bundle.parent.is_dir():  # now, not behind the measurement
        raise RecipeError(message(f"--bundle {bundle}: no folder {bundle.parent}", fix="make it first"))
    _finish(as_json, options, judge=False, bundle=bundle)


def _check_bundle(as_json: bool, path: Path, rerun: bool, options: dict[str, Any]) -> None:
    from s2d_deploy.bundle_check import check, holds, read_bundle
    from s2d_deploy.errors import EXIT_GATE_FAILED, RecipeError, message
    from s2d_deploy.tables import claims_table

    ignored = [
        n for n in ("output", "overrides", "precisions", "targets", "threads", "update", "devices") if options[n]
    ]
    if ignored and not rerun:
        raise RecipeError(message("--check runs nothing", found=", ".join(ignored), fix="add --rerun"))
    evidence = read_bundle(path)
    claims = check(evidence)
    if rerun:
        from s2d_deploy.bundle_rerun import rerun as run_again

        with tempfile.TemporaryDirectory(prefix="s2d-deploy-") as folder:
            options = options | {"recipe": evidence.recipe, "output": options["output"] or Path(folder) / "run"}
            with _opened(**options) as pipeline:
                claims += run_again(evidence, pipeline)
    listed = [claim.to_dict() for claim in claims]
    document = {"bundle": path.name, "sha256": evidence.sha256, "claims": listed}
    _print(document, as_json, lambda: click.echo(claims_table(listed)))
    _exit(0 if holds(claims) else EXIT_GATE_FAILED)


@cli.command(short_help="Everything; goes on where it was stopped.")
@recipe_options
@device_option
def run(as_json: bool, **options: Any) -> None:
    """Do everything: condition, quantize, export, build, verify, bench, gate, report. Resumes where it was stopped.

    A target that breaks does not take the others with it: the report names the reason, and the exit code is not 0.

    \b
    Examples:
      s2d-deploy run digits-vit
      s2d-deploy run my.yaml --output runs/b16 --set quantize.block_size=16
      s2d-deploy run my.yaml --target ort --precision w8a8 --json > report.json
    """
    _finish(as_json, options)


def _finish(
    as_json: bool,
    options: dict[str, Any],
    *,
    judge: bool = True,
    against: Any = None,
    junit: Path | None = None,
    summary: Path | None = None,
    bundle: Path | None = None,
) -> None:
    from s2d_deploy.files import plain_name
    from s2d_deploy.gate import exit_code
    from s2d_deploy.gating import apply_baseline, write_files
    from s2d_deploy.run import run as run_everything

    devices = [plain_name(device).strip("-") for device in options["devices"]]
    part = "-".join(dict.fromkeys([*options["targets"], *map(str.lower, options["precisions"]), *devices])) or None
    with _opened(**options) as pipeline:
        outcome = run_everything(pipeline, part=part)
        report, code, files, said = outcome.report, outcome.exit_code, list(outcome.files), list[str]()
        if against is not None:
            report, said = apply_baseline(report, against)
            changed = report["gates"] != outcome.report["gates"]
            extra = write_files(report, folder=files[0].parent if changed else None, junit=junit, summary=summary)
            files = list(dict.fromkeys([*files, *extra]))
            code = code if outcome.errors else exit_code(report["verdict"])
        if bundle is not None:
            from s2d_deploy.bundle import make_bundle

            said.append(f"{bundle}: evidence with digest {make_bundle(pipeline, report, bundle)}")
            files.append(bundle)
    _say_verdicts(as_json, report, files, said)
    _say_errors(outcome.errors)
    if judge or outcome.errors:
        _exit(code)


def _say_verdicts(as_json: bool, report: dict[str, Any], files: Sequence[Path], said: Sequence[str]) -> None:
    from s2d_deploy.tables import gates_table, results_table

    def text() -> None:
        click.echo(results_table(report["results"]))
        click.echo(gates_table(report["gates"]))
        click.echo(f"verdict: {report['verdict']}")
        for path in files:
            click.echo(str(path))

    _print(report, as_json, text)
    for line in said:
        click.echo(line, err=True)


@cli.command(short_help="What any ONNX model declares, and what is executed.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="NAME=SIZE",
    help="Shape of an input (x=1x3x224x224), or size of a named dimension (sequence=128); repeatable. An open first "
    "dimension is 1.",
)
@click.option(
    "--provider",
    "providers",
    multiple=True,
    help="Execution provider: cpu, cuda, openvino, xnnpack, ...; repeatable, most preferred first [default: cpu].",
)
@click.option(
    "--graph-optimization-level",
    "level",
    type=click.Choice(["all", "extended", "basic", "disable"]),
    default="all",
    show_default=True,
    help="How far ONNX Runtime may rewrite the graph.",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of the session.")
@click.option("--layers", is_flag=True, help="List every layer, not only those that differ.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@debug_option
def audit(
    model: Path,
    shapes: tuple[str, ...],
    providers: tuple[str, ...],
    level: str,
    threads: int,
    layers: bool,
    as_json: bool,
) -> None:
    """Say what each layer of MODEL.onnx declares (Q/DQ, integer operators) and what ONNX Runtime executes.

    For any ONNX model, whoever quantized it. It runs twice on random inputs, as it is written and optimized; kernel,
    arithmetic, provider and time are read from the optimized graph and the profile. Exit code 1 where a layer does not
    run as declared: integers promised and float executed, float promised and activations rounded, scales along an axis
    that the kernel ignores, or a provider's work done by the CPU.

    \b
    Examples:
      s2d-deploy audit model.onnx --shape sequence=128
      s2d-deploy audit model.onnx --shape pixel_values=1x3x224x224 --layers
    """
    from s2d_deploy.audit import audit_onnx, audit_text

    document = audit_onnx(model, shapes, providers, level, threads)
    _print(document, as_json, lambda: click.echo(audit_text(document, every_layer=layers), nl=False))
    _exit(EXIT_GATE_FAILED if document["differ"] else 0)


@cli.command(short_help="Two runs side by side.")
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
@debug_option
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Show two runs (folders or report.json files) side by side.

    Where both hold the outcomes of the same samples, the metric is compared sample by sample: worse, better, or no
    difference shown, with a 95 % interval. Exit code 0 whatever the difference: `gate --baseline` decides.
    """
    from s2d_deploy.compare import compare_reports, findings
    from s2d_deploy.report import read_report
    from s2d_deploy.tables import comparison_table

    documents = [read_report(path / "report.json" if path.is_dir() else path) for path in (first, second)]
    rows = compare_reports(*documents)

    def text() -> None:
        click.echo(comparison_table(rows, str(first), str(second)))
        for sentence in findings(rows):
            click.echo(sentence)

    _print(rows, as_json, text)


def _exit(code: int) -> None:
    if code:
        raise SystemExit(code)


def _say_errors(errors: Sequence[Exception]) -> None:
    """Each error once: several precisions of a target often share one."""
    for error in {str(e): e for e in errors}.values():
        _say_error(error)


def _say_error(error: Exception) -> None:
    """One of ours is a sentence. Any other is a bug: where its traceback is."""
    debug = _OURS.isEnabledFor(logging.DEBUG)
    if isinstance(error, S2DDeployError):
        click.echo(f"error: {error}", err=True)
    else:
        text = " ".join(str(error).split())
        click.echo(f"error: unexpected {type(error).__name__}: {text}", err=True)
        if not debug:
            click.echo(
                "This is a bug in s2d-deploy or in a library that it calls. Finished stages are kept. "
                f"Fix: report it with {_traceback_file(error)}, or run again with --debug.",
                err=True,
            )
    if debug:
        click.echo("".join(traceback.format_exception(error)), err=True, nl=False)


def _traceback_file(error: Exception) -> str:
    """Path of a new file that holds the traceback; the traceback itself where no file can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="s2d-deploy-", suffix=".log", delete=False) as file:
            file.write(text)
    except OSError:
        return f"this traceback:\n{text}"
    return file.name


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit code; every error of ours is one line on stderr, never a traceback."""
    # Before torch loads: its workers would otherwise spin between operators, which on a busy machine costs several
    # times the work itself (benchmarks/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    _OURS.setLevel(logging.WARNING)
    remember_interrupts()
    try:
        cli.main(args=arguments, prog_name="s2d-deploy", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return EXIT_USER_ERROR
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; finished stages are kept, run the same command to go on", err=True)
        return EXIT_INTERRUPTED
    except SystemExit as request:
        return request.code if isinstance(request.code, int) else int(bool(request.code))
    except Exception as error:
        _say_error(error)
        return exit_code_of(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
