"""The command line. Verbs are prefixes of one pipeline; each works on what the one before left in the run folder.

Nothing heavy is imported here: ``--help`` answers at once, and each verb imports what it needs.
Exit codes: 0 all gates passed, 1 a gate failed or is undecided, 2 the input is wrong, 3 a runtime or device is missing.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from s2d_deploy import __version__
from s2d_deploy.errors import EXIT_USER_ERROR, S2DDeployError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s2d_deploy.pipeline import Pipeline

F = TypeVar("F", bound=Callable[..., Any])

_EPILOG = """\b
Examples:
  s2d-deploy doctor                                what runs here, and on which rung
  s2d-deploy run digits-vit --output runs/digits   the embedded default, every stage
  s2d-deploy run my.yaml --set quantize.block_size=16
  s2d-deploy quantize my.yaml --precision w4a4     only up to the plan
  s2d-deploy compare runs/a runs/b                 two runs side by side

Exit codes: 0 all gates passed, 1 a gate failed or is undecided,
2 the input is wrong, 3 a runtime or device is missing."""


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

    A RECIPE is a YAML file, or the name of an embedded one: digits-vit, minilm.
    """


def _recipe_options(command: F) -> F:
    options = [
        click.argument("recipe"),
        click.option(
            "--output", "-o", type=click.Path(path_type=Path), help="Run folder [default: runs/<recipe name>]."
        ),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key; repeatable."
        ),
        click.option("--precision", "precisions", multiple=True, help="Only this precision; repeatable."),
        click.option("--target", "targets", multiple=True, help="Only this target; repeatable."),
        click.option(
            "--threads", type=click.IntRange(min=1), help="Threads for every runtime [default: bench.threads]."
        ),
        click.option("--update", is_flag=True, help="The folder holds another recipe: redo what changed."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("--quiet", "-q", is_flag=True, help="No progress."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@contextmanager
def _opened(
    recipe: str,
    output: Path | None,
    overrides: tuple[str, ...],
    precisions: tuple[str, ...],
    targets: tuple[str, ...],
    threads: int | None,
    update: bool,
    quiet: bool,
) -> Iterator[Pipeline]:
    """The recipe with its flags applied, in its locked run folder."""
    from s2d_deploy.recipe import load_recipe

    extra = list(overrides)
    if precisions:
        extra.append(f"quantize.precisions=[{', '.join(precisions)}]")
    if threads:
        extra.append(f"bench.threads={threads}")
    resolved = load_recipe(recipe, extra)
    if targets:
        resolved = _only_targets(resolved, targets)
    from s2d_deploy.console import Display
    from s2d_deploy.host import versions
    from s2d_deploy.pipeline import Pipeline
    from s2d_deploy.store import RunFolder

    folder = output or Path("runs") / resolved.name
    known = {k: v for k, v in versions().items() if v is not None}
    with RunFolder(folder, known) as store:
        # Flags that narrow a run (--precision, --target) do not make it another recipe.
        claimed = load_recipe(
            recipe, [o for o in extra if not o.startswith("quantize.precisions=[")] if precisions else extra
        )
        store.claim(claimed.document(), update)
        display = Display(quiet=quiet)
        display.say(f"{resolved.name} -> {folder}")
        yield Pipeline(resolved, store, display)


def _only_targets(recipe: Any, names: tuple[str, ...]) -> Any:
    from s2d_deploy.recipe import TargetSection, parse_recipe

    listed = {t.name: t for t in recipe.targets}
    document = recipe.document()
    document["targets"] = [(listed.get(n) or TargetSection(name=n)).model_dump(mode="json") for n in names]
    return parse_recipe(document, "--target")


def _print(document: Any, as_json: bool, text: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=1, default=str))
    else:
        text()


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def doctor(as_json: bool) -> None:
    """Say what runs here: CPU, GPU, runtimes, versions, and the rung that each precision gets."""
    from rich.console import Console

    from s2d_deploy.doctor import examine, render

    report = examine()
    _print(report, as_json, lambda: Console().print(render(report)))


@cli.command()
def schema() -> None:
    """Print the JSON schema of a recipe (for editors and validation)."""
    from s2d_deploy.recipe import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=1))


@cli.command()
@_recipe_options
def diagnose(as_json: bool, **options: Any) -> None:
    """Find outliers before any training: per layer PCDR, singular values, ranges, and what S2D would touch."""
    from s2d_deploy.diagnose import diagnose as examine
    from s2d_deploy.tables import diagnosis_table

    with _opened(**options) as pipeline, pipeline.display.step("diagnose") as step:
        section = pipeline.recipe.condition
        batches = pipeline.data.calibration.batches(pipeline.recipe.data.batch_size)
        layers = examine(pipeline.original.module, batches, k_max=section.k_max, tau=section.tau)
        step.note = f"{sum(layer.flagged for layer in layers)} of {len(layers)} layers flagged at tau {section.tau}"
    _print([layer.to_dict() for layer in layers], as_json, lambda: click.echo(diagnosis_table(layers)))


@cli.command()
@_recipe_options
def condition(as_json: bool, **options: Any) -> None:
    """Train (where the recipe says so) and press the outliers down with S2D; the checkpoint loads with transformers."""
    with _opened(**options) as pipeline:
        stage = pipeline.condition()
        info = {"folder": str(stage.folder), **stage.info}
    _print(info, as_json, lambda: _say_stages([stage]))


