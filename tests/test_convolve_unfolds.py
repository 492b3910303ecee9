"""convolve-unfolds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lowering import Applied, htp_parity
from torch import Tensor, nn
from torch.nn import functional

from fraqat_compiler.capture import capture
from fraqat_compiler.instruments import Verification
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.convolve_unfolds import ConvolveUnfolds

IMAGE = torch.randn(2, 4, 12, 10, generator=torch.Generator().manual_seed(0))
OVERLAPPING: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
    {"kernel_size": 3, "dilation": 2, "padding": (2, 1)},
    {"kernel_size": 3, "dilation": (1, 3), "stride": 2, "padding": 1},
    {"kernel_size": 4, "stride": 4},  # the last two columns are in no window
    {"kernel_size": 2, "stride": 2, "padding": 1},
]
TILES: list[dict[str, Any]] = [
    {"kernel_size": 2, "stride": 2},
    {"kernel_size": (4, 5), "stride": (4, 5)},
    {"kernel_size": 1},
]


def _folded(x: Tensor, **windows: Any) -> Tensor:
    """Neither of the two, nor both together, is what x was."""
    return functional.fold(functional.unfold(x, **windows).relu(), x.shape[-2:], **windows)


def _ops(function: Callable[[Tensor], Any], x: Tensor) -> set[str]:
    """Ops that the pass makes; its results are torch's."""
    result = PassManager((ConvolveUnfolds(),)).run(capture(Applied(function), (x,)), instruments=[Verification()])
    torch.testing.assert_close(result.model(x), function(x))
    assert result.records[0].modified
    return {op_name(node) for node in result.model.graph.nodes if node.op == "call_function"} - {"aten.reshape"}


@pytest.mark.parametrize("windows", OVERLAPPING)
def test_windows_become_convolutions(windows: dict[str, Any]) -> None:
    made = _ops(lambda x: (functional.unfold(x, **windows), _folded(x, **windows)), IMAGE)
    assert made == {"aten.conv2d", "aten.relu", "aten.conv_transpose2d"}


@pytest.mark.parametrize("windows", TILES)
def test_tiles_are_permuted(windows: dict[str, Any]) -> None:
    made = _ops(lambda x: (functional.unfold(x, **windows), _folded(x, **windows)), IMAGE)
    assert made == {"aten.permute", "aten.relu"}


@pytest.mark.parametrize("windows", [OVERLAPPING[0], TILES[0]])
@pytest.mark.parametrize("x", [IMAGE[0], IMAGE[:1, :1]], ids=["no batch", "one channel"])
def test_other_images_are_taken(x: Tensor, windows: dict[str, Any]) -> None:
    assert _ops(lambda x: (functional.unfold(x, **windows), _folded(x, **windows)), x)


@pytest.mark.parametrize("x", [IMAGE, IMAGE[0], IMAGE.reshape(2, 2, 2, 12, 10)])
def test_pixels_are_permuted(x: Tensor) -> None:
    assert _ops(nn.PixelUnshuffle(2), x) == {"aten.permute"}


def test_others_are_left_alone() -> None:
    graph = capture(nn.Sequential(nn.Conv2d(4, 4, 3), nn.PixelShuffle(2)), (IMAGE,))
    assert not PassManager((ConvolveUnfolds(),)).run(graph).records[0].modified


@pytest.mark.parametrize(
    ("function", "activations"),
    [
        (lambda x: functional.unfold(x, 3, padding=1), 8),
        (lambda x: functional.unfold(x, (3, 2), dilation=2, stride=(2, 1), padding=1), 16),
        (lambda x: functional.unfold(x, 2, stride=2), 16),
        (lambda x: functional.fold(x.flatten(2), (12, 10), 3, padding=1), 8),
        (lambda x: functional.fold(x.flatten(2), (24, 20), 3, stride=2, dilation=(1, 2), padding=(1, 2)), 16),
        (lambda x: functional.fold(x.flatten(2), (36, 30), 3, stride=3), 8),
        (nn.PixelUnshuffle(2), 8),
    ],
)
def test_the_library_computes_it(function: Callable[[Tensor], Tensor], activations: int, tmp_path: Path) -> None:
    """Alone a fold is within 1 step and an unfold within 2; a fold adds up by how much the layer before it strays."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 36, 1), Applied(function))
    distance = htp_parity(model, IMAGE, activations, tmp_path)
    assert distance.max_lsb is not None and distance.mean_lsb is not None
    assert distance.max_lsb < 6 and distance.mean_lsb < 1
