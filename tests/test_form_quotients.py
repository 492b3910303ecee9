"""form-quotients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering import Applied, htp_parity
from torch import Tensor
from torch.fx import GraphModule

from fraqat_compiler.capture import capture
from fraqat_compiler.instruments import Verification
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.form_quotients import FormQuotients

Function = Callable[[Tensor], Tensor]
PRODUCTS: list[Function] = [
    lambda x: x * torch.rsqrt(x.abs() + 1),
    lambda x: torch.reciprocal(torch.sqrt(x.abs() + 1)) * x,
    lambda x: x * (1.0 / torch.sqrt(x.abs() + 1)),
    lambda x: x * (x.abs() + 1) ** -0.5,
    lambda x: x * (1 / (x.abs() + 1) ** 0.5),
]
RECIPROCALS: list[Function] = [
    lambda x: torch.rsqrt(x.abs() + 1),
    lambda x: 2.0 * torch.rsqrt(x.abs() + 1),
    lambda x: torch.rsqrt(x.abs() + 1) ** 2,
]
OTHERS: list[Function] = [lambda x: (x.abs() + 1) ** -1.5, lambda x: x / x.abs().sqrt()]


def _of_what_stays_below_one(x: Tensor) -> Tensor:
    return 1 / (x.abs().clamp(max=0.3) + 0.5)


def _run(function: Function) -> tuple[list[str], bool]:
    x = torch.linspace(-2, 2, 24).reshape(2, 12)
    graph: GraphModule = capture(Applied(function), (x,))
    result = PassManager((FormQuotients(),)).run(graph, instruments=[Verification()])
    torch.testing.assert_close(result.model(x), function(x))
    names = [op_name(node) for node in result.model.graph.nodes if node.op == "call_function"]
    return names, result.records[0].modified


@pytest.mark.parametrize("function", PRODUCTS)
def test_a_product_becomes_a_quotient(function: Function) -> None:
    assert _run(function) == (["aten.abs", "aten.add", "aten.sqrt", "aten.div"], True)


@pytest.mark.parametrize("function", RECIPROCALS)
def test_a_reciprocal_becomes_a_quotient_of_one(function: Function) -> None:
    names, modified = _run(function)
    assert modified
    assert names[2:4] == ["aten.sqrt", "aten.div"]


@pytest.mark.parametrize("function", [lambda x: 1 / (x.abs() + 1), lambda x: x * torch.reciprocal(x.abs() + 1)])
def test_a_reciprocal_of_anything_becomes_a_quotient(function: Function) -> None:
    assert _run(function) == (["aten.abs", "aten.add", "aten.div"], True)


@pytest.mark.parametrize("function", OTHERS)
def test_others_are_left_alone(function: Function) -> None:
    assert not _run(function)[1]


@pytest.mark.parametrize(
    ("function", "activations"), [(RECIPROCALS[0], 16), (PRODUCTS[1], 8), (_of_what_stays_below_one, 8)]
)
def test_the_library_computes_it(function: Function, activations: int, tmp_path: Path) -> None:
    """The reciprocals are 50 steps off at 16 bits, and off by a factor of 0.63 where a quantizer lies between."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Applied(lambda x: function(x / 8)), torch.randn(16, 64), activations, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 4.01
    assert abs(distance.slope - 1) < 5e-3
