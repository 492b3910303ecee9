"""decompose-softplus."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered, ops, run_onnx
from torch import nn

from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.decompose_softplus import DecomposeSoftplus

LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants"


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Softplus())


@pytest.mark.parametrize("factor", [1.0, 20.0])
def test_a_wide_softplus_is_written_out(factor: float, tmp_path: Path) -> None:
    x = factor * torch.randn(1, 4, 8, 8)
    graph = lowered(fake_quantized(_model(), (x,), activations="16", weights="8"), LOWER)
    (before,) = run_onnx(graph, [x], tmp_path)
    assert DecomposeSoftplus().run(graph, PassContext()).modified
    assert {"Abs", "Sigmoid", "Log", "Relu", "Sub"} <= set(ops(graph))
    assert "Softplus" not in ops(graph)
    (after,) = run_onnx(graph, [x], tmp_path)
    assert abs(after - before).max() < 2e-4 + 2e-5 * factor
    assert not DecomposeSoftplus().run(graph, PassContext()).modified


def test_at_8_bits_it_stays() -> None:
    graph = lowered(fake_quantized(_model(), (torch.randn(1, 4, 8, 8),), activations="8"), LOWER)
    assert not DecomposeSoftplus().run(graph, PassContext()).modified


def test_the_library_computes_it(tmp_path: Path) -> None:
    """One Softplus behind a convolution is garbage."""
    pytest.importorskip("onnxruntime_qnn")
    distance = htp_parity(_model(), torch.randn(1, 4, 12, 12), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 20
    assert abs(distance.slope - 1) < 1e-3
