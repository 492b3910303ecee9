"""fold-batch-norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.fold_batch_norm import FoldBatchNorm


def _trained(norm: nn.Module) -> nn.Module:
    """Give a norm statistics and parameters that are not the identity."""
    generator = torch.Generator().manual_seed(0)
    for name in ("running_mean", "weight", "bias"):
        getattr(norm, name).data = torch.randn(getattr(norm, name).shape, generator=generator)
    norm.running_var.data = torch.rand(norm.running_var.shape, generator=generator) + 0.1
    return norm


CASES = {
    "conv1d": (nn.Sequential(nn.Conv1d(4, 6, 3, bias=False), _trained(nn.BatchNorm1d(6))), (2, 4, 9)),
    "conv2d with bias": (nn.Sequential(nn.Conv2d(4, 6, 3), _trained(nn.BatchNorm2d(6))), (2, 4, 9, 9)),
    "depthwise": (nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), _trained(nn.BatchNorm2d(4))), (2, 4, 9, 9)),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(4, 6, 2), _trained(nn.BatchNorm2d(6))), (2, 4, 5, 5)),
    "linear": (nn.Sequential(nn.Linear(4, 6), _trained(nn.BatchNorm1d(6))), (3, 4)),
    "no affine": (nn.Sequential(nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6, affine=False)), (2, 4, 5, 5)),
}


@pytest.mark.parametrize("case", CASES)
def test_folded_into_the_layer_before(case: str) -> None:
    model, shape = CASES[case]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    graph = capture(model, (x,))
    result = FoldBatchNorm().run(graph, PassContext())
    assert result.modified
    assert len([node for node in result.model.graph.nodes if node.op == "call_function"]) == 1
    torch.testing.assert_close(result.model(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 6), (2, 4, 5, 5), (1, 4, 2, 3, 3)])
def test_alone_it_becomes_a_layer_of_its_own(shape: tuple[int, ...]) -> None:
    norm = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)](4)
    model = nn.Sequential(nn.Sigmoid(), _trained(norm)).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = FoldBatchNorm().run(capture(model, (x,)), PassContext())
    assert not any("batch_norm" in op_name(node) for node in result.model.graph.nodes)
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_layer_with_two_readers_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), _trained(nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model, x = Shared().eval(), torch.randn(1, 4, 3, 3)
    result = FoldBatchNorm().run(capture(model, (x,)), PassContext())
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_nothing_to_do() -> None:
    assert not FoldBatchNorm().run(capture(nn.Linear(2, 2), (torch.ones(1, 2),)), PassContext()).modified
