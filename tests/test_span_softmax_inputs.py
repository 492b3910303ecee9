"""span-softmax-inputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered, run_onnx
from torch import nn

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.span_softmax_inputs import SpanSoftmaxInputs

LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants"


def test_a_narrow_grid_becomes_a_multiple(tmp_path: Path) -> None:
    x = torch.randn(1, 2, 17, 17) / 100
    graph = lowered(fake_quantized(nn.Softmax(-1), (x,), activations="16"), LOWER)
    (before,) = run_onnx(graph, [x], tmp_path)
    assert SpanSoftmaxInputs().run(graph, PassContext()).modified
    softmax = next(node for node in graph.nodes if node.op == "Softmax")
    scale = qdq.producer(softmax.inputs[0]).inputs[1]  # type: ignore[union-attr]
    assert float(lazy_values.values_of(scale)) * 65535 >= 0.5
    assert abs(run_onnx(graph, [x], tmp_path)[0] - before).max() < 1e-4 * before.max()
    assert not SpanSoftmaxInputs().run(graph, PassContext()).modified


@pytest.mark.parametrize(("scale", "activations"), [(1.0, "16"), (0.01, "8")])
def test_others_are_left_alone(scale: float, activations: str) -> None:
    x = torch.randn(1, 2, 17, 17) * scale
    graph = lowered(fake_quantized(nn.Softmax(-1), (x,), activations=activations), LOWER)
    assert not SpanSoftmaxInputs().run(graph, PassContext()).modified


@pytest.mark.parametrize("scale", [0.02, 0.001])
def test_the_library_computes_it(scale: float, tmp_path: Path) -> None:
    """Without the pass half of the output's range is wrong."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(nn.Softmax(-1), torch.randn(1, 2, 17, 17) * scale, 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 100
