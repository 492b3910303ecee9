"""convert-widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from torch import Tensor, nn

from fraqat_compiler import lazy_values, onnx_io, parity, qdq
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import PassError
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.convert_widths import ConvertWidths
from fraqat_compiler.targets.htp import HtpTarget

BEFORE = "freeze-bit-width,export-onnx,fold-fake-quant,share-qdq,quantize-constants"
MIXED = ("8,embed=16", "8,norm=16", "8,up=16", "8,act=16", "8,down=16", "16,up=8", "16,norm=8", "16,down=8")


class Block(nn.Module):
    """Token ids (N, L) to vectors (N, L, 16): a table, a norm with affine, two kernels with biases, a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(40, 16), nn.LayerNorm(16)
        self.up, self.act, self.down = nn.Linear(16, 32), nn.Sigmoid(), nn.Linear(32, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return x + self.down(self.act(self.up(self.norm(x))))


def _lowered(
    activations: str, text: str, model: nn.Module | None = None, x: Tensor | None = None
) -> tuple[gs.Graph, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    model = Block() if model is None else model
    x = torch.randint(0, 40, (1, 12)) if x is None else x
    ctx = PassContext(target=HtpTarget(), example_inputs=((x,), {}))
    insert = f'insert-fake-quant{{weights=8 activations="{activations}"}}'
    graph = PassManager.from_text(insert).run(capture(model, (x,)), ctx).model
    calibrate(graph, [(x,)])
    lowered = PassManager.from_text(text).run(graph, ctx).model
    return lowered, {lowered.inputs[0].name: x.numpy()}


def _output(graph: gs.Graph, feeds: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    onnx_io.save(graph, path)
    onnx_io.verify(path)
    return parity.onnx_runner(path, optimized=False)(feeds)


@pytest.mark.parametrize("activations", MIXED)
def test_one_run_converts_all(activations: str) -> None:
    graph, _ = _lowered(activations, BEFORE)
    assert ConvertWidths().run(graph, PassContext()).modified
    assert not ConvertWidths().run(graph, PassContext()).modified


@pytest.mark.parametrize("activations", ["8", "16"])
def test_what_has_one_width_is_left_alone(activations: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Sigmoid(), nn.Linear(8, 8))
    graph, _ = _lowered(activations, BEFORE, model, torch.randn(1, 8))
    assert not ConvertWidths().run(graph, PassContext()).modified


@pytest.mark.parametrize("activations", MIXED)
def test_conversions_change_no_result_by_more_than_a_step(activations: str, tmp_path: Path) -> None:
    graph, feeds = _lowered(activations, BEFORE)
    before = _output(graph, feeds, tmp_path / "before.onnx")
    step = float(lazy_values.values_of(qdq.producer(graph.outputs[0]).inputs[1]))  # type: ignore[union-attr]
    ConvertWidths().run(graph, PassContext())
    after = _output(graph, feeds, tmp_path / "after.onnx")
    assert parity.compare([before], [after], dict.fromkeys(before, step)).max_lsb <= 1.001  # type: ignore[operator]


@pytest.mark.parametrize("activations", ["8", "16"])
def test_a_table_that_is_looked_up_keeps_its_grid(activations: str) -> None:
    graph, _ = _lowered(activations, BEFORE)
    ConvertWidths().run(graph, PassContext())
    (gather,) = (node for node in graph.nodes if node.op == "Gather")
    (quantizer,), table = gather.outputs[0].outputs, qdq.producer(gather.inputs[0])
    assert qdq.same_parameters(table, quantizer)  # type: ignore[arg-type]
    assert qdq.code_type(quantizer) == np.uint8


class Branches(nn.Module):
    """One tensor that two ops read."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Sigmoid(), nn.Tanh()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


def test_a_tensor_that_several_ops_want_wider_is_converted_once() -> None:
    graph, _ = _lowered("8,first=16,second=16", BEFORE, Branches(), torch.randn(1, 4))
    quantizers = sum(node.op == qdq.QUANTIZE for node in graph.nodes)
    ConvertWidths().run(graph, PassContext())
    assert sum(node.op == qdq.QUANTIZE for node in graph.nodes) == quantizers + 1


def test_a_bias_too_large_for_a_finer_scale_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    nn.init.constant_(model[0].bias, 1e4)
    graph, _ = _lowered("8,1=16", BEFORE, model, torch.randn(1, 8))
    with pytest.raises(PassError, match="bias"):
        ConvertWidths().run(graph, PassContext())


@pytest.mark.parametrize("activations", [*MIXED, "16"])
def test_the_library_takes_every_mix_and_computes_it(activations: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    target = HtpTarget()
    graph, feeds = _lowered(activations, target.lower_pipeline())
    expected = _output(graph, feeds, tmp_path / "model.onnx")
    actual = target.run(target.compile(tmp_path / "model.onnx", tmp_path), feeds)
    result = parity.compare([expected], [actual], {})
    assert result.cosine > (0.9995 if activations != "16" else 0.9999999)
    assert abs(result.slope - 1) < 5e-3
