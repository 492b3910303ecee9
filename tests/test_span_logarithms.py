"""span-logarithms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered
from torch import Tensor, nn

from fraqat_compiler import lazy_values
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.span_logarithms import SpanLogarithms

LOWER = f"{EXPORT},fold-fake-quant"


class Logarithm(nn.Module):
    """Of what a linear layer makes, plus an offset that bounds it."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.offset, self.linear = offset, nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.log(self.linear(x).abs() + self.offset)


def test_a_narrow_range_is_widened_below() -> None:
    graph = lowered(fake_quantized(Logarithm(0.05), (torch.randn(16, 64),), activations="16"), LOWER)
    before = graph.outputs[0].inputs[0].inputs
    scale, zero_point = (float(lazy_values.values_of(item)) for item in before[1:3])
    assert SpanLogarithms().run(graph, PassContext()).modified
    wide = graph.outputs[0].inputs[0].inputs
    wide_scale, wide_zero_point = (float(lazy_values.values_of(item)) for item in wide[1:3])
    assert wide_scale > scale
    assert (65535 - wide_zero_point) * wide_scale == pytest.approx((65535 - zero_point) * scale, abs=2 * wide_scale)
    assert wide[1].name == "log_scale"  # by which the comparison by layer finds it
    assert not SpanLogarithms().run(graph, PassContext()).modified


@pytest.mark.parametrize(("offset", "activations"), [(1e-3, "16"), (0.05, "8")])
def test_others_are_left_alone(offset: float, activations: str) -> None:
    graph = lowered(fake_quantized(Logarithm(offset), (torch.randn(16, 64),), activations=activations), LOWER)
    assert not SpanLogarithms().run(graph, PassContext()).modified


def test_the_library_computes_it(tmp_path: Path) -> None:
    """On the narrow grid nine of ten codes are wrong."""
    pytest.importorskip("onnxruntime_qnn")
    distance = htp_parity(Logarithm(0.05), torch.randn(16, 64), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 60
