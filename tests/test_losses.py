"""Losses: what each measures, how texts name them, and that a fine-tune descends them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tune_job import build, train
from torch import Tensor, nn
from torch.nn import functional as F

from fraqat_compiler import pipeline_text
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import PipelineSyntaxError, TrainingError, UsageError
from fraqat_compiler.features import modules_at, tapped, watched
from fraqat_compiler.fine_tune import FineTuneConfig, fine_tune
from fraqat_compiler.losses import Features, Kl, Mse, Seen, Task, parse_losses, weighted_sum
from fraqat_compiler.schedule import parse_schedule
from fraqat_compiler.task import TaskObjective


def _seen(student: Any, teacher: Any, **features: list[tuple[Tensor, Tensor]]) -> Seen:
    return Seen((), student, teacher, features)


def test_mse_is_relative_and_the_mean_over_float_outputs() -> None:
    teacher = {"a": torch.full((2, 3), 2.0), "index": torch.tensor([1]), "b": (torch.full((4,), 10.0),)}
    student = {"a": torch.full((2, 3), 3.0), "index": torch.tensor([7]), "b": (torch.full((4,), 10.0),)}
    assert float(Mse()(_seen(student, teacher))) == pytest.approx((1 / 4 + 0) / 2)
    assert float(Mse(relative=False)(_seen(student, teacher))) == pytest.approx((1 + 0) / 2)
    half = torch.full((8,), 300.0, dtype=torch.float16)  # its square is past float16's range
    assert float(Mse()(_seen(half * 0.5, half))) == pytest.approx(0.25)
    with pytest.raises(TrainingError, match="no float output"):
        Mse()(_seen(torch.tensor([1]), torch.tensor([1])))


def test_kl_is_the_divergence_of_the_softmaxes_at_a_temperature() -> None:
    """Two classes with probabilities 3/4 and 1/4 against even ones; and T^2 times that of the flattened ones."""
    student, teacher = torch.zeros(5, 2), torch.tensor([math.log(3.0), 0.0]).expand(5, 2)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(Kl()(_seen(student, teacher))) == pytest.approx(expected)
    assert float(Kl(temperature=2)(_seen(2 * student, 2 * teacher))) == pytest.approx(4 * expected)
    assert float(Kl()(_seen(teacher + 7, teacher))) == pytest.approx(0, abs=1e-6)


def test_features_are_the_mean_relative_error_over_modules() -> None:
    pairs = [
        (torch.full((2,), 3.0), torch.full((2,), 2.0)),
        (torch.full((3, 3), 5.0), torch.full((3, 3), 5.0)),
    ]
    assert float(Features(at="a")(_seen(None, None, a=pairs, b=pairs[:1]))) == pytest.approx(1 / 8)
    assert float(Features(at="b")(_seen(None, None, a=pairs, b=pairs[:1]))) == pytest.approx(1 / 4)


def test_terms_are_summed_by_weight() -> None:
    student, teacher = torch.full((4, 2), 3.0), torch.full((4, 2), 2.0)
    losses = parse_losses("mse{weight=2},mse{relative=false weight=0.5}")
    assert float(weighted_sum(losses, _seen(student, teacher))) == pytest.approx(2 * 0.25 + 0.5 * 1)


def test_texts_parse_and_print() -> None:
    text = "kl{temperature=2},features{weight=0.1 at=blocks.*},task{weight=0.5}"
    losses = parse_losses(text)
    assert losses == (Kl(temperature=2.0), Features(weight=0.1, at="blocks.*"), Task(weight=0.5))
    assert parse_losses(pipeline_text.join(losses)) == losses


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", UsageError, "is empty"),
        ("mes", UsageError, 'unknown loss .mes.. Did you mean "mse"'),
        ("kl{temperature=0}", UsageError, "temperature of 0"),
        ("mse{weight=-1}", UsageError, "weight -1"),
        ("mse+kl", PipelineSyntaxError, r'expected ","'),
        ("features{in=blocks}", UsageError, 'no option "in"'),
    ],
)
def test_bad_texts_are_refused(text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        parse_losses(text)


def test_a_tap_sees_what_a_module_ends_with_and_leaves_no_trace() -> None:
    teacher, student = build()
    x = torch.randn(16, 8)
    before, listing = student(x), str(student.graph)
    expected = F.gelu(F.linear(x, teacher.get_parameter("0.weight"), teacher.get_parameter("0.bias")))
    with tapped(teacher, ["1"]) as theirs, tapped(student, ["1"]) as mine:
        teacher(x)
        assert torch.equal(theirs["1"].value, expected)
        assert torch.equal(student(x), before)
        mine["1"].value.sum().backward()
        assert 0 < float((mine["1"].value - expected).detach().abs().max()) < 0.2
        assert student.get_parameter("0.weight").grad is not None
        assert student.get_parameter("2.weight").grad is None
    assert str(student.graph) == listing


def test_patterns_find_the_outermost_modules() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(2))
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    graph = capture(Net(), (torch.randn(3, 4),))
    assert modules_at(graph, "blocks.*") == modules_at(graph, "blocks") == ["blocks.0", "blocks.1"]
    assert modules_at(graph, "blocks.1.0, head") == ["blocks.1.0", "head"]
    with pytest.raises(UsageError, match=r"no module of the model matches 'block\.9'"):
        modules_at(graph, "block.9")


def test_a_model_without_lists_of_modules_has_no_blocks_to_learn_from() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(x)

    assert modules_at(capture(Net(), (torch.randn(3, 4),)), "blocks") == []
    assert float(Features()(_seen(torch.ones(2), torch.zeros(2), blocks=[]))) == 0


def test_two_terms_watch_their_own_modules() -> None:
    teacher, student = build()
    x = torch.randn(16, 8)
    with watched(student, teacher, ["1,3", "3"]) as features:
        student(x), teacher(x)
        found = features()
    assert [len(found[place]) for place in ("1,3", "3")] == [2, 1]
    assert found["1,3"][1][0] is found["3"][0][0]


@pytest.mark.parametrize("text", ["kl", "features{at=1,3}", "mse{weight=0.5},features{at=1}"])
def test_a_fine_tune_lowers_each_loss(tmp_path: Path, text: str) -> None:
    _, result = train(tmp_path, schedule="direct", steps=150, tuning={"losses": parse_losses(text)})
    assert sum(result.losses[-20:]) < 0.8 * sum(result.losses[:20])


def test_a_resumed_run_with_features_ends_with_the_same_bits(tmp_path: Path) -> None:
    tuning = {"losses": parse_losses("mse,features{at=1}")}
    whole, _ = train(tmp_path / "whole", steps=20, tuning=tuning)
    train(tmp_path / "part", steps=20, tuning=tuning)
    for path in (tmp_path / "part").glob("step-00000020/*"):
        path.unlink()
    again, result = train(tmp_path / "part", steps=20, tuning=tuning, resume=True)
    assert result.resumed_from == 18
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name))


def _labelled() -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs, and labels that the teacher knows nothing of."""
    for _ in range(100):
        x = torch.randn(16, 8)
        yield x, (x.sum(-1) > 0).long()


