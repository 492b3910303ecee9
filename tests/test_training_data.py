"""Batches without end: fixed by the seed, started again, and drawn apart from other random numbers."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from fraqat_compiler.errors import DataError
from fraqat_compiler.training_data import Data, endless


def _first(data: Data, count: int, seed: int = 0) -> list[list[float]]:
    return [[float(value) for value in batch] for batch in itertools.islice(endless(data, seed), count)]


def _drawn() -> list[tuple[float, float, float]]:
    return [(float(torch.rand(())), float(np.random.rand()), random.random()) for _ in range(3)]


def test_the_seed_alone_fixes_what_is_drawn() -> None:
    torch.manual_seed(1)
    first = _first(_drawn, 10)
    torch.manual_seed(2)
    assert _first(_drawn, 10) == first
    assert _first(_drawn, 10, seed=1) != first
    assert first[0] != first[3]  # a second epoch goes on in the stream, it does not repeat the first


def test_the_callers_random_numbers_do_not_notice() -> None:
    expected = _drawn_after(lambda: None)
    assert _drawn_after(lambda: _first(_drawn, 5)) == expected


def _drawn_after(action: object) -> list[tuple[float, float, float]]:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    assert callable(action)
    action()
    return _drawn()


def test_random_numbers_between_batches_change_no_batch() -> None:
    expected = _first(_drawn, 8)
    seen = []
    for batch in itertools.islice(endless(_drawn, 0), 8):
        torch.rand(7)
        random.random()
        seen.append(list(batch))
    assert seen == expected


def test_a_shuffling_loader_gives_the_same_order() -> None:
    def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(TensorDataset(torch.arange(12.0)), batch_size=1, shuffle=True)

    first = _first(loader, 30)
    assert _first(loader, 30) == first
    assert sorted(first[:12]) == sorted(first[12:24]) == [[float(value)] for value in range(12)]
    assert first[:12] != first[12:24]


def test_data_that_cannot_start_again_says_so() -> None:
    once = iter([(1.0,), (2.0,)])
    with pytest.raises(DataError, match=r"ended after 2 batches.*fresh iterable"):
        _first(lambda: once, 3)
    with pytest.raises(DataError, match="is empty"):
        _first(list, 1)
