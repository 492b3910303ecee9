"""Learned ranges: LSQ's gradient, what a falling width does to them, and that the file holds what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tune_job import build, data
from torch import Tensor
from torch.fx import GraphModule

from fraqat_compiler import fx_io, quantizer
from fraqat_compiler.errors import UsageError
from fraqat_compiler.fake_quant import ActivationFakeQuantize, WeightFakeQuantize
from fraqat_compiler.fine_tune import FineTuneConfig, FineTuneResult, fine_tune
from fraqat_compiler.fine_tune_state import trained_parameters
from fraqat_compiler.learned_ranges import (
    LearnedActivationFakeQuantize,
    LearnedWeightFakeQuantize,
    Lsq,
    LsqPlus,
    learn_ranges,
    settle_ranges,
)
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.freeze_bit_width import FreezeBitWidth
from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.recipe import parse_recipe
from fraqat_compiler.schedule import parse_schedule
from fraqat_compiler.training_setup import apply_recipe, own_parameters

A8 = QuantSpec(8, symmetric=False, signed=False)


def _weight() -> Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(0))


def _learning(method: str = "minmax", bit_width: float = 8.0) -> LearnedWeightFakeQuantize:
    plain = WeightFakeQuantize(QuantSpec(bit_width, axis=0, range_method=method), "weight", (6,))  # type: ignore[arg-type]
    made = LearnedWeightFakeQuantize.of(plain)
    assert made is not None
    return made


def _lsq_of_the_paper(v: Tensor, s: Tensor, lowest: int, highest: int, g: float) -> Tensor:
    """The pseudocode of arXiv 1902.08153, appendix A: gradients by detaching."""
    s = (s - s * g).detach() + s * g
    clipped = (v / s).clamp(lowest, highest)
    return ((clipped.round() - clipped).detach() + clipped) * s


def test_the_gradient_is_lsqs() -> None:
    """On values at least half a step away from the ends, where the paper's mask and this package's agree."""
    generator = torch.Generator().manual_seed(1)
    inside = torch.rand(5, 40, generator=generator) * 13.8 - 7.4
    values = torch.cat([inside, torch.full((5, 3), 9.3), torch.full((5, 2), -11.1)], dim=1) * 0.3
    results = []
    for function in (_lsq_of_the_paper, None):
        v, s = values.clone().requires_grad_(), torch.full((5, 1), 0.3, requires_grad=True)
        if function is None:
            out = quantizer.learned_step(v, s, -8, 7, 45)
        else:
            out = function(v, s, -8, 7, 1 / (45 * 7) ** 0.5)
        (out * torch.arange(225.0).view(5, 45)).sum().backward()
        results.append((out.detach(), v.grad, s.grad))
    for paper, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, paper)


def test_the_zero_points_gradient_is_that_of_the_clipped_values() -> None:
    """Finite differences of one code: values inside do not move, clipped ones move by minus a step."""
    values, scale = torch.tensor([-0.51, 0.0, 0.33, 99.0, 140.0]), torch.tensor(0.5)
    zero_point = torch.tensor(100.0, requires_grad=True)
    outputs = quantizer.learned_step(values, scale.requires_grad_(), 0, 255, 1 / 255, zero_point)
    outputs.sum().backward()
    with torch.no_grad():
        moved = quantizer.learned_step(values, scale, 0, 255, 1, zero_point + 1)
    assert float(zero_point.grad) == pytest.approx(float((moved - outputs).sum().detach())) == -1.0


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("bit_width", [8, 5.5, 4])
def test_before_training_it_computes_what_the_plain_one_does(method: str, bit_width: float) -> None:
    plain = WeightFakeQuantize(QuantSpec(bit_width, axis=0, range_method=method), "weight", (6,))  # type: ignore[arg-type]
    learning = _learning(method, bit_width)
    assert torch.equal(learning(_weight()), plain(_weight()))
    learning = _learning(method)
    learning(_weight())
    learning.set_bit_width(bit_width)
    torch.testing.assert_close(learning(_weight()), plain(_weight()), rtol=1e-6, atol=0)


def test_a_falling_width_keeps_the_range_that_was_learned() -> None:
    """The scale grows by the ratio of Eq. 1's divisors, whatever the weights have become meanwhile."""
    module = _learning()
    module(_weight())
    with torch.no_grad():
        module.range_ratio.fill_(0.7)
    module(_weight())
    before = module.scale.clone()
    module.set_bit_width(5.5)
    module(_weight() * 1.3)
    torch.testing.assert_close(module.scale / before, torch.full((6,), 127 / (2**4.5 - 1)))
    assert torch.equal(module.range_ratio, torch.full((6,), 0.7))


def test_a_ratio_below_zero_leaves_the_scale_positive() -> None:
    module = _learning()
    module(_weight())
    with torch.no_grad():
        module.range_ratio.fill_(-1)
    assert bool(torch.isfinite(module(_weight())).all())
    assert float(module.scale.min()) > 0


def _tuned(folder: Path, options: Lsq, steps: int = 60, resume: bool = False) -> tuple[GraphModule, FineTuneResult]:
    teacher, student = build(weight_range="mse")
    assert learn_ranges(student, options, trained_parameters(student)) > 0
    config = FineTuneConfig(parse_schedule("fraqat"), steps, lr=1e-3, checkpoint_every=7, range_rate=options.rate)
    return student, fine_tune(student, teacher, data, config, folder=folder, resume=resume)


