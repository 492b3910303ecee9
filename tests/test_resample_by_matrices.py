"""resample-by-matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lowering import Applied, htp_parity
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler import fx_graph
from fraqat_compiler.capture import capture
from fraqat_compiler.fake_quant import FakeQuantize
from fraqat_compiler.instruments import Verification
from fraqat_compiler.layers import weight_quantizers
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.passes.resample_by_matrices import ResampleByMatrices
from fraqat_compiler.targets.htp import HtpTarget

COLUMNS, ROWS = ["aten.linear"], ["aten.transpose", "aten.linear", "aten.transpose"]


def resize(mode: str, **options: Any) -> nn.Module:
    return Applied(lambda x: F.interpolate(x, mode=mode, antialias=True, **options))


def _run(model: nn.Module, x: Tensor) -> tuple[GraphModule, bool]:
    result = PassManager((ResampleByMatrices(),)).run(capture(model, (x,)), instruments=[Verification()])
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-6, atol=1e-6)
    return result.model, result.records[0].modified


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.AdaptiveAvgPool2d((4, 3)), COLUMNS + ROWS),
        (nn.AdaptiveAvgPool2d((4, 9)), ROWS + COLUMNS),
        (nn.AdaptiveAvgPool2d((13, 28)), ROWS + COLUMNS),
        (nn.AdaptiveAvgPool2d((4, None)), ROWS),
        (nn.AdaptiveAvgPool2d((10, 4)), COLUMNS),
        *((resize(mode, size=(5, 20)), ROWS + COLUMNS) for mode in ("bilinear", "bicubic")),
        (resize("bicubic", size=(25, 7), align_corners=True), COLUMNS + ROWS),
        (resize("bilinear", scale_factor=(1.7, 0.33)), COLUMNS + ROWS),
        (resize("bicubic", scale_factor=(1.7, 0.33), recompute_scale_factor=True), COLUMNS + ROWS),
        (resize("bicubic", size=(10, 14)), []),
    ],
)
def test_images_are_resampled_in_the_cheaper_order(model: nn.Module, expected: list[str]) -> None:
    torch.manual_seed(0)
    graph, modified = _run(model, torch.randn(2, 3, 10, 14))
    assert modified
    assert [op_name(node) for node in graph.graph.nodes if node.op == "call_function"] == expected


@pytest.mark.parametrize("shape", [(3, 14), (2, 3, 14)])
def test_sequences_are_averaged(shape: tuple[int, ...]) -> None:
    assert _run(nn.AdaptiveAvgPool1d(4), torch.randn(shape))[1]


@pytest.mark.parametrize(
    "model",
    [
        nn.AdaptiveAvgPool2d(1),
        nn.AdaptiveAvgPool2d((5, 7)),
        nn.AdaptiveAvgPool2d((None, 2)),
        Applied(lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear")),
    ],
)
def test_others_are_left_alone(model: nn.Module) -> None:
    assert not _run(model, torch.randn(1, 3, 10, 14))[1]


def _matrices(model: nn.Module, target: HtpTarget | None) -> list[tuple[Tensor, FakeQuantize]]:
    """Each matrix with its quantizer, where 4 bits are asked for."""
    graph = (
        InsertFakeQuant(weights="4").run(_run(model, torch.randn(1, 3, 10, 14))[0], PassContext(target=target)).model
    )
    return [(fx_graph.get_tensor(graph, name), quantizer) for name, quantizer in weight_quantizers(graph)]


def test_four_bits_hold_an_average_exactly() -> None:
    matrices = _matrices(nn.AdaptiveAvgPool2d((4, 9)), target=None)
    assert [(tuple(matrix.shape), quantizer.spec.bit_width) for matrix, quantizer in matrices] == [
        ((4, 10), 4),
        ((9, 14), 4),
    ]
    for matrix, quantizer in matrices:
        torch.testing.assert_close(quantizer(matrix), matrix)


def test_the_htp_target_gives_a_matrix_eight_bits() -> None:
    """At 4 a resize would change the brightness of an image."""
    matrices = _matrices(resize("bicubic", size=(14, 5)), HtpTarget())
    assert [quantizer.spec.bit_width for _, quantizer in matrices] == [8, 8]
    for matrix, quantizer in matrices:
        torch.testing.assert_close(quantizer(matrix).sum(1), torch.ones(len(matrix)), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("model", "weights", "activations"),
    [
        (nn.AdaptiveAvgPool2d((13, 4)), 4, 8),
        (resize("bicubic", size=(5, 20)), 8, 16),
        (resize("bilinear", scale_factor=0.5), 4, 16),
    ],
)
def test_the_library_computes_it(model: nn.Module, weights: int, activations: int, tmp_path: Path) -> None:
    """Before it refused the six dimensions of an uneven pool's gathers, and any resize with anti-aliasing."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), model)
    distance = htp_parity(model, torch.randn(2, 8, 10, 14), activations, tmp_path, weights=weights)
    assert distance.max_lsb is not None and distance.max_lsb <= (3 if activations == 8 else 9)
    assert abs(distance.slope - 1) < 5e-3
