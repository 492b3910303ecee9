"""Sensitivities: they predict the loss that quantizing one layer brings, and are kept for an equal measurement."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fraqat_compiler import sensitivity_cache
from fraqat_compiler.capture import capture
from fraqat_compiler.errors import DataError
from fraqat_compiler.fake_quant import WeightFakeQuantize
from fraqat_compiler.losses import Kl, Loss, Mse
from fraqat_compiler.quant_spec import QuantSpec
from fraqat_compiler.sensitivity import gauss_newton_diagonal, measure, measure_for, measured_loss

WIDTHS = (3.0, 4.0, 8.0)


class Deep(nn.Module):
    """Layers of very different weight for the output: the narrow first and last ones carry all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.loud, self.quiet = nn.Linear(32, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.gelu(self.first(x))
        out: Tensor = self.last(hidden + self.loud(hidden) + 0.01 * self.quiet(hidden))
        return out


@pytest.fixture(scope="module")
def graph() -> GraphModule:
    torch.manual_seed(0)
    return capture(Deep(), (torch.randn(16, 12),), {})


def _batches(count: int = 8) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 12, generator=generator),) for _ in range(count)]


def _candidates(graph: GraphModule) -> dict[str, dict[float, WeightFakeQuantize]]:
    weights = {name: tensor for name, tensor in graph.named_parameters() if tensor.ndim == 2}
    return {
        name: {width: WeightFakeQuantize(QuantSpec(width, axis=0), "weight", tensor.shape[:1]) for width in WIDTHS}
        for name, tensor in weights.items()
    }


def _alone(graph: GraphModule, loss: Loss) -> dict[tuple[str, float], float]:
    """What each layer's quantization truly brings by itself."""
    return {
        (name, width): measured_loss(graph, _batches(), {name: quantizer}, loss)
        for name, by_width in _candidates(graph).items()
        for width, quantizer in by_width.items()
    }


@pytest.mark.parametrize("loss", [Mse(), Kl(), Kl(temperature=2.0)], ids=repr)
def test_they_are_the_losses_that_the_layers_bring_by_themselves(graph: GraphModule, loss: Loss) -> None:
    """Over seven powers of ten; below 1e-7 the truth is rounding of float32 where the loss is a divergence."""
    found = measure(graph, _batches(), _candidates(graph), loss)
    known = {key: true for key, true in _alone(graph, loss).items() if true > 1e-7 or isinstance(loss, Mse)}
    assert len(known) >= 8
    for (name, width), true in known.items():
        assert 0.6 < found[name][width] / true < 1.7, (name, width)


def test_layers_whose_loss_is_twice_as_high_are_ranked_higher(graph: GraphModule) -> None:
    found, true = measure(graph, _batches(), _candidates(graph), Mse()), _alone(graph, Mse())
    pairs = [(low, high) for low in true for high in true if 2 * true[low] < true[high]]
    assert len(pairs) > 50
    assert all(found[low[0]][low[1]] < found[high[0]][high[1]] for low, high in pairs)


def test_the_diagonal_is_unbiased() -> None:
    """For y = W x the Gauss-Newton diagonal of the relative error is sum x_j^2 / sum y^2, whatever the row."""
    torch.manual_seed(0)
    linear = nn.Linear(6, 4, bias=False)
    batches: list[Any] = [(torch.randn(32, 6) * torch.linspace(0.2, 3, 6),)]
    graph = capture(linear, batches[0], {})
    found = torch.stack(
        [gauss_newton_diagonal(graph, batches, ["weight"], Mse(), seed, lambda _: None)["weight"] for seed in range(20)]
    ).mean(0)
    inputs = batches[0][0]
    expected = (inputs.square().sum(0) / linear(inputs).square().sum()).detach()
    torch.testing.assert_close(found, expected.expand(4, 6), rtol=0.25, atol=0)
    torch.testing.assert_close(found.mean(0), expected, rtol=0.1, atol=0)


def test_nothing_but_the_result_is_left_behind(graph: GraphModule) -> None:
    before = {name: tensor.clone() for name, tensor in graph.state_dict().items()}
    state, heard = torch.get_rng_state(), list[int]()
    first = measure(graph, _batches(3), _candidates(graph), Mse(), on_batch=heard.append)
    assert heard == [1, 2, 3]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in graph.state_dict().items())
    assert all(tensor.grad is None for tensor in graph.parameters())
    assert first == measure(graph, _batches(3), _candidates(graph), Mse())
    assert first != measure(graph, _batches(3), _candidates(graph), Mse(), seed=1)


