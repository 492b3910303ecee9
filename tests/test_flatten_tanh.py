"""flatten-tanh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered, ops, run_onnx
from torch import nn

from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.flatten_tanh import FlattenTanh

LOWER = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants"


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))


def test_a_wide_tanh_is_computed_on_one_row(tmp_path: Path) -> None:
    x = torch.randn(16, 64)
    graph = lowered(fake_quantized(_model(), (x,), activations="16", weights="8"), LOWER)
    before = run_onnx(graph, [x], tmp_path)
    assert FlattenTanh().run(graph, PassContext()).modified
    tanh = next(node for node in graph.nodes if node.op == "Tanh")
    assert list(tanh.inputs[0].shape) == list(tanh.outputs[0].shape) == [1, 1024]
    assert ops(graph).count("Reshape") == 2
    np.testing.assert_array_equal(run_onnx(graph, [x], tmp_path)[0], before[0])
    assert not FlattenTanh().run(graph, PassContext()).modified


@pytest.mark.parametrize(("shape", "activations"), [((16, 64), "8"), ((1, 64), "16"), ((1, 1, 64), "16")])
def test_others_are_left_alone(shape: tuple[int, ...], activations: str) -> None:
    graph = lowered(fake_quantized(_model(), (torch.randn(shape),), activations=activations), LOWER)
    assert not FlattenTanh().run(graph, PassContext()).modified


def test_the_library_computes_it(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    distance = htp_parity(_model(), torch.randn(16, 64), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 20
