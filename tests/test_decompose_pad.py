"""decompose-pad."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import htp_parity
from torch import Tensor, nn
from torch.nn import functional

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.decompose_pad import DecomposePad


class Pad(nn.Module):
    def __init__(self, amounts: tuple[int, ...], mode: str = "constant", value: float | None = None) -> None:
        super().__init__()
        self.amounts, self.mode, self.value = amounts, mode, value

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, self.amounts, self.mode, self.value)


@pytest.mark.parametrize("amounts", [(0, 0, 0, 1), (1, 2), (1, 0, 2, 3)])
def test_a_value_becomes_a_constant(amounts: tuple[int, ...]) -> None:
    x, model = torch.randn(2, 3, 4), Pad(amounts, value=1.0)
    graph = capture(model, (x,))
    assert DecomposePad().run(graph, PassContext()).modified
    assert {op_name(node) for node in graph.graph.nodes if node.op == "call_function"} == {"aten.cat"}
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("amounts", [(1, 2), (4, 0), (1, 0, 2, 3), (0, 0, 0, 3), (4, 4, 3, 3, 1, 2), (0, 0)])
def test_circular_padding_becomes_slices(amounts: tuple[int, ...], rank: int) -> None:
    """Torch pads all dimensions but one or two."""
    x, model = torch.randn((2, 3, 2, 3, 4)[-len(amounts) // 2 - rank :]), Pad(amounts, "circular")
    graph = capture(model, (x,))
    assert DecomposePad().run(graph, PassContext()).modified
    assert {op_name(node) for node in graph.graph.nodes if node.op == "call_function"} <= {"aten.cat", "aten.slice"}
    assert torch.equal(graph(x), model(x))


@pytest.mark.parametrize(
    "model",
    [Pad((1, 1)), Pad((1, 1), "reflect"), Pad((-1, 1), value=1.0), Pad((-1, 1), "circular"), nn.ReLU()],
)
def test_others_are_left_alone(model: nn.Module) -> None:
    assert not DecomposePad().run(capture(model, (torch.randn(2, 3, 4),)), PassContext()).modified


@pytest.mark.parametrize("activations", [8, 16])
def test_the_library_computes_a_value(activations: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), Pad((0, 0, 0, 1), value=1.0), nn.Linear(16, 16))
    distance = htp_parity(model, torch.randn(2, 8, 16), activations, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 4


@pytest.mark.parametrize("activations", [8, 16])
def test_the_library_computes_circular_padding(activations: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), nn.CircularPad2d((1, 2, 0, 3)))
    distance = htp_parity(model, torch.randn(2, 4, 6, 8), activations, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 4
