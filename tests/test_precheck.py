"""`fraqat check`: what a target will make of a model is told before anything long begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fraqat_compiler.job import Job
from fraqat_compiler.precheck import CheckedOp, check
from fraqat_compiler.targets.htp.target import HtpTarget

needs_htp = pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.gate = nn.SiLU()
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gate(self.up(x)))
        return y


class SixDimensions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, -1).reshape(2, 2, 2, 2, 4, 4).permute(0, 2, 1, 4, 3, 5).contiguous()


def of(ops: list[CheckedOp], kind: str) -> list[CheckedOp]:
    return [op for op in ops if op.op == kind]


def test_every_op_comes_with_its_widths_and_its_rewrites() -> None:
    ops = check(Gated(), (torch.randn(4, 16),), weights="4,head=8", activations="8")
    assert {op.verdict for op in ops} == {"runs"}
    assert [(op.node, op.weight_bits, op.activation_bits) for op in of(ops, "Gemm")] == [
        ("up/Gemm", 4, 8),
        ("head/Gemm", 8, 8),
    ]
    (sigmoid,) = of(ops, "Sigmoid")
    assert sigmoid.rewritten_by == ("decompose-activations",)
    assert all(not op.rewritten_by for op in of(ops, "Gemm"))


def test_no_data_function_of_the_job_is_called() -> None:
    def fail(*_: object) -> None:
        raise AssertionError("called")

    job = Job("job", Gated, lambda: (torch.randn(4, 16),), fail, fail, fail, fail)  # type: ignore[arg-type]
    assert check(job)


@needs_htp
def test_a_refused_op_has_a_reason_and_a_remedy() -> None:
    ops = check(SixDimensions(), (torch.randn(16, 16),), target="htp")
    refused = [op for op in ops if op.verdict == "refused"]
    assert refused
    assert all(op.reason and op.remedy for op in refused)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    check(Gated(), (torch.randn(4, 16),))
    assert list(tmp_path.iterdir()) == []
