"""The exception tree. Leaves are named by what the user does next; each class fixes the exit code.

    S2DDeployError
    ├── UserError                 exit 2   the input must be changed
    │   ├── RecipeError                    a key or value of the recipe or of a flag
    │   ├── DataError                      files, labels, calibration samples
    │   ├── ModelError                     the checkpoint, a layer, a weight
    │   ├── PlanError                      a quantization plan, or a Grid that does not fit a tensor
    │   ├── ArtifactError                  a file of ours that is truncated, foreign or changed
    │   └── UnsupportedError               a target cannot express what the plan asks for
    ├── UnavailableError          exit 3   something must be installed or plugged in
    │   ├── RuntimeUnavailable             a Python package is missing
    │   └── DeviceUnavailable              the package is there, the hardware is not
    └── StageError                exit 2   the machine refused: disk full, permission, lock held
    any other exception           exit 70  a bug, here or in a library

A message names the file, key, layer or tensor, says what was expected and what was found, and ends
with what to do. `message(...)` builds it, so that every error reads alike.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_PASS = 0
EXIT_GATE_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_UNAVAILABLE = 3
EXIT_BUG = 70  # EX_SOFTWARE of sysexits.h: what none of the classes below foresaw; never mistaken for a failed gate


class S2DDeployError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: ClassVar[int] = EXIT_USER_ERROR


class UserError(S2DDeployError):
    """The input must be changed."""


class RecipeError(UserError, ValueError):
    """A key or value of the recipe, or of a flag that overrides it, is wrong.

    Also a ValueError, so that schema validation collects it and reports every offender at once.
    """


class DataError(UserError):
    """Files, labels or calibration samples are missing or wrong."""


class ModelError(UserError):
    """The checkpoint, one of its layers or one of its weights is wrong."""


class PlanError(UserError):
    """A quantization plan is inconsistent, or a Grid does not fit a tensor."""


class ArtifactError(UserError):
    """A file that should be one of ours is truncated, foreign or changed."""


class UnsupportedError(UserError):
    """A target cannot express what the plan asks for. Nothing is replaced silently."""


class UnavailableError(S2DDeployError):
    """Something must be installed or plugged in first."""

    exit_code = EXIT_UNAVAILABLE


class RuntimeUnavailable(UnavailableError):
    """A runtime's Python package is missing."""


class DeviceUnavailable(UnavailableError):
    """The runtime is installed, but the hardware it needs is not here."""


class StageError(S2DDeployError):
    """The machine refused: disk full, no permission, folder locked by another run."""


def exit_code_of(error: BaseException) -> int:
    """The exit code that an error asks for: its class's, or 70 for one that is not ours."""
    return error.exit_code if isinstance(error, S2DDeployError) else EXIT_BUG


def message(what: str, *, expected: str | None = None, found: str | None = None, fix: str | None = None) -> str:
    """One error text: what is wrong, what was expected, what was found, what to do.

    Returns:
        The sentence(s), e.g. ``"layer 'fc1': width not divisible by the block size. Expected: a
        multiple of 32. Found: 50. Fix: set quantize.block_size to a divisor."``
    """
    parts = [what.rstrip(".") + "."]
    if expected is not None:
        parts.append(f"Expected: {expected.rstrip('.')}.")
    if found is not None:
        parts.append(f"Found: {found.rstrip('.')}.")
    if fix is not None:
        parts.append(f"Fix: {fix}" if fix.endswith("?") else f"Fix: {fix.rstrip('.')}.")
    return " ".join(parts)
