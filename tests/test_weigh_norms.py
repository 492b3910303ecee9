"""weigh-norms."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import htp_parity
from torch import nn
from torch.fx import GraphModule

from fraqat_compiler import fx_graph
from fraqat_compiler.capture import capture
from fraqat_compiler.instruments import Verification
from fraqat_compiler.ops import argument
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.weigh_norms import WeighNorms


def _weighed(norm: nn.Module, shape: tuple[int, ...]) -> tuple[GraphModule, bool]:
    torch.manual_seed(0)
    x = torch.randn(shape)
    graph = capture(norm, (x,))
    expected = graph(x)
    result = PassManager((WeighNorms(),)).run(graph, instruments=[Verification()])
    torch.testing.assert_close(result.model(x), expected)
    return result.model, result.records[0].modified


@pytest.mark.parametrize(
    ("norm", "shape", "positions"),
    [
        (nn.LayerNorm(8, elementwise_affine=False), (2, 4, 8), {2: 1.0}),
        (nn.LayerNorm((4, 8), elementwise_affine=False), (2, 4, 8), {2: 1.0}),
        (nn.RMSNorm(8, elementwise_affine=False), (2, 4, 8), {2: 1.0}),
        (nn.InstanceNorm2d(3), (2, 3, 4, 4), {1: 1.0, 2: 0.0}),
    ],
)
def test_a_norm_gets_constants(norm: nn.Module, shape: tuple[int, ...], positions: dict[int, float]) -> None:
    graph, modified = _weighed(norm, shape)
    assert modified
    (node,) = [node for node in graph.graph.nodes if node.op == "call_function"]
    for position, value in positions.items():
        constant = fx_graph.constant_of(graph, argument(node, position))
        assert constant is not None and (constant == value).all()
    assert not WeighNorms().run(graph, PassContext()).modified


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.LayerNorm(8), (2, 8)), (nn.LayerNorm(8, bias=False), (2, 8)), (nn.GroupNorm(2, 4, affine=False), (2, 4, 8))],
)
def test_others_are_left_alone(norm: nn.Module, shape: tuple[int, ...]) -> None:
    assert not _weighed(norm, shape)[1]


@pytest.mark.parametrize("activations", [8, 16])
def test_the_library_computes_a_norm_behind_a_linear_layer(activations: int, tmp_path: Path) -> None:
    """With a weight in float this is garbage at 16 bits: a slope of 0.14."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64, elementwise_affine=False), nn.Linear(64, 32))
    distance = htp_parity(model, torch.randn(1, 16, 64), activations, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 4.01
    assert abs(distance.slope - 1) < 0.01
