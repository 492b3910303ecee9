"""fold-constants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import htp_parity
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.fold_constants import FoldConstants


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = parametrizations.weight_norm(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        angles = torch.arange(8, dtype=torch.float32) / 8
        return self.layer(x) + torch.cat([angles.sin()[:4], angles.cos()[:4]])


def test_weight_norm_and_position_tables_become_constants() -> None:
    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(2, 8)
    graph = capture(model, (x,))
    result = FoldConstants().run(graph, PassContext())
    names = [op_name(node) for node in result.model.graph.nodes if node.op == "call_function"]
    assert result.modified
    assert names == ["aten.linear", "aten.add"]
    assert torch.equal(result.model(x), model(x))


def test_a_limit_keeps_large_tables_out() -> None:
    graph = capture(Positions(), (torch.randn(2, 8),))
    result = FoldConstants(max_elements=1).run(graph, PassContext())
    assert "aten.cat" in [op_name(node) for node in result.model.graph.nodes]


def test_the_zero_of_a_softshrink_is_a_constant() -> None:
    x = torch.randn(4, 8)
    result = FoldConstants().run(capture(nn.Softshrink(0.3), (x,)), PassContext())
    assert [op_name(node) for node in result.model.graph.nodes].count("aten.mul") == 1  # width times sign
    assert torch.equal(result.model(x), nn.functional.softshrink(x, 0.3))


@pytest.mark.parametrize("activations", [8, 16])
def test_the_library_computes_a_softshrink(activations: int, tmp_path: Path) -> None:
    """With a product for the zero it is 28,000 steps off at 16 bits."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Softshrink(), nn.Linear(64, 64))
    distance = htp_parity(model, torch.randn(1, 32, 64), activations, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 6


def test_nothing_to_do() -> None:
    graph = capture(nn.Linear(4, 4), (torch.ones(1, 4),))
    assert not FoldConstants().run(graph, PassContext()).modified
