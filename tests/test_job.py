from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from fraqat_compiler.errors import DataError, JobError, cause_of
from fraqat_compiler.job import Job, job_name, load_job

GOOD = """
import torch
from torch import nn

def model():
    return nn.Linear(4, 2)

def example_inputs():
    return (torch.zeros(3, 4),)
"""


def write(folder: Path, text: str, name: str = "job.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_file_defines_a_job(tmp_path: Path) -> None:
    job = load_job(str(write(tmp_path / "mine", GOOD)))
    assert job.name == "mine"
    assert isinstance(job.model(), nn.Linear)
    assert job.example_inputs()[0].shape == (3, 4)
    assert job.calibration_data is None
    assert list(job.calibration_batches()) == []


def test_a_job_says_what_its_outputs_are(tmp_path: Path) -> None:
    assert load_job(str(write(tmp_path, GOOD))).outputs == "values"
    assert load_job(str(write(tmp_path, f'{GOOD}\noutputs = "logits"\n'))).outputs == "logits"
    with pytest.raises(JobError, match="'values' or 'logits'"):
        load_job(str(write(tmp_path, f'{GOOD}\noutputs = "classes"\n')))


@pytest.mark.parametrize(
    ("text", "name"),
    [("a/mini.py", "mini"), ("a/job.py", "a"), ("a/job.py:big", "a"), ("package.module:build", "module")],
)
def test_names(text: str, name: str) -> None:
    assert job_name(text) == name


FUNCTIONS = """
import torch
from torch import nn
from types import SimpleNamespace
from fraqat_compiler.job import Job

def build():
    make, inputs = (lambda: nn.Linear(4, 2)), (lambda: (torch.zeros(3, 4),))
    return RESULT
"""


@pytest.mark.parametrize(
    ("result", "name"),
    [
        ("Job('named', make, inputs)", "named"),
        ("dict(model=make, example_inputs=inputs)", "build"),
        ("SimpleNamespace(model=make, example_inputs=inputs)", "build"),
    ],
)
def test_a_function_returns_a_job_a_dict_or_an_object(tmp_path: Path, result: str, name: str) -> None:
    job = load_job(f"{write(tmp_path, FUNCTIONS.replace('RESULT', result))}:build")
    assert isinstance(job.model(), nn.Linear)
    assert job.name == name


def test_a_module_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, GOOD + "def build():\n    return globals()\n", "jobs_of_test/first.py")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_job("jobs_of_test.first:build").model(), nn.Linear)
    assert load_job("jobs_of_test.first").name == "first"


