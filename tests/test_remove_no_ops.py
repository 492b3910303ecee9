"""remove-no-ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.remove_no_ops import RemoveNoOps


class Idle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(x, 0.5, self.training).clone().contiguous().to(torch.float32)
        return y.transpose(0, 1).contiguous().view(-1) + x.view(x.shape).sum()


def test_only_what_computes_is_left() -> None:
    x = torch.randn(3, 4)
    graph = capture(Idle(), (x,))
    result = RemoveNoOps().run(graph, PassContext())
    names = [op_name(node) for node in result.model.graph.nodes if node.op == "call_function"]
    assert result.modified and result.changes
    assert sorted(names) == ["aten.add", "aten.reshape", "aten.sum", "aten.transpose"]
    assert torch.equal(result.model(x), Idle().eval()(x))


def test_nothing_to_do() -> None:
    graph = capture(nn.Linear(4, 4), (torch.ones(1, 4),))
    assert not RemoveNoOps().run(graph, PassContext()).modified


class Cache(nn.Module):
    """A lazily made cache: nothing, then the first entry."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.cat([torch.tensor([]), x], -2), x, torch.zeros(0, 4)], -2)


def test_empty_parts_of_a_concatenation_are_dropped() -> None:
    x = torch.randn(3, 4)
    graph = RemoveNoOps().run(capture(Cache(), (x,)), PassContext()).model
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert [op_name(node) for node in calls] == ["aten.cat"]
    assert len(calls[0].args[0]) == 2
    assert torch.equal(graph(x), Cache()(x))
