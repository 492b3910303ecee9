"""The multiple-choice knapsack: as good as trying everything, and the same every time."""

from __future__ import annotations

import itertools
import random

import pytest

from fraqat_compiler.bit_assignment import Choice, least_loss

Layers = list[list[Choice]]


def _layers(count: int, seed: int, widths: tuple[int, ...] = (4, 6, 8)) -> Layers:
    """Layers of odd sizes whose loss falls fourfold for each bit, more or less."""
    draw = random.Random(seed)
    sizes = [draw.randint(1, 500) for _ in range(count)]
    weights = [10 ** draw.uniform(-4, 0) for _ in range(count)]
    return [
        [Choice(size * bits, weight * 4.0**-bits * draw.uniform(0.5, 2)) for bits in widths]
        for size, weight in zip(sizes, weights, strict=True)
    ]


def _sums(layers: Layers, picks: tuple[int, ...]) -> tuple[float, float]:
    chosen = [choices[pick] for choices, pick in zip(layers, picks, strict=True)]
    return sum(choice.cost for choice in chosen), sum(choice.loss for choice in chosen)


def _budget(layers: Layers, share: float) -> float:
    least, most = (sum(pick(choice.cost for choice in choices) for choices in layers) for pick in (min, max))
    return least + share * (most - least)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.37, 0.8, 1.0])
@pytest.mark.parametrize("seed", range(8))
def test_nothing_that_fits_is_better(seed: int, share: float) -> None:
    layers = _layers(7, seed)
    budget = _budget(layers, share)
    cost, loss = _sums(layers, least_loss(layers, budget))
    every = (_sums(layers, picks) for picks in itertools.product(range(3), repeat=len(layers)))
    assert cost <= budget
    assert loss == pytest.approx(min(loss for cost, loss in every if cost <= budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_better_where_losses_are_not_convex_or_do_not_fall(seed: int) -> None:
    draw = random.Random(seed)
    layers = [[Choice(draw.randint(1, 40), draw.random()) for _ in range(4)] for _ in range(6)]
    budget = _budget(layers, 0.4)
    _, loss = _sums(layers, least_loss(layers, budget))
    every = (_sums(layers, picks) for picks in itertools.product(range(4), repeat=len(layers)))
    assert loss == pytest.approx(min(loss for cost, loss in every if cost <= budget), rel=1e-12)


def test_hundreds_of_layers_are_near_the_bound_of_any_assignment() -> None:
    """A fractional knapsack over halves of each layer is at least as good as every assignment."""
    layers = _layers(400, 1, (4, 8))
    budget = _budget(layers, 0.3)
    _, loss = _sums(layers, least_loss(layers, budget))
    steps = sorted(((low.loss - high.loss) / (high.cost - low.cost), high.cost - low.cost) for low, high in layers)
    left, bound = budget - _budget(layers, 0), sum(low.loss for low, _ in layers)
    for slope, cost in reversed(steps):
        bound -= slope * min(cost, max(left, 0))
        left -= cost
    assert bound <= loss <= bound * 1.001


def test_more_budget_is_never_worse_and_the_answer_is_always_the_same() -> None:
    layers = _layers(60, 5)
    budgets = [_budget(layers, share / 20) for share in range(21)]
    picks = [least_loss(layers, budget) for budget in budgets]
    losses = [_sums(layers, found)[1] for found in picks]
    assert losses == sorted(losses, reverse=True)
    assert picks == [least_loss(layers, budget) for budget in budgets]


def test_equal_layers_and_useless_width_cost_nothing_extra() -> None:
    same = [[Choice(4, 0.0), Choice(8, 0.0)]] * 3
    assert least_loss(same, 100) == (0, 0, 0)


def test_a_budget_below_the_cheapest_is_refused() -> None:
    with pytest.raises(ValueError, match="cheapest choices cost 8"):
        least_loss([[Choice(4, 1.0), Choice(8, 0.0)]] * 2, 7)
