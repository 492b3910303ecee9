"""The fine-tune loop: it learns, it resumes to the bit, it stops on NaN with what it has."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fine_tune_job import build, data, train
from torch import Tensor

from fraqat_compiler.errors import CheckpointError, DataError, TrainingError
from fraqat_compiler.fine_tune import FineTuneConfig, fine_tune, output_loss
from fraqat_compiler.layers import end_widths, set_weight_bit_width
from fraqat_compiler.schedule import parse_schedule

SCRIPT = Path(__file__).with_name("fine_tune_job.py")


def _loss_at_four_bits(student: torch.fx.GraphModule, teacher: torch.fx.GraphModule) -> float:
    set_weight_bit_width(student, end_widths(student) | dict.fromkeys(end_widths(student), 4.0))
    generator = torch.Generator().manual_seed(9)
    batches = [torch.randn(16, 8, generator=generator) for _ in range(16)]
    with torch.no_grad():
        return sum(float(output_loss(student(x), teacher(x))) for x in batches)


def test_distillation_lowers_the_loss_at_the_end_width(tmp_path: Path) -> None:
    teacher, untrained = build()
    student, result = train(tmp_path, steps=200)
    assert _loss_at_four_bits(student, teacher) < 0.8 * _loss_at_four_bits(untrained, teacher)
    assert [entry["bits"] for entry in result.schedule] == [8, 7, 6, 5.5, 5, 4.75, 4.5, 4.25, 4]
    assert sum(entry["steps"] for entry in result.schedule) == 200


def test_the_teacher_does_not_move(tmp_path: Path) -> None:
    teacher, student = build()
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    fine_tune(student, teacher, data, FineTuneConfig(parse_schedule("direct"), steps=5), folder=tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in teacher.named_parameters())


def _run(*arguments: str, wait: bool = True) -> subprocess.Popen[bytes]:
    process = subprocess.Popen([sys.executable, str(SCRIPT), *arguments], env=os.environ | {"OMP_NUM_THREADS": "1"})
    if wait:
        assert process.wait() == 0
    return process


def test_resume_after_kill_9_ends_bit_identical(tmp_path: Path) -> None:
    """Killed for real, at moments drawn at random, among them while a checkpoint is being written (every third step)."""
    _run(str(tmp_path / "whole"), str(tmp_path / "whole.safetensors"))
    chance = random.Random(0)
    folder = tmp_path / "killed"
    killed = 0
    for _ in range(4):
        process = _run(str(folder), str(tmp_path / "killed.safetensors"), "--resume", wait=False)
        before = _steps_kept(folder)
        deadline = time.monotonic() + 60
        while process.poll() is None and _steps_kept(folder) == before and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 2
    _run(str(folder), str(tmp_path / "killed.safetensors"), "--resume")
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def _steps_kept(folder: Path) -> int:
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("step-*")), default=0)


def test_nan_stops_the_stage_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    def poisoned() -> Iterator[tuple[Tensor]]:
        for index in range(20):
            yield (torch.full((16, 8), float("nan")) if index == 12 else torch.randn(16, 8),)

    teacher, student = build()
    config = FineTuneConfig(parse_schedule("8x1,4x1"), steps=20, checkpoint_every=5)
    with pytest.raises(TrainingError, match=r"step 13, in stage 2 \(4 bits\).*gradient is that of \d\.(weight|bias)"):
        fine_tune(student, teacher, poisoned, config, folder=tmp_path)
    assert _steps_kept(tmp_path) == 10


def test_a_run_without_resume_starts_anew(tmp_path: Path) -> None:
    _, first = train(tmp_path, steps=10)
    _, second = train(tmp_path, steps=10)
    assert second.resumed_from == 0
    assert first.losses == second.losses


def test_another_runs_checkpoints_are_refused(tmp_path: Path) -> None:
    train(tmp_path, steps=10)
    with pytest.raises(CheckpointError, match=r"lr \(0.001 then, 0.002 now\)"):
        train(tmp_path, steps=10, lr=2e-3, resume=True)


def test_empty_data_is_refused(tmp_path: Path) -> None:
    teacher, student = build()
    with pytest.raises(DataError, match="empty"):
        fine_tune(student, teacher, lambda: [], FineTuneConfig(parse_schedule("direct"), 3), folder=tmp_path)


def test_the_data_does_not_disturb_other_random_numbers(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.randn(3)
    teacher, student = build()
    torch.manual_seed(5)
    fine_tune(student, teacher, data, FineTuneConfig(parse_schedule("direct"), 3), folder=tmp_path)
    assert torch.equal(torch.randn(3), expected)


def test_rate_warms_up_and_cools_down() -> None:
    config = FineTuneConfig(parse_schedule("direct"), steps=100, lr=1.0, warmup=10, cooldown=0.2)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == 1.0 and rates[50] == 1.0
    assert rates[99] == pytest.approx(0.05)
