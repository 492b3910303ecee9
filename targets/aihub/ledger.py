"""What was sent to AI Hub, written down before and after each step, so that nothing has to be sent again."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fraqat_compiler.errors import TargetError


@dataclass(frozen=True)
class Entry:
    """A job that was submitted, or was about to be.

    Attributes:
        name: of the job, unique: where its id is not known, it is found by it.
        announced: when it was about to be submitted, in seconds since the epoch.
        job_id: AI Hub's; None until it has answered.
        finished: it has succeeded.
    """

    name: str
    announced: float
    job_id: str | None = None
    finished: bool = False


class Ledger:
    """Ids of uploads and of jobs, under keys that are made from the content.

    Args:
        file: where they are kept; None keeps them in memory.

    Raises:
        TargetError: the file is damaged.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._uploads: dict[str, str] = {}
        self._jobs: dict[str, Entry] = {}
        if file is not None and file.exists():
            self._read(file)

    def _read(self, file: Path) -> None:
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            self._uploads = {str(key): str(upload) for key, upload in content["uploads"].items()}
            self._jobs = {str(key): Entry(**entry) for key, entry in content["jobs"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TargetError(
                f"{file} is damaged: {type(error).__name__}: {error}.", "Remove it; jobs are then submitted anew."
            ) from error

    def upload(self, key: str) -> str | None:
        """Id of what was uploaded under that key."""
        return self._uploads.get(key)

    def uploaded(self, key: str, asset_id: str) -> None:
        """Keep the id of an upload that is complete."""
        self._uploads[key] = asset_id
        self._write()

    def job(self, key: str) -> Entry | None:
        """The job of that key."""
        return self._jobs.get(key)

    def announce(self, key: str, kind: str) -> Entry:
        """Choose the name of a job that is about to be submitted."""
        return self._put(key, Entry(f"fraqat-{kind}-{secrets.token_hex(8)}", time.time()))

    def update(self, key: str, **changes: Any) -> Entry:
        """Change what is known of a job."""
        return self._put(key, dataclasses.replace(self._jobs[key], **changes))

    def forget(self, key: str) -> None:
        """Let the job of that key be submitted anew."""
        self._jobs.pop(key, None)
        self._write()

    def _put(self, key: str, entry: Entry) -> Entry:
        self._jobs[key] = entry
        self._write()
        return entry

    def _write(self) -> None:
        """Replace the file by a whole one, on the disk before anything else happens."""
        if self._file is None:
            return
        jobs = {key: dataclasses.asdict(entry) for key, entry in self._jobs.items()}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        with partial.open("w", encoding="utf-8") as stream:
            json.dump({"schema_version": 1, "uploads": self._uploads, "jobs": jobs}, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(self._file)
