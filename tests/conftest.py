"""Settings that every test shares."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """One seed and one thread: a figure that a test compares must not depend on the machine or on the test before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