def test_gradients_are_taken_where_the_caller_switched_them_off(graph: GraphModule) -> None:
    with torch.no_grad():
        found = measure(graph, _batches(2), _candidates(graph), Mse())
    assert found == measure(graph, _batches(2), _candidates(graph), Mse())
    assert all(value > 0 for by_width in found.values() for value in by_width.values())


def test_a_weight_that_no_float_output_depends_on_has_none() -> None:
    class Chooser(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.body = nn.Linear(12, 4), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.gate(x).argmax(-1), self.body(x)

    graph = capture(Chooser(), _batches(1)[0], {})
    found = measure(graph, _batches(2), _candidates(graph), Mse())
    assert set(found["gate.weight"].values()) == {0.0}
    assert all(value > 0 for value in found["body.weight"].values())


def test_a_model_without_float_output_is_refused() -> None:
    class Label(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    graph = capture(Label(12, 4), _batches(1)[0], {})
    with pytest.raises(DataError, match="no float output"):
        measure(graph, _batches(1), _candidates(graph), Mse())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ((torch.full((16, 12), float("nan")),), "calibration batch 1 makes the float model's output not finite"),
        ((torch.zeros(16, 5),), "calibration batch 1 does not run"),
    ],
)
def test_a_bad_batch_is_named(graph: GraphModule, bad: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure(graph, [*_batches(1), bad], _candidates(graph), Mse())


def test_the_measure_is_that_of_the_loss() -> None:
    assert measure_for("task,kl{temperature=2 weight=0.5}") == Kl(temperature=2, weight=0.5)
    assert measure_for("mse{relative=false},features{at=blocks.*}") == Mse()


# The cache


class _Counted:
    """Measures, and counts the batches that ran."""

    def __init__(self, path: Path) -> None:
        self.path, self.ran = path, 0

    def __call__(self, graph: GraphModule, batches: list[Any], loss: Loss | None = None, seed: int = 0) -> Any:
        heard = list[int]()
        found = sensitivity_cache.measured(
            self.path, graph, batches, _candidates(graph), loss or Mse(), seed, heard.append
        )
        self.ran = len(heard) if heard[0] == 1 else 0  # a known measurement is done at once
        return found


@pytest.fixture
def counted(tmp_path: Path) -> _Counted:
    return _Counted(tmp_path / "sensitivity.json")


def test_mappings_and_arrays_are_told_apart_by_all_their_values(graph: GraphModule) -> None:
    """What prints alike may differ in the middle."""

    def digest(values: Any) -> str:
        batches: list[Any] = [UserDict(x=values)]
        return sensitivity_cache.identity(graph, batches, _candidates(graph), Mse(), 0)

    long = torch.zeros(5000)
    other = long.index_fill(0, torch.tensor([2500]), 1.0)
    assert repr(long) == repr(other)
    assert digest(long) != digest(other) and digest(long.numpy()) != digest(other.numpy())
    assert digest(long) == digest(long.clone())


def test_an_equal_measurement_is_read_and_not_made(graph: GraphModule, counted: _Counted) -> None:
    first = counted(graph, _batches(2))
    assert counted.ran == 2
    assert counted(graph, _batches(2)) == first
    assert counted.ran == 0


def _other_weights() -> GraphModule:
    torch.manual_seed(0)
    model = Deep()
    with torch.no_grad():
        model.last.bias[3] += 1e-6  # of a tensor that is not even quantized
    return capture(model, (torch.randn(16, 12),), {})


@pytest.mark.parametrize(
    "change",
    [
        lambda counted, graph: counted(_other_weights(), _batches(2)),
        lambda counted, graph: counted(graph, _batches(3)),
        lambda counted, graph: counted(graph, [(batch[0] + 1e-6,) for batch in _batches(2)]),
        lambda counted, graph: counted(graph, _batches(2), Kl()),
        lambda counted, graph: counted(graph, _batches(2), seed=1),
    ],
    ids=["model", "more data", "other data", "loss", "seed"],
)
def test_whatever_changes_it_is_measured_anew(
    graph: GraphModule, counted: _Counted, change: Callable[[_Counted, GraphModule], Any]
) -> None:
    counted(graph, _batches(2))
    change(counted, graph)
    assert counted.ran > 0


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 1}', '{"key": "KEY", "sensitivity": 3}'])
def test_a_damaged_cache_is_made_anew(graph: GraphModule, counted: _Counted, content: str) -> None:
    key = sensitivity_cache.identity(graph, _batches(2), _candidates(graph), Mse(), 0)
    counted.path.write_text(content.replace("KEY", key))
    counted(graph, _batches(2))
    assert counted.ran == 2
    assert sensitivity_cache.load(counted.path, key) is not None
