"""The output folder of a compile: locked while one runs, and never left with a half-written result that looks whole."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from fraqat_compiler.errors import OutputError

MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
STAGING = ".staging"
CHECKPOINTS = "checkpoints"
REPRODUCER = "reproducer"
_OURS = {MANIFEST_FILE, LOCK_FILE, STAGING, CHECKPOINTS, REPRODUCER}
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written",
    errno.EPERM: "it may not be written",
}


class OutputFolder:
    """A context manager over the output folder of one compile.

    Results are written to `staging` and moved to their place by `commit`, the manifest last: a folder with a manifest
    is whole. What an earlier compile left stays until then.

    Args:
        path: the folder; made when missing.
        resume: keep the checkpoints of an interrupted compile.

    Raises:
        OutputError: in use by another compile, read-only, or full of something that is not ours.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path.resolve()
        self.staging = self.path / STAGING
        self.checkpoints = self.path / CHECKPOINTS
        self.reproducer = self.path / REPRODUCER
        self._resume = resume
        self._lock: IO[str] | None = None

    def __enter__(self) -> OutputFolder:
        try:
            self._open()
        except OSError as error:
            raise self._refusal(error) from error
        return self

    def _open(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path} is a file.", "Name a folder with -o.")
        self.path.mkdir(parents=True, exist_ok=True)
        present = {entry.name for entry in self.path.iterdir()}
        if present and not present & _OURS:
            raise OutputError(
                f"{self.path} holds files that no compile wrote ({sorted(present)[0]}, ...).", "Name an empty folder."
            )
        self._take_lock()
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir()
        shutil.rmtree(self.reproducer, ignore_errors=True)
        if not self._resume:
            shutil.rmtree(self.checkpoints, ignore_errors=True)

    def _take_lock(self) -> None:
        self._lock = (self.path / LOCK_FILE).open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise OutputError(
                f"{self.path} is in use by another compile.", "Wait for it, or name another folder."
            ) from None

    def commit(self) -> Path:
        """Move the results to their place, in the order that leaves no lie behind; returns the folder."""
        (self.path / MANIFEST_FILE).unlink(missing_ok=True)
        self._remove_old_results()
        files = sorted(path for path in self.staging.rglob("*") if path.is_file())
        for file in sorted(files, key=lambda path: path.name == MANIFEST_FILE):
            place = self.path / file.relative_to(self.staging)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
        return self.path

    def _remove_old_results(self) -> None:
        for entry in self.path.iterdir():
            if entry.name in _OURS:
                continue
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.staging, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> OutputError:
        cause = _DISK_ERRORS.get(error.errno or 0, error.strerror or str(error))
        return OutputError(
            f"the output folder {self.path} cannot be used: {cause}.",
            "Free space or name another folder with -o; --resume goes on from the last checkpoint.",
        )
