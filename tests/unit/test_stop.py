"""Requests to stop: noted, or answered at once where a body can be left."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

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


def listening(then: str, before: str = "pass") -> subprocess.CompletedProcess[str]:
    """A process that does `before`, listens, and does `then`."""
    code = (
        f"import os, signal; from hpcdit.stop import StopRequest; stop = StopRequest()\n{before}\nstop.listen()\n{then}"
    )
    root = Path(__file__).resolve().parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, text=True, capture_output=True)


def test_a_terminal_that_is_closed_asks_to_stop_but_not_under_nohup() -> None:
    closed = "os.kill(os.getpid(), signal.SIGHUP); print([stop.by])"
    assert listening(closed).stdout == "['SIGHUP']\n"
    assert listening(closed, before="signal.signal(signal.SIGHUP, signal.SIG_IGN)").stdout == "['']\n"


def test_a_second_interrupt_ends_the_process_at_once_without_a_traceback() -> None:
    ended = listening("for _ in range(2): os.kill(os.getpid(), signal.SIGINT); print(stop.by, flush=True)")
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "SIGINT\n", "")
