"""Blended grids: FracBits' reading of a fractional width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fine_tune_job import build, data
from torch import Tensor

from fraqat_compiler.blended_grid import BlendedWeightFakeQuantize, blend_grids
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.fine_tune import FineTuneConfig, fine_tune
from fraqat_compiler.layers import end_widths, set_weight_bit_width
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.freeze_bit_width import FreezeBitWidth
from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.quantizer import fake_quantize
from fraqat_compiler.schedule import parse_schedule


def _weight() -> Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("bit_width", [8, 7.25, 5.5, 4])
def test_it_is_the_blend_of_the_neighbouring_integer_grids(bit_width: float) -> None:
    module = BlendedWeightFakeQuantize(QuantSpec(8, axis=0), "weight", (6,))
    module.set_bit_width(bit_width)
    lower, upper = int(bit_width), -int(-bit_width // 1)
    share = bit_width - lower
    grids = [fake_quantize(_weight(), width, axis=0) for width in (lower, upper)]
    torch.testing.assert_close(module(_weight()), (1 - share) * grids[0] + share * grids[1])


def test_the_gradient_is_straight_through() -> None:
    module = BlendedWeightFakeQuantize(QuantSpec(4.5, axis=0), "weight", (6,))
    weight = _weight().requires_grad_()
    module(weight).sum().backward()
    torch.testing.assert_close(weight.grad, torch.ones(6, 32))


def test_only_weights_are_blended_and_they_train_resume_and_freeze(tmp_path: Path) -> None:
    config = FineTuneConfig(parse_schedule("8x1,5.5x2,4.3x2,4x1"), 24, lr=1e-3, checkpoint_every=5)
    graphs = []
    for resume in (False, True):
        teacher, student = build()
        assert blend_grids(student) == 3
        result = fine_tune(student, teacher, data, config, folder=tmp_path, resume=resume)
        graphs.append(student)
        if not resume:
            for path in tmp_path.glob("step-00000024/*"):
                path.unlink()
    assert result.resumed_from == 20
    for name, parameter in graphs[0].named_parameters():
        assert torch.equal(parameter, graphs[1].get_parameter(name))
    set_weight_bit_width(student, end_widths(student))
    x = torch.randn(16, 8)
    trained = student(x)
    assert torch.equal(FreezeBitWidth().run(student, PassContext()).model(x), trained)


def test_it_comes_back_from_its_config() -> None:
    plain = WeightFakeQuantize(QuantSpec(4.5, axis=0, range_method="mse"), "weight", (6,))
    plain.least_scale.fill_(0.3)
    module = BlendedWeightFakeQuantize.of(plain)
    copy = BlendedWeightFakeQuantize.from_config(module.to_config())
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy(_weight()), module(_weight()))
    assert float(copy.scale.min()) == pytest.approx(0.3)
