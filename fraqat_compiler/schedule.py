"""Bit-width schedules: which width the weights have at which step of a fine-tune.

A schedule is pure data: stages in order, each with its share of the budget. FraQAT's own (arXiv 2510.14823, Table 4) is
8-7-6-5.5-5-4.75-4.5-4.25-4 over 1+1+1+1+1+2+2+2+14 epochs.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch.fx import GraphModule

from fraqat_compiler.errors import PipelineSyntaxError, QuantizationError, UsageError
from fraqat_compiler.layers import set_weight_bit_width
from fraqat_compiler.quant_spec import code_range

# Share of the budget at the end width; FraQAT spends 14 of 25 epochs there.
END_SHARE = 14 / 25
FRAQAT = ((8, 1), (7, 1), (6, 1), (5.5, 1), (5, 1), (4.75, 2), (4.5, 2), (4.25, 2), (4, 14))
START_WIDTH = 8.0
GEOMETRIC_STAGES = 9
CONTINUOUS_STAGES = 33


class Stage(NamedTuple):
    """One stage: a width, and its share of the budget in any unit."""

    bit_width: float
    share: float


@dataclass(frozen=True)
class BitWidthSchedule:
    """Stages in order of falling width.

    Attributes:
        name: what it is called in reports and texts.
        stages: at least one.

    Raises:
        UsageError: no stage, a rising width, a share that is not positive, or a width outside [2, 32].
    """

    name: str
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        if not self.stages:
            raise UsageError(f"schedule {self.name!r} names no stage.", "Write for example 8x1,6x1,4x2.")
        for stage in self.stages:
            _refuse_bad_stage(stage)
        for earlier, later in itertools.pairwise(self.stages):
            if later.bit_width >= earlier.bit_width:
                raise UsageError(
                    f"schedule {self.name!r} goes from {earlier.bit_width:g} to {later.bit_width:g} bits.",
                    "Widths must fall from stage to stage.",
                )

    @property
    def end(self) -> float:
        """Width of the last stage."""
        return self.stages[-1].bit_width

    def steps(self, budget: int) -> list[tuple[float, int]]:
        """Share a budget of steps out: [(bit_width, steps)], by largest remainder, at least one step a stage.

        Raises:
            UsageError: fewer steps than stages.
        """
        if budget < len(self.stages):
            raise UsageError(
                f"{budget} steps cannot be shared among the {len(self.stages)} stages of schedule {self.name!r}.",
                f"Give at least {len(self.stages)} steps, or a schedule with fewer stages (direct has one).",
            )
        total = sum(stage.share for stage in self.stages)
        exact = [budget * stage.share / total for stage in self.stages]
        counts = [math.floor(value) for value in exact]
        by_remainder = sorted(range(len(exact)), key=lambda index: (counts[index] - exact[index], -index))
        for index in by_remainder[: budget - sum(counts)]:
            counts[index] += 1
        while 0 in counts:
            counts[counts.index(max(counts))] -= 1
            counts[counts.index(0)] += 1
        return [(stage.bit_width, count) for stage, count in zip(self.stages, counts, strict=True)]

    def __str__(self) -> str:
        return ",".join(f"{_number(stage.bit_width)}x{_number(stage.share)}" for stage in self.stages)


def _number(value: float) -> str:
    """The shortest text that parses back to the same number."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _refuse_bad_stage(stage: Stage) -> None:
    try:
        code_range(stage.bit_width, signed=True)
    except QuantizationError as error:
        raise UsageError(f"a stage's {error.message}", error.remedy) from None
    if not (stage.share > 0 and math.isfinite(stage.share)):
        raise UsageError(
            f"the stage at {stage.bit_width:g} bits has a share of {stage.share:g}.", "Shares are positive."
        )


