"""The text `auto{mean-bits=4.5},lm_head=8` of the option `weights`: widths by sensitivity, under a budget."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from fraqat_compiler import pipeline_text
from fraqat_compiler.errors import PipelineSyntaxError, QuantizationError, UsageError
from fraqat_compiler.quant_spec import code_range
from fraqat_compiler.widths import Widths

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class AutoWidths:
    """Each layer gets one of a few widths, so that the loss is least within a budget.

    Options: `mean-bits`, the mean over all quantized weights, or `size`, of all tensors of the file (12MB, 800kB,
    1.5GiB); `widths`, those to choose from.

    Raises:
        UsageError: no budget or two, fewer than two widths, or a budget that none or all of the widths would meet.
    """

    name: ClassVar[str] = "auto"
    mean_bits: float | None = None
    size: str | None = None
    widths: tuple[float, ...] = (4.0, 8.0)

    def __post_init__(self) -> None:
        if (self.mean_bits is None) == (self.size is None):
            raise UsageError(
                f"--weights auto needs {'one budget' if self.size else 'a budget'}: mean-bits or size.",
                "Write for example --weights 'auto{mean-bits=4.5}' or 'auto{size=12MB}'.",
            )
        _refuse_bad_widths(self.widths)
        if self.mean_bits is not None and not self.lowest <= self.mean_bits <= self.highest:
            raise UsageError(
                f"mean-bits={self.mean_bits:g} lies outside the widths to choose from, {_listed(self.widths)}.",
                "Give a mean between the lowest and the highest, or other widths (widths=3,4,8).",
            )
        if self.size is not None:
            parse_size(self.size)

    @property
    def lowest(self) -> float:
        return min(self.widths)

    @property
    def highest(self) -> float:
        return max(self.widths)


def _refuse_bad_widths(widths: tuple[float, ...]) -> None:
    if len(set(widths)) < 2 or len(set(widths)) < len(widths):
        raise UsageError(
            f"--weights auto cannot choose among the widths {_listed(widths) or '(none)'}.",
            "Name two or more, each once: widths=4,8.",
        )
    for width in widths:
        try:
            code_range(width, signed=True)
        except QuantizationError as error:
            raise UsageError(f"--weights auto: {error.message}", "Name widths from 2 to 32.") from None


def _listed(widths: tuple[float, ...]) -> str:
    return ", ".join(f"{width:g}" for width in widths)


def parse_size(text: str) -> int:
    """Bytes of `12MB` (powers of 1000), `12MiB` (of 1024) or a bare number.

    Raises:
        UsageError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    count = round(float(match[1]) * _UNITS.get(match[2].lower(), 0)) if match else 0
    if not count:
        raise UsageError(f"size={text} is no size.", "Write for example size=12MB, 800kB, 1.5GiB or a number of bytes.")
    return count


@dataclass(frozen=True)
class AutoRequest:
    """A parsed text.

    Attributes:
        auto: what to choose from, and the budget.
        pins: widths by module that stay as given, `lm_head=8,embed=float`; empty where there are none.
    """

    auto: AutoWidths
    pins: str = ""

    def uniform(self, width: float) -> str:
        """Text of the option `weights` with one width for all but the pinned."""
        return ",".join([f"{width:g}", *([self.pins] if self.pins else [])])

    @property
    def all(self) -> tuple[float | None, ...]:
        """Every width that may come out."""
        return (*self.auto.widths, *Widths.parse(self.uniform(self.auto.lowest)).all)


def parse_auto(text: str) -> AutoRequest | None:
    """The request of a text that begins with `auto`; None for any other, which `Widths.parse` takes.

    Raises:
        PipelineSyntaxError: the braces do not parse.
        UsageError: nonsense in them, or a pin that is none.
    """
    if not re.match(r"\s*auto\b", text):
        return None
    end = _end_of_head(text)
    head, rest = text[:end], text[end:].strip()
    if rest and not rest.startswith(","):
        raise PipelineSyntaxError(
            f"{rest!r} follows auto in {text!r}.", "Pins are set off by commas: auto{...},lm_head=8."
        )
    item = pipeline_text.parse_one(head, "widths")
    if item.name != AutoWidths.name:
        raise UsageError(f"{item.name!r} in {text!r} is not a bit width.", "Write 4, float, or auto{mean-bits=4.5}.")
    request = AutoRequest(pipeline_text.build(AutoWidths, item.options), rest.removeprefix(",").strip())
    Widths.parse(request.uniform(request.auto.lowest))
    return request


def _end_of_head(text: str) -> int:
    """Where `auto{...}` ends: behind its braces, else before the first comma."""
    brace, comma = text.find("{"), text.find(",")
    if brace >= 0 and (comma < 0 or brace < comma):
        return text.find("}") + 1 or len(text)
    return comma if comma >= 0 else len(text)


def asked_widths(text: str) -> tuple[float | None, ...]:
    """Every width that a text of the option `weights` may give a layer; None is float.

    Raises:
        UsageError: the text does not parse.
    """
    request = parse_auto(text)
    return request.all if request else Widths.parse(text).all
