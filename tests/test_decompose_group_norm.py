"""decompose-group-norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler.capture import capture
from fraqat_compiler.instruments import Verification
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.decompose_group_norm import DecomposeGroupNorm


class Twice(nn.Module):
    """One norm that is called twice: its parameters are read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = _with_random_affine(nn.GroupNorm(2, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.norm(x).relu())


def _with_random_affine(norm: nn.GroupNorm) -> nn.GroupNorm:
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    return norm


def _run(model: nn.Module, x: Tensor) -> tuple[GraphModule, bool]:
    result = PassManager((DecomposeGroupNorm(),)).run(capture(model, (x,)), instruments=[Verification()])
    return result.model, result.records[0].modified


@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 8), 1), ((2, 8), 4), ((2, 8, 5), 8), ((2, 8, 4, 3), 1), ((2, 8, 4, 3), 4), ((1, 8, 2, 3, 2), 8)],
)
def test_values_stay_at_every_rank(shape: tuple[int, ...], groups: int) -> None:
    model, x = _with_random_affine(nn.GroupNorm(groups, 8, eps=1e-3)), 3 * torch.randn(shape) + 1
    graph, modified = _run(model, x)
    assert modified and "aten.group_norm" not in map(op_name, graph.graph.nodes)
    torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-5)


def test_without_affine_there_is_no_map_of_channels() -> None:
    model, x = nn.GroupNorm(2, 8, affine=False), torch.randn(2, 8, 5)
    graph, _ = _run(model, x)
    calls = [op_name(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.reshape", "aten.layer_norm", "aten.reshape"]
    torch.testing.assert_close(graph(x), model(x), atol=1e-6, rtol=1e-5)


def test_parameters_keep_their_names_and_are_still_trained() -> None:
    graph, _ = _run(nn.Sequential(nn.Conv2d(3, 8, 1), _with_random_affine(nn.GroupNorm(2, 8))), torch.randn(1, 3, 4, 4))
    parameters = dict(graph.named_parameters())
    assert parameters["1.weight"].shape == (8, 1, 1, 1) and parameters["1.bias"].shape == (8,)
    graph(torch.randn(1, 3, 4, 4)).square().sum().backward()
    assert parameters["1.weight"].grad is not None and parameters["1.weight"].grad.abs().sum() > 0


def test_parameters_that_are_read_twice_stay_one() -> None:
    model, x = Twice(), torch.randn(2, 8, 5)
    graph, _ = _run(model, x)
    assert {name for name, _ in graph.named_parameters()} == {"norm.weight", "norm.bias"}
    torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-5)


def test_other_norms_are_left() -> None:
    _, modified = _run(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(2, 8))
    assert not modified
