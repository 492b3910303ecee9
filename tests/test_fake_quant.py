"""The fake-quant modules: what training computes is what is exported."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fraqat_compiler.errors import QuantizationError
from fraqat_compiler.fake_quant import ActivationFakeQuantize, BiasFakeQuantize, WeightFakeQuantize
from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.quantizer import fake_quantize

WEIGHT_SPECS = [
    (QuantSpec(4, axis=0), (6,)),
    (QuantSpec(4), ()),
    (QuantSpec(8, group_size=8), (6, 4)),
    (QuantSpec(4, axis=0, range_method="mse"), (6,)),
    (QuantSpec(8, symmetric=False, signed=False), ()),
    (QuantSpec(4, symmetric=False, axis=0), (6,)),
]


def _weight() -> Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("spec", "shape"), WEIGHT_SPECS)
def test_training_forward_is_bit_equal_to_the_exported_op(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    module = WeightFakeQuantize(spec, "weight", shape)
    trained = module(_weight())
    exported = torch.export.export(module, (_weight(),)).module()(_weight())
    assert torch.equal(trained, exported)


@pytest.mark.parametrize("bit_width", [8, 5.5, 4.25, 4])
def test_weight_module_follows_equation_1_at_every_stage(bit_width: float) -> None:
    module = WeightFakeQuantize(QuantSpec(8, axis=0), "weight", (6,))
    module.set_bit_width(bit_width)
    assert torch.equal(module(_weight()), fake_quantize(_weight(), bit_width, axis=0))


def test_scale_follows_the_weight_until_frozen() -> None:
    module = WeightFakeQuantize(QuantSpec(4, axis=0), "weight", (6,))
    module.freeze(_weight())
    before = module.scale.clone()
    module(_weight() * 2)
    assert torch.equal(module.scale, before)


def test_fractional_widths_cannot_be_frozen() -> None:
    module = WeightFakeQuantize(QuantSpec(4.25, axis=0), "weight", (6,))
    with pytest.raises(QuantizationError, match="integer widths"):
        module.freeze(_weight())


def test_mse_range_has_less_error_than_max() -> None:
    outlier = _weight()
    outlier[:, 0] = 8
    errors = []
    for method in ("minmax", "mse"):
        module = WeightFakeQuantize(QuantSpec(4, axis=0, range_method=method), "weight", (6,))
        errors.append(float((module(outlier) - outlier).square().sum()))
    assert errors[1] < errors[0]


def test_activation_gradient_is_masked_where_it_clips() -> None:
    module = ActivationFakeQuantize(QuantSpec(8, symmetric=False, signed=False))
    module.set_range(torch.tensor(-1.0), torch.tensor(1.0))
    values = torch.tensor([-2.0, -0.5, 0.0, 0.5, 2.0], requires_grad=True)
    module(values).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 0]


def test_an_uncalibrated_activation_says_so() -> None:
    with pytest.raises(QuantizationError, match="no range"):
        ActivationFakeQuantize(QuantSpec(8, symmetric=False, signed=False))(torch.ones(3))


def test_calibration_passes_in_float_and_then_fixes_the_range() -> None:
    module = ActivationFakeQuantize(QuantSpec(8, symmetric=False, signed=False))
    module.start_calibration()
    values = torch.linspace(-1, 3, 50)
    assert torch.equal(module(values), values)
    module.finish_calibration()
    assert float((module(values) - values).abs().max()) <= float(module.scale) / 2 + 1e-6


def test_ranges_survive_a_state_dict() -> None:
    module, other = (ActivationFakeQuantize(QuantSpec(8, symmetric=False, signed=False)) for _ in range(2))
    module.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    other.load_state_dict(module.state_dict())
    values = torch.linspace(-2, 3, 40)
    assert torch.equal(module(values), other(values))


def test_dynamic_ranges_are_per_token() -> None:
    module = ActivationFakeQuantize(QuantSpec(8, symmetric=False, signed=False, dynamic=True))
    tokens = torch.tensor([[0.0, 1.0], [0.0, 1000.0]])
    torch.testing.assert_close(module(tokens), tokens)


def test_bias_is_bit_equal_to_the_exported_op_and_gets_its_gradient() -> None:
    bias = torch.randn(6, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scales = torch.tensor(0.02), torch.rand(6, generator=torch.Generator().manual_seed(2)) + 0.01
    module = BiasFakeQuantize(QuantSpec(32, axis=0), "bias")
    rounded = module(bias, *scales)
    rounded.sum().backward()
    assert torch.equal(bias.grad, torch.ones(6))
    assert torch.equal(rounded, torch.ops.fraqat.fake_quantize_bias(bias, *scales))


def test_modules_come_back_from_their_config() -> None:
    module = WeightFakeQuantize(QuantSpec(4.5, group_size=8), "weight", (6, 4))
    copy = WeightFakeQuantize.from_config(module.to_config())
    assert isinstance(copy, nn.Module)
    assert copy.spec == module.spec
    assert torch.equal(copy(_weight()), module(_weight()))
