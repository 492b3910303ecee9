"""Progress of long work: the compiler reports to a `Progress`, which is silent; `RichProgress` draws bars."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichBars


class Progress:
    """Hears of the phases of a compile: one at a time, each with steps when their number is known."""

    def start(self, phase: str, total: int | None = None) -> None:
        """A phase begins; `total` steps are ahead, None when unknown."""

    def update(self, done: int, detail: str = "") -> None:
        """`done` steps of the phase are finished."""

    def end(self) -> None:
        """The phase is over."""

    def note(self, message: str) -> None:
        """Something that the user should know."""

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """`start` and `end` around a block."""
        self.start(name, total)
        try:
            yield
        finally:
            self.end()


class RichProgress(Progress):
    """A bar for each phase, on stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._bars: RichBars | None = None
        self._task: TaskID | None = None

    def start(self, phase: str, total: int | None = None) -> None:
        self._bars = RichBars(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%" if total else ""),
            TimeElapsedColumn(),
            *([TextColumn("left"), TimeRemainingColumn()] if total else []),
            TextColumn("{task.fields[detail]}"),
            console=self._console,
        )
        self._bars.start()
        self._task = self._bars.add_task(phase, total=total, detail="")

    def update(self, done: int, detail: str = "") -> None:
        if self._bars is None or self._task is None:
            return
        fields: dict[str, Any] = {"detail": detail} if detail else {}
        self._bars.update(self._task, completed=done, **fields)

    def end(self) -> None:
        if self._bars is None or self._task is None:
            return
        task = self._bars.tasks[self._task]
        self._bars.update(self._task, total=task.total or 1, completed=task.completed if task.total else 1)
        self._bars.stop()
        self._bars = self._task = None

    def note(self, message: str) -> None:
        self._console.print(message, highlight=False)
