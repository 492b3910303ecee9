"""Parity and its noise floor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from lowering import fake_quantized, lowered
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from fraqat_compiler import parity
from fraqat_compiler.calibration import Batch, run_batch
from fraqat_compiler.errors import VerificationError
from fraqat_compiler.parity import Parity

SCALES = {"out": 0.5}


class Deep(nn.Module):
    """Sixteen residual layers, in which a step that falls to the other side spreads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(16))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + F.gelu(layer(F.layer_norm(x, (64,))))
        return x


class Named(nn.Module):
    """Two inputs whose order in a call is the caller's."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first - 2 * second


def floor_of(graph: GraphModule, batch: Batch) -> Parity:
    """The noise floor on one batch."""
    with torch.no_grad():
        outputs = parity.name_arrays(["output"], parity.flat_inputs(run_batch(graph, batch)))
    return parity.noise_floor(graph, [batch], [outputs], {"output": parity.output_scales(graph)[0]})


def distance(**changes: float | None) -> Parity:
    values = {"max_lsb": 1.0, "mean_lsb": 0.1, "max_abs": 0.1, "cosine": 1.0, "slope": 1.0, "samples": 1}
    return Parity(**(values | changes))  # type: ignore[arg-type]


def test_distances_are_counted_in_steps() -> None:
    reference, actual = np.array([0.0, 1.0, 2.0], np.float32), np.array([0.0, 1.5, 1.0], np.float32)
    found = parity.compare([{"out": reference}], [{"out": actual}], SCALES)
    assert (found.max_lsb, found.mean_lsb, found.max_abs) == (2.0, 1.0, 1.0)
    assert found.slope == pytest.approx(3.5 / 5)
    assert found.cosine == pytest.approx(3.5 / np.sqrt(5 * 3.25))


@pytest.mark.parametrize(
    ("actual", "message"),
    [
        ({}, "is missing"),
        ({"out": np.zeros(2, np.float32)}, "has shape"),
        ({"out": np.full(3, np.nan, np.float32)}, "holds NaN"),
    ],
)
def test_what_cannot_be_compared_is_an_error(actual: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        parity.compare([{"out": np.zeros(3, np.float32)}], [actual], SCALES)


def test_the_noise_floor_is_what_float32_adds_in_a_deep_net() -> None:
    torch.manual_seed(0)
    batch = torch.randn(64, 64)
    graph = fake_quantized(Deep(), (batch,), weights="8", activations="16")
    lowered(graph)
    floor = floor_of(graph, (batch,))
    assert floor.max_lsb is not None
    assert 1 < floor.max_lsb < 100
    assert floor.cosine > 0.999999


def test_float64_runs_on_the_same_grids_and_weights() -> None:
    torch.manual_seed(0)
    batch = torch.randn(8, 16)
    graph = fake_quantized(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), (batch,))
    lowered(graph)
    assert floor_of(graph, (batch,)).max_lsb == 0


def test_rounding_explains_twice_the_noise_floor_in_the_mean_and_one_step_always() -> None:
    still, deep = distance(max_lsb=0.0, mean_lsb=0.0), distance(max_lsb=9.0, mean_lsb=3.0)
    assert not parity.beyond_noise(distance(max_lsb=1.0), still)
    assert parity.beyond_noise(distance(max_lsb=2.0), still)
    assert not parity.beyond_noise(distance(max_lsb=50.0, mean_lsb=6.0), deep)
    assert parity.beyond_noise(distance(max_lsb=9.0, mean_lsb=6.1), deep)
    assert not parity.beyond_noise(distance(max_lsb=None, mean_lsb=None), still)


def test_keyword_inputs_come_in_the_order_of_the_graph() -> None:
    example = {"first": torch.ones(3), "second": torch.full((3,), 5.0)}
    graph = fake_quantized(Named(), (), example)
    swapped = dict(reversed(example.items()))
    first, second = parity.input_tensors(graph, swapped)
    assert (first[0].item(), second[0].item()) == (1.0, 5.0)
    lowered(graph)
    assert floor_of(graph, swapped).max_lsb == 0


def test_a_float_output_has_no_step() -> None:
    graph = fake_quantized(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), (torch.randn(2, 4),), skip="1")
    lowered(graph)
    assert parity.output_scales(graph) == [None]
    floor = floor_of(graph, (torch.randn(2, 4),))
    assert floor.max_lsb is None
    assert floor.max_abs < 1e-6
