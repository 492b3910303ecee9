"""GPTQ on one matrix: the codes are those of the plain definition, and the quantizer finds them again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fraqat_compiler import gptq
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.quant_spec import QuantSpec

ROWS, COLUMNS = 6, 32
SPECS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "row": ({"axis": 0}, (ROWS,)),
    "tensor": ({}, ()),
    "group": ({"group_size": 8}, (ROWS, 4)),
    "asymmetric": ({"axis": 0, "symmetric": False}, (ROWS,)),
    "asymmetric group": ({"group_size": 8, "symmetric": False, "signed": False}, (ROWS, 4)),
    "clipped": ({"axis": 0, "range_method": "mse"}, (ROWS,)),
    "clipped asymmetric": ({"axis": 0, "symmetric": False, "range_method": "mse"}, (ROWS,)),
    "fractional": ({"axis": 0, "bit_width": 4.5}, (ROWS,)),
}
KINDS = pytest.mark.parametrize("kind", SPECS)


def _inputs(columns: int = COLUMNS, rows: int = 400) -> Tensor:
    """Correlated, some far larger than others, as activations are."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    return torch.randn(rows, columns, generator=generator) @ mixing * torch.linspace(0.2, 3, columns)


def _weight() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def _quantizer(kind: str, weight: Tensor, **changes: Any) -> WeightFakeQuantize:
    options, shape = SPECS[kind]
    module = WeightFakeQuantize(QuantSpec(**({"bit_width": 4} | options | changes)), "weight", shape)
    module.update_range(weight)
    return module


def _made(kind: str, weight: Tensor, hessian: Tensor) -> tuple[WeightFakeQuantize, Tensor]:
    quantizer = _quantizer(kind, weight)
    factor = gptq.factorized(hessian, 0.01)
    assert factor is not None
    return quantizer, gptq.compensated(weight, gptq.Grid.of(quantizer, weight), factor)


def _by_definition(weight: Tensor, grid: gptq.Grid, hessian: Tensor, damp: float) -> Tensor:
    """Column by column in float64: round one, then solve for those left, whose error with those rounded is least."""
    damped = hessian.double() + damp * hessian.double().diagonal().mean() * torch.eye(len(hessian))
    order = damped.diagonal().argsort(descending=True).tolist()
    rounded = torch.zeros_like(weight, dtype=torch.float64)
    for place, column in enumerate(order):
        done = order[:place]
        wanted = weight[:, column].double()
        if done:
            left = order[place:]
            errors = weight[:, done].double() - rounded[:, done]
            wanted = wanted + errors @ torch.linalg.solve(damped[left][:, left], damped[left][:, done]).T[:, 0]
        cell = grid.columns(column)
        rounded[:, column] = cell.rounded(cell.allowed(wanted.float(), weight[:, column])).double()
    return rounded


@KINDS
def test_the_codes_are_those_of_the_definition_and_the_quantizer_finds_them_again(kind: str) -> None:
    weight, hessian = _weight(), _inputs().T @ _inputs()
    quantizer, made = _made(kind, weight, hessian)
    expected = _by_definition(weight, gptq.Grid.of(quantizer, weight), hessian, 0.01)
    scale, zero_point = quantizer.scale.clone(), quantizer.zero_point.clone()
    torch.testing.assert_close(quantizer(made).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(quantizer.scale, scale) and torch.equal(quantizer.zero_point, zero_point)


@KINDS
def test_a_new_quantizer_takes_the_same_range_from_it(kind: str) -> None:
    """As when a fine-tune puts learned ranges in the place of the calibrated ones; clip ratios are fitted anew then."""
    weight = _weight()
    _, made = _made(kind, weight, _inputs().T @ _inputs())
    before, after = (_quantizer(kind, tensor, range_method="minmax") for tensor in (weight, made))
    assert torch.equal(after.scale, before.scale) and torch.equal(after.zero_point, before.zero_point)


@KINDS
def test_the_output_is_nearer_than_that_of_rounding(kind: str) -> None:
    weight, inputs = _weight(), _inputs()
    quantizer, made = _made(kind, weight, inputs.T @ inputs)
    errors = [(quantizer(tried) - weight) @ inputs.T for tried in (weight, made)]
    nearest, compensated = (float(error.square().sum()) for error in errors)
    assert compensated < 0.7 * nearest
    assert gptq.energy(quantizer(made) - weight, inputs.T @ inputs) == pytest.approx(compensated, rel=1e-3)


def test_blocks_of_columns_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hessian = _weight(), _inputs().T @ _inputs()
    quantizer, whole = _made("row", weight, hessian)
    monkeypatch.setattr(gptq, "BLOCK", 5)
    assert torch.equal(quantizer(_made("row", weight, hessian)[1]), quantizer(whole))


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    weight = _weight()
    quantizer, made = _made("row", weight, torch.eye(COLUMNS))
    assert torch.equal(quantizer(made), quantizer(weight))


def test_columns_that_were_never_active_are_rounded_to_nearest() -> None:
    weight, inputs = _weight(), _inputs()
    silent = [3, 20]
    inputs[:, silent] = 0
    quantizer, made = _made("row", weight, inputs.T @ inputs)
    assert torch.equal(made[:, silent], weight[:, silent])
    assert not torch.equal(quantizer(made), quantizer(weight))
    quantizer, made = _made("row", weight, torch.zeros(COLUMNS, COLUMNS))
    assert torch.equal(made, weight)


def test_a_hessian_that_has_no_factor_is_damped_until_it_has_one() -> None:
    factor = gptq.factorized(torch.ones(64, 64), 1e-18)
    assert factor is not None and 1e-18 < factor.damp < 1e-10
    assert torch.isfinite(factor.upper).all()
    assert gptq.factorized(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 0.01) is None


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = _inputs().T @ _inputs()
    factor = gptq.factorized(hessian, 0.1)
    assert factor is not None
    damped = (hessian + 0.1 * hessian.diagonal().mean() * torch.eye(COLUMNS))[factor.order][:, factor.order]
    torch.testing.assert_close(factor.upper, factor.upper.triu())
    product = factor.upper.double().T @ factor.upper.double() @ damped.double()
    torch.testing.assert_close(product, torch.eye(COLUMNS, dtype=torch.float64), atol=1e-4, rtol=0)
