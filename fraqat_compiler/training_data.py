"""Training batches without end: the same ones in every run with the same seed, whatever else draws random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from fraqat_compiler.calibration import Batch
from fraqat_compiler.errors import DataError

Data = Callable[[], Iterable[Batch]]


def endless(data: Data, seed: int) -> Iterator[Batch]:
    """Batches of `data()`, started again each time it ends.

    Random numbers that the data draws from torch, NumPy or `random` come from streams of their own: they depend on
    `seed` alone, and the caller's streams do not notice. So batch n is the same in every run, and a resumed run gets
    to batch n by drawing and dropping those before it.

    Raises:
        DataError: `data()` yields nothing, at first or when it is started again.
    """
    streams = _RandomStreams(seed)
    iterator: Iterator[Batch] = iter(())
    drawn = 0
    while True:
        with streams:
            batch = next(iterator, None)
            if batch is None:
                iterator = iter(data())
                batch = next(iterator, None)
        if batch is None:
            raise _nothing(drawn)
        drawn += 1
        yield batch


def _nothing(drawn: int) -> DataError:
    if not drawn:
        return DataError("the training data is empty.", "Let train_data() yield at least one batch.")
    return DataError(
        f"the training data ended after {drawn} batches and yields nothing when it is started again.",
        "Let train_data() make a fresh iterable at each call.",
    )


class _RandomStreams:
    """Random states of torch, NumPy and `random` that belong to the data alone: in force while it draws."""

    def __init__(self, seed: int) -> None:
        outside = _random_states()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self._inside = _random_states()
        _set_random_states(outside)

    def __enter__(self) -> None:
        self._outside = _random_states()
        _set_random_states(self._inside)

    def __exit__(self, *_: object) -> None:
        self._inside = _random_states()
        _set_random_states(self._outside)


def _random_states() -> tuple[Any, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), np.random.get_state(), random.getstate(), devices


def _set_random_states(states: tuple[Any, ...]) -> None:
    torch.set_rng_state(states[0])
    np.random.set_state(states[1])
    random.setstate(states[2])
    if states[3]:
        torch.cuda.set_rng_state_all(states[3])
