"""Ctrl-C waits for the end of a block."""

from __future__ import annotations

import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from fraqat_compiler.interrupt import uninterrupted


def _press_twice_then(action: Callable[[], None]) -> None:
    with uninterrupted():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        action()


def test_ctrl_c_waits_for_the_end() -> None:
    done: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        _press_twice_then(lambda: done.append(True))
    assert done == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_goes_first() -> None:
    with pytest.raises(ZeroDivisionError):
        _press_twice_then(lambda: print(1 // 0))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_applications_own_handler_stays() -> None:
    heard = []
    before = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    try:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [True]


def test_other_threads_run_as_they_are() -> None:
    def work() -> int:
        with uninterrupted():
            return 7

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(work).result() == 7
