"""fuse-gelu."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering import Applied, htp_parity
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler.capture import capture
from fraqat_compiler.instruments import Verification
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.fuse_gelu import FuseGelu

Function = Callable[[Tensor], Tensor]


WRITTEN_OUT: list[Function] = [
    lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    lambda x: x * 0.5 * (1.0 + torch.erf(x * 0.70710678)),
    lambda x: x * (torch.erf(x / 1.41421) + 1) / 2,
    lambda x: x * (0.5 * (torch.erf(x * 2**-0.5) + 1)),
    lambda x: 0.5 * x * torch.erfc(-x / 2**0.5),
    lambda x: x * (1 + torch.erf(x / torch.tensor(2.0).sqrt())) * torch.tensor(0.5),
    lambda x: x * torch.special.ndtr(x),
]
OTHERS: list[Function] = [
    torch.erf,
    lambda x: 0.5 * x * (1 + torch.erf(x)),
    lambda x: x * (1 + torch.erf(x / 2**0.5)),
    lambda x: 0.5 * x.exp() * (1 + torch.erf(x / 2**0.5)),
    lambda x: 0.5 * x * (2 + torch.erf(x / 2**0.5)),
    lambda x: 0.5 * x / (1 + torch.erf(x / 2**0.5)),
    lambda x: 0.5 * x * torch.erfc(x / 2**0.5),
]


def _run(function: Function) -> tuple[GraphModule, bool]:
    x = torch.linspace(-4, 4, 24).reshape(2, 12)
    graph = PassManager.from_text("remove-no-ops,fold-constants").run(capture(Applied(function), (x,))).model
    result = PassManager((FuseGelu(),)).run(graph, instruments=[Verification()])
    torch.testing.assert_close(result.model(x), function(x), atol=1e-5, rtol=1e-4)
    return result.model, result.records[0].modified


@pytest.mark.parametrize("function", WRITTEN_OUT)
def test_what_is_written_out_becomes_one_op(function: Function) -> None:
    graph, modified = _run(function)
    assert modified
    assert [op_name(node) for node in graph.graph.nodes if node.op == "call_function"] == ["aten.gelu"]


@pytest.mark.parametrize("function", OTHERS)
def test_others_are_left_alone(function: Function) -> None:
    assert not _run(function)[1]


def test_the_library_computes_it(tmp_path: Path) -> None:
    """It refuses Erf."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), Applied(WRITTEN_OUT[0]), nn.Linear(64, 32))
    distance = htp_parity(model, torch.randn(1, 16, 64), 8, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 3.01