@cli.command()
@_recipe_options
def quantize(as_json: bool, **options: Any) -> None:
    """Calibrate, make the plan of each precision, and measure its simulation."""
    with _opened(**options) as pipeline:
        stages = [pipeline.quantize(p) for p in pipeline.precisions]
    _print([{"stage": s.name, "folder": str(s.folder), **s.info} for s in stages], as_json, lambda: _say_stages(stages))


@cli.command()
@_recipe_options
def export(as_json: bool, **options: Any) -> None:
    """Export the simulated model to ONNX, in the dialect of each target (nothing is compiled)."""
    _deploy(as_json, options, build=False)


@cli.command()
@_recipe_options
def build(as_json: bool, **options: Any) -> None:
    """Build each target's artifact: ONNX Runtime model, TVM library, TensorRT engine."""
    _deploy(as_json, options, build=True)


def _deploy(as_json: bool, options: dict[str, Any], *, build: bool) -> None:
    from s2d_deploy.deployment import Deployment
    from s2d_deploy.errors import UnavailableError, UnsupportedError

    stages, refused = [], []
    with _opened(**options) as pipeline:
        for section in pipeline.recipe.targets:
            deployment = Deployment(pipeline, section)
            for precision in pipeline.precisions:
                try:
                    stages.append(deployment.export(precision, build=build))
                except (UnsupportedError, UnavailableError) as error:
                    refused.append((f"{section.name}/{precision}", error))
    document = [{"stage": s.name, "folder": str(s.folder), **s.info} for s in stages]
    document += [{"stage": name, "refused": str(refusal)} for name, refusal in refused]
    _print(document, as_json, lambda: _say_stages(stages))
    for name, refusal in refused:
        click.echo(f"{name}: {refusal}", err=True)
    if refused:
        raise SystemExit(max(refusal.exit_code for _, refusal in refused))


def _say_stages(stages: list[Any]) -> None:
    for stage in stages:
        click.echo(f"{stage.name:<28} {stage.folder}")


@cli.command()
@_recipe_options
def verify(as_json: bool, **options: Any) -> None:
    """Run each artifact: accuracy, teacher-forced accumulators, codes end to end, and what it really executes."""
    _measure(as_json, options, bench=False)


@cli.command()
@_recipe_options
def bench(as_json: bool, **options: Any) -> None:
    """Measure latency, interleaved with the float baseline of the same runtime."""
    _measure(as_json, options, bench=True)


def _measure(as_json: bool, options: dict[str, Any], *, bench: bool) -> None:
    from s2d_deploy.deployment import Deployment
    from s2d_deploy.tables import results_table

    with _opened(**options) as pipeline:
        rows = [row for section in pipeline.recipe.targets for row in Deployment(pipeline, section).rows(bench=bench)]
    _print(rows, as_json, lambda: click.echo(results_table(rows)))


@cli.command()
@_recipe_options
def gate(as_json: bool, **options: Any) -> None:
    """Judge the run by the recipe's limits; exit code 0 pass, 1 fail or undecided."""
    _finish(as_json, options, report=False)


@cli.command()
@_recipe_options
def report(as_json: bool, **options: Any) -> None:
    """Write report.json, report.html, report.md and junit.xml (exit code 0 whatever the gates say)."""
    _finish(as_json, options, report=True)


@cli.command()
@_recipe_options
def run(as_json: bool, **options: Any) -> None:
    """Do everything: condition, quantize, export, build, verify, bench, gate, report. Resumes where it was stopped."""
    raise SystemExit(_finish(as_json, options, report=False))


def _finish(as_json: bool, options: dict[str, Any], *, report: bool) -> int:
    from s2d_deploy.run import run as run_everything
    from s2d_deploy.tables import gates_table, results_table

    with _opened(**options) as pipeline:
        outcome = run_everything(pipeline)

    def text() -> None:
        click.echo(results_table(outcome.report["results"]))
        click.echo(gates_table(outcome.report["gates"]))
        click.echo(f"verdict: {outcome.report['verdict']}")
        for path in outcome.files:
            click.echo(str(path))

    _print(outcome.report, as_json, text)
    if not report and outcome.exit_code:
        raise SystemExit(outcome.exit_code)
    return 0


@cli.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def compare(first: Path, second: Path, as_json: bool) -> None:
    """Show two runs (folders or report.json files) side by side."""
    from s2d_deploy.compare import compare_reports
    from s2d_deploy.report import read_report
    from s2d_deploy.tables import comparison_table

    documents = [read_report(path / "report.json" if path.is_dir() else path) for path in (first, second)]
    rows = compare_reports(*documents)
    _print(rows, as_json, lambda: click.echo(comparison_table(rows, str(first), str(second))))


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns the exit code; every error of ours is one line on stderr, never a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        cli.main(args=arguments, prog_name="s2d-deploy", standalone_mode=False)
    except S2DDeployError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return EXIT_USER_ERROR
    except click.Abort:
        click.echo("interrupted; finished stages are kept, run the same command to go on", err=True)
        return 130
    except SystemExit as request:
        return int(request.code or 0)
    return 0


if __name__ == "__main__":
    sys.exit(main())
