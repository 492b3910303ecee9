"""What the phases of a compile hand on: findings of a check, logs of a failure, the optimizers' outcome."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler.compiler import wrong_results
from fraqat_compiler.errors import JobError, TargetError, UsageError
from fraqat_compiler.job import Job
from fraqat_compiler.target import Finding
from fraqat_compiler.targets.htp.target import HtpTarget
from fraqat_compiler.targets.onnxruntime import OnnxRuntimeTarget

needs_htp = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


class SixDimensions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x).reshape(2, 2, 2, 2, 4, 4)
        return y.permute(0, 2, 1, 4, 3, 5).contiguous()


@needs_htp
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_refusal_names_the_node_and_keeps_the_library_s_log(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"refuses .* \((Reshape|Transpose)\).*at most 5 dimensions") as caught:
        fraqat_compiler.compile(SixDimensions(), (torch.randn(16, 16),), output=tmp_path, target="htp")
    log = tmp_path / "logs" / "htp.log"
    assert log.read_text(encoding="utf-8")
    assert any(str(log) in note for note in caught.value.__notes__)
    assert not (tmp_path / "model.onnx").exists()


def test_what_a_target_computes_wrongly_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding("0/Gemm", "Gemm", "wrong", "sums are off", "Use another width.")
    monkeypatch.setattr(OnnxRuntimeTarget, "check", lambda *_: [finding])
    report = fraqat_compiler.compile(nn.Sequential(nn.Linear(8, 4)), (torch.randn(4, 8),), output=tmp_path).report
    assert "onnxruntime computes 0/Gemm (Gemm) wrongly: sums are off. Use another width." in report["warnings"]
    assert {entry["outcome"] for entry in report["optimizers"]} == {"same"}


def test_an_evaluate_that_fails_costs_no_fine_tune(tmp_path: Path) -> None:
    def train_data() -> list[tuple[Tensor, ...]]:
        pytest.fail("the fine-tune began")

    inputs = (torch.randn(4, 8),)
    job = Job.from_model(nn.Linear(8, 4), inputs, train_data=train_data, evaluate=lambda run: 0.5)
    with pytest.raises(JobError, match="numbers by name"):
        fraqat_compiler.compile(job, output=tmp_path, steps=20)


def test_both_models_are_measured_from_the_same_random_state(tmp_path: Path) -> None:
    job = Job.from_model(nn.Linear(8, 4), (torch.randn(4, 8),), evaluate=lambda run: {"draw": torch.rand(1)})
    metrics = fraqat_compiler.compile(job, output=tmp_path).report["metrics"]
    assert metrics["float"] == metrics["quantized"]


def test_what_concerns_many_nodes_is_said_once() -> None:
    steps = [Finding(f"lstm/Tanh_{step}", "Tanh", "wrong", "it is garbage", "Use 8 bits.") for step in range(10)]
    other = Finding("head/Log", "Log", "wrong", "it is garbage", "Use 8 bits.")
    fine = Finding("head/Gemm", "Gemm", "runs")
    assert wrong_results([*steps, other, fine], OnnxRuntimeTarget()) == [
        "onnxruntime computes lstm/Tanh_0, lstm/Tanh_1, lstm/Tanh_2 and 7 more (Tanh) wrongly: it is garbage. "
        "Use 8 bits.",
        "onnxruntime computes head/Log (Log) wrongly: it is garbage. Use 8 bits.",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "8,head=4.5"}, "4.5 bits cannot be exported"),
        ({"activations": 7.5}, "7.5 bits cannot be exported"),
        ({"weights": 20}, "20 bits cannot be exported"),
        ({"schedule": "bogus"}, "bogus"),
        ({"lr": float("nan")}, "no learning rate"),
    ],
)
def test_what_no_compile_could_do_is_refused_at_once(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        fraqat_compiler.compile(nn.Linear(4, 4), (torch.randn(2, 4),), output=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
