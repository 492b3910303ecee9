"""export-onnx, and the whole way from a frozen graph to a packed file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lowering import EXPORT, distance, fake_quantized, lowered, ops, run_onnx
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler import onnx_io, qdq
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import PassError
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.export_onnx import ExportOnnx
from fraqat_compiler.passes.freeze_bit_width import FreezeBitWidth


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 32), nn.Linear(32, 24, bias=False), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.gelu(self.a(x)))))


class Block(nn.Module):
    """Attention and feed-forward of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(x.shape)
        x = x + self.proj(mixed)
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ConvNet(nn.Module):
    """Strided, depthwise, pointwise and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.pointwise = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 1)
        self.up, self.head = nn.ConvTranspose2d(24, 8, 4, 2, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pointwise(F.relu(self.depthwise(F.relu6(self.norm(self.stem(x))))))
        x = F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="nearest")
        return self.head(self.up(x).mean((2, 3)))


class Audio(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.up = nn.Conv1d(4, 16, 7, padding=3), nn.ConvTranspose1d(16, 8, 4, 2, 1)
        self.dilated = nn.Conv1d(8, 1, 3, padding=2, dilation=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dilated(F.leaky_relu(self.up(F.leaky_relu(self.conv(x), 0.1)), 0.1)))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(50, 32), nn.Parameter(torch.randn(1, 6, 32))
        self.linear, self.head = nn.Linear(32, 32), nn.Linear(32, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.hardswish(self.linear(self.embedding(ids) + self.position)))


class Pieces(nn.Module):
    """Concat, Pad, strided slices and arithmetic with constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.pad(torch.cat([self.a(x), self.b(x), x], -1), (1, 2))
        even, odd = y[:, ::3], y[:, 1::3]
        return {"even": even * 2 - 0.5, "odd": (odd[:, :4] / 3 + 1) / (torch.sigmoid(even[:, :4]) + 1)}


CASES = {
    "linear-2d": (FeedForward, (5, 16)),
    "linear-3d": (FeedForward, (2, 7, 16)),
    "linear-1d": (FeedForward, (16,)),
    "transformer": (Block, (2, 9, 32)),
    "convolutions": (ConvNet, (1, 3, 16, 16)),
    "audio": (Audio, (1, 4, 40)),
    "tied": (TiedLanguageModel, None),
    "pieces": (Pieces, (4, 8)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "w4a8": {"weights": "4", "activations": "8"},
    "w8a16": {"weights": "8", "activations": "16"},
    "w5a8": {"weights": "5", "activations": "8", "weight_range": "mse"},
    "w3a8": {"weights": "3", "activations": "8", "weight_range": "mse"},
    "per-tensor": {"per_tensor": True},
    "per-group": {"activations": "16", "group_size": 8},
    "asymmetric": {"asymmetric": True},
}


def _example(shape: tuple[int, ...] | None) -> tuple[Tensor]:
    return (torch.randint(0, 50, (2, 6)),) if shape is None else (torch.randn(shape),)


GRIDS = ("linear-3d", "convolutions", "tied")  # the cases that see all settings
RUNS = [(case, setting) for case in CASES for setting in SETTINGS if case in GRIDS or setting in ("w4a8", "w8a16")]


@pytest.mark.parametrize(("case", "setting"), RUNS)
def test_file_computes_what_the_fake_quantized_graph_does(case: str, setting: str, tmp_path: Path) -> None:
    model, shape = CASES[case]
    args = _example(shape)
    graph = fake_quantized(model(), args, **SETTINGS[setting])
    onnx_graph = lowered(graph)
    assert distance(graph, onnx_graph, args, tmp_path) <= 1 + 1e-3
    onnx_io.verify(tmp_path / "model.onnx")


@pytest.mark.parametrize("case", ["transformer", "convolutions"])
def test_every_pass_keeps_what_is_computed(case: str, tmp_path: Path) -> None:
    model, shape = CASES[case]
    args = _example(shape)
    graph = fake_quantized(model(), args)
    pipeline = EXPORT
    expected = run_onnx(lowered(graph, pipeline), list(args), tmp_path)
    for step in ("fold-fake-quant", "share-qdq", "quantize-constants", "pack-int4"):
        pipeline += f",{step}"
        for one, other in zip(run_onnx(lowered(graph, pipeline), list(args), tmp_path), expected, strict=True):
            np.testing.assert_array_equal(one, other, err_msg=step)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, batch: dict[str, Tensor], *, shift: Tensor) -> dict[str, Any]:
        hidden = self.encoder[1](F.relu(self.encoder[0](batch["features"]))) + shift
        return {"logits": hidden, "states": (F.relu(hidden),), "again": hidden}


def _named() -> tuple[GraphModule, dict[str, Any]]:
    torch.manual_seed(0)
    kwargs = {"batch": {"features": torch.randn(3, 8)}, "shift": torch.randn(3, 8)}
    return fake_quantized(Named(), (), kwargs), kwargs


def test_names_are_the_users() -> None:
    graph, _ = _named()
    result = lowered(graph)
    assert [tensor.name for tensor in result.inputs] == ["batch_features", "shift"]
    assert [tensor.name for tensor in result.outputs] == ["logits", "states_0", "again"]
    names = [node.name for node in result.nodes]
    assert "encoder.0/Gemm" in names
    assert "encoder.1/Gemm" in names
    assert "encoder.1.weight/DequantizeLinear" in names
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("with_examples", [False, True])
def test_keyword_and_nested_inputs_arrive(with_examples: bool, tmp_path: Path) -> None:
    graph, kwargs = _named()
    with torch.no_grad():
        expected = graph(**kwargs)
    FreezeBitWidth().run(graph, PassContext())
    context = PassContext(example_inputs=((), kwargs) if with_examples else None)
    result = ExportOnnx().run(graph, context)
    assert result.modified
    logits, state, again = run_onnx(result.model, [kwargs["batch"]["features"], kwargs["shift"]], tmp_path)
    np.testing.assert_array_equal(logits, expected["logits"].numpy())
    np.testing.assert_array_equal(again, expected["again"].numpy())
    np.testing.assert_array_equal(state, expected["states"][0].numpy())


