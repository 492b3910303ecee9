"""Bit-width schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fraqat_compiler.capture import capture
from fraqat_compiler.errors import PipelineSyntaxError, UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.layers import end_widths, weight_quantizers
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.schedule import FRAQAT, NAMED, BitWidthSchedule, BitWidthScheduler, parse_schedule


def test_fraqat_is_the_papers_table() -> None:
    assert parse_schedule("fraqat").steps(25) == [(float(width), epochs) for width, epochs in FRAQAT]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("end", [8, 5.5, 4.5, 4, 3, 2])
@pytest.mark.parametrize("budget", [40, 401])
def test_named_schedules_fall_to_the_end_and_use_the_whole_budget(name: str, end: float, budget: int) -> None:
    stages = parse_schedule(name, end).steps(budget)
    widths = [width for width, _ in stages]
    assert widths == sorted(set(widths), reverse=True)
    assert widths[-1] == end
    assert sum(count for _, count in stages) == budget
    assert min(count for _, count in stages) >= 1


def test_text_round_trips() -> None:
    schedule = parse_schedule("8x1,7x1,5.5x1,4x14")
    assert str(schedule) == "8x1,7x1,5.5x1,4x14"
    assert schedule.steps(17) == [(8, 1), (7, 1), (5.5, 1), (4, 14)]
    assert parse_schedule("8,4").steps(10) == [(8, 5), (4, 5)]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("end", [8, 4.3, 4, 3])
def test_the_text_of_a_named_schedule_parses_back_to_its_stages(name: str, end: float) -> None:
    schedule = parse_schedule(name, end)
    assert parse_schedule(str(schedule), end).stages == schedule.stages


@pytest.mark.parametrize("budget", [9, 10, 24, 26, 100, 997])
def test_no_stage_is_a_whole_step_off_its_share(budget: int) -> None:
    """But for stages that would have none: they have one."""
    for (_, share), (_, count) in zip(FRAQAT, parse_schedule("fraqat").steps(budget), strict=True):
        assert abs(count - budget * share / 25) < 1 or count == 1 or budget < 25
        assert count >= 1


def test_below_four_bits_fraqat_goes_on_in_quarter_steps() -> None:
    widths = [stage.bit_width for stage in parse_schedule("fraqat", 3).stages]
    assert widths == [8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4, 3.75, 3.5, 3.25, 3]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("end", [1, 0, -4, 33, float("nan")])
def test_an_end_that_no_weight_can_have_is_refused(name: str, end: float) -> None:
    with pytest.raises(UsageError, match="bit width"):
        parse_schedule(name, end)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("fracat", UsageError, "Did you mean fraqat"),
        ("", UsageError, "unknown schedule"),
        ("8x1,4y2", PipelineSyntaxError, r"'4y2'"),
        ("4x1,8x1", UsageError, "must fall"),
        ("8x1,8x1,4x1", UsageError, "must fall"),
        ("8x1,5x1", UsageError, "ends at 5"),
        ("8x0,4x1", UsageError, "share of 0"),
        ("99x1,4x1", UsageError, "bit width 99"),
    ],
)
def test_bad_schedules_are_refused_with_the_reason(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_schedule(text)


def test_no_stage_and_too_small_a_budget_are_refused() -> None:
    with pytest.raises(UsageError, match="no stage"):
        BitWidthSchedule("empty", ())
    with pytest.raises(UsageError, match="5 steps cannot be shared among the 9 stages"):
        parse_schedule("fraqat").steps(5)


def test_scheduler_moves_each_weight_to_its_own_end() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    graph = capture(model, (torch.ones(1, 4),))
    student = InsertFakeQuant(weights="4,1=8").run(graph, PassContext()).model
    scheduler = BitWidthScheduler(student, parse_schedule("8x1,5.5x1,4x2"), 4, end_widths(student))
    seen = []
    for _ in range(4):
        widths = {name: module.spec.bit_width for name, module in weight_quantizers(student)}
        seen.append((widths["0.weight"], widths["1.weight"]))
        scheduler.step()
    assert seen == [(8, 8), (5.5, 8), (4, 8), (4, 8)]
    other = BitWidthScheduler(student, parse_schedule("8x1,5.5x1,4x2"), 4, {"0.weight": 4.0, "1.weight": 8.0})
    other.load_state_dict({"last_step": 1})
    assert other.bit_width == 5.5
    assert {name: module.spec.bit_width for name, module in weight_quantizers(student)} == {
        "0.weight": 5.5,
        "1.weight": 8,
    }
    assert {module.spec.bit_width for module in student.modules() if isinstance(module, ActivationFakeQuantize)} == {8}
