"""Train the digits DiT with flow matching and write `weights.safetensors`.

Run it as `python examples/digits_dit/train.py`; the committed weights come from its default settings.
"""

from __future__ import annotations

import argparse
import math
from itertools import islice
from pathlib import Path

import torch
from data import Digits, NoisedBatch, fixed_batches, load, training_batches
from model import DiT
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

WEIGHTS = Path(__file__).with_name("weights.safetensors")
BATCH_SIZE = 128
LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
EMA_DECAY = 0.998
STEPS_BETWEEN_CHECKS = 200


class Trainer:
    """A model in training and the moving average of its weights, which is what training is for."""

    def __init__(self, model: nn.Module, steps: int) -> None:
        self.model = model
        self.average = AveragedModel(self.model, avg_fn=_moving_average)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _warmup_cosine(step, steps))

    def step(self, batch: NoisedBatch) -> float:
        """Train on one batch and return its loss."""
        loss = F.mse_loss(self.model(*batch.inputs), batch.velocity)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.average.update_parameters(self.model)
        return loss.item()


def train(steps: int, seed: int) -> nn.Module:
    """Return the moving average of a model trained for `steps` batches of 128 noised digits."""
    torch.manual_seed(seed)
    trainer = Trainer(DiT(), steps)
    digits, held_out = load()
    with _progress() as progress:
        task = progress.add_task("train", total=steps, loss=math.nan, held_out=math.nan)
        for batch in islice(training_batches(digits, BATCH_SIZE, seed), steps):
            progress.update(task, advance=1, loss=trainer.step(batch))
            if progress.tasks[task].completed % STEPS_BETWEEN_CHECKS == 0:
                progress.update(task, held_out=held_out_loss(trainer.average.module, held_out))
    return trainer.average.module


@torch.no_grad()
def held_out_loss(model: nn.Module, held_out: Digits) -> float:
    """Return the mean squared velocity error on 300 held-out digits, each noised ten times."""
    tenfold = Digits(held_out.images.repeat(10, 1, 1, 1), held_out.labels.repeat(10))
    (batch,) = fixed_batches(tenfold, len(tenfold.labels), 1, seed=0)
    return F.mse_loss(model(*batch.inputs), batch.velocity).item()


def _moving_average(mean: Tensor, current: Tensor, _count: Tensor | int) -> Tensor:
    return mean.lerp(current, 1 - EMA_DECAY)


def _warmup_cosine(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _progress() -> Progress:
    figures = TextColumn("loss {task.fields[loss]:.4f}  held-out {task.fields[held_out]:.4f}")
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures, TimeRemainingColumn())


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=_positive, default=4000, help="training steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights, the digits and the noise")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="where the weights go")
    options = parser.parse_args()
    save_file(train(options.steps, options.seed).state_dict(), options.output)


if __name__ == "__main__":
    main()
