"""The subject of images: a diffusion transformer, measured by what it draws."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Digits, training_batches
from data import load as load_digits
from images import load_cifar10, load_fashion
from judge import FeatureNetwork, Judge, draw
from metrics import frechet_distance
from study_config import ImageConfig
from subject import Run, Subject
from teacher import load_or_train
from torch import Tensor, nn

from fraqat_compiler import Job

Inputs = tuple[Tensor, Tensor, Tensor]
CALIBRATION_IMAGES = 100  # as the paper's phone build
AGREEMENT_IMAGES = 128
DRAW_SEED, SWEEP_SEED = 1_000_000, 2_000_000  # of the noise that is measured on, and of the sweep's: far apart
SWEEP_SHARE = 4  # the sweep draws a fourth of the images


@dataclass(frozen=True)
class Generator(Subject):
    """A diffusion transformer.

    Attributes:
        config: the size.
        teacher: the float model.
        images: real ones to train on.
        judge: for the measured noise.
        sweep_judge: for the sweep's noise, which no arm is measured on.
    """

    config: ImageConfig
    teacher: nn.Module
    images: Digits
    judge: Judge
    sweep_judge: Judge

    def job(self) -> Job:
        return Job(
            name=f"study-{self.config.name}",
            model=lambda: copy.deepcopy(self.teacher),
            example_inputs=lambda: next(self._batches(0)),
            calibration_data=self._calibration,
            train_data=self._train,
        )

    def measure(self, run: Run) -> dict[str, float]:
        return self.judge.measure(self._draw(run, self.judge, DRAW_SEED))

    def sweep(self, run: Run) -> dict[str, float]:
        return self.sweep_judge.measure(self._draw(run, self.sweep_judge, SWEEP_SEED))

    def glance(self, run: Run) -> tuple[int, float]:
        some = self.judge.first(AGREEMENT_IMAGES)
        return len(some.teacher), some.paired_error(self._draw(run, some, DRAW_SEED))

    def float_metrics(self) -> dict[str, float]:
        real = frechet_distance(self.judge.teacher_features, self.judge.real_features)
        return {"frechet_teacher": 0.0, "paired_error": 0.0, "frechet_real": real}

    def _draw(self, run: Run, judge: Judge, first_seed: int) -> Tensor:
        with torch.no_grad():
            return draw(run, self.config, len(judge.teacher), first_seed, torch.device("cpu"))

    def _batches(self, seed: int) -> Iterator[Inputs]:
        return (batch.inputs for batch in training_batches(self.images, self.config.batch, seed))

    def _calibration(self) -> list[Inputs]:
        batches = self._batches(1)
        return [next(batches) for _ in range(-(-CALIBRATION_IMAGES // self.config.batch))]

    def _train(self) -> Iterator[Inputs]:
        """Drawn from the seeded stream of the fine-tune."""
        return self._batches(int(torch.randint(2**31, ()).item()))


def prepare(config: ImageConfig, data: Path, folder: Path) -> Generator:
    """Train or load the teacher, and draw what the arms are measured against."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train, test = (_load(config, data, part) for part in ("train", "test"))
    teacher = load_or_train(config, train, folder, device)
    features = FeatureNetwork(device)
    judges = {
        seed: _judge(teacher.to(device), config, test, count, seed, features, device)
        for seed, count in ((DRAW_SEED, config.images), (SWEEP_SEED, max(config.images // SWEEP_SHARE, 1)))
    }
    return Generator(config, teacher.cpu(), train, judges[DRAW_SEED], judges[SWEEP_SEED])


def _load(config: ImageConfig, data: Path, part: str) -> Digits:
    if config.dataset == "digits":
        train, held_out = load_digits()
        return train if part == "train" else Digits(*(torch.cat(pair) for pair in zip(train, held_out, strict=True)))
    return (load_cifar10 if config.dataset == "cifar10" else load_fashion)(data, part)


def _judge(
    teacher: nn.Module,
    config: ImageConfig,
    real: Digits,
    count: int,
    seed: int,
    features: FeatureNetwork,
    device: torch.device,
) -> Judge:
    return Judge.of(draw(teacher, config, count, seed, device), real.images[:count], features)
