"""Options that several verbs share. Nothing heavy is imported here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def _debug(_ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted:
        logging.getLogger("s2d_deploy").setLevel(logging.DEBUG)


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_debug,
    help="Log every step, and show the traceback of an error.",
)


def recipe_options(command: F, *, required: bool = True) -> F:
    """A recipe, its run folder, and what narrows or overrides it."""
    return _with(
        command,
        click.argument("recipe", required=required),
        click.option(
            "--output", "--out", "-o", type=click.Path(path_type=Path), help="Run folder [default: runs/<recipe name>]."
        ),
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe key; repeatable."
        ),
        click.option(
            "--precision", "precisions", multiple=True, help="Only this precision, e.g. w4a4, and fp32; repeatable."
        ),
        click.option(
            "--target", "targets", multiple=True, help="Only this target: reference, ort, tvm, tensorrt; repeatable."
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), help="Threads for every runtime [default: bench.threads]."
        ),
        click.option("--update", is_flag=True, help="The folder holds another recipe: redo what changed."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("--quiet", "-q", is_flag=True, help="No progress."),
        debug_option,
    )


def report_options(command: F) -> F:
    """A recipe, or an evidence bundle in its place."""
    file = click.Path(path_type=Path, dir_okay=False)
    return _with(
        recipe_options(command, required=False),
        click.option(
            "--bundle", type=file, metavar="FILE", help="Pack the evidence, too: raw samples, digests, recipe (a zip)."
        ),
        click.option("--check", type=file, metavar="FILE", help="Recompute every claim of this bundle; runs nothing."),
        click.option("--rerun", is_flag=True, help="With --check: run its recipe, and compare codes and outcomes."),
    )


def gate_options(command: F) -> F:
    """What `gate` compares with, and where its verdicts go."""
    file = click.Path(path_type=Path, dir_okay=False)
    return _with(
        command,
        click.option(
            "--baseline", type=file, metavar="FILE", help="Compare with this committed file, sample by sample."
        ),
        click.option("--write", is_flag=True, help="Write the baseline (or update it) instead of comparing with it."),
        click.option(
            "--tolerance",
            type=float,
            help="With --write: largest drop from the baseline [default: the file's, else what the samples can show].",
        ),
        click.option(
            "--slower",
            type=float,
            metavar="FACTOR",
            help="With --write: how many times the latency ratio a later one may be, e.g. 1.1 [default: any].",
        ),
        click.option("--junit", type=file, metavar="FILE", help="Write the verdicts as JUnit XML."),
        click.option("--summary", type=file, metavar="FILE", help="Write the verdicts as Markdown."),
    )


device_option = click.option(
    "--device",
    "devices",
    multiple=True,
    metavar="DEVICE",
    help="For tvm: what to build for, 'llvm -mcpu=...' or 'cuda -arch=...', and where to run, rpc://host:port/key; "
    "repeatable.",
)


def model_options(*, samples: int) -> Callable[[F], F]:
    """A model and its data in the place of a recipe; `samples` is the default for calibration."""

    def add(command: F) -> F:
        return _with(
            command,
            click.option(
                "--data", metavar="PATH", help="RECIPE is a model (folder or hub id), and PATH its data: texts, images."
            ),
            click.option(
                "--task",
                type=click.Choice(["embedding", "image-classification"]),
                help="With --data [default: the model's].",
            ),
            click.option(
                "--samples",
                type=click.IntRange(min=1),
                default=samples,
                show_default=True,
                help="With --data: how many are looked at.",
            ),
        )

    return add


def _with(command: F, *options: Callable[[F], F]) -> F:
    for option in reversed(options):
        command = option(command)
    return command
