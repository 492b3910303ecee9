"""Settings that every test shares."""

from __future__ import annotations

import functools
import signal

import pytest
import torch
from torch.onnx._internal.exporter import _registration as exporter_registration


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """Shells let background jobs ignore Ctrl-C; tests that press it would wait for ever."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _known_torchlib() -> None:
    """Each export parses the sources of 500 functions again, always the same; the suite makes hundreds of exports."""
    apis = exporter_registration.onnxscript_apis
    apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)


@pytest.fixture(autouse=True)
def _deterministic() -> None:
    """One seed and one thread: a figure that a test compares must not depend on the machine or on the test before."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
