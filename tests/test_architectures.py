"""Ordinary architectures, as users write them in plain PyTorch: through every pass, to the runtimes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from fraqat_compiler import onnx_io, parity
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import CaptureError, PassError
from fraqat_compiler.instruments import Verification
from fraqat_compiler.layers import layers
from fraqat_compiler.parity import LSB_TOLERANCE
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.target import Target
from fraqat_compiler.targets.htp import HtpTarget
from fraqat_compiler.targets.onnxruntime import OnnxRuntimeTarget

Inputs = tuple[Tensor, ...]
INSERT = "insert-fake-quant{weights=8 activations=8}"


class ConvBlock(nn.Sequential):
    def __init__(
        self, inputs: int, outputs: int, activation: type[nn.Module], stride: int = 1, groups: int = 1
    ) -> None:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, groups=groups, bias=False)
        super().__init__(convolution, nn.BatchNorm2d(outputs), activation())


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = functional.adaptive_avg_pool2d(x, 1)
        return x * functional.hardsigmoid(self.up(functional.relu(self.down(pooled))))


class MobileBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvBlock(3, 8, nn.Hardswish, stride=2)
        self.block = nn.Sequential(ConvBlock(8, 8, nn.ReLU6, groups=8), SqueezeExcite(8), nn.Conv2d(8, 8, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvBlock(3, 8, nn.SiLU), ConvBlock(8, 16, nn.SiLU)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.first(x)
        x = self.up(self.second(functional.max_pool2d(skip, 2)))
        return functional.interpolate(self.last(torch.cat([x, skip], 1)), scale_factor=2.0)


class ConvNeXtBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 4, 4), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        self.scale = nn.Parameter(torch.full((8,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        inner = self.mlp(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))
        return x + (self.scale * inner).permute(0, 3, 1, 2)


class Vocoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = weight_norm(nn.ConvTranspose1d(8, 4, 4, 2, 1))
        self.dilated = weight_norm(nn.Conv1d(4, 4, 3, dilation=3, padding=3))
        self.last = nn.Conv1d(4, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.leaky_relu(self.up(x), 0.1)
        return torch.tanh(self.last(x + self.dilated(x)))


class Separator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Conv1d(1, 8, 4, 2)
        self.mask = nn.Sequential(nn.GroupNorm(1, 8), nn.PReLU(8), nn.Conv1d(8, 8, 1), nn.Softplus())

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x)
        return x * self.mask(x)


class Recurrent(nn.Module):
    """LSTM, and a cell that goes on from its last step; a bias that several steps read keeps a scale for each."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm, self.cell = nn.LSTM(8, 8, batch_first=True), nn.GRUCell(8, 8)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        steps, (hidden, _) = self.lstm(self.embed(tokens))
        return {"steps": steps, "next": self.cell(steps[:, -1], hidden[0])}


class Vit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, activation="gelu", batch_first=True, norm_first=True)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), patches], 1) + self.position
        return self.encoder(x)[:, 0]


