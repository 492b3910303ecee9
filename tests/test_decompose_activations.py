"""decompose-activations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from fraqat_compiler.capture import capture
from fraqat_compiler.instruments import Verification
from fraqat_compiler.ops import module_path, op_name
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.decompose_activations import DecomposeActivations


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(x))


def _run(model: nn.Module, x: Tensor) -> tuple[GraphModule, bool]:
    result = PassManager((DecomposeActivations(),)).run(capture(model, (x,)), instruments=[Verification()])
    return result.model, result.records[0].modified


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (functional.silu, ["sigmoid", "mul"]),
        (functional.mish, ["softplus", "tanh", "mul"]),
        (functional.glu, ["slice", "slice", "sigmoid", "mul"]),
        (lambda x: functional.glu(x, dim=1), ["slice", "slice", "sigmoid", "mul"]),
        (functional.logsigmoid, ["neg", "softplus", "neg"]),
        (lambda x: functional.softplus(x, beta=2.0), ["mul", "softplus", "div"]),
        (functional.celu, ["elu"]),
        (lambda x: functional.celu(x, alpha=2.0), ["div", "elu", "mul"]),
        (torch.sinh, ["exp", "neg", "exp", "sub", "div"]),
        (lambda x: torch.logsumexp(x, -1, keepdim=True), ["amax", "sub", "exp", "sum", "log", "add"]),
        (lambda x: torch.logsumexp(x, (1, 2)), ["amax", "sub", "exp", "sum", "log", "add", "reshape"]),
    ],
)
def test_they_are_written_out_without_a_change_of_value(
    activation: Callable[[Tensor], Tensor], expected: list[str]
) -> None:
    model, x = Activated(activation), 4 * torch.randn(2, 6, 8)
    graph, modified = _run(model, x)
    calls = [op_name(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert modified and calls == ["aten.linear", *(f"aten.{name}" for name in expected)]
    torch.testing.assert_close(graph(x), model(x), atol=1e-5, rtol=1e-5)


def test_log_sigmoid_stays_finite_where_the_sigmoid_is_zero() -> None:
    x = torch.tensor([-200.0, 0.0, 200.0])
    graph, _ = _run(nn.LogSigmoid(), x)
    torch.testing.assert_close(graph(x), functional.logsigmoid(x))


def test_the_parts_belong_to_the_module_they_came_from() -> None:
    graph, _ = _run(nn.Sequential(nn.Linear(8, 8), nn.SiLU()), torch.randn(2, 8))
    assert [module_path(node) for node in graph.graph.nodes if node.op == "call_function"] == ["0", "1", "1"]


@pytest.mark.parametrize("name", ["gelu", "softplus"])
def test_other_functions_are_left(name: str) -> None:
    graph, modified = _run(Activated(getattr(functional, name)), torch.randn(2, 8))
    assert not modified
    calls = [op_name(node) for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.linear", f"aten.{name}"]
