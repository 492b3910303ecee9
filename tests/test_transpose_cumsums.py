"""transpose-cumsums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import Applied, htp_parity
from torch import nn

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name, value_of
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.transpose_cumsums import TransposeCumsums


@pytest.mark.parametrize("dimension", [0, 1, -2])
def test_a_sum_runs_along_the_last_dimension(dimension: int) -> None:
    x = torch.randn(2, 4, 16)
    graph = capture(Applied(lambda x: x.cumsum(dimension)), (x,))
    assert TransposeCumsums().run(graph, PassContext()).modified
    (node,) = [node for node in graph.graph.nodes if op_name(node) == "aten.cumsum"]
    assert node.args[1] == -1 and value_of(node).shape != x.shape
    torch.testing.assert_close(graph(x), x.cumsum(dimension))
    assert not TransposeCumsums().run(graph, PassContext()).modified


@pytest.mark.parametrize(
    ("x", "dimension"), [(torch.ones(2, 3), -1), (torch.ones(2, 3), 1), (torch.ones(3), 0), (torch.arange(6), 0)]
)
def test_others_are_left_alone(x: torch.Tensor, dimension: int) -> None:
    graph = capture(Applied(lambda x: x.cumsum(dimension)), (x,))
    assert not TransposeCumsums().run(graph, PassContext()).modified


@pytest.mark.parametrize("activations", [8, 16])
def test_the_library_computes_it(activations: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Applied(lambda x: x.cumsum(1)))
    distance = htp_parity(model, torch.randn(2, 8, 16), activations, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 8  # a sum of eight results of the layer
