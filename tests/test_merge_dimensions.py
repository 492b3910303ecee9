"""merge-dimensions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering import Applied, htp_parity
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name, value_of
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.merge_dimensions import MergeDimensions

Function = Callable[[Tensor], Tensor]
SHAPE = (2, 3, 4, 5, 6)
WEIGHT = torch.linspace(-1, 1, 6 * 7).reshape(7, 6)

SHAPE_OPS = ("aten.reshape", "aten.select", "aten.slice", "aten.transpose")

MERGED: dict[str, tuple[Function, int]] = {
    "relu": (lambda x: x.relu(), 1),
    "sqrt": (lambda x: x.abs().sqrt(), 1),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), 1),
    "scalar": (lambda x: 2.0 * x + 1, 1),
    "itself": (lambda x: x * x.sigmoid(), 1),
    "broadcast": (lambda x: x + x[0, :, :, :1], 4),
    "row": (lambda x: x * x[0, 0, 0, 0], 2),
    "softmax": (lambda x: x.softmax(-1), 2),
    "softmax of the middle": (lambda x: x.softmax(2), 3),
    "mean": (lambda x: x.mean((1, 2)), 3),
    "kept mean": (lambda x: x.mean(-1, keepdim=True), 2),
    "sum": (lambda x: x.sum((0, -1)), 3),
    "maximum": (lambda x: x.amax(2), 3),
    "linear": (lambda x: functional.linear(x, WEIGHT), 2),
    "matmul": (lambda x: x @ x.abs().transpose(-1, -2), 3),
    "norm": (lambda x: functional.layer_norm(x, (5, 6)), 3),
}
OTHERS: dict[str, Function] = {
    "rank 4": lambda x: x[0].relu(),
    "shape": lambda x: x.flatten(1, 2).relu(),
    "kept apart": lambda x: x + x[:, :1, :, :1],
    "convolution": lambda x: functional.conv3d(x, torch.ones(2, 3, 1, 1, 1)).relu(),
}


def _merged(function: Function) -> tuple[GraphModule, bool]:
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    graph = capture(Applied(function), (x,))
    result = MergeDimensions().run(graph, PassContext())
    torch.testing.assert_close(result.model(x), function(x))
    return result.model, result.modified


@pytest.mark.parametrize("name", MERGED)
def test_dimensions_are_merged(name: str) -> None:
    function, rank = MERGED[name]
    graph, modified = _merged(function)
    assert modified
    calls = [node for node in graph.graph.nodes if node.op == "call_function" and op_name(node) not in SHAPE_OPS]
    assert max(value_of(operand).ndim for node in calls for operand in node.all_input_nodes) == rank
    assert not MergeDimensions().run(graph, PassContext()).modified


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name: str) -> None:
    assert not _merged(OTHERS[name])[1]


def test_reshapes_that_meet_become_one() -> None:
    model, x = Applied(lambda x: x.relu().softmax(-1).sigmoid()), torch.randn(SHAPE)
    graph = PassManager.from_text("merge-dimensions,simplify-shapes").run(capture(model, (x,))).model
    shapes = [value_of(node).ndim for node in graph.graph.nodes if node.op == "call_function"]
    assert max(shapes[:-1]) <= 2
    torch.testing.assert_close(graph(x), model(x))


class HeadsOfOne(nn.Module):
    """Each value of a transposed tensor in a space of its own, as networks of time series have it."""

    def __init__(self, last: Function) -> None:
        super().__init__()
        self.first, self.each, self.last = nn.Linear(32, 32), nn.Linear(1, 16), last

    def forward(self, x: Tensor) -> Tensor:
        heads = self.first(x).reshape(2, 8, 2, 16).transpose(1, 2)
        return self.last(self.each(heads.unsqueeze(-1)))


@pytest.mark.parametrize("last", [lambda x: x.mean(-1), lambda x: (x + x.sigmoid()).flatten(1, 2)])
def test_the_library_computes_it(last: Function, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(HeadsOfOne(last), torch.randn(2, 8, 32), 8, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 4
