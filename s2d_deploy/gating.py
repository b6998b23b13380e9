"""What `s2d-deploy gate` does behind a run: compare with a baseline, or write one; verdicts where CI reads them.

A report is judged again without running anything; a run's own report files take up the baseline's verdicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d_deploy.baseline import baseline_of, compare, read_baseline, write_baseline
from s2d_deploy.errors import ArtifactError, RecipeError, message
from s2d_deploy.files import atomic_write
from s2d_deploy.report import validate, with_gates, write_reports


@dataclass(frozen=True, slots=True)
class BaselineOptions:
    """The flags of `gate` that speak of a baseline.

    Attributes:
        path: the file; None: no baseline.
        write: write it instead of judging by it.
        tolerance: see `baseline.baseline_of`.
        slower: see `baseline.baseline_of`.
    """

    path: Path | None = None
    write: bool = False
    tolerance: float | None = None
    slower: float | None = None

    def check(self) -> None:
        """Before anything runs.

        Raises:
            RecipeError: --write, --tolerance or --slower without what they belong to.
            ArtifactError: the baseline is missing or damaged.
        """
        if self.path is None and (self.write or self.tolerance is not None or self.slower is not None):
            raise RecipeError(
                message("--write, --tolerance and --slower belong to a baseline", fix="add --baseline FILE")
            )
        if not self.write and (self.tolerance is not None or self.slower is not None):
            raise RecipeError(
                message(
                    "--tolerance and --slower are written into the baseline",
                    fix="add --write, or change the limits in the file",
                )
            )
        if self.path is not None and not self.write:
            read_baseline(self.path)
        elif self.path is not None and not self.path.parent.is_dir():
            raise RecipeError(message(f"--baseline {self.path}: no folder {self.path.parent}", fix="make it first"))


def apply_baseline(report: Mapping[str, Any], options: BaselineOptions) -> tuple[dict[str, Any], list[str]]:
    """The report with the baseline's verdicts among its gates, and what a user should be told.

    With ``options.write`` the baseline is written, and the gates stay as they are.

    Raises:
        ArtifactError: damaged, or made on other samples.
        StageError: the machine refuses to write.
    """
    if options.path is None:
        return dict(report), []
    if options.write:
        previous = _previous(options.path)
        baseline, said = baseline_of(report, previous, tolerance=options.tolerance, slower=options.slower)
        write_baseline(options.path, baseline)
        limits = ", ".join(f"{key} {entry.limit:g}" for key, entry in baseline.results.items())
        return dict(report), [*said, f"{options.path}: written; largest drops that later runs may show: {limits}"]
    found = compare(report, read_baseline(options.path), str(options.path))
    gates = [*report["gates"], *(v.to_dict() for v in found.verdicts)]
    said = []
    if found.unknown:
        said.append(f"{options.path} does not hold {', '.join(found.unknown)}: add them with --write")
    return with_gates(report, gates), said


def write_files(
    report: Mapping[str, Any], *, folder: Path | None = None, junit: Path | None = None, summary: Path | None = None
) -> list[Path]:
    """Write the report's four files into `folder`, or its JUnit XML and Markdown alone.

    Raises:
        StageError: the machine refuses.
    """
    from s2d_deploy.junit import to_junit
    from s2d_deploy.report_markdown import to_markdown

    written = write_reports(report, folder) if folder is not None else []
    typed = validate(report)
    for path, render in ((junit, to_junit), (summary, to_markdown)):
        if path is not None:
            atomic_write(path, render(typed))
            written.append(path)
    return written


def _previous(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return read_baseline(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error} Or remove it first: --write replaces baselines only.") from error
