"""fuse-rms-norm."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lowering import Applied
from torch import Tensor, nn
from torch.fx import GraphModule

import fraqat_compiler
from fraqat_compiler import onnx_io, parity
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.losses import relative_error
from fraqat_compiler.ops import op_name
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.fuse_rms_norm import FuseRmsNorm
from fraqat_compiler.targets.htp import HtpTarget


class WrittenOut(nn.Module):
    """As transformers and diffusers write it."""

    def __init__(self, size: int = 16, affine: bool = True, power: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + torch.randn(size) / 4) if affine else None
        self.power = power

    def forward(self, x: Tensor) -> Tensor:
        square = x.pow(2) if self.power else x * x
        x = x * torch.rsqrt(square.mean(-1, keepdim=True) + 1e-6)
        return x if self.weight is None else self.weight * x


NORMS: list[Callable[[Tensor], Tensor]] = [
    lambda x: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    lambda x: x / (x.square().mean(-1, keepdim=True) + 1e-6) ** 0.5,
    lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 16 + 1e-6),
    lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) * (1 / 16) + 1e-6),
    lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)),
    lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.tensor(1e-6)),
]
OTHERS: list[Callable[[Tensor], Tensor]] = [
    lambda x: torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) / x,
    lambda x: x / torch.sqrt(x.pow(3).abs().mean(-1, keepdim=True) + 1e-6),
    lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / 8 + 1e-6),
    lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + x),
]


class OtherAxis(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class OtherFactor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _fused(model: nn.Module, x: Tensor) -> tuple[GraphModule, bool]:
    graph = PassManager.from_text("remove-no-ops,fold-constants").run(capture(model, (x,))).model
    expected = graph(x)
    result = FuseRmsNorm().run(graph, PassContext())
    torch.testing.assert_close(result.model(x), expected)
    return result.model, result.modified


def _names(graph: GraphModule) -> list[str]:
    return [op_name(node) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("shape", [(1, 6, 16), (6, 16), (1, 1, 6, 16)])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"power": False}])
def test_what_is_written_out_becomes_one_op(shape: tuple[int, ...], options: dict[str, bool]) -> None:
    graph, modified = _fused(WrittenOut(**options), torch.randn(shape))
    assert modified
    assert _names(graph) == ["aten.rms_norm"]
    assert not FuseRmsNorm().run(graph, PassContext()).modified


def test_rows_along_several_dimensions_become_one() -> None:
    graph, modified = _fused(WrittenOut(), torch.randn(2, 3, 4, 16))
    assert modified
    assert _names(graph) == ["aten.reshape", "aten.rms_norm", "aten.reshape"]
    assert not FuseRmsNorm().run(graph, PassContext()).modified


def test_shapes_are_left_alone_on_request() -> None:
    graph = capture(WrittenOut(), (torch.randn(2, 3, 4, 16),))
    assert FuseRmsNorm(rows=False).run(graph, PassContext()).modified
    assert _names(graph) == ["aten.rms_norm"]


def test_rows_of_two_sizes_survive_8_bits_on_the_cpu(tmp_path: Path) -> None:
    """As in language models, whose first token is huge: 8-bit codes of the mean squares would be 0 for the others."""
    torch.manual_seed(0)
    x, model = torch.randn(64, 16), WrittenOut()
    x[0] *= 30
    fraqat_compiler.compile(model, (x,), output=tmp_path / "out", weights="8", activations="8", steps=0)
    (actual,) = parity.onnx_runner(tmp_path / "out" / "model.onnx", optimized=True)({"x": x.numpy()}).values()
    with torch.no_grad():
        assert float(relative_error(torch.from_numpy(actual), model(x))) < 0.02


@pytest.mark.parametrize("norm", NORMS)
def test_it_is_known_in_other_words(norm: Callable[[Tensor], Tensor]) -> None:
    graph, modified = _fused(Applied(norm), torch.randn(1, 4, 16))
    assert modified
    assert _names(graph) == ["aten.rms_norm"]


@pytest.mark.parametrize("function", OTHERS)
def test_other_roots_are_left_alone(function: Callable[[Tensor], Tensor]) -> None:
    assert not _fused(Applied(function), torch.rand(1, 4, 16))[1]


def test_a_product_with_no_weight_keeps_it() -> None:
    model = nn.Sequential(WrittenOut(affine=False), nn.Linear(16, 16))
    graph, _ = _fused(model, torch.randn(1, 4, 16))
    assert _names(graph) == ["aten.rms_norm", "aten.linear"]


@pytest.mark.parametrize("model", [OtherAxis(), OtherFactor(), nn.LayerNorm(16)])
def test_other_norms_are_left_alone(model: nn.Module) -> None:
    assert not _fused(model, torch.randn(1, 16, 16))[1]


@pytest.mark.parametrize("activations", [8, 16])
@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 32, 2, 16)])
def test_the_library_computes_it(shape: tuple[int, ...], activations: int, tmp_path: Path) -> None:
    """Of small values, whose root lies far below 1; written out, they come out scaled."""
    pytest.importorskip("onnxruntime_qnn")
    torch.manual_seed(0)
    target, x = HtpTarget(), torch.randn(shape) / 20
    ctx = PassContext(target=target, example_inputs=((x,), {}))
    insert = f"insert-fake-quant{{weights=8 activations={activations}}}"
    graph = PassManager.from_text(f"{target.prepare_pipeline()},{insert}").run(capture(WrittenOut(), (x,)), ctx).model
    calibrate(graph, [(x,)])
    lowered = PassManager.from_text(target.lower_pipeline()).run(graph, ctx).model
    path = tmp_path / "model.onnx"
    onnx_io.save(lowered, path)
    onnx_io.verify(path)
    expected = parity.onnx_runner(path, optimized=False)({"x": x.numpy()})
    actual = target.run(target.compile(path, tmp_path), {"x": x.numpy()})
    scales = dict(zip(expected, parity.output_scales(graph), strict=True))
    distance = parity.compare([expected], [actual], scales)
    assert distance.max_lsb is not None and distance.max_lsb <= 2.001
    assert abs(distance.slope - 1) < 5e-3
