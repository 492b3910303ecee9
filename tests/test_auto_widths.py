"""The text `auto{...}` of the option `weights`: what it means, and which nonsense is refused."""

from __future__ import annotations

import pytest

from fraqat_compiler.auto_widths import asked_widths, parse_auto, parse_size
from fraqat_compiler.compile_options import make_options
from fraqat_compiler.errors import UsageError
from fraqat_compiler.pipeline_text import to_text


def test_budget_widths_and_pins() -> None:
    request = parse_auto("auto{mean-bits=4.5 widths=3,4,8},lm_head=8,blocks.0.*=float")
    assert request is not None
    assert (request.auto.mean_bits, request.auto.size, request.auto.widths) == (4.5, None, (3, 4, 8))
    assert request.pins == "lm_head=8,blocks.0.*=float"
    assert request.uniform(3) == "3,lm_head=8,blocks.0.*=float"
    assert set(request.all) == {3, 4, 8, None}


def test_defaults_and_printing() -> None:
    request = parse_auto(" auto{size=12MB}")
    assert request is not None and request.auto.widths == (4, 8) and not request.pins
    assert to_text(request.auto) == "auto{size=12MB}"
    assert parse_auto("4,auto=8") is None and parse_auto("4,automatic.head=8") is None


@pytest.mark.parametrize(
    ("text", "count"),
    [("12MB", 12_000_000), ("1.5kB", 1500), ("2MiB", 2**21), ("700", 700), ("3 gib", 3 * 2**30), ("9B", 9)],
)
def test_sizes(text: str, count: int) -> None:
    assert parse_size(text) == count


def test_every_width_that_may_come_out_is_known_before_anything_runs() -> None:
    assert asked_widths("auto{mean-bits=4.5},head=6") == (4, 8, 4, 6)
    assert asked_widths("4,head=float") == (4, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("auto", "needs a budget.*mean-bits=4.5"),
        ("auto{mean-bits=4.5 size=1MB}", "needs one budget"),
        ("auto{mean-bits=3.9}", r"mean-bits=3\.9 lies outside the widths to choose from, 4, 8"),
        ("auto{mean-bits=9}", "lies outside"),
        ("auto{mean-bits=4 widths=4}", r"cannot choose among the widths 4\..*two or more"),
        ("auto{mean-bits=4 widths=4,8,4}", "each once"),
        ("auto{mean-bits=2 widths=1,8}", "bit width 1.0 is outside"),
        ("auto{size=big}", "size=big is no size"),
        ("auto{size=0MB}", "no size"),
        ("auto{size=3parsec}", "no size"),
        ("auto{mean-bit=4.5}", 'no option "mean-bit".*Did you mean "mean-bits"'),
        ("auto{mean-bits=4.5", 'expected a blank or "}"'),
        ("auto{mean-bits=4.5}head=8", "follows auto"),
        ("auto{mean-bits=4.5},head", "not NAME=WIDTH"),
        ("auto-bits", "not a bit width"),
        ("auto{mean-bits=5 widths=4,4.5,8}", "4.5 bits cannot be exported"),
        ("auto{mean-bits=5 widths=4,20}", "20 bits cannot be exported"),
    ],
)
def test_nonsense_is_refused_before_anything_runs(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        make_options({"weights": text}, exported=True)


def test_a_simulation_may_choose_among_fractions() -> None:
    assert make_options({"weights": "auto{mean-bits=5 widths=4,4.5,8}"}, exported=False).weights.startswith("auto")


def test_a_schedule_has_to_reach_the_lowest_width() -> None:
    with pytest.raises(UsageError, match="ends at 5 bits, the weights at 4"):
        make_options({"weights": "auto{mean-bits=6}", "schedule": "8x1,5x1"}, exported=True)