def _objective() -> TaskObjective:
    return TaskObjective(lambda outputs, batch: F.cross_entropy(outputs, batch[1]), (torch.zeros(16, 8),))


def test_the_task_loss_sees_labels_that_the_model_does_not(tmp_path: Path) -> None:
    teacher, student = build()
    config = FineTuneConfig(parse_schedule("direct"), steps=150, lr=1e-2, losses=(Task(),))
    assert not config.wants_teacher
    result = fine_tune(student, teacher, _labelled, config, folder=tmp_path, task=_objective())
    assert sum(result.losses[-10:]) < 0.8 * sum(result.losses[:10])


def test_named_batches_may_carry_names_besides_the_inputs() -> None:
    objective = TaskObjective(lambda outputs, batch: outputs, {"ids": torch.zeros(1)})
    assert objective.inputs_of({"ids": 1, "labels": 2}) == {"ids": 1}
    assert TaskObjective(objective.loss, torch.zeros(1)).inputs_of((3, 4)) == (3,)


def test_a_task_loss_without_a_function_is_refused(tmp_path: Path) -> None:
    teacher, student = build()
    config = FineTuneConfig(parse_schedule("direct"), steps=2, losses=(Task(),))
    with pytest.raises(UsageError, match=r"needs the job's own loss.*loss\(outputs, batch\)"):
        fine_tune(student, teacher, _labelled, config, folder=tmp_path)


def test_a_task_loss_that_is_no_scalar_is_refused(tmp_path: Path) -> None:
    teacher, student = build()
    config = FineTuneConfig(parse_schedule("direct"), steps=2, losses=(Task(),))
    objective = TaskObjective(lambda outputs, batch: outputs, (torch.zeros(16, 8),))
    with pytest.raises(TrainingError, match="Return a scalar tensor"):
        fine_tune(student, teacher, _labelled, config, folder=tmp_path, task=objective)


def test_features_of_an_uncaptured_teacher_are_refused(tmp_path: Path) -> None:
    _, student = build()
    config = FineTuneConfig(parse_schedule("direct"), steps=2, losses=(Features(at="1"),))
    with pytest.raises(UsageError, match="captured teacher"):
        fine_tune(student, nn.Linear(8, 4), _labelled, config, folder=tmp_path)
