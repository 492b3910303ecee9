"""Options of a fine-tune."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from fraqat_compiler import pipeline_text
from fraqat_compiler.errors import UsageError
from fraqat_compiler.losses import Loss, Mse
from fraqat_compiler.schedule import BitWidthSchedule
from fraqat_compiler.stabilizers import Stabilizer


@dataclass(frozen=True)
class FineTuneConfig:
    """Options of the fine-tune.

    Attributes:
        schedule: widths and their shares of the budget.
        steps: optimizer steps in all.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        betas: of AdamW.
        cooldown: last share of the budget over which the rate falls linearly to zero.
        warmup: steps over which the rate rises from zero.
        grad_clip: greatest norm of all gradients together; None is no limit.
        optimizer_state: "keep" the moments of AdamW from stage to stage, or "reset" them when a stage begins.
        range_rate: learning rate of learned ranges over that of the weights.
        losses: terms of the loss.
        stabilizers: what acts in the last stage.
        checkpoint_every: steps between checkpoints; one is also written at the end of every stage.
        keep_stage_ends: keep the checkpoint at the end of every stage, not only the last ones.
        seed: of the random numbers that the data draws.

    Raises:
        UsageError: a number outside what can be trained with.
    """

    schedule: BitWidthSchedule
    steps: int
    lr: float = 2e-4
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    cooldown: float = 0.3
    warmup: int = 10
    grad_clip: float | None = 1.0
    optimizer_state: Literal["keep", "reset"] = "keep"
    range_rate: float = 1.0
    losses: tuple[Loss, ...] = (Mse(),)
    stabilizers: tuple[Stabilizer, ...] = ()
    checkpoint_every: int = 200
    keep_stage_ends: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "steps": (self.steps >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "positive"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "betas": (len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "two from 0 to less than 1"),
            "cooldown": (0 <= self.cooldown <= 1, "a share from 0 to 1"),
            "warmup": (self.warmup >= 0, "0 or more"),
            "grad_clip": (self.grad_clip is None or self.grad_clip > 0, "positive, or None"),
            "range_rate": (0 < self.range_rate < math.inf, "positive"),
            "losses": (bool(self.losses), "at least one"),
            "checkpoint_every": (self.checkpoint_every >= 1, "at least 1"),
        }
        for name, (holds, limit) in limits.items():
            if not holds:
                raise UsageError(f"the fine-tune cannot run with {name} {getattr(self, name)!r}.", f"It is {limit}.")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rising = min(1.0, (step + 1) / max(self.warmup, 1))
        left = (self.steps - step) / max(self.steps * self.cooldown, 1)
        return self.lr * rising * min(1.0, left)

    @property
    def wants_teacher(self) -> bool:
        """Whether a loss compares with the float model."""
        return any(loss.wants_teacher for loss in self.losses)

    def run_identity(self) -> dict[str, Any]:
        """What a checkpoint must share with a run to be resumed by it."""
        return {
            "schedule": str(self.schedule),
            "steps": self.steps,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "betas": list(self.betas),
            "cooldown": self.cooldown,
            "warmup": self.warmup,
            "grad_clip": self.grad_clip,
            "optimizer_state": self.optimizer_state,
            "range_rate": self.range_rate,
            "loss": pipeline_text.join(self.losses),
            "stabilizers": pipeline_text.join(self.stabilizers),
            "seed": self.seed,
        }
