"""AI Hub's API: protobuf messages of the client's own `public_api_pb2` over HTTP."""

from __future__ import annotations

import io
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path

import h5py
from google.protobuf.message import Message
from qai_hub import public_api_pb2 as api
from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5, h5_to_dataset_entries

from aihub_server import device
from aihub_server.storage import Storage, etag
from aihub_server.web import Request, Response, Site

TOKEN = "loopback0token1of2the3tests4and5no6other"
DEVICES = ("Samsung Galaxy S25 Ultra", "Samsung Galaxy S25", "Samsung Galaxy S24", "Snapdragon X Elite CRD")
MAX_PART_SIZE = 4096
PREFIX = "/api/v1"
LOG = b"the log of AI Hub\n"


class AiHubServer:
    """The service, its storage, and what a test may look at.

    Attributes:
        jobs, models, datasets: by id, as the API tells them.
        gate: jobs wait for it before they do anything; a test may close it.
        failures: reasons with which the next jobs fail.
    """

    def __init__(self) -> None:
        self.storage = Storage()
        self.jobs: dict[str, api.Job] = {}
        self.models: dict[str, api.Model] = {}
        self.datasets: dict[str, api.Dataset] = {}
        self.results: dict[str, api.JobResult] = {}
        self.failures: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.site = Site(self._routes(), self._admit)

    def _routes(self) -> list[tuple[str, str, Callable[..., Response]]]:
        routes: dict[tuple[str, str], Callable[..., Response]] = {
            ("GET", "devices/"): self._list_devices,
            ("POST", "models/"): self._new_model,
            ("GET", "models/(\\w+)/"): self._model,
            ("GET", "models/(\\w+)/multipart_upload/"): self._model_urls,
            ("POST", "models/(\\w+)/multipart_upload/"): self._model_complete,
            ("GET", "models/(\\w+)/download/"): self._model_download,
            ("POST", "datasets/"): self._new_dataset,
            ("GET", "datasets/(\\w+)/"): self._dataset,
            ("GET", "datasets/(\\w+)/upload_url/"): self._dataset_url,
            ("PATCH", "datasets/(\\w+)/"): self._dataset_complete,
            ("GET", "datasets/(\\w+)/download_data/"): self._dataset_download,
            ("GET", "job_summaries/"): self._summaries,
            ("POST", "jobs/"): self._new_job,
            ("GET", "jobs/(\\w+)/"): self._job,
            ("GET", "jobs/(\\w+)/result/"): self._result,
            ("GET", "jobs/(\\w+)/device_runs/latest/artifact_list/(\\d+)/"): self._artifacts,
        }
        return [(method, f"{PREFIX}/{path}", action) for (method, path), action in routes.items()]

    def close(self) -> None:
        self.gate.set()
        self.site.close()
        self.storage.site.close()

    def configure(self, home: Path, token: str = TOKEN) -> None:
        """Write the client's file into a home folder."""
        folder = home / ".qai_hub"
        folder.mkdir(exist_ok=True)
        text = f"[api]\napi_token = {token}\napi_url = {self.site.url}\nweb_url = {self.site.url}\nverbose = True\n"
        (folder / "client.ini").write_text(text)

    def jobs_of(self, kind: str) -> list[str]:
        """Ids of the compile, inference or profile jobs."""
        return [job_id for job_id, job in self.jobs.items() if _kind(job) == kind]

    @property
    def uploads(self) -> int:
        """Models that were uploaded whole."""
        return sum(model.file_upload_complete and not model.producer_id for model in self.models.values())

    def _admit(self, request: Request) -> Response | None:
        if request.headers.get("Authorization") == f"token {TOKEN}":
            return None
        return Response(401, b'{"detail": "Invalid token."}')

    # Devices

    def _list_devices(self, request: Request) -> Response:
        name = request.query.get("name", "")
        found = [api.Device(name=it, os="15", attributes=["framework:onnx", "framework:qnn"]) for it in DEVICES]
        return _message(api.DeviceList(devices=[it for it in found if name in ("", it.name)]))

    # Models

    def _new_model(self, request: Request) -> Response:
        model = api.Model.FromString(request.body)
        model.model_id = _new_id("m")
        self.models[model.model_id] = model
        return _created(model.model_id)

    def _model(self, request: Request, model_id: str) -> Response:
        return _message(self.models[model_id]) if model_id in self.models else Response(404)

    def _model_urls(self, request: Request, model_id: str) -> Response:
        parts = -(-int(request.query["file_size"]) // MAX_PART_SIZE)
        urls = [self.storage.url(f"{model_id}/{part}") for part in range(parts)]
        answer = api.FileUploadResponse()
        answer.multipart_url.urls.extend(urls)
        answer.multipart_url.upload_id, answer.multipart_url.max_part_size = model_id, MAX_PART_SIZE
        return _message(answer)

    def _model_complete(self, request: Request, model_id: str) -> Response:
        etags = api.FileMultipartUploadComplete.FromString(request.body).etags
        parts = [self.storage.files.pop(f"{model_id}/{part}") for part in range(len(etags))]
        if [etag(part) for part in parts] != list(etags):
            return Response(400, b'{"detail": "the parts are not those that were uploaded"}')
        self.storage.files[model_id] = b"".join(parts)
        self.models[model_id].file_upload_complete = True
        return _created(model_id)

    def _model_download(self, request: Request, model_id: str) -> Response:
        answer = api.FileDownloadResponse()
        answer.url.url, answer.url.filename = self.storage.url(model_id), f"{self.models[model_id].name}.onnx.zip"
        return _message(answer)

    # Datasets

    def _new_dataset(self, request: Request) -> Response:
        dataset = api.Dataset.FromString(request.body)
        dataset.dataset_id = _new_id("d")
        dataset.creation_time.GetCurrentTime()
        dataset.expiration_time.FromSeconds(int(time.time()) + 30 * 24 * 3600)
        self.datasets[dataset.dataset_id] = dataset
        answer = api.CreateUpdateResponse(id=dataset.dataset_id, expiration_time=dataset.expiration_time)
        return _message(answer)

    def _dataset(self, request: Request, dataset_id: str) -> Response:
        return _message(self.datasets[dataset_id]) if dataset_id in self.datasets else Response(404)

    def _dataset_url(self, request: Request, dataset_id: str) -> Response:
        answer = api.FileUploadResponse()
        answer.url.url, answer.url.file_field_name = self.storage.url(dataset_id), "file"
        answer.url.fields["key"] = dataset_id
        return _message(answer)

    def _dataset_complete(self, request: Request, dataset_id: str) -> Response:
        self.datasets[dataset_id].file_upload_complete = True
        return _created(dataset_id)

    def _dataset_download(self, request: Request, dataset_id: str) -> Response:
        answer = api.FileDownloadResponse()
        answer.url.url, answer.url.filename = self.storage.url(dataset_id), f"dataset-{dataset_id}.h5"
        return _message(answer)

    def _columns(self, dataset_id: str) -> device.Columns:
        with h5py.File(io.BytesIO(self.storage.files[dataset_id]), "r") as file:
            return dict(h5_to_dataset_entries(file))

    def _stored(self, columns: device.Columns) -> str:
        content, dataset_id = io.BytesIO(), _new_id("d")
        with h5py.File(content, "w") as file:
            dataset_entries_to_h5(columns, file)
        self.storage.files[dataset_id] = content.getvalue()
        self.datasets[dataset_id] = api.Dataset(dataset_id=dataset_id, name="outputs", file_upload_complete=True)
        self.datasets[dataset_id].permanent = True
        return dataset_id

    # Jobs

    def _new_job(self, request: Request) -> Response:
        job, job_id = api.Job.FromString(request.body), _new_id("j")
        body = _body(job)
        body.job_state = api.JOB_STATE_CREATED
        body.creation_time.GetCurrentTime()
        if job.WhichOneof("job") == "compile_job":
            body.compile_job_id = job_id
            body.device.CopyFrom(body.devices.devices[0])
            self._seed_target_model(body, job_id)
        else:
            body.inference_job_id = job_id
        self.jobs[job_id] = job
        threading.Thread(target=self._work, args=(job_id,), daemon=True).start()
        return _created(job_id)

    def _seed_target_model(self, body: api.CompileJob, job_id: str) -> None:
        target = api.Model(
            model_id=_new_id("m"), model_type=api.MODEL_TYPE_ONNX, name=f"job_{job_id}", is_directory=True
        )
        target.producer_id = job_id
        self.models[target.model_id] = target
        body.target_model.CopyFrom(target)

    def _job(self, request: Request, job_id: str) -> Response:
        return _message(self.jobs[job_id]) if job_id in self.jobs else Response(404)

    def _summaries(self, request: Request) -> Response:
        answer = api.JobSummaryList(total_query_count=len(self.jobs))
        offset, limit = int(request.query.get("offset", 0)), int(request.query.get("limit", 50))
        for job_id, job in list(reversed(self.jobs.items()))[offset : offset + limit]:
            body, summary = _body(job), answer.job_summaries.add()
            kind = "compile_job_summary" if _kind(job) == "compile" else "inference_job_summary"
            told = getattr(summary, kind)
            told.job_id, told.name, told.job_state = job_id, body.name, body.job_state
            told.creation_time.CopyFrom(body.creation_time)
        return _message(answer)

    def _result(self, request: Request, job_id: str) -> Response:
        return _message(self.results[job_id]) if job_id in self.results else Response(404)

    def _artifacts(self, request: Request, job_id: str, kind: str) -> Response:
        self.storage.files[f"{job_id}-log"] = LOG
        answer = api.NamedArtifactDownloadURLList()
        answer.artifacts.add(url=self.storage.url(f"{job_id}-log"), filename=f"{job_id}.log")
        return _message(answer)

    def _work(self, job_id: str) -> None:
        job = self.jobs[job_id]
        body = _body(job)
        is_compile = _kind(job) == "compile"
        body.job_state = api.JOB_STATE_OPTIMIZING_MODEL if is_compile else api.JOB_STATE_PROVISIONING_DEVICE
        self.gate.wait()
        try:
            if self.failures:
                raise RuntimeError(self.failures.pop(0))
            if is_compile:
                self._compile(body)
            else:
                self._run(job_id, body)
        except Exception as error:  # whatever it is, AI Hub tells it as the reason
            body.failure_reason = str(error)
            job.available_artifacts.append(api.JOB_ARTIFACT_TYPE_HUB_LOG)
            body.job_state = api.JOB_STATE_FAILED
            return
        body.job_state = api.JOB_STATE_DONE

    def _compile(self, body: api.CompileJob) -> None:
        source, target = self.models[body.model.model_id], self.models[body.target_model.model_id]
        assert "--target_runtime precompiled_qnn_onnx" in body.options, body.options
        content = self.storage.files[source.model_id]
        archive = device.compiled(content, source.is_directory, body.device.name, target.name)
        self.storage.files[target.model_id] = archive
        target.file_upload_complete = True

    def _run(self, job_id: str, body: api.InferenceJob) -> None:
        columns, model = self._columns(body.dataset.dataset_id), self.storage.files[body.model.model_id]
        result = api.JobResult()
        result.inference_job_result.inference_job_id = job_id
        outputs = device.ran(model, body.device.name, columns)
        result.inference_job_result.output_dataset_id = self._stored(outputs)
        if body.is_profiling_on:
            result.inference_job_result.detail.CopyFrom(device.profiled(model, body.device.name, columns))
        self.results[job_id] = result


def _new_id(kind: str) -> str:
    return kind + secrets.token_hex(4)


def _body(job: api.Job) -> api.CompileJob | api.InferenceJob:
    return getattr(job, job.WhichOneof("job"))


def _kind(job: api.Job) -> str:
    if job.WhichOneof("job") == "compile_job":
        return "compile"
    return "profile" if job.inference_job.is_profiling_on else "inference"


def _message(message: Message) -> Response:
    return Response(200, message.SerializeToString(), {"Content-Type": "application/x-protobuf"})


def _created(asset_id: str) -> Response:
    answer = api.CreateUpdateResponse(id=asset_id)
    answer.creation_time.GetCurrentTime()
    return _message(answer)
