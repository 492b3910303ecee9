"""The sizes of the study: one configuration for each amount of compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class StudyConfig:
    """One size of the study.

    Attributes:
        dataset: what the teacher is trained on; that of `digits` is the example's own.
        width, depth, heads, patch_size: of the diffusion transformer.
        teacher_steps, teacher_batch: of the teacher's training.
        batch: images in a batch of the fine-tune, of calibration and of sampling.
        steps: of every arm's fine-tune.
        seeds: how many runs each trained arm has; they are 1, 2, ...
        learning_rates: every arm is tried with each, on a seed of its own, and keeps its best.
        images: drawn by each arm and by the teacher.
        sampling_steps: of Euler's method for each image.
    """

    name: str
    dataset: Literal["digits", "fashion", "cifar10"]
    width: int
    depth: int
    heads: int
    patch_size: int
    teacher_steps: int
    teacher_batch: int
    batch: int
    steps: int
    seeds: int
    learning_rates: tuple[float, ...]
    images: int
    sampling_steps: int

    @property
    def image_size(self) -> int:
        """Pixels of a side; Fashion-MNIST's 28 are padded."""
        return 8 if self.dataset == "digits" else 32

    @property
    def channels(self) -> int:
        """Of an image."""
        return 3 if self.dataset == "cifar10" else 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        return (self.channels, self.image_size, self.image_size)


CONFIGS = {
    config.name: config
    for config in (
        # Every part once, in a minute or two: its figures mean nothing.
        StudyConfig("smoke", "fashion", 32, 1, 2, 4, 20, 16, 16, 18, 2, (1e-3,), 64, 4),
        # The teacher that the example ships; within an hour on two cores.
        StudyConfig("digits", "digits", 128, 4, 4, 2, 0, 0, 40, 100, 5, (2e-5, 6e-5, 2e-4), 1000, 16),
        # To its end in two hours on two cores.
        StudyConfig("cpu", "fashion", 96, 4, 4, 4, 6000, 64, 32, 120, 5, (6e-5, 2e-4, 6e-4), 768, 16),
        # For a data-centre GPU.
        StudyConfig("gpu", "fashion", 256, 8, 4, 4, 40_000, 256, 128, 2500, 5, (1e-4, 3e-4, 1e-3), 10_000, 32),
        StudyConfig("gpu-cifar", "cifar10", 384, 12, 6, 2, 100_000, 256, 128, 2500, 5, (1e-4, 3e-4), 10_000, 50),
    )
}
