"""fold-fake-quant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from lowering import EXPORT, constants, fake_quantized, lowered, ops, run_onnx
from onnx import TensorProto, helper
from torch import Tensor, nn

from fraqat_compiler import lazy_values, qdq, quantizer
from fraqat_compiler.fake_quant import BiasFakeQuantize, WeightFakeQuantize
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.fold_fake_quant import FoldFakeQuant

FOLDED = f"{EXPORT},fold-fake-quant"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 16, 2, 2)
        self.linear = nn.Linear(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.up(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weights": "8"},
        {"weights": "5", "weight_range": "mse"},
        {"weights": "3", "weight_range": "mse"},
        {"per_tensor": True},
        {"group_size": 8},
        {"asymmetric": True},
        {"weights": "16"},
    ],
)
def test_codes_are_bit_for_bit_those_of_the_training(options: dict[str, Any]) -> None:
    graph = fake_quantized(Net(), (torch.randn(1, 3, 8, 8),), **options)
    result = lowered(graph, FOLDED)
    held = constants(result)
    for name in ("conv.weight", "up.weight", "linear.weight"):
        module = graph.get_submodule(f"fake_quant.{name.replace('.', '_')}")
        assert isinstance(module, WeightFakeQuantize)
        spec = module.spec
        codes = quantizer.quantize(
            graph.get_parameter(name),
            module.scale,
            module.zero_point,
            spec.quant_min,
            spec.quant_max,
            spec.axis,
            spec.group_size,
        )
        np.testing.assert_array_equal(lazy_values.values_of(held[name]), codes.detach().numpy())
        assert spec.quant_min <= codes.min()
        assert codes.max() <= spec.quant_max


def test_bias_codes_are_those_of_the_training() -> None:
    graph = fake_quantized(Net(), (torch.randn(1, 3, 8, 8),))
    held = constants(lowered(graph, FOLDED))
    scale = lazy_values.values_of(held["linear.bias_scale"])
    codes = lazy_values.values_of(held["linear.bias_q"])
    assert codes.dtype == np.int32
    expected = quantizer.bias_codes(graph.get_parameter("linear.bias"), torch.from_numpy(scale))
    np.testing.assert_array_equal(codes, expected.detach().numpy())
    assert any(isinstance(module, BiasFakeQuantize) for module in graph.modules())


def test_no_float_copy_is_left() -> None:
    result = lowered(fake_quantized(Net(), (torch.randn(1, 3, 8, 8),)), FOLDED)
    floats = {name for name, tensor in constants(result).items() if lazy_values.dtype_of(tensor) == np.float32}
    assert all(name.endswith("_scale") for name in floats)
    assert not [node for node in result.nodes if node.op == qdq.QUANTIZE and qdq.is_constant(node.inputs[0])]


def test_nothing_to_do() -> None:
    result = lowered(fake_quantized(Net(), (torch.randn(1, 3, 8, 8),)), FOLDED)
    again = FoldFakeQuant().run(result, PassContext())
    assert not again.modified
    assert again.changes == ()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.embedding(ids)), self.embedding.weight)


def test_a_tied_weight_is_stored_once() -> None:
    result = lowered(fake_quantized(Tied(), (torch.randint(0, 20, (3,)),)), FOLDED)
    matrices = [tensor for tensor in constants(result).values() if len(tensor.shape) == 2]
    assert [tensor.name for tensor in matrices] == ["embedding.weight"]
    assert {reader.op for reader in matrices[0].outputs} == {qdq.DEQUANTIZE}


def _transposed_weight(axis: int | None, block_size: int = 0) -> gs.Graph:
    """x @ transpose(DQ(Q(W))) with W of shape (6, 4)."""
    weight = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    scale = np.abs(weight).max(axis=1) / 7 if axis == 0 else np.array(np.abs(weight).max() / 7)
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    if block_size:
        scale = np.abs(weight.reshape(6, 4 // block_size, block_size)).max(-1) / 7
        attributes = {"axis": 1, "block_size": block_size}
    scale = scale.astype(np.float32)
    zero = helper.make_tensor("zero", TensorProto.INT4, scale.shape, [0] * scale.size)
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "scale", "zero"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["dq"], **attributes),
        helper.make_node("Transpose", ["dq"], ["t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 6])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(scale, "scale"), zero],
    )
    return gs.import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize(("axis", "block_size"), [(None, 0), (0, 0), (1, 2)])
def test_a_transpose_is_folded_into_the_codes(axis: int | None, block_size: int, tmp_path: Path) -> None:
    x = [torch.randn(3, 4)]
    expected = run_onnx(_transposed_weight(axis, block_size), x, tmp_path)
    result = FoldFakeQuant().run(_transposed_weight(axis, block_size), PassContext())
    assert result.modified
    assert ops(result.model) == ["DequantizeLinear", "MatMul"]
    np.testing.assert_array_equal(run_onnx(result.model, x, tmp_path)[0], expected[0])


def test_equal_quantizers_of_one_tensor_are_merged(tmp_path: Path) -> None:
    x = gs.Variable("x", np.float32, [4])
    scale, zero = (
        lazy_values.constant("s", np.float32(0.1).reshape(())),
        lazy_values.constant("z", np.array(7, np.uint8)),
    )
    nodes, ends = [], []
    for index in range(2):
        codes, values = gs.Variable(f"q{index}"), gs.Variable(f"dq{index}", np.float32, [4])
        nodes.append(gs.Node(qdq.QUANTIZE, f"Q{index}", {}, [x, scale, zero], [codes]))
        nodes.append(gs.Node(qdq.DEQUANTIZE, f"DQ{index}", {}, [codes, scale, zero], [values]))
        ends.append(values)
    y = gs.Variable("y", np.float32, [4])
    nodes.append(gs.Node("Add", "Add", {}, ends, [y]))
    graph = gs.Graph(nodes, [x], [y], opset=21)
    expected = run_onnx(graph, [torch.randn(4)], tmp_path)
    torch.manual_seed(0)
    result = FoldFakeQuant().run(graph, PassContext())
    assert ops(result.model) == [qdq.QUANTIZE, qdq.DEQUANTIZE, "Add"]
    assert expected[0].shape == (4,)
