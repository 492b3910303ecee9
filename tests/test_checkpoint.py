"""Checkpoints: whole or not there, and only for the run that wrote them."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import pytest
import torch
from fine_tune_job import RUN, save_and_die, save_step, start, steps_kept

from fraqat_compiler import checkpoint
from fraqat_compiler.checkpoint import Checkpoint
from fraqat_compiler.errors import CheckpointError, OutputError


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    save_step(tmp_path, 4)
    found = checkpoint.latest(tmp_path, RUN)
    assert found is not None
    assert (found.step, found.state, found.run) == (4, {"scheduler": {"last_step": 4}}, RUN)
    assert torch.equal(found.tensors["parameter:a"], torch.full((3,), 4.0))
    assert torch.equal(found.tensors["step:a"], torch.tensor(4))


def test_only_the_last_and_the_milestones_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, Checkpoint(step, {"a": torch.zeros(1)}, {}, RUN), milestones={2})
    assert steps_kept(tmp_path) == [2, 99_999_999, 100_000_000]
    found = checkpoint.latest(tmp_path, RUN)
    assert found is not None and found.step == 100_000_000


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing", RUN) is None


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-by-step").mkdir()
    save_step(tmp_path, 1)
    checkpoint.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-by-step"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "json", "step", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    tensors, state = newest / checkpoint.TENSORS_FILE, newest / checkpoint.STATE_FILE
    content = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(content[:-4])
    elif damage == "flip":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "json":
        state.write_text("{")
    elif damage == "step":
        state.write_text(state.read_text().replace('"step": 2', '"step": 3'))
    else:
        tensors.unlink()
    warnings: list[str] = []
    found = checkpoint.latest(tmp_path, RUN, warnings.append)
    assert found is not None and found.step == 1
    assert warnings == ["Checkpoint step-00000002 is damaged and was passed over."]


def test_all_damaged_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (save_step(tmp_path, 1) / checkpoint.STATE_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=r"damaged.*--resume"):
        checkpoint.latest(tmp_path, RUN)


def test_kill_9_at_every_file_operation_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Step 3 is saved over 1 and 2 and killed at the first, second, ... operation, until it gets through."""
    survivors = []
    for fatal in range(1, 100):
        folder = tmp_path / str(fatal)
        save_step(folder, 1)
        save_step(folder, 2)
        process = start(save_and_die, folder, 3, fatal)
        process.join()
        found = checkpoint.latest(folder, RUN)
        assert found is not None and float(found.tensors["parameter:a"][0]) == found.step
        survivors.append(found.step)
        save_step(folder, 4)
        assert steps_kept(folder) == [found.step, 4]
        assert not list(folder.glob(".*"))
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert survivors == sorted(survivors)
    assert survivors.count(2) >= 5 and survivors.count(3) >= 2


def test_another_run_is_named(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"lr \(0.1 then, 0.2 now\)"):
        checkpoint.latest(tmp_path, RUN | {"lr": 0.2})


def test_no_pickles(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / checkpoint.STATE_FILE).read_text())["step"] == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_step(blocked, 1)


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """The process may write no file above 4 KiB, as on a disk that is full."""
    save_step(tmp_path, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot be written.*Free disk space"):
            checkpoint.save(tmp_path, Checkpoint(2, {"a": torch.zeros(100_000)}, {}, RUN))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
