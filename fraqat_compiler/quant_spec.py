"""How one tensor is quantized."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from fraqat_compiler.errors import QuantizationError

RangeMethod = Literal["minmax", "percentile", "mse", "sigma3"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse", "sigma3")

MIN_BIT_WIDTH = 2.0
MAX_BIT_WIDTH = 32.0
MAX_EXPORTED_BIT_WIDTH = 16  # of weights and activations: QuantizeLinear has no wider integers


def code_range(bit_width: float, *, signed: bool) -> tuple[int, int]:
    """Lowest and highest integer code at a (possibly fractional) bit width.

    Signed codes lie in [-floor(2^(b-1)), floor(2^(b-1) - 1)] and unsigned ones in [0, floor(2^b - 1)], so a
    fractional width still yields integer codes: 5.5 bits are -22..21 (FraQAT, arXiv 2510.14823, section 2.2).

    Raises:
        QuantizationError: the width is not a number in [2, 32].
    """
    if not MIN_BIT_WIDTH <= bit_width <= MAX_BIT_WIDTH:  # NaN fails this comparison too
        raise QuantizationError(
            f"bit width {bit_width} is outside [{MIN_BIT_WIDTH:g}, {MAX_BIT_WIDTH:g}].",
            "Choose a width of at least 2 bits; 32 is the widest.",
        )
    if signed:
        half = 2.0 ** (bit_width - 1)
        return -math.floor(half), math.floor(half - 1)
    return 0, math.floor(2.0**bit_width - 1)


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized. Immutable; `dataclasses.replace` makes a variant.

    Attributes:
        bit_width: real number in [2, 32]; only integer widths can be exported.
        symmetric: zero_point is 0 and the grid is Eq. 1 of FraQAT; otherwise an integer zero_point shifts Eq. 2's grid.
        signed: codes may be negative.
        axis: dimension that carries one scale per index (per channel); None is per tensor.
        group_size: elements along the last dimension that share a scale (per group); None is no grouping.
        dynamic: the range is taken anew from every input, one per token (last dimension); simulation only.
        range_method: how calibration turns what it saw into a range.
        range_max: an activation's grid spans [0, range_max] whatever calibration saw; None lets calibration say.
        centred_within: an unsigned asymmetric grid whose zero_point would lie so many codes from its middle (128 at 8
            bits), or fewer, has it in the middle. None lets it lie where the range has it.
        result_scale: a bias counts steps of its op's result, not products of a step of the input and one of the weight.
    """

    bit_width: float = 8.0
    symmetric: bool = True
    signed: bool = True
    axis: int | None = None
    group_size: int | None = None
    dynamic: bool = False
    range_method: RangeMethod = "minmax"
    range_max: float | None = None
    centred_within: int | None = None
    result_scale: bool = False

    def __post_init__(self) -> None:
        code_range(self.bit_width, signed=self.signed)
        if self.symmetric and not self.signed:
            raise QuantizationError("a symmetric grid needs signed codes.", "Set signed=True or symmetric=False.")
        if self.group_size is not None and self.group_size < 1:
            raise QuantizationError(f"group_size {self.group_size} is not a positive number of elements.")
        if self.range_method not in RANGE_METHODS:
            raise QuantizationError(
                f"unknown range method {self.range_method!r}.", f"Known: {', '.join(RANGE_METHODS)}."
            )

    @property
    def quant_min(self) -> int:
        return code_range(self.bit_width, signed=self.signed)[0]

    @property
    def quant_max(self) -> int:
        return code_range(self.bit_width, signed=self.signed)[1]

    @property
    def is_integer(self) -> bool:
        return float(self.bit_width).is_integer()

    @property
    def is_exportable(self) -> bool:
        """Whether a file can hold the codes."""
        return self.is_integer and self.bit_width <= MAX_EXPORTED_BIT_WIDTH

    @property
    def granularity(self) -> str:
        """The word the reports use: per-tensor, per-channel, per-group or per-token."""
        if self.dynamic:
            return "per-token"
        if self.group_size is not None:
            return f"per-group-{self.group_size}"
        return "per-tensor" if self.axis is None else "per-channel"

    def with_bit_width(self, bit_width: float) -> QuantSpec:
        return dataclasses.replace(self, bit_width=bit_width)


@dataclass(frozen=True)
class Unquantized:
    """A target's answer for a tensor that it wants in float, with the reason that the report shows."""

    reason: str
