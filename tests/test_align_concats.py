"""align-concats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered, ops, run_onnx
from torch import Tensor, nn

from fraqat_compiler import qdq
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.align_concats import AlignConcats
from fraqat_compiler.qdq_writer import Grid

LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants"


class Rotated(nn.Module):
    """The rotation of rotary positions, behind a layer, with a cache in front."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        rotated = torch.cat([-y[..., 8:], y[..., :8]], -1)
        return torch.cat([4 * x[..., :16], y * 0.5 + rotated * 0.3], 1)


def _input() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(1, 12, 32)


@pytest.mark.parametrize("activations", ["8", "16"])
def test_all_parts_have_the_grid_of_the_whole_and_no_result_changes(activations: str, tmp_path: Path) -> None:
    x = _input()
    graph = lowered(fake_quantized(Rotated(), (x,), activations=activations), LOWER)
    (before,) = run_onnx(graph, [x], tmp_path)
    assert AlignConcats().run(graph, PassContext()).modified
    for node in graph.nodes:
        if node.op == "Concat":
            (quantizer,) = node.outputs[0].outputs
            assert [Grid.behind(tensor) for tensor in node.inputs] == [Grid.of(quantizer)] * 2
    (after,) = run_onnx(graph, [x], tmp_path)
    np.testing.assert_array_equal(after, before)
    assert not AlignConcats().run(graph, PassContext()).modified


def test_parts_of_one_grid_stay() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x[..., 16:], x[..., :16]], -1)

    graph = lowered(fake_quantized(Halves(), (_input(),)), LOWER)
    assert "Concat" in ops(graph)
    assert not AlignConcats().run(graph, PassContext()).modified


def test_the_library_takes_it(tmp_path: Path) -> None:
    """It strays without the pass in decoders of `tools/architectures.py` only."""
    pytest.importorskip("onnxruntime_qnn")
    distance = htp_parity(Rotated(), _input(), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 6


def test_codes_of_constants_stay() -> None:
    class Prefixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("prefix", torch.randn(1, 2, 32))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.prefix, x * 3], 1)

    graph = lowered(fake_quantized(Prefixed(), (_input(),)), LOWER)
    AlignConcats().run(graph, PassContext())
    (node,) = (node for node in graph.nodes if node.op == "Concat")
    source = qdq.made_by(node.inputs[0], qdq.DEQUANTIZE)
    assert source is not None and qdq.is_constant(source.inputs[0])
