"""The digits DiT as a fraqat job: `fraqat compile examples/digits_dit/job.py -o out/demo`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from data import Digits, fixed_batches, load, training_batches
from metrics import Judge
from model import CLASSES, DiT
from numpy.typing import NDArray
from safetensors.torch import load_file
from sampling import Run, image_grid, sample
from torch import Tensor, nn
from torch.nn import functional as F

Inputs = tuple[Tensor, Tensor, Tensor]

WEIGHTS = Path(__file__).with_name("weights.safetensors")
BATCH_SIZE = 40
CALIBRATION_BATCHES = 16
HELD_OUT_BATCHES = 7
SAMPLED_BATCHES = 4
EVALUATION_STEPS = 10
PICTURE_STEPS = 20


def model() -> nn.Module:
    """The trained float model."""
    dit = DiT()
    dit.load_state_dict(load_file(WEIGHTS))
    return dit.eval()


def example_inputs() -> Inputs:
    """Forty noised digits, their times and their labels: the shapes that the compiled model keeps."""
    return next(train_data(seed=1))


def calibration_data() -> list[Inputs]:
    """Sixteen batches of noised digits, at the times and with the share of null labels met in training."""
    batches = train_data(seed=2)
    return [next(batches) for _ in range(CALIBRATION_BATCHES)]


def train_data(seed: int = 0) -> Iterator[Inputs]:
    """Noised digits without end, as the float model was trained on."""
    digits, _ = load()
    return (batch.inputs for batch in training_batches(digits, BATCH_SIZE, seed))


@torch.no_grad()
def evaluate(run: Run) -> dict[str, float]:
    """How good `run(x, t, y) -> velocity` is at its task, and how good the digits are that it draws.

    Returns:
        loss: mean squared velocity error on 280 held-out digits.
        accuracy: share of 160 drawn digits that a classifier of real digits takes for the class asked for.
        frechet_distance: of the same digits from the 1,497 real ones, in 16 principal components.
        paired_error: root mean square difference of their pixels, in [-1, 1], from those that the float model draws
            from the same noise.
    """
    digits, held_out = load()
    judge, drawn = Judge.fit(digits), _draw(run)
    return {
        "loss": _held_out_loss(run, held_out),
        "accuracy": judge.accuracy(drawn, _labels().repeat(SAMPLED_BATCHES)),
        "frechet_distance": judge.frechet(drawn),
        "paired_error": F.mse_loss(drawn, _draw(model())).sqrt().item(),
    }


def samples(run: Run) -> NDArray[np.uint8]:
    """Four rows of the digits 0 to 9, drawn from always the same noise: a grey picture [H, W]."""
    return image_grid(sample(run, _labels(), steps=PICTURE_STEPS), columns=CLASSES)


def _held_out_loss(run: Run, held_out: Digits) -> float:
    batches = fixed_batches(held_out, BATCH_SIZE, HELD_OUT_BATCHES, seed=3)
    return float(np.mean([F.mse_loss(run(*batch.inputs), batch.velocity).item() for batch in batches]))


def _draw(run: Run) -> Tensor:
    """Digits [160, 1, 8, 8] for the metrics, from always the same noise."""
    return torch.cat([sample(run, _labels(), steps=EVALUATION_STEPS, seed=seed) for seed in range(SAMPLED_BATCHES)])


def _labels() -> Tensor:
    """The classes of one batch: four of each."""
    return torch.arange(BATCH_SIZE) % CLASSES
