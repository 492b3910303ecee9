"""scatter-rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering import htp_parity
from torch import Tensor, nn

from fraqat_compiler.capture import capture
from fraqat_compiler.instruments import Verification
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.scatter_rows import ScatterRows

Index = Callable[[Tensor], Tensor]


class Cache(nn.Module):
    """Writes the rows of x into a cache of 8."""

    def __init__(self, index: Index, count: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.index, self.count = index, count
        self.linear = nn.Linear(16, 16)
        self.register_buffer("cache", torch.randn(1, 2, 8, 16))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        rows = self.linear(x).reshape(1, 2, -1, 16)[:, :, : self.count]
        return self.cache.scatter(2, self.index(position), rows)


class Fixed(nn.Module):
    """The same of one input, on what another linear layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x).scatter(1, torch.full((1, 1, 16), 5), self.second(x[:, :1]))


WHOLE: list[tuple[Index, Tensor]] = [
    (lambda p: p.view(1, 1, 1, 1).expand(1, 2, 1, 16), torch.tensor([5])),
    (lambda p: p[None, None, :, None].expand(1, 2, 3, 16), torch.tensor([5, 0, 2])),
    (lambda p: torch.full((1, 2, 1, 16), 3), torch.tensor([5])),
]
PARTIAL: list[tuple[Index, Tensor]] = [
    (lambda p: p.view(1, 1, 1, 16).expand(1, 2, 1, 16), torch.arange(16) % 8),
    (lambda p: p.view(1, 1, 1, 1).expand(1, 2, 1, 8), torch.tensor([5])),
    (lambda p: (p.view(1, 1, 1, 1) + torch.arange(16)).expand(1, 2, 1, 16) % 8, torch.tensor([5])),
]


def _run(index: Index, position: Tensor) -> tuple[list[str], bool]:
    model, args = Cache(index, index(position).shape[2]).eval(), (torch.randn(1, 6, 16), position)
    graph = PassManager.from_text("remove-no-ops,fold-constants").run(capture(model, args)).model
    result = PassManager((ScatterRows(),)).run(graph, instruments=[Verification()])
    torch.testing.assert_close(result.model(*args), model(*args))
    names = [op_name(node) for node in result.model.graph.nodes if node.op == "call_function"]
    return names, result.records[0].modified


@pytest.mark.parametrize(("index", "position"), WHOLE)
def test_whole_rows_are_copied(index: Index, position: Tensor) -> None:
    names, modified = _run(index, position)
    assert modified
    assert names[-1] == "aten.index_copy"


@pytest.mark.parametrize(("index", "position"), PARTIAL)
def test_others_are_left_alone(index: Index, position: Tensor) -> None:
    names, modified = _run(index, position)
    assert not modified
    assert names[-1] == "aten.scatter"


def test_the_library_computes_it(tmp_path: Path) -> None:
    """ScatterElements is up to 95 steps off at 8 bits."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Fixed(), torch.randn(1, 8, 16), 8, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 2.01
