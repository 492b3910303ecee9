"""Bit-width schedules: which width the weights have at which step of a fine-tune.

A schedule is pure data: stages in order, each with its share of the budget. FraQAT's own (arXiv 2510.14823, Table 4) is
8-7-6-5.5-5-4.75-4.5-4.25-4 over 1+1+1+1+1+2+2+2+14 epochs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from fraqat_compiler import pipeline_text
from fraqat_compiler.errors import PipelineSyntaxError, QuantizationError, UsageError
from fraqat_compiler.quant_spec import code_range
from fraqat_compiler.schedule_shapes import FRAQAT, SHAPES, Shape, Stage

__all__ = ["FRAQAT", "NAMED", "BitWidthSchedule", "Plateau", "Stage", "parse_schedule"]


@dataclass(frozen=True)
class Plateau:
    """A stage ends when its loss has stopped falling; a stage that diverges is rolled back and the one before it held.

    The loss is looked at in means over `window` steps. A stage is over when `patience` of them in succession were not
    below the stage's best by the share `threshold`, or when its even share of the steps before the end is used up;
    what it leaves goes to the stages after it. The end width keeps the share of the budget that its schedule gives it.
    A stage whose mean rises above `divergence` times its first, or whose loss is NaN, is undone: the weights of the
    stage before it come back, and that stage goes on for `patience` windows before the next attempt, as long as half
    of the end's steps are left.

    Options: `of`, the schedule whose widths it passes through; `window`, in steps; `patience`, in windows; `threshold`;
    `divergence`; `attempts`, after so many of them the run fails.
    """

    name: ClassVar[str] = "plateau"
    of: str = "fraqat"
    window: int = 10
    patience: int = 3
    threshold: float = 0.02
    divergence: float = 4.0
    attempts: int = 3

    def __post_init__(self) -> None:
        limits = {
            "window": (self.window >= 1, "1 or more"),
            "patience": (self.patience >= 1, "1 or more"),
            "threshold": (0 <= self.threshold < 1, "a share from 0 to less than 1"),
            "divergence": (self.divergence > 1, "more than 1"),
            "attempts": (self.attempts >= 1, "1 or more"),
        }
        for option, (holds, limit) in limits.items():
            if not holds:
                raise UsageError(f"plateau cannot run with {option}={getattr(self, option):g}.", f"It is {limit}.")


@dataclass(frozen=True)
class BitWidthSchedule:
    """Stages in order of falling width.

    Attributes:
        name: what it is called in reports and texts.
        stages: at least one.
        plateau: how the loss ends a stage; None ends each after its share of the budget.

    Raises:
        UsageError: no stage, a rising width, a share that is not positive, or a width outside [2, 32].
    """

    name: str
    stages: tuple[Stage, ...]
    plateau: Plateau | None = None

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
        if self.plateau is not None:
            return pipeline_text.to_text(self.plateau)
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
        text: name with options (see NAMED; `geometric{stages=5 start=6}`), or stages.
        end: width at which the lowest weight ends; a named schedule is fitted to it.

    Raises:
        UsageError: a name or option that does not exist, an end that no weight can have, or a schedule that does not
            end there.
        PipelineSyntaxError: a text that does not parse.
    """
    text = text.strip()
    _refuse_bad_stage(Stage(end, 1))
    if text[:1].isalpha():
        return _named(text, float(end))
    if not text:
        raise UsageError("the schedule is empty: it names no stage.", f"Known: {', '.join(NAMED)}, or 8x1,6x1,4x2.")
    schedule = BitWidthSchedule(text, tuple(_stages(text)))
    if schedule.end != end:
        raise UsageError(
            f"schedule {text!r} ends at {schedule.end:g} bits, the weights at {end:g}.",
            "Let its last stage be the width that --weights asks for.",
        )
    return schedule


NAMED: dict[str, type[Shape] | type[Plateau]] = {**SHAPES, Plateau.name: Plateau}


def _named(text: str, end: float) -> BitWidthSchedule:
    item = pipeline_text.parse_one(text, "a schedule")
    if item.name not in NAMED:
        hint = pipeline_text.did_you_mean(item.name, NAMED).strip()
        known = f"Known: {', '.join(NAMED)}, or a text like 8x1,6x1,4x2."
        raise UsageError(f"unknown schedule {item.name!r}.", f"{hint} {known}".strip())
    shape = pipeline_text.build(NAMED[item.name], item.options)
    if isinstance(shape, Plateau):
        return BitWidthSchedule(text, parse_schedule(shape.of, end).stages, shape)
    return BitWidthSchedule(text, tuple(_merged(shape.down_to(end))))


def _merged(stages: Iterable[Stage]) -> list[Stage]:
    """Stages with equal widths become one."""
    groups = itertools.groupby(stages, key=lambda stage: round(stage.bit_width, 6))
    return [Stage(width, sum(stage.share for stage in group)) for width, group in groups]


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
