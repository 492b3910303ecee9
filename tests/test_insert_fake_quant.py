"""insert-fake-quant: what gets a quantizer, which ones are shared, how wide they are, and what the verdicts say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import QuantizationError, UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize, BiasFakeQuantize, WeightFakeQuantize
from fraqat_compiler.layers import layers, parameter_counts, weight_quantizers
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.pass_manager import PassManager
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.quant_spec import QuantSpec, Unquantized
from fraqat_compiler.target import TensorRequest
from fraqat_compiler.targets.htp import HtpTarget


class Mixed(nn.Module):
    """One of everything that has a weight, attention-like matmuls, shape ops and a table."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.table = nn.Parameter(torch.randn(1, 64, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.up(self.depthwise(x)).flatten(2).transpose(1, 2)
        x = self.norm(x) + self.table
        attention = (x @ x.transpose(1, 2)).softmax(-1)
        return self.head(self.mlp(attention @ x).mean(1))


def _inputs() -> tuple[Tensor]:
    return (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),)


def _inserted(options: InsertFakeQuant | None = None, ctx: PassContext | None = None) -> GraphModule:
    torch.manual_seed(0)
    graph = capture(Mixed(), _inputs())
    prepared = (
        PassManager.from_text("remove-no-ops,fold-constants,fold-batch-norm,decompose-attention").run(graph).model
    )
    return (options or InsertFakeQuant()).run(prepared, ctx or PassContext()).model


def _layer(graph: GraphModule, name: str) -> dict[str, Any]:
    return next(entry for entry in layers(graph) if entry["name"] == name)


def test_every_op_is_quantized() -> None:
    graph = _inserted()
    assert [entry for entry in layers(graph) if entry["status"] == "float"] == []
    weights = dict(weight_quantizers(graph))
    assert {name for name, module in weights.items() if module.role == "weight"} == {
        f"{name}.weight" for name in ("stem", "depthwise", "up", "mlp.0", "mlp.2", "head")
    }
    assert weights["up.weight"].spec.axis == 1
    assert weights["norm.weight"].role == "norm_weight"
    assert weights["table"].role == "constant"
    total, quantized = parameter_counts(graph)
    biases = 8 + 8 + 8 + 8 + 16 + 8 + 5
    assert total - quantized == biases


def test_quantized_graph_is_close_and_trains() -> None:
    graph = _inserted(InsertFakeQuant(weights="8"))
    calibrate(graph, [_inputs()])
    torch.manual_seed(0)
    expected = Mixed().eval()(*_inputs())
    actual = graph(*_inputs())
    assert F.cosine_similarity(actual.flatten(), expected.flatten(), 0) > 0.99
    actual.square().sum().backward()
    for name in ("stem.weight", "stem.bias", "norm.weight", "norm.bias", "table", "head.weight", "head.bias"):
        assert graph.get_parameter(name).grad.abs().sum() > 0, name


def test_relu_and_shape_ops_share_quantizers() -> None:
    graph = _inserted()
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    activations = [name for name in called if isinstance(graph.get_submodule(name), ActivationFakeQuantize)]
    assert "fake_quant.conv2d" not in activations  # the ReLU's quantizer does its work
    assert "fake_quant.relu" in activations
    assert not any("flatten" in name or ("transpose" in name and "conv" not in name) for name in activations)


def test_biases_are_int32_on_the_scales_of_input_and_weight() -> None:
    graph = _inserted()
    calibrate(graph, [_inputs()])
    (node,) = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == "fake_quant.head_bias"]
    assert isinstance(graph.get_submodule("fake_quant.head_bias"), BiasFakeQuantize)
    input_scale, weight_scale = (str(argument.target) for argument in node.args[1:])
    assert weight_scale == "fake_quant.head_weight.scale"
    assert input_scale.startswith("fake_quant.mean")


