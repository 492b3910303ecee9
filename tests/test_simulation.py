"""Simulation: what no file can hold is measured in torch; what a file can hold measures the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler import Job
from fraqat_compiler.errors import DataError, UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.layers import weight_quantizers
from fraqat_compiler.simulation import simulate


def _batches(count: int, seed: int) -> Iterator[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return ((torch.randn(8, 16, generator=generator),) for _ in range(count))


def _job(**functions: Any) -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    probe = torch.randn(8, 16)
    with torch.no_grad():
        wanted = model(probe)
    parts: dict[str, Any] = {
        "calibration_data": lambda: list(_batches(6, 1)),
        "train_data": lambda: list(_batches(10, 2)),
        "evaluate": lambda run: {"error": float((run(probe) - wanted).square().mean())},
    }
    return Job("toy", lambda: model, lambda: (torch.zeros(8, 16),), **(parts | functions))


def test_a_fractional_end_width_is_simulated(tmp_path: Path) -> None:
    result = simulate(_job(), output=tmp_path, weights="4.5,2=8", steps=20, lr=1e-3)
    widths = {name: module.spec.bit_width for name, module in weight_quantizers(result.student)}
    assert widths == {"0.weight": 4.5, "2.weight": 8}
    assert result.report["schedule"][-1]["bits"] == 4.5
    assert 0 < result.report["metrics"]["quantized"]["error"] < 0.1
    assert result.report["metrics"]["float"]["error"] < 1e-12


def test_the_error_grows_as_the_width_falls(tmp_path: Path) -> None:
    errors = [
        simulate(_job(), output=tmp_path / width, weights=width, steps=0).report["metrics"]["quantized"]["error"]
        for width in ("8", "5.5", "4.5", "3.5", "2.5")
    ]
    assert errors == sorted(errors)


def test_activations_per_token(tmp_path: Path) -> None:
    result = simulate(_job(), output=tmp_path, dynamic=True, steps=4, schedule="direct")
    specs = [module.spec for module in result.student.modules() if isinstance(module, ActivationFakeQuantize)]
    assert specs and all(spec.granularity == "per-token" for spec in specs)
    scaled = torch.randn(8, 16) * torch.logspace(-3, 3, 8)[:, None]
    with torch.no_grad():
        ratio = result.student(scaled).norm(dim=-1) / result.teacher(scaled).norm(dim=-1)
    assert float(ratio.min()) > 0.7 and float(ratio.max()) < 1.4


def test_a_simulation_measures_what_the_compiled_file_does(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "lr": 1e-3, "recipe": "lsq-plus,ema{decay=0.5}", "range_method": "sigma3"}
    compiled = fraqat_compiler.compile(_job(), output=tmp_path / "file", **options).report
    simulated = simulate(_job(), output=tmp_path / "torch", **options).report
    assert compiled["schedule"] == simulated["schedule"]
    assert compiled["metrics"]["quantized"]["error"] == pytest.approx(
        simulated["metrics"]["quantized"]["error"], rel=1e-3
    )


def test_a_simulation_resumes(tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "4.5", "steps": 12, "recipe": "lsq-plus,ema,freeze-oscillations"}
    first = simulate(_job(), output=tmp_path, **options)
    again = simulate(_job(), output=tmp_path, resume=True, **options)
    assert first.report == again.report


def test_three_sigma_ranges_come_from_as_many_samples_as_asked(tmp_path: Path) -> None:
    """Six batches of eight hold 48 samples; 9 need two of them."""
    seen: list[int] = []

    def counted() -> Iterator[tuple[Tensor]]:
        for index, batch in enumerate(_batches(6, 1)):
            seen.append(index)
            yield batch

    job = _job(calibration_data=counted)
    simulate(job, output=tmp_path, steps=0, range_method="sigma3", calibration_samples=9)
    assert seen[:2] == [0, 1] and len(seen) <= 3


def test_an_epoch_is_one_pass_over_the_training_data(tmp_path: Path) -> None:
    report = simulate(_job(), output=tmp_path, epochs=1.5, schedule="direct").report
    assert [stage["steps"] for stage in report["schedule"]] == [15]
    with pytest.raises(DataError, match=r"an epoch has no length.*DataLoader"):
        simulate(_job(train_data=lambda: _batches(5, 2)), output=tmp_path, epochs=1)
    with pytest.raises(UsageError, match="two budgets"):
        simulate(_job(), output=tmp_path, epochs=1, steps=1)
    with pytest.raises(UsageError, match=r"--epochs 2 needs training data"):
        simulate(_job(train_data=None), output=tmp_path, epochs=2)


def test_only_what_is_named_is_trained_and_the_rest_is_quantized_all_the_same(tmp_path: Path) -> None:
    result = simulate(_job(), output=tmp_path, train="2", steps=8, schedule="direct", recipe="", lr=1e-2)
    assert torch.equal(result.student.get_parameter("0.weight"), result.teacher.get_parameter("0.weight"))
    assert not torch.equal(result.student.get_parameter("2.weight"), result.teacher.get_parameter("2.weight"))
    assert {name for name, _ in weight_quantizers(result.student)} == {"0.weight", "2.weight"}
    kept = load_file(next(tmp_path.rglob("state.safetensors")))
    trained = {key.partition(":")[2] for key in kept if key.startswith(("parameter", "optimizer"))}
    assert trained == {"2.weight", "2.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic": True}, r"--dynamic.*fraqat simulate"),
        ({"weights": "4.5"}, r"4\.5 bits cannot be exported.*fraqat simulate"),
        ({"recipe": "emma"}, 'no ingredient "emma".*Did you mean "ema"'),
        ({"recipe": "ema", "steps": 0}, "ema needs a fine-tune"),
        ({"loss": "msee"}, "unknown loss"),
        ({"train": "nothing"}, "no module of the model matches 'nothing'"),
        ({"loss": "task"}, r"needs the job's own loss"),
        ({"calibration_samples": 0}, "are none"),
        ({"epochs": -1.0}, "no budget"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_requests_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fraqat_compiler.compile(_job(), output=tmp_path, **({"steps": 2, "schedule": "direct"} | options))