class WindowAttention(nn.Module):
    """Relative positions looked up in a table, and rolled windows."""

    def __init__(self) -> None:
        super().__init__()
        self.query_key_value, self.table = nn.Linear(8, 24), nn.Parameter(torch.randn(7, 2))
        steps = torch.arange(4)
        self.register_buffer("distance", steps[:, None] - steps + 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(x.roll(1, 1)).view(-1, 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        bias = self.table[self.distance].permute(2, 0, 1)
        return (((query / 2) @ key.transpose(-2, -1) + bias).softmax(-1) @ value).transpose(1, 2).flatten(2)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = ConvBlock(3, 8, nn.SiLU, stride=2), ConvBlock(8, 8, nn.SiLU, stride=2)
        self.heads = nn.ModuleList([nn.Conv2d(8, 5, 1), nn.Conv2d(8, 5, 1)])
        self.register_buffer("anchors", torch.tensor([[10.0, 13.0], [30.0, 61.0]]))

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        return torch.cat([self._boxes(0, fine), self._boxes(1, self.second(fine))], 1)

    def _boxes(self, level: int, x: Tensor) -> Tensor:
        raw = self.heads[level](x).flatten(2).transpose(1, 2).sigmoid()
        size = (2 * raw[..., 2:4]) ** 2 * self.anchors[level]
        return torch.cat([2 * raw[..., :2] - 0.5, size, raw[..., 4:]], -1)


class Picked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.linear(x)
        rows, columns = torch.tensor([2, -1]), torch.tensor([0, 5, -3])
        return x[:, columns], x[rows[:, None], columns], x[rows, columns[:2]], functional.logsigmoid(x)


MODELS: dict[str, tuple[type[nn.Module], Callable[[], Inputs]]] = {
    "mobile": (MobileBlock, lambda: (torch.randn(1, 3, 16, 16),)),
    "unet": (UNet, lambda: (torch.randn(1, 3, 8, 8),)),
    "convnext": (ConvNeXtBlock, lambda: (torch.randn(1, 3, 16, 16),)),
    "vocoder": (Vocoder, lambda: (torch.randn(1, 8, 12),)),
    "separator": (Separator, lambda: (torch.randn(1, 1, 32),)),
    "recurrent": (Recurrent, lambda: (torch.randint(0, 20, (2, 3)),)),
    "vit": (Vit, lambda: (torch.randn(1, 3, 16, 16),)),
    "window": (WindowAttention, lambda: (torch.randn(2, 4, 8),)),
    "detector": (Detector, lambda: (torch.randn(1, 3, 16, 16),)),
    "picked": (Picked, lambda: (torch.randn(4, 8),)),
}


def _quantized(name: str, target: Target, folder: Path) -> tuple[GraphModule, list[Inputs], Path]:
    """The fake-quantized graph, the batches that it was calibrated on, and its file."""
    build, draw = MODELS[name]
    model, batches = build().eval(), [draw() for _ in range(3)]
    context = PassContext(target=target, example_inputs=(batches[0], {}))
    checks = [Verification()]
    prepare = PassManager.from_text(f"{target.prepare_pipeline()},{INSERT}")
    graph = prepare.run(capture(model, batches[0]), context, checks).model
    calibrate(graph, batches)
    file = PassManager.from_text(target.lower_pipeline()).run(graph, context, checks).model
    onnx_io.save(file, folder / "model.onnx")
    onnx_io.verify(folder / "model.onnx")
    return graph, batches, folder / "model.onnx"


def _parity(graph: GraphModule, batches: list[Inputs], runner: parity.Runner, path: Path) -> parity.Parity:
    summary = onnx_io.load(path)
    inputs, outputs = [tensor.name for tensor in summary.inputs], [tensor.name for tensor in summary.outputs]
    feeds = [parity.name_arrays(inputs, list(batch)) for batch in batches]
    with torch.no_grad():
        expected = [parity.name_arrays(outputs, parity.flat_inputs(graph(*batch))) for batch in batches]
    scales = dict(zip(outputs, parity.output_scales(graph), strict=True))
    return parity.compare(expected, [runner(feed) for feed in feeds], scales)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_computes_what_the_fake_quantized_graph_does(name: str, tmp_path: Path) -> None:
    graph, batches, path = _quantized(name, OnnxRuntimeTarget(), tmp_path)
    floats = [layer for layer in layers(graph) if layer["status"] == "float" and not layer["expected"]]
    result = _parity(graph, batches, parity.onnx_runner(path, optimized=False), path)
    assert not floats
    assert result.max_lsb is not None and result.max_lsb <= LSB_TOLERANCE + 1e-3


@pytest.mark.skipif(HtpTarget.missing() is not None, reason=str(HtpTarget.missing()))
@pytest.mark.parametrize("name", ["unet", "window", "vocoder"])
def test_htp_takes_the_whole_graph_and_computes_the_same(name: str, tmp_path: Path) -> None:
    target = HtpTarget()
    graph, batches, path = _quantized(name, target, tmp_path)
    artifact = target.compile(path, tmp_path)
    result = _parity(graph, batches, lambda feeds: target.run(artifact, feeds), path)
    assert result.cosine > 0.999 and abs(result.slope - 1) < 0.02
    assert result.max_lsb is not None and result.max_lsb <= 4


def test_probabilities_beyond_what_calibration_saw_do_not_wrap_around(tmp_path: Path) -> None:
    model, flat, peaked = nn.Softmax(-1), torch.zeros(1, 8), torch.zeros(1, 8)
    peaked[0, 3] = 3.0
    target = OnnxRuntimeTarget()
    context = PassContext(target=target, example_inputs=((flat,), {}))
    graph = PassManager.from_text(INSERT).run(capture(model, (flat,)), context).model
    calibrate(graph, [(flat,), (flat + 3,)])
    onnx_io.save(PassManager.from_text(target.lower_pipeline()).run(graph, context).model, tmp_path / "model.onnx")
    result = _parity(
        graph, [(peaked,)], parity.onnx_runner(tmp_path / "model.onnx", optimized=True), tmp_path / "model.onnx"
    )
    assert result.max_lsb is not None and result.max_lsb <= LSB_TOLERANCE + 1e-3


class Calls(nn.Module):
    """A model of one function."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: x + torch.randn_like(x), "draws random numbers"),
        (lambda x: x[x > 0], "depends on values of tensors"),
        (lambda x: (x, 3), "returns 3"),
    ],
)
def test_what_no_graph_can_hold_is_refused_at_capture(function: Callable[[Tensor], object], words: str) -> None:
    with pytest.raises(CaptureError, match=words) as caught:
        capture(Calls(function), (torch.randn(2, 8),))
    assert caught.value.remedy


def test_other_float_types_are_refused_with_the_line_that_makes_them() -> None:
    x = torch.randn(2, 8)
    graph = capture(Calls(lambda x: x.double().softmax(-1).float()), (x,))
    context = PassContext(example_inputs=((x,), {}))
    with pytest.raises(PassError, match=r"test_architectures\.py:\d+ is float64") as caught:
        PassManager.from_text("export-onnx").run(graph, context)
    assert ".float()" in (caught.value.remedy or "")


def test_an_op_with_a_loop_of_its_own_is_refused() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.long)
    model = nn.EmbeddingBag(9, 8, mode="mean")
    graph = capture(model, (tokens,))
    with pytest.raises(PassError, match="cannot be quantized"):
        PassManager.from_text("export-onnx").run(graph, PassContext(example_inputs=((tokens,), {})))
