"""Layer-wise comparison of a graph with its file, and of a file with a target."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import torch
from lowering import fake_quantized, lowered
from rich.console import Console
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

import fraqat_compiler
from fraqat_compiler import layerwise, lazy_values, onnx_io, parity, terminal
from fraqat_compiler.fake_quant import ActivationFakeQuantize
from fraqat_compiler.layerwise import LayerDistance
from fraqat_compiler.replay import layers_of_target, taken_together
from fraqat_compiler.target import Arrays, Artifact
from fraqat_compiler.targets.htp.target import HtpTarget
from fraqat_compiler.targets.onnxruntime import OnnxRuntimeTarget

SIZES = (2, 4, 16)


class Block(nn.Module):
    """A transformer block with a convolution and a ReLU: what share-qdq moves, merges and repeats quantizers of."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv1d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        return x + self.down(F.gelu(self.up(x)))


@dataclass(frozen=True)
class SkewedTarget(OnnxRuntimeTarget):
    """Hardware that computes one Gemm too small."""

    name: ClassVar[str] = "skewed"
    node: str = "out/Gemm"
    factor: float = 0.5

    def compile(self, model: Path, output: Path) -> Artifact:
        proto = onnx.load(model)
        (node,) = [node for node in proto.graph.node if node.name == self.node]
        node.attribute.append(onnx.helper.make_attribute("alpha", self.factor))
        skewed = output / "skewed.onnx"
        onnx.save(proto, skewed)
        return super().compile(skewed, output)


def saved(graph: GraphModule, folder: Path, max_inline_bytes: int = onnx_io.MAX_INLINE_BYTES) -> Path:
    path = folder / "model.onnx"
    onnx_io.save(lowered(graph), path, max_inline_bytes)
    return path


def feeds(batch: Tensor) -> Arrays:
    return {"x": batch.numpy()}


def quantized_block(activations: str = "8") -> tuple[GraphModule, Tensor]:
    batch = torch.randn(SIZES)
    return fake_quantized(Block(), (batch,), weights="8", activations=activations), batch


def scale_weight(path: Path, name: str, factor: np.float32) -> None:
    """Spoil one weight of a file."""
    file: gs.Graph = onnx_io.load(path)
    (scale,) = [tensor for key, tensor in file.tensors().items() if key == f"{name}_scale"]
    scale.values = lazy_values.values_of(scale) * factor
    onnx_io.save(file, path)


@pytest.mark.parametrize("activations", ["8", "16"])
def test_each_fake_quant_is_found_in_the_file_and_within_one_step(tmp_path: Path, activations: str) -> None:
    graph, batch = quantized_block(activations)
    layers = layerwise.compare_file(graph, (batch,), saved(graph, tmp_path), feeds(batch))
    expected = [name for name, module in graph.named_modules() if isinstance(module, ActivationFakeQuantize)]
    assert sorted(f"fake_quant.{layer.tensor}" for layer in layers) == sorted(expected)
    assert not [layer for layer in layers if layer.strays or layer.is_wrong]
    assert {("qkv", "aten.linear"), ("norm", "aten.layer_norm"), ("x", "placeholder")} <= {
        (layer.name, layer.op) for layer in layers
    }


def test_the_op_that_strays_is_named_and_those_behind_it_are_not(tmp_path: Path) -> None:
    graph, batch = quantized_block()
    path = saved(graph, tmp_path)
    scale_weight(path, "qkv.weight", np.float32(0.5))
    layers = layerwise.compare_file(graph, (batch,), path, feeds(batch))
    assert [(layer.name, layer.op) for layer in layers if layer.strays] == [("qkv", "aten.linear")]
    found = layerwise.summary(layers)
    assert (found["node"], found["strays"], found["tensors"]) == ("qkv", 1, len(layers))
    assert found["max_lsb"] == max(layer.max_lsb for layer in layers) > 10


def test_the_graph_is_left_as_it_was(tmp_path: Path) -> None:
    graph, batch = quantized_block()
    path = saved(graph, tmp_path)
    before, files = graph(batch), sorted(tmp_path.iterdir())
    layerwise.compare_file(graph, (batch,), path, feeds(batch))
    assert torch.equal(graph(batch), before)
    assert sorted(tmp_path.iterdir()) == files


def test_weights_outside_the_file_are_found(tmp_path: Path) -> None:
    graph, batch = quantized_block()
    path = saved(graph, tmp_path, max_inline_bytes=0)
    assert (tmp_path / "model.onnx.data").is_file()
    layers = layerwise.compare_file(graph, (batch,), path, feeds(batch))
    assert layers
    assert not any(layer.strays for layer in layers)


