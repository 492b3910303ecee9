"""Stabilizers: each does what its source claims, in the last stage alone, and resumes to the bit."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tune_job import build, data, train
from torch import Tensor

from fraqat_compiler.errors import UsageError
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.fine_tune import FineTuneConfig, fine_tune
from fraqat_compiler.layers import weight_quantizers
from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.schedule import parse_schedule
from fraqat_compiler.stabilizers import (
    Dampen,
    Ema,
    FreezeOscillations,
    QuantizedWeight,
    Stabilizer,
    Subjects,
    cosine,
)


def _weight(values: list[float]) -> QuantizedWeight:
    """A row whose scale is 1: its largest value is 7."""
    parameter = torch.nn.Parameter(torch.tensor([[*values, 7.0]]))
    module = WeightFakeQuantize(QuantSpec(4, axis=0), "weight", (1,))
    module(parameter)
    return QuantizedWeight("w", parameter, module)


def _move(weight: QuantizedWeight, values: list[float]) -> None:
    with torch.no_grad():
        weight.parameter[0, : len(values)] = torch.tensor(values)


def test_a_weight_that_flips_is_frozen_where_it_is_most_of_the_time_and_others_are_not() -> None:
    """The first flips between codes 1 and 2 and is at 2 two steps of three, the second climbs, the third rests."""
    weight = _weight([1.6, -3.0, 0.2])
    acting = FreezeOscillations(start=0.1, end=0.1).bind(Subjects([weight], {"w": weight.parameter}))
    acting.begin()
    caught = 0
    for step in range(60):
        _move(weight, [1.4 if step % 3 == 2 else 1.6, -3.0 + 0.1 * step])
        acting.after_step(0.0)
        caught = caught or (step if bool(acting.state["frozen:w"][0, 0]) else 0)
    assert acting.state["frozen:w"].tolist() == [[True, False, False, False]]
    assert caught > 10
    assert float(weight.parameter.detach()[0, 0]) == 2.0
    assert float(weight.parameter.detach()[0, 1]) == pytest.approx(2.9)
    _move(weight, [0.0])
    acting.after_step(0.0)
    assert float(weight.parameter.detach()[0, 0]) == 2.0


def test_a_frozen_weight_keeps_its_code_while_its_rows_scale_moves() -> None:
    weight = _weight([1.6])
    acting = FreezeOscillations(start=0.05, end=0.05).bind(Subjects([weight], {"w": weight.parameter}))
    acting.begin()
    for step in range(20):
        _move(weight, [1.6 - 0.2 * (step % 2)])
        acting.after_step(0.0)
    assert bool(acting.state["frozen:w"][0, 0])
    code = float(acting.state["average:w"][0, 0])
    _move(weight, [100.0, 14.0])  # what an optimizer might do; the scale of the row doubles
    acting.after_step(0.0)
    assert weight.parameter.detach().tolist() == [[2 * code, 14.0]]


def test_a_change_that_is_taken_back_counts_once_each_way() -> None:
    """Codes 1, 2, 3, 2, 3: the two last changes oscillate, so the frequency is 0.01 + 0.01 * 0.99."""
    weight = _weight([1.0])
    acting = FreezeOscillations().bind(Subjects([weight], {"w": weight.parameter}))
    acting.begin()
    for value in (2.0, 3.0, 2.0, 3.0):
        _move(weight, [value])
        acting.after_step(0.0)
    assert float(acting.state["frequency:w"][0, 0]) == pytest.approx(0.01 + 0.01 * 0.99)


def test_dampening_adds_the_gradient_of_its_penalty() -> None:
    """2 lambda (w - s * code) by autograd, and nothing for a value beyond the grid."""
    weight = _weight([1.4, -2.2, 0.5, -9.0])
    with torch.no_grad():
        weight.fake_quant.scale.fill_(1.0)
    codes = weight.codes()
    clipped = weight.parameter.clamp(-8, 7)
    expected = torch.autograd.grad(0.3 * (clipped - codes).square().sum(), weight.parameter)[0]
    weight.parameter.grad = torch.zeros_like(weight.parameter)
    acting = Dampen(strength=0.3).bind(Subjects([weight], {"w": weight.parameter}))
    acting.add_gradients(1.0)
    torch.testing.assert_close(weight.parameter.grad, expected)
    weight.parameter.grad.zero_()
    acting.add_gradients(0.0)
    assert not weight.parameter.grad.any()


def test_cosine_annealing() -> None:
    assert [cosine(0.1, 0.01, progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.1, 0.055, 0.01])


def test_ema_is_the_average_of_the_last_stage(tmp_path: Path) -> None:
    """By hand, from the weights after every step of the last stage."""
    seen: list[Tensor] = []
    teacher, student = build()
    parameter = student.get_parameter("2.weight")
    config = FineTuneConfig(parse_schedule("8x1,4x1"), 20, lr=1e-3, stabilizers=(Ema(decay=0.9),))
    parameter.register_hook(lambda gradient: seen.append(parameter.detach().clone()))  # before each step
    unaveraged, _ = train(tmp_path / "plain", steps=20, schedule="8x1,4x1")
    fine_tune(student, teacher, data, config, folder=tmp_path / "ema")
    after = [*seen[11:], unaveraged.get_parameter("2.weight").detach()]
    average = seen[10].clone()
    for done, values in enumerate(after, start=1):
        average.lerp_(values, 1 - min(0.9, (1 + done) / (10 + done)))
    torch.testing.assert_close(parameter.detach(), average)


def test_ema_without_a_decay_weighs_steps_by_a_power_of_their_number() -> None:
    """Step t of T weighs (t^(g+1) - (t-1)^(g+1)) / T^(g+1), g = 1 / span - 2; the mean age is about span T."""
    parameter, span = torch.zeros(200), 0.25
    acting = Ema(span=span).bind(Subjects([], {"w": parameter}))
    acting.begin()
    for step in range(200):
        parameter.zero_()[step] = 1.0  # what remains in the average is the weight of each step
        acting.after_step(0.0)
    acting.finish()
    steps = torch.arange(1, 201, dtype=torch.float64)
    torch.testing.assert_close(parameter.double(), (steps**3 - (steps - 1) ** 3) / 200**3, atol=1e-6, rtol=1e-3)
    assert float(((200 - steps) * parameter).sum()) == pytest.approx(span * 200, rel=0.02)


def _flips(folder: Path, stabilizers: tuple[Stabilizer, ...]) -> int:
    """Changes of code that take back the one before, in the last steps of a fine-tune whose rate does not fall."""
    teacher, student = build()
    codes: list[Tensor] = []
    weight = next(
        QuantizedWeight(name, student.get_parameter(name), module)
        for name, module in weight_quantizers(student)
        if name == "2.weight"
    )
    weight.parameter.register_hook(lambda gradient: codes.append(weight.codes()))
    config = FineTuneConfig(parse_schedule("direct"), 160, lr=3e-3, cooldown=0.0, stabilizers=stabilizers)
    fine_tune(student, teacher, data, config, folder=folder)
    turns = [torch.sign(later - earlier) for earlier, later in itertools.pairwise(codes[100:])]
    return sum(int((now * before < 0).sum()) for before, now in itertools.pairwise(turns))


@pytest.mark.parametrize("stabilizer", [FreezeOscillations(momentum=0.05), Dampen(strength=1.0)], ids=lambda s: s.name)
def test_a_stabilized_fine_tune_oscillates_less(tmp_path: Path, stabilizer: Stabilizer) -> None:
    assert _flips(tmp_path / "with", (stabilizer,)) < 0.7 * _flips(tmp_path / "without", ())


ALL = (Ema(decay=0.9), Dampen(), FreezeOscillations(momentum=0.2, start=0.2))


@pytest.mark.parametrize(
    "tuning",
    [{"stabilizers": (item,)} for item in ALL] + [{"stabilizers": ALL, "optimizer_state": "reset"}],
    ids=["ema", "dampen", "freeze", "all"],
)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, tuning: dict[str, Any]) -> None:
    """Resumed in the middle of the last stage, and once more after its end."""
    options: dict[str, Any] = {"steps": 40, "schedule": "8x1,5x1,4x3", "lr": 3e-3, "tuning": tuning}
    whole, result = train(tmp_path / "whole", **options)
    train(tmp_path / "part", **options)
    for path in (tmp_path / "part").glob("step-00000040/*"):
        path.unlink()
    for expected in (39, 40):
        again, resumed = train(tmp_path / "part", resume=True, **options)
        assert (resumed.resumed_from, resumed.losses) == (expected, result.losses)
        for name, parameter in whole.named_parameters():
            assert torch.equal(parameter, again.get_parameter(name))


def test_the_optimizers_state_is_reset_when_a_stage_begins(tmp_path: Path) -> None:
    """The first step after the boundary is Adam's first: its size is the rate wherever there is a gradient."""
    from safetensors.torch import load_file

    for state, moves in (("keep", False), ("reset", True)):
        tuning = {"optimizer_state": state, "keep_stage_ends": True, "grad_clip": None, "cooldown": 0.0, "warmup": 0}
        train(tmp_path / state, steps=13, schedule="8x12,4x1", tuning=tuning)
        before, after = (load_file(tmp_path / state / f"step-{step:08d}/state.safetensors") for step in (12, 13))
        step = (after["parameter:0.weight"] - before["parameter:0.weight"]).abs()
        share = float(((step - 1e-3).abs() < 1e-5).float().mean())
        assert (share > 0.95) if moves else (share < 0.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Ema(decay=1.0),
        lambda: Ema(span=0.0),
        lambda: Ema(span=0.6),
        lambda: Dampen(strength=0.0),
        lambda: FreezeOscillations(momentum=1.0),
        lambda: FreezeOscillations(start=0.01, end=0.1),
    ],
)
def test_numbers_that_make_no_sense_are_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="cannot"):
        make()