def test_graph_holds_no_weights_until_asked() -> None:
    """The constants refer to torch's tensors: a change of the tensor shows."""
    x = torch.randn(2, 16)
    graph = fake_quantized(FeedForward(), (x,))
    result = lowered(graph, EXPORT)
    weight = result.tensors()["a.weight"]
    with torch.no_grad():
        graph.get_parameter("a.weight")[0, 0] = 42.0
    assert weight._values.load()[0, 0] == 42.0


@pytest.mark.parametrize("opset", [21, 23])
def test_opset_and_domain(opset: int, tmp_path: Path) -> None:
    args = (torch.randn(2, 9, 32),)
    graph = fake_quantized(Block(), args)
    result = lowered(graph, f"freeze-bit-width,export-onnx{{opset={opset}}},fold-fake-quant")
    assert distance(graph, result, args, tmp_path) <= 1 + 1e-3
    summary = onnx_io.summary(tmp_path / "model.onnx")
    assert (summary["opset"], summary["domains"]) == (opset, ["ai.onnx"])


def test_linear_becomes_gemm_with_a_packed_weight_and_an_integer_bias() -> None:
    graph = fake_quantized(FeedForward(), (torch.randn(2, 7, 16),))
    result = lowered(graph)
    gemms = [node for node in result.nodes if node.op == "Gemm"]
    assert [len(gemm.inputs) for gemm in gemms] == [3, 2, 3]
    for gemm in gemms:
        weight = qdq.made_by(gemm.inputs[1], qdq.DEQUANTIZE)
        assert qdq.code_type(weight).name == "int4"
        assert len(weight.inputs) == 3  # without a zero point the HTP computes garbage in silence
    bias = qdq.made_by(gemms[0].inputs[2], qdq.DEQUANTIZE)
    assert qdq.code_type(bias) == np.int32
    assert {"Transpose", "MatMul"}.isdisjoint(ops(result))
    assert ops(result).count("Reshape") == 2  # none is left between the layers


SCRIPT = """
import hashlib, sys, torch
sys.path[:0] = sys.argv[1:3]
from test_export_onnx import Block, fake_quantized, lowered, onnx_io, Path
torch.manual_seed(0)
onnx_io.save(lowered(fake_quantized(Block(), (torch.randn(2, 9, 32),))), Path(sys.argv[3]))
"""


def test_same_model_same_bytes(tmp_path: Path) -> None:
    """In two processes whose sets and dicts of strings are ordered differently."""
    here = Path(__file__).parent
    digests = set()
    for seed in ("1", "2"):
        path = tmp_path / f"{seed}.onnx"
        command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(here), str(here.parent), str(path)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": seed})
        digests.add(hashlib.sha256(path.read_bytes()).hexdigest())
    assert len(digests) == 1


def test_activations_of_other_widths_are_refused() -> None:
    graph = fake_quantized(FeedForward(), (torch.randn(2, 16),), activations="6")
    with pytest.raises(PassError, match="6-bit activations"):
        ExportOnnx().run(graph, PassContext())


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svd(x)[0]


def test_an_op_without_onnx_form_is_named_with_its_line() -> None:
    graph = fake_quantized(Unsupported(), (torch.randn(3, 4),))
    with pytest.raises(PassError, match=r"svd.*test_export_onnx\.py:\d+.*no ONNX form") as caught:
        ExportOnnx().run(graph, PassContext())
    assert caught.value.remedy


class Clamps(nn.Module):
    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        return x.clamp(0.25, 3), x.clamp(min=-1), x.clamp(max=2), ids.clamp(1, 3), F.hardtanh(x, -1, 2)


def test_clamps_become_clips_whatever_their_bounds_types(tmp_path: Path) -> None:
    args = (3 * torch.randn(4, 8), torch.arange(6))
    result = lowered(capture(Clamps(), args), "export-onnx")
    assert set(ops(result)) == {"Clip"}
    for actual, expected in zip(run_onnx(result, list(args), tmp_path), Clamps()(*args), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())


class OneUnused(nn.Module):
    def forward(self, x: Tensor, unused: Tensor) -> Tensor:
        return torch.tanh(x)


def test_an_input_that_nothing_reads_stays_an_input(tmp_path: Path) -> None:
    args = (torch.randn(2, 4), torch.randn(3))
    graph = fake_quantized(OneUnused(), args)
    result = lowered(graph)
    assert [tensor.name for tensor in result.inputs] == ["x", "unused"]
    assert distance(graph, result, args, tmp_path) <= 1 + 1e-3


def test_other_opsets_are_refused() -> None:
    graph = fake_quantized(FeedForward(), (torch.randn(2, 16),))
    with pytest.raises(PassError, match="opset 17"):
        ExportOnnx(opset=17).run(graph, PassContext())


def test_inputs_of_other_shapes_are_refused() -> None:
    graph = fake_quantized(FeedForward(), (torch.randn(2, 16),))
    with pytest.raises(PassError, match="cannot be traced"):
        ExportOnnx().run(graph, PassContext(example_inputs=((torch.randn(2, 5),), {})))


def test_the_exporters_warnings_stay_quiet(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    graph = fake_quantized(FeedForward(), (torch.randn(2, 16),))
    recwarn.clear()
    capfd.readouterr()
    ExportOnnx().run(graph, PassContext())
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list
