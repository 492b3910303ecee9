"""The float model that every arm starts from and is measured against."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from data import Digits, training_batches
from model import DiT
from rich.progress import track
from safetensors.torch import load_file, save_file
from study_config import ImageConfig
from torch import nn
from train import WEIGHTS as EXAMPLE_WEIGHTS
from train import Trainer

CHECKPOINT_EVERY = 250
TEACHER_SEED = 0


def build(config: ImageConfig) -> DiT:
    """The diffusion transformer of a configuration, untrained."""
    return DiT(
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        image_size=config.image_size,
        channels=config.channels,
        patch_size=config.patch_size,
    )


def load_or_train(config: ImageConfig, images: Digits, folder: Path, device: torch.device) -> nn.Module:
    """The trained teacher; training goes on from where it was cut off."""
    weights = EXAMPLE_WEIGHTS if config.dataset == "digits" else folder / "teacher.safetensors"
    model = build(config)
    if not weights.is_file():
        partial = weights.with_suffix(".partial")
        save_file(train(config, images, folder / "teacher.pt", device).state_dict(), partial)
        partial.replace(weights)
        (folder / "teacher.pt").unlink(missing_ok=True)
    model.load_state_dict(load_file(weights))
    return model.eval()


def train(config: ImageConfig, images: Digits, checkpoint: Path, device: torch.device) -> nn.Module:
    """Train with flow matching; the moving average of the weights is the teacher."""
    torch.manual_seed(TEACHER_SEED)
    trainer = Trainer(build(config).to(device), config.teacher_steps)
    parts: dict[str, Any] = {
        "model": trainer.model,
        "average": trainer.average,
        "optimizer": trainer.optimizer,
        "schedule": trainer.schedule,
    }
    done = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        done = state.pop("done")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    batches = training_batches(images, config.teacher_batch, TEACHER_SEED)
    for step, batch in enumerate(track(islice(batches, config.teacher_steps), "teacher", config.teacher_steps)):
        if step < done:
            continue
        trainer.step(type(batch)(*(tensor.to(device) for tensor in batch)))
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"done": step + 1}, checkpoint.with_suffix(".partial"))
            checkpoint.with_suffix(".partial").replace(checkpoint)
    return trainer.average.module.cpu()
