"""The grids of FraQAT, their codes, and the gradient rule."""

from __future__ import annotations

import math

import pytest
import torch

from fraqat_compiler.errors import QuantizationError
from fraqat_compiler.quant_spec import QuantSpec, code_range
from fraqat_compiler.quantizer import (
    asymmetric_parameters,
    bias_scale,
    centre,
    dequantize,
    fake_quantize,
    quantize,
    round_bias,
    symmetric_scale,
)


@pytest.mark.parametrize(
    ("bit_width", "expected"),
    [
        (8, (-128, 127)),
        (6, (-32, 31)),
        (5.5, (-22, 21)),
        (5, (-16, 15)),
        (4.75, (-13, 12)),
        (4.5, (-11, 10)),
        (4.25, (-9, 8)),
        (4, (-8, 7)),
    ],
)
def test_code_ranges_are_those_of_the_paper(bit_width: float, expected: tuple[int, int]) -> None:
    assert code_range(bit_width, signed=True) == expected


@pytest.mark.parametrize("bit_width", [1.9, 32.5, float("nan"), -1])
def test_widths_outside_2_to_32_are_refused(bit_width: float) -> None:
    with pytest.raises(QuantizationError, match="outside"):
        code_range(bit_width, signed=True)


@pytest.mark.parametrize("bit_width", [2, 3.3, 4, 4.25, 5.5, 8])
def test_symmetric_grid_is_equation_1(bit_width: float) -> None:
    values = torch.randn(64, generator=torch.Generator().manual_seed(0))
    scale = values.abs().max() / (2 ** (bit_width - 1) - 1)
    low, high = -math.floor(2 ** (bit_width - 1)), math.floor(2 ** (bit_width - 1) - 1)
    expected = scale * torch.round(values / scale).clamp(low, high)
    assert torch.equal(fake_quantize(values, bit_width), expected)


@pytest.mark.parametrize("bit_width", [2, 4, 4.5, 8])
def test_asymmetric_grid_is_equation_2(bit_width: float) -> None:
    values = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 3
    scale = (values.max() - values.min()) / 2**bit_width
    codes = torch.round((values - values.min()) / scale).clamp(0, math.floor(2**bit_width - 1))
    torch.testing.assert_close(fake_quantize(values, bit_width, symmetric=False), scale * codes + values.min())


def test_every_granularity_has_its_own_scales() -> None:
    values = torch.randn(4, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor([[1.0], [10], [100], [1000]])
    per_channel = fake_quantize(values, 4, axis=0)
    rows = torch.stack([fake_quantize(row, 4) for row in values])
    assert torch.equal(per_channel, rows)
    per_group = fake_quantize(values, 4, group_size=8)
    groups = torch.stack([fake_quantize(group, 4) for group in values.reshape(-1, 8)]).reshape(4, 32)
    assert torch.equal(per_group, groups)
    assert (per_group - values).square().sum() < (per_channel - values).square().sum()


def test_error_falls_with_every_stage_of_the_schedule() -> None:
    values = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    widths = (4, 4.25, 4.5, 4.75, 5, 5.5, 6, 7, 8)
    errors = [float((fake_quantize(values, width, axis=0) - values).square().mean()) for width in widths]
    assert errors == sorted(errors, reverse=True)


def test_wide_codes_are_exact() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(3))
    assert float((fake_quantize(values, 32) - values).abs().max()) < 1e-8


def test_gradient_is_straight_through_inside_the_code_range() -> None:
    # At 5.5 bits Eq. 1 puts max|W| at 21.63 steps, beyond the top code 21 + 0.5: the one masked element.
    values = torch.linspace(-0.9, 1, 101, requires_grad=True)
    fake_quantize(values, 5.5).sum().backward()
    expected = torch.ones(101)
    expected[-1] = 0
    assert torch.equal(values.grad, expected)


def test_zero_rows_and_constant_tensors_stay_finite() -> None:
    assert torch.equal(fake_quantize(torch.zeros(3, 4), 4, axis=0), torch.zeros(3, 4))
    assert torch.equal(fake_quantize(torch.full((5,), 2.0), 4, symmetric=False), torch.full((5,), 2.0))


