"""rotate-pairs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering import Applied, htp_parity
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.rotate_pairs import RotatePairs

Function = Callable[[Tensor], Tensor]


def unbound(x: Tensor) -> Tensor:
    """As diffusers writes it."""
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return torch.stack([-imaginary, real], dim=-1).flatten(x.ndim - 1)


def sliced(x: Tensor) -> Tensor:
    """As GPT-J writes it."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


OTHERS: list[Function] = [
    lambda x: torch.stack((x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2),
    lambda x: torch.stack((-x[..., ::2], x[..., 1::2]), dim=-1).flatten(-2),
    lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-2).flatten(-2),
    lambda x: torch.cat((-x[..., 8:], x[..., :8]), dim=-1),
    lambda x: torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1),
]


def _rotated(function: Function, x: Tensor) -> tuple[GraphModule, bool]:
    graph = PassManager.from_text("remove-no-ops,fold-constants").run(capture(Applied(function), (x,))).model
    expected = graph(x)
    result = RotatePairs().run(graph, PassContext())
    torch.testing.assert_close(result.model(x), expected, rtol=0, atol=0)
    return result.model, result.modified


@pytest.mark.parametrize("function", [unbound, sliced])
@pytest.mark.parametrize("shape", [(1, 4, 2, 16), (3, 16)])
def test_pairs_are_turned_by_a_matrix(function: Function, shape: tuple[int, ...]) -> None:
    graph, modified = _rotated(function, torch.randn(shape))
    assert modified
    assert [op_name(node) for node in graph.graph.nodes if node.op == "call_function"] == ["aten.linear"]
    assert not RotatePairs().run(graph, PassContext()).modified


@pytest.mark.parametrize("function", OTHERS)
def test_others_stay(function: Function) -> None:
    assert not _rotated(function, torch.randn(1, 4, 2, 16))[1]


class Keys(nn.Module):
    """Keys of FLUX: a layer, a norm of each head, rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(32, 32), nn.RMSNorm(16, eps=1e-6)
        self.angles = nn.Parameter(torch.rand(28, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        heads = self.norm(self.layer(x).unflatten(-1, (2, 16)))
        return heads * self.angles.cos() + unbound(heads) * self.angles.sin()


def test_the_library_computes_it(tmp_path: Path) -> None:
    """Taken apart and stacked, they are off by 7,000 steps, and by 260 in the mean."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Keys(), torch.randn(1, 28, 32), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 5
    assert abs(distance.slope - 1) < 1e-4
