"""reduce-rank."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import value_of
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.reduce_rank import ReduceRank


class Permute(nn.Module):
    def __init__(self, order: tuple[int, ...]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Unpatchify(nn.Module):
    """Patches (N, 16, 2 * 2 * 3) to an image (N, 3, 8, 8)."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(-1, 4, 4, 2, 2, 3)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(-1, 3, 8, 8)


def _highest_rank(graph: GraphModule) -> int:
    calls = (node for node in graph.graph.nodes if node.op == "call_function")
    return max(value_of(node).ndim for node in calls)


@pytest.mark.parametrize("shape", [(1, 2, 3, 2, 3, 2), (2, 3, 2, 2, 3, 2)])
def test_every_order_of_six_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    for order in list(itertools.permutations(range(6)))[1::37]:
        graph = capture(Permute(order), (x,))
        assert ReduceRank().run(graph, PassContext()).modified
        assert torch.equal(graph(x), x.permute(order))
        permutes = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default)
        assert max((value_of(node).ndim for node in permutes), default=0) <= 4


@pytest.mark.parametrize("batch", [1, 2])
def test_no_high_rank_is_left_of_an_unpatchify(batch: int) -> None:
    x = torch.randn(batch, 16, 12)
    graph = capture(Unpatchify(), (x,))
    graph = PassManager.from_text("remove-no-ops,reduce-rank,simplify-shapes").run(graph).model
    torch.testing.assert_close(graph(x), Unpatchify()(x))
    assert _highest_rank(graph) <= 4


def test_lower_ranks_are_left_alone() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert not ReduceRank().run(capture(Permute((0, 3, 2, 1)), (x,)), PassContext()).modified


class Repeat(nn.Module):
    """Heads of grouped-query attention, each for `count` query heads."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        batch, heads, length, size = x.shape
        x = x[:, :, None].expand(batch, heads, self.count, length, size)
        return x.reshape(batch, heads * self.count, length, size)


@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (1, 2, 5, 4), (2, 3, 5, 4)])
def test_repeated_heads_keep_four_dimensions(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    graph = PassManager.from_text("remove-no-ops,reduce-rank,simplify-shapes").run(capture(Repeat(3), (x,))).model
    assert torch.equal(graph(x), Repeat(3)(x))
    assert _highest_rank(graph) <= 4
