"""One run: an arm at a precision, a learning rate and a seed; measured on its ONNX file, for the sweep in torch."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from arms import ARMS, PLAIN, PRECISIONS
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
AGREEMENT_IMAGES = 128
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
        options: dict[str, Any] = {"steps": self.config.steps, "lr": key.lr} | PLAIN | dict(ARMS[key.arm].options)
        shared = {"output": output, "resume": True, "progress": RichProgress()}
        widths = {"weights": weights, "activations": activations, "seed": key.seed}
        measure = self._swept if key.sweep else self._compiled
        found = measure(shared | widths | options)
        shutil.rmtree(output)
        return asdict(key) | found | {"seconds": time.perf_counter() - start, "options": options}

    def _swept(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """A learning rate is chosen in torch, which needs no file."""
        result = fraqat_compiler.simulate(self._job(), **options)
        return {"metrics": self.sweep_judge.measure(self._draw(result.student, self.sweep_judge, SWEEP_SEED))}

    def _compiled(self, options: Mapping[str, Any]) -> dict[str, Any]:
        result = fraqat_compiler.compile(self._job(), **options)
        images = self._draw(file_run(result.output / "model.onnx"), self.judge, DRAW_SEED)
        report = result.report
        return {
            "metrics": self.judge.measure(images),
            "agreement": self._agreement(result.student, images),
            "parity": report["parity"]["onnx_unoptimized"],
            "bytes": report["onnx"]["bytes"],
            "losses": [stage["loss"] for stage in report["schedule"]],
        }

    def _agreement(self, student: nn.Module, file_images: Tensor) -> dict[str, float]:
        """Paired error of the first images, drawn by the file and by the fake-quantized graph that it was made of."""
        some = self.judge.first(AGREEMENT_IMAGES)
        drawn = self._draw(student, some, DRAW_SEED)
        file, graph = some.paired_error(file_images[: len(drawn)]), some.paired_error(drawn)
        return {"images": len(drawn), "file": file, "torch": graph}

    def _draw(self, run: Run, judge: Judge, first_seed: int) -> Tensor:
        with torch.no_grad():
            return draw(run, self.config, len(judge.teacher), first_seed, torch.device("cpu"))

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