def test_what_would_not_fit_into_memory_is_not_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, batch = quantized_block()
    path = saved(graph, tmp_path)
    monkeypatch.setattr(layerwise, "LARGEST", 100)
    layers = layerwise.compare_file(graph, (batch,), path, feeds(batch))
    assert layers == []
    assert layerwise.summary(layers) == {"max_lsb": None, "mean_lsb": None, "node": None, "op": None} | {
        "strays": 0,
        "tensors": 0,
    }


def test_a_right_target_is_within_one_step_on_its_own_inputs(tmp_path: Path) -> None:
    graph, batch = quantized_block()
    layers = layerwise.compare_target(saved(graph, tmp_path), OnnxRuntimeTarget(), feeds(batch))
    assert {"up/Gemm", "norm/LayerNormalization", "Relu"} <= {layer.name for layer in layers}
    assert not [layer for layer in layers if layer.strays or layer.is_wrong]


def test_the_op_that_a_target_computes_wrongly_is_named(tmp_path: Path) -> None:
    graph, batch = quantized_block()
    layers = layerwise.compare_target(saved(graph, tmp_path), SkewedTarget(), feeds(batch))
    (wrong,) = [layer for layer in layers if layer.is_wrong]
    assert (wrong.name, wrong.op) == ("out/Gemm", "Gemm")
    assert 0.4 < wrong.slope < 0.9  # the bias is right
    (last,) = [layer for layer in layers if layer.name == "Add_1"]
    assert not last.strays
    assert last.path_max_lsb is not None
    assert last.path_max_lsb > 1


@pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))
def test_a_flat_softmax_at_8_bits_is_what_the_htp_computes_wrongly(tmp_path: Path) -> None:
    batch = torch.randn(2, 8, 32)
    model = nn.Sequential(nn.Linear(32, 256), nn.Softmax(-1), nn.Linear(256, 16))
    path = saved(fake_quantized(model, (batch,), weights="8"), tmp_path)
    layers = layerwise.compare_target(path, HtpTarget(), {"input": batch.numpy()})
    assert [layer.op for layer in layers] == ["input", "Gemm", "Softmax", "Gemm"]
    assert [layer.op for layer in layers if layer.is_wrong] == ["Softmax"]
    assert [layer.op for layer in layers if layer.strays] == ["Softmax"]


class Spread(nn.Module):
    """Each value of transposed heads in a space of its own; the HTP library ruins a result of five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.each = nn.Linear(32, 32), nn.Linear(1, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.each(self.first(x).reshape(2, 8, 2, 16).transpose(1, 2).unsqueeze(-1))


@pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))
def test_ops_that_are_right_alone_and_wrong_together_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    result = fraqat_compiler.compile(Spread(), (torch.randn(2, 8, 32),), output=folder, target="htp", weights="8")
    assert result.report["parity"]["target"]["cosine"] < 0.5
    layers = layers_of_target(folder)
    assert not any(layer.is_wrong for layer in layers)
    (check,) = taken_together(folder, layers)
    assert not check.holds and "together" in check.detail


def test_a_compile_reports_what_its_distances_are_to_be_held_against(tmp_path: Path) -> None:
    batch = torch.randn(SIZES)
    result = fraqat_compiler.compile(Block(), (batch,), output=tmp_path / "out", weights="8")
    found = result.report["parity"]
    assert found["layerwise"]["max_lsb"] <= 1.01
    assert found["layerwise"]["strays"] == 0
    assert set(found["noise_floor"]) == {"max_lsb", "mean_lsb"}
    assert not [warning for warning in result.report["warnings"] if "LSB" in warning]
    layers = layers_of_target(tmp_path / "out")
    assert not any(layer.is_wrong for layer in layers)
    assert taken_together(tmp_path / "out", layers) == []
    json.dumps([layer.to_json() for layer in layers])


def test_the_table_shows_the_worst_first_and_names_what_is_wrong() -> None:
    layers = [LayerDistance(f"layer{index}", "Gemm", f"t{index}", index, 0.1, 1.0, 1.0, index) for index in range(12)]
    layers.append(LayerDistance("bad", "Softmax", "bad", 99.0, 9.0, 0.9, 2.0, 99.0))
    console = Console(width=140, record=True)
    terminal.show_layers(console, [layer.to_json() for layer in layers])
    text = console.export_text()
    assert text.index("bad") < text.index("layer11") < text.index("layer3")
    assert "layer2 " not in text
    assert "1 computed wrongly, first bad" in text
    assert parity.LSB_TOLERANCE == 1
