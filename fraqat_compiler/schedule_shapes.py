"""The named schedules: which widths they pass through, and what share of the budget each has.

Each is a frozen dataclass whose fields are its options in text (`geometric{stages=5 start=6}`), and whose
`down_to(end)` gives the stages down to a width. A start below the end leaves the end alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from fraqat_compiler.errors import UsageError

# Share of the budget at the end width; FraQAT spends 14 of 25 epochs there.
END_SHARE = 14 / 25
FRAQAT = ((8, 1), (7, 1), (6, 1), (5.5, 1), (5, 1), (4.75, 2), (4.5, 2), (4.25, 2), (4, 14))


class Stage(NamedTuple):
    """One stage: a width, and its share of the budget in any unit."""

    bit_width: float
    share: float


@dataclass(frozen=True)
class Fraqat:
    """8-7-6-5.5-5-4.75-4.5-4.25-4 over 1+1+1+1+1+2+2+2+14 of 25 parts: FraQAT (arXiv 2510.14823), Table 4.

    Another end keeps the stages above it; below 4 bits it goes on in the quarter steps that the paper ends with.
    """

    name: ClassVar[str] = "fraqat"

    def down_to(self, end: float) -> list[Stage]:
        """Stages from 8 bits to `end`."""
        above = [Stage(width, share) for width, share in FRAQAT if width > max(end, 4)]
        below = [Stage(4 - 0.25 * index, 2) for index in range(math.ceil((4 - end) / 0.25))] if end < 4 else []
        return [*above, *below, Stage(end, FRAQAT[-1][1])]


@dataclass(frozen=True)
class Direct:
    """The end width from the first step: plain QAT, which FraQAT's paper calls vQAT."""

    name: ClassVar[str] = "direct"

    def down_to(self, end: float) -> list[Stage]:
        """The one stage."""
        return [Stage(end, 1)]


@dataclass(frozen=True)
class Short:
    """The last bit alone, in halves: end + 1, end + 0.5, end over 1 + 1 + 8 of 10 parts (5-4.5-4 for 4 bits)."""

    name: ClassVar[str] = "short"

    def down_to(self, end: float) -> list[Stage]:
        """The three stages; none is above 8 bits."""
        above = [Stage(width, 1) for width in (end + 1, end + 0.5) if width <= FRAQAT[0][0]]
        return [*above, Stage(end, 8)]


@dataclass(frozen=True)
class Shared:
    """Base of the schedules whose end has a share of the budget and whose other stages share the rest evenly.

    Attributes:
        end_share: of the budget, at the end width.
    """

    name: ClassVar[str]
    end_share: float = END_SHARE

    def __post_init__(self) -> None:
        if not 0 < self.end_share < 1:
            raise UsageError(f"{self.name} cannot give its end {self.end_share:g} of the budget.", "0 < end-share < 1.")

    def down_to(self, end: float) -> list[Stage]:
        """Stages to `end`."""
        above = [width for width in self.widths(end) if width > end]
        share = (1 - self.end_share) / len(above) if above else 0
        return [*(Stage(width, share) for width in above), Stage(end, self.end_share)]

    def widths(self, end: float) -> Iterable[float]:
        """Falling widths before the end; those that are not above it are left out."""
        raise NotImplementedError


@dataclass(frozen=True)
class Integer(Shared):
    """Every whole width from `start` down: 8-7-6-5-4. Options: `start`; `end-share`, of the budget at the end width."""

    name: ClassVar[str] = "integer"
    start: int = 8

    def widths(self, end: float) -> Iterable[float]:
        return range(self.start, math.floor(end), -1)


@dataclass(frozen=True)
class Coarse(Shared):
    """16-8-4, few and wide steps. Option: `end-share`, of the budget at the end width."""

    name: ClassVar[str] = "coarse"

    def widths(self, end: float) -> Iterable[float]:
        return (16, 8)


@dataclass(frozen=True)
class Curve(Shared):
    """Base of the schedules that follow a curve.

    Attributes:
        stages: how many, the end counted.
        start: width of the first.
        end: width of the last; None is the width that --weights asks for.
    """

    stages: int = 34
    start: float = 8.0
    end: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages < 1:
            raise UsageError(f"schedule {self.name!r} names no stage: stages={self.stages}.", "Give it at least one.")

    def down_to(self, end: float) -> list[Stage]:
        if self.end is not None and self.end != end:
            raise UsageError(
                f"schedule {self.name!r} ends at {self.end:g} bits, the weights at {end:g}.",
                "Leave its end out, or let it be the width that --weights asks for.",
            )
        if self.stages == 1 and self.start > end:
            raise UsageError(f"schedule {self.name!r} cannot get from {self.start:g} to {end:g} bits in one stage.")
        return super().down_to(end)

    def widths(self, end: float) -> Iterable[float]:
        steps = self.stages - 1
        return (self.at(index / steps, end) for index in range(steps))

    def at(self, progress: float, end: float) -> float:
        """Width at a progress from 0 (start) to 1 (end)."""
        raise NotImplementedError


@dataclass(frozen=True)
class Geometric(Curve):
    """Stages whose grid steps grow by one ratio; a grid's step goes with 1 / (2^(b-1) - 1), Eq. 1 of FraQAT.

    Options: `stages`, how many, the end counted; `start` and `end`, in bits; `end-share`, of the budget at the end
    width. As in `geometric{stages=5 start=6}`.
    """

    name: ClassVar[str] = "geometric"
    stages: int = 9

    def at(self, progress: float, end: float) -> float:
        first, last = (math.log(2 ** (width - 1) - 1) for width in (self.start, end))
        return math.log2(math.exp(first + (last - first) * progress) + 1) + 1


@dataclass(frozen=True)
class Linear(Curve):
    """Continuous bits along a line, finely sampled. Options as those of `geometric`."""

    name: ClassVar[str] = "linear"

    def at(self, progress: float, end: float) -> float:
        return end + (self.start - end) * (1 - progress)


@dataclass(frozen=True)
class Cosine(Curve):
    """Continuous bits along half a cosine, finely sampled. Options as those of `geometric`."""

    name: ClassVar[str] = "cosine"

    def at(self, progress: float, end: float) -> float:
        return end + (self.start - end) * (1 + math.cos(math.pi * progress)) / 2


Shape = Fraqat | Direct | Short | Shared
_ALL: tuple[type[Shape], ...] = (Fraqat, Integer, Coarse, Direct, Short, Geometric, Linear, Cosine)
SHAPES = {shape.name: shape for shape in _ALL}
