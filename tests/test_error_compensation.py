"""Error-compensated rounding of graphs: which weights, on which inputs, and what compile and fine-tune make of it."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fine_tune_job import build
from torch import Tensor, nn
from torch.fx import GraphModule

import fraqat_compiler
from fraqat_compiler import Job, fx_graph, gptq
from fraqat_compiler.calibration import calibrate
from fraqat_compiler.capture import capture
from fraqat_compiler.error_compensation import Gptq, compensate, compensated_layers
from fraqat_compiler.errors import DataError, UsageError
from fraqat_compiler.layers import weight_quantizers
from fraqat_compiler.pass_base import PassContext
from fraqat_compiler.passes.insert_fake_quant import InsertFakeQuant
from fraqat_compiler.progress import Progress
from fraqat_compiler.recipe import parse_recipe
from fraqat_compiler.simulation import simulate
from fraqat_compiler.training_setup import apply_recipe, own_parameters

DIGITS = Path(__file__).parents[1] / "examples" / "digits_dit"


class Net(nn.Module):
    """Linears that read one tensor, a weight that two ops share, a wide one and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.tied, self.wide = nn.Linear(16, 16), nn.Linear(16, 16)
        self.conv = nn.Conv1d(4, 4, 3)
        self.out = nn.Linear(14, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.query(x)) * self.key(x)
        return self.out(self.conv(self.tied(y) + self.tied(x) + self.wide(y)))


