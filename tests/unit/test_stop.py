"""Requests to stop: noted, or answered at once where a body can be left."""

import os
import signal
import threading
import time

import pytest

from hpcdit.errors import Stopped
from hpcdit.stop import StopRequest


def slow() -> None:
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    try:
        time.sleep(20)
    except Exception:  # as libraries do
        time.sleep(20)


def test_what_can_be_left_is_left_at_once() -> None:
    begin = time.monotonic()
    with StopRequest() as stop:
        assert stop.leave(lambda: 3) == 3
        with pytest.raises(Stopped, match="SIGUSR1"):
            stop.leave(slow)
        with pytest.raises(Stopped, match="SIGUSR1"):  # not even begun
            stop.leave(lambda: pytest.fail("begun"))
    assert time.monotonic() - begin < 5


def test_elsewhere_it_is_noted_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.by == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
