"""A command that may hang, with an end."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

GOING_S = 2.0  # for ranks to be gone whose launcher was killed, and with them what they held


def watched(command: Sequence[str], end: float, progress: Path | None = None, quiet_s: float = 0.0) -> str:
    """Why a command did not end well; "" where it did. It is ended at `end`, of time.monotonic.

    progress: a file; also where that does not change for `quiet_s`. Nor does it outlive this process if that is asked
    to end. For the main thread.
    """
    why, before = "", signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and not why:
            time.sleep(0.1)
            if time.monotonic() > end:
                why = "the time was up"
            elif progress and time.time() - progress.stat().st_mtime > quiet_s:
                why = f"nothing was heard of it for {quiet_s:g} s"
    finally:
        if process.poll() is None:
            process.kill()  # of the launcher: its proxy then kills the ranks, which would not hear of anything less
            process.wait()
            time.sleep(GOING_S)
        signal.signal(signal.SIGTERM, before)
    return why or (f"ended with {process.returncode}" if process.returncode else "")
