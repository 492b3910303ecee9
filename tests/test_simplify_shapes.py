"""simplify-shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler import onnx_io, parity
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.simplify_shapes import SimplifyShapes
from fraqat_compiler.targets.htp import HtpTarget


class Apply(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x) + 1.0


def _simplified(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> tuple[GraphModule, bool]:
    x = torch.randn(shape)
    graph = PassManager.from_text("remove-no-ops").run(capture(Apply(function), (x,))).model
    result = SimplifyShapes().run(graph, PassContext())
    assert torch.equal(result.model(x), function(x) + 1.0)
    assert not SimplifyShapes().run(result.model, PassContext()).modified
    return result.model, result.modified


def _names(graph: GraphModule) -> list[str]:
    return [op_name(node).removeprefix("aten.") for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("function", "shape", "names"),
    [
        (lambda x: x.view(1, 6, 1, 4).transpose(1, 2).unsqueeze(2), (6, 4), ["reshape", "add"]),
        (lambda x: x.permute(2, 0, 3, 1), (4, 1, 1, 5), ["reshape", "add"]),
        (lambda x: x.squeeze(1), (3, 4), ["add"]),
        (lambda x: x.unsqueeze(0).squeeze(0), (3, 4), ["add"]),
        (lambda x: x.flatten(1).unflatten(1, (6, 2)), (2, 3, 4), ["reshape", "add"]),
    ],
)
def test_what_renames_dimensions_becomes_one_reshape(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], names: list[str]
) -> None:
    graph, modified = _simplified(function, shape)
    assert modified
    assert _names(graph) == names


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (lambda x: x.transpose(0, 1), ["transpose", "add"]),
        (lambda x: x.reshape(4, 3), ["reshape", "add"]),
        (lambda x: x.reshape(4, 3).t(), ["reshape", "t", "add"]),
    ],
)
def test_what_moves_values_stays(function: Callable[[Tensor], Tensor], names: list[str]) -> None:
    graph, modified = _simplified(function, (3, 4))
    assert not modified
    assert _names(graph) == names


class OneHead(nn.Module):
    """Keys of multi-query attention: one head, whose transpose moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).view(1, 16, 1, 16).transpose(1, 2)


@pytest.mark.parametrize("activations", [8, 16])
def test_the_library_computes_a_single_head(activations: int, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    target, x = HtpTarget(), torch.randn(1, 16, 32)
    ctx = PassContext(target=target, example_inputs=((x,), {}))
    insert = f"insert-fake-quant{{weights=8 activations={activations}}}"
    graph = PassManager.from_text(f"{target.prepare_pipeline()},{insert}").run(capture(OneHead(), (x,)), ctx).model
    calibrate(graph, [(x,)])
    lowered = PassManager.from_text(target.lower_pipeline()).run(graph, ctx).model
    path = tmp_path / "model.onnx"
    onnx_io.save(lowered, path)
    expected = parity.onnx_runner(path, optimized=False)({"x": x.numpy()})
    actual = target.run(target.compile(path, tmp_path), {"x": x.numpy()})
    distance = parity.compare([expected], [actual], dict(zip(expected, parity.output_scales(graph), strict=True)))
    assert distance.max_lsb is not None and distance.max_lsb <= 2.001
