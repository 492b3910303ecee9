"""expand-constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fraqat_compiler import onnx_io, parity
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.expand_constants import ExpandConstants
from fraqat_compiler.targets.htp import HtpTarget


class Positions(nn.Module):
    def __init__(self, shape: tuple[int, ...], normalizes: bool = True) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(shape))
        self.end = nn.LayerNorm(32) if normalizes else nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.end(x + self.table)
        return y


def _lowered(model: nn.Module, shape: tuple[int, ...], text: str, activations: int = 16) -> tuple[Any, np.ndarray]:
    target, x = HtpTarget(), torch.randn(shape)
    ctx = PassContext(target=target, example_inputs=((x,), {}))
    graph = capture(model, (x,))
    graph = PassManager.from_text(f"insert-fake-quant{{weights=8 activations={activations}}}").run(graph, ctx).model
    calibrate(graph, [(x,)])
    return PassManager.from_text(text).run(graph, ctx).model, x.numpy()


BROADCAST = [((1, 16, 32), (4, 16, 32)), ((1, 1, 16, 32), (1, 4, 16, 32)), ((2, 1, 16, 32), (2, 4, 16, 32))]
WHOLE = [((1, 16, 32), (1, 16, 32)), ((32,), (4, 16, 32)), ((4, 16, 1), (4, 16, 32))]


@pytest.mark.parametrize(
    ("table", "shape", "activations", "normalizes", "modified"),
    [
        *((*shapes, 16, True, True) for shapes in BROADCAST),
        *((*shapes, 16, True, False) for shapes in WHOLE),
        (*BROADCAST[0], 8, True, False),
        (*BROADCAST[0], 16, False, False),
    ],
)
def test_only_16_bit_tables_in_front_of_a_norm_are_repeated(
    table: tuple[int, ...], shape: tuple[int, ...], activations: int, normalizes: bool, modified: bool
) -> None:
    text = "freeze-bit-width,export-onnx,fold-fake-quant,share-qdq,quantize-constants"
    graph, _ = _lowered(Positions(table, normalizes), shape, text, activations)
    assert ExpandConstants().run(graph, PassContext()).modified == modified


@pytest.mark.parametrize(("table", "shape"), [*BROADCAST, *WHOLE])
def test_every_element_is_right_on_htp(table: tuple[int, ...], shape: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    target = HtpTarget()
    graph, x = _lowered(Positions(table), shape, target.lower_pipeline())
    path = tmp_path / "model.onnx"
    onnx_io.save(graph, path)
    feeds = {"x": x}
    expected = parity.onnx_runner(path, optimized=False)(feeds)
    actual = target.run(target.compile(path, tmp_path), feeds)
    assert parity.compare([expected], [actual], {}).cosine > 0.9999
