"""One folder's work on AI Hub: what is there already is taken up again, the rest is sent; then we wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qai_hub import Job, JobStatus

from fraqat_compiler.progress import Progress
from fraqat_compiler.targets.aihub.hub import AwayError, Hub, HubError, NotFoundError
from fraqat_compiler.targets.aihub.ledger import Ledger

FIRST_POLL, LONGEST_POLL, POLL_GROWTH = 0.5, 10.0, 1.3  # seconds, seconds, factor
RETRY_WAITS = (5.0, 15.0, 30.0, 60.0, 60.0)  # seconds before a job is submitted again


@dataclass(frozen=True)
class Desk:
    """Uploads and jobs, each made once.

    Attributes:
        hub: AI Hub.
        ledger: what was sent.
        progress: hears of the states of jobs.
        resume: take the results of finished jobs too; jobs that still run are taken up in any case.
    """

    hub: Hub
    ledger: Ledger
    progress: Progress
    resume: bool

    def uploaded(self, key: str, known: Callable[[str], bool], upload: Callable[[], str]) -> str:
        """Id of what has that key; uploaded unless it is there."""
        asset_id = self.ledger.upload(key)
        if asset_id is None or not known(asset_id):
            self.progress.update(0, "uploading to AI Hub")
            asset_id = upload()
            self.ledger.uploaded(key, asset_id)
        return asset_id

    def finished(self, kind: str, key: str, submit: Callable[[str], str], logs: Path | None = None) -> Job:
        """The job of that key, once it has succeeded; submitted unless it is there.

        Args:
            kind: compile, inference or profile.
            key: made from all that the job depends on.
            submit: submits it under a name, and gives its id.
            logs: folder for the logs of a job that fails.

        Raises:
            HubError: it failed, with AI Hub's reason, or AI Hub is out of reach.
        """
        job = self._taken_up(kind, key) or self._submitted(kind, key, submit)
        try:
            status = self._awaited(kind, job)
        except KeyboardInterrupt as error:
            error.add_note(f"AI Hub {kind} job {job.job_id} goes on: {job.url}")
            raise
        if not status.success:
            self.ledger.forget(key)
            raise self._failure(kind, job, status, logs)
        self.ledger.update(key, finished=True)
        return job

    def _taken_up(self, kind: str, key: str) -> Job | None:
        """The job that the ledger knows, where AI Hub knows it too."""
        entry = self.ledger.job(key)
        if entry is not None and entry.finished and not self.resume:
            self.ledger.forget(key)
            return None
        if entry is None or entry.job_id is None:
            return None
        try:
            job = self.hub.job(entry.job_id)
        except NotFoundError:
            self.ledger.forget(key)
            return None
        self.progress.note(f"AI Hub {kind} job {job.job_id} is taken up again: {job.url}")
        return job

    def _submitted(self, kind: str, key: str, submit: Callable[[str], str]) -> Job:
        try:
            job_id = self._submitted_once(kind, key, submit)
        except AwayError:
            raise  # it may have got through: its name stays in the ledger
        except HubError:
            self.ledger.forget(key)
            raise
        self.ledger.update(key, job_id=job_id)
        job = self.hub.job(job_id)
        self.progress.note(f"AI Hub {kind} job {job_id}: {job.url}")
        return job

    def _submitted_once(self, kind: str, key: str, submit: Callable[[str], str]) -> str:
        """Id of the job; where an earlier attempt may have got through, the job is looked for by its name first."""
        entry = self.ledger.job(key)
        tried = entry is not None
        entry = entry or self.ledger.announce(key, kind)
        waits = iter(RETRY_WAITS)
        while True:
            found = self.hub.find(entry.name, entry.announced) if tried else None
            if found is not None:
                return found
            try:
                return submit(entry.name)
            except AwayError as error:
                tried = True
                self._pause(next(waits, None), error)

    def _pause(self, seconds: float | None, error: AwayError) -> None:
        if seconds is None:
            raise error
        self.progress.note(f"{error.message} The next attempt is in {seconds:g} s.")
        time.sleep(seconds)

    def _awaited(self, kind: str, job: Job) -> JobStatus:
        """The final status; the client's own wait prints, and asks every ten seconds."""
        start, pause = time.monotonic(), FIRST_POLL
        while True:
            status = self.hub.ask(f"tell the state of job {job.job_id}, {job.url}", job.get_status)
            if status.finished:
                return status
            seconds = round(time.monotonic() - start)
            self.progress.update(0, f"AI Hub: {status.code} for {seconds} s, {job.url}")
            time.sleep(pause)
            pause = min(pause * POLL_GROWTH, LONGEST_POLL)

    def _failure(self, kind: str, job: Job, status: JobStatus, logs: Path | None) -> HubError:
        reason = (status.message or "it gave no reason").strip().rstrip(".")
        failure = HubError(f"AI Hub's {kind} job {job.job_id} failed: {self.hub.redacted(reason)}.", f"See {job.url}")
        if logs is not None:
            try:
                self.hub.ask("send the log", lambda: job.download_job_logs(str(logs)))
            except HubError as error:  # the reason of the failure matters more
                failure.add_note(str(error))
        return failure