def test_a_bias_takes_the_scale_of_its_result_where_the_target_says_so() -> None:
    graph = _inserted(ctx=PassContext(target=HtpTarget()))
    calibrate(graph, [_inputs()])
    (node,) = [n for n in graph.graph.nodes if n.op == "call_module" and n.target == "fake_quant.norm_bias"]
    result_scale, own_scale = (graph.get_buffer(str(argument.target)) for argument in node.args[1:])
    assert str(node.args[1].target).startswith("fake_quant.layer_norm")
    assert own_scale == 1
    bias = torch.randn(8)
    steps = graph.get_submodule("fake_quant.norm_bias")(bias, result_scale, own_scale) / result_scale
    torch.testing.assert_close(steps, (bias / result_scale).round())


def test_widths_by_module() -> None:
    graph = _inserted(InsertFakeQuant(weights="4,head=8,mlp.*=5.5", activations="8,head=16"))
    widths = {name: module.spec.bit_width for name, module in weight_quantizers(graph) if module.role == "weight"}
    assert widths["head.weight"] == 8 and widths["mlp.0.weight"] == 5.5 and widths["stem.weight"] == 4
    assert _layer(graph, "head")["activation_bits"] == 16
    assert _layer(graph, "mlp.0")["activation_bits"] == 8


def test_skipped_modules_say_so() -> None:
    graph = _inserted(InsertFakeQuant(skip="head,mlp"))
    assert _layer(graph, "head")["status"] == "float"
    assert "skip" in _layer(graph, "mlp.0")["reason"]
    assert _layer(graph, "stem")["status"] == "quantized"


def test_float_widths_leave_layers_out() -> None:
    graph = _inserted(InsertFakeQuant(weights="4,head=float"))
    assert "weights option" in _layer(graph, "head")["reason"]
    only_weights = _inserted(InsertFakeQuant(activations="float"))
    assert not any(isinstance(module, ActivationFakeQuantize) for module in only_weights.modules())


def test_unknown_modules_and_widths_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'haed'.*head"):
        _inserted(InsertFakeQuant(weights="4,haed=8"))
    with pytest.raises(UsageError, match="not a bit width"):
        _inserted(InsertFakeQuant(weights="four"))


def test_tied_weights_get_one_quantizer() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(10, 16)
            self.head = nn.Linear(16, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.embed(ids))

    graph = InsertFakeQuant().run(capture(Tied(), (torch.arange(4),)), PassContext()).model
    assert len([module for module in graph.modules() if isinstance(module, WeightFakeQuantize)]) == 1
    assert parameter_counts(graph) == (160, 160)


def test_group_size_and_other_grids() -> None:
    specs = {name: module.spec for name, module in weight_quantizers(_inserted(InsertFakeQuant(group_size=4)))}
    assert specs["mlp.0.weight"].group_size == 4 and specs["stem.weight"].group_size is None
    specs = {
        name: m.spec for name, m in weight_quantizers(_inserted(InsertFakeQuant(per_tensor=True, asymmetric=True)))
    }
    assert specs["mlp.0.weight"].granularity == "per-tensor" and not specs["mlp.0.weight"].symmetric


def test_targets_decide() -> None:
    @dataclass(frozen=True)
    class Picky(HtpTarget):
        def quant_spec(self, request: TensorRequest) -> QuantSpec | Unquantized:
            return Unquantized("no softmax unit") if request.op == "softmax" else super().quant_spec(request)

    graph = _inserted(ctx=PassContext(target=Picky()))
    reasons = {entry["op"]: entry["reason"] for entry in layers(graph) if entry["status"] == "float"}
    assert reasons["softmax"] == "no softmax unit"
    wide = _inserted(InsertFakeQuant(activations="16"), PassContext(target=HtpTarget()))
    widths = {name: module.spec.bit_width for name, module in weight_quantizers(wide)}
    assert widths["depthwise.weight"] == 8 and widths["stem.weight"] == 4


def test_strict_names_what_stays_in_float() -> None:
    class Spectral(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    graph = capture(Spectral(), (torch.ones(2, 4),))
    with pytest.raises(QuantizationError, match="complex"):
        InsertFakeQuant(strict=True).run(graph, PassContext())


def test_a_second_run_does_nothing() -> None:
    graph = _inserted()
    assert not InsertFakeQuant().run(graph, PassContext()).modified
