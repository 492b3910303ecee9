"""quantize-constants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
from lowering import EXPORT, fake_quantized, htp_parity, lowered, run_onnx
from torch import Tensor, nn

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.quantize_constants import QuantizeConstants, quantized

SHARED = f"{EXPORT},fold-fake-quant,share-qdq"
SCALARS = (0.125, -0.35, 1 / 3, 1e-5, -65504.0, 3.0, 0.0, 1e-37, 3e38, float(np.float32(1e-45)))


@pytest.mark.parametrize("stored", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize("value", SCALARS)
def test_one_value_is_held_exactly(value: float, stored: str) -> None:
    codes, scale, zero_point = quantized(np.full((2, 3), value, np.float32), np.dtype(stored))
    assert (codes.shape, codes.dtype, zero_point.dtype) == ((2, 3), stored, stored)
    restored = (codes.astype(np.float32) - np.float32(zero_point)) * scale
    np.testing.assert_array_equal(restored, np.full((2, 3), value, np.float32))


@pytest.mark.parametrize("stored", ["uint8", "uint16"])
def test_a_table_is_held_to_half_a_step(stored: str) -> None:
    table = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    codes, scale, zero_point = quantized(table, np.dtype(stored))
    restored = (codes.astype(np.float32) - np.float32(zero_point)) * scale
    assert np.abs(restored - table).max() <= 0.51 * scale


class Arithmetic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.clamp(self.linear(x) * 0.35 + 1, 0.25, 3)
        return torch.nn.functional.layer_norm(y / 7, (8,)).reshape(2, 4).pow(2)


@pytest.mark.parametrize("activations", ["8", "16"])
def test_values_become_codes_and_the_result_stays(activations: str, tmp_path: Path) -> None:
    x = torch.randn(1, 8)
    graph = lowered(fake_quantized(Arithmetic(), (x,), activations=activations), SHARED)
    expected = run_onnx(graph, [x], tmp_path)
    result = QuantizeConstants().run(graph, PassContext())
    assert len(result.changes) == 3
    for node in result.model.nodes:
        if node.op in ("Mul", "Add", "Div"):
            assert qdq.code_type(qdq.made_by(node.inputs[1], qdq.DEQUANTIZE)).itemsize * 8 == int(activations)
        if node.op in ("Clip", "Reshape", "Pow"):
            assert all(qdq.is_constant(tensor) for tensor in node.inputs[1:])
    np.testing.assert_array_equal(run_onnx(result.model, [x], tmp_path)[0], expected[0])
    assert not QuantizeConstants().run(result.model, PassContext()).modified


def _add(other: np.ndarray, *, quantized_input: bool) -> gs.Graph:
    x, codes, values = (gs.Variable(name, np.float32, [4]) for name in ("x", "codes", "values"))
    y = gs.Variable("y", np.float32, [4])
    parameters = [
        lazy_values.constant("s", np.array(0.1, np.float32)),
        lazy_values.constant("z", np.array(9, np.uint8)),
    ]
    nodes = [
        gs.Node(qdq.QUANTIZE, "Q", {}, [x, *parameters], [codes]),
        gs.Node(qdq.DEQUANTIZE, "DQ", {}, [codes, *parameters], [values]),
        gs.Node("Add", "A", {}, [values if quantized_input else x, lazy_values.constant("c", other)], [y]),
    ]
    codes.dtype = np.uint8
    return gs.Graph(nodes, [x], [y], opset=21)


@pytest.mark.parametrize(
    ("graph", "modified"),
    [
        (_add(np.array(0.5, np.float32), quantized_input=True), True),
        (_add(np.array(0.5, np.float32), quantized_input=False), False),  # float arithmetic stays float
        (_add(np.array([0, -np.inf, 0, 0], np.float32), quantized_input=True), False),  # no grid spans it
        (_add(np.array(2, np.int64), quantized_input=True), False),
    ],
)
def test_what_is_left_alone(graph: gs.Graph, modified: bool) -> None:
    assert QuantizeConstants().run(graph, PassContext()).modified is modified


class Masked(nn.Module):
    """Zeros in the place of what a linear layer makes: a number, or a tensor that calibration sees."""

    def __init__(self, as_tensor: bool) -> None:
        super().__init__()
        self.linear, self.as_tensor = nn.Linear(64, 64), as_tensor

    def forward(self, x: Tensor) -> Tensor:
        y, mask = self.linear(x), torch.eye(16, 64) > 0
        return torch.where(mask, y, torch.zeros(())) if self.as_tensor else y.masked_fill(~mask, 0.0)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_zero_has_its_neighbours_scale(as_tensor: bool) -> None:
    graph = lowered(fake_quantized(Masked(as_tensor), (torch.randn(16, 64),), activations="16"), SHARED)
    assert QuantizeConstants().run(graph, PassContext()).modified
    (node,) = [node for node in graph.nodes if node.op == "Where"]
    first, second = (qdq.made_by(tensor, qdq.DEQUANTIZE) for tensor in node.inputs[1:])
    assert lazy_values.values_of(first.inputs[1]) == lazy_values.values_of(second.inputs[1])
    assert not QuantizeConstants().run(graph, PassContext()).modified


def test_the_library_keeps_a_zero(tmp_path: Path) -> None:
    """With a scale of 1, nine of ten results of a 16-bit Where are garbage."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    distance = htp_parity(Masked(as_tensor=True), torch.randn(16, 64), 16, tmp_path)
    assert distance.max_lsb is not None and distance.max_lsb <= 5.01
