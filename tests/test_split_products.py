"""split-products."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered, ops, run_onnx
from torch import Tensor, nn

from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.split_products import SplitProducts
from fraqat_compiler.targets.htp.target import HtpTarget

LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants,convert-widths"


class Scores(nn.Module):
    """Products of tensors with each other, one of them twice."""

    def forward(self, x: Tensor) -> Tensor:
        keys = x.transpose(-1, -2).contiguous()
        return x @ keys + (x * 0.5) @ keys


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_a_product_becomes_the_sum_of_two(shift: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 2, 16, 32) + shift
    graph = lowered(fake_quantized(Scores(), (x,), activations="16"), LOWER)
    (before,) = run_onnx(graph, [x], tmp_path)
    assert SplitProducts().run(graph, PassContext()).modified
    assert [ops(graph).count(op) for op in ("MatMul", "Add", "Sub")] == [4, 3, 1]
    (after,) = run_onnx(graph, [x], tmp_path)
    assert abs(after - before).max() < 3 * (before.max() - before.min()) / 65535
    assert not SplitProducts().run(graph, PassContext()).modified


def test_at_8_bits_it_stays() -> None:
    graph = lowered(fake_quantized(Scores(), (torch.randn(1, 2, 16, 32),), activations="8"), LOWER)
    assert not SplitProducts().run(graph, PassContext()).modified


def test_a_product_with_a_weight_stays() -> None:
    graph = lowered(fake_quantized(nn.Linear(32, 8), (torch.randn(1, 2, 16, 32),), activations="16"), LOWER)
    assert not SplitProducts().run(graph, PassContext()).modified


def test_the_library_computes_it(tmp_path: Path) -> None:
    """As one product each they are 31 steps off in the mean and 183 at most."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Scores(), torch.randn(1, 2, 16, 32), 16, tmp_path, HtpTarget(split_products=True))
    assert distance.mean_lsb is not None and distance.mean_lsb <= 5
    assert distance.max_lsb is not None and distance.max_lsb <= 100
