"""A signal ends a wait, also one that comes just before the wait begins."""

from __future__ import annotations

import signal
import time
from typing import NoReturn

import pytest

from lamina import clock


class _Stop(Exception):
    pass


def test_a_signal_that_comes_just_before_the_system_call_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of Python runs between two instructions: here the signal comes where there are none before the call."""
    calls = []
    original = time.sleep

    def sleep(seconds: float) -> None:
        calls.append(seconds)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGUSR2)
        original(0)

    def stop(number: int, frame: object) -> NoReturn:
        raise _Stop

    monkeypatch.setattr(time, "sleep", sleep)
    before = signal.signal(signal.SIGUSR2, stop)
    try:
        with pytest.raises(_Stop):
            clock.sleep(86400)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert len(calls) == 2
    assert max(calls) <= 0.1


@pytest.mark.parametrize("seconds", [-1, 0, 0.001, 0.25])
def test_a_wait_is_as_long_as_asked(seconds: float) -> None:
    began = time.monotonic()
    clock.sleep(seconds)
    assert time.monotonic() - began >= seconds
