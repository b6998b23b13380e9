"""Target `reference`: the common ONNX file is what the reference runtime loads, so it is copied as it is.

Run as a script: ``python -m s2d_deploy.export.to_reference MODEL.onnx FOLDER``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from s2d_deploy.errors import ArtifactError, S2DDeployError, message
from s2d_deploy.qgraph import load_model, metadata
from s2d_deploy.session import Artifact, Progress

FILE = "model.onnx"


class ReferenceTarget:
    """See `s2d_deploy.session.Target`."""

    name = "reference"

    def dialect(self, model: Path, folder: Path, *, precision: str) -> Path:
        """Copy the common file (and its external data, where it has some) into `folder`.

        Raises:
            ArtifactError: no readable ONNX, or not exported for `precision`.
        """
        _check(model, precision)
        folder.mkdir(parents=True, exist_ok=True)
        return _copy(model, folder)

    def shape_options(self, batches: Sequence[int], sizes: Mapping[str, int]) -> dict[str, Any]:  # noqa: ARG002
        """Nothing: any shape is served."""
        return {}

    def build(
        self,
        dialect: Path,
        folder: Path,
        *,
        precision: str,
        options: Mapping[str, Any],  # noqa: ARG002 - the protocol's; the reference has none
        progress: Progress,
    ) -> Artifact:
        """Nothing is compiled: the artifact is the dialect file.

        Raises:
            ArtifactError: no readable ONNX, or not exported for `precision`.
        """
        _check(dialect, precision)
        folder.mkdir(parents=True, exist_ok=True)
        progress(f"reference: copying {dialect.name}")
        path = _copy(dialect, folder)
        files = {"model": path.name}
        if (data := path.with_name(f"{path.name}.data")).exists():
            files["data"] = data.name
        return Artifact(folder, self.name, precision, files)


TARGET = ReferenceTarget()


def _check(path: Path, precision: str) -> None:
    found = metadata(load_model(path)).get("s2d.precision")
    if found != precision:
        raise ArtifactError(
            message(
                f"{path}: not the common ONNX file for this precision",
                expected=f"s2d.precision {precision!r} in its metadata",
                found=repr(found) if found else "none: the file is truncated or foreign",
                fix="export it again",
            )
        )


def _copy(source: Path, folder: Path) -> Path:
    target = folder / FILE
    for suffix in ("", ".data"):
        # External data is found by the name that stands inside the model, so the name is kept.
        if (part := source.with_name(source.name + suffix)).exists():
            to = target if not suffix else folder / part.name
            if part.resolve() != to.resolve():
                shutil.copyfile(part, to)
    return target


def main(argv: Sequence[str] | None = None) -> int:
    """Command line: copy a common ONNX file into a folder that the reference runtime can open."""
    parser = argparse.ArgumentParser(prog="python -m s2d_deploy.export.to_reference", description=__doc__)
    parser.add_argument("model", type=Path, help="the common ONNX file")
    parser.add_argument("folder", type=Path, help="where the artifact goes")
    arguments = parser.parse_args(argv)
    try:
        precision = metadata(load_model(arguments.model)).get("s2d.precision", "none")
        artifact = TARGET.build(arguments.model, arguments.folder, precision=precision, options={}, progress=print)
    except S2DDeployError as error:
        print(f"error: {error}")
        return error.exit_code
    print(f"{artifact.path('model')}: {artifact.precision}, {artifact.size_bytes} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
