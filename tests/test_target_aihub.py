"""The AI Hub target through the unmodified client, against the project's own server, whose work is real."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

pytest.importorskip("qai_hub", reason="the extra aihub is not installed")

from aihub_server import TOKEN, AiHubServer, Fault

from fraqat_compiler import parity
from fraqat_compiler.cli import app
from fraqat_compiler.conformance import check_target
from fraqat_compiler.doctor import SMALL_MODEL, diagnose
from fraqat_compiler.errors import TargetError, UsageError
from fraqat_compiler.progress import Progress
from fraqat_compiler.registry import parse_target
from fraqat_compiler.target import TensorRequest
from fraqat_compiler.targets.aihub import AiHubTarget, desk
from fraqat_compiler.targets.aihub.profile_detail import read_profile
from fraqat_compiler.targets.htp import HtpTarget

pytestmark = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))

SAMPLE = {"x": np.linspace(-6, 6, 16, dtype=np.float32).reshape(1, 16)}
JOB = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

def example_inputs():
    return (torch.zeros(1, 16),)

def calibration_data():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(1, 16, generator=generator),) for _ in range(3)]
"""


class Heard(Progress):
    """Keeps what progress is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.details: list[str] = []

    def update(self, done: int, detail: str = "") -> None:
        self.details.append(detail)

    def note(self, message: str) -> None:
        self.notes.append(message)


class Interrupted(Heard):
    """Ctrl-C once the state of a job is told."""

    def update(self, done: int, detail: str = "") -> None:
        if "OPTIMIZING_MODEL" in detail:
            raise KeyboardInterrupt


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of our own, so that nobody's token is used."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("QAIHUB_CLIENT_INI", raising=False)
    return folder


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[AiHubServer]:
    monkeypatch.setattr(desk, "FIRST_POLL", 0.05)
    monkeypatch.setattr(desk, "RETRY_WAITS", (0.1, 0.1))
    running = AiHubServer()
    running.configure(home)
    yield running
    running.close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(parser.parse_model(SMALL_MODEL), path)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    folder = tmp_path / "output"
    folder.mkdir()
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "remote_jobs"


def opened(kept: Path, progress: Progress | None = None, *, resume: bool = False, device: str = "") -> AiHubTarget:
    target = AiHubTarget(device) if device else AiHubTarget()
    return target.opened(kept, progress or Progress(), resume)


def until(holds: Callable[[], object], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def everything_said(error: BaseException) -> str:
    """The text of an error and of all that hangs on it, suppressed contexts included."""
    texts, seen = [], [error]
    for one in seen:
        texts += ["".join(traceback.format_exception(one)), repr(one), *getattr(one, "__notes__", [])]
        seen += [other for other in (one.__cause__, one.__context__) if other is not None and other not in seen]
    return "\n".join(texts)


# The contract


def test_the_target_keeps_the_contract(server: AiHubServer, capfd: pytest.CaptureFixture[str]) -> None:
    results = {result.rule: result.detail for result in check_target(AiHubTarget())}
    assert results["profile says where its figures come from"].startswith("source device")
    assert server.uploads == 2  # the model, compiled twice, and the damaged binary
    assert capfd.readouterr().out == ""  # the client prints "Downloaded model to" at each


def test_numerics_are_those_of_the_htp_target() -> None:
    target, htp = AiHubTarget(), HtpTarget(soc="sm8750")
    request = TensorRequest("softmax", "activation", (1, 256), 8, 8)
    assert target.quant_spec(request) == htp.quant_spec(request)
    assert target.lower_pipeline() == htp.lower_pipeline()
    assert target.prepare_pipeline() == htp.prepare_pipeline()


def test_the_text_names_a_device() -> None:
    target = parse_target('aihub{device="Samsung Galaxy S24" options="--qairt_version 2.42"}')
    assert target == AiHubTarget("Samsung Galaxy S24", "--qairt_version 2.42")
    with pytest.raises(UsageError, match="unknown SoC or device 'Galaxy S99'"):
        parse_target('aihub{device="Galaxy S99"}')


def test_without_the_local_library_what_is_not_asked_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HtpTarget, "missing", classmethod(lambda cls: "the HTP compiler exists for Linux only."))
    verdicts = {finding.op: finding for finding in AiHubTarget().check(model)}
    assert verdicts["Relu"].verdict == "runs"
    assert "not asked" in verdicts["Relu"].reason


def test_inputs_that_do_not_fit_are_refused_before_anything_is_sent(
    server: AiHubServer, model: Path, output: Path
) -> None:
    artifact = AiHubTarget().compile(model, output)
    for inputs in ({}, {"x": SAMPLE["x"][:, :4]}, {"x": SAMPLE["x"].astype(str)}, {"y": SAMPLE["x"]}):
        with pytest.raises(TargetError, match="input"):
            AiHubTarget().run(artifact, inputs)
    assert not server.datasets
    with pytest.raises(TargetError, match=r"was built for SM8750 \(v79\), not for Samsung Galaxy S24"):
        AiHubTarget("Samsung Galaxy S24").load(output, "aihub")


def test_samples_share_a_job_and_equal_what_onnxruntime_computes(
    server: AiHubServer, model: Path, output: Path, kept: Path
) -> None:
    target = opened(kept)
    artifact = target.compile(model, output)
    samples = [{"x": SAMPLE["x"] * factor} for factor in (1.0, 0.5, 0.1)]
    runner = parity.onnx_runner(model, optimized=False)
    for actual, sample in zip(target.run_all(artifact, samples), samples, strict=True):
        assert np.abs(actual["y"] - runner(sample)["y"]).max() <= 0.05 + 1e-6
    assert len(server.jobs_of("inference")) == 1
    assert server.uploads == 1  # the binary is at AI Hub already


def test_a_binary_that_says_nothing_of_itself_is_left_to_the_device(
    server: AiHubServer, model: Path, output: Path
) -> None:
    AiHubTarget().compile(model, output)
    (output / "aihub_context_qnn.bin").write_bytes(b"no binary")
    artifact = AiHubTarget().load(output, "aihub")
    assert artifact.details["soc"] is None
    with pytest.raises(TargetError, match=r"AI Hub's inference job j\w+ failed: .*aihub_context|htp_context"):
        AiHubTarget().run(artifact, SAMPLE)


def test_weights_beside_the_model_travel_with_it(server: AiHubServer, output: Path, tmp_path: Path) -> None:
    """Uploaded as an archive of a folder, which the client takes for one model."""
    model = parser.parse_model(SMALL_MODEL.replace("Relu (x_dq)", "Add (x_dq, w_dq)"))
    weights = np.random.default_rng(0).integers(0, 255, (1, 16), dtype=np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(weights, "w"))
    model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w", "scale", "zero_point"], ["w_dq"], name="w"))
    folder = tmp_path / "large"
    folder.mkdir()
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=8)
    assert (folder / "model.onnx.data").stat().st_size >= 16
    artifact = AiHubTarget().compile(path, output)
    (uploaded,) = (model for model in server.models.values() if not model.producer_id)
    assert uploaded.is_directory
    expected = parity.onnx_runner(path, optimized=False)(SAMPLE)["y"]
    assert np.abs(AiHubTarget().run(artifact, SAMPLE)["y"] - expected).max() <= 0.05 + 1e-6


# Accounts


def test_without_a_token_two_lines_say_what_to_do(home: Path) -> None:
    missing = AiHubTarget.missing()
    assert missing is not None and len(missing.splitlines()) == 2
    assert missing.endswith("qai-hub configure --api_token TOKEN")
    (row,) = (row for row in diagnose() if (row.area, row.name) == ("target", "aihub"))
    assert (row.status, row.detail) == ("missing", missing)


def test_with_a_token_nothing_is_missing(server: AiHubServer) -> None:
    assert AiHubTarget.missing() is None
    (row,) = (row for row in diagnose() if (row.area, row.name) == ("target", "aihub"))
    assert row.status == "ok"
    assert server.site.log == []  # the doctor tells nobody that it was here


def test_a_token_that_is_not_accepted(server: AiHubServer, home: Path, model: Path, output: Path) -> None:
    token = "s3cr3t" * 6
    server.configure(home, token)
    with pytest.raises(TargetError, match="API token") as caught:
        AiHubTarget().compile(model, output)
    assert "qai-hub configure" in str(caught.value)
    assert token not in everything_said(caught.value)
    assert not list(output.iterdir())


@pytest.mark.parametrize("status", [400, 403, 500])
def test_an_answer_with_the_token_in_it_is_not_passed_on(
    server: AiHubServer, model: Path, output: Path, kept: Path, status: int
) -> None:
    body = json.dumps({"detail": f"token {TOKEN} may not do this"})
    server.site.faults += [Fault("POST", "/jobs/$", "status", status, body, times=9)]
    with pytest.raises(TargetError) as caught:
        opened(kept).compile(model, output)
    assert TOKEN not in everything_said(caught.value)
    assert ("[token] may not do this" in str(caught.value)) == (status < 500)
    assert TOKEN not in "".join(path.read_text() for path in kept.iterdir())


def test_a_failure_s_reason_does_not_pass_the_token_on(
    server: AiHubServer, model: Path, output: Path, kept: Path
) -> None:
    server.failures.append(f"the job of {TOKEN} ran out of time")
    with pytest.raises(TargetError, match=r"the job of \[token\] ran out of time") as caught:
        opened(kept).compile(model, output)
    assert TOKEN not in everything_said(caught.value)


def test_a_device_that_ai_hub_does_not_have(server: AiHubServer, model: Path, output: Path, kept: Path) -> None:
    with pytest.raises(TargetError, match=r"no device 'Samsung Galaxy S24 Ultra'. Near: .*Samsung Galaxy S24,"):
        opened(kept, device="Samsung Galaxy S24 Ultra").compile(model, output)
    assert server.uploads == 0


# Trouble on the way


@pytest.mark.parametrize(
    "fault",
    [
        Fault("POST", "/jobs/$", "status", 429, '{"detail": "Too many jobs."}'),
        Fault("POST", "/jobs/$", "status", 503),
        Fault("POST", "/jobs/$", "lost"),
        Fault("POST", "/jobs/$", "slow", seconds=1.0),
        Fault("POST", "/models/$", "status", 502),
        Fault("GET", "/jobs/j[^/]*/$", "status", 500),
        Fault("GET", "/jobs/j[^/]*/$", "lost"),
        Fault("GET", "/devices/$", "status", 429),
    ],
    ids=lambda fault: f"{fault.method}{fault.path.strip('$')}-{fault.kind}-{fault.status}",
)
def test_what_passes_is_waited_out_and_nothing_is_submitted_twice(
    server: AiHubServer, model: Path, output: Path, kept: Path, fault: Fault
) -> None:
    """The job fails, which costs no compile; one job has come to AI Hub, and its end is heard of."""
    server.site.faults.append(dataclasses.replace(fault))
    server.failures.append("no device was free")
    with pytest.raises(TargetError, match=r"compile job j\w+ failed: no device was free. See http") as caught:
        opened(kept).compile(model, output)
    assert len(server.jobs) == server.uploads == 1
    assert next(iter(server.jobs)) in str(caught.value)


@pytest.mark.parametrize("kind", ["cut", "status"])
def test_an_upload_that_breaks_off_is_repeated_from_there(
    server: AiHubServer, output: Path, tmp_path: Path, kind: str
) -> None:
    """The second of several parts; the server puts them together and compiles them."""
    server.storage.site.faults.append(Fault("PUT", "/1$", kind, 503))
    path = tmp_path / "many.onnx"
    model = parser.parse_model(SMALL_MODEL)
    model.doc_string = "long " * 2000
    onnx.save(model, path)
    AiHubTarget().compile(path, output)
    assert server.storage.site.count("PUT", "/1$") == 2
    assert server.storage.site.count("PUT", "/0$") == 1
    assert server.uploads == 1


def test_a_service_that_stays_away_is_told_and_resumed(
    server: AiHubServer, model: Path, output: Path, kept: Path
) -> None:
    server.site.faults.append(Fault("POST", "/jobs/$", "status", 503, times=3))
    heard = Heard()
    with pytest.raises(TargetError, match=r"could not take the compile job: .*unavailable.* --resume"):
        opened(kept, heard).compile(model, output)
    assert len([note for note in heard.notes if "next attempt" in note]) == 2
    assert not server.jobs
    opened(kept, resume=True).compile(model, output)
    assert len(server.jobs) == server.uploads == 1


def test_a_failed_job_says_why_keeps_its_log_and_may_be_submitted_again(
    server: AiHubServer, model: Path, output: Path, kept: Path
) -> None:
    server.failures.append("the graph has an op that QAIRT 2.42 does not know")
    with pytest.raises(TargetError, match=r"an op that QAIRT 2\.42 does not know"):
        opened(kept).compile(model, output)
    (log,) = output.iterdir()
    assert log.suffix == ".log" and log.read_bytes() == b"the log of AI Hub\n"
    opened(kept, resume=True).compile(model, output)
    assert (len(server.jobs), server.uploads) == (2, 1)


# Taking up again


def test_ctrl_c_leaves_the_job_and_the_next_attempt_takes_it_up(
    server: AiHubServer, model: Path, output: Path, kept: Path
) -> None:
    server.gate.clear()
    with pytest.raises(KeyboardInterrupt) as caught:
        opened(kept, Interrupted()).compile(model, output)
    (job_id,) = server.jobs
    assert f"job {job_id} goes on: {server.site.url}/jobs/{job_id}/" in caught.value.__notes__[0]
    assert not list(output.iterdir())
    server.gate.set()
    heard = Heard()
    artifact = opened(kept, heard).compile(model, output)
    assert artifact.details["soc"] == "SM8750"
    assert heard.notes == [f"AI Hub compile job {job_id} is taken up again: {server.site.url}/jobs/{job_id}/"]
    assert len(server.jobs) == server.uploads == 1


def test_waiting_tells_the_state_and_the_address(server: AiHubServer, model: Path, output: Path, kept: Path) -> None:
    heard = Heard()
    opened(kept, heard).compile(model, output)
    (job_id,) = server.jobs
    url = f"{server.site.url}/jobs/{job_id}/"
    assert heard.notes == [f"AI Hub compile job {job_id}: {url}"]
    assert [detail for detail in heard.details if detail.startswith("AI Hub: OPTIMIZING_MODEL") and url in detail]


def test_results_of_finished_jobs_are_taken_on_resume_alone(
    server: AiHubServer, model: Path, output: Path, kept: Path
) -> None:
    artifact = opened(kept).compile(model, output)
    opened(kept, resume=True).compile(model, output)
    first = opened(kept).profile(artifact, SAMPLE)
    assert opened(kept, resume=True).profile(artifact, SAMPLE) == first
    assert (len(server.jobs_of("compile")), len(server.jobs_of("profile"))) == (1, 1)
    opened(kept).profile(artifact, SAMPLE)  # asked for anew, measured anew
    assert (len(server.jobs_of("profile")), server.uploads) == (2, 1)


def test_what_ai_hub_has_forgotten_is_sent_again(server: AiHubServer, model: Path, output: Path, kept: Path) -> None:
    opened(kept).compile(model, output)
    server.jobs.clear()
    server.models.clear()
    artifact = opened(kept, resume=True).compile(model, output)
    assert len(server.jobs) == server.uploads == 1
    assert opened(kept).load(output, artifact.target_text) == artifact


def test_a_damaged_ledger_is_named(server: AiHubServer, kept: Path) -> None:
    kept.mkdir()
    (kept / "aihub.json").write_text("{")
    with pytest.raises(TargetError, match=r"aihub\.json is damaged"):
        opened(kept)


def script(kept: Path, model: Path, output: Path) -> subprocess.Popen[bytes]:
    """A compile in a process that can be killed."""
    program = f"""
