"""The fine-tune loop: it learns, it resumes to the bit, it stops on NaN and Ctrl-C with what it has."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tune_job import build, data, run, start, steps_kept, train, wait_for
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler.capture import capture
from fraqat_compiler.errors import CheckpointError, DataError, TrainingError, UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.fine_tune import FineTuneConfig, fine_tune
from fraqat_compiler.layers import end_widths, set_weight_bit_width
from fraqat_compiler.losses import relative_error
from fraqat_compiler.progress import Progress
from fraqat_compiler.schedule import parse_schedule

DIRECT = FineTuneConfig(parse_schedule("direct"), steps=3)


def _loss_at_four_bits(student: GraphModule, teacher: GraphModule) -> float:
    set_weight_bit_width(student, end_widths(student) | dict.fromkeys(end_widths(student), 4.0))
    generator = torch.Generator().manual_seed(9)
    batches = [torch.randn(16, 8, generator=generator) for _ in range(16)]
    with torch.no_grad():
        return sum(float(relative_error(student(x), teacher(x))) for x in batches)


def test_distillation_lowers_the_loss_at_the_end_width(tmp_path: Path) -> None:
    teacher, untrained = build()
    student, result = train(tmp_path, steps=200)
    assert _loss_at_four_bits(student, teacher) < 0.8 * _loss_at_four_bits(untrained, teacher)
    assert [entry["bits"] for entry in result.schedule] == [8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4]
    assert sum(entry["steps"] for entry in result.schedule) == 200


def test_the_teacher_does_not_move(tmp_path: Path) -> None:
    teacher, student = build()
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    fine_tune(student, teacher, data, DIRECT, folder=tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())


def test_only_what_wants_a_gradient_is_trained(tmp_path: Path) -> None:
    teacher, student = build()
    student.get_parameter("2.weight").requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in student.named_parameters()}
    fine_tune(student, teacher, data, DIRECT, folder=tmp_path)
    moved = {name for name, parameter in student.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == before.keys() - {"2.weight"}


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_range": "mse"}, {"schedule": "plateau{window=2 patience=1 divergence=1.01}"}],
    ids=["minmax", "mse", "plateau"],
)
def test_resume_after_kill_9_ends_bit_identical(tmp_path: Path, options: dict[str, Any]) -> None:
    """Killed for real at random moments; as every third step writes a checkpoint, some fall into the writing of one."""
    whole, result, folder = tmp_path / "whole.safetensors", tmp_path / "killed.safetensors", tmp_path / "killed"
    start(run, tmp_path / "whole", whole, False, options).join()
    chance = random.Random(0)
    killed = 0
    for _ in range(8):
        process = start(run, folder, result, True, options)
        wait_for(process, folder, above=steps_kept(folder)[-1])
        time.sleep(chance.random() * 0.02)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 3
    start(run, folder, result, True, options).join()
    assert result.read_bytes() == whole.read_bytes()


def test_ctrl_c_writes_a_checkpoint_and_says_where_it_stopped(tmp_path: Path) -> None:
    whole, result, folder = tmp_path / "whole.safetensors", tmp_path / "result", tmp_path / "stopped"
    options = {"steps": 300}
    start(run, tmp_path / "whole", whole, False, options).join()
    process = start(run, folder, result, False, options)
    wait_for(process, folder, above=30)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join()
    stopped = steps_kept(folder)[-1]
    assert result.read_text().startswith(f"the fine-tune was stopped after step {stopped} of 300; its checkpoint")
    start(run, folder, result, True, options).join()
    assert result.read_bytes() == whole.read_bytes()


def test_ctrl_c_between_two_steps(tmp_path: Path) -> None:
    """Pressed while the data draws batch 5: nothing is half done, and four steps are kept."""

    def interrupted() -> Iterator[tuple[Tensor]]:
        for index in range(20):
            if index == 4:
                signal.raise_signal(signal.SIGINT)
            yield (torch.randn(16, 8),)

    teacher, student = build()
    with pytest.raises(KeyboardInterrupt, match=r"after step 4 of 20.*--resume"):
        fine_tune(student, teacher, interrupted, FineTuneConfig(parse_schedule("direct"), 20), folder=tmp_path)
    assert steps_kept(tmp_path) == [4]
    with pytest.raises(KeyboardInterrupt, match="before its first step"):
        fine_tune(student, teacher, _pressed_at_once, DIRECT, folder=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_ctrl_c_in_the_middle_of_a_step_waits_for_its_end(tmp_path: Path) -> None:
    """Pressed when the weights have moved and the schedule has not."""

    with pytest.raises(KeyboardInterrupt, match="after step 5 of 20"):
        train(tmp_path / "stopped", steps=20, progress=_PressedAt(5))
    again, _ = train(tmp_path / "stopped", steps=20, resume=True)
    whole, _ = train(tmp_path / "whole", steps=20)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


class _PressedAt(Progress):
    """Presses Ctrl-C within a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def update(self, done: int, detail: str = "") -> None:
        if done == self.step:
            signal.raise_signal(signal.SIGINT)


