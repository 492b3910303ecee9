"""Checkpoints of a fine-tune: safetensors and JSON in a folder each, written so that a crash never leaves half of one.

A checkpoint is written to a temporary folder, flushed to disk and renamed; only then are older ones removed. So the
newest folder with a valid digest is always whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
        tensors: parameters, optimizer state and random states by name.
        state: everything else, JSON values only.
        run: digest of what the run was started with; another run's checkpoint is refused.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    run: dict[str, Any]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint into `folder` and remove all but the last KEPT.

    Raises:
        OutputError: the disk is full or the folder cannot be written; older checkpoints stay as they were.
    """
    final = folder / f"{_PREFIX}{checkpoint.step:08d}"
    partial = folder / f"{_PARTIAL}{checkpoint.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(partial, checkpoint)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _flush(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(
            f"a checkpoint cannot be written to {folder}: {error.strerror or error}.",
            "Free disk space and run again with --resume.",
        ) from error
    for old in _complete(folder)[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.tensors.items()}
    save_file(tensors, folder / TENSORS_FILE)
    content = {
        "step": checkpoint.step,
        "state": checkpoint.state,
        "run": checkpoint.run,
        "sha256": _sha256(folder / TENSORS_FILE),
    }
    (folder / STATE_FILE).write_text(json.dumps(content, indent=1, sort_keys=True), encoding="utf-8")
    for path in (folder / TENSORS_FILE, folder / STATE_FILE, folder):
        _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def latest(folder: Path, run: dict[str, Any]) -> Checkpoint | None:
    """The newest whole checkpoint; None when there is none.

    Args:
        folder: where `save` wrote.
        run: what this run was started with.

    Raises:
        CheckpointError: every checkpoint is damaged, or they belong to another run (naming what differs).
    """
    folders = _complete(folder)
    for path in reversed(folders):
        checkpoint = _read(path)
        if checkpoint is None:
            continue
        _refuse_other_run(checkpoint, run)
        return checkpoint
    if folders:
        raise CheckpointError(
            f"every checkpoint in {folder} is damaged.", "Remove the folder, or leave --resume out, to start anew."
        )
    return None


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{_PREFIX}*") if path.is_dir())


def _read(folder: Path) -> Checkpoint | None:
    """None when the checkpoint is damaged."""
    try:
        content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if content["sha256"] != _sha256(folder / TENSORS_FILE):
            return None
        tensors = load_file(folder / TENSORS_FILE)
        return Checkpoint(int(content["step"]), tensors, dict(content["state"]), dict(content["run"]))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
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
    for path in [*folder.glob(f"{_PREFIX}*"), *folder.glob(f"{_PARTIAL}*")]:
        shutil.rmtree(path, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
