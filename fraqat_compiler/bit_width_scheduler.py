"""Schedulers: they set the widths of a student's weights as steps go by, like a `torch.optim.lr_scheduler`."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch.fx import GraphModule

from fraqat_compiler.layers import set_weight_bit_width
from fraqat_compiler.schedule import BitWidthSchedule, Plateau


class Stretch(NamedTuple):
    """Steps spent at one width: those after `first`, up to `last`."""

    bit_width: float
    first: int
    last: int


class BitWidthScheduler:
    """Ends each stage after its share of the budget. A weight whose end width is above the stage's stays at its own.

    Attributes:
        stages: (bit_width, steps) of each stage, as planned.
        stage: index of the stage that the next step belongs to.
        last_step: optimizer steps done.
        stretches: what was walked so far, the current one last.

    Args:
        student: graph with fake quants.
        schedule: the stages.
        budget: steps of the whole fine-tune.
        end_widths: width at which each weight ends, by tensor name.

    Raises:
        UsageError: fewer steps than stages.
    """

    def __init__(
        self, student: GraphModule, schedule: BitWidthSchedule, budget: int, end_widths: dict[str, float]
    ) -> None:
        self.stages = schedule.steps(budget)
        self._student, self._end_widths, self._budget = student, end_widths, budget
        self._ends = list(itertools.accumulate(count for _, count in self.stages))
        self.last_step = self.stage = 0
        self.stretches = [Stretch(self.bit_width, 0, 0)]
        self._apply()

    @property
    def bit_width(self) -> float:
        """Width of the stage."""
        return self.stages[self.stage][0]

    @property
    def in_last_stage(self) -> bool:
        """Whether the next step is at the end width."""
        return self.stage == len(self.stages) - 1

    @property
    def at_boundary(self) -> bool:
        """Whether the last step ended a stage, or the run."""
        return self.last_step == self._budget or (self.last_step > 0 and self.stretches[-1].first == self.last_step)

    @property
    def boundaries(self) -> set[int]:
        """Steps that ended a stage."""
        return {stretch.first for stretch in self.stretches[1:]} | ({self._budget} & {self.last_step})

    @property
    def needed(self) -> set[int]:
        """Steps whose checkpoints must stay, since the scheduler may go back there."""
        return set()

    @property
    def can_go_back(self) -> bool:
        """Whether a stage that diverges can be undone."""
        return False

    def step(self, loss: float) -> int | None:
        """One step with this loss is done.

        Returns:
            The step whose weights should come back, because the stage diverged; None to go on.
        """
        self._count()
        if self.last_step == self._ends[self.stage] < self._budget:
            self._enter(self.stage + 1)
        return None

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"last_step": self.last_step, "stage": self.stage, "stretches": [list(item) for item in self.stretches]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state and set the widths."""
        self.last_step, self.stage = state["last_step"], state["stage"]
        self.stretches = [Stretch(*item) for item in state["stretches"]]
        self._apply()

    def _count(self) -> None:
        self.last_step += 1
        self.stretches[-1] = self.stretches[-1]._replace(last=self.last_step)

    def _enter(self, stage: int) -> None:
        self.stage = stage
        self.stretches.append(Stretch(self.bit_width, self.last_step, self.last_step))
        self._apply()

    def _apply(self) -> None:
        set_weight_bit_width(self._student, self._end_widths, self.bit_width)


@dataclass
class _Watch:
    """What a plateau's rule knows of the current stage.

    Attributes:
        limit: step at which the stage is over at the latest.
        held: the stage after it diverged, so this one goes on without going back itself.
        losses: of the window that is being filled.
        first, best: means of the first window and of the best.
        stale: windows in succession that were no better.
    """

    limit: int
    held: bool = False
    losses: list[float] = field(default_factory=list)
    first: float | None = None
    best: float = math.inf
    stale: int = 0


class PlateauScheduler(BitWidthScheduler):
    """Ends each stage when its loss has stopped falling, and goes back when it diverges; see `Plateau`.

    It decides from the losses alone, and all that it knows is in its state, so a resumed run decides the same.
    """

    def __init__(
        self,
        student: GraphModule,
        schedule: BitWidthSchedule,
        budget: int,
        end_widths: dict[str, float],
        rule: Plateau,
    ) -> None:
        super().__init__(student, schedule, budget, end_widths)
        self._rule = rule
        self._attempts = 0
        self._watch = _Watch(self._limit())

    @property
    def needed(self) -> set[int]:
        return {self.stretches[-1].first} if self.can_go_back else set()

    @property
    def can_go_back(self) -> bool:
        is_time = self.last_step + self._rule.window < self._latest_end(self.stage - 1)
        return self.stage > 0 and not self._watch.held and self._attempts < self._rule.attempts and is_time

    def step(self, loss: float) -> int | None:
        self._count()
        diverged = self._judge(loss)
        if self.last_step == self._budget:
            return None
        if diverged and self.can_go_back:
            return self._go_back()
        if not self.in_last_stage and (self._watch.stale >= self._rule.patience or self.last_step >= self._watch.limit):
            self._enter(self.stage + 1)
            self._watch = _Watch(self._limit())
        return None

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"attempts": self._attempts, "watch": vars(self._watch)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._attempts, self._watch = state["attempts"], _Watch(**state["watch"])

    def _judge(self, loss: float) -> bool:
        """Take in a loss; whether the stage diverges."""
        watch = self._watch
        watch.losses.append(loss)
        if not math.isfinite(loss):
            return True
        if len(watch.losses) < self._rule.window:
            return False
        mean = sum(watch.losses) / len(watch.losses)
        watch.losses = []
        watch.first = mean if watch.first is None else watch.first
        better = mean < watch.best * (1 - self._rule.threshold)
        watch.stale = 0 if better else watch.stale + 1
        watch.best = min(watch.best, mean)
        return mean > self._rule.divergence * watch.first

    def _go_back(self) -> int:
        began = self.stretches[-1].first
        self._attempts += 1
        self._enter(self.stage - 1)
        held_until = self.last_step + self._rule.patience * self._rule.window
        self._watch = _Watch(min(max(self._limit(), held_until), self._latest_end(self.stage)), held=True)
        return began

    def _latest_end(self, stage: int) -> int:
        """Step that leaves half of its steps to the end width, and one to each stage before it."""
        return self._budget - (self.stages[-1][1] + 1) // 2 - (len(self.stages) - 2 - stage)

    def _limit(self) -> int:
        """The stage's even share of the steps that are left before those of the end width."""
        before_end = self._budget - self.stages[-1][1] - self.last_step
        stages_before_end = max(len(self.stages) - 1 - self.stage, 1)
        return self.last_step + max(before_end // stages_before_end, 1)


def scheduler_for(
    student: GraphModule, schedule: BitWidthSchedule, budget: int, end_widths: dict[str, float]
) -> BitWidthScheduler:
    """The scheduler that a schedule asks for."""
    if schedule.plateau is None:
        return BitWidthScheduler(student, schedule, budget, end_widths)
    return PlateauScheduler(student, schedule, budget, end_widths, schedule.plateau)
