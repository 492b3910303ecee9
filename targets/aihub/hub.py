"""Qualcomm AI Hub through its own client, `qai_hub`: silent, and with errors that never hold the token."""

from __future__ import annotations

import difflib
import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import qai_hub
from numpy.typing import NDArray
from qai_hub import public_rest_api
from qai_hub.client import RateLimitedError
from requests import RequestException

from fraqat_compiler.errors import TargetError
from fraqat_compiler.target import Arrays

T = TypeVar("T")
CONFIGURE = "qai-hub configure --api_token TOKEN"
NO_TOKEN = (
    "no API token is configured: copy yours from Settings at https://workbench.aihub.qualcomm.com,\n"
    f"then run {CONFIGURE}"
)
PAGE = 50  # job summaries asked for at once
CLOCKS_DIFFER = 3600  # seconds by which AI Hub's clock may be behind ours
_REPEATING = "retry_call_with_backoff"  # the client's function around each POST
_BOX = re.compile(r"[┌─┐└┘|]+")  # the client frames its messages


class HubError(TargetError):
    """AI Hub refused."""


class NotFoundError(HubError):
    """AI Hub does not know the id, or not under this account."""


class AwayError(HubError):
    """AI Hub is busy or out of reach; it may take the same request later."""


def missing_token() -> str | None:
    """What to do where the client is not configured; None where it is."""
    try:
        token = qai_hub.Client().config.api_token
    except Exception:  # whichever way the client dislikes its file, the remedy is the same
        return NO_TOKEN
    return None if token.strip() else NO_TOKEN