def test_two_jobs_with_siblings_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    text = """
from sibling_of_job import WIDTH
import torch
def model():
    from late_sibling_of_job import make
    return make(WIDTH)
def example_inputs():
    return (torch.zeros(1, WIDTH),)
"""
    for width in (3, 5):
        write(tmp_path / str(width), text)
        write(tmp_path / str(width), f"WIDTH = {width}\n", "sibling_of_job.py")
        write(
            tmp_path / str(width),
            f"from torch import nn\ndef make(n):\n    return nn.Linear(n, {width})\n",
            "late_sibling_of_job.py",
        )
    path_before = list(sys.path)
    first, second = (load_job(str(tmp_path / str(width) / "job.py")) for width in (3, 5))
    shapes = [tuple(job.model().weight.shape) for job in (first, second, first)]
    assert shapes == [(3, 3), (5, 5), (3, 3)]
    assert sys.path == path_before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no model()"),
        ("def model():\n    pass\n", "defines no example_inputs()"),
        (GOOD + "def weights():\n    return 'shards'\n", "weights()"),
        ("import not_there_at_all\n", "not_there_at_all' (job.py:1: import not_there_at_all)"),
        ("def model(:\n", "SyntaxError"),
        ("raise SystemExit(3)\n", "SystemExit: 3 (job.py:1"),
        ("\n\nraise ValueError('two\\nlines')\n", "ValueError: two (job.py:3: raise ValueError"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JobError) as told:
        load_job(str(write(tmp_path, text)))
    assert message in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere.py", "there is no file"),
        ("not_a_package.module:f", "there is no module"),
        ("model.onnx", "fraqat opt"),
    ],
)
def test_what_is_not_there_is_told(text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_job(text)


def test_a_missing_function_is_told(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"no function build\(\)"):
        load_job(f"{write(tmp_path, GOOD)}:build")


def test_an_error_deep_in_a_library_names_the_users_line(tmp_path: Path) -> None:
    text = GOOD.replace("return nn.Linear(4, 2)", "return nn.Linear(4, 2)(torch.zeros(1, 9))")
    job = load_job(str(write(tmp_path, text)))
    with pytest.raises(JobError, match=r"shapes cannot be multiplied.*\(job\.py:6: return nn\.Linear"):
        job.model()


def test_an_error_in_the_middle_of_the_data_names_its_line(tmp_path: Path) -> None:
    text = GOOD + "def calibration_data():\n    yield (torch.zeros(3, 4),)\n    raise OSError('lost the file')\n"
    batches = load_job(str(write(tmp_path, text))).calibration_batches()
    next(batches)
    with pytest.raises(JobError, match=r"lost the file \(job\.py:12: raise OSError"):
        next(batches)


def test_data_is_drawn_lazily(tmp_path: Path) -> None:
    text = GOOD + "def calibration_data():\n    while True:\n        yield (torch.zeros(3, 4),)\n"
    batches = load_job(str(write(tmp_path, text))).calibration_batches()
    assert [next(batches)[0].shape for _ in range(2)] == [(3, 4), (3, 4)]


class Pair(NamedTuple):
    x: torch.Tensor
    mask: torch.Tensor


def paired(batch: object, example: object = (torch.zeros(2, 3), torch.zeros(2))) -> Job:
    return Job.from_model(nn.Identity(), example, calibration_data=lambda: [example, batch])


@pytest.mark.parametrize(
    "batch",
    [(torch.ones(2, 3), torch.ones(2)), Pair(torch.ones(2, 3), torch.ones(2)), [torch.ones(2, 3), torch.ones(2)]],
)
def test_batches_like_the_example_pass(batch: object) -> None:
    assert len(list(paired(batch).calibration_batches())) == 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4)), r"batch 1: input 1 is float32\[4\], expected float32\[2\]"),
        ((torch.ones(2, 3), torch.ones(2).long()), r"input 1 is int64\[2\], expected float32\[2\]"),
        ((torch.ones(2, 3),), r"batch 1 has inputs \(0\), expected \(0, 1\)"),
        ({"x": torch.ones(2, 3)}, r"batch 1 has inputs \(x\), expected \(0, 1\)"),
    ],
)
def test_other_batches_are_refused(batch: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(paired(batch).calibration_batches())


def test_keyword_and_nested_inputs_are_named() -> None:
    example = {"x": torch.zeros(1), "cache": (torch.zeros(2), torch.zeros(3))}
    wrong = {"x": torch.zeros(1), "cache": (torch.zeros(2), torch.zeros(4))}
    with pytest.raises(DataError, match=r"input cache\[1\] is float32\[4\], expected float32\[3\]"):
        list(paired(wrong, example).calibration_batches())


def test_a_module_needs_example_inputs() -> None:
    with pytest.raises(JobError, match="example_inputs"):
        Job.from_model(nn.Identity(), None)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("model", None, "returned NoneType.*torch.nn.Module"),
        ("model", {"weight": torch.ones(2)}, r"returned dict of float32\[2\]"),
        ("example_inputs", None, "returned NoneType.*a tuple of positional"),
        ("example_inputs", "text", "returned str"),
        ("example_inputs", (np.zeros(3),), "returned tuple of ndarray.*as torch tensors"),
        ("example_inputs", (torch.zeros(0, 3),), r"returned tuple of float32\[0, 3\].*hold something"),
        ("calibration_data", None, "returned NoneType.*batches"),
        ("train_data", None, "returned NoneType.*batches"),
    ],
)
def test_functions_that_return_something_else_are_named(part: str, value: object, message: str) -> None:
    functions = {"model": lambda: nn.Identity(), "example_inputs": lambda: (torch.ones(1),), part: lambda: value}
    job = load_job_of(functions)
    with pytest.raises(JobError, match=rf"{part}\(\) {message}"):
        getattr(job, part)()


def load_job_of(functions: dict[str, Any]) -> Job:
    module = ModuleType("fraqat_job_of_a_test")
    module.__dict__["make"] = lambda: functions
    sys.modules[module.__name__] = module
    return load_job(f"{module.__name__}:make")


def test_metrics_are_numbers_by_name() -> None:
    job = Job.from_model(nn.Identity(), (torch.ones(1),), evaluate=lambda run: {"mse": run(torch.tensor(2)), "n": 3})
    assert job.metrics(lambda x: x) == {"mse": 2.0, "n": 3.0}


@pytest.mark.parametrize("found", [0.5, None, {"accuracy": "high"}, {"logits": torch.ones(3)}])
def test_other_metrics_are_refused(found: object) -> None:
    job = Job.from_model(nn.Identity(), (torch.ones(1),), evaluate=lambda run: found)
    with pytest.raises(JobError, match=r"evaluate\(run\) returned .*numbers by name"):
        job.metrics(lambda x: x)


def test_weights_alone_are_no_job(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"model\.safetensors holds weights.*model\(\) builds"):
        load_job(str(tmp_path / "model.safetensors"))


def test_torch_s_advice_to_export_again_is_left_out() -> None:
    advice = RuntimeError("Expected 4, but got 8. If you meant for this dimension to be dynamic, please re-export")
    assert cause_of(advice) == "Expected 4, but got 8"
    assert cause_of(ValueError()) == "ValueError"
