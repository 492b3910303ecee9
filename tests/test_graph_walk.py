"""A graph run op by op on several batches: the values are those of a plain run, and few are kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fraqat_compiler import fx_graph
from fraqat_compiler.calibration import Batch, calibrate, input_values
from fraqat_compiler.capture import capture
from fraqat_compiler.graph_walk import GraphWalk
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant


class Net(nn.Module):
    """A residual stream, two inputs and an op with several results."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        for layer in self.layers:
            first, second = torch.chunk(layer(x), 2, dim=-1)
            x = x + torch.cat([torch.tanh(first), second], dim=-1) + shift
        return x


class _Recorded(Interpreter):
    """Keeps what every node came to."""

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]

    @classmethod
    def of(cls, graph: GraphModule, batch: Batch) -> dict[Node, Any]:
        interpreter = cls(graph)
        interpreter.seen = {}
        interpreter.run(*input_values(graph, batch), enable_io_processing=False)
        return interpreter.seen


def _batches(as_mapping: bool) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 8, generator=generator), torch.randn(8, generator=generator)) for _ in range(3)]
    return [{"shift": shift, "x": x} for x, shift in pairs] if as_mapping else list(pairs)


def _graph(batch: Batch) -> GraphModule:
    torch.manual_seed(0)
    args, kwargs = ((), dict(batch)) if isinstance(batch, Mapping) else (tuple(batch), {})
    graph = InsertFakeQuant().run(capture(Net(), args, kwargs), PassContext()).model
    calibrate(graph, [batch])
    return graph


def _linears(graph: GraphModule) -> list[Node]:
    return [node for node in graph.graph.nodes if op_name(node) == "aten.linear"]


@pytest.mark.parametrize("as_mapping", [False, True])
def test_the_values_are_those_of_a_plain_run(as_mapping: bool) -> None:
    batches = _batches(as_mapping)
    graph = _graph(batches[0])
    expected = [_Recorded.of(graph, batch) for batch in batches]
    walk = GraphWalk(graph, batches)
    for linear in _linears(graph):
        walk.advance_to(linear)
        for source in linear.all_input_nodes:
            for value, seen in zip(walk.values_of(source), expected, strict=True):
                assert torch.equal(value, seen[source])


def test_what_comes_next_sees_a_weight_that_was_exchanged() -> None:
    batches = _batches(False)
    graph = _graph(batches[0])
    first, second = _linears(graph)[:2]
    walk = GraphWalk(graph, batches)
    walk.advance_to(first)
    name = str(first.args[1].args[0].target)  # type: ignore[union-attr]
    fx_graph.set_tensor(graph, name, nn.Parameter(torch.zeros(8, 8)))
    walk.advance_to(second)
    expected = [_Recorded.of(graph, batch)[second.args[0]] for batch in batches]
    assert all(map(torch.equal, walk.values_of(second.args[0]), expected))


def test_only_what_is_read_later_is_kept() -> None:
    batches = _batches(False)
    graph = _graph(batches[0])
    walk = GraphWalk(graph, batches)
    last = _linears(graph)[-1]
    walk.advance_to(last)
    readers = {source for node in graph.graph.nodes if not node < last for source in node.all_input_nodes}
    assert all(set(values) <= readers for values in walk._batches)
    assert len(walk._batches[0]) < 6
