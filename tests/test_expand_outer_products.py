"""expand-outer-products."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering import Applied, htp_parity
from torch import Tensor, nn

from fraqat_compiler.capture import capture
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.expand_outer_products import ExpandOuterProducts

Function = Callable[[Tensor], Tensor]

OUTER: list[Function] = [
    lambda x: x.unsqueeze(-1) * x.unsqueeze(-2),
    lambda x: x.sigmoid().unsqueeze(1) * x.unsqueeze(2),
    lambda x: x.reshape(4, 2, 1, 2, 8) * x.sigmoid().reshape(4, 1, 2, 2, 8),
    lambda x: x[:, :, :8].reshape(-1, 1, 8) * x[:, :, 8:].reshape(-1, 8, 1),
]
OTHERS: list[Function] = [
    lambda x: x * x,
    lambda x: x * 2.0,
    lambda x: x * x.mean(-1, keepdim=True),
    lambda x: x[:, :, :8].unsqueeze(-1) * x.unsqueeze(-2),
    lambda x: x.unsqueeze(-1) + x.unsqueeze(-2),
    lambda x: x.unsqueeze(0) * x,
]


class Layered(nn.Module):
    """A function of what a linear layer computes: of the graph's inputs the library multiplies rightly."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(16, 16), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize("function", OUTER)
def test_a_factor_is_repeated(function: Function) -> None:
    x = torch.randn(2, 4, 16)
    graph = capture(Applied(function), (x,))
    assert ExpandOuterProducts().run(graph, PassContext()).modified
    assert torch.equal(graph(x), function(x))
    assert not ExpandOuterProducts().run(graph, PassContext()).modified


@pytest.mark.parametrize("function", OTHERS)
def test_others_are_left_alone(function: Function) -> None:
    graph = capture(Applied(function), (torch.randn(2, 4, 16),))
    assert not ExpandOuterProducts().run(graph, PassContext()).modified


@pytest.mark.parametrize("activations", [8, 16])
@pytest.mark.parametrize("function", OUTER)
def test_the_library_computes_it(function: Function, activations: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Layered(function), torch.randn(2, 4, 16), activations, tmp_path)
    assert distance.max_lsb is not None and distance.mean_lsb is not None
    assert distance.max_lsb < 8 and distance.mean_lsb < 1