def _data(count: int = 6, seed: int = 1) -> list[tuple[Tensor]]:
    """Correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(16, 16, generator=torch.Generator().manual_seed(9)) / 2
    return [(torch.randn(8, 4, 16, generator=generator) @ mixing,) for _ in range(count)]


def _graphs(**options: Any) -> tuple[GraphModule, GraphModule]:
    """(teacher, student) over the same tensors."""
    torch.manual_seed(0)
    teacher = capture(Net(), _data()[0])
    options = {"weights": "4,wide=16"} | options
    student = InsertFakeQuant(**options).run(fx_graph.shared_copy(teacher), PassContext()).model
    calibrate(student, _data())
    return teacher, student


def _codes(graph: GraphModule) -> dict[str, Tensor]:
    return {name: module(fx_graph.get_tensor(graph, name)).detach() for name, module in weight_quantizers(graph)}


def test_weights_of_their_own_are_compensated_and_nothing_else_changes() -> None:
    teacher, student = _graphs()
    before, float_weights = _codes(student), {name: p.detach().clone() for name, p in teacher.named_parameters()}
    done = compensate(student, _data(), Gptq())
    own = ["query.weight", "key.weight", "out.weight"]
    assert [layer.weight for layer in done] == own == [layer.weight for layer in compensated_layers(student)]
    after = _codes(student)
    assert {name for name in before if not torch.equal(before[name], after[name])} == set(own)
    assert all(torch.equal(p, float_weights[name]) for name, p in teacher.named_parameters())
    assert all(isinstance(fx_graph.get_tensor(student, name), nn.Parameter) for name in own)


def test_what_is_reported_is_the_error_of_the_layers_output() -> None:
    teacher, student = _graphs()
    before = _codes(student)
    query = compensate(student, _data(), Gptq())[0]
    weight, rows = teacher.get_parameter("query.weight").detach(), torch.cat([x for (x,) in _data()]).flatten(0, 1)
    inputs = student.get_submodule(str(compensated_layers(student)[0].source.target))(rows)

    def error(rounded: Tensor) -> float:
        return float((inputs @ (rounded - weight).T).square().sum() / (inputs @ weight.T).square().sum())

    assert query.nearest_error == pytest.approx(error(before["query.weight"]), rel=1e-3)
    assert query.error == pytest.approx(error(_codes(student)["query.weight"]), rel=1e-3)
    assert query.error < 0.7 * query.nearest_error
    assert query.to_json() == {
        "weight": "query.weight",
        "nearest_error": query.nearest_error,
        "error": query.error,
        "damp": 0.01,
        "reason": "",
    }


def test_it_is_the_same_every_time_and_tells_its_progress() -> None:
    results, told = [], list[int]()
    for _ in range(2):
        _, student = _graphs()
        compensate(student, _data(), Gptq(), told.append)
        results.append(_codes(student))
    assert told == [2, 3] * 2
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_a_layer_whose_hessian_has_no_factor_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "factorized", lambda hessian, damp: None)
    _, student = _graphs()
    before = _codes(student)
    done = compensate(student, _data(), Gptq())
    assert {layer.reason for layer in done} == {"its Hessian has no Cholesky factor"}
    assert all(layer.error == layer.nearest_error and layer.damp is None for layer in done)
    assert all(torch.equal(before[name], codes) for name, codes in _codes(student).items())


def test_inputs_that_are_not_finite_are_refused() -> None:
    _, student = _graphs(activations="float")
    data = _data()
    data[2][0][0, 0, 0] = float("nan")
    with pytest.raises(DataError, match=r"query\.weight are not finite"):
        compensate(student, data, Gptq())


@pytest.mark.parametrize("damp", [0.0, 2.0])
def test_a_damp_that_cannot_be_is_refused(damp: float) -> None:
    with pytest.raises(UsageError, match=f"damp={damp:g}"):
        Gptq(damp)


# In a compile and a fine-tune


def _job() -> Job:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 8)).eval()
    (probe,) = _data(1, seed=3)[0]
    return Job(
        "net",
        lambda: model,
        lambda: _data()[0],
        calibration_data=lambda: _data(16),
        train_data=lambda: _data(10, seed=4),
        evaluate=lambda run: {"error": float((run(probe) - model(probe)).detach().square().mean())},
    )


@pytest.mark.parametrize("weight_range", ["minmax", "mse"])
def test_without_a_fine_tune_the_model_is_nearer_to_the_float_one(weight_range: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "4", "activations": "16", "steps": 0, "weight_range": weight_range}
    plain, made = (
        simulate(_job(), output=tmp_path / f"r{recipe}", recipe=recipe, **options) for recipe in ("", "gptq")
    )
    errors = [result.report["metrics"]["quantized"]["error"] for result in (plain, made)]
    assert errors[1] < 0.8 * errors[0]
    assert "compensation" not in plain.report


def test_a_model_without_such_weights_says_so(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3)
    result = simulate(model, (torch.randn(2, 3, 8, 8),), output=tmp_path, steps=0, recipe="gptq")
    assert result.report["compensation"] == []
    assert any("nothing to compensate" in warning for warning in result.report["warnings"])


class _Stopped(Progress):
    """Presses Ctrl-C after step 6 of the fine-tune."""

    def start(self, phase: str, total: int | None = None) -> None:
        self.tuning = phase == "fine-tune"

    def update(self, done: int, detail: str = "") -> None:
        if self.tuning and done == 6:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("recipe", ["gptq", "gptq,lsq,ema"])
def test_a_resumed_fine_tune_ends_with_the_same_bits(recipe: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": recipe, "steps": 12, "checkpoint_every": 4, "lr": 1e-3, "schedule": "short"}
    whole = simulate(_job(), output=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        simulate(_job(), output=tmp_path / "part", progress=_Stopped(), **options)
    again = simulate(_job(), output=tmp_path / "part", resume=True, **options)
    assert again.report["compensation"] == whole.report["compensation"]
    for name, tensor in whole.student.state_dict().items():
        assert torch.equal(tensor, again.student.state_dict()[name]), name


def test_a_fine_tune_starts_from_the_codes(tmp_path: Path) -> None:
    """At the end width, with a rate of next to nothing: what it ends with is what was compensated."""
    ends = [
        simulate(
            _job(), output=tmp_path / str(steps), recipe="gptq", weight_range="minmax", range_method="minmax", **more
        )
        for steps, more in ((0, {"steps": 0}), (2, {"steps": 2, "lr": 1e-12, "schedule": "direct"}))
    ]
    codes = [_codes(end.student) for end in ends]
    assert all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


@pytest.mark.parametrize("weight_range", ["minmax", "mse"])
def test_learned_ranges_start_from_the_codes(weight_range: str) -> None:
    _, student = build(weight_range=weight_range)
    compensate(student, [(torch.randn(16, 8),)], Gptq())
    before = _codes(student)
    apply_recipe(student, parse_recipe("lsq"), own_parameters(student, "all"))
    assert all(torch.equal(before[name], codes) for name, codes in _codes(student).items())


@pytest.fixture
def digits() -> Iterator[Job]:
    """The example's job, small enough for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(DIGITS)
        names = [path.stem for path in DIGITS.glob("*.py")]
        for name in names:
            patch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module("job")
        yield Job("digits", module.model, module.example_inputs, calibration_data=module.calibration_data)
        for name in names:
            sys.modules.pop(name, None)


def test_a_trained_transformer_compiles_nearer_to_its_float_self(digits: Job, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": "3,patch=8,label=8", "steps": 0, "weight_range": "minmax"}
    plain = simulate(digits, output=tmp_path / "plain", **options)
    made = fraqat_compiler.compile(digits, output=tmp_path / "made", recipe="gptq", **options)
    teacher, held_out = digits.model(), list(digits.calibration_data())[-1]  # type: ignore[misc]
    with torch.no_grad():
        errors = [float((end.student(*held_out) - teacher(*held_out)).square().mean()) for end in (plain, made)]
    assert errors[1] < 0.7 * errors[0]
    assert made.report["parity"]["onnx_unoptimized"]["max_lsb"] <= 1.01
    layers = made.report["compensation"]
    assert {layer["weight"] for layer in layers} >= {"proj_out.weight", "blocks.0.attn.q.weight"}
    assert sum(layer["error"] for layer in layers) < 0.5 * sum(layer["nearest_error"] for layer in layers)
    assert "compensate" in [phase["name"] for phase in made.report["phases"]]
