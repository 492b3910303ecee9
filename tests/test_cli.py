"""The command line as scripts see it: exit status, what is on stdout and what on stderr."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fraqat_compiler.cli import app
from fraqat_compiler.reproducer import load_model

JOB = """
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))

def example_inputs():
    return (torch.zeros(4, 16),)

def calibration_data():
    print("a job may print")
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 16, generator=generator),) for _ in range(3)]

def train_data():
    while True:
        yield (torch.randn(4, 16),)

def evaluate(run):
    return {"mean": run(torch.ones(4, 16)).mean()}
"""
COMPILE = ("--steps", "12", "--checkpoint-every", "4")


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Done]


@pytest.fixture
def fraqat(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Run a command in this process, down to its file descriptors."""

    def run(*arguments: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            app([str(argument) for argument in arguments], prog_name="fraqat")
        status = left.value.code
        assert isinstance(status, int)
        return Done(status, *capfd.readouterr())

    return run


def process(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fraqat_compiler", *(str(argument) for argument in arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a compile by the command line itself, with a fine-tune; beside it the document that it printed."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "tiny.py").write_text(JOB)
    running = process("compile", "tiny.py", *COMPILE, "--json", cwd=folder)
    out, err = running.communicate()
    assert running.returncode == 0, err
    (folder / "printed.json").write_text(out)
    (folder / "stderr.txt").write_text(err)
    return folder / "out" / "tiny"


@pytest.fixture
def job(compiled: Path) -> Path:
    return compiled.parents[1] / "tiny.py"


def test_compile_prints_the_report_alone_on_stdout(compiled: Path) -> None:
    printed = json.loads((compiled.parents[1] / "printed.json").read_text())
    assert printed == json.loads((compiled / "report.json").read_text())
    assert "a job may print" in (compiled.parents[1] / "stderr.txt").read_text()


def test_no_result_names_this_machine(compiled: Path) -> None:
    names = [str(compiled.parents[1]), os.uname().nodename]
    results = [path for path in compiled.iterdir() if path.is_file()]
    assert len(results) >= 6
    found = [(path.name, name) for path in results for name in names if name.encode() in path.read_bytes()]
    assert found == []


def test_the_same_inputs_give_the_same_bytes(fraqat: Cli, compiled: Path, job: Path, tmp_path: Path) -> None:
    done = fraqat("compile", job, "-o", tmp_path / "again", *COMPILE)
    assert done.status == 0
    assert str(tmp_path / "again" / "report.html") in done.out
    same = fraqat("diff", compiled, tmp_path / "again")
    assert (same.status, "the same" in same.out) == (0, True)


def test_diff_names_what_differs(fraqat: Cli, compiled: Path, job: Path, tmp_path: Path) -> None:
    assert fraqat("compile", job, "-o", tmp_path / "b", "--weights", "8,2=4", "--steps", "0").status == 0
    done = fraqat("diff", compiled, tmp_path / "b", "--json")
    keys = {row["key"]: (row["first"], row["second"]) for row in done.json}
    assert done.status == 1
    assert keys["layers[0].weight_bits"] == (4, 8)
    assert "layers[2].weight_bits" not in keys
    assert "file model.onnx" in keys
    assert not [key for key in keys if "seconds" in key]


def test_verify_holds(fraqat: Cli, compiled: Path) -> None:
    done = fraqat("verify", compiled, "--json")
    assert done.status == 0
    assert done.json["holds"] is True
    names = [check["name"] for check in done.json["checks"]]
    assert names == ["files", "onnx", "parity onnx_unoptimized", "parity onnx_optimized", "parity target"]
    assert "parity target" not in fraqat("verify", compiled, "--no-target").out


def test_verify_compares_layers_when_asked(fraqat: Cli, compiled: Path) -> None:
    found = fraqat("verify", compiled, "--layers", "--json")
    assert found.status == 0
    assert "layers" not in fraqat("verify", compiled, "--json").json
    assert all(layer["max_lsb"] <= 1.01 and not layer["is_wrong"] for layer in found.json["layers"])
    assert "none is computed wrongly" in fraqat("verify", compiled, "--layers").out


def test_verify_finds_a_weight_that_was_changed(fraqat: Cli, compiled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(compiled, folder)
    model = (folder / "model.onnx").read_bytes()
    (weight,) = [node for node in load_model(folder).tensors().values() if node.name == "0.weight"]
    codes = bytes(weight._values.tensor.raw_data)
    assert model.count(codes) == 1
    (folder / "model.onnx").write_bytes(model.replace(codes, codes[::-1]))
    done = fraqat("verify", folder, "--json")
    failed = [check["name"] for check in done.json["checks"] if not check["holds"]]
    assert done.status == 1
    assert failed[0] == "files"
    assert "parity onnx_unoptimized" in failed
    assert "model.onnx has changed" in done.json["checks"][0]["detail"]


def test_verify_tells_what_is_damaged_and_goes_on(fraqat: Cli, compiled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(compiled, folder)
    (folder / "reference.safetensors").write_bytes(b"half")
    done = fraqat("verify", folder, "--json")
    checks = {check["name"]: (check["holds"], check["detail"]) for check in done.json["checks"]}
    assert done.status == 1
    assert "reference.safetensors cannot be read" in checks["parity target"][1]
    assert checks["onnx"][0]
    assert re.search(r"holds +onnx", fraqat("verify", folder).out)


@pytest.mark.parametrize("damage", [lambda data: data[:50], lambda data: data.replace(b"Gemm", b"\xff\xfeGm")])
def test_verify_survives_a_damaged_model(
    fraqat: Cli, compiled: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(compiled, folder)
    (folder / "model.onnx").write_bytes(damage((folder / "model.onnx").read_bytes()))
    done = fraqat("verify", folder, "--json")
    failed = [check["name"] for check in done.json["checks"] if not check["holds"]]
    assert done.status == 1
    assert {"files", "onnx", "parity onnx_unoptimized"} <= set(failed)


def test_profile(fraqat: Cli, compiled: Path) -> None:
    profile = fraqat("profile", compiled, "--json").json
    assert profile["source"] == "host"
    assert profile["latency_ms"] > 0
    assert {op["name"] for op in profile["ops"]} >= {"0/Gemm", "2/Gemm"}
    assert "0/Gemm" in fraqat("profile", compiled).out


def test_inspect_a_compile(fraqat: Cli, compiled: Path) -> None:
    done = fraqat("inspect", compiled)
    assert done.status == 0
    assert re.search(r"1/gelu +gelu +quantized", done.out)
    assert "pack-int4" in done.out
    assert fraqat("inspect", compiled, "--json").json["model"]["name"] == "tiny"


def test_inspect_an_onnx_file(fraqat: Cli, compiled: Path) -> None:
    facts = fraqat("inspect", compiled / "model.onnx", "--json").json
    constants = {row["dtype"]: row for row in facts["constants"]}
    codes = 16 * 32 + 32 * 8
    zero_points = constants["int4"]["elements"] - codes
    assert 0 < zero_points <= 32 + 8  # 4-bit zero points, shared between weights where they are equal
    assert constants["int4"]["bytes"] < codes
    assert facts["ops"]["Gemm"] == 2
    assert facts["qdq"] == {"nodes": 3, "quantized": 3, "float": []}
    assert facts["inputs"] == [{"name": "input", "dtype": "float32", "shape": [4, 16]}]
    assert "3 of 3 nodes stand between" in fraqat("inspect", compiled / "model.onnx").out


def test_inspect_a_job_lists_the_names_that_flags_take(fraqat: Cli, job: Path) -> None:
    facts = fraqat("inspect", job, "--json").json
    assert [(row["name"], row["class"]) for row in facts["modules"]] == [
        ("0", "Linear"),
        ("1", "GELU"),
        ("2", "Linear"),
    ]
    assert facts["parameters"] == 16 * 32 + 32 + 32 * 8 + 8


def test_explain(fraqat: Cli, compiled: Path) -> None:
    facts = fraqat("explain", compiled, "2", "--json").json
    assert [layer["name"] for layer in facts["layers"]] == ["2"]
    assert {row["pass"] for row in facts["passes"]} >= {"fold-fake-quant", "pack-int4"}
    weights = {row["name"]: (row["dtype"], row["shape"], row["bytes"]) for row in facts["constants"]}
    assert weights["2.weight"] == ("int4", [8, 32], 128)
    assert "2/Gemm" in [node["name"] for node in facts["nodes"]]
    assert not [name for name in weights if name.startswith("0.")]
    assert "packed 2.weight" in fraqat("explain", compiled, "2").out
    touched = [entry["pass"] for entry in fraqat("explain", compiled, "1/gelu", "--json").json["passes"]]
    assert touched[0] == "insert-fake-quant"


def test_explain_an_unknown_layer(fraqat: Cli, compiled: Path) -> None:
    done = fraqat("explain", compiled, "1/gelo")
    assert (done.status, done.out) == (2, "")
    assert "Did you mean 1/gelu?" in done.err


def test_opt_prints_the_graph_or_writes_it(fraqat: Cli, compiled: Path, tmp_path: Path) -> None:
    printed = fraqat("opt", compiled / "model.onnx", "-p", "share-qdq")
    assert printed.status == 0
    assert re.search(r"= Gemm\(.*# 0/Gemm", printed.out)
    written = fraqat("opt", compiled, "-p", "share-qdq,pack-int4", "-o", tmp_path / "new" / "m.onnx", "--json")
    assert [row["name"] for row in written.json["passes"]] == ["share-qdq", "pack-int4"]
    assert written.json["pipeline"] == "share-qdq,pack-int4"
    assert load_model(tmp_path / "new" / "m.onnx").nodes
    assert fraqat("opt", compiled, "-p", "share-qdq", "-o", tmp_path / "folder").status == 2


def test_opt_repeats_a_failure_from_its_reproducer(fraqat: Cli, job: Path, tmp_path: Path) -> None:
    digamma = "type('Digamma', (nn.Module,), {'forward': lambda self, x: torch.digamma(x)})()"
    (tmp_path / "digamma.py").write_text(job.read_text().replace("nn.GELU()", digamma))
    failed = fraqat("compile", tmp_path / "digamma.py", "-o", tmp_path / "o", "--steps", "0")
    assert failed.status == 1
    assert "digamma" in failed.err
    assert f"reproducer: {tmp_path / 'o' / 'reproducer'}" in failed.err
    readme = (tmp_path / "o" / "reproducer" / "README.md").read_text()
    (command,) = re.findall(r"fraqat (opt .*)$", readme, re.MULTILINE)
    model, *options = shlex.split(command)[1:]
    again = fraqat("opt", tmp_path / "o" / "reproducer" / model, *options)
    assert again.status == 1
    assert "digamma" in again.err


def test_looking_inside_a_pipeline(fraqat: Cli, compiled: Path, tmp_path: Path) -> None:
    done = fraqat(
        *("opt", compiled, "-p", "share-qdq,pack-int4", "-o", tmp_path / "m.onnx"),
        *("--print-ir-after", "pack-int4", "--print-ir-before", "share-qdq", "--time-passes"),
        *("--dump-ir", tmp_path / "ir"),
    )
    assert "IR before share-qdq" in done.err
    assert "IR after pack-int4" in done.err
    assert "IR after share-qdq" not in done.err
    assert "time of the passes" in done.err
    assert sorted(path.name for path in (tmp_path / "ir").iterdir()) == [
        "00-input.txt",
        "01-share-qdq.txt",
        "02-pack-int4.txt",
    ]
    assert "IR" not in done.out


def test_compile_hands_its_instruments_to_every_pipeline(fraqat: Cli, job: Path, tmp_path: Path) -> None:
    done = fraqat("compile", job, "-o", tmp_path / "o", "--steps", "0", "--print-ir-after-all", "--time-passes")
    assert "IR after insert-fake-quant" in done.err
    assert "IR after pack-int4" in done.err
    assert "time of the passes" in done.err


def test_passes_and_targets_are_listed_and_documented(fraqat: Cli) -> None:
    names = [row["name"] for row in fraqat("passes", "--json").json]
    assert {"insert-fake-quant", "export-onnx", "pack-int4"} <= set(names)
    assert [row["name"] for row in fraqat("targets", "--json").json][:2] == ["onnxruntime", "htp"]
    assert re.search(r"export-onnx +fx -> onnx +\w+", fraqat("passes").out)
    facts = fraqat("passes", "insert-fake-quant", "--json").json
    options = {option["name"]: (option["type"], option["default"]) for option in facts["options"]}
    assert options["range-method"] == ("one of minmax, percentile, mse, sigma3", "minmax")
    assert "Before:" in fraqat("passes", "insert-fake-quant").out
    assert "sm8750" in fraqat("targets", "htp").out


def test_every_flag_of_compile_reaches_it(fraqat: Cli, job: Path, tmp_path: Path) -> None:
    given = "--weights 8 --activations 16 --schedule direct --steps 2 --seed 7 --skip 2 --calibration-range mse "
    given += "--loss kl --train 0 --recipe ema --calibration-samples 9 "
    given += "--weight-range percentile --lr 0.001 --checkpoint-every 1 --tracer symbolic_trace --strict"
    options = fraqat("compile", job, "-o", tmp_path / "o", "--json", *given.split()).json["options"]
    texts = {"weights": "8", "activations": "16", "schedule": "direct", "skip": "2", "tracer": "symbolic_trace"}
    numbers = {"steps": 2, "seed": 7, "lr": 0.001, "checkpoint_every": 1, "strict": True}
    rest = {"range_method": "mse", "weight_range": "percentile", "target": "onnxruntime", "dynamic": False}
    tuning = {"loss": "kl", "train": "0", "recipe": "ema", "calibration_samples": 9, "epochs": None}
    assert options == texts | numbers | rest | tuning


def test_simulate_measures_what_no_file_can_hold(fraqat: Cli, job: Path, tmp_path: Path) -> None:
    given = "--weights 4.5 --schedule 8x1,4.5x1 --steps 4 --dynamic --json"
    report = fraqat("simulate", job, "-o", tmp_path / "o", *given.split()).json
    assert [stage["bits"] for stage in report["schedule"]] == [8, 4.5]
    assert json.loads((tmp_path / "o/simulation.json").read_text()) == report
    assert "simulation.json" in fraqat("simulate", job, "-o", tmp_path / "o", "--steps", "0").out
    refused = fraqat("compile", job, "-o", tmp_path / "c", "--weights", "4.5")
    assert refused.status == 2
    assert "4.5 bits cannot be exported" in refused.err and "`fraqat simulate`" in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("compile", "nowhere.py"), "there is no file nowhere.py"),
        (("compile",), "Missing argument"),
        (("compile", "JOB", "--nonsense"), "No such option"),
        (("compile", "JOB", "--steps", "-1"), "--steps"),
        (("compile", "JOB", "--calibration-range", "guess"), "guess"),
        (("compile", "JOB", "--target", "hpt"), 'Did you mean "htp"?'),
        (("compile", "JOB", "--target", "htp{soc"), "^"),
        (("compile", "JOB", "--print-ir-after", "pack-int5"), 'Did you mean "pack-int4"?'),
        (("compile", "JOB", "--weights", "4,nothing=8"), "no module of the model matches 'nothing'"),
        (("compile", "JOB", "--schedule", "fracat", "--steps", "20"), 'Did you mean "fraqat"?'),
        (("passes", "pack-int5"), "pack-int5"),
        (("opt", "nowhere.onnx", "-p", "pack-int4"), "nowhere.onnx does not exist"),
        (("opt", "nowhere.onnx", "-p", "pack-int4,"), "^"),
        (("inspect", "nowhere.onnx"), "nowhere.onnx does not exist"),
    ],
)
def test_wrong_usage_ends_with_status_2(
    fraqat: Cli, job: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    filled = [str(job) if argument == "JOB" else argument for argument in arguments]
    output = ["-o", str(tmp_path / "o")] if arguments[0] == "compile" else []
    done = fraqat(*filled, *output)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("command", ["verify", "profile"])
def test_a_folder_without_a_compile_is_told(fraqat: Cli, tmp_path: Path, command: str) -> None:
    done = fraqat(command, tmp_path)
    assert (done.status, done.out) == (1, "")
    assert "holds no report.json" in done.err


def test_debug_shows_the_traceback_and_keeps_the_status(fraqat: Cli) -> None:
    done = fraqat("compile", "nowhere.py", "--debug")
    assert done.status == 2
    assert "Traceback (most recent call last)" in done.err
    assert "JobError: there is no file nowhere.py" in done.err


def test_an_error_in_the_job_is_one_paragraph(fraqat: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(JOB.replace("nn.GELU()", "nn.GELU(1, 2, 3)"))
    done = fraqat("compile", tmp_path / "bad.py", "-o", tmp_path / "o")
    (line,) = [line for line in done.err.splitlines() if "error" in line]
    assert line.startswith("error: ")
    assert "bad.py:7: return nn.Sequential" in line


def test_an_unforeseen_error_is_no_traceback(fraqat: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fraqat_compiler.doctor.diagnose", lambda: 1 // 0)
    done = fraqat("doctor")
    assert done.status == 1
    assert "internal error: ZeroDivisionError" in done.err
    assert "--debug" in done.err
    assert "Traceback" not in done.err


def test_doctor(fraqat: Cli) -> None:
    rows = {(row["area"], row["name"]): row for row in fraqat("doctor", "--json").json}
    assert rows["machine", "torch"]["detail"].startswith(torch.__version__)
    assert rows["target", "onnxruntime"]["status"] == "ok"
    assert rows["target", "htp"]["status"] in ("ok", "missing")
    installed = rows["package", "fraqat_compiler"]["status"] == "ok"
    assert not installed or rows["package", "rich"]["status"] == "ok"
    assert not [row for row in rows.values() if row["status"] == "missing" and not (row["remedy"] or row["detail"])]


def test_help_is_quick_because_it_imports_nothing_heavy() -> None:
    script = "import sys, fraqat_compiler.cli; print({'torch', 'onnx', 'numpy', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"


def test_ctrl_c_keeps_the_checkpoints_and_resume_goes_on(
    fraqat: Cli, compiled: Path, job: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "o"
    running = process("compile", job, "-o", folder, "--steps", "4000", "--checkpoint-every", "5")
    deadline = time.monotonic() + 120
    while not list(folder.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, "")
    assert "--resume goes on" in err
    assert "Traceback" not in err
    assert not (folder / "model.onnx").exists()
    other = fraqat("compile", job, "-o", folder, *COMPILE, "--resume")
    assert other.status == 1  # another number of steps is another run
    assert "belong to another run" in other.err
    assert list(folder.glob("checkpoints/step-*"))


def test_what_is_piped_into_a_closed_pipe_ends_quietly(compiled: Path) -> None:
    running = process("inspect", compiled)
    assert running.stdout is not None
    running.stdout.close()
    assert "Traceback" not in (running.stderr.read() if running.stderr else "")
    running.wait()
