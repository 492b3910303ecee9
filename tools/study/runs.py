"""One run: an arm at a precision, a learning rate and a seed; measured on its ONNX file, for the sweep in torch."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, HEADLINE
from study_config import StudyConfig
from subject import Run, Subject
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler.parity import name_arrays, onnx_runner
from fraqat_compiler.progress import RichProgress

FURTHER_RATES, RATE_RATIO = 2, 3  # beyond an end of a sweep
SWEEP_SEEDS = (0, 1001, 1002)  # no run of a table has them


@dataclass(frozen=True)
class RunKey:
    """What identifies a run."""

    precision: str
    arm: str
    lr: float | None
    seed: int
    sweep: bool = False

    @property
    def name(self) -> str:
        """Of its folder and its result."""
        rate = "" if self.lr is None else f"-lr{self.lr:g}"
        return f"{'sweep-' if self.sweep else ''}{self.precision}-{self.arm}{rate}-seed{self.seed}"


@dataclass(frozen=True)
class Bench:
    """What all runs of a configuration share.

    Attributes:
        config: the size.
        subject: what is quantized and measured.
        folder: for results; a run whose result lies there is not run again.
    """

    config: StudyConfig
    subject: Subject
    folder: Path

    def float_metrics(self) -> dict[str, Any]:
        """The float model's, measured once."""
        return _kept(self.folder / "float.json", self.subject.float_metrics)

    def result(self, key: RunKey) -> dict[str, Any]:
        """The result of a run, from its file or by running it."""
        return _kept(self.folder / "runs" / f"{key.name}.json", lambda: self._run(key))

    def best_rate(self, precision: str, arm: str) -> float:
        """The learning rate that comes nearest to the teacher; the sweep goes on beyond an end where the best lies."""
        rates = list(self.config.learning_rates)
        if len(rates) == 1:
            return rates[0]
        distances: dict[float, float] = {}
        for _ in range(1 + FURTHER_RATES):
            for rate in set(rates) - set(distances):
                distances[rate] = self._distance(precision, arm, rate)
            best = min(distances, key=lambda rate: distances[rate])
            if min(rates) < best < max(rates):
                break
            rates.append(float(f"{best / RATE_RATIO if best == min(rates) else best * RATE_RATIO:.1g}"))
        return best

    def _distance(self, precision: str, arm: str, rate: float) -> float:
        """What the sweep chooses by; arms of the headline are trained several times, since one run's is noisy."""
        is_headline = arm in HEADLINE and precision == next(iter(self.config.kind.precisions))
        repeats = self.config.sweep_repeats if is_headline else 1
        swept = [self.result(RunKey(precision, arm, rate, seed, sweep=True)) for seed in SWEEP_SEEDS[:repeats]]
        return statistics.fmean(result["metrics"][self.config.kind.swept] for result in swept)

    def _run(self, key: RunKey) -> dict[str, Any]:
        output, start, kind = self.folder / "work" / key.name, time.perf_counter(), self.config.kind
        weights, activations = kind.precisions[key.precision]
        options: dict[str, Any] = {"steps": self.config.steps, "lr": key.lr} | kind.options(ARMS[key.arm])
        shared = {"output": output, "resume": True, "progress": RichProgress()}
        widths = {"weights": weights, "activations": activations, "seed": key.seed}
        if key.sweep:
            found = self._swept(shared | widths | options)
        else:
            found = self._compiled(shared | widths | options, agreement=key.seed <= 1)  # one seed tells
        shutil.rmtree(output)
        return asdict(key) | found | {"seconds": time.perf_counter() - start, "options": options}

    def _swept(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A learning rate is chosen in torch, which needs no file."""
        return {"metrics": self.subject.sweep(fraqat_compiler.simulate(self.subject.job(), **options).student)}

    def _compiled(self, options: Mapping[str, Any], *, agreement: bool) -> dict[str, Any]:
        result = fraqat_compiler.compile(self.subject.job(), **options)
        file, report = file_run(result.output / "model.onnx"), result.report
        return {
            "metrics": self.subject.measure(file),
            **({"agreement": self._agreement(file, result.student)} if agreement else {}),
            "parity": report["parity"]["onnx_unoptimized"],
            "bytes": report["onnx"]["bytes"],
            "losses": [stage["loss"] for stage in report["schedule"]],
        }

    def _agreement(self, file: Run, student: nn.Module) -> dict[str, float]:
        """One figure, of the file and of the fake-quantized graph that it was made of."""
        count, ours = self.subject.glance(file)
        return {self.config.kind.unit: count, "file": ours, "torch": self.subject.glance(student)[1]}


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The content of a JSON file, which is made where there is none."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(make(), indent=1), encoding="utf-8")
        partial.replace(path)
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def file_run(path: Path) -> Run:
    """An ONNX file as a function of tensors."""
    runner = onnx_runner(path, optimized=True)
    names: list[str] = runner_inputs(path)

    def run(*inputs: Tensor) -> Tensor:
        (output,) = runner(name_arrays(names, inputs)).values()
        return torch.from_numpy(output)

    return run


def runner_inputs(path: Path) -> list[str]:
    """Names of a file's inputs, in order."""
    import onnx

    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]
