"""Checkpoints: whole or not there, and only for the run that wrote them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fraqat_compiler import checkpoint
from fraqat_compiler.checkpoint import Checkpoint
from fraqat_compiler.errors import CheckpointError, OutputError

RUN = {"lr": 0.1, "steps": 10}


def _saved(folder: Path, step: int) -> Path:
    tensors = {"parameter:a": torch.full((3,), float(step)), "step:a": torch.tensor(step)}
    return checkpoint.save(folder, Checkpoint(step, tensors, {"scheduler": {"last_step": step}}, RUN))


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    _saved(tmp_path, 4)
    found = checkpoint.latest(tmp_path, RUN)
    assert found is not None
    assert (found.step, found.state, found.run) == (4, {"scheduler": {"last_step": 4}}, RUN)
    assert torch.equal(found.tensors["parameter:a"], torch.full((3,), 4.0))


def test_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        _saved(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "missing", RUN) is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "json", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    _saved(tmp_path, 1)
    newest = _saved(tmp_path, 2)
    tensors = newest / checkpoint.TENSORS_FILE
    content = tensors.read_bytes()
    if damage == "truncate":
        tensors.write_bytes(content[:-4])
    elif damage == "flip":
        tensors.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "json":
        (newest / checkpoint.STATE_FILE).write_text("{")
    else:
        tensors.unlink()
    found = checkpoint.latest(tmp_path, RUN)
    assert found is not None and found.step == 1


def test_all_damaged_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    (_saved(tmp_path, 1) / checkpoint.STATE_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match="damaged.*--resume"):
        checkpoint.latest(tmp_path, RUN)


def test_a_half_written_one_is_not_seen(tmp_path: Path) -> None:
    _saved(tmp_path, 1)
    _saved(tmp_path, 2).rename(tmp_path / ".partial-00000002")
    found = checkpoint.latest(tmp_path, RUN)
    assert found is not None and found.step == 1


def test_another_run_is_named(tmp_path: Path) -> None:
    _saved(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"lr \(0.1 then, 0.2 now\)"):
        checkpoint.latest(tmp_path, RUN | {"lr": 0.2})


def test_no_pickles(tmp_path: Path) -> None:
    folder = _saved(tmp_path, 1)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / checkpoint.STATE_FILE).read_text())["step"] == 1


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        _saved(blocked, 1)
