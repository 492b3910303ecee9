"""One run: an arm at a precision, a learning rate and a seed, compiled by the product and measured on its ONNX file."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, PRECISIONS
from data import Digits, training_batches
from judge import Judge, Run, draw
from study_config import StudyConfig
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler import Job
from fraqat_compiler.parity import name_arrays, onnx_runner
from fraqat_compiler.progress import RichProgress

Inputs = tuple[Tensor, Tensor, Tensor]
CALIBRATION_IMAGES = 100  # as the paper's phone build
DRAW_SEED, SWEEP_SEED = 1_000_000, 2_000_000  # of the noise that is measured on, and of the sweep's: far apart


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
        teacher: the float model.
        images: real ones to train on.
        judge: for the measured noise.
        sweep_judge: for the sweep's noise, which no arm is measured on.
        folder: for results; a run whose result lies there is not run again.
    """

    config: StudyConfig
    teacher: nn.Module
    images: Digits
    judge: Judge
    sweep_judge: Judge
    folder: Path

    def result(self, key: RunKey) -> dict[str, Any]:
        """The result of a run, from its file or by running it."""
        path = self.folder / "runs" / f"{key.name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(self._run(key), indent=1), encoding="utf-8")
            partial.replace(path)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _run(self, key: RunKey) -> dict[str, Any]:
        output, start = self.folder / "work" / key.name, time.perf_counter()
        weights, activations = PRECISIONS[key.precision]
        options: dict[str, Any] = {"steps": self.config.steps, "lr": key.lr} | dict(ARMS[key.arm].options)
        result = fraqat_compiler.compile(
            self._job(),
            output=output,
            resume=True,
            progress=RichProgress(),
            weights=weights,
            activations=activations,
            seed=key.seed,
            **options,
        )
        seconds = time.perf_counter() - start
        metrics = self._measure(key, file_run(result.output / "model.onnx"))
        report = result.report
        shutil.rmtree(output)
        return asdict(key) | {
            "metrics": metrics,
            "seconds": seconds,
            "parity": report["parity"]["onnx_unoptimized"],
            "bytes": report["onnx"]["bytes"],
            "losses": [stage["loss"] for stage in report["schedule"]],
            "options": options,
        }

    def _measure(self, key: RunKey, run: Run) -> dict[str, float]:
        judge, first_seed = (self.sweep_judge, SWEEP_SEED) if key.sweep else (self.judge, DRAW_SEED)
        images = draw(run, self.config, len(judge.teacher), first_seed, torch.device("cpu"))
        return judge.measure(images)

    def _job(self) -> Job:
        return Job(
            name=f"study-{self.config.name}",
            model=lambda: copy.deepcopy(self.teacher),
            example_inputs=lambda: next(self._batches(0)),
            calibration_data=self._calibration,
            train_data=self._train,
        )

    def _batches(self, seed: int) -> Iterator[Inputs]:
        return (batch.inputs for batch in training_batches(self.images, self.config.batch, seed))

    def _calibration(self) -> list[Inputs]:
        batches = self._batches(1)
        return [next(batches) for _ in range(-(-CALIBRATION_IMAGES // self.config.batch))]

    def _train(self) -> Iterator[Inputs]:
        """Drawn from the seeded stream of the fine-tune: one seed gives every arm the same batches."""
        return self._batches(int(torch.randint(2**31, ()).item()))


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
