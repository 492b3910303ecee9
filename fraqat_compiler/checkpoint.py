"""Checkpoints of a fine-tune: safetensors and JSON in a folder each, written so that a crash never leaves half of one.

A checkpoint is written to a temporary folder, flushed to disk and renamed; only then are older ones removed. So at
every moment the newest folder is whole, and the one before it is still there should the disk damage it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fraqat_compiler.errors import CheckpointError, OutputError

TENSORS_FILE = "state.safetensors"
STATE_FILE = "state.json"
KEPT = 2
_PREFIX, _PARTIAL = "step-", ".partial-"


@dataclass(frozen=True)
class Checkpoint:
    """State of a fine-tune after some steps.

    Attributes:
        step: optimizer steps done.
        tensors: parameters, optimizer state, quantizer state and losses by name.
        state: everything else, JSON values only.
        run: what the run was started with; a run that was started otherwise is refused.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    run: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint, milestones: Collection[int] = ()) -> Path:
    """Write a checkpoint into `folder`, then remove all but the last KEPT and those of `milestones`.

    Args:
        folder: made when missing.
        checkpoint: the state; one of the same step is replaced, so save a step again only when its folder is damaged.
        milestones: steps whose checkpoints stay.

    Raises:
        OutputError: the disk is full or the folder cannot be written; older checkpoints stay as they were.
    """
    final = folder / f"{_PREFIX}{checkpoint.step:08d}"
    partial = folder / f"{_PARTIAL}{checkpoint.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(folder.glob(f"{_PARTIAL}*"))
        partial.mkdir()
        _write(partial, checkpoint)
        _remove([final])
        partial.rename(final)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        _remove([partial])
        raise OutputError(
            f"a checkpoint cannot be written to {folder}: {getattr(error, 'strerror', None) or error}.",
            "Free disk space and run again with --resume.",
        ) from error
    _remove(old for old in _complete(folder)[:-KEPT] if _step(old) not in milestones)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, folder / TENSORS_FILE)
    content = {"step": checkpoint.step, "state": checkpoint.state, "run": checkpoint.run}
    content["sha256"] = _digest(content, folder / TENSORS_FILE)
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    for path in (folder / TENSORS_FILE, folder / STATE_FILE, folder):
        _flush(path)


def _digest(content: dict[str, Any], tensors: Path) -> str:
    """Sha256 of the tensors' file and of the rest of the state together."""
    with tensors.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(json.dumps(content, sort_keys=True).encode())
    return digest.hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(folder: Path, run: dict[str, Any], warn: Callable[[str], None] = lambda _: None) -> Checkpoint | None:
    """The newest whole checkpoint; None when there is none.

    Args:
        folder: where `save` wrote.
        run: what this run was started with.
        warn: hears of each damaged checkpoint that is passed over.

    Raises:
        CheckpointError: every checkpoint is damaged, or they belong to another run (naming what differs).
    """
    folders = _complete(folder)
    for path in reversed(folders):
        checkpoint = _read(path)
        if checkpoint is not None:
            _refuse_other_run(checkpoint, run)
            return checkpoint
        warn(f"Checkpoint {path.name} is damaged and was passed over.")
    if folders:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged.", "Remove the folder, or leave --resume out, to start anew."
        )
    return None


def at_step(folder: Path, step: int, run: dict[str, Any]) -> Checkpoint:
    """The checkpoint of one step.

    Raises:
        CheckpointError: it is missing or damaged, or belongs to another run.
    """
    checkpoint = _read(folder / f"{_PREFIX}{step:08d}")
    if checkpoint is None:
        raise CheckpointError(
            f"the checkpoint of step {step} in {folder} is missing or damaged, and the fine-tune has to go back to it.",
            "Leave --resume out to start anew.",
        )
    _refuse_other_run(checkpoint, run)
    return checkpoint


def _complete(folder: Path) -> list[Path]:
    found = (path for path in folder.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdecimal())
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _read(folder: Path) -> Checkpoint | None:
    """None when the checkpoint is damaged."""
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if content.pop("sha256") != _digest(content, folder / TENSORS_FILE):
            return None
        return Checkpoint(tensors=load_file(folder / TENSORS_FILE), **content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError):
        return None


def _refuse_other_run(checkpoint: Checkpoint, run: dict[str, Any]) -> None:
    wanted = json.loads(json.dumps(run))
    differing = sorted(
        key for key in checkpoint.run.keys() | wanted.keys() if checkpoint.run.get(key) != wanted.get(key)
    )
    if differing:
        changes = ", ".join(f"{key} ({checkpoint.run.get(key)!r} then, {wanted.get(key)!r} now)" for key in differing)
        raise CheckpointError(
            f"the checkpoints belong to another run: {changes}.",
            "Resume with the same options, or leave --resume out to start anew.",
        )


def clear(folder: Path) -> None:
    """Remove every checkpoint, whole or half-written."""
    _remove([*_complete(folder), *folder.glob(f"{_PARTIAL}*")])


def _remove(folders: Iterable[Path]) -> None:
    """Remove folders as far as the file system lets us: what stays behind is never taken for a newer state."""
    for path in folders:
        shutil.rmtree(path, ignore_errors=True)
