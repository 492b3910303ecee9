"""convolve-average-pools."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import htp_parity
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler.capture import capture
from fraqat_compiler.instruments import Verification
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.convolve_average_pools import ConvolveAveragePools


def _run(pool: nn.Module, size: int = 12) -> tuple[GraphModule, bool]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    result = PassManager((ConvolveAveragePools(),)).run(capture(pool, (x,)), instruments=[Verification()])
    torch.testing.assert_close(result.model(x), pool(x))
    return result.model, result.records[0].modified


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(4),
        nn.AvgPool2d((4, 6)),
        nn.AvgPool2d(3, padding=1),
        nn.AvgPool2d(4, divisor_override=5),
        nn.AdaptiveAvgPool2d(3),
    ],
)
def test_windows_that_do_not_overlap_become_a_convolution(pool: nn.Module) -> None:
    graph, modified = _run(pool)
    assert modified
    assert [op_name(node) for node in graph.graph.nodes if node.op == "call_function"] == ["aten.conv2d"]


@pytest.mark.parametrize(
    "pool",
    [
        nn.AvgPool2d(2),
        nn.AvgPool2d(3),
        nn.AvgPool2d(4, 2),
        nn.AvgPool2d(12),
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d(5),
        nn.AvgPool2d(4, ceil_mode=True),
        nn.AvgPool2d(4, padding=1, count_include_pad=False),
    ],
)
def test_others_are_left_alone(pool: nn.Module) -> None:
    assert not _run(pool)[1]


@pytest.mark.parametrize(("pool", "activations"), [(nn.AvgPool2d(4), 8), (nn.AvgPool2d(3, padding=1), 16)])
def test_the_library_computes_it(pool: nn.Module, activations: int, tmp_path: Path) -> None:
    """As a pool it is 64 steps off at 8 bits, with a slope of 0.76."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), pool)
    distance = htp_parity(model, torch.randn(1, 8, 12, 12), activations, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 5.01
    assert abs(distance.slope - 1) < 5e-3
