"""One choice for each layer, so that the summed loss is least within a budget: the multiple-choice knapsack."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_STATES = 20_000


class Choice(NamedTuple):
    """One width of one layer: what it costs (bits or bytes) and the loss that it brings."""

    cost: float
    loss: float


class _Increment(NamedTuple):
    """A step along a layer's convex hull, from one choice to a dearer one; `slope` is loss saved per cost."""

    slope: float
    layer: int
    start: int
    end: int


class _State(NamedTuple):
    cost: float
    loss: float
    regret: float
    picks: tuple[int, ...]


@dataclass(frozen=True)
class _Relaxed:
    """What the convex hulls tell.

    Attributes:
        picks: a choice for each layer that fits the budget.
        price: loss that one unit of cost is worth where the budget ends.
    """

    picks: tuple[int, ...]
    price: float


def least_loss(layers: Sequence[Sequence[Choice]], budget: float) -> tuple[int, ...]:
    """Index of the choice of each layer that make the sum of losses least while the costs sum to at most `budget`.

    First the Lagrangian relaxation (Everett 1963; for bit widths Shoham and Gersho 1988): layers move up their convex
    hulls in order of loss saved per cost. What its price leaves between bound and answer is then searched exactly, by
    dynamic programming over the states that are not dominated (Nemhauser and Ullmann 1969) and that the bound does
    not exclude. Should more than MAX_STATES remain, those nearest the bound go on, and the answer is no worse than the
    relaxation's. It is the same on every run.

    Raises:
        ValueError: not even the cheapest choices fit.
    """
    cheapest = sum(min(choice.cost for choice in choices) for choices in layers)
    if cheapest > budget:
        raise ValueError(f"the cheapest choices cost {cheapest}, the budget is {budget}")
    relaxed = _relaxed(layers, budget)
    best = _searched(layers, budget, relaxed)
    return min((relaxed.picks, best), key=lambda picks: _rank(layers, picks)) if best else relaxed.picks


def _rank(layers: Sequence[Sequence[Choice]], picks: tuple[int, ...]) -> tuple[float, float]:
    chosen = [choices[pick] for choices, pick in zip(layers, picks, strict=True)]
    return sum(choice.loss for choice in chosen), sum(choice.cost for choice in chosen)


def _relaxed(layers: Sequence[Sequence[Choice]], budget: float) -> _Relaxed:
    hulls = [_hull(choices) for choices in layers]
    picks = [hull[0] for hull in hulls]
    left = budget - sum(choices[pick].cost for choices, pick in zip(layers, picks, strict=True))
    price: float | None = None
    steps = (step for index, hull in enumerate(hulls) for step in _increments(layers[index], hull, index))
    for step in sorted(steps, key=lambda step: (-step.slope, step.layer, step.start)):
        cost = layers[step.layer][step.end].cost - layers[step.layer][step.start].cost
        if picks[step.layer] == step.start and cost <= left:
            picks[step.layer], left = step.end, left - cost
        elif price is None:
            price = step.slope
    return _Relaxed(tuple(picks), price or 0.0)


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Indices of the lower convex hull, from the cheapest choice on; loss falls along it."""
    hull: list[int] = []
    for index in sorted(range(len(choices)), key=lambda index: choices[index]):
        if hull and choices[index].loss >= choices[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(choices, hull[-1], index) >= _slope(choices, hull[-2], hull[-1]):
            hull.pop()
        hull.append(index)
    return hull


def _slope(choices: Sequence[Choice], start: int, end: int) -> float:
    """Loss saved per cost; `end` is dearer and better, as the order of the hull has it."""
    return (choices[start].loss - choices[end].loss) / (choices[end].cost - choices[start].cost)


def _increments(choices: Sequence[Choice], hull: list[int], layer: int) -> Iterable[_Increment]:
    for start, end in itertools.pairwise(hull):
        yield _Increment(_slope(choices, start, end), layer, start, end)


def _searched(layers: Sequence[Sequence[Choice]], budget: float, relaxed: _Relaxed) -> tuple[int, ...]:
    """The best picks of all; empty when nothing beats the relaxation's.

    A choice's regret is how much it loses at the relaxation's price against the layer's best. Of any picks that beat
    the incumbent the regrets sum to less than the gap between incumbent and bound, so other states are dropped.
    """
    priced = [[choice.loss + relaxed.price * choice.cost for choice in choices] for choices in layers]
    bound = sum(map(min, priced)) - relaxed.price * budget
    gap = max(_rank(layers, relaxed.picks)[0] - bound, 0.0)
    least_ahead = _sums_ahead([min(choice.cost for choice in choices) for choices in layers])
    states = [_State(0, 0.0, 0.0, ())]
    for index, choices in enumerate(layers):
        grown = (_grown(state, choices, priced[index]) for state in states)
        fitting = (
            state
            for group in grown
            for state in group
            if state.regret <= gap and state.cost + least_ahead[index] <= budget
        )
        states = _undominated(fitting)
    return min(states, key=lambda state: (state.loss, state.cost)).picks if states else ()


def _sums_ahead(costs: list[float]) -> list[float]:
    """For each layer the least that the layers after it cost."""
    total, sums = 0.0, []
    for cost in reversed(costs):
        sums.append(total)
        total += cost
    return sums[::-1]


def _grown(state: _State, choices: Sequence[Choice], priced: list[float]) -> Iterable[_State]:
    least = min(priced)
    for index, choice in enumerate(choices):
        regret = state.regret + priced[index] - least
        yield _State(state.cost + choice.cost, state.loss + choice.loss, regret, (*state.picks, index))


def _undominated(states: Iterable[_State]) -> list[_State]:
    """States of which none is dearer and worse than another; at most MAX_STATES."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda state: (state.cost, state.loss, state.picks)):
        if not kept or state.loss < kept[-1].loss:
            kept.append(state)
    if len(kept) <= MAX_STATES:
        return kept
    return sorted(sorted(kept, key=lambda state: state.regret)[:MAX_STATES])
