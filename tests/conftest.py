"""Settings that every test shares."""

from __future__ import annotations

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """Shells let background jobs ignore Ctrl-C; tests that press it would wait for ever."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """One seed and one thread: a figure that a test compares must not depend on the machine or on the test before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
