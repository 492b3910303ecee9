"""What a study quantizes: a float model, the data that it is tuned on, and how any model like it is measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from fraqat_compiler import Job

Run = Callable[..., Any]


class MissingDataError(Exception):
    """Data is not where it was looked for; its text says how to get it."""


class Subject(ABC):
    """A float model and its measures. A run is anything that is called like the model and answers with its output."""

    @abstractmethod
    def job(self) -> Job:
        """For `fraqat_compiler.compile`; one seed gives every arm the same batches."""

    @abstractmethod
    def measure(self, run: Run) -> dict[str, float]:
        """The metrics of the table."""

    @abstractmethod
    def sweep(self, run: Run) -> dict[str, float]:
        """The metric that learning rates are chosen by at least, on what no table is measured on."""

    @abstractmethod
    def glance(self, run: Run) -> tuple[int, float]:
        """A figure of few samples, in which a file and the graph that it was made of should agree, and their number."""

    @abstractmethod
    def float_metrics(self) -> dict[str, float]:
        """The float model's own metrics."""
