"""Writing, reading, measuring and verifying ONNX files."""

from __future__ import annotations

import weakref
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
import torch.nn.functional as F
from lowering import EXPORT, LOWER, constants, fake_quantized, lowered, run_onnx
from torch import Tensor, nn

from fraqat_compiler import lazy_values, onnx_io
from fraqat_compiler.errors import OutputError, VerificationError


class Net(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x)))


def _graph(pipeline: str = LOWER, width: int = 64) -> gs.Graph:
    torch.manual_seed(0)
    return lowered(fake_quantized(Net(width), (torch.randn(2, width),)), pipeline)


def test_weights_outside_give_the_same_results(tmp_path: Path) -> None:
    graph, x = _graph(), [torch.randn(2, 64)]
    inline, outside = tmp_path / "inline.onnx", tmp_path / "outside.onnx"
    onnx_io.save(graph, inline)
    onnx_io.save(graph, outside, max_inline_bytes=1000)
    assert not inline.with_name("inline.onnx.data").exists()
    data = outside.with_name("outside.onnx.data")
    assert data.stat().st_size >= 2 * 64 * 256 // 2
    assert outside.stat().st_size < inline.stat().st_size / 2
    onnx_io.verify(outside)
    assert onnx_io.summary(outside)["bytes"] == outside.stat().st_size + data.stat().st_size
    first, second = (run_onnx(onnx_io.load(path), x, tmp_path) for path in (inline, outside))
    np.testing.assert_array_equal(first[0], second[0])


def test_saving_inline_again_drops_the_old_weights_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_io.save(_graph(), path, max_inline_bytes=1000)
    onnx_io.save(_graph(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_only_one_weight_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """Each constant is computed when it is written, and let go before the next."""
    alive: set[str] = set()
    most = 0

    def values(name: str) -> np.ndarray:
        nonlocal most
        array = np.zeros((512, 512), np.float32)
        alive.add(name)
        most = max(most, len(alive))
        weakref.finalize(array, alive.discard, name)
        return array

    x = gs.Variable("x", np.float32, [2, 512])
    nodes, tensor = [], x
    for index in range(6):
        name = f"w{index}"
        lazy = lazy_values.LazyArray((512, 512), np.float32, lambda name=name: values(name))
        result = gs.Variable(f"y{index}", np.float32, [2, 512])
        nodes.append(gs.Node("MatMul", f"M{index}", {}, [tensor, gs.Constant(name, lazy)], [result]))
        tensor = result
    path = tmp_path / "model.onnx"
    onnx_io.save(gs.Graph(nodes, [x], [tensor], opset=21), path, max_inline_bytes=0)
    assert most == 1
    assert path.with_name("model.onnx.data").stat().st_size == 6 * 512 * 512 * 4


def test_a_loaded_graph_saves_to_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "first.onnx", tmp_path / "second.onnx"
    onnx_io.save(_graph(), first)
    onnx_io.save(onnx_io.load(first), second)
    assert first.read_bytes() == second.read_bytes()


def test_a_loaded_graph_knows_its_shapes_and_types(tmp_path: Path) -> None:
    onnx_io.save(_graph(), tmp_path / "model.onnx")
    for tensor in onnx_io.load(tmp_path / "model.onnx").tensors().values():
        assert tensor.dtype is not None
        assert tensor.shape is not None


def test_size_is_what_the_bit_widths_demand(tmp_path: Path) -> None:
    path, width = tmp_path / "model.onnx", 256
    onnx_io.save(_graph(width=width), path)
    weights = 2 * 4 * width * width // 2
    rows = 4 * width + width
    parameters = rows * (4 + 4 + 4) + rows // 2  # weight scale, bias and its scale; zero points at 4 bits
    summary = onnx_io.summary(path)
    assert summary["bytes"] == path.stat().st_size
    assert summary["bytes"] == summary["expected_bytes"] + summary["structure_bytes"]
    assert abs(summary["expected_bytes"] - weights - parameters) < 100  # scalars of the activations
    assert summary["bytes"] <= 1.03 * (weights + parameters)


def test_verify_accepts_what_the_pipeline_makes(tmp_path: Path) -> None:
    onnx_io.save(_graph(), tmp_path / "model.onnx")
    onnx_io.verify(tmp_path / "model.onnx")


def test_verify_refuses_a_float_copy(tmp_path: Path) -> None:
    onnx_io.save(_graph(EXPORT), tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match=r"holds \w\.weight in float"):
        onnx_io.verify(tmp_path / "model.onnx")


def test_verify_refuses_foreign_ops(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_io.save(_graph(), path)
    model = onnx.load(path)
    model.graph.node[0].domain = "com.microsoft"
    model.opset_import.add(domain="com.microsoft", version=1)
    onnx.save(model, path)
    with pytest.raises(VerificationError, match=r"com\.microsoft::QuantizeLinear"):
        onnx_io.verify(path)


def test_verify_refuses_wrong_shapes(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx_io.save(_graph(), path)
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 63
    onnx.save(model, path)
    with pytest.raises(VerificationError, match="checker refuses"):
        onnx_io.verify(path)


def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(VerificationError, match="cannot be read"):
        onnx_io.load(path)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(VerificationError, match="cannot be read"):
        onnx_io.load(path)
    onnx_io.save(_graph(), path, max_inline_bytes=1000)
    path.with_name("model.onnx.data").unlink()
    with pytest.raises(VerificationError, match=r"model\.onnx\.data.*not beside it"):
        onnx_io.load(path)


def test_a_folder_that_takes_no_file_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        onnx_io.save(_graph(), tmp_path / "missing" / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_constants_of_every_type_survive(tmp_path: Path) -> None:
    x = gs.Variable("x", np.float32, [3])
    kinds = [np.float16, np.float64, np.int64, np.bool_, np.uint8, np.int16, lazy_values.INT4, lazy_values.UINT4]
    values = {f"c{index}": np.array([1, 0, 3]).astype(kind) for index, kind in enumerate(kinds)}
    nodes = [gs.Node("Identity", "I", {}, [x], [gs.Variable("y", np.float32, [3])])]
    outputs = [nodes[0].outputs[0]]
    for name, array in values.items():
        outputs.append(gs.Variable(f"{name}_out", np.float32, [3]))
        cast = gs.Node("Cast", name, {"to": 1}, [lazy_values.constant(name, array)], [outputs[-1]])
        nodes.append(cast)
    path = tmp_path / "model.onnx"
    onnx_io.save(gs.Graph(nodes, [x], outputs, opset=21), path)
    for name, tensor in constants(onnx_io.load(path)).items():
        np.testing.assert_array_equal(lazy_values.values_of(tensor), values[name])
        assert lazy_values.dtype_of(tensor) == values[name].dtype
