"""drop-negligible-addends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered, ops, run_onnx
from torch import Tensor, nn

from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.drop_negligible_addends import DropNegligibleAddends

LOWER = f"{EXPORT},fold-fake-quant"


class Ratio(nn.Module):
    """Normalized weights, guarded against a sum of 0 as linear attention does it."""

    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.sum(-1, keepdim=True) + self.epsilon)


@pytest.mark.parametrize(("epsilon", "modified"), [(1e-15, True), (1e-6, True), (0.5, False)])
def test_only_what_no_code_shows_is_dropped(epsilon: float, modified: bool, tmp_path: Path) -> None:
    x = torch.rand(4, 8) + 0.1
    graph = lowered(fake_quantized(Ratio(epsilon), (x,)), LOWER)
    (before,) = run_onnx(graph, [x], tmp_path)
    assert DropNegligibleAddends().run(graph, PassContext()).modified == modified
    assert ("Add" in ops(graph)) != modified
    np.testing.assert_array_equal(run_onnx(graph, [x], tmp_path)[0], before)


@pytest.mark.parametrize("activations", [8, 16])
def test_the_library_computes_it(activations: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Ratio(1e-15), torch.rand(4, 8) + 0.1, activations, tmp_path)
    assert distance.cosine > 0.999 and abs(distance.slope - 1) < 0.01
