"""pack-int4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from lowering import EXPORT, constants, fake_quantized, lowered, run_onnx
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from fraqat_compiler import lazy_values, onnx_io
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.pack_int4 import PackInt4

SHARED = f"{EXPORT},fold-fake-quant,share-qdq,quantize-constants"


class Odd(nn.Module):
    """Weights with an odd number of elements, and a norm whose gamma is all zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 7), nn.LayerNorm(7)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x))


def _shared(**options: Any) -> Any:
    return lowered(fake_quantized(Odd(), (torch.randn(3, 5),), **options), SHARED)


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({}, "int4"),
        ({"weights": "3"}, "int4"),
        ({"per_tensor": True}, "int4"),
        ({"asymmetric": True}, "int4"),
        ({"weights": "5"}, "int8"),
        ({"weights": "8"}, "int8"),
        ({"weights": "16"}, "int16"),
    ],
)
def test_codes_that_fit_are_packed_and_no_bit_changes(options: dict[str, Any], stored: str, tmp_path: Path) -> None:
    graph, x = _shared(**options), torch.randn(3, 5)
    expected = run_onnx(graph, [x], tmp_path)
    result = PackInt4().run(graph, PassContext())
    packs = stored == "int4"
    assert result.modified is packs
    held = constants(result.model)
    assert str(lazy_values.dtype_of(held["linear.weight"])) == stored
    assert lazy_values.dtype_of(held["norm.weight"]) == np.uint8  # no weight of a matrix product
    np.testing.assert_array_equal(run_onnx(result.model, [x], tmp_path)[0], expected[0])
    assert not PackInt4().run(result.model, PassContext()).modified


def test_bytes_in_the_file(tmp_path: Path) -> None:
    """Two codes a byte, the first in the low half, the odd last one padded; zero points are of the same type."""
    graph = _shared()
    codes = lazy_values.values_of(constants(graph)["linear.weight"]).reshape(-1)
    path = tmp_path / "model.onnx"
    onnx_io.save(PackInt4().run(graph, PassContext()).model, path)
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weight = tensors["linear.weight"]
    assert weight.data_type == TensorProto.INT4
    assert len(weight.raw_data) == 18  # 35 codes
    expected = bytes(
        (int(codes[i]) & 15) | ((int(codes[i + 1]) & 15) << 4 if i + 1 < len(codes) else 0)
        for i in range(0, len(codes), 2)
    )
    assert weight.raw_data == expected
    np.testing.assert_array_equal(numpy_helper.to_array(weight).astype(np.int8).reshape(-1), codes)
    (node,) = (
        node for node in model.graph.node if node.op_type == "DequantizeLinear" and "linear.weight" in node.input
    )
    assert tensors[node.input[2]].data_type == TensorProto.INT4


def test_a_file_of_bytes_is_packed_like_the_graph(tmp_path: Path) -> None:
    """Read from a file, nothing is known of the codes but their values."""
    direct, indirect = tmp_path / "direct.onnx", tmp_path / "indirect.onnx"
    graph = _shared()
    onnx_io.save(graph, tmp_path / "bytes.onnx")
    onnx_io.save(PackInt4().run(graph, PassContext()).model, direct)
    onnx_io.save(PackInt4().run(onnx_io.load(tmp_path / "bytes.onnx"), PassContext()).model, indirect)
    assert constants(onnx_io.load(direct)).keys() == constants(onnx_io.load(indirect)).keys()
    assert onnx_io.expected_bytes(onnx_io.load(direct)) == onnx_io.expected_bytes(onnx_io.load(indirect))
