"""The fine-tune loop: distillation from the float teacher while the weights' bit width decays.

Algorithm 1 of FraQAT (arXiv 2510.14823): the teacher is always the original float model, the student's latent float
weights carry over from stage to stage, only the width of their fake quant changes. The paper leaves the optimizer's
state across stages, the learning-rate schedule and the norm of the loss open; here the state is kept, the rate is
constant and then cools down linearly over the last part of the budget (as compute-optimal QAT does, arXiv 2509.22935),
and the loss is the mean squared error relative to the teacher's mean square. All of it is options (`FineTuneConfig`).

In memory the student has copies of the parameters that it trains and nothing else; whatever it does not train (buffers,
constants, frozen parameters) it may share with the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fraqat_compiler import checkpoint as checkpoints
from fraqat_compiler import fine_tune_state
from fraqat_compiler.bit_width_scheduler import scheduler_for
from fraqat_compiler.calibration import Batch, run_batch
from fraqat_compiler.checkpoint import Checkpoint
from fraqat_compiler.errors import DataError, TrainingError, UsageError, cause_of
from fraqat_compiler.features import watched
from fraqat_compiler.fine_tune_config import FineTuneConfig
from fraqat_compiler.interrupt import uninterrupted
from fraqat_compiler.layers import end_widths
from fraqat_compiler.losses import Features, Seen, Task, weighted_sum
from fraqat_compiler.optimizer import make_optimizer, set_rate
from fraqat_compiler.progress import Progress
from fraqat_compiler.stabilizing import Stabilizing
from fraqat_compiler.task import TaskObjective
from fraqat_compiler.training_data import Data, endless
from fraqat_compiler.training_log import TrainingLog

__all__ = ["FineTuneConfig", "FineTuneResult", "fine_tune"]


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
    task: TaskObjective | None = None,
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
        task: the user's own loss, for the loss `task`.

    Raises:
        TrainingError: the loss or a gradient is NaN or infinite, or the loss explodes (checkpoints stay), or there is
            nothing to train.
        DataError: the data yields nothing, or a batch that does not run through the teacher.
        CheckpointError: `resume` on a damaged checkpoint or one of another run.
        UsageError: fewer steps than stages, or a loss that asks for what is not there.
        KeyboardInterrupt: Ctrl-C; a checkpoint of the last whole step is written first.
    """
    loop = _Loop(student, teacher, data, config, folder, progress or Progress(), task)
    if resume:
        loop.restore()
    else:
        checkpoints.clear(folder)
    return loop.run()


@dataclass
class _Loop:
    student: GraphModule
    teacher: Callable[..., Any]
    data: Data
    config: FineTuneConfig
    folder: Path
    progress: Progress
    task: TaskObjective | None
    log: TrainingLog = field(default_factory=TrainingLog)
    resumed_from: int = 0

    def __post_init__(self) -> None:
        self.parameters = fine_tune_state.trained_parameters(self.student)
        if not self.parameters:
            raise TrainingError("the graph has no parameter to train.", "Leave the fine-tune out (--steps 0).")
        if self.task is None and any(isinstance(loss, Task) for loss in self.config.losses):
            raise UsageError("the loss `task` needs the job's own loss.", "Define loss(outputs, batch) in the job.")
        self.device = next(iter(self.parameters.values())).device
        self.run_identity = self.config.run_identity() | fine_tune_state.identity(self.student, self.parameters)
        self.optimizer = make_optimizer(self.parameters, self.config)
        self.scheduler = scheduler_for(self.student, self.config.schedule, self.config.steps, end_widths(self.student))
        self.stabilizing = Stabilizing(self.config, self.scheduler, self.student, self.parameters)
        self.saved = 0  # step of the newest checkpoint; before the first step there is nothing to save

    def run(self) -> FineTuneResult:
        try:
            places = [loss.at for loss in self.config.losses if isinstance(loss, Features)]
            with watched(self.student, self.teacher, places) as self.features:
                self._train()
        except KeyboardInterrupt:  # only ever between two steps
            self._save()
            raise KeyboardInterrupt(self._where_it_stopped()) from None
        self.stabilizing.finish()
        history = self.log.history(self.scheduler.stretches)
        return FineTuneResult(history, self.log.losses, self.resumed_from)

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
        loss = self._loss(step, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.stabilizing.add_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.grad_clip or math.inf)
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)) or self.log.exploded(self._stage_start, value):
            self._diverge(step, value)
            return
        set_rate(self.optimizer, self.config.rate(step))
        self.optimizer.step()
        self.stabilizing.after_step()
        self._finish_step(step, value)

    def _loss(self, step: int, batch: Batch) -> Tensor:
        inputs = self.task.inputs_of(batch) if self.task else batch
        target = self._target(step, inputs) if self.config.wants_teacher else None
        outputs = run_batch(self.student, inputs)
        seen = Seen(batch, outputs, target, self.features(), self.task.loss if self.task else None)
        return weighted_sum(self.config.losses, seen)

    def _finish_step(self, step: int, loss: float) -> None:
        self.log.losses.append(loss)
        self.progress.update(step + 1, f"{self._stage()}, loss {loss:.4g}")
        stretches = len(self.scheduler.stretches)
        back_to = self.scheduler.step(loss)
        if back_to is not None:
            self._go_back(back_to)
        if len(self.scheduler.stretches) > stretches:
            self._begin_stage()

    def _begin_stage(self) -> None:
        if self.config.optimizer_state == "reset":
            self.optimizer.state.clear()
        self.stabilizing.begin_stage()

    def _diverge(self, step: int, loss: float) -> None:
        """Go back where the schedule can, else stop."""
        if not self.scheduler.can_go_back:
            raise self._diverged(step, loss)
        self._finish_step(step, math.nan)

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
        """Write a checkpoint when it is time; none of a stage that seems to diverge, so that a good one stays."""
        is_good = not self.log.is_suspicious(self._stage_start)
        if self.scheduler.at_boundary or (is_good and done % self.config.checkpoint_every == 0):
            self._save()

    @property
    def _stage_start(self) -> int:
        return self.scheduler.stretches[-1].first

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

    # State

    def _save(self) -> None:
        done = self.scheduler.last_step
        if done == self.saved:
            return
        tensors = fine_tune_state.tensors_of(self.student, self.parameters, self.optimizer)
        tensors |= self.stabilizing.tensors()
        tensors["losses"] = torch.tensor(self.log.losses, dtype=torch.float64)
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
        self.log = TrainingLog(found.tensors["losses"].tolist())
        self.scheduler.load_state_dict(found.state["scheduler"])
        self.stabilizing.load(found.tensors)
        self.resumed_from = self.saved = found.step

    def _go_back(self, step: int) -> None:
        """Take the weights of an earlier step; the data and the budget go on."""
        found = checkpoints.at_step(self.folder, step, self.run_identity)
        fine_tune_state.load(found, self.student, self.parameters, self.optimizer)
        self.progress.note(
            f"The stage that began after step {step} diverged; its weights are back, and the stage before it goes on."
        )
