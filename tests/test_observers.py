"""Ranges from what calibration saw."""

from __future__ import annotations

import pytest
import torch

from fraqat_compiler.errors import DataError
from fraqat_compiler.observers import OBSERVERS, Observer
from fraqat_compiler.quant_spec import QuantSpec, RangeMethod

SPEC = QuantSpec(4, symmetric=False, signed=False)


def _observed(method: RangeMethod, batches: list[torch.Tensor]) -> Observer:
    observer = OBSERVERS[method]()
    for batch in batches:
        observer.observe(batch)
    return observer


def _batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2500, 10, generator=generator) * scale + 1 for scale in (1, 3, 0.5)]


def test_minmax_is_the_extremes_of_all_batches() -> None:
    batches = _batches()
    low, high = _observed("minmax", batches).range(SPEC)
    assert float(low) == float(torch.cat(batches).min())
    assert float(high) == float(torch.cat(batches).max())


def test_sigma_is_mean_and_three_deviations_of_all_values() -> None:
    values = torch.cat(_batches()).double()
    low, high = _observed("sigma3", _batches()).range(SPEC)
    deviation = float(values.std(correction=0))
    assert float(low) == pytest.approx(max(float(values.mean()) - 3 * deviation, float(values.min())), rel=1e-5)
    assert float(high) == pytest.approx(min(float(values.mean()) + 3 * deviation, float(values.max())), rel=1e-5)


def test_percentile_leaves_rare_outliers_out() -> None:
    batches = [*_batches(), torch.tensor([1000.0])]
    low, high = _observed("percentile", batches).range(SPEC)
    values = torch.cat([batch.flatten() for batch in batches])
    assert float(high) < 15
    assert float(((values < low) | (values > high)).float().mean()) < 0.001


def test_mse_range_has_less_error_than_minmax_at_four_bits() -> None:
    values = torch.cat(_batches())

    def error(method: RangeMethod) -> float:
        from fraqat_compiler.quantizer import dequantize, quantization_parameters, quantize

        scale, zero_point = quantization_parameters(*_observed(method, _batches()).range(SPEC), SPEC)
        codes = quantize(values, scale, zero_point, SPEC.quant_min, SPEC.quant_max)
        return float((dequantize(codes, scale, zero_point) - values).square().mean())

    assert error("mse") < 0.8 * error("minmax")


@pytest.mark.parametrize("method", OBSERVERS)
def test_nan_is_refused(method: RangeMethod) -> None:
    with pytest.raises(DataError, match="NaN"):
        OBSERVERS[method]().observe(torch.tensor([1.0, float("nan")]))


@pytest.mark.parametrize("method", OBSERVERS)
def test_a_constant_tensor_has_a_range(method: RangeMethod) -> None:
    low, high = _observed(method, [torch.full((4,), 2.5)] * 2).range(SPEC)
    assert float(low) <= 2.5 <= float(high) + 1e-3