def test_unfit_tensors_are_refused() -> None:
    with pytest.raises(QuantizationError, match="group_size"):
        fake_quantize(torch.randn(4, 10), 4, group_size=3)
    with pytest.raises(QuantizationError, match="axis"):
        fake_quantize(torch.randn(4), 4, axis=1)
    with pytest.raises(QuantizationError, match="empty"):
        fake_quantize(torch.empty(0), 4)
    with pytest.raises(QuantizationError, match="int64"):
        fake_quantize(torch.arange(3), 4)


def test_half_precision_keeps_its_dtype() -> None:
    values = torch.randn(16, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    result = fake_quantize(values, 8)
    assert result.dtype is torch.bfloat16
    torch.testing.assert_close(result.float(), values.float(), atol=0.05, rtol=0)


def test_integer_zero_point_holds_zero_and_reaches_both_ends() -> None:
    spec = QuantSpec(8, symmetric=False, signed=False)
    scale, zero_point = asymmetric_parameters(torch.tensor(-0.7), torch.tensor(2.3), spec)
    ends = torch.tensor([-0.7, 0.0, 2.3])
    values = dequantize(quantize(ends, scale, zero_point, 0, 255), scale, zero_point)
    assert values[1] == 0
    assert float((values - ends).abs().max()) <= float(scale) / 2 + 1e-6


@pytest.mark.parametrize(("low", "high"), [(-0.7, 2.3), (-2.3, 0.7), (0.0, 1.0)])
def test_a_centred_grid_has_its_zero_in_the_middle(low: float, high: float) -> None:
    spec = QuantSpec(bit_width=8, symmetric=False, signed=False, centred_within=128)
    scale, zero_point = asymmetric_parameters(torch.tensor(low), torch.tensor(high), spec)
    assert zero_point == 128
    assert -128 * scale <= low + 1e-6 and high - 1e-6 <= 127 * scale
    assert min(low + 128 * scale, 127 * scale - high) < scale


@pytest.mark.parametrize(("low", "zero_point"), [(-111.0, 111), (-112.0, 128), (-144.0, 128), (-145.0, 145)])
def test_a_grid_is_centred_where_its_zero_is_near_the_middle_and_the_spec_says_so(low: float, zero_point: int) -> None:
    spec = QuantSpec(bit_width=8, symmetric=False, signed=False, centred_within=16)
    scale, found = asymmetric_parameters(torch.tensor(low), torch.tensor(low + 255), spec)
    assert found == zero_point
    assert -zero_point * scale <= low + 1e-6 and low + 255 - 1e-6 <= (255 - zero_point) * scale
    assert centre(torch.tensor(130.0), spec) == 128 and centre(torch.tensor(150.0), spec) == 150


def test_codes_are_what_onnx_quantize_linear_computes() -> None:
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4096])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [4096])],
        [
            helper.make_tensor("s", TensorProto.FLOAT, [], [0.037]),
            helper.make_tensor("z", TensorProto.UINT8, [], [113]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    values = torch.randn(4096, generator=torch.Generator().manual_seed(5)) * 3
    (expected,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": values.numpy()})
    codes = quantize(values, torch.tensor(0.037), torch.tensor(113), 0, 255)
    assert codes.to(torch.uint8).numpy().tolist() == expected.tolist()


def test_bias_is_rounded_to_the_product_of_the_scales() -> None:
    bias = torch.tensor([0.1, -3.0, 1e9])
    weight_scale = torch.tensor([0.01, 0.02, 0.01])
    rounded = round_bias(bias, torch.tensor(0.05), weight_scale)
    step = bias_scale(torch.tensor(0.05), weight_scale)
    assert float((rounded[:2] - bias[:2]).abs().max()) <= float(step.max()) / 2
    assert float(rounded[2]) == pytest.approx(2**31 * float(step[2]), rel=1e-6)  # saturates as int32 does


def test_an_empty_row_has_the_scale_of_a_magnitude_of_one() -> None:
    assert symmetric_scale(torch.tensor([0.0, 7.0]), 4).tolist() == pytest.approx([1 / 7, 1.0])


def test_an_empty_range_has_the_grid_of_zero_to_one() -> None:
    scale, zero_point = asymmetric_parameters(
        torch.zeros(()), torch.zeros(()), QuantSpec(16, symmetric=False, signed=False)
    )
    assert (scale.item(), zero_point.item()) == (pytest.approx(1 / 65535), 0)
