"""How a command of the command line ends: one answer on stdout, errors as a paragraph on stderr, an exit status."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import typer

from fraqat_compiler.errors import FraqatError, UsageError

if TYPE_CHECKING:
    from rich.console import Console

FAILED, INTERRUPTED = 1, 130
PIPE_WIDTH = 140  # columns of tables that go into a file or another program


@dataclass(frozen=True)
class Answer:
    """What a command found.

    Attributes:
        data: what `--json` prints.
        show: prints it for a reader.
        holds: False ends the command with status 1.
    """

    data: Any
    show: Callable[[Console], None]
    holds: bool = True


def answering(command: Callable[..., Answer]) -> Callable[..., None]:
    """A command that prints its answer, and tells its errors; it needs the parameters `as_json` and `debug`."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with _stdout_for_answers(), _warnings_shown(kwargs["debug"]):
                answer = command(*args, **kwargs)
            _print(answer, kwargs["as_json"])
        except typer.Exit:
            raise
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # who read stdout has seen enough
            raise typer.Exit(FAILED) from None
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(_tell(error, kwargs["debug"])) from None
        raise typer.Exit(0 if answer.holds else FAILED)

    return run


@contextmanager
def _stdout_for_answers() -> Iterator[None]:
    """Send to stderr what a job, a library or a child process prints: stdout holds the answer alone."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):  # where sys.stdout is more than the descriptor
            yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)


@contextmanager
def _warnings_shown(shown: bool) -> Iterator[None]:
    """Warnings of the libraries concern their callers, not the user."""
    with warnings.catch_warnings():
        if not shown:
            warnings.simplefilter("ignore")
        yield


def _print(answer: Answer, as_json: bool) -> None:
    from rich.console import Console

    if as_json:
        from fraqat_compiler.report import to_json

        print(to_json(answer.data), flush=True)
        return
    answer.show(Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH))
    sys.stdout.flush()


def _tell(error: BaseException, debug: bool) -> int:
    """Print an error; returns the exit status that it means."""
    if debug:
        traceback.print_exception(error)
    elif isinstance(error, KeyboardInterrupt):
        _say("interrupted.", error)
    elif isinstance(error, UsageError):
        _say(f"error: {error}")  # which pass of which pipeline noticed it is no help to correct a flag
    elif isinstance(error, FraqatError):
        _say(f"error: {error}", error)
    else:
        _say(
            f"internal error: {type(error).__name__}: {error}. Run again with --debug and report the traceback.", error
        )
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return error.exit_status if isinstance(error, FraqatError) else FAILED


def _say(text: str, noted: BaseException | None = None) -> None:
    print("\n  ".join([text, *getattr(noted, "__notes__", [])]), file=sys.stderr)