def _pressed_at_once() -> list[tuple[Tensor]]:
    raise KeyboardInterrupt


def test_a_damaged_checkpoint_costs_its_steps_and_no_bit(tmp_path: Path) -> None:
    class Notes(Progress):
        def __init__(self) -> None:
            self.heard: list[str] = []

        def note(self, message: str) -> None:
            self.heard.append(message)

    whole, _ = train(tmp_path, steps=20)
    newest = tmp_path / "step-00000020" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    notes = Notes()
    again, result = train(tmp_path, steps=20, resume=True, progress=notes)
    assert result.resumed_from == 18
    assert notes.heard == ["Checkpoint step-00000020 is damaged and was passed over."]
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def test_a_finished_run_resumes_to_its_end(tmp_path: Path) -> None:
    first, result = train(tmp_path, steps=12)
    again, same = train(tmp_path, steps=12, resume=True)
    assert same.resumed_from == 12
    assert (same.losses, same.schedule) == (result.losses, result.schedule)
    assert all(torch.equal(parameter, again.get_parameter(name)) for name, parameter in first.named_parameters())


def test_stage_ends_are_kept_on_request(tmp_path: Path) -> None:
    train(tmp_path, steps=18, tuning={"keep_stage_ends": True})
    ends = [1, 2, 3, 4, 5, 6, 7, 8, 18]
    assert set(ends) < {*steps_kept(tmp_path)}
    assert steps_kept(tmp_path) == [*ends[:-1], 15, 18]


def test_nan_stops_the_stage_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    def poisoned() -> Iterator[tuple[Tensor]]:
        for index in range(20):
            yield (torch.full((16, 8), float("nan")) if index == 12 else torch.randn(16, 8),)

    teacher, student = build()
    config = FineTuneConfig(parse_schedule("8x1,4x1"), steps=20, checkpoint_every=5)
    told = r"step 13, in stage 2/2, 4 bits: the loss is nan.*that of \d\.(weight|bias) \(inf\).*step 10 is kept.*--lr"
    with pytest.raises(TrainingError, match=told):
        fine_tune(student, teacher, poisoned, config, folder=tmp_path)
    assert steps_kept(tmp_path) == [5, 10]


def test_a_plateau_undoes_the_stage_that_met_nan_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """The weights of the stage before are back: nothing of the undone steps is left but their batches."""

    def poisoned() -> Iterator[tuple[Tensor]]:
        for index in range(40):
            yield (torch.full((16, 8), float("nan")) if index == 20 else torch.randn(16, 8),)

    options: dict[str, Any] = {"schedule": "plateau{of=8,6,4}", "batches": poisoned, "steps": 40}
    whole, result = train(tmp_path / "whole", **options)
    assert [(entry["bits"], entry["steps"]) for entry in result.schedule] == [(8, 13), (6, 8), (8, 11), (6, 1), (4, 7)]
    assert all(math.isfinite(entry["loss"]) for entry in result.schedule)
    for stop in (19, 26):  # before the NaN, and while the stage before is held
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "part", resume=stop > 19, progress=_PressedAt(stop), **options)
    again, resumed = train(tmp_path / "part", resume=True, **options)
    assert resumed.resumed_from == 26
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def test_a_loss_that_explodes_stops_the_stage_and_keeps_a_checkpoint_from_before(tmp_path: Path) -> None:
    """From step 21 on the teacher answers as another: nothing of those steps is saved, though it would be time."""
    teacher, student = build()
    calls = 0

    def fickle(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return teacher(x) if calls <= 20 else -0.1 * teacher(x)

    config = FineTuneConfig(parse_schedule("8x1,4x1"), steps=200, checkpoint_every=5)
    with pytest.raises(TrainingError, match=r"in stage 1/2, 8 bits: the loss is [\d.e+]+, .* step 20 is kept"):
        fine_tune(student, fickle, data, config, folder=tmp_path)
    assert steps_kept(tmp_path) == [15, 20]


def test_an_infinite_gradient_names_its_parameter(tmp_path: Path) -> None:
    teacher, student = build()
    student.get_parameter("2.bias").register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(TrainingError, match=r"step 1, .* largest gradient is that of 2\.bias \(inf\)\. There is no"):
        fine_tune(student, teacher, data, DIRECT, folder=tmp_path)


def test_a_run_without_resume_starts_anew(tmp_path: Path) -> None:
    _, first = train(tmp_path, steps=10)
    _, second = train(tmp_path, steps=10)
    assert second.resumed_from == 0
    assert first.losses == second.losses


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 2e-3}, r"lr \(0.001 then, 0.002 now\)"),
        ({"seed": 1}, r"weights \("),
        ({"activations": "16"}, r"graph \("),
        ({"steps": 11}, r"steps \(10 then, 11 now\)"),
    ],
    ids=["lr", "weights", "graph", "steps"],
)
def test_another_runs_checkpoints_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    train(tmp_path, steps=10)
    with pytest.raises(CheckpointError, match=message):
        train(tmp_path, resume=True, **({"steps": 10} | change))


