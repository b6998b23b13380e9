"""Figure: W4A4 on ONNX Runtime is not slower than FP32 on a ViT of width 384 or more.

    python benchmarks/ort_w4a4.py

`latency.py` with its arguments filled in: two candidates and one limit. Other arguments of `latency.py` may follow,
such as ``--model vit-base`` or ``--runs 100``. Exit code 0 only where the whole 95 % interval of the ratio lies at or
below 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import latency
from _common import guarded

from s2d_deploy.errors import RecipeError, message

LEAST_WIDTH = 384
PRESET = (
    "--model", "vit-small",
    "--targets", "ort",
    "--precisions", "fp32,w4a4",
    "--limit", "ort-w4a4/ort-fp32=1.0",
    "--name", "ort-w4a4",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    given = sys.argv[1:] if argv is None else list(argv)
    parser = latency.arguments_parser()
    parser.prog = "python benchmarks/ort_w4a4.py"
    parser.description = str(__doc__)
    chosen = parser.parse_args([*PRESET, *given])
    return guarded(_run, chosen)


def _run(chosen: argparse.Namespace) -> int:
    from _models import shape_of

    shape = shape_of(chosen.model, chosen.width, chosen.depth, chosen.tokens)
    if shape.family != "vit" or shape.width < LEAST_WIDTH:
        raise RecipeError(
            message(
                "the figure is promised for another model",
                expected=f"a ViT of width {LEAST_WIDTH} or more",
                found=f"{shape.name}, width {shape.width}",
            )
        )
    return latency.run(chosen)


if __name__ == "__main__":
    raise SystemExit(main())
