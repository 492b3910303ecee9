"""The losses of a fine-tune: what they say about divergence, and the history that the report shows."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fraqat_compiler.bit_width_scheduler import Stretch

WINDOW, FACTOR = 10, 10.0


@dataclass
class TrainingLog:
    """Losses step by step.

    A loss is suspicious when it is above 1 and FACTOR times its stage's first: all losses here are at most of the order
    of 1 for a student that has learned nothing, and Adam's first steps at a wide grid may well multiply a tiny loss.

    Attributes:
        losses: of every step; NaN where a stage was undone.
    """

    losses: list[float] = field(default_factory=list)

    def exploded(self, stage_start: int, loss: float) -> bool:
        """Whether the mean over the stage's last WINDOW steps, with `loss`, is suspicious."""
        losses = [*self.losses[stage_start:], loss]
        if len(losses) < WINDOW or loss < 1:
            return False
        return _is_suspicious(float(np.mean(losses[-WINDOW:])), losses[0])

    def is_suspicious(self, stage_start: int) -> bool:
        """Whether the last loss of the stage is."""
        losses = self.losses[stage_start:]
        return bool(losses) and _is_suspicious(losses[-1], losses[0])

    def history(self, stretches: Iterable[Stretch]) -> list[dict[str, Any]]:
        """One entry a stage: bits, steps, and the mean loss of its last tenth."""
        return [
            {"bits": stretch.bit_width, "steps": stretch.last - stretch.first, "loss": self._last_loss(stretch)}
            for stretch in stretches
            if stretch.last > stretch.first
        ]

    def _last_loss(self, stretch: Stretch) -> float:
        """Of a stretch that began with NaN it is the loss before it."""
        losses = self.losses[stretch.first : stretch.last]
        finite = [loss for loss in losses[-max(len(losses) // 10, 1) :] if math.isfinite(loss)]
        return float(np.mean(finite or [loss for loss in self.losses[: stretch.last] if math.isfinite(loss)][-1:]))


def _is_suspicious(loss: float, first: float) -> bool:
    return loss > max(1.0, FACTOR * first)