@pytest.mark.parametrize("options", [Lsq(), LsqPlus(), Lsq(weights=False), LsqPlus(activations=False)], ids=str)
def test_what_is_asked_for_learns(tmp_path: Path, options: Lsq) -> None:
    student, _ = _tuned(tmp_path, options)
    parameters = trained_parameters(student)
    ratios = {name: parameter for name, parameter in parameters.items() if name.endswith("range_ratio")}
    assert all(not torch.equal(ratio, torch.ones_like(ratio)) for ratio in ratios.values())
    learned = {type(module) for module in student.modules()}
    assert (LearnedWeightFakeQuantize in learned) == options.weights
    assert (LearnedActivationFakeQuantize in learned) == options.activations
    shifts = [parameter for name, parameter in parameters.items() if name.endswith("range_shift")]
    assert bool(shifts) == (options.offset and options.activations)
    assert all(float(shift.detach()) != 0 for shift in shifts)


def test_frozen_and_exported_it_computes_what_was_trained(tmp_path: Path) -> None:
    student, _ = _tuned(tmp_path, LsqPlus())
    x = torch.randn(16, 8)
    trained = student(x).detach()
    settle_ranges(student)
    assert not any(isinstance(module, LearnedActivationFakeQuantize) for module in student.modules())
    frozen = FreezeBitWidth().run(student, PassContext()).model
    assert torch.equal(frozen(x), trained)
    exported = torch.export.export(frozen, (x,)).module()
    torch.testing.assert_close(exported(x), trained, rtol=0, atol=1e-6)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole, _ = _tuned(tmp_path / "whole", LsqPlus(), steps=24)
    _tuned(tmp_path / "part", LsqPlus(), steps=24)
    for path in (tmp_path / "part").glob("step-00000024/*"):
        path.unlink()
    again, result = _tuned(tmp_path / "part", LsqPlus(), steps=24, resume=True)
    assert 0 < result.resumed_from < 24
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_learning_ranges_lowers_the_loss_where_outliers_spoil_them(tmp_path: Path) -> None:
    """Activations calibrated four times too wide at 4 bits: with fixed ranges the loss cannot fall as far."""
    ends = []
    for options in (None, Lsq(weights=False)):
        teacher, student = build(activations="4", weights="8")
        for module in student.modules():
            if isinstance(module, ActivationFakeQuantize):
                module.scale.mul_(4)
                module._forget()
        if options:
            learn_ranges(student, options, trained_parameters(student))
        config = FineTuneConfig(parse_schedule("8x1", 8), 200, lr=3e-3, range_rate=10)
        result = fine_tune(student, teacher, data, config, folder=tmp_path / str(options))
        ends.append(sum(result.losses[-20:]))
    assert ends[1] < 0.5 * ends[0]


def test_ranges_of_frozen_layers_and_given_grids_stay() -> None:
    _, student = build()
    learn_ranges(student, LsqPlus(), {"2.weight"})
    learning = {name for name, module in student.named_modules() if isinstance(module, LearnedWeightFakeQuantize)}
    assert learning == {"fake_quant.2_weight"}
    activations = [m for m in student.modules() if isinstance(m, LearnedActivationFakeQuantize)]
    assert len(activations) == 2, "what layer 2 reads, and what it computes"
    _, student = build()
    learn_ranges(student, LsqPlus(), trained_parameters(student))
    assert not any(type(module) is ActivationFakeQuantize for module in student.modules())
    softmax = ActivationFakeQuantize(QuantSpec(8, symmetric=False, signed=False, range_max=1.0))
    assert LearnedActivationFakeQuantize.of(softmax, True) is None
    wide = WeightFakeQuantize(QuantSpec(4, symmetric=False, axis=0), "weight", (6,))
    assert LearnedWeightFakeQuantize.of(wide) is None


def test_modules_come_back_from_their_config() -> None:
    module = _learning(bit_width=4)
    module(_weight())
    copy = LearnedWeightFakeQuantize.from_config(module.to_config())
    copy.load_state_dict(module.state_dict())
    assert torch.equal(copy(_weight()), module(_weight()))
    plain = ActivationFakeQuantize(A8)
    plain.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    learning = LearnedActivationFakeQuantize.of(plain, True)
    assert learning is not None
    again = LearnedActivationFakeQuantize.from_config(learning.to_config())
    again.load_state_dict(learning.state_dict())
    values = torch.linspace(-2, 3, 40)
    assert torch.equal(again(values), plain(values))


@pytest.mark.parametrize("option", [{"rate": 0.0}, {"weights": False, "activations": False}])
def test_options_that_learn_nothing_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="lsq"):
        Lsq(**option)


@pytest.mark.parametrize("recipe", ["lsq-plus", "blended-grid"])
def test_a_graph_that_learns_can_be_stored(tmp_path: Path, recipe: str) -> None:
    _, student = build(weights="4.5")
    apply_recipe(student, parse_recipe(recipe), own_parameters(student, "all"))
    x = torch.randn(16, 8)
    expected = student(x)
    fx_io.save_graph(student, tmp_path)
    assert torch.equal(fx_io.load_graph(tmp_path)(x), expected)
