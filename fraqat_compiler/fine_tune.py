"""The fine-tune loop: distillation from the float teacher while the weights' bit width decays.

Algorithm 1 of FraQAT (arXiv 2510.14823): the teacher is always the original float model, the student's latent float
weights carry over from stage to stage, only the width of their fake quant changes. The paper leaves the optimizer's
state across stages, the learning-rate schedule and the norm of the loss open; here the state is kept, the rate is
constant and then cools down linearly over the last part of the budget (as compute-optimal QAT does, arXiv 2509.22935),
and the loss is the mean squared error relative to the teacher's mean square, which makes one learning rate fit outputs
of any size.

In memory the student has copies of the parameters that it trains and nothing else; whatever it does not train (buffers,
constants, frozen parameters) it may share with the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.optim import AdamW
from torch.utils import _pytree as pytree

from fraqat_compiler import checkpoint as checkpoints
from fraqat_compiler import fine_tune_state
from fraqat_compiler.bit_width_scheduler import Stretch, scheduler_for
from fraqat_compiler.calibration import Batch, run_batch
from fraqat_compiler.checkpoint import Checkpoint
from fraqat_compiler.errors import DataError, TrainingError, UsageError, cause_of
from fraqat_compiler.interrupt import uninterrupted
from fraqat_compiler.layers import end_widths
from fraqat_compiler.progress import Progress
from fraqat_compiler.schedule import BitWidthSchedule
from fraqat_compiler.training_data import Data, endless

DIVERGENCE_WINDOW, DIVERGENCE_FACTOR = 10, 10.0
FUSED_DEVICES = {"cpu", "cuda", "mps", "xpu"}  # where torch has AdamW as one kernel


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
    checkpoint_every: int = 200
    keep_stage_ends: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        limits = {
            "steps": (self.steps >= 1, "at least 1"),
            "lr": (0 < self.lr < math.inf, "positive"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "0 or more"),
            "betas": (all(0 <= beta < 1 for beta in self.betas), "from 0 to less than 1"),
            "cooldown": (0 <= self.cooldown <= 1, "a share from 0 to 1"),
            "warmup": (self.warmup >= 0, "0 or more"),
            "grad_clip": (self.grad_clip is None or self.grad_clip > 0, "positive, or None"),
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
            "seed": self.seed,
        }


@dataclass(frozen=True)
class FineTuneResult:
    """What a fine-tune leaves besides the changed student.

    Attributes:
        schedule: one entry a stage as it was walked: bits, steps, and the mean loss of its last tenth.
        losses: loss of every step.
        resumed_from: step that the run went on from; 0 for a run from the start.
    """

    schedule: list[dict[str, Any]]
    losses: list[float]
    resumed_from: int = 0


def fine_tune(
    student: GraphModule,
    teacher: Callable[..., Any],
    data: Data,
    config: FineTuneConfig,
    *,
    folder: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> FineTuneResult:
    """Train `student` in place, on the device that it is on.

    A run that was killed at any moment and resumed ends with the same bits as one that was not, given the same data,
    machine, torch and number of threads (and, on a GPU, deterministic kernels).

    Args:
        student: graph with calibrated fake quants. Its parameters with `requires_grad` are trained; it must not share
            those with `teacher`.
        teacher: the float model, called like the student.
        data: gives a fresh iterable of batches at each call; it is started again when it ends. The random numbers that
            it draws are seeded (see `training_data.endless`). A resumed run starts it anew, and draws and drops the
            batches already used.
        config: options.
        folder: for checkpoints.
        resume: go on from the newest checkpoint in `folder`, if there is one.
        progress: hears of each step.

    Raises:
        TrainingError: the loss or a gradient is NaN or infinite, or the loss explodes (checkpoints stay), or there is
            nothing to train.
        DataError: the data yields nothing, or a batch that does not run through the teacher.
        CheckpointError: `resume` on a damaged checkpoint or one of another run.
        UsageError: fewer steps than stages.
        KeyboardInterrupt: Ctrl-C; a checkpoint of the last whole step is written first.
    """
    loop = _Loop(student, teacher, data, config, folder, progress or Progress())
    if resume:
        loop.restore()
    else:
        checkpoints.clear(folder)
    return loop.run()


def output_loss(student: Any, teacher: Any) -> Tensor:
    """Mean over the float outputs of MSE(student, teacher) / mean(teacher^2); scalar.

    Raises:
        TrainingError: there is no float output.
    """
    pairs = zip(pytree.tree_leaves(student), pytree.tree_leaves(teacher), strict=True)
    losses = [
        (mine.float() - theirs.float()).square().mean() / theirs.float().square().mean().clamp_min(1e-12)
        for mine, theirs in pairs
        if isinstance(mine, Tensor) and mine.is_floating_point()
    ]
    if not losses:
        raise TrainingError(
            "the model has no float output that a student could learn from.",
            "Let it return its logits or features, or leave the fine-tune out (--steps 0).",
        )
    return torch.stack(losses).mean()


@dataclass
class _Loop:
    student: GraphModule
    teacher: Callable[..., Any]
    data: Data
    config: FineTuneConfig
    folder: Path
    progress: Progress
    losses: list[float] = field(default_factory=list)
    resumed_from: int = 0

    def __post_init__(self) -> None:
        self.parameters = fine_tune_state.trained_parameters(self.student)
        if not self.parameters:
            raise TrainingError("the graph has no parameter to train.", "Leave the fine-tune out (--steps 0).")
        self.device = next(iter(self.parameters.values())).device
        self.run_identity = self.config.run_identity() | fine_tune_state.identity(self.student, self.parameters)
        self.optimizer = AdamW(
            self.parameters.values(),
            lr=self.config.lr,
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=self.device.type in FUSED_DEVICES,
        )
        self.scheduler = scheduler_for(self.student, self.config.schedule, self.config.steps, end_widths(self.student))
        self.saved = 0  # step of the newest checkpoint; before the first step there is nothing to save

    def run(self) -> FineTuneResult:
        try:
            self._train()
        except KeyboardInterrupt:  # only ever between two steps
            self._save()
            raise KeyboardInterrupt(self._where_it_stopped()) from None
        return FineTuneResult(self._history(), self.losses, self.resumed_from)

    def _train(self) -> None:
        start = self.scheduler.last_step
        batches = endless(self.data, self.config.seed)
        for _ in range(start):
            next(batches)
        for step in range(start, self.config.steps):
            batch = next(batches)
            with uninterrupted():
                self._step(step, batch)
                self._keep(step + 1)

    def _step(self, step: int, batch: Batch) -> None:
        batch = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), batch)
        target = self._target(step, batch)
        loss = output_loss(run_batch(self.student, batch), target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip or math.inf)
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)) or self._exploded(value):
            self._diverge(step, value)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate(step)
        self.optimizer.step()
        self._finish_step(step, value)

    def _finish_step(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        self.progress.update(step + 1, f"{self._stage()}, loss {loss:.4g}")
        back_to = self.scheduler.step(loss)
        if back_to is not None:
            self._go_back(back_to)

    def _diverge(self, step: int, loss: float) -> None:
        """Go back where the schedule can, else stop."""
        if not self.scheduler.can_go_back:
            raise self._diverged(step, loss)
        self._finish_step(step, math.nan)

    def _exploded(self, loss: float) -> bool:
        """Whether the mean over DIVERGENCE_WINDOW steps is above 1 and DIVERGENCE_FACTOR times the stage's first loss.

        Adam's first steps at a wide grid may well multiply a tiny loss, so growth alone is no divergence.
        """
        losses = [*self.losses[self.scheduler.stretches[-1].first :], loss]
        if len(losses) < DIVERGENCE_WINDOW or loss < 1:
            return False
        return bool(np.mean(losses[-DIVERGENCE_WINDOW:]) > max(1.0, DIVERGENCE_FACTOR * losses[0]))

    def _target(self, step: int, batch: Batch) -> Any:
        try:
            with torch.no_grad():
                return run_batch(self.teacher, batch)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise DataError(
                f"training batch {step} does not run through the captured graph: {cause_of(error)}.",
                "Every batch needs the structure, shapes and types of example_inputs().",
            ) from error

    def _keep(self, done: int) -> None:
        if done % self.config.checkpoint_every == 0 or self.scheduler.at_boundary:
            self._save()

    # Words

    def _stage(self) -> str:
        return f"stage {self.scheduler.stage + 1}/{len(self.scheduler.stages)}, {self.scheduler.bit_width:g} bits"

    def _diverged(self, step: int, loss: float) -> TrainingError:
        def size(name: str) -> float:
            gradient = self.parameters[name].grad
            largest = 0.0 if gradient is None else float(gradient.abs().max())
            return math.inf if math.isnan(largest) else largest

        worst = max(self.parameters, key=size)
        kept = f"The checkpoint of step {self.saved} is kept." if self.saved else "There is no checkpoint yet."
        return TrainingError(
            f"the fine-tune diverged at step {step + 1}, in {self._stage()}: the loss is {loss:g}, and the largest "
            f"gradient is that of {worst} ({size(worst):g}). {kept}",
            "Lower the learning rate (--lr), or check the training data for NaN.",
        )

    def _where_it_stopped(self) -> str:
        if not self.saved:
            return "the fine-tune was stopped before its first step."
        return (
            f"the fine-tune was stopped after step {self.saved} of {self.config.steps}; "
            f"its checkpoint is kept, and --resume goes on from there."
        )

    def _history(self) -> list[dict[str, Any]]:
        stretches = [stretch for stretch in self.scheduler.stretches if stretch.last > stretch.first]
        return [
            {"bits": stretch.bit_width, "steps": stretch.last - stretch.first, "loss": self._last_loss(stretch)}
            for stretch in stretches
        ]

    def _last_loss(self, stretch: Stretch) -> float:
        """Mean of the last tenth; of a stretch that began with NaN, the loss before it."""
        losses = self.losses[stretch.first : stretch.last]
        finite = [loss for loss in losses[-max(len(losses) // 10, 1) :] if math.isfinite(loss)]
        return float(np.mean(finite or [loss for loss in self.losses[: stretch.last] if math.isfinite(loss)][-1:]))

    # State

    def _save(self) -> None:
        done = self.scheduler.last_step
        if done == self.saved:
            return
        tensors = fine_tune_state.tensors_of(self.student, self.parameters, self.optimizer)
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        state = {
            "scheduler": self.scheduler.state_dict(),
            "fitted": fine_tune_state.fitted_widths(self.student),
        }
        milestones = self.scheduler.needed | (self.scheduler.boundaries if self.config.keep_stage_ends else set())
        checkpoints.save(self.folder, Checkpoint(done, tensors, state, self.run_identity), milestones)
        self.saved = done

    def restore(self) -> None:
        """Take the newest checkpoint's state; without one the run starts from the beginning."""
        found = checkpoints.latest(self.folder, self.run_identity, self.progress.note)
        if found is None:
            return
        fine_tune_state.load(found, self.student, self.parameters, self.optimizer)
        self.losses = found.tensors["losses"].tolist()
        self.scheduler.load_state_dict(found.state["scheduler"])
        self.resumed_from = self.saved = found.step

    def _go_back(self, step: int) -> None:
        """Take the weights of an earlier step; the data and the budget go on."""
        found = checkpoints.at_step(self.folder, step, self.run_identity)
        fine_tune_state.load(found, self.student, self.parameters, self.optimizer)
        self.progress.note(
            f"The stage that began after step {step} diverged; its weights are back, and the stage before it goes on."
        )
