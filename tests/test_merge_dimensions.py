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
WEIGHTS = torch.linspace(-1, 1, 720).reshape(SHAPE)

SHAPE_OPS = ("aten.reshape", "aten.select", "aten.slice", "aten.transpose")

MERGED: dict[str, tuple[Function, tuple[int, ...]]] = {
    "relu": (lambda x: x.relu(), (6, 4, 5, 6)),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), (6, 4, 5, 6)),
    "scalar": (lambda x: 2.0 * x, (6, 4, 5, 6)),
    "itself": (lambda x: x * x, (6, 4, 5, 6)),
    "broadcast": (lambda x: x + x[0, :, :, :1], (2, 12, 5, 6)),
    "row": (lambda x: x * x[0, 0, 0, 0], (6, 4, 5, 6)),
    "softmax": (lambda x: x.softmax(-1), (6, 4, 5, 6)),
    "softmax of the first": (lambda x: x.softmax(0), (2, 12, 5, 6)),
    "mean": (lambda x: x.mean((1, 2)), (2, 12, 5, 6)),
    "kept mean": (lambda x: x.mean(-1, keepdim=True), (6, 4, 5, 6)),
    "sum": (lambda x: x.sum((0, -1)), (2, 12, 5, 6)),
    "maximum": (lambda x: x.amax(3), (6, 4, 5, 6)),
    "linear": (lambda x: functional.linear(x, WEIGHT), (120, 6)),
    "matmul": (lambda x: x @ x.transpose(-1, -2), (24, 5, 6)),
    "norm": (lambda x: functional.layer_norm(x, (5, 6)), (24, 5, 6)),
}
OTHERS: dict[str, Function] = {
    "rank 4": lambda x: x[0].relu(),
    "shape": lambda x: x.flatten(1, 2).relu(),
    "kept apart": lambda x: x + x[:, :1, :, :1],
    "weight": lambda x: x + WEIGHTS,
    "made of nothing": lambda x: x[0] + torch.full(SHAPE, 0.5)[0],
    "sum of a weight": lambda x: x[0] + WEIGHTS.sum(0),
    "softmax of a weight": lambda x: x[0] + WEIGHTS.softmax(-1)[0],
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
    function, shape = MERGED[name]
    graph, modified = _merged(function)
    assert modified
    (node,) = [node for node in graph.graph.nodes if node.op == "call_function" and op_name(node) not in SHAPE_OPS]
    assert value_of(node.all_input_nodes[0]).shape == shape
    assert not MergeDimensions().run(graph, PassContext()).modified


@pytest.mark.parametrize("name", OTHERS)
def test_others_are_left_alone(name: str) -> None:
    assert not _merged(OTHERS[name])[1]


def test_reshapes_that_meet_become_one() -> None:
    model, x = Applied(lambda x: x.relu().softmax(-1).sigmoid()), torch.randn(SHAPE)
    graph = PassManager.from_text("merge-dimensions,simplify-shapes").run(capture(model, (x,))).model
    shapes = [value_of(node).ndim for node in graph.graph.nodes if node.op == "call_function"]
    assert max(shapes[:-1]) <= 4
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
