"""Instruments: what watches a pipeline run, without any pass knowing."""

from __future__ import annotations

import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fraqat_compiler.errors import VerificationError
from fraqat_compiler.ir_text import listing
from fraqat_compiler.ir_verify import verify
from fraqat_compiler.pass_base import Pass, PassResult
from fraqat_compiler.pipeline_text import to_text


class Instrument:
    """Base class. The pass manager calls `before_pass` of all in their order and `after_pass` in the reverse one."""

    def before_pass(self, step: Pass, model: Any) -> None:
        """`model` is the graph that goes in."""

    def after_pass(self, step: Pass, model: Any, result: PassResult) -> None:
        """`model` is the object that went in, which the pass may have changed; the graph is `result.model`."""


def stderr_console() -> Console:
    """Where instruments write: results alone go to stdout."""
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


class Timing(Instrument):
    """Wall time of each pass (`--time-passes`). List it last: then nothing but the pass lies between."""

    def __init__(self) -> None:
        self.seconds: list[tuple[str, float]] = []
        self._start = 0.0

    def before_pass(self, step: Pass, model: Any) -> None:
        self._start = time.perf_counter()

    def after_pass(self, step: Pass, model: Any, result: PassResult) -> None:
        self.seconds.append((step.name, time.perf_counter() - self._start))

    def table(self) -> Table:
        """The passes in the order in which they ran, with their share of the total."""
        total = sum(seconds for _, seconds in self.seconds)
        table = Table("pass", "seconds", "share", title="time of the passes", show_footer=True)
        for name, seconds in self.seconds:
            table.add_row(name, f"{seconds:.3f}", f"{seconds / total:.0%}")
        table.columns[0].footer, table.columns[1].footer = "total", f"{total:.3f}"
        return table


class IRDump(Instrument):
    """Prints the graph around chosen passes, or writes it after every pass.

    Args:
        before: names of passes before which the graph is printed (`--print-ir-before`).
        after: the same, after (`--print-ir-after`).
        after_all: print it after every pass (`--print-ir-after-all`).
        after_change: print it after every pass that changed something (`--print-ir-after-change`).
        folder: write `00-input.txt`, `01-<pass>.txt` ... there (`--dump-ir`).
        console: where to print; stderr unless given.
    """

    def __init__(
        self,
        before: Collection[str] = (),
        after: Collection[str] = (),
        *,
        after_all: bool = False,
        after_change: bool = False,
        folder: Path | None = None,
        console: Console | None = None,
    ) -> None:
        self.before = before
        self.after = after
        self.after_all = after_all
        self.after_change = after_change
        self.folder = folder
        self.console = console or stderr_console()
        self._written = 0

    def before_pass(self, step: Pass, model: Any) -> None:
        if step.name in self.before:
            self._print(f"IR before {to_text(step)}", model)
        if self.folder is not None and not self._written:
            self._write("input", model)

    def after_pass(self, step: Pass, model: Any, result: PassResult) -> None:
        if self.after_all or step.name in self.after or (self.after_change and result.modified):
            self._print(f"IR after {to_text(step)}", result.model)
        if self.folder is not None:
            self._write(step.name, result.model)

    def _print(self, title: str, model: Any) -> None:
        self.console.print(f"// ----- {title} -----\n{listing(model)}")

    def _write(self, name: str, model: Any) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self._written:02}-{name}.txt").write_text(listing(model), encoding="utf-8")
        self._written += 1


class Verification(Instrument):
    """Verifies the graph before the first pass and after every pass, and that `modified` was the truth."""

    def __init__(self) -> None:
        self._before = ""
        self._started = False

    def before_pass(self, step: Pass, model: Any) -> None:
        if not self._started:
            verify(model)
        self._started = True
        self._before = listing(model)

    def after_pass(self, step: Pass, model: Any, result: PassResult) -> None:
        verify(result.model)
        if not result.modified and listing(result.model) != self._before:
            raise VerificationError(f'"{step.name}" changed the graph but says that it did not.')


class Progress(Instrument):
    """One line on stderr for each pass as it starts, and one for what it changed."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or stderr_console()

    def before_pass(self, step: Pass, model: Any) -> None:
        self.console.print(f"pass {to_text(step)}")

    def after_pass(self, step: Pass, model: Any, result: PassResult) -> None:
        if result.changes:
            self.console.print(f"  {len(result.changes)} changes", style="dim")