class Hub:
    """The calls that the target makes.

    Raises:
        HubError: by every method, with what AI Hub said.
    """

    def __init__(self) -> None:
        self._client = qai_hub.Client()
        self._token = self._client.config.api_token
        self._client.set_verbose(False)

    def ask(self, what: str, action: Callable[[], T]) -> T:
        """Do something with the client, which prints on stdout and whose errors are its own.

        Args:
            what: the action in words, as in "upload the model".
            action: what to do.
        """
        try:
            with redirect_stdout(io.StringIO()):
                return action()
        except Exception as error:
            if isinstance(error, OSError) and not isinstance(error, RequestException):
                raise  # a full disk is not AI Hub's
            failure = self._failure(what, error)
        raise failure  # here it has no context, which could hold the token

    def _failure(self, what: str, error: Exception) -> HubError:
        said = self.redacted(" ".join(_BOX.sub(" ", str(error)).split())) or type(error).__name__
        text = f"AI Hub could not {what}: {said.rstrip('.')}."
        if isinstance(error, RateLimitedError | qai_hub.InternalError | RequestException):
            return AwayError(text, "Try again later with --resume: what was sent is not sent twice.")
        if "could not be found" in said:
            return NotFoundError(text)
        return HubError(text, f"Set a valid token: {CONFIGURE}" if "authenticate" in said else None)

    def redacted(self, text: str) -> str:
        """The text without the token, which the client's frames may have broken into lines."""
        broken = r"\s*".join(map(re.escape, self._token))
        return re.sub(broken, "[token]", text) if self._token else text

    def require_device(self, name: str) -> None:
        """Refuse a name that is no device's."""
        if self.ask("list its devices", lambda: self._client.get_devices(name)):
            return
        known = sorted({device.name for device in self.ask("list its devices", self._client.get_devices)})
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise HubError(
            f"AI Hub has no device {name!r}.", f"Near: {', '.join(near)}." if near else "See qai-hub list-devices."
        )

    def upload_model(self, path: Path) -> str:
        """Id of a model, an .onnx file or a .zip of a folder with one."""
        return self.ask("take the model", lambda: self._client.upload_model(str(path)).model_id)

    def knows_model(self, model_id: str) -> bool:
        """Whether a model of that id is still there."""
        return self._knows("find the model", lambda: self._client.get_model(model_id))

    def upload_samples(self, samples: Sequence[Arrays]) -> str:
        """Id of a dataset with these inputs."""
        entries = {name: [np.ascontiguousarray(sample[name]) for sample in samples] for name in samples[0]}
        return self.ask("take the inputs", lambda: self._client.upload_dataset(entries, name="inputs").dataset_id)

    def knows_samples(self, dataset_id: str) -> bool:
        """Whether a dataset of that id is still there; AI Hub drops it after 30 days."""
        return self._knows(
            "find the inputs", lambda: self._client.get_dataset(dataset_id), lambda it: not it.is_expired()
        )

    def _knows(self, what: str, get: Callable[[], T], usable: Callable[[T], bool] = lambda _: True) -> bool:
        try:
            return usable(self.ask(what, get))
        except NotFoundError:
            return False

    def submit_compile(self, model_id: str, device: str, name: str, options: str) -> str:
        """Id of a new compile job; posted once."""

        def submit() -> str:
            model = self._client.get_model(model_id)
            with _posted_once():
                job = self._client.submit_compile_job(
                    model, device=qai_hub.Device(device), name=name, options=options, retry=False
                )
            return job.job_id

        return self.ask("take the compile job", submit)

    def submit_inference(
        self, model_id: str, dataset_id: str, device: str, name: str, options: str, *, profile: bool
    ) -> str:
        """Id of a new inference job; posted once."""

        def submit() -> str:
            model, inputs = self._client.get_model(model_id), self._client.get_dataset(dataset_id)
            with _posted_once():
                job = self._client.submit_inference_job(
                    model,
                    device=qai_hub.Device(device),
                    inputs=inputs,
                    name=name,
                    options=options,
                    retry=False,
                    profile=profile,
                )
            return job.job_id

        return self.ask("take the inference job", submit)

    def find(self, name: str, announced: float) -> str | None:
        """Id of the job of that name, which is not older than `announced`, in seconds since the epoch."""
        for summary in self._summaries(announced - CLOCKS_DIFFER):
            if summary.name == name:
                return str(summary.job_id)
        return None

    def _summaries(self, since: float) -> Iterator[qai_hub.JobSummary]:
        """Newest first."""
        for offset in itertools.count(0, PAGE):
            page = self.ask("list jobs", partial(self._client.get_job_summaries, offset, PAGE))
            yield from page
            if len(page) < PAGE or page[-1].date.timestamp() < since:
                return

    def job(self, job_id: str) -> qai_hub.Job:
        """The job of that id."""
        return self.ask(f"find job {job_id}", lambda: self._client.get_job(job_id))

    def download_compiled(self, job: qai_hub.CompileJob, path: Path) -> tuple[str, Path]:
        """Id of the model that a job made, and its file; the client adds the suffixes of AI Hub's name to `path`."""
        model = self.ask("name the compiled model", job.get_target_model)
        if model is None:
            raise HubError(f"AI Hub's job {job.job_id} succeeded without a model.", f"See {job.url}")
        return model.model_id, Path(self.ask("send the compiled model", lambda: model.download(str(path))))

    def outputs(self, job: qai_hub.InferenceJob) -> dict[str, list[NDArray[Any]]]:
        """What a job computed: for each output one array for each sample."""
        found = self.ask("send the outputs", job.download_output_data)
        if not isinstance(found, Mapping):
            raise HubError(f"AI Hub's job {job.job_id} succeeded without outputs.", f"See {job.url}")
        return {name: list(arrays) for name, arrays in found.items()}

    def profile(self, job: qai_hub.InferenceJob) -> dict[str, Any]:
        """What a job measured, as the client tells it."""
        return self.ask("send the profile", job.download_profile)


@contextmanager
def _posted_once() -> Iterator[None]:
    """Let the client post a job one time only.

    It posts again when an answer is late or is a 5xx, and AI Hub has no key that makes two posts one job: a slow
    answer would submit the job twice. Whoever calls looks for the job by its name before posting again.
    """
    repeating = getattr(public_rest_api, _REPEATING)
    setattr(public_rest_api, _REPEATING, lambda post: post())
    try:
        yield
    finally:
        setattr(public_rest_api, _REPEATING, repeating)
