"""What the phases of a compile hand on: findings of a check, logs of a failure, the optimizers' outcome."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fraqat_compiler
from fraqat_compiler.errors import TargetError
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
