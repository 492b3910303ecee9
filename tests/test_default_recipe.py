"""`auto`: what the defaults stand for, and when they stand for nothing."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from fraqat_compiler import Job, simulate
from fraqat_compiler.compile_options import make_options
from fraqat_compiler.default_recipe import RECIPE
from fraqat_compiler.fake_quant import ActivationFakeQuantize, WeightFakeQuantize
from fraqat_compiler.job import Outputs
from fraqat_compiler.quant_spec import RangeMethod


@pytest.mark.parametrize(("steps", "recipe"), [(None, RECIPE), (10, RECIPE), (0, "")])
def test_the_defaults_are_written_out(steps: int | None, recipe: str) -> None:
    options = make_options({"steps": steps}, exported=True)
    assert options.recipe == recipe


def test_what_is_asked_for_is_kept() -> None:
    options = make_options({"loss": "mse", "recipe": ""}, exported=True)
    assert (options.loss, options.recipe) == ("mse", "")


def test_a_fine_tune_by_default_comes_nearer_than_rounding(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 8))
    inputs = torch.randn(64, 16)

    job = Job(
        "net",
        lambda: copy.deepcopy(model),
        lambda: (inputs,),
        calibration_data=lambda: [(inputs,)],
        train_data=lambda: [(torch.randn(64, 16),) for _ in range(100)],
    )

    def error(steps: int) -> float:
        result = simulate(job, output=tmp_path / str(steps), steps=steps, lr=2e-3)
        return float((result.student(inputs) - model(inputs)).detach().square().mean())

    assert error(100) < error(0)


@pytest.mark.parametrize(("outputs", "loss"), [("values", "mse,features"), ("logits", "kl,features")])
def test_the_default_loss_follows_from_what_the_outputs_are(outputs: Outputs, loss: str, tmp_path: Path) -> None:
    model, inputs = nn.Linear(4, 4), (torch.randn(2, 4),)
    job = Job.from_model(model, inputs, train_data=lambda: [inputs], outputs=outputs)
    assert simulate(job, output=tmp_path, steps=10).report["options"]["loss"] == loss
    assert simulate(job, output=tmp_path, steps=10, loss="mse").report["options"]["loss"] == "mse"


@pytest.mark.parametrize(
    ("outputs", "steps", "asked", "method"),
    [
        ("values", 10, None, "mse"),
        ("values", 0, None, "minmax"),
        ("logits", 10, None, "minmax"),
        ("logits", 10, "mse", "mse"),
    ],
)
def test_activation_ranges_by_default(
    outputs: Outputs, steps: int, asked: RangeMethod | None, method: str, tmp_path: Path
) -> None:
    model, inputs = nn.Linear(4, 4), (torch.randn(2, 4),)
    job = Job.from_model(model, inputs, train_data=lambda: [inputs], outputs=outputs)
    student = simulate(job, output=tmp_path, steps=steps, recipe="", range_method=asked).student
    modules = [module for module in student.modules() if isinstance(module, ActivationFakeQuantize)]
    assert {module.spec.range_method for module in modules} == {method}


@pytest.mark.parametrize(
    ("outputs", "steps", "method"), [("values", 0, "mse"), ("values", 10, "minmax"), ("logits", 0, "minmax")]
)
def test_weight_ranges_by_default(outputs: Outputs, steps: int, method: str, tmp_path: Path) -> None:
    model, inputs = nn.Linear(4, 4), (torch.randn(2, 4),)
    job = Job.from_model(model, inputs, train_data=lambda: [inputs], outputs=outputs)
    student = simulate(job, output=tmp_path, steps=steps, recipe="").student
    modules = [module for module in student.modules() if isinstance(module, WeightFakeQuantize)]
    assert [module.spec.range_method for module in modules] == [method]