from pathlib import Path
from fraqat_compiler.progress import Progress
from fraqat_compiler.targets.aihub import AiHubTarget
AiHubTarget().opened(Path({str(kept)!r}), Progress(), False).compile(Path({str(model)!r}), Path({str(output)!r}))
"""
    return subprocess.Popen([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def test_killed_before_the_job_s_id_arrived_it_is_found_by_its_name(
    server: AiHubServer, model: Path, output: Path, kept: Path
) -> None:
    server.site.faults.append(Fault("POST", "/jobs/$", "slow", seconds=3))
    running = script(kept, model, output)
    until(lambda: server.jobs)
    running.kill()
    running.wait()
    (entry,) = json.loads((kept / "aihub.json").read_text())["jobs"].values()
    assert entry["job_id"] is None
    opened(kept, resume=True).compile(model, output)
    assert len(server.jobs) == server.uploads == 1


@pytest.fixture
def fraqat(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit status, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            app([str(argument) for argument in arguments], prog_name="fraqat")
        assert isinstance(left.value.code, int)
        return (left.value.code, *capfd.readouterr())

    return run


def test_a_compile_that_is_killed_in_mid_wait_is_resumed(
    server: AiHubServer, fraqat: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """The whole command line: kill -9 while the job runs, then Ctrl-C, then --resume, then a profile."""
    job, folder = tmp_path / "job.py", tmp_path / "out"
    job.write_text(JOB)
    command = ("compile", job, "-o", folder, "--target", "aihub", "--json")
    server.gate.clear()
    running = subprocess.Popen([sys.executable, "-m", "fraqat_compiler", *map(str, command)], **quiet())
    until(lambda: polls(server) > 1)
    running.kill()
    running.wait()

    before = polls(server)
    threading.Thread(target=interrupt_once, args=(lambda: polls(server) > before + 1,), daemon=True).start()
    status, out, err = fraqat(*command, "--resume")
    assert (status, out) == (130, ""), err
    assert "goes on: http" in err and "remote jobs are kept" in err and "--resume goes on from there" in err

    server.gate.set()
    status, out, err = fraqat(*command, "--resume")
    assert status == 0, err
    report = json.loads(out)
    assert [len(server.jobs_of(kind)) for kind in ("compile", "inference", "profile")] == [1, 1, 1]
    assert server.uploads == 1
    assert report["profile"]["source"] == "device" and report["profile"]["latency_ms"] > 0
    assert report["parity"]["target"]["max_lsb"] <= 1.001
    assert (report["target"]["soc"], report["target"]["fallback_nodes"]) == ("SM8750", 0)

    status, again, messages = fraqat("profile", folder, "--json")
    assert (status, json.loads(again)["source"]) == (0, "device")
    assert (len(server.jobs_of("profile")), server.uploads) == (2, 1)
    files = [path.read_text("latin-1") for path in folder.rglob("*") if path.is_file()]
    assert TOKEN not in "".join([out, err, again, messages, *files])


def interrupt_once(holds: Callable[[], object]) -> None:
    """Ctrl-C, pressed from another thread; also where `holds` never comes true, so that nobody waits for ever."""
    try:
        until(holds)
    finally:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def polls(server: AiHubServer) -> int:
    """How often the state of a job was asked for."""
    return server.site.count("GET", "/jobs/j[^/]*/$")


def quiet() -> dict[str, object]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}


# The page


def test_the_page_s_example_prints_what_it_says(server: AiHubServer, model: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "aihub.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    command = [sys.executable, "-c", example]
    done = subprocess.run(command, **quiet() | {"cwd": model.parent, "stdout": subprocess.PIPE, "text": True})
    assert done.stdout.splitlines() == re.findall(r"\)  # (.*)$", example, re.MULTILINE)


# Profiles


def detail(**layer: int) -> dict[str, object]:
    """As the client's `download_profile` tells it."""
    return {
        "execution_summary": {
            "estimated_inference_time": 812,
            "estimated_inference_peak_memory": 0,
            "inference_memory_peak_range": (1_000_000, 2_500_000),
        },
        "execution_detail": [
            {"name": "cast", "type": "Cast", "compute_unit": "CPU", **dict.fromkeys(layer, 0)},
            {"name": "conv", "type": "Conv", "compute_unit": "NPU", **layer},
        ],
    }


def test_a_profile_in_cycles_and_one_in_time() -> None:
    found = read_profile(detail(execution_cycles=5000), "phone", "url")
    assert (found.source, found.latency_ms, found.peak_memory_bytes) == ("device", pytest.approx(0.812), 2_500_000)
    assert (found.unit, found.ops[0]) == (
        "cycles",
        {"name": "conv", "op": "Conv", "compute_unit": "NPU", "cycles": 5000},
    )
    timed = read_profile(detail(execution_time=700), "phone", "url")
    assert (timed.unit, timed.ops[0]["ms"]) == ("ms", pytest.approx(0.7))


def test_a_profile_without_a_time_is_refused() -> None:
    with pytest.raises(TargetError, match=r"no inference time\. See url"):
        read_profile({}, "phone", "url")