def parse_schedule(text: str, end: float = 4.0) -> BitWidthSchedule:
    """A schedule by name, or by text such as `8x1,7x1,5.5x1,4x14` (width x share; `str` of a schedule parses back).

    Args:
        text: name (see NAMED) or text.
        end: width at which the lowest weight ends; a named schedule is fitted to it.

    Raises:
        UsageError: a name that does not exist, an end that no weight can have, or a schedule that does not end there.
        PipelineSyntaxError: a text that does not parse.
    """
    name = text.strip()
    _refuse_bad_stage(Stage(end, 1))
    if name in NAMED:
        return BitWidthSchedule(name, tuple(_merged(NAMED[name](float(end)))))
    if not name or not (name[0].isdigit() or name[0] in ".-"):
        near = difflib.get_close_matches(name, NAMED, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(f"unknown schedule {name!r}.", f"{hint}Known: {', '.join(NAMED)}, or a text like 8x1,6x1,4x2.")
    schedule = BitWidthSchedule(name, tuple(_stages(name)))
    if schedule.end != end:
        raise UsageError(
            f"schedule {name!r} ends at {schedule.end:g} bits, the weights at {end:g}.",
            "Let its last stage be the width that --weights asks for.",
        )
    return schedule


def _stages(text: str) -> Iterable[Stage]:
    position = 0
    for part in text.split(","):
        width, _, share = part.strip().partition("x")
        try:
            yield Stage(float(width), float(share or 1))
        except ValueError:
            caret = " " * position + "^"
            raise PipelineSyntaxError(
                f"a stage of a schedule is WIDTHxSHARE, not {part.strip()!r}:\n  {text}\n  {caret}\n",
                "Write for example 8x1,5.5x1,4x14.",
            ) from None
        position += len(part) + 1


def _fraqat(end: float) -> list[Stage]:
    """FraQAT's stages above the end width; below 4 bits it goes on in the quarter steps that it ends with."""
    above = [Stage(width, share) for width, share in FRAQAT if width > end]
    below = [Stage(4 - 0.25 * index, 2) for index in range(math.ceil((4 - end) / 0.25))] if end < 4 else []
    stages = [stage for stage in above if stage.bit_width > 4] + below
    return [*stages, Stage(end, FRAQAT[-1][1])]


def _widths(widths: Iterable[float]) -> Callable[[float], list[Stage]]:
    """Stages of equal share at fixed widths above the end; the end has END_SHARE of the budget."""
    fixed = tuple(widths)

    def stages(end: float) -> list[Stage]:
        above = [width for width in fixed if width > end]
        share = (1 - END_SHARE) / len(above) if above else 0
        return [*(Stage(width, share) for width in above), Stage(end, END_SHARE)]

    return stages


def _geometric(end: float) -> list[Stage]:
    """Equal ratios between the grid steps of neighbours: the step goes with 1 / (2^(b-1) - 1)."""
    start = max(START_WIDTH, end)
    first, last = math.log(2 ** (start - 1) - 1), math.log(2 ** (end - 1) - 1)
    logs = [first + (last - first) * index / (GEOMETRIC_STAGES - 1) for index in range(GEOMETRIC_STAGES - 1)]
    return _widths(math.log2(math.exp(log) + 1) + 1 for log in logs)(end)


def _continuous(shape: Callable[[float], float]) -> Callable[[float], list[Stage]]:
    """Width falls from 8 along `shape` (1 at progress 0, 0 at 1), finely sampled."""

    def stages(end: float) -> list[Stage]:
        drop = max(START_WIDTH - end, 0)
        return _widths(end + drop * shape(index / CONTINUOUS_STAGES) for index in range(CONTINUOUS_STAGES))(end)

    return stages


NAMED: dict[str, Callable[[float], list[Stage]]] = {
    "fraqat": _fraqat,
    "integer": _widths((8, 7, 6, 5, 4, 3)),
    "coarse": _widths((16, 8)),
    "direct": _widths(()),
    "geometric": _geometric,
    "linear": _continuous(lambda progress: 1 - progress),
    "cosine": _continuous(lambda progress: (1 + math.cos(math.pi * progress)) / 2),
}


def _merged(stages: Iterable[Stage]) -> list[Stage]:
    """Stages with equal widths become one."""
    groups = itertools.groupby(stages, key=lambda stage: round(stage.bit_width, 6))
    return [Stage(width, sum(stage.share for stage in group)) for width, group in groups]


class BitWidthScheduler:
    """Sets the widths of a student's weights as steps go by, stepped like a `torch.optim.lr_scheduler`.

    A weight whose end width is above the stage's stays at its own end.

    Attributes:
        stages: (bit_width, steps) of each stage.
        stage_ends: the step after which each stage is over.
        last_step: optimizer steps done.

    Args:
        student: graph with fake quants.
        schedule: the stages.
        budget: steps of the whole fine-tune.
        end_widths: width at which each weight ends, by tensor name.
    """

    def __init__(
        self, student: GraphModule, schedule: BitWidthSchedule, budget: int, end_widths: dict[str, float]
    ) -> None:
        self.stages = schedule.steps(budget)
        self.stage_ends = list(itertools.accumulate(count for _, count in self.stages))
        self._student, self._end_widths = student, end_widths
        self.last_step = 0
        self._apply()

    @property
    def stage(self) -> int:
        """Index of the stage that the next step belongs to."""
        return min(bisect.bisect_right(self.stage_ends, self.last_step), len(self.stages) - 1)

    @property
    def bit_width(self) -> float:
        """Width of that stage."""
        return self.stages[self.stage][0]

    def step(self) -> None:
        """One optimizer step is done."""
        before = self.stage
        self.last_step += 1
        if self.stage != before:
            self._apply()

    def state_dict(self) -> dict[str, int]:
        return {"last_step": self.last_step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.last_step = state["last_step"]
        self._apply()

    def _apply(self) -> None:
        set_weight_bit_width(self._student, self._end_widths, self.bit_width)
