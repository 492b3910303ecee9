"""Bit-width schedules."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

from fraqat_compiler.bit_width_scheduler import BitWidthScheduler, PlateauScheduler, Stretch
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import PipelineSyntaxError, UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.layers import end_widths, weight_quantizers
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.schedule import FRAQAT, NAMED, BitWidthSchedule, Plateau, parse_schedule


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
        ("fracat", UsageError, "Did you mean .fraqat"),
        ("", UsageError, "names no stage"),
        ("8x1,4y2", PipelineSyntaxError, r"'4y2'"),
        ("4x1,8x1", UsageError, "must fall"),
        ("8x1,8x1,4x1", UsageError, "must fall"),
        ("8x1,5x1", UsageError, "ends at 5"),
        ("8x0,4x1", UsageError, "share of 0"),
        ("99x1,4x1", UsageError, "bit width 99"),
        ("geometric{stages=0}", UsageError, "names no stage"),
        ("geometric{stages=1}", UsageError, "cannot get from 8 to 4 bits in one stage"),
        ("geometric{end=5}", UsageError, "ends at 5 bits, the weights at 4"),
        ("linear{steps=3}", UsageError, 'has no option "steps".* stages'),
        ("integer{end-share=1}", UsageError, "cannot give its end 1 of the budget"),
        ("plateau{of=8x1,5x1}", UsageError, "ends at 5"),
        ("plateau{patience=0}", UsageError, "patience=0"),
        ("direct,fraqat", PipelineSyntaxError, "expected one item"),
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
        scheduler.step(1.0)
    assert seen == [(8, 8), (5.5, 8), (4, 8), (4, 8)]
    other = BitWidthScheduler(student, parse_schedule("8x1,5.5x1,4x2"), 4, {"0.weight": 4.0, "1.weight": 8.0})
    other.step(1.0)
    state = other.state_dict()
    other = BitWidthScheduler(student, parse_schedule("8x1,5.5x1,4x2"), 4, {"0.weight": 4.0, "1.weight": 8.0})
    other.load_state_dict(state)
    assert other.bit_width == 5.5
    assert {name: module.spec.bit_width for name, module in weight_quantizers(student)} == {
        "0.weight": 5.5,
        "1.weight": 8,
    }
    assert {module.spec.bit_width for module in student.modules() if isinstance(module, ActivationFakeQuantize)} == {8}


def test_geometric_steps_grow_by_one_ratio() -> None:
    widths = [stage.bit_width for stage in parse_schedule("geometric{stages=5 start=6}").stages]
    assert (len(widths), widths[0], widths[-1]) == (5, pytest.approx(6), 4)
    steps = [1 / (2 ** (width - 1) - 1) for width in widths]
    assert [later / earlier for earlier, later in itertools.pairwise(steps)] == pytest.approx([(31 / 7) ** 0.25] * 4)
    assert parse_schedule("geometric{stages=9 start=8 end=4}").stages == parse_schedule("geometric").stages


def test_linear_and_cosine_follow_their_curves() -> None:
    line = [stage.bit_width for stage in parse_schedule("linear{stages=5}").stages]
    assert line == pytest.approx([8, 7, 6, 5, 4])
    curve = [stage.bit_width for stage in parse_schedule("cosine{stages=3}").stages]
    assert curve == pytest.approx([8, 6, 4])


def test_end_share_is_the_share_of_the_end() -> None:
    assert parse_schedule("integer{end-share=0.2 start=6}").steps(10) == [(6, 4), (5, 4), (4, 2)]


def _plateau(budget: int, **options: Any) -> PlateauScheduler:
    graph = capture(nn.Linear(4, 4), (torch.ones(1, 4),))
    student = InsertFakeQuant().run(graph, PassContext()).model
    rule = Plateau(**({"of": "8,6,4", "window": 2, "patience": 2} | options))
    schedule = BitWidthSchedule("plateau", parse_schedule(rule.of).stages, rule)
    return PlateauScheduler(student, schedule, budget, end_widths(student), rule)


def _walk(scheduler: PlateauScheduler, losses: Iterable[float]) -> list[int]:
    """The steps that it went back to."""
    return [back for loss in losses if (back := scheduler.step(loss)) is not None]


def test_a_plateau_ends_a_stage_and_what_it_leaves_goes_on_to_the_end() -> None:
    """Two windows without gain end 8 bits after 2 + 4 steps; 6 bits keeps falling and is ended by its share."""
    scheduler = _plateau(60)
    flat, falling = [1.0] * 6, [0.9**index for index in range(54)]
    assert _walk(scheduler, flat + falling) == []
    assert scheduler.stretches == [Stretch(8, 0, 6), Stretch(6, 6, 40), Stretch(4, 40, 60)]


def test_a_stage_that_diverges_is_undone_and_the_one_before_it_held() -> None:
    scheduler = _plateau(60)
    assert _walk(scheduler, [1.0] * 6 + [2.0] * 4) == []
    assert scheduler.needed == {6}
    assert _walk(scheduler, [9.0] * 2) == [6]
    assert (scheduler.bit_width, scheduler.can_go_back) == (8, False)
    _walk(scheduler, [1.0] * 48)
    assert [width for width, _, _ in scheduler.stretches] == [8, 6, 8, 6, 4]
    assert scheduler.stretches[-1].last == 60


def test_nan_is_undone_as_often_as_allowed_and_the_run_still_ends_at_its_end() -> None:
    scheduler = _plateau(60, attempts=2)
    went_back = []
    while scheduler.last_step < 60:
        went_back += _walk(scheduler, [float("nan") if scheduler.can_go_back else 1.0])
    assert went_back == [6, 13]
    assert scheduler.bit_width == 4


@pytest.mark.parametrize("budget", [3, 4, 5, 7, 11, 30])
@pytest.mark.parametrize("loss", [1.0, float("nan")])
def test_a_plateau_reaches_its_end_at_any_budget(budget: int, loss: float) -> None:
    scheduler = _plateau(budget)
    _walk(scheduler, (loss if scheduler.can_go_back else 1.0 for _ in range(budget)))
    assert (scheduler.bit_width, scheduler.last_step) == (4, budget)


def test_a_resumed_plateau_decides_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    losses = (torch.rand(80, generator=generator) * 3).tolist()
    whole = _plateau(80, divergence=1.2)
    backs = _walk(whole, losses)
    for stop in range(0, 80, 7):
        first, second = _plateau(80, divergence=1.2), _plateau(80, divergence=1.2)
        before = _walk(first, losses[:stop])
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert before + _walk(second, losses[stop:]) == backs
        assert second.stretches == whole.stretches
