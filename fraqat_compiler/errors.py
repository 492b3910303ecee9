"""The one exception tree of fraqat_compiler.

Every error a user can cause derives from `FraqatError`. Its text is one paragraph: what is wrong, where, and what to
do about it. The command line prints that text alone; `--debug` shows the traceback.
"""

from __future__ import annotations


def cause_of(error: BaseException) -> str:
    """The first line of an exception, without torch's advice on how to export again."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.partition(" If you meant for this dimension")[0].rstrip(":. ")


class FraqatError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong and where.
        remedy: what the user can do; appended to the text when given.
    """

    exit_status = 1

    def __init__(self, message: str, remedy: str | None = None) -> None:
        self.message = message
        self.remedy = remedy
        super().__init__(message if remedy is None else f"{message} {remedy}")


class UsageError(FraqatError):
    """The request itself is wrong: an unknown name, a bad option, an impossible combination."""

    exit_status = 2


class PipelineSyntaxError(UsageError):
    """Pipeline, target or schedule text that does not parse."""


class JobError(UsageError):
    """The job file cannot be loaded or lacks a part."""


class CaptureError(FraqatError):
    """The model cannot be captured into a graph."""


class DataError(FraqatError):
    """Example inputs, calibration or training data do not fit the model."""


class QuantizationError(FraqatError):
    """A tensor cannot be quantized as asked, or an op stayed in float under `--strict`."""


class PassError(FraqatError):
    """A pass found its input outside what it can work on."""


class VerificationError(FraqatError):
    """A graph is malformed, or not equal to what it was made from."""


class TrainingError(FraqatError):
    """The fine-tune diverged or cannot start."""


class CheckpointError(FraqatError):
    """A checkpoint is missing, damaged, or belongs to another run."""


class TargetError(FraqatError):
    """A target refused a graph, or failed to compile or run it."""


class MissingDependencyError(FraqatError):
    """An optional package that was asked for is not installed."""


class OutputError(FraqatError):
    """The output folder is in use, read-only, full, or not one of ours."""
