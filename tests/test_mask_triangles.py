"""mask-triangles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering import Applied, htp_parity
from torch import Tensor

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.mask_triangles import MaskTriangles

Function = Callable[[Tensor], Tensor]
FUNCTIONS: list[Function] = [torch.tril, torch.triu, lambda x: x.tril(-1), lambda x: x.triu(2)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_triangle_is_a_product(function: Function) -> None:
    x = torch.randn(2, 8, 12)
    graph = capture(Applied(function), (x,))
    result = MaskTriangles().run(graph, PassContext())
    assert result.modified
    assert [op_name(node) for node in result.model.graph.nodes if node.op == "call_function"] == ["aten.mul"]
    torch.testing.assert_close(result.model(x), function(x), rtol=0, atol=0)
    assert not MaskTriangles().run(result.model, PassContext()).modified


def test_integers_stay() -> None:
    graph = capture(Applied(torch.tril), (torch.ones(4, 4, dtype=torch.long),))
    assert not MaskTriangles().run(graph, PassContext()).modified


@pytest.mark.parametrize("activations", [8, 16])
def test_the_library_computes_it(activations: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Applied(torch.tril), torch.randn(1, 2, 16, 16), activations, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 2
