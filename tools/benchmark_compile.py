"""Time each phase of a compile and take its peak memory.

    make bench-compile JOB=examples/digits_dit/job.py TARGET='htp{soc=sm8750}'
    python tools/benchmark_compile.py examples/digits_dit/job.py --target onnxruntime --steps 20 [--json]

Memory is the resident memory of this process and all its children (a target may compile in one), added up every 20 ms;
pages that several of them share count for each.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

import fraqat_compiler
from fraqat_compiler.errors import FraqatError
from fraqat_compiler.progress import Progress

SAMPLE_SECONDS = 0.02
MIB = 2**20


@dataclass
class Phase:
    """What one phase of the compile took; memory in bytes."""

    name: str
    seconds: float
    memory_before: int
    peak_memory: int


class PhaseMeter(Progress):
    """Hears of the phases, measures each and, unless told not to, says on stderr that it begins."""

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose
        self.phases: list[Phase] = []
        self._process = psutil.Process()
        self._running = threading.Event()

    @contextmanager
    def phase(self, name: str, total: int | None = None) -> Iterator[None]:
        """Measure around a block; sampling sees what native code allocates too."""
        before = self._memory()
        measured = Phase(name, 0.0, before, before)
        if self.verbose:
            print(f"{name} ...", file=sys.stderr)
        self._running.set()
        sampler = threading.Thread(target=self._sample, args=(measured,), daemon=True)
        sampler.start()
        start = time.perf_counter()
        try:
            yield
        finally:
            measured.seconds = time.perf_counter() - start
            self._running.clear()
            sampler.join()
            self.phases.append(measured)

    def _sample(self, measured: Phase) -> None:
        while self._running.is_set():
            measured.peak_memory = max(measured.peak_memory, self._memory())
            time.sleep(SAMPLE_SECONDS)
        measured.peak_memory = max(measured.peak_memory, self._memory())

    def _memory(self) -> int:
        """Resident bytes of this process and its children; one that ends meanwhile counts nothing."""
        total = 0
        for process in [self._process, *self._process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        return total


def main() -> int:
    """Compile, then print the table to stdout; the exit status is that of `fraqat compile`."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    meter = PhaseMeter()
    settings = {name: value for name, value in vars(options).items() if name in SETTINGS and value is not None}
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = fraqat_compiler.compile(options.job, output=Path(folder) / "out", progress=meter, **settings)
        except FraqatError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_status
    title = f"{options.job}, {options.target}, {options.threads} threads of {os.cpu_count()} cores"
    if options.json:
        print(json.dumps({"setting": title, "phases": [asdict(phase) for phase in meter.phases]}, indent=2))
    else:
        print_table(meter.phases, result.report, title)
    return 0


SETTINGS = ("target", "weights", "activations", "steps", "seed")


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", help="job file, as `fraqat compile` takes it")
    parser.add_argument("--target", default="htp{soc=sm8750}", help="target text (default: %(default)s)")
    parser.add_argument("--weights", help="as of fraqat compile")
    parser.add_argument("--activations", help="as of fraqat compile")
    parser.add_argument("--steps", type=int, help="as of fraqat compile")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    return parser.parse_args()


def print_table(phases: list[Phase], report: dict[str, Any], title: str) -> None:
    """Print the phases for people."""
    table = Table("phase", "seconds", "peak MiB", "grew by MiB", title=title)
    for phase in phases:
        growth = phase.peak_memory - phase.memory_before
        table.add_row(phase.name, f"{phase.seconds:.2f}", f"{phase.peak_memory / MIB:.0f}", f"{growth / MIB:.0f}")
    table.add_section()
    peak = max(phase.peak_memory for phase in phases)
    table.add_row("all", f"{sum(phase.seconds for phase in phases):.2f}", f"{peak / MIB:.0f}", "")
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    parameters, size = report["model"]["parameters"], report["onnx"]["bytes"]
    print(f"{parameters / 1e6:.2f} M parameters, ONNX file {size / MIB:.2f} MiB, {len(report['layers'])} layers")


if __name__ == "__main__":
    sys.exit(main())
