"""Timing one inference on this host, for every target that runs where the compiler runs."""

from __future__ import annotations

import time
from collections.abc import Callable

WARM_UP_RUNS = 3
TIMED_RUNS = 30
TIMED_SECONDS = 3.0
FEWEST_RUNS = 5


def milliseconds_of_runs(run: Callable[[], object]) -> list[float]:
    """Milliseconds of each of 30 runs after a warm-up; of fewer, but never of less than 5, where one takes long."""
    for _ in range(WARM_UP_RUNS):
        run()
    milliseconds: list[float] = []
    while len(milliseconds) < FEWEST_RUNS or (
        len(milliseconds) < TIMED_RUNS and sum(milliseconds) < 1e3 * TIMED_SECONDS
    ):
        start = time.perf_counter()
        run()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    return milliseconds
