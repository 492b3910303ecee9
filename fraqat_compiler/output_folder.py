"""The output folder of a compile: locked while one runs, and never left with a half-written result that looks whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO

from fraqat_compiler.errors import OutputError

MAKER = "fraqat_compiler"  # as the manifest says, so that another tool's is not taken for ours
MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".fraqat.lock"
STAGING = ".fraqat.staging"
RESULTS_FILE = ".fraqat.results"
CHECKPOINTS = "checkpoints"
REMOTE_JOBS = "remote_jobs"
REPRODUCER = "reproducer"
LOGS = "logs"
SIMULATION_FILE = "simulation.json"
SENSITIVITY_FILE = "sensitivity.json"
BOOKKEEPING = (
    *(MANIFEST_FILE, LOCK_FILE, STAGING, RESULTS_FILE, CHECKPOINTS, REMOTE_JOBS, REPRODUCER, LOGS),
    SENSITIVITY_FILE,
)
_DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file would exceed the limit on its size",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "it may not be written",
    errno.EPERM: "it may not be written",
}


class OutputFolder:
    """A context manager over the output folder of one compile.

    Results are written to `staging` and moved to their place by `commit`, the manifest last: a folder with a manifest
    is whole. What an earlier compile left stays until then; files that no compile wrote stay for ever. Checkpoints are
    the fine-tune's own, remote jobs the target's and sensitivities the assignment's; they outlive a compile that fails,
    and so do the logs (`*.log`) in its `staging`, moved to `logs`.

    Args:
        path: the folder; made when missing.

    Raises:
        OutputError: in use by another compile, not writable, or full of something that is not ours.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.staging = self.path / STAGING
        self.checkpoints = self.path / CHECKPOINTS
        self.remote_jobs = self.path / REMOTE_JOBS
        self.sensitivity = self.path / SENSITIVITY_FILE
        self.reproducer = self.path / REPRODUCER
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
        present = sorted(entry.name for entry in self.path.iterdir())
        if present and LOCK_FILE not in present and not _is_manifest(self.path / MANIFEST_FILE):
            raise OutputError(
                f"{self.path} holds files that no compile wrote ({present[0]}, ...).", "Name a new or empty folder."
            )
        self._lock = self._locked()
        shutil.rmtree(self.path / LOGS, ignore_errors=True)
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir()

    def _locked(self) -> IO[str]:
        lock = (self.path / LOCK_FILE).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise OutputError(
                f"{self.path} is in use by another compile.", "Wait for it, or name another folder."
            ) from None
        return lock

    def commit(self) -> Path:
        """Move the results to their place, in the order that leaves no lie behind; returns the folder.

        The names of old and new results are noted first: should this be cut off, the next commit removes them all.
        """
        new = sorted(file.relative_to(self.staging).as_posix() for file in self.staging.rglob("*") if file.is_file())
        old = self._old_results()
        (self.staging / RESULTS_FILE).write_text(json.dumps(sorted({*old, *new})), encoding="utf-8")
        os.replace(self.staging / RESULTS_FILE, self.path / RESULTS_FILE)
        for name in [MANIFEST_FILE, *sorted(old - {MANIFEST_FILE})]:
            (self.path / name).unlink(missing_ok=True)
        for name in sorted(new, key=lambda name: name == MANIFEST_FILE):
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.staging / name, self.path / name)
        (self.path / RESULTS_FILE).unlink()
        shutil.rmtree(self.reproducer, ignore_errors=True)
        return self.path

    def _old_results(self) -> set[str]:
        """What an earlier compile wrote, a commit that was cut off included."""
        if (self.path / RESULTS_FILE).is_file():
            return set(json.loads((self.path / RESULTS_FILE).read_text(encoding="utf-8")))
        if not _is_manifest(self.path / MANIFEST_FILE):
            return set()
        files = json.loads((self.path / MANIFEST_FILE).read_text(encoding="utf-8"))["files"]
        return {name for name in files if (self.path / name).resolve().is_relative_to(self.path)}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._keep_logs(error)
        shutil.rmtree(self.staging, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, OSError) and error.errno in _DISK_ERRORS and self._concerns(error):
            raise self._refusal(error) from error

    def _keep_logs(self, error: BaseException) -> None:
        """What a library printed before it failed is the user's to read."""
        for log in sorted(self.staging.rglob("*.log")):
            kept = self.path / LOGS / log.name
            kept.parent.mkdir(exist_ok=True)
            os.replace(log, kept)
            error.add_note(f"the log is in {kept}")

    def _concerns(self, error: OSError) -> bool:
        """A full disk may come without a name; a refusal elsewhere is another matter."""
        return error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(self.path)

    def _refusal(self, error: OSError) -> OutputError:
        cause = _DISK_ERRORS.get(error.errno or 0, error.strerror or str(error))
        return OutputError(
            f"the output folder {self.path} cannot be used: {cause}.",
            "Free space or name another folder with -o; --resume goes on from the last checkpoint.",
        )


def _is_manifest(path: Path) -> bool:
    """Whether a file is the manifest of a compile, and not another tool's of that name."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["made_by"] == MAKER)
    except (OSError, ValueError, KeyError, TypeError):
        return False
