"""expand-constants."""

from __future__ import annotations

from pathlib import Path

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
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 16, 32))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.table)


def _lowered(activations: int, batch: int, text: str) -> tuple[object, np.ndarray]:
    torch.manual_seed(0)
    target, x = HtpTarget(), torch.randn(batch, 16, 32)
    ctx = PassContext(target=target, example_inputs=((x,), {}))
    graph = capture(Positions(), (x,))
    graph = PassManager.from_text(f"insert-fake-quant{{weights=8 activations={activations}}}").run(graph, ctx).model
    calibrate(graph, [(x,)])
    return PassManager.from_text(text).run(graph, ctx).model, x.numpy()


@pytest.mark.parametrize(("activations", "batch", "modified"), [(16, 4, True), (8, 4, False), (16, 1, False)])
def test_only_16_bit_tables_under_a_batch_are_repeated(activations: int, batch: int, modified: bool) -> None:
    text = "freeze-bit-width,export-onnx,fold-fake-quant,share-qdq,quantize-constants"
    graph, _ = _lowered(activations, batch, text)
    assert ExpandConstants().run(graph, PassContext()).modified == modified  # type: ignore[arg-type]


def test_every_element_of_the_batch_is_right_on_htp(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    target = HtpTarget()
    graph, x = _lowered(16, 4, target.lower_pipeline())
    path = tmp_path / "model.onnx"
    onnx_io.save(graph, path)
    feeds = {"x": x}
    expected = parity.onnx_runner(path, optimized=False)(feeds)
    actual = target.run(target.compile(path, tmp_path), feeds)
    assert parity.compare([expected], [actual], {}).cosine > 0.9999
