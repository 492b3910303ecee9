"""scikit-learn's real handwritten digits, noised for flow matching (Lipman et al. 2023, arXiv 2210.02747).

Time runs from noise at t = 0 to the image at t = 1 along a straight line:
`x_t = (1 - t) * noise + t * image`, whose velocity `dx/dt = image - noise` is what the model learns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from model import NULL_CLASS
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

HELD_OUT = 300


class Digits(NamedTuple):
    """Images [N, 1, 8, 8] in [-1, 1] and their int64 labels [N]."""

    images: Tensor
    labels: Tensor


class NoisedBatch(NamedTuple):
    """One training example per row: the model's inputs `x`, `t`, `y` and the velocity it should predict."""

    x: Tensor
    t: Tensor
    y: Tensor
    velocity: Tensor

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """The model's positional inputs."""
        return self.x, self.t, self.y


def load() -> tuple[Digits, Digits]:
    """Return the 1,497 digits to train on and the 300 held out, the classes evenly split."""
    bunch = load_digits()
    images = torch.tensor(bunch.images / 8.0 - 1.0, dtype=torch.float32).unsqueeze(1)
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    train, held_out = train_test_split(range(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0)
    return Digits(images[train], labels[train]), Digits(images[held_out], labels[held_out])


def noise_digits(digits: Digits, generator: torch.Generator) -> NoisedBatch:
    """Noise each digit with its own Gaussian noise at its own time, uniform in [0, 1]."""
    noise = torch.randn(digits.images.shape, generator=generator)
    t = torch.rand(len(digits.labels), generator=generator)
    weight = t[:, None, None, None]
    return NoisedBatch((1 - weight) * noise + weight * digits.images, t, digits.labels, digits.images - noise)


def training_batches(digits: Digits, batch_size: int, seed: int, class_dropout: float = 0.1) -> Iterator[NoisedBatch]:
    """Yield noised batches without end: digits drawn with replacement, some labels replaced by the null class."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(len(digits.labels), (batch_size,), generator=generator)
        dropped = torch.rand(batch_size, generator=generator) < class_dropout
        labels = digits.labels[rows].masked_fill(dropped, NULL_CLASS)
        yield noise_digits(Digits(digits.images[rows], labels), generator)


def fixed_batches(digits: Digits, batch_size: int, count: int, seed: int) -> list[NoisedBatch]:
    """Return the first `count` full batches of `digits`, in order, noised; the same on every call."""
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, count * batch_size, batch_size)
    rows = [slice(start, start + batch_size) for start in starts]
    return [noise_digits(Digits(digits.images[row], digits.labels[row]), generator) for row in rows]
