"""flatten-silus."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lowering import Applied, htp_parity
from torch import Tensor, nn
from torch.nn import functional

from fraqat_compiler.capture import capture
from fraqat_compiler.ops import op_name, value_of
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.flatten_silus import FlattenSilus


@pytest.mark.parametrize("shape", [(1, 8, 64, 4), (2, 16, 8, 2)])
def test_a_tall_image_is_flattened(shape: tuple[int, ...]) -> None:
    model, x = Applied(functional.silu), torch.randn(shape)
    graph = PassManager.from_text("decompose-activations").run(capture(model, (x,))).model
    assert FlattenSilus().run(graph, PassContext()).modified
    (node,) = [node for node in graph.graph.nodes if op_name(node) == "aten.sigmoid"]
    assert value_of(node).ndim == 3
    torch.testing.assert_close(graph(x), model(x))
    assert not FlattenSilus().run(graph, PassContext()).modified


def _scaled(x: Tensor) -> Tensor:
    return x * torch.sigmoid(2 * x)


@pytest.mark.parametrize("shape", [(1, 64, 16, 16), (1, 64, 8, 64), (1, 64, 32), (64, 4)])
def test_other_shapes_are_left_alone(shape: tuple[int, ...]) -> None:
    graph = capture(Applied(functional.silu), (torch.randn(shape),))
    graph = PassManager.from_text("decompose-activations").run(graph).model
    assert not FlattenSilus().run(graph, PassContext()).modified


def test_other_products_are_left_alone() -> None:
    assert not FlattenSilus().run(capture(Applied(_scaled), (torch.randn(1, 8, 64, 4),)), PassContext()).modified


@pytest.mark.parametrize(("layer", "shape"), [(nn.Conv2d(8, 8, 1), (1, 8, 64, 4)), (nn.Linear(32, 32), (1, 16, 1, 32))])
def test_the_library_computes_it(layer: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(nn.Sequential(layer, nn.SiLU(), layer), torch.randn(shape), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb < 8
