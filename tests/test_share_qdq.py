"""share-qdq."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from lowering import EXPORT, fake_quantized, lowered, ops, run_onnx
from torch import Tensor, nn

from fraqat_compiler import lazy_values, qdq
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.share_qdq import ShareQdq

FOLDED = f"{EXPORT},fold-fake-quant"
PAIR = ["QuantizeLinear", "DequantizeLinear"]
# Ops that need no quantizer at their inputs or outputs.
QUANTIZERS = {qdq.QUANTIZE, qdq.DEQUANTIZE}


def _unquantized(graph: gs.Graph) -> list[str]:
    """Float tensors that leave an op without a quantizer, or enter one unquantized."""
    loose = []
    for node in graph.nodes:
        if node.op in QUANTIZERS:
            continue
        loose += [tensor.name for tensor in node.outputs if any(reader.op != qdq.QUANTIZE for reader in tensor.outputs)]
        loose += [tensor.name for tensor in node.outputs if tensor in graph.outputs]
    return loose


class Moves(nn.Module):
    """Everything that moves values, between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 16, 1), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.pad(F.pixel_shuffle(self.first(x), 2), (1, 1)), 2)
        x = F.interpolate(x, scale_factor=2, mode="nearest")[:, :, 1:7, ::2]
        left, right = x.transpose(1, 2).flatten(2).unsqueeze(1).expand(1, 2, -1, -1).chunk(2, 1)
        return self.last(torch.cat([left, right], -1).squeeze(1).repeat(1, 1, 3)[..., :24])


class ReluNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other, self.linear = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.other(F.relu(self.conv(x))))
        return F.relu(self.linear(x.flatten(2).transpose(1, 2)))


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x))).reshape(6, 2, 4)


CASES = {"moves": (Moves, (1, 4, 4, 4)), "relu": (ReluNet, (1, 3, 6, 6)), "feed-forward": (FeedForward, (2, 3, 8))}


@pytest.mark.parametrize("activations", ["8", "16"])
@pytest.mark.parametrize("case", CASES)
def test_every_op_is_quantized_on_both_sides_and_no_bit_changes(case: str, activations: str, tmp_path: Path) -> None:
    model, shape = CASES[case]
    x = torch.randn(shape)
    graph = lowered(fake_quantized(model(), (x,), activations=activations), FOLDED)
    inputs = [2 * x, -x, torch.randn(shape)]  # beyond the calibrated range too
    expected = [run_onnx(graph, [value], tmp_path) for value in inputs]
    assert _unquantized(graph)
    result = ShareQdq().run(graph, PassContext())
    assert result.modified
    assert not _unquantized(result.model)
    for value, reference in zip(inputs, expected, strict=True):
        np.testing.assert_array_equal(run_onnx(result.model, [value], tmp_path)[0], reference[0])
    assert not ShareQdq().run(result.model, PassContext()).modified


def test_no_reshape_is_left_between_layers() -> None:
    graph = lowered(fake_quantized(FeedForward(), (torch.randn(2, 3, 8),)), FOLDED)
    assert ops(graph).count("Reshape") == 5
    result = ShareQdq().run(graph, PassContext())
    kinds = [op for op in ops(result.model) if op not in QUANTIZERS]
    assert kinds == ["Reshape", "Gemm", "Gelu", "Gemm", "Reshape"]


def test_an_output_keeps_its_name() -> None:
    graph = lowered(fake_quantized(FeedForward(), (torch.randn(2, 3, 8),)), FOLDED)
    name = graph.outputs[0].name
    result = ShareQdq().run(graph, PassContext())
    assert [tensor.name for tensor in result.model.outputs] == [name]
    assert qdq.made_by(result.model.outputs[0], qdq.DEQUANTIZE) is not None


def _one_op(op: str, attributes: dict[str, Any], extra: list[gs.Tensor], scale: float = 0.1) -> gs.Graph:
    """x -> Q -> DQ -> op -> y."""
    x, codes = gs.Variable("x", np.float32, [1, 2, 4]), gs.Variable("codes", np.uint8, [1, 2, 4])
    values, y = gs.Variable("values", np.float32, [1, 2, 4]), gs.Variable("y", np.float32, None)
    parameters = [
        lazy_values.constant("s", np.array(scale, np.float32)),
        lazy_values.constant("z", np.array(100, np.uint8)),
    ]
    nodes = [
        gs.Node(qdq.QUANTIZE, "Q", {}, [x, *parameters], [codes]),
        gs.Node(qdq.DEQUANTIZE, "DQ", {}, [codes, *parameters], [values]),
        gs.Node(op, "op", attributes, [values, *extra], [y]),
    ]
    return gs.Graph(nodes, [x], [y], opset=21)


def _pad(value: float) -> gs.Graph:
    amounts = lazy_values.constant("amounts", np.array([0, 0, 0, 0, 0, 1]))
    return _one_op("Pad", {}, [amounts, lazy_values.constant("value", np.array(value, np.float32))])


@pytest.mark.parametrize(
    ("graph", "shares"),
    [
        (_pad(0.0), True),
        (_pad(float(np.float32(0.1) * 5)), True),
        (_pad(0.123), False),  # between two codes
        (_pad(100.0), False),  # beyond the last code
        (_one_op("Softmax", {}, []), False),  # computes new values
        (_one_op("Relu", {}, []), True),
    ],
)
def test_only_values_of_the_grid_share_it(graph: gs.Graph, shares: bool) -> None:
    result = ShareQdq().run(graph, PassContext())
    assert result.modified is shares
    assert ops(result.model)[3:] == (PAIR if shares else [])


def test_weights_are_left_alone() -> None:
    codes = lazy_values.constant("w", np.ones((4, 4), np.int8))
    scale, zero = lazy_values.constant("s", np.array(0.1, np.float32)), lazy_values.constant("z", np.array(0, np.int8))
    weight, moved, x, y = (gs.Variable(name, np.float32, [4, 4]) for name in ("wd", "t", "x", "y"))
    nodes = [
        gs.Node(qdq.DEQUANTIZE, "DQ", {}, [codes, scale, zero], [weight]),
        gs.Node("Transpose", "T", {"perm": [1, 0]}, [weight], [moved]),
        gs.Node("MatMul", "M", {}, [x, moved], [y]),
    ]
    assert not ShareQdq().run(gs.Graph(nodes, [x], [y], opset=21), PassContext()).modified
