"""Draw digits from any velocity model, in torch or on a device, and lay them out as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from model import IMAGE_SIZE, NULL_CLASS
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A model or its compiled form: (x [B, 1, 8, 8], t [B], y [B]) -> velocity [B, 1, 8, 8]."""


@torch.no_grad()
def sample(
    run: Run,
    labels: Tensor,
    *,
    steps: int,
    guidance: float = 1.0,
    seed: int = 0,
    shape: tuple[int, ...] = (1, IMAGE_SIZE, IMAGE_SIZE),
) -> Tensor:
    """Integrate the flow from noise to images [B, *shape] with Euler's method.

    `labels` [B] are int64 classes; B must be the batch that `run` was built for. `guidance` above 1 adds
    classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598) at the price of a second run for each step.
    """
    x = torch.randn(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    for step in range(steps):
        t = torch.full((len(labels),), step / steps)
        x = x + _guided_velocity(run, x, t, labels, guidance) / steps
    return x.clamp(-1, 1)


def _guided_velocity(run: Run, x: Tensor, t: Tensor, labels: Tensor, guidance: float) -> Tensor:
    velocity = run(x, t, labels)
    if guidance == 1.0:
        return velocity
    unconditional = run(x, t, torch.full_like(labels, NULL_CLASS))
    return unconditional + guidance * (velocity - unconditional)


def image_grid(images: Tensor, columns: int, zoom: int = 6, gap: int = 1) -> NDArray[np.uint8]:
    """Lay images [N, 1, 8, 8] in [-1, 1] out in rows of `columns`, light on dark, as one uint8 picture [H, W].

    Each pixel becomes `zoom` x `zoom` pixels; images stand `gap` image pixels apart. N must be a multiple of `columns`.
    """
    padded = torch.nn.functional.pad(images[:, 0], (0, gap, 0, gap), value=-1.0)
    rows = padded.view(-1, columns, *padded.shape[1:]).permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    framed = torch.nn.functional.pad(rows, (gap, 0, gap, 0), value=-1.0)
    pixels = ((framed + 1) * 127.5).round().to(torch.uint8).numpy()
    return pixels.repeat(zoom, axis=0).repeat(zoom, axis=1)


def save_png(picture: NDArray[np.uint8], path: Path) -> None:
    """Write a uint8 picture [H, W] as a greyscale PNG."""
    Image.fromarray(picture).save(path)