def test_empty_data_is_refused(tmp_path: Path) -> None:
    teacher, student = build()
    with pytest.raises(DataError, match="empty"):
        fine_tune(student, teacher, list, DIRECT, folder=tmp_path)


def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    teacher, student = build()
    with pytest.raises(DataError, match=r"training batch 1 does not run.*example_inputs"):
        fine_tune(student, teacher, lambda: [(torch.ones(16, 8),), (torch.ones(16, 9),)], DIRECT, folder=tmp_path)


def test_nothing_to_train_is_refused(tmp_path: Path) -> None:
    teacher, student = build()
    student.requires_grad_(False)
    with pytest.raises(TrainingError, match="no parameter to train"):
        fine_tune(student, teacher, data, DIRECT, folder=tmp_path)


def test_the_data_does_not_disturb_other_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    teacher, student = build()
    torch.manual_seed(5)
    fine_tune(student, teacher, data, DIRECT, folder=tmp_path)
    assert torch.equal(torch.randn(3), expected)


def test_progress_says_stage_bits_and_loss(tmp_path: Path) -> None:
    class Details(Progress):
        def __init__(self) -> None:
            self.heard: list[tuple[int, str]] = []

        def update(self, done: int, detail: str = "") -> None:
            self.heard.append((done, detail))

    details = Details()
    _, result = train(tmp_path, steps=9, progress=details)
    assert [done for done, _ in details.heard] == list(range(1, 10))
    assert details.heard[3][1] == f"stage 4/9, 5.5 bits, loss {result.losses[3]:.4g}"


def test_rate_warms_up_and_cools_down() -> None:
    config = FineTuneConfig(parse_schedule("direct"), steps=100, lr=1.0, warmup=10, cooldown=0.2)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[50] == 1.0
    assert rates[99] == pytest.approx(0.05)


@pytest.mark.parametrize(
    "option",
    [
        {"steps": 0},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"weight_decay": -1.0},
        {"betas": (0.9, 1.0)},
        {"cooldown": 1.5},
        {"warmup": -1},
        {"grad_clip": 0.0},
        {"checkpoint_every": 0},
    ],
)
def test_numbers_that_cannot_be_trained_with_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"cannot run with {next(iter(option))} "):
        FineTuneConfig(**({"schedule": parse_schedule("direct"), "steps": 5} | option))


def test_a_loaded_state_depends_on_nothing_but_the_checkpoint(tmp_path: Path) -> None:
    """Ranges come from the checkpoint too: a resumed run that calibrated on other data ends with the same bits."""
    whole, _ = train(tmp_path / "whole", steps=20)
    train(tmp_path / "part", steps=20)
    shutil.rmtree(tmp_path / "part" / "step-00000020")
    teacher, student = build()
    for module in student.modules():
        if isinstance(module, ActivationFakeQuantize):
            module.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    config = FineTuneConfig(parse_schedule("fraqat"), steps=20, lr=1e-3, checkpoint_every=3)
    fine_tune(student, teacher, data, config, folder=tmp_path / "part", resume=True)
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name))


def test_parameters_without_a_gradient_are_no_obstacle(tmp_path: Path) -> None:
    """One of two outputs is an integer, so the layer before it gets no gradient, in the run and in the resumed one."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.unseen = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.seen(x), self.unseen(x).argmax(-1)

    def graphs() -> tuple[GraphModule, GraphModule]:
        torch.manual_seed(0)
        return capture(Two(), (torch.randn(16, 8),)), capture(Two(), (torch.randn(16, 8),))

    teacher, student = graphs()
    config = FineTuneConfig(parse_schedule("direct"), steps=6, checkpoint_every=2)
    fine_tune(student, teacher, data, config, folder=tmp_path)
    shutil.rmtree(tmp_path / "step-00000006")
    again_teacher, again = graphs()
    assert fine_tune(again, again_teacher, data, config, folder=tmp_path, resume=True).resumed_from == 4
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))
